"""``gmprobe run-one``: one run of a sweep folder, which any machine that sees the folder may do."""

from __future__ import annotations

from pathlib import Path

import click

from gm_probe.cli.output import echo
from gm_probe.cli.param_types import PATH
from gm_probe.errors import BusyError, ProbeError


@click.command("run-one", epilog="Example:  gmprobe run-one runs/ lr0.01-s0-1a2b3c4d")
@click.argument("folder", type=PATH)
@click.argument("run")
@click.option(
    "--model", "models", multiple=True, help="Allow this code of yours, which the run's settings name."
)
@click.option(
    "--data-root", "data_roots", multiple=True, help="Allow the run to look for data in this folder."
)
@click.option("--download", is_flag=True, help="Let torchvision download a missing data set.")
@click.option("--device", "devices", multiple=True, help="Allow the run to use this device besides the CPU.")
def run_one(
    folder: Path,
    run: str,
    models: tuple[str, ...],
    data_roots: tuple[str, ...],
    download: bool,
    devices: tuple[str, ...],
) -> None:
    """Train and measure RUN of the sweep in FOLDER, as `gmprobe sweep` asked for it.

    Only missing work is done: a complete run is left as it is, an interrupted one continues, and a failed
    one is tried again. `gmprobe sweep --executor slurm` prints a job array of these.
    """
    from gm_probe.sweep.manifest import only, read_sweep

    recipe = only(read_sweep(folder), run)
    # imported late: an error in the name must not wait for torch
    from gm_probe.sweep.runner import run_recipe
    from gm_probe.training.permissions import refuse, restricted

    config = recipe.runs[run]
    given = {"model": models, "data_root": data_roots, "device": devices}
    refuse(
        {name: value for name, value in restricted(config).items() if value not in given.get(name, value)},
        folder / run,
    )
    recipe.runs[run] = config.replace(download=download)
    [outcome] = run_recipe(recipe, folder)
    echo(f"{outcome.name} {outcome.status}" + (f": {outcome.reason}" if outcome.reason else ""))
    if outcome.status == "busy":
        raise BusyError(str(outcome.reason))
    if outcome.status == "failed":
        raise ProbeError(str(outcome.reason))
