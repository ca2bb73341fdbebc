"""``gmprobe tune``: the (ρ, β) of least validation error, by a grid or by Optuna."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from gm_probe.cli.options import format_options, jobs_option
from gm_probe.cli.output import (
    echo,
    note,
    notes_console,
    number,
    print_as,
    results_console,
    say,
    table,
)
from gm_probe.cli.param_types import PATH, floats
from gm_probe.cli.settings import GroupedCommand, setting_options
from gm_probe.cli.train import note_settings
from gm_probe.errors import UsageError
from gm_probe.training.config import SETTINGS, TrainConfig

if TYPE_CHECKING:
    from rich.console import Console

    from gm_probe.sweep.tuning import Cell, Point, Tuner

OWN = ("rho", "beta", "validation", "seed")
"""Settings of a run that `tune` has in a sense of its own."""
FEW = 500
"""Held-out examples, of which an error is known to 2 points."""


@click.command(
    cls=GroupedCommand,
    first=("rho_text", "beta_text", "trials", "seeds", "out", "jobs", "dry_run", "output"),
    epilog="Example:  gmprobe tune --method iam-d --model mlp --rho 0.1,0.3 --out tune/",
)
@click.option(
    "--rho",
    "rho_text",
    metavar="A,B,...",
    help="Values of ρ to try; with --trials, the bounds LOW,HIGH.  [default: 0.5, 1 and 2 times the "
    "method's own; with --trials, 0.25 to 4 times]",
)
@click.option(
    "--beta",
    "beta_text",
    metavar="A,B,...",
    help="Values of IAM-D's β to try; with --trials, the bounds LOW,HIGH.  [default: 1]",
)
@click.option(
    "--trials", type=click.IntRange(1), help="Let Optuna choose this many points instead of a grid."
)
@click.option(
    "--seeds", type=click.IntRange(1), default=3, show_default=True, help="Number of runs (seeds) per point."
)
@click.option("--out", type=PATH, help="Folder for the runs and the figure.  [default: tune/NAME]")
@jobs_option
@click.option("--dry-run", is_flag=True, help="List the remaining runs of a grid; run nothing.")
@setting_options(TrainConfig, [name for name in SETTINGS if name not in OWN])
@format_options
def tune(
    rho_text: str | None,
    beta_text: str | None,
    trials: int | None,
    seeds: int,
    out: Path | None,
    jobs: int,
    dry_run: bool,
    output: str | None,
    quiet: bool,
    **given: Any,
) -> None:
    """Choose ρ and β by the error on a tenth of the training part, never on the test part.

    The command trains every pair of --rho and --beta with --seeds seeds each. With --trials it trains the
    points that Optuna chooses between LOW and HIGH. All other options are those of `gmprobe train`, and
    hold for every run. Each run is a folder in --out. Complete runs are not trained again, so the same
    command continues where it stopped, also with more values or trials. It prints mean ± standard error
    over seeds, and draws a map into --out. It also prints the command that trains the best point on the
    whole training part.
    """
    console = notes_console(quiet)
    config, values = _search(console, given, rho_text, beta_text, trials, dry_run)
    from gm_probe.cli.sweep import run_with_progress
    from gm_probe.sweep import tuning
    from gm_probe.sweep.recipe import run_name
    from gm_probe.training.run_splits import load_splits

    out = out or Path("tune", run_name(config, {"method": config.method, "model": config.model}))
    base = config.replace(validation=tuning.VALIDATION)
    parts = load_splits(base)  # a wrong size is reported before anything is trained
    sizes = {"num_train": len(parts.train), "num_validation": len(parts.test)}
    run = partial(run_with_progress, out=out, jobs=jobs, quiet=quiet)
    tuner = tuning.Tuner(base, seeds, out, run)
    points = [tuning.Point(rho, beta) for beta in values.get("beta", (None,)) for rho in values["rho"]]
    if dry_run:
        _dry_run(tuner, points)
        return
    report = partial(_print_trial, console, trials)
    cells = tuner.trials(trials, values, report) if trials else tuner.grid(points)
    best = tuning.best_of(cells)
    command = _command(config, best)
    figures = _draw(tuner, cells, best, grid=not trials)
    if output:
        rows = [cell.as_dict() for cell in cells]
        found = {"out": str(out), **sizes, "seeds": seeds, "cells": rows, "best": best.as_dict()}
        found |= {"command": command, "figures": list(map(str, figures))}
        print_as(output, found, [{k: v for k, v in row.items() if k != "errors"} for row in rows])
    else:
        _print_table(tuner, cells, best, **sizes)
        echo(f"train with it:  {command}")
    for text in _doubts(cells, best, {} if trials else values, sizes["num_validation"]):
        note(console, f"note: {text}")
    note(console, f"figure: {', '.join(map(str, figures))}")


def _search(
    console: Console,
    given: Mapping[str, Any],
    rho_text: str | None,
    beta_text: str | None,
    trials: int | None,
    dry_run: bool,
) -> tuple[TrainConfig, dict[str, tuple[float, ...]]]:
    """Return the configuration, and the values of ρ and β to try: with ``trials`` two bounds each."""
    from gm_probe.data.names import require_data_name
    from gm_probe.sweep.recipe import require_names

    settings = {key: value for key, value in given.items() if value is not None}
    config = TrainConfig.from_dict(settings)
    asked = {"rho": rho_text, "beta": beta_text}
    values = {name: floats(f"--{name}", text) for name, text in asked.items() if text is not None}
    if trials and dry_run:
        raise UsageError("--dry-run cannot know the points that --trials will choose")
    if "data" in settings:
        require_data_name(config.data, here=True)
    require_names([config])
    from gm_probe.sweep import tuning  # imported late: an error in an option must not wait for torch

    if "data" not in settings:
        note(console, "no --data given: tuning on the bundled handwritten digits (1,797 images of 8×8)")
    note_settings(console, config, given)
    tuning.check_tunable(config, beta=beta_text is not None)
    values = {"rho": tuning.radii_around_default(config, bounds=bool(trials))} | values
    if trials:
        return config, {name: _bounds(name, ends) for name, ends in values.items()}
    if any(len(set(tried)) < len(tried) for tried in values.values()):
        raise UsageError("--rho or --beta names a value twice; give each once")
    return config, values


def _bounds(name: str, values: Sequence[float]) -> tuple[float, float]:
    if len(values) != 2 or not 0 < values[0] < values[1] < math.inf:
        raise UsageError(f"with --trials, --{name} takes two bounds LOW,HIGH with 0 < LOW < HIGH")
    return values[0], values[1]


def _dry_run(tuner: Tuner, points: Sequence[Point]) -> None:
    from gm_probe.sweep.runner import is_complete
    from gm_probe.sweep.tuning import NOTHING

    left = {name: not is_complete(tuner.out / name, NOTHING) for name in tuner.recipe(points).runs}
    rows = [[name, "to do" if todo else "complete"] for name, todo in left.items()]
    results_console().print(table(f"{sum(left.values())} of {len(left)} runs to do", ["run", "state"], rows))


def _print_trial(console: Console, trials: int | None, number_of: int, cell: Cell) -> None:
    rho, beta = cell.point
    at = f"ρ = {rho:g}" + ("" if beta is None else f", β = {beta:g}")
    note(console, f"trial {number_of}/{trials}: {at}, validation error {number(cell.mean)}")


def _doubts(
    cells: Sequence[Cell], best: Cell, grid: Mapping[str, Sequence[float]], num_validation: int
) -> Iterator[str]:
    """Yield what a reader must know before taking the best point of the search for the best of all."""
    from gm_probe.sweep.tuning import rivals_of

    if num_validation < FEW:
        yield (
            f"an error on {num_validation} held-out examples has a standard error of up to "
            f"{50 / math.sqrt(num_validation):.2g} points; smaller differences are not distinguished"
        )
    rivals = rivals_of(best, cells)
    if rivals:
        yield (
            f"{len(rivals)} other point(s) are within one standard error of the best; more --seeds can "
            "separate them"
        )
    for name, values in grid.items():
        at = getattr(best.point, name)
        if len(values) > 2 and at in (min(values), max(values)):
            yield f"the best {name} is the grid's {'least' if at == min(values) else 'largest'}; widen the grid"


def _command(config: TrainConfig, best: Cell) -> str:
    """Return the `gmprobe train` command with every setting that is not at its default, and the best point."""
    from gm_probe.analysis.provenance import train_command

    default = type(config)().as_dict()
    changed = {key: value for key, value in config.as_dict().items() if value != default[key]}
    return train_command(
        changed | {key: value for key, value in best.point._asdict().items() if value is not None}
    )


def _print_table(
    tuner: Tuner, cells: Sequence[Cell], best: Cell, num_train: int, num_validation: int
) -> None:
    rows = []
    for cell in cells:
        rho, beta = cell.point
        lost = sum(error is None for error in cell.errors)
        error = f"{lost} of {len(cell.errors)} diverged" if lost else number(cell.mean)
        mark = "best" if cell is best else ""
        rows.append([f"{rho:g}", "" if beta is None else f"{beta:g}", error, number(cell.stderr, 2), mark])
    title = (
        f"{tuner.base.method}: error on {num_validation:,} held-out training examples, {tuner.seeds} seed(s)"
    )
    console = results_console()
    console.print(table(title, ["ρ", "β", "error", "± s.e.", ""], rows))
    text = f"trained on {num_train:,}; ± s.e.: standard error over seeds, the held-out examples are the same"
    say(console, text, "dim")


def _draw(tuner: Tuner, cells: Sequence[Cell], best: Cell, *, grid: bool) -> list[Path]:
    from gm_probe.analysis.heat_map import heat_map, trial_map
    from gm_probe.analysis.plots import write_figure

    draw = heat_map if grid else trial_map
    title = f"{tuner.base.method}, {tuner.base.model}, {tuner.seeds} seed(s) per point"
    figure = draw([cell.as_dict() for cell in cells], best.as_dict(), title)
    paths = [tuner.out / f"tune{suffix}" for suffix in (".png", ".svg")]
    write_figure(figure, paths)
    return paths
