"""All statistics of each measure against each generalization gap, over all runs and per subgroup.

Kendall's τ-b with an interval from leaving out whole settings, and seeds that they share, and a p from permuting
settings: the naive p takes runs as independent draws, which the seeds of one setting are not.
"""

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from scipy import stats

from gm_probe.analysis.comparison import Resampled, compare
from gm_probe.analysis.conditional import conditioning
from gm_probe.analysis.design import Design, design_of, seed_numbers, setting_names, setting_numbers
from gm_probe.analysis.granulated import granulated
from gm_probe.analysis.intervals import LEAST_UNITS, percentile_interval
from gm_probe.analysis.noise import noise_filtered
from gm_probe.analysis.pair_sums import EXACT_SETTINGS, PairSums, pair_sums, tau_of
from gm_probe.analysis.partial import partial
from gm_probe.analysis.permutation import EXACT_RUNS, permutation_p, permuted_coefficients
from gm_probe.analysis.prediction import prediction, selection
from gm_probe.analysis.rank import tied_pairs
from gm_probe.analysis.requests import require_statistics
from gm_probe.analysis.results import (
    Correlation,
    Details,
    MeasureStatistics,
    Quantity,
    SweepStatistics,
)
from gm_probe.analysis.sample import Draws, Sample, sample_of, shared_seeds, tau_interval
from gm_probe.analysis.sign_error import sign_error
from gm_probe.analysis.strata import between, stratified, within
from gm_probe.errors import DataError, ResourceError
from gm_probe.tables.table import Exclusion, RunTable, by_reason, require_known, show

RESAMPLES = 2000
MOST_RUNS = 30_000
"""All pairs of more runs do not fit in memory."""


