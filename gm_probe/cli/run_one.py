"""``gmprobe run-one``: one run of a sweep folder, which any machine that sees the folder may do."""

from __future__ import annotations

import shlex
from pathlib import Path

import click

from gm_probe.cli.kinds import PATH
from gm_probe.cli.output import echo
from gm_probe.core.errors import BusyError, ProbeError, UsageError


@click.command("run-one", epilog="Example:  gmprobe run-one runs/ lr0.01-s0-1a2b3c4d")
@click.argument("folder", type=PATH)
@click.argument("run")
@click.option(
    "--model", "named", multiple=True, help="Your own code that the run may call; it names it itself."
)
def run_one(folder: Path, run: str, named: tuple[str, ...]) -> None:
    """Train and measure RUN of the sweep in FOLDER, as `gmprobe sweep` asked for it.

    Does what is missing and nothing else: a complete run is left as it is, an interrupted one goes on, a failed one
    is tried again. `gmprobe sweep --executor slurm` prints a job array of these.
    """
    from gm_probe.core.models import is_user_code
    from gm_probe.sweep.manifest import only, read_sweep
    from gm_probe.sweep.runner import run_recipe

    recipe = only(read_sweep(folder), run)
    model = recipe.runs[run].model
    if is_user_code(model) and model not in named:
        raise UsageError(
            f"{run} of {folder} is of code {model!r}, which runs only when named: add --model {shlex.quote(model)}"
        )
    [outcome] = run_recipe(recipe, folder)
    echo(f"{outcome.name} {outcome.status}" + (f": {outcome.reason}" if outcome.reason else ""))
    if outcome.status == "busy":
        raise BusyError(str(outcome.reason))
    if outcome.status == "failed":
        raise ProbeError(str(outcome.reason))
