"""Robust sign error, as it was published: how often the measure orders two settings wrongly.

Source: Dziugaite et al. 2020, "In Search of Robust Measures of Generalization": a measure is judged by its
worst environments, not by their mean. An environment is two settings that differ in one hyperparameter. Pairs of runs
whose gap difference may be sampling noise weigh less (Hoeffding's bound for the test set's size); environments of an
effective size below 12 are left out.
"""

import math
from collections.abc import Mapping

import numpy as np

from gm_probe.analysis.design import Cells
from gm_probe.analysis.run_pairs import Floats, Integers, dense_ranks

LEAST_SIZE = 12
MOST_PAIRS = 2 * 10**6


def sign_errors(
    x: Floats, y: Floats, num_test: Floats | None, cells: Mapping[str, Cells]
) -> tuple[Floats, bool]:
    """Return the sign error of every environment of ``cells`` (over these runs) that is large enough.

    Beside them, whether only some settings were looked at.

    ``num_test`` (n,) is the size of each run's test set where ``y`` is a difference of errors; None weighs all pairs
    alike.
    """
    sizes = np.full(len(x), math.inf) if num_test is None else num_test
    errors: list[Floats] = [np.empty(0)]
    sampled = False
    for cell, value in cells.values():
        setting = dense_ranks(cell * (value.max(initial=0) + 1) + value)
        first, second, some = _pairs(cell, setting)
        sampled |= some
        if not len(first):
            continue
        weight = _weights(y[first] - y[second], np.minimum(sizes[first], sizes[second]))
        agree = np.sign(x[first] - x[second]) * np.sign(y[first] - y[second])
        ends = np.sort(np.stack([setting[first], setting[second]]), axis=0)
        environment = dense_ranks(ends[0] * (setting.max() + 1) + ends[1])
        total, squares = np.bincount(environment, weight), np.bincount(environment, weight**2)
        wrong = np.bincount(environment, weight * (1 - agree) / 2)
        size = np.divide(total**2, squares, out=np.zeros_like(total), where=squares > 0)
        large = size >= LEAST_SIZE - 1e-9
        errors.append(wrong[large] / total[large])
    return np.concatenate(errors), sampled


def _weights(difference: Floats, size: Floats) -> Floats:
    """Return max(0, 1 − 2 exp(−m Δ²/2))²: how sure the sign of a gap difference Δ on m examples is; 0 for Δ = 0."""
    with np.errstate(invalid="ignore"):  # ∞ · 0
        chance = 2 * np.exp(-size * difference**2 / 2)
    return np.where(difference == 0, 0.0, np.maximum(0.0, 1 - chance) ** 2)


def _pairs(cell: Integers, setting: Integers) -> tuple[Integers, Integers, bool]:
    """Return the pairs of runs of one cell and two settings that could make an environment of ``LEAST_SIZE``.

    Where they are too many, those of some settings, drawn at random.
    """
    size = np.bincount(setting)[setting]
    largest = np.zeros(cell.max(initial=-1) + 1, np.int64)
    np.maximum.at(largest, cell, size)
    order = np.argsort(cell, kind="stable")
    order = order[(size * largest[cell] >= LEAST_SIZE)[order]]
    num_pairs = int((np.bincount(cell[order]) ** 2).sum() // 2)
    if sampled := num_pairs > MOST_PAIRS:
        num_settings = int(setting.max()) + 1
        some = max(2, int(num_settings * math.sqrt(MOST_PAIRS / num_pairs)))
        chosen = np.random.default_rng(0).choice(num_settings, some, replace=False)
        order = order[np.isin(setting[order], chosen)]
    first, second = [order[:0]], [order[:0]]
    for lag in range(1, int(np.bincount(cell[order]).max(initial=0))):
        a, b = order[:-lag], order[lag:]
        match = (cell[a] == cell[b]) & (setting[a] != setting[b])
        first.append(a[match])
        second.append(b[match])
    return np.concatenate(first), np.concatenate(second), sampled
