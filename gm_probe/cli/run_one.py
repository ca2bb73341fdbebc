"""``gmprobe run-one``: one run of a sweep folder, which any machine that sees the folder may do."""

from __future__ import annotations

from pathlib import Path

import click

from gm_probe.core.errors import BusyError, ProbeError


@click.command("run-one", epilog="Example:  gmprobe run-one runs/ lr0.01-s0-1a2b3c4d")
@click.argument("folder", type=click.Path(path_type=Path))
@click.argument("run")
def run_one(folder: Path, run: str) -> None:
    """Train and measure RUN of the sweep in FOLDER, as `gmprobe sweep` asked for it.

    Does what is missing and nothing else: a complete run is left as it is, an interrupted one goes on, a failed one
    is tried again. `gmprobe sweep --executor slurm` prints a job array of these.
    """
    from gm_probe.sweep.manifest import only, read_sweep
    from gm_probe.sweep.runner import run_recipe

    [outcome] = run_recipe(only(read_sweep(folder), run), folder)
    click.echo(f"{outcome.name} {outcome.status}" + (f": {outcome.reason}" if outcome.reason else ""))
    if outcome.status == "busy":
        raise BusyError(str(outcome.reason))
    if outcome.status == "failed":
        raise ProbeError(str(outcome.reason))
