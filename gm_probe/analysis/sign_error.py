"""Robust sign error: how often the measure orders two settings wrongly that differ in one hyperparameter.

Source: Dziugaite et al. 2020, "In Search of Robust Measures of Generalization": a measure is judged by its
worst environments, not by their mean; pairs of runs whose gap difference may be sampling noise weigh less
(Hoeffding's bound for the test set's size); environments of an effective size below 12 are left out.
"""

import math
from collections.abc import Mapping

import numpy as np

from gm_probe.analysis.design import Cells, numbers_of
from gm_probe.analysis.rank import Floats, Integers, dense_ranks
from gm_probe.analysis.results import Environment, SignError
from gm_probe.analysis.sample import Draws, Sample
from gm_probe.tables.table import RunTable, show

LEAST_SIZE = 12
MOST_PAIRS = 2 * 10**6


def sign_error(
    sample: Sample, gap: str, table: RunTable, cells: Mapping[str, Cells], draws: Draws
) -> SignError:
    """Sign error of every environment: two settings equal in all but one of the hyperparameters of ``cells``."""
    environments: list[Environment] = []
    num_all = 0
    sizes, note = _test_sizes(sample, gap, table)
    shown = {name: [show(value) for value in table.frame[name]] for name in cells}
    for name, (cell, value) in cells.items():
        cell, value = cell[sample.rows], value[sample.rows]
        num_all += _num_environments(cell, value)
        first, second = _pairs(cell, value, draws)
        if not len(first):
            continue
        weight = _weights(sample.y[first] - sample.y[second], np.minimum(sizes[first], sizes[second]))
        agree = np.sign(sample.x[first] - sample.x[second]) * np.sign(sample.y[first] - sample.y[second])
        setting = dense_ranks(cell * (value.max() + 1) + value)
        ends = setting[first] * (setting.max() + 1) + setting[second]
        _, example, number, count = np.unique(
            ends, return_index=True, return_inverse=True, return_counts=True
        )
        total, squares = np.bincount(number, weight), np.bincount(number, weight**2)
        wrong = np.bincount(number, weight * (1 - agree) / 2)
        size = np.divide(total**2, squares, out=np.zeros_like(total), where=squares > 0)
        for each in np.flatnonzero(size >= LEAST_SIZE - 1e-9):
            rows = sample.rows[first[example[each]]], sample.rows[second[example[each]]]
            label = _label(shown, name, *rows)
            error = float(wrong[each] / total[each])
            environments.append(Environment(name, label, error, int(count[each]), float(size[each])))
    skipped = num_all - len(environments)
    if not environments:
        reason = (
            f"none of {num_all} pairs of settings that differ in one hyperparameter has an effective size "
            f"of {LEAST_SIZE} pairs of runs"
        )
        return SignError((), None, None, None, skipped, reason, note)
    errors = np.array([each.error for each in environments])
    worst = float(np.quantile(errors, 0.9))
    return SignError(
        tuple(environments), float(errors.mean()), worst, float(errors.max()), skipped, None, note
    )


def _test_sizes(sample: Sample, gap: str, table: RunTable) -> tuple[Floats, str | None]:
    """Size of each run's test set, ∞ (every difference is taken as real) where unknown, and the note on it."""
    unknown = np.full(sample.n, math.inf)
    if gap != "error_gap":
        return unknown, f"all pairs have equal weight, because Hoeffding's bound does not hold for {gap}"
    sizes = numbers_of(table, "num_test")
    if sizes is None or not (sizes[sample.rows] > 0).all():
        return unknown, "all pairs have equal weight, because num_test is unknown for some runs"
    return sizes[sample.rows], None


def _weights(difference: Floats, size: Floats) -> Floats:
    """max(0, 1 − 2 exp(−m Δ²/2))²: how sure the sign of a gap difference Δ on m examples is; 0 for Δ = 0."""
    with np.errstate(invalid="ignore"):  # ∞ · 0
        chance = 2 * np.exp(-size * difference**2 / 2)
    return np.where(difference == 0, 0.0, np.maximum(0.0, 1 - chance) ** 2)


def _num_environments(cell: Integers, value: Integers) -> int:
    settings = np.unique(np.stack([cell, value]), axis=1)
    counts = np.unique(settings[0], return_counts=True)[1]
    return int((counts * (counts - 1) // 2).sum())


def _pairs(cell: Integers, value: Integers, draws: Draws) -> tuple[Integers, Integers]:
    """The pairs of runs of one cell that differ in value and could make an environment of ``LEAST_SIZE``."""
    if not len(cell):
        return np.empty(0, np.int64), np.empty(0, np.int64)
    setting = dense_ranks(cell * (value.max() + 1) + value)
    size = np.bincount(setting)[setting]
    largest = np.zeros(cell.max() + 1, np.int64)
    np.maximum.at(largest, cell, size)
    large = size * largest[cell] >= LEAST_SIZE
    order = np.lexsort((value, cell))
    order = order[large[order]]
    per_cell = np.bincount(cell[order])
    num_pairs = int((per_cell**2).sum() // 2)
    if num_pairs > MOST_PAIRS:
        num_settings = setting.max() + 1
        some = max(2, int(num_settings * math.sqrt(MOST_PAIRS / num_pairs)))
        chosen = np.zeros(num_settings, bool)
        chosen[draws.rng("environments").choice(num_settings, some, replace=False)] = True
        order = order[chosen[setting[order]]]
        draws.notes[f"sign errors among {some:,} of {num_settings:,} settings, drawn at random"] = None
    first, second = [], []
    for lag in range(1, int(per_cell.max(initial=0))):
        a, b = order[:-lag], order[lag:]
        match = (cell[a] == cell[b]) & (value[a] != value[b])
        first.append(a[match])
        second.append(b[match])
    return (np.concatenate(first), np.concatenate(second)) if first else (order[:0], order[:0])


def _label(shown: Mapping[str, list[str]], name: str, row: int, other: int) -> str:
    rest = ", ".join(f"{each}={values[row]}" for each, values in shown.items() if each != name)
    return f"{name} {shown[name][row]} / {shown[name][other]}" + (f" at {rest}" if rest else "")