def correlate(
    table: RunTable,
    gaps: Sequence[str] = (),
    group_by: Sequence[str] = (),
    *,
    controls: Sequence[str] = (),
    seed: int = 0,
    resamples: int = RESAMPLES,
    skip: Collection[str] = (),
) -> SweepStatistics:
    """Statistics of every measure of ``table`` against ``gaps`` (empty: all it has), in the table's order.

    ``controls`` are columns to take partial τ given; empty: the usual ones and the hyperparameters. ``skip``
    names some of ``PARTS``. Large tables take fewer than ``resamples``, and a note says so.

    Raises:
        UsageError: a gap, a ``group_by``, control or part that there is not, or ``resamples`` below 100.
        DataError: fewer than two runs, so that no rank correlation exists.
        ResourceError: more than ``MOST_RUNS`` runs.
    """
    require_known(gaps, table.gaps, "gap")
    require_statistics(skip, resamples)
    require_known(
        controls, [*table.measures, *table.hyperparameters, *table.outcomes], "column to control for named"
    )
    _require_runs(table)
    gaps = gaps or table.gaps
    draws = Draws(seed, resamples)
    groups = group_rows(table, group_by) if group_by else {}
    design = design_of(table, group_by, controls)
    everyone = np.arange(table.num_runs)
    parts: dict[str, dict[str, _Part]] = {gap: {} for gap in gaps}
    measures = []
    for name in table.measures:
        whole, details = {}, {}
        for gap in gaps:
            part = parts[gap][name] = _part(table, design, name, gap, everyone, draws)
            whole[gap] = part.correlation
            if "details" not in skip:
                details[gap] = _details(table, design, name, gap, part, draws, skip)
        subgroups = {
            label: {gap: _part(table, design, name, gap, rows, draws).correlation for gap in gaps}
            for label, rows in groups.items()
        }
        labels, notes = table.labels.get(name), _notes(table, name)
        measures.append(
            MeasureStatistics(name, labels, whole, subgroups, _warnings(table, name), notes, details)
        )
    comparisons = {
        gap: compare(
            {name: part.sample for name, part in of.items()},
            {name: part.resampled for name, part in of.items() if part.resampled},
            draws,
        )
        for gap, of in parts.items()
        if "comparisons" not in skip
    }
    sizes = np.unique(design.setting, return_counts=True)[1]
    return SweepStatistics(
        measures=tuple(measures),
        comparisons=comparisons,
        num_runs=table.num_runs,
        num_settings=len(sizes),
        largest_setting=int(sizes.max()),
        seed=seed,
        resamples=resamples,
        notes=(*_design_notes(table, sizes), *draws.notes),
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
    ranks = stats.rankdata(measure), stats.rankdata(gap)
    return Correlation(tau, p_naive, n, *ties, spearman=_pearson(*ranks), pearson=_pearson(measure, gap))


@dataclass(frozen=True, slots=True)
class _Part:
    """One measure and gap over some runs; ``sums`` and ``resampled`` are None where τ is undefined."""

    correlation: Correlation
    sample: Sample
    sums: PairSums | None = None
    resampled: Resampled | None = None


def _part(table: RunTable, design: Design, name: str, gap: str, rows: np.ndarray, draws: Draws) -> _Part:
    """τ over those of ``rows`` that have both values, with the others listed."""
    frame = table.frame.iloc[rows]
    x, y = frame[name].to_numpy(), frame[gap].to_numpy()
    present = np.isfinite(x) & np.isfinite(y)
    kept = rows[present]
    seed = None if design.seed is None else design.seed[kept]
    sample = sample_of(x[present], y[present], kept, design.setting[kept], seed)
    names = frame["run"].to_list()
    missing = tuple(
        Exclusion(
            names[place],
            "; ".join(
                f"{column}: {table.missing.get(column, {}).get(int(rows[place]), 'no value')}"
                for column, values in ((name, x), (gap, y))
                if not math.isfinite(values[place])
            ),
        )
        for place in np.flatnonzero(~present)
    )
    result = replace(kendall(sample.x, sample.y), missing=missing)
    num_settings = 1 if sample.one_setting else sample.num_settings
    if result.tau is None:
        return _Part(replace(result, num_settings=num_settings), sample)
    sums = pair_sums(sample.x, sample.y, sample.setting, sample.num_settings, between=True)
    taus = tau_of(sums.resampled(draws.counts(sample.num_settings)))
    low, high, why = tau_interval(result.tau, sums, sample)
    finite = taus[np.isfinite(taus)]
    percentiles = (None, None) if why else percentile_interval(finite)
    permutations = draws.blocks(sample.setting, seed=sample.seed)
    num = len(permutations.rows)
    p = permutation_p(permuted_coefficients(sample.x, sample.y, permutations.rows)) if num else None
    result = replace(
        result,
        num_settings=num_settings,
        low=low,
        high=high,
        low_percentile=percentiles[0],
        high_percentile=percentiles[1],
        interval_reason=why,
        num_resamples=len(finite),
        p=p,
        p_reason=permutations.limit,
        num_permutations=num,
    )
    without_run = tau_of(sums.leave_one_run_out())
    return _Part(result, sample, sums, Resampled(sample, result.tau or 0.0, without_run, taus))


def _details(
    table: RunTable, design: Design, name: str, gap: str, part: _Part, draws: Draws, skip: Collection[str]
) -> Details:
    sample, whole = part.sample, part.correlation
    values = {hyper: numbers for hyper, (_, numbers) in design.cells.items()}
    sums = part.sums or pair_sums(sample.x, sample.y, sample.setting, sample.num_settings)
    inside = within(sample, sums, draws)
    strata = [stratified(sample, by, stratum[sample.rows], whole) for by, stratum in design.strata.items()]
    return Details(
        noise_filtered=noise_filtered(sample, gap, table, draws),
        between=between(sample, draws),
        within=inside,
        granulated=granulated(sample, design.cells),
        conditioning=None if "conditional" in skip else conditioning(sample, values, draws),
        sign_error=sign_error(sample, gap, table, design.cells, draws),
        strata=tuple(strata),
        partial={
            control: Quantity(None, n=sample.n, reason=column)
            if isinstance(column, str)
            else partial(sample, column, draws)
            for control, column in design.controls.items()
            if control != name
        },
        prediction=None if "prediction" in skip else prediction(sample, draws),
        selection=selection(sample, table),
    )


def _pearson(x: np.ndarray, y: np.ndarray) -> float:
    """Of arrays that are not constant; scaled first, as values near 1e300 have no finite square."""
    x, y = (values / np.abs(values).max() for values in (x, y))
    x, y = x - x.mean(), y - y.mean()
    return float(x @ y / math.sqrt(float(x @ x) * float(y @ y)))


def _require_runs(table: RunTable) -> None:
    if table.num_runs < 2:
        reasons = "; ".join(
            f"{len(runs)} excluded: {reason}" for reason, runs in by_reason(table.excluded).items()
        )
        raise DataError(
            f"{table.source} has {table.num_runs} usable run{f' ({reasons})' if reasons else ''}; "
            "a rank correlation needs at least 2"
        )
    if table.num_runs > MOST_RUNS:
        raise ResourceError(
            f"{table.source} has {table.num_runs:,} runs; the pairs of more than {MOST_RUNS:,} do not fit "
            "in memory. Give a random subset of them"
        )


def _design_notes(table: RunTable, sizes: np.ndarray) -> list[str]:
    notes = []
    alone = int((sizes == 1).sum())
    if not setting_names(table):
        notes.append(
            "no hyperparameter is known, so each run counts as an independent setting (--hyper names "
            "hyperparameters)"
        )
    elif len(sizes) == 1:
        notes.append("all runs have the same setting, so they count as independent")
    elif alone == len(sizes):
        notes.append(
            f"no setting has two runs ({alone} settings with one run each), so the effect of seeds cannot "
            "be separated from that of settings"
        )
    elif alone:
        notes.append(f"{alone} of {len(sizes)} settings have a single run")
    seed = seed_numbers(table)
    if seed is not None and len(sizes) > 1:
        num_shared = len(shared_seeds(setting_numbers(table), seed))
        if num_shared == len(set(seed)) == 1:
            notes.append("all runs have the same seed, so no interval covers seed variation")
        elif 1 < num_shared < LEAST_UNITS:
            notes.append(
                f"settings share {num_shared} seeds, too few to estimate seed variation; the intervals "
                "hold for these seeds only"
            )
    if table.num_runs > EXACT_RUNS:
        notes.append(f"more than {EXACT_RUNS} runs, so permutations use Spearman's ρ instead of τ")
    if len(sizes) > EXACT_SETTINGS:
        notes.append(f"more than {EXACT_SETTINGS} settings, so bootstrap resamples use τ's first-order term")
    for what, columns in (
        ("name", ["run"]),
        ("values", [*table.gaps, *table.measures, *table.hyperparameters]),
    ):
        repeated = table.frame.duplicated(columns)
        if repeated.any():
            first = table.frame["run"][repeated].iloc[0]
            notes.append(
                f"{repeated.sum()} runs repeat the {what} of another, such as {first}. Is one listed twice?"
            )
    return notes


def _warnings(table: RunTable, name: str) -> tuple[str, ...]:
    warnings = []
    for setting, runs in table.conditions.get(name, {}).items():
        if len(runs) > 1:
            values = [f"{value} × {count}" for value, count in sorted(runs.items(), key=lambda of: -of[1])]
            shown = ", ".join(values[:5]) + (f" and {len(values) - 5} more" if len(values) > 5 else "")
            warnings.append(f"{setting} differs between runs ({shown}), so they are not comparable")
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
