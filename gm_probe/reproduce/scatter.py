"""Fig. 1: measures against the generalization gap over a sweep, τ each, subgroups."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gm_probe.analysis.correlation import correlate, group_rows
from gm_probe.analysis.grid import grid_taus
from gm_probe.analysis.plots import scatter_panels
from gm_probe.analysis.provenance import read_records
from gm_probe.analysis.requests import PARTS
from gm_probe.analysis.results import Correlation, MeasureStatistics, Quantity
from gm_probe.analysis.runs import load_table
from gm_probe.analysis.table import RunTable, by_reason
from gm_probe.analysis.typeset import Cell, Sheet, two_decimals
from gm_probe.core.records import RunRecord
from gm_probe.reproduce.finding import Finding, Outcome, Task
from gm_probe.reproduce.training import trained
from gm_probe.sweep.recipe import Recipe, load_recipe, parse_recipe

GAP = "error_gap"
"""The paper's gap: test error − train error."""


LEAST_RUNS = 2
"""A rank correlation needs them."""


@dataclass(frozen=True)
class _Runs:
    """Some of the runs, and their measures' statistics by name."""

    table: RunTable
    measures: Mapping[str, MeasureStatistics]
    about_seeds: str


def study(
    task: Task,
    *,
    expected: Mapping[str, int],
    sweep: str = "",
    inline: Mapping[str, Any] | None = None,
    untested: str = "",
) -> Finding:
    """Run a built-in sweep (or one ``inline``) and correlate.

    The claim is about networks that are trained to the end: where runs stop at a training cross-entropy, those that
    never reached it stand beside the others and decide nothing.

    Args:
        expected: the sign of τ that the paper reports, by measure.
        untested: what the claim says that no test covers.
    """
    recipe = parse_recipe(inline, task.place) if inline is not None else load_recipe(sweep, task.place)
    folder = trained(recipe, task.folder / "runs", task)
    every = _runs(folder, expected, recipe, converged_only=False)
    records = read_records(every.table)
    num_done = sum(not record.missed_stop for record in records.values())
    some_done = LEAST_RUNS <= num_done < len(records)
    ended = _runs(folder, expected, recipe, converged_only=True) if some_done else every
    table = ended.table
    groups = group_rows(table, recipe.group_by) if recipe.group_by else {}
    left_out = _left_out(table)
    undone = ""
    if num_done < LEAST_RUNS:
        undone = f"Only {num_done} of these reached the cross-entropy at which training stops: nothing can be told."
    said = (_text(ended, expected, recipe), undone, left_out, _all_too(every, ended, expected))
    return Finding(
        "cannot be told" if undone else _outcome(ended.measures, expected),
        " ".join(filter(None, said)),
        [{str(key): value for key, value in row.items()} for row in every.table.frame.to_dict("records")],
        [_sheet(task.name, every, ended, expected, records)],
        {"": scatter_panels(table, list(ended.measures.values()), table.gaps, groups)},
        {
            "": f"Each measure against the gap, a point a run, Kendall's τ-b above; {table.num_runs} of "
            f"{len(recipe.runs)} runs."
        },
        untested,
    )


def _runs(folder: Path, expected: Mapping[str, int], recipe: Recipe, *, converged_only: bool) -> _Runs:
    table = load_table(folder, list(expected), (), recipe.group_by, converged_only=converged_only)
    found = correlate(table, table.gaps, recipe.group_by, skip=PARTS)
    about_seeds = " ".join(f"{note[0].upper()}{note[1:]}." for note in found.notes if "seed" in note)
    return _Runs(table, {measure.name: measure for measure in found.measures}, about_seeds)


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


