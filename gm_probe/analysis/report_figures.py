"""Which figures a sweep's report has, and what each says in words."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.figure import Figure

from gm_probe.analysis import figures
from gm_probe.analysis.coefficients import kendall
from gm_probe.analysis.conclusion import target_short
from gm_probe.analysis.curves import CURVES, Curve
from gm_probe.analysis.design import target_column
from gm_probe.analysis.report_leads import Grids, in_words
from gm_probe.analysis.results import Correlations
from gm_probe.tables.table import RunTable

MEAN = "mean Ψ"
Rows = Mapping[str, np.ndarray]
"""Labels of subgroups and their rows of the table (``design.group_rows``)."""


@dataclass(frozen=True, slots=True)
class ReportFigure:
    """A figure of a page.

    Attributes:
        name: its file's stem.
        section: its place (``report.SECTIONS``); "" = beside the conclusion.
        text: what it shows, also for readers who cannot see it.
    """

    name: str
    section: str
    title: str
    text: str
    figure: Figure


def report_figures(
    statistics: Correlations,
    groups: Rows,
    shapes: Rows,
    grids: Grids,
    curves: Mapping[str, Sequence[Curve]],
) -> Iterator[ReportFigure]:
    """Yield all figures for which there is something to show, in the order of the page.

    ``grids[gap]`` is of ``grid.grid_taus``, ``curves`` of ``curves.read_curves``; either may be empty.
    """
    table, gaps = statistics.runs, statistics.targets
    yield _forest(statistics)
    for gap, label in gaps.items():
        column = target_column(table, gap)
        for place, measure in enumerate(table.measures):
            yield ReportFigure(
                f"scatter-{place + 1}-{_file_name(measure)}-{gap}",
                "scatter",
                f"{measure}, {target_short(gap)}",
                f"{in_words(statistics.get(measure, gap))}.",
                figures.scatter(table, measure, column, label, groups, shapes),
            )
    yield from _granulated(statistics)
    yield from _between_measures(table)
    for gap, lines in grids.items():
        if lines:
            numbers = sorted({tau.n for of in lines.values() for tau in of.values()})
            yield ReportFigure(
                f"grid-{gap}",
                "grid",
                f"S_ρ’s τ with the {target_short(gap)} by ρ and K",
                f"Kendall’s τ-b with the {target_short(gap)} at each measured radius ρ and number of ascent "
                f"steps K: {' to '.join(f'{n:,}' for n in dict.fromkeys((numbers[0], numbers[-1])))} "
                "runs.",
                figures.tau_by_radius(lines, f"τ with {gaps[gap]}"),
            )
    for name, of_runs in curves.items():
        recorded = sum(len(x) > 0 for x, _ in of_runs)
        yield ReportFigure(
            f"curves-{name}",
            "training",
            f"{name} by epoch",
            f"{recorded:,} runs, one line per run; a mark shows where training ended.",
            figures.training_curves(of_runs, groups, CURVES[name]),
        )


def _forest(found: Correlations) -> ReportFigure:
    rows = {
        measure: {label: found.get(measure, target) for target, label in found.targets.items()}
        for measure in found.runs.measures
    }
    return ReportFigure(
        "forest",
        "",
        "Kendall’s τ-b with 95 % intervals",
        "An interval that excludes 0 tells the sign of τ.",
        figures.forest(rows, "Kendall’s τ-b, 95 % CI"),
    )


def _granulated(found: Correlations) -> Iterator[ReportFigure]:
    for target in found.targets:
        psi = {name: found.of(name, target, "psi") for name in found.runs.measures}
        names = list(
            dict.fromkeys(hyper for of in psi.values() for hyper, one in of.items() if one.value is not None)
        )
        if not names:
            continue
        values = [
            [*(of[name].value for name in names), found.get(measure, target, "psi_mean").value]
            for measure, of in psi.items()
        ]
        yield ReportFigure(
            f"granulated-{target}",
            "beyond",
            f"Granulated ψ, {target_short(target)}",
            "ψ over runs in which only the named hyperparameter differs, and the mean Ψ of all ψ.",
            figures.heat_map(np.array(values, dtype=float), list(psi), [*names, MEAN], rule=1),
        )


def _between_measures(table: RunTable) -> Iterator[ReportFigure]:
    names = table.measures
    if len(names) < 2:
        return
    columns = [table.frame[name].to_numpy() for name in names]
    taus = np.full((len(names), len(names)), np.nan)
    for i, x in enumerate(columns):
        for j, y in enumerate(columns[: i + 1]):
            found = kendall(x, y).value
            taus[i, j] = taus[j, i] = np.nan if found is None else found
    yield ReportFigure(
        "measures",
        "comparisons",
        "τ between measures",
        "Kendall’s τ-b over the runs that have both measures. Near 1, two measures order the runs alike, "
        "and the second adds little.",
        figures.heat_map(taus, names, names),
    )


def _file_name(name: str) -> str:
    """Return ``name`` without signs that could change a path; its place in the table keeps two apart."""
    return re.sub(r"[^\w-]+", "_", name)[:60]
