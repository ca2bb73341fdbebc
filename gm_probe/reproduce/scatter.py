"""Fig. 1: measures against the generalization gap over a sweep, as `gmprobe correlate` has them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gm_probe.analysis.correlation import correlate, group_rows
from gm_probe.analysis.intervals import excludes_zero
from gm_probe.analysis.plots import scatter_panels
from gm_probe.analysis.provenance import read_records
from gm_probe.analysis.requests import PARTS
from gm_probe.analysis.results import Correlation, SweepStatistics
from gm_probe.analysis.sheets import statistics_sheets
from gm_probe.reproduce.finding import Finding, Outcome, Task, shown_tau
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
    reasons = [
        f"{len(runs)} for {why} ({', '.join(runs)})" for why, runs in by_reason(table.excluded).items()
    ]
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
        statistics_sheets(found, table.gaps),
        {"": scatter_panels(table, found.measures, table.gaps, groups)},
        {"": caption},
        untested,
    )


def _correlated(
    folder: Path, expected: Mapping[str, int], recipe: Recipe, *, converged_only: bool
) -> tuple[RunTable, SweepStatistics]:
    table = load_table(folder, list(expected), (), recipe.group_by, converged_only=converged_only)
    return table, correlate(table, table.gaps, recipe.group_by, skip=PARTS)


def _taus(found: SweepStatistics) -> dict[str, Correlation]:
    return {measure.name: measure.gaps[GAP] for measure in found.measures}


def _outcome(found: SweepStatistics, expected: Mapping[str, int]) -> Outcome:
    taus = _taus(found)
    clear = {name: excludes_zero(tau.low, tau.high) for name, tau in taus.items()}
    agree = [clear[name] and sign * (taus[name].tau or 0) > 0 for name, sign in expected.items()]
    if all(agree):
        return "shows"
    if not any(clear[name] and sign * (taus[name].tau or 0) < 0 for name, sign in expected.items()):
        return "cannot be told"
    return "shows in part" if any(agree) else "does not show"


def _text(found: SweepStatistics, expected: Mapping[str, int], recipe: Recipe) -> str:
    taus = _taus(found)
    said = [
        f"{name} τ = {shown_tau(taus[name])} (paper: {'positive' if sign > 0 else 'negative'})"
        for name, sign in expected.items()
    ]
    about_seeds = [note for note in found.notes if "seed" in note]
    whole = next(iter(taus.values()))
    return (
        "The test: the sign of Kendall's τ-b with the error gap, by a 95 % CI that treats the settings of "
        f"the grid as independent draws{'' if about_seeds else ' and covers shared seeds'}. Over {whole.n} "
        f"of {len(recipe.runs)} runs, of {whole.num_settings} settings: {'; '.join(said)}."
        + "".join(f" {note[0].upper()}{note[1:]}." for note in about_seeds)
    )
