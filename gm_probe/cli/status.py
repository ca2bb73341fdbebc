"""``gmprobe status``: how far a sweep has come, from any terminal that sees its folder."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

import click

from gm_probe.cli.options import format_options
from gm_probe.cli.output import echo, print_as, results_console, table
from gm_probe.cli.param_types import PATH
from gm_probe.files.locks import LIFETIME, StageProgress
from gm_probe.runs.records import RUNS

if TYPE_CHECKING:
    from gm_probe.sweep.status import RunStatus


@click.command(epilog="Example:  gmprobe status runs/")
@click.argument("folder", type=PATH, default=RUNS)
@format_options
def status(folder: Path, output: str | None, quiet: bool) -> None:
    """Report the progress of every run in FOLDER, the time left, and the reason of each failure.

    FOLDER is runs/ unless given. A run is in one of these states: finished; trained (not yet measured as
    the sweep asks); running (a process holds its lock); stale (its process ended early, and the next
    `gmprobe sweep` continues it); pending; diverged; or failed (`--retry-failed` runs it again).
    """
    from gm_probe.sweep.status import ENDED, sweep_status

    found = sweep_status(folder)
    if output:
        print_as(output, found.as_dict(), found.as_dict()["runs"])
        return
    if not quiet:
        shown = [run for run in found.runs if run.state not in {*ENDED, "pending"}]
        rows = [[run.run, run.state, f"{run.epochs}/{run.max_epochs or '?'}", *_now(run)] for run in shown]
        if rows:
            results_console().print(table(None, ["run", "state", "epochs", "now", "to go"], rows))
    ended = sum(run.state in ENDED for run in found.runs)
    counts = ", ".join(f"{count} {state}" for state, count in found.counts.items())
    eta = "" if found.eta is None else f"; about {duration(found.eta)} to go"
    echo(f"{ended} of {len(found.runs)} runs ended: {counts}{eta}")
    for run in found.runs:
        if run.reason is not None:
            echo(f"  {run.state}: {run.run}: {run.reason}")


def _now(run: RunStatus) -> tuple[str, str]:
    if run.progress is None:
        return "", ""
    return doing(run.progress), duration(run.progress.left)


def doing(progress: StageProgress) -> str:
    """Return in words what a run is doing, and its loss if it has one."""
    more = progress.more
    if progress.stage != "training" or not {"epoch", "step", "steps"} <= set(more):
        return f"{progress.stage} {more.get('measure', '')}".rstrip()
    where = f"epoch {more['epoch']}/{progress.total:g}, step {more['step']}/{more['steps']}"
    loss = more.get("loss")
    return f"{where}, loss {loss:.3g}" if isinstance(loss, float) else where


def duration(seconds: float | None) -> str:
    """Return hours, minutes and seconds; nothing where the time is unknown or absurd."""
    return str(timedelta(seconds=round(seconds))) if seconds is not None and 0 <= seconds < LIFETIME else ""
