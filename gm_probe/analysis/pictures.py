"""Which figures a sweep's report has, and what each says in words."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.figure import Figure

from gm_probe.analysis import figures
from gm_probe.analysis.correlation import kendall
from gm_probe.analysis.curves import CURVES, Curve
from gm_probe.analysis.intervals import excludes_zero
from gm_probe.analysis.results import Correlation, Quantity, SweepStatistics
from gm_probe.analysis.tidy import tau_of
from gm_probe.analysis.typeset import two_decimals
from gm_probe.tables.table import GAPS, RunTable

MEAN = "mean Ψ"
Rows = Mapping[str, np.ndarray]
"""Labels of subgroups and their rows of the table (``correlation.group_rows``)."""


@dataclass(frozen=True, slots=True)
class Picture:
    """A figure: ``name`` is its file's stem, ``section`` its place on a page (``report.SECTIONS``); ``text`` says
    what it shows, under it and to who cannot see it."""

    name: str
    section: str
    title: str
    text: str
    figure: Figure


def pictures(
    table: RunTable,
    statistics: SweepStatistics,
    gaps: Sequence[str],
    groups: Rows,
    shapes: Rows,
    grids: Mapping[str, Mapping[int, Mapping[float, Quantity]]],
    curves: Mapping[str, Sequence[Curve]],
) -> Iterator[Picture]:
    """All figures for which there is something to show, in the order of the page.

    ``grids[gap]`` is of ``grid.grid_taus``, ``curves`` of ``curves.read_curves``; either may be empty.
    """
    yield _forest(statistics, gaps)
    for gap in gaps:
        for place, measure in enumerate(statistics.measures):
            result = measure.gaps[gap]
            yield Picture(
                f"scatter-{place + 1}-{_file_name(measure.name)}-{gap}",
                "scatter",
                f"{measure.name}, {_short(gap)}",
                f"{_says(result)}.",
                figures.scatter(table, measure, gap, groups, shapes),
            )
    yield from _granulated(statistics, gaps)
    yield from _between_measures(table)
    for gap, lines in grids.items():
        if lines:
            numbers = sorted({tau.n for of in lines.values() for tau in of.values()})
            yield Picture(
                f"grid-{gap}",
                "grid",
                f"S_ρ’s τ with the {_short(gap)} by ρ and K",
                f"Kendall’s τ-b with the {_short(gap)} at each measured radius ρ and number of ascent "
                f"steps K: {' to '.join(f'{n:,}' for n in dict.fromkeys((numbers[0], numbers[-1])))} "
                "runs.",
                figures.tau_by_radius(lines, f"τ with {GAPS.get(gap, gap)}"),
            )
    for name, of_runs in curves.items():
        recorded = sum(len(x) > 0 for x, _ in of_runs)
        yield Picture(
            f"curves-{name}",
            "training",
            f"{name} by epoch",
            f"{recorded:,} runs, one line per run; a mark shows where training ended.",
            figures.training_curves(of_runs, groups, CURVES[name]),
        )


def _forest(statistics: SweepStatistics, gaps: Sequence[str]) -> Picture:
    rows = {
        measure.name: {GAPS.get(gap, gap): tau_of(measure.gaps[gap]) for gap in gaps}
        for measure in statistics.measures
    }
    clear = {
        gap: [m.name for m in statistics.measures if excludes_zero(m.gaps[gap].low, m.gaps[gap].high)]
        for gap in gaps
    }
    said = "; ".join(f"with the {_short(gap)}, {', '.join(names) or 'none'}" for gap, names in clear.items())
    return Picture(
        "forest",
        "correlation",
        "Kendall’s τ-b with 95 % intervals",
        f"Interval excludes 0: {said}.",
        figures.forest(rows, "Kendall’s τ-b, 95 % CI"),
    )


def _granulated(statistics: SweepStatistics, gaps: Sequence[str]) -> Iterator[Picture]:
    for gap in gaps:
        found = {m.name: m.details[gap].granulated for m in statistics.measures if gap in m.details}
        every = list(dict.fromkeys(name for each in found.values() for name in each.psi))
        names = [name for name in every if any(of.psi[name].psi.value is not None for of in found.values())]
        if not names:
            continue
        values = [[*(each.psi[name].psi.value for name in names), each.mean.value] for each in found.values()]
        absent = [name for name in every if name not in names]
        yield Picture(
            f"granulated-{gap}",
            "beyond",
            f"Granulated ψ, {_short(gap)}",
            "ψ over runs in which only the named hyperparameter differs, and the mean Ψ of all ψ."
            + (f" Undefined (the table gives the reasons): {', '.join(absent)}." if absent else ""),
            figures.heat_map(np.array(values, dtype=float), list(found), [*names, MEAN], rule=1),
        )


def _between_measures(table: RunTable) -> Iterator[Picture]:
    names = table.measures
    if len(names) < 2:
        return
    columns = [table.frame[name].to_numpy() for name in names]
    taus = np.full((len(names), len(names)), np.nan)
    for i, x in enumerate(columns):
        for j, y in enumerate(columns[: i + 1]):
            both = np.isfinite(x) & np.isfinite(y)
            found = kendall(x[both], y[both]).tau
            taus[i, j] = taus[j, i] = np.nan if found is None else found
    yield Picture(
        "measures",
        "comparisons",
        "τ between measures",
        "Kendall’s τ-b over the runs that have both measures. Near 1, two measures order the runs alike, "
        "and the second adds little.",
        figures.heat_map(taus, names, names),
    )


def _file_name(name: str) -> str:
    """``name`` without what a path could be led astray by; its place in the table keeps two apart."""
    return re.sub(r"[^\w-]+", "_", name)[:60]


def _says(result: Correlation) -> str:
    if result.tau is None:
        return f"τ undefined: {result.reason}"
    text = f"τ = {two_decimals(result.tau)}"
    if result.low is not None and result.high is not None:
        text += f" [{two_decimals(result.low)}, {two_decimals(result.high)}]"
    return f"{text}, {result.n:,} runs"


def _short(gap: str) -> str:
    return {"error_gap": "error gap", "ce_gap": "CE gap"}.get(gap, gap)
