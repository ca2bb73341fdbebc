"""``gmprobe quickstart``: the main jobs end to end, on real data that is bundled."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from gm_probe.cli.options import quiet_option
from gm_probe.cli.output import note, notes_console, results_console, say
from gm_probe.cli.param_types import AT_ONCE, PATH

if TYPE_CHECKING:
    from gm_probe.sweep.recipe import Recipe

NOISE = 60.0
"""Standard deviation of the pixel noise of the digits that the accuracy is estimated on; pixels reach 255."""
NUM_VALIDATION = 350
"""Labeled digits for ``gmprobe estimate``; the rest of the sweep's test part stands for unlabeled data."""


@click.command(epilog="Example:  gmprobe quickstart")
@click.option(
    "--out",
    type=PATH,
    default=Path("gmprobe-quickstart"),
    show_default=True,
    help="Folder for the runs and the figure.",
)
@click.option("--jobs", type=AT_ONCE, help="Number of runs at a time.  [default: cores, at most 4]")
@quiet_option
@click.pass_context
def quickstart(ctx: click.Context, out: Path, jobs: int | None, quiet: bool) -> None:
    """Train small networks on real digits, correlate measures with the gap, estimate accuracies.

    The command trains 48 small networks on 100 or 600 of scikit-learn's 1,797 handwritten digits. It
    measures them on images whose labels are not read, and correlates each measure with the
    generalization gap on other images. Then it estimates how accurate four of the networks are on noisy
    digits, without their labels. Run the command again, and it continues where it stopped.
    """
    from gm_probe.cli.correlate import correlate
    from gm_probe.cli.estimate import estimate
    from gm_probe.cli.sweep import run_with_progress
    from gm_probe.errors import ProbeError
    from gm_probe.sweep.manifest import write_sweep
    from gm_probe.sweep.recipe import load_recipe

    console, notes = results_console(), notes_console(quiet)
    recipe = load_recipe("quickstart")
    note(notes, f"Training and measuring {len(recipe.runs)} small networks on handwritten digits into {out}/")
    write_sweep(recipe, out)
    outcomes = run_with_progress(recipe, out, jobs=jobs or min(os.cpu_count() or 1, 4), quiet=quiet)
    failed = [outcome for outcome in outcomes if outcome.status == "failed"]
    if failed:
        raise ProbeError(f"{len(failed)} runs failed, the first ({failed[0].name}): {failed[0].reason}")
    first = next(iter(recipe.runs.values()))
    sizes = sorted({config.num_train or 0 for config in recipe.runs.values()})
    say(
        console,
        f"{len(recipe.runs)} small networks were trained on {' or '.join(map(str, sizes))} handwritten digits, and "
        f"measured on {first.num_unlabeled} unlabeled ones. Does a measure follow the gap?",
    )
    grouped = {"gap": "error_gap", "group_by": ",".join(recipe.group_by)}
    ctx.invoke(correlate, source=out, **grouped, quiet=True)
    note(notes, f"figure: {out / 'correlate.png'}")
    say(console, "")
    say(console, "How accurate are four of them on noisy digits? The labels of these are not read.")
    shipped = [
        out / name
        for name, config in recipe.runs.items()
        if (config.seed, config.weight_decay, config.batch_size) == (0, 0.0, 8)
    ]
    noisy, validation = _write_digits(recipe, out)
    report = ctx.invoke(
        estimate,
        checkpoints=tuple(shipped),
        unlabeled=str(noisy),
        validation=str(validation),
        quiet=True,
    )
    accuracies = _accuracies([model.name for model in report.models], noisy)
    listed = ", ".join(f"{100 * value:.1f}" for value in accuracies)
    say(console, f"By the labels, the accuracies are {listed} % in this order.")
    say(console, "")
    say(console, "Next, with your own checkpoints and data (see docs/choose.md):")
    say(console, "  gmprobe estimate a.pt b.pt --unlabeled data/ --validation val/")
    say(console, "Checkpoints of others also need --model, --mean and --std.")


def _write_digits(recipe: Recipe, out: Path) -> tuple[Path, Path]:
    """Write half of the sweep's test digits with noise, and the others as a validation set; return both files."""
    import io

    import numpy as np

    from gm_probe.files.atomic import write_atomic
    from gm_probe.training.run_splits import load_splits

    test = load_splits(next(iter(recipe.runs.values()))).test
    assert test.y is not None
    x, y = np.asarray(test.x), np.asarray(test.y)
    noise = np.random.default_rng(0).normal(0, NOISE, x[NUM_VALIDATION:].shape)
    noisy = np.clip(x[NUM_VALIDATION:] + noise, 0, 255).astype(np.uint8)
    parts = {"noisy": (noisy, y[NUM_VALIDATION:]), "validation": (x[:NUM_VALIDATION], y[:NUM_VALIDATION])}
    for name, (images, labels) in parts.items():
        file = io.BytesIO()
        np.savez(file, x=images, y=labels)
        write_atomic(out / f"{name}.npz", file.getvalue())
    return out / "noisy.npz", out / "validation.npz"


def _accuracies(runs: Sequence[str], labeled: Path) -> list[float]:
    """Return each run's share of right answers."""
    from gm_probe.data.datasets import open_source
    from gm_probe.measures.settings import Settings
    from gm_probe.measuring.checkpoint import measure_checkpoint

    examples = open_source(str(labeled), labeled=True).pool
    found = [measure_checkpoint(Path(run), examples, ["error"], Settings()) for run in runs]
    return [1 - result["measures"]["error"]["value"] for result in found]