def _text(ended: _Runs, expected: Mapping[str, int], recipe: Recipe) -> str:
    measures = ended.measures
    said = [
        f"{name} τ = {_tau(measures[name].gaps[GAP])} (paper: {'positive' if sign > 0 else 'negative'})"
        for name, sign in expected.items()
    ]
    groups = []
    first = next(iter(measures.values()))
    for label, of in first.subgroups.items():
        within = ", ".join(_tau(measures[name].subgroups[label][GAP], short=True) for name in expected)
        groups.append(f"{label} ({of[GAP].n} runs of {of[GAP].num_settings} settings): {within}")
    whole = first.gaps[GAP]
    return (
        "The test: the sign of Kendall's τ-b with the error gap, by a 95 % interval that takes the settings of the "
        f"grid for independent draws{'' if ended.about_seeds else ' and allows for seeds that they share'}. "
        f"Over {whole.n} of {len(recipe.runs)} runs, of {whole.num_settings} settings: {'; '.join(said)}."
        + (f" {ended.about_seeds}" if ended.about_seeds else "")
        + (f" Within subgroups, in the same order, untested: {'; '.join(groups)}." if groups else "")
    )


def _left_out(table: RunTable) -> str:
    reasons = [
        f"{len(runs)} for {reason} ({', '.join(runs)})" for reason, runs in by_reason(table.excluded).items()
    ]
    return f"Left out: {'; '.join(reasons)}." if reasons else ""


def _all_too(every: _Runs, ended: _Runs, expected: Mapping[str, int]) -> str:
    if every.table.num_runs == ended.table.num_runs:
        return ""
    taus = ", ".join(f"{name} {_tau(every.measures[name].gaps[GAP])}" for name in expected)
    return f"Over all {every.table.num_runs} runs that finished, whether done or not: {taus}."


def _tau(tau: Correlation | Quantity, short: bool = False) -> str:
    value = tau.tau if isinstance(tau, Correlation) else tau.value
    if value is None:
        return "undefined"
    if short or tau.low is None or tau.high is None:
        return two_decimals(value)
    return f"{two_decimals(value)} ({two_decimals(tau.low)} to {two_decimals(tau.high)})"


def _sheet(
    name: str,
    every: _Runs,
    ended: _Runs,
    expected: Mapping[str, int],
    records: Mapping[str, RunRecord],
) -> Sheet:
    gaps = ended.table.gaps
    some = every.table.num_runs > ended.table.num_runs
    body: list[tuple[Cell, ...]] = []

    def add(measure: str, runs: str, taus: Sequence[Correlation | Quantity], sign: int = 0) -> None:
        shown = "" if not sign else "> 0" if sign > 0 else "< 0"
        n = max(tau.n for tau in taus)
        body.append(
            (Cell(measure), Cell(runs), Cell(str(n), n), *(Cell(_tau(tau)) for tau in taus), Cell(shown))
        )

    for measure, sign in expected.items():
        add(measure, "done" if some else "all", [ended.measures[measure].gaps[gap] for gap in gaps], sign)
    if some:
        for measure in expected:
            add(measure, "all that finished", [every.measures[measure].gaps[gap] for gap in gaps])
    for measure in expected:
        for label, of in ended.measures[measure].subgroups.items():
            add(measure, label, [of[gap] for gap in gaps])
    for cell, taus in _readings(ended.table, gaps, records):
        add("local_inconsistency", cell, taus)
    columns = {"error_gap": "τ with the error gap", "ce_gap": "τ with the CE gap"}
    done = " “Done”: training reached the cross-entropy at which it stops." if some else ""
    return Sheet(
        name,
        "Measures and the generalization gap",
        "Kendall’s τ-b with its 95 % interval, where there are settings enough for one; the paper’s values are lost, "
        f"their signs are not.{done}",
        ("measure", "runs", "n", *(columns[gap] for gap in gaps), "paper"),
        tuple(body),
        2,
    )


def _readings(
    table: RunTable, gaps: Sequence[str], records: Mapping[str, RunRecord]
) -> list[tuple[str, list[Quantity]]]:
    """τ of S_ρ at every ρ and K that it was measured with: the paper's row that names them is lost."""
    by_gap = {gap: grid_taus(table, records, gap) for gap in gaps}
    return [
        (f"at ρ = {rho:g}, K = {steps}", [by_gap[gap][steps][rho] for gap in gaps])
        for steps, of_radius in by_gap[gaps[0]].items()
        for rho in of_radius
    ]
