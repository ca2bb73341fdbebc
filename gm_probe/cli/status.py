"""``gmprobe status``: how far a sweep has come, from any terminal that sees its folder."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from gm_probe.cli.kinds import PATH
from gm_probe.cli.live import doing, duration
from gm_probe.cli.output import echo, format_options, print_csv, print_json, results_console, table
from gm_probe.core.records import RUNS

if TYPE_CHECKING:
    from gm_probe.sweep.status import RunStatus


@click.command(epilog="Example:  gmprobe status runs/")
@click.argument("folder", type=PATH, default=RUNS)
@format_options
def status(folder: Path, output: str | None, quiet: bool) -> None:
    """Say of every run in FOLDER how far it is, when the rest will be done, and why what failed did.

    FOLDER is runs/ unless given. A run is finished; trained (not yet measured as the sweep asks); running (its lock
    is held and touched); stale (begun and left: the next `gmprobe sweep` goes on with it); pending; diverged;
    or failed (`--retry-failed`).
    """
    from gm_probe.sweep.status import ENDED, sweep_status

    found = sweep_status(folder)
    if output == "json":
        print_json(found.as_dict())
        return
    if output == "csv":
        print_csv(found.as_dict()["runs"])
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
    if run.word is None:
        return "", ""
    return ", ".join(filter(None, doing(run.word))), duration(run.word.left)
