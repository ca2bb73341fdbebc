"""``gmprobe quickstart``: the main job end to end, on real data that is bundled."""

from __future__ import annotations

import os
from pathlib import Path

import click

from gm_probe.cli.output import note, notes_console
from gm_probe.cli.param_types import AT_ONCE, PATH


@click.command(epilog="Example:  gmprobe quickstart")
@click.option(
    "--out",
    type=PATH,
    default=Path("gmprobe-quickstart"),
    show_default=True,
    help="Folder for the runs and the figure.",
)
@click.option("--jobs", type=AT_ONCE, help="Number of runs at a time.  [default: cores, at most 4]")
@click.option("-q", "--quiet", is_flag=True, help="Print no progress and no notes on stderr.")
@click.pass_context
def quickstart(ctx: click.Context, out: Path, jobs: int | None, quiet: bool) -> None:
    """Train, measure and correlate a small sweep on bundled real digits.

    The command trains 48 small networks on a few hundred of scikit-learn's 1,797 handwritten digits. It
    measures them on images whose labels are not read, and then correlates each measure with the
    generalization gap on the remaining images. Run the command again, and it continues where it stopped.
    """
    from gm_probe.cli.correlate import correlate
    from gm_probe.cli.sweep import run_with_progress
    from gm_probe.errors import ProbeError
    from gm_probe.sweep.manifest import write_sweep
    from gm_probe.sweep.recipe import load_recipe

    console = notes_console(quiet)
    recipe = load_recipe("quickstart")
    note(
        console, f"Training and measuring {len(recipe.runs)} small networks on handwritten digits into {out}/"
    )
    write_sweep(recipe, out)
    outcomes = run_with_progress(recipe, out, jobs=jobs or min(os.cpu_count() or 1, 4), quiet=quiet)
    failed = [outcome for outcome in outcomes if outcome.status == "failed"]
    if failed:
        raise ProbeError(f"{len(failed)} runs failed, the first ({failed[0].name}): {failed[0].reason}")
    ctx.invoke(correlate, source=out, group_by=",".join(recipe.group_by), quiet=quiet)
    note(
        console, "Next: which of your checkpoints should you ship? See docs/choose.md and `gmprobe estimate`."
    )
