"""Fig. 1: measures against the generalization gap over a sweep, as `gmprobe correlate` has them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gm_probe.analysis.correlation import correlate
from gm_probe.analysis.design import group_rows
from gm_probe.analysis.provenance import read_records
from gm_probe.analysis.results import Correlations
from gm_probe.analysis.scatter import scatter_panels
from gm_probe.analysis.sheets import statistics_sheets
from gm_probe.reproduce.claims import bonferroni, outcome_of_tests, shown_tau, sign_of
from gm_probe.reproduce.finding import Finding, Task, train_runs
from gm_probe.sweep.recipe import Recipe, load_recipe, parse_recipe
from gm_probe.tables.runs import load_table
from gm_probe.tables.table import by_reason

GAP = "error_gap"
"""The paper's gap: test error − train error."""
LEAST_RUNS = 2
"""A rank correlation needs at least so many runs."""


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
    folder = train_runs(recipe, task.folder / "runs", task)
    every = _correlated(folder, expected, recipe, converged_only=False)
    num_done = sum(not record.missed_stop for record in read_records(every.runs).values())
    enough = num_done >= LEAST_RUNS
    some = enough and num_done < every.runs.num_runs
    found = _correlated(folder, expected, recipe, converged_only=True) if some else every
    taus = {name: found.get(name, GAP) for name in expected}
    named = [
        f"{name} τ = {shown_tau(taus[name])} (paper: {'positive' if sign > 0 else 'negative'})"
        for name, sign in expected.items()
    ]
    said = [
        "The test: the sign of Kendall's τ-b with the error gap, by intervals that treat the settings of the grid as "
        f"independent draws and cover shared seeds. Over {taus[next(iter(expected))].n} of {len(recipe.runs)} runs, of "
        f"{found.num_settings} settings, with 95 % CI: {'; '.join(named)}. {bonferroni(len(expected))}",
        *dict.fromkeys(f"{tau.note[0].upper()}{tau.note[1:]}." for tau in taus.values() if tau.note),
    ]
    if not enough:
        said.append(
            f"Only {num_done} of these reached the cross-entropy at which training stops, too few for a conclusion."
        )
    left = by_reason(found.runs.excluded).items()
    if left:
        said.append(
            "Left out: " + "; ".join(f"{len(runs)} × {why} ({', '.join(runs)})" for why, runs in left) + "."
        )
    if some:
        beside = ", ".join(f"{name} {shown_tau(every.get(name, GAP))}" for name in expected)
        said.append(f"Over all {every.runs.num_runs} runs that finished, whether done or not: {beside}.")
    signs = [sign_of(taus[name], len(expected)) * sign for name, sign in expected.items()]
    return Finding(
        outcome_of_tests(signs) if enough else "cannot be told",
        " ".join(said),
        every.runs.frame,
        statistics_sheets(found),
        scatter_panels(found, group_rows(found.runs, recipe.group_by) if recipe.group_by else {}),
        "Each measure against the gap; each point is a run, and Kendall's τ-b stands above; "
        f"{found.runs.num_runs} of {len(recipe.runs)} runs.",
        untested,
    )


def _correlated(
    folder: Path, expected: Mapping[str, int], recipe: Recipe, *, converged_only: bool
) -> Correlations:
    table = load_table(folder, list(expected), (), recipe.group_by, converged_only=converged_only)
    return correlate(table, group_by=recipe.group_by, details=False)
