"""Fig. 1: measures against the generalization gap over a sweep, τ each, subgroups."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gm_probe.analysis.correlation import PARTS, correlate, group_rows
from gm_probe.analysis.plots import scatter_panels
from gm_probe.analysis.results import Correlation, MeasureStatistics
from gm_probe.analysis.runs import load_table
from gm_probe.analysis.typeset import Cell, Sheet, two_decimals
from gm_probe.reproduce.finding import Finding, Outcome, Task
from gm_probe.reproduce.training import trained
from gm_probe.sweep.recipe import Recipe, load_recipe, parse_recipe

GAP = "error_gap"
"""The paper's gap: test error − train error."""


def study(
    task: Task, *, expected: Mapping[str, int], sweep: str = "", inline: Mapping[str, Any] | None = None
) -> Finding:
    """Run a built-in sweep (or one ``inline``) and correlate.

    Args:
        expected: the sign of τ that the paper reports, by measure.
    """
    recipe = parse_recipe(inline, task.place) if inline is not None else load_recipe(sweep, task.place)
    folder = trained(recipe, task.folder / "runs", task)
    table = load_table(folder, list(expected), (), recipe.group_by)
    found = correlate(table, table.gaps, recipe.group_by, skip=PARTS)
    by_name = {measure.name: measure for measure in found.measures}
    groups = group_rows(table, recipe.group_by) if recipe.group_by else {}
    return Finding(
        _outcome(by_name, expected),
        _text(by_name, expected, recipe),
        [{str(key): value for key, value in row.items()} for row in table.frame.to_dict("records")],
        [_sheet(task.name, by_name, expected)],
        {"": scatter_panels(table, found.measures, table.gaps, groups)},
        {"": f"Each measure against the gap, a point a run, Kendall's τ-b above; {len(recipe.runs)} runs."},
    )


def _sign(tau: Correlation) -> int:
    """Of a τ whose interval excludes 0; else 0."""
    if tau.low is None or tau.high is None:
        return 0
    return (tau.low > 0) - (tau.high < 0)


def _outcome(measures: Mapping[str, MeasureStatistics], expected: Mapping[str, int]) -> Outcome:
    signs = {name: _sign(measures[name].gaps[GAP]) * sign for name, sign in expected.items()}
    if all(sign == 1 for sign in signs.values()):
        return "shows"
    if -1 not in signs.values():
        return "cannot be told"
    return "shows in part" if 1 in signs.values() else "does not show"


def _text(measures: Mapping[str, MeasureStatistics], expected: Mapping[str, int], recipe: Recipe) -> str:
    said = [
        f"{name} τ = {_tau(measures[name].gaps[GAP])} (paper: {'positive' if sign > 0 else 'negative'})"
        for name, sign in expected.items()
    ]
    groups = []
    for label in next(iter(measures.values())).subgroups:
        within = ", ".join(_tau(measures[name].subgroups[label][GAP], short=True) for name in expected)
        groups.append(f"{label}: {within}")
    return (
        "The test: the sign of Kendall's τ-b with the error gap, by a 95 % interval over independent settings. "
        f"Over {next(iter(measures.values())).gaps[GAP].n} of {len(recipe.runs)} runs: {'; '.join(said)}."
        + (f" Within subgroups, in the same order: {'; '.join(groups)}." if groups else "")
    )


def _tau(tau: Correlation, short: bool = False) -> str:
    if tau.tau is None:
        return "undefined"
    if short or tau.low is None or tau.high is None:
        return two_decimals(tau.tau)
    return f"{two_decimals(tau.tau)} ({two_decimals(tau.low)} to {two_decimals(tau.high)})"


def _sheet(name: str, measures: Mapping[str, MeasureStatistics], expected: Mapping[str, int]) -> Sheet:
    gaps = next(iter(measures.values())).gaps
    body = [
        (
            Cell(measure),
            Cell("all"),
            *(Cell(_tau(measures[measure].gaps[gap])) for gap in gaps),
            Cell("> 0" if sign > 0 else "< 0"),
        )
        for measure, sign in expected.items()
    ]
    for measure in expected:
        for label, of in measures[measure].subgroups.items():
            body.append((Cell(measure), Cell(label), *(Cell(_tau(of[gap])) for gap in gaps), Cell("")))
    columns = {"error_gap": "τ with the error gap", "ce_gap": "τ with the CE gap"}
    return Sheet(
        name,
        "Measures and the generalization gap",
        "Kendall’s τ-b with its 95 % interval; the paper’s values are lost, their signs are not",
        ("measure", "runs", *(columns[gap] for gap in gaps), "paper"),
        tuple(body),
        2,
    )
