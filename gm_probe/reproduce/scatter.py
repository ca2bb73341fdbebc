"""Fig. 1: measures against the generalization gap over a sweep, as `gmprobe correlate` has them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gm_probe.analysis.correlation import correlate
from gm_probe.analysis.design import group_rows
from gm_probe.analysis.intervals import Quantity
from gm_probe.analysis.plots import scatter_panels
from gm_probe.analysis.provenance import read_records
from gm_probe.analysis.results import Correlations
from gm_probe.analysis.sheets import statistics_sheets
from gm_probe.reproduce.finding import Finding, Outcome, Task, bonferroni, claim_outcome, shown_tau, sign_of
from gm_probe.reproduce.training import trained
from gm_probe.sweep.recipe import Recipe, load_recipe, parse_recipe
from gm_probe.tables.runs import load_table
from gm_probe.tables.table import RunTable, by_reason

GAP = "error_gap"
"""The paper's gap: test error − train error."""
LEAST_RUNS = 2
"""A rank correlation needs them."""


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
    every, of_every = _correlated(folder, expected, recipe, converged_only=False)
    num_done = sum(not record.missed_stop for record in read_records(every).values())
    table, found = every, of_every
    if LEAST_RUNS <= num_done < every.num_runs:
        table, found = _correlated(folder, expected, recipe, converged_only=True)
    said = [_text(found, expected, recipe)]
    if num_done < LEAST_RUNS:
        said.append(
            f"Only {num_done} of these reached the cross-entropy at which training stops, too few for a "
            "conclusion."
        )
    reasons = [f"{len(runs)} × {why} ({', '.join(runs)})" for why, runs in by_reason(table.excluded).items()]
    if reasons:
        said.append(f"Left out: {'; '.join(reasons)}.")
    if table is not every:
        taus = ", ".join(f"{name} {shown_tau(tau)}" for name, tau in _taus(of_every).items())
        said.append(f"Over all {every.num_runs} runs that finished, whether done or not: {taus}.")
    groups = group_rows(table, recipe.group_by) if recipe.group_by else {}
    caption = (
        "Each measure against the gap; each point is a run, and Kendall's τ-b stands above; "
        f"{table.num_runs} of {len(recipe.runs)} runs."
    )
    return Finding(
        "cannot be told" if num_done < LEAST_RUNS else _outcome(found, expected),
        " ".join(said),
        every.frame.to_dict("records"),
        statistics_sheets(found),
        {"": scatter_panels(found, groups)},
        {"": caption},
        untested,
    )


def _correlated(
    folder: Path, expected: Mapping[str, int], recipe: Recipe, *, converged_only: bool
) -> tuple[RunTable, Correlations]:
    table = load_table(folder, list(expected), (), recipe.group_by, converged_only=converged_only)
    return table, correlate(table, group_by=recipe.group_by, details=False)


def _taus(found: Correlations) -> dict[str, Quantity]:
    return {name: found.get(name, GAP) for name in found.runs.measures}


def _outcome(found: Correlations, expected: Mapping[str, int]) -> Outcome:
    """Return the outcome of the claim, whose parts are the signs of τ; the intervals' p decide."""
    taus = _taus(found)
    return claim_outcome([sign_of(taus[name], len(expected)) * sign for name, sign in expected.items()])


def _text(found: Correlations, expected: Mapping[str, int], recipe: Recipe) -> str:
    taus = _taus(found)
    said = [
        f"{name} τ = {shown_tau(taus[name])} (paper: {'positive' if sign > 0 else 'negative'})"
        for name, sign in expected.items()
    ]
    whole = next(iter(taus.values()))
    reasons = dict.fromkeys(tau.note for tau in taus.values() if tau.note)
    return (
        "The test: the sign of Kendall's τ-b with the error gap, by intervals that treat the settings of the grid as "
        f"independent draws and cover shared seeds. Over {whole.n} of {len(recipe.runs)} runs, of {found.num_settings} "
        f"settings, with 95 % CI: {'; '.join(said)}. {bonferroni(len(expected))}"
        + "".join(f" {note[0].upper()}{note[1:]}." for note in reasons)
    )
