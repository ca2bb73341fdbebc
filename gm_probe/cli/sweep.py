"""``gmprobe sweep``: train and measure every run of a recipe."""

from __future__ import annotations

import shlex
import sys
from collections import Counter
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from gm_probe.cli.executors import ExecutorOptions, executor_options
from gm_probe.cli.live import LEFT_OUT, live_view
from gm_probe.cli.options import json_option, quiet_option
from gm_probe.cli.output import echo, note, notes_console, print_json, results_console, table
from gm_probe.cli.param_types import AT_ONCE, PATH
from gm_probe.cli.settings import given_settings, set_option, setting_options
from gm_probe.errors import ProbeError, UsageError
from gm_probe.runs.records import RUNS
from gm_probe.training.config import TrainConfig

if TYPE_CHECKING:
    from gm_probe.executors.local import Executor, Outcome
    from gm_probe.sweep.recipe import Recipe


@click.command(epilog="Example:  gmprobe sweep quickstart --out runs/ --jobs 2")
@click.argument("recipe")
@click.option("--out", type=PATH, help="Folder for the runs.  [default: runs/RECIPE]")
@executor_options("local", "ray", "slurm")
@click.option("--data", help="Use this data instead of the recipe's: a folder, file or data set name.")
@setting_options(TrainConfig, ("data_root", "download", "device"))
@click.option("--threads", type=AT_ONCE, help="Number of CPU threads per run.  [default: cores / jobs]")
@click.option("--retry-failed", is_flag=True, help="Run failed runs again.")
@click.option(
    "--dry-run",
    is_flag=True,
    help="List the remaining runs and estimate their time from a few steps; run nothing.",
)
@set_option
@json_option
@quiet_option
def sweep(
    recipe: str,
    out: Path | None,
    retry_failed: bool,
    dry_run: bool,
    assigned: dict[str, Any],
    as_json: bool,
    quiet: bool,
    **options: Any,
) -> None:
    """Train and measure every run of RECIPE (a .toml file or a built-in name; see `gmprobe recipes`).

    Complete runs are not repeated, so the same command continues a sweep that was stopped. A failed run
    does not stop the others; --retry-failed runs it again. `gmprobe status` shows the progress from any
    other terminal.

    With --executor ray the runs go to a Ray cluster, whose machines may come and go. With --executor slurm
    the command prints a job array for `sbatch` and runs nothing.
    """
    placing = ExecutorOptions.of(options)
    from gm_probe.sweep.manifest import named_as_found, write_sweep
    from gm_probe.sweep.recipe import load_recipe

    out = out or RUNS / Path(recipe).stem
    loaded = named_as_found(load_recipe(recipe, given_settings(options, assigned)), out)
    if dry_run:
        _dry_run(loaded, out, placing.jobs, retry_failed, as_json)
        return
    write_sweep(loaded, out)
    cpus = max(config.threads or 1 for config in loaded.runs.values())  # the most threads that any run uses
    if placing.executor == "slurm":
        _print_job_array(loaded, out, cpus)
        return
    engine = placing.ray(out, cpus) if placing.executor == "ray" else None
    outcomes = run_with_progress(
        loaded, out, jobs=placing.jobs, executor=engine, retry_failed=retry_failed, quiet=quiet
    )
    num_failed = _report(outcomes, out, as_json)
    if num_failed:
        raise ProbeError(
            f"{num_failed} of {len(outcomes)} runs failed; "
            "run the same command with --retry-failed to try them again"
        )
    if not quiet:
        note(notes_console(), f"next:  gmprobe correlate {out}")


def _report(outcomes: Sequence[Outcome], out: Path, as_json: bool) -> int:
    """Print how the runs ended, and return how many failed."""
    counts = Counter(outcome.status for outcome in outcomes)
    if as_json:
        rows = [{"run": o.name, "status": o.status, "reason": o.reason} for o in outcomes]
        print_json({"out": str(out), "counts": dict(counts), "runs": rows})
    else:
        summary = ", ".join(f"{count} {status}" for status, count in sorted(counts.items()))
        echo(f"{len(outcomes)} runs in {out}: {summary}")
        for each in outcomes:
            if each.status in LEFT_OUT:
                echo(f"  {each.status}: {each.name}: {each.reason or 'the loss became infinite or NaN'}")
    return counts["failed"]


def run_with_progress(
    recipe: Recipe,
    out: Path,
    *,
    jobs: int = 1,
    executor: Executor | None = None,
    retry_failed: bool = True,
    quiet: bool,
) -> list[Outcome]:
    """Run the recipe under a bar."""
    from gm_probe.sweep.runner import run_recipe

    with live_view(recipe.runs, quiet=quiet) as notify:
        return run_recipe(recipe, out, jobs=jobs, executor=executor, retry_failed=retry_failed, notify=notify)


def _print_job_array(recipe: Recipe, out: Path, cpus: int) -> None:
    from gm_probe.sweep.runner import is_complete
    from gm_probe.training.permissions import as_options

    left = [name for name in recipe.runs if not is_complete(out / name, recipe.plan)]
    if not left:
        raise UsageError(f"every run in {out} is complete; nothing needs to be submitted")
    named = as_options(recipe.runs[name] for name in left)
    script = (
        "#!/bin/bash\n"
        "#SBATCH --job-name=gmprobe\n"
        f"#SBATCH --array=0-{len(left) - 1}\n"
        f"#SBATCH --cpus-per-task={cpus}\n"
        "#SBATCH --requeue\n"
        f"RUNS=({' '.join(left)})\n"
        f'exec gmprobe run-one {shlex.quote(str(out.resolve()))} "${{RUNS[$SLURM_ARRAY_TASK_ID]}}"{named}'
    )
    try:
        script.encode(sys.stdout.encoding or "utf-8")
    except UnicodeEncodeError as error:  # an escaped name is fine to read, but this script is run
        raise UsageError(
            f"this locale cannot write {out} into a script; choose a folder name in ASCII letters"
        ) from error
    click.echo(script)


def _dry_run(recipe: Recipe, out: Path, jobs: int, retry_failed: bool, as_json: bool) -> None:
    from gm_probe.sweep.cost import run_costs
    from gm_probe.sweep.runner import failed_before, is_complete

    done = {name: "complete" for name in recipe.runs if is_complete(out / name, recipe.plan)}
    if not retry_failed:
        done |= {name: "failed" for name in recipe.runs if name not in done and failed_before(out / name)}
    left = {name: config for name, config in recipe.runs.items() if name not in done}
    costs = dict(zip(left, run_costs(left.values(), recipe.plan), strict=True))
    seconds = sum(cost.seconds for cost in costs.values())
    passing = sorted((cost.passing_disk for cost in costs.values()), reverse=True)
    disk = sum(cost.disk for cost in costs.values()) + sum(passing[:jobs])
    if as_json:
        runs = [
            {"run": name, "to_do": name in left, "seconds": costs[name].seconds if name in left else 0.0}
            for name in recipe.runs
        ]
        print_json({"out": str(out), "seconds": seconds, "bytes": round(disk), "runs": runs})
        return
    rows = [[name, done.get(name) or f"{costs[name].seconds:,.0f} s"] for name in recipe.runs]
    console = results_console()
    console.print(table(f"{len(left)} of {len(recipe.runs)} runs to do", ["run", "at most about"], rows))
    echo(
        f"{len(left)} runs: at most about {timedelta(seconds=round(seconds))} one after the other (timed "
        f"on a few steps of each kind on this machine; less if a run stops early), {disk / 1000000.0:,.0f} "
        "MB of disk"
    )
