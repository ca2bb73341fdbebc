"""``gmprobe sweep``: train and measure every run of a recipe."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from gm_probe.cli.output import note, notes_console, number, print_json, results_console, table
from gm_probe.cli.progress import progress_bar
from gm_probe.core.errors import ProbeError

if TYPE_CHECKING:
    from gm_probe.sweep.recipe import Recipe
    from gm_probe.sweep.runner import Outcome


LEFT_OUT = frozenset({"failed", "diverged", "busy"})
"""How a run ends that gives no result now; each is named with its reason."""


@click.command(epilog="Example:  gmprobe sweep quickstart --out runs/ --jobs 2")
@click.argument("recipe")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Folder of the runs.")
@click.option(
    "--jobs", type=click.IntRange(1), default=1, show_default=True, help="Runs at a time, each a process."
)
@click.option("--data", help="Data to use instead of the recipe's (a folder, file or name).")
@click.option("--data-root", help="Where torchvision's data sets are kept.")
@click.option("--download", is_flag=True, help="Let torchvision download what is missing.")
@click.option("--device", help="auto, cpu, cuda, cuda:1 or mps.  [default: auto]")
@click.option("--threads", type=click.IntRange(1), help="CPU threads a run.  [default: cores / jobs]")
@click.option("--dry-run", is_flag=True, help="List the runs and what is left to do; run nothing.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.option("-q", "--quiet", is_flag=True, help="No progress on stderr.")
def sweep(
    recipe: str,
    out: Path,
    jobs: int,
    data: str | None,
    data_root: str | None,
    download: bool,
    device: str | None,
    threads: int | None,
    dry_run: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Train and measure every run of RECIPE (a .toml file or a built-in name; see `gmprobe recipes`).

    Runs that are complete in the folder are not done again, so a sweep that was stopped goes on with the same
    command. A failed run does not stop the others; the next call tries it again.
    """
    from gm_probe.sweep.recipe import load_recipe

    given = {"data": data, "data_root": data_root, "device": device, "threads": threads}
    overrides: dict[str, Any] = {key: value for key, value in given.items() if value is not None}
    if download:
        overrides["download"] = True
    loaded = load_recipe(recipe, overrides)
    if dry_run:
        _dry_run(loaded, out, as_json)
        return
    outcomes = run_with_progress(loaded, out, jobs=jobs, quiet=quiet)
    counts = Counter(outcome.status for outcome in outcomes)
    left_out = [outcome for outcome in outcomes if outcome.status in LEFT_OUT]
    if as_json:
        rows = [{"run": o.name, "status": o.status, "reason": o.reason} for o in outcomes]
        print_json({"out": str(out), "counts": dict(counts), "runs": rows})
    else:
        summary = ", ".join(f"{count} {status}" for status, count in sorted(counts.items()))
        click.echo(f"{len(outcomes)} runs in {out}: {summary}")
        for outcome in left_out:
            click.echo(
                f"  {outcome.status}: {outcome.name}: {outcome.reason or 'the loss stopped being finite'}"
            )
    if counts["failed"]:
        raise ProbeError(
            f"{counts['failed']} of {len(outcomes)} runs failed; run the same command to try them again"
        )
    if not quiet:
        note(notes_console(), f"next:  gmprobe correlate {out}")


def run_with_progress(recipe: Recipe, out: Path, *, jobs: int, quiet: bool) -> list[Outcome]:
    """Run the recipe with a bar on a terminal, one line a run elsewhere."""
    from gm_probe.sweep.runner import run_recipe

    console = notes_console(quiet)
    if not console.is_terminal:
        done = 0

        def line(outcome: Outcome) -> None:
            nonlocal done
            done += 1
            reason = f": {outcome.reason}" if outcome.reason else ""
            note(console, f"[{done}/{len(recipe.runs)}] {outcome.name} {outcome.status}{reason}")

        return run_recipe(recipe, out, jobs=jobs, notify=line)
    with progress_bar("runs", len(recipe.runs), quiet=quiet) as bar:
        ended = 0

        def advance(outcome: Outcome) -> None:
            nonlocal ended
            ended += 1
            bar.update(ended, state=f"{ended}/{len(recipe.runs)}")
            if outcome.status in LEFT_OUT:
                bar.print(f"{outcome.status}: {outcome.name}: {outcome.reason or ''}")

        return run_recipe(recipe, out, jobs=jobs, notify=advance)


def _dry_run(recipe: Recipe, out: Path, as_json: bool) -> None:
    from gm_probe.probe.measures import expected_cost
    from gm_probe.sweep.runner import is_complete

    left = {name: not is_complete(out / name, recipe.plan) for name in recipe.runs}
    cost = expected_cost(recipe.plan.measures, recipe.plan.settings)
    if as_json:
        print_json({"out": str(out), "runs": [{"run": n, "to_do": todo} for n, todo in left.items()]})
        return
    rows = [[name, "to do" if todo else "complete"] for name, todo in left.items()]
    results_console().print(table(f"{sum(left.values())} of {len(left)} runs to do", ["run", "state"], rows))
    click.echo(f"each is measured in about {number(cost, 2)} gradient evaluations over its unlabeled part")
