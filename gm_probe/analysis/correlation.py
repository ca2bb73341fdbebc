"""Kendall's τ-b of each measure against each generalization gap, over all runs and per subgroup.

The p-value here is the naive one: it takes runs as independent draws, which the seeds of one setting are not,
so it fires too often on a sweep with several seeds a setting.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from scipy import stats

from gm_probe.analysis.table import Exclusion, RunTable, by_reason, require_known, show
from gm_probe.core.errors import DataError


@dataclass(frozen=True, slots=True)
class Correlation:
    """τ-b between a measure and a gap over the ``n`` runs that have both.

    ``tau`` and ``p_naive`` are None exactly when ``reason`` says why τ is undefined. ``ties_measure`` and
    ``ties_gap`` count the pairs of runs equal in that variable, pairs equal in both included. ``missing``
    lists the runs without a usable value: n + len(missing) is the number of runs looked at.
    """

    tau: float | None
    p_naive: float | None
    n: int
    ties_measure: int
    ties_gap: int
    reason: str | None = None
    missing: tuple[Exclusion, ...] = ()


@dataclass(frozen=True, slots=True)
class MeasureStatistics:
    """All about one measure: ``gaps[gap]`` over all runs, ``subgroups[label][gap]`` within a subgroup.

    ``labels`` is the measure's in ``RunTable.labels``; ``warnings`` say in which settings of the measurement
    the runs differ, so that their values are not comparable.
    """

    name: str
    labels: str | None
    gaps: dict[str, Correlation]
    subgroups: dict[str, dict[str, Correlation]]
    warnings: tuple[str, ...]
    notes: tuple[str, ...]


def correlate(
    table: RunTable, gaps: Sequence[str] = (), group_by: Sequence[str] = ()
) -> tuple[MeasureStatistics, ...]:
    """Statistics of every measure of ``table`` against ``gaps`` (empty: all it has), in the table's order.

    Raises:
        UsageError: a gap or a ``group_by`` name that the table does not have.
        DataError: fewer than two runs, so that no rank correlation exists.
    """
    require_known(gaps, table.gaps, "gap")
    if table.num_runs < 2:
        reasons = "; ".join(
            f"{len(runs)} excluded: {reason}" for reason, runs in by_reason(table.excluded).items()
        )
        raise DataError(
            f"{table.source} has {table.num_runs} usable run{f' ({reasons})' if reasons else ''}; "
            "a rank correlation needs at least 2"
        )
    gaps = gaps or table.gaps
    everyone = np.arange(table.num_runs)
    groups = group_rows(table, group_by) if group_by else {}
    return tuple(
        MeasureStatistics(
            name=name,
            labels=table.labels.get(name),
            gaps={gap: _correlation(table, name, gap, everyone) for gap in gaps},
            subgroups={
                label: {gap: _correlation(table, name, gap, rows) for gap in gaps}
                for label, rows in groups.items()
            },
            warnings=_warnings(table, name),
            notes=_notes(table, name),
        )
        for name in table.measures
    )


def group_rows(table: RunTable, group_by: Sequence[str]) -> dict[str, np.ndarray]:
    """Row numbers of each subgroup under its label, such as ``augment=true, weight_decay=0.0005``.

    Subgroups are in the order of their values, numbers as numbers; a setting that a run lacks
    reads ``unset``.

    Raises:
        UsageError: a name that is not a hyperparameter of the table.
    """
    require_known(group_by, table.hyperparameters, "hyperparameter to group by named")
    rows: dict[str, list[int]] = {}
    order: dict[str, list[tuple[int, float, str]]] = {}
    settings = [table.frame[name].to_list() for name in group_by]
    for row, values in enumerate(zip(*settings, strict=True)):
        shown = [show(value) for value in values]
        label = ", ".join(f"{name}={text}" for name, text in zip(group_by, shown, strict=True))
        rows.setdefault(label, []).append(row)
        order[label] = [_sort_key(value, text) for value, text in zip(values, shown, strict=True)]
    return {label: np.array(rows[label]) for label in sorted(rows, key=order.__getitem__)}


def kendall(measure: np.ndarray, gap: np.ndarray) -> Correlation:
    """τ-b of two finite float arrays (n,), (n,): (concordant − discordant) / √((all − tied x)(all − tied y)).

    ``p_naive`` is two-sided: exact without ties for small n, else the normal approximation (scipy's "auto").

    Source: Kendall 1945, "The treatment of ties in ranking problems".
    """
    n = len(measure)
    ties = (tied_pairs(measure), tied_pairs(gap))
    all_pairs = n * (n - 1) // 2
    reason = None
    if n < 2:
        reason = f"{n} run{'' if n == 1 else 's'} with both values; τ needs 2"
    elif ties[0] == all_pairs:
        reason = f"the measure is constant over {n} runs"
    elif ties[1] == all_pairs:
        reason = f"the gap is constant over {n} runs"
    if reason is not None:
        return Correlation(None, None, n, *ties, reason=reason)
    result = stats.kendalltau(measure, gap, variant="b")
    tau, p_naive = float(result.statistic), float(result.pvalue)
    assert math.isfinite(tau)  # neither variable is constant here
    assert math.isfinite(p_naive)
    return Correlation(tau, p_naive, n, *ties)


def tied_pairs(values: np.ndarray) -> int:
    """Number of pairs i < j with values[i] == values[j], for an array (n,)."""
    counts = np.unique(values, return_counts=True)[1].astype(np.int64)
    return int((counts * (counts - 1) // 2).sum())


def _correlation(table: RunTable, name: str, gap: str, rows: np.ndarray) -> Correlation:
    """``kendall`` over those of ``rows`` that have both values, with the others listed."""
    frame = table.frame.iloc[rows]
    gone = []
    for row, run, *values in zip(rows.tolist(), frame["run"], frame[name], frame[gap], strict=True):
        reasons = [
            f"{column}: {table.missing.get(column, {}).get(row, 'no value')}"
            for column, value in zip((name, gap), values, strict=True)
            if math.isnan(value)
        ]
        if reasons:
            gone.append(Exclusion(run, "; ".join(reasons)))
    complete = frame[[name, gap]].dropna()
    result = kendall(complete[name].to_numpy(), complete[gap].to_numpy())
    return replace(result, missing=tuple(gone))


def _warnings(table: RunTable, name: str) -> tuple[str, ...]:
    warnings = []
    for setting, runs in table.conditions.get(name, {}).items():
        if len(runs) > 1:
            values = [f"{value} × {count}" for value, count in sorted(runs.items(), key=lambda of: -of[1])]
            shown = ", ".join(values[:5]) + (f" and {len(values) - 5} more" if len(values) > 5 else "")
            warnings.append(f"{setting} differs between runs ({shown}): not comparable")
    return tuple(warnings)


def _notes(table: RunTable, name: str) -> tuple[str, ...]:
    missing = table.missing.get(name, {})
    reasons = by_reason(Exclusion(str(row), reason) for row, reason in missing.items())
    notes = [f"{len(rows)} of {table.num_runs} left out: {reason}" for reason, rows in reasons.items()]
    unconverged = len(table.unconverged.get(name, ()))
    if unconverged:
        notes.append(f"{unconverged} of {table.num_runs - len(missing)} not converged (kept)")
    return tuple(notes)


def _sort_key(value: Any, text: str) -> tuple[int, float, str]:
    return (0, float(value), "") if isinstance(value, int | float) else (1, 0.0, text)
