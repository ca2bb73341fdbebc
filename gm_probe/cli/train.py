"""``gmprobe train``: one run, into a folder that can be measured, correlated and resumed."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import closing, nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from gm_probe.cli.options import json_option, quiet_option
from gm_probe.cli.output import note, note_reading, notes_console, number, print_json, results_console, table
from gm_probe.cli.param_types import PATH
from gm_probe.cli.progress import progress_bar
from gm_probe.cli.settings import GroupedCommand, GroupedOption, given_settings, set_option, setting_options
from gm_probe.cli.tensorboard import Events
from gm_probe.errors import UsageError
from gm_probe.training.config import MAIN, TrainConfig

if TYPE_CHECKING:
    from rich.console import Console

    from gm_probe.cli.progress import Bar


CURVES_FILE = "curves.png"
BF16_NOISE = 3.0
"""Length of the random start from which bf16 finds the perturbation of float32 (benchmarks/results/bf16-ascent.md)."""


def note_settings(console: Console, config: TrainConfig, given: Mapping[str, Any]) -> None:
    """Name the options that change nothing or come too late, and noise that bf16 rounds away."""
    idle = config.idle()
    for name, by in idle.items():
        if given.get(name) is not None:
            option, decides = (f"--{key.replace('_', '-')}" for key in (name, by))
            note(console, f"note: {option} has no effect with {decides} {getattr(config, by)}")
    for name, what in config.unreached().items():
        note(console, f"note: --{name.replace('_', '-')} exceeds the {config.epochs} epochs: {what}")
    if config.amp == "bf16" and config.noise_scale < BF16_NOISE and "noise_scale" not in idle:
        note(
            console,
            f"note: bf16 rounding loses much of a start of length {config.noise_scale:g}. With "
            "--noise-scale 3 the ascent is as in float32",
        )


@click.command(cls=GroupedCommand, epilog="Example:  gmprobe train --method iam-d")
@setting_options(TrainConfig)
@set_option
@click.option(
    "--config",
    "config_file",
    cls=GroupedOption,
    group=MAIN,
    type=PATH,
    help="Take settings from this TOML file, such as a run's config.toml. Options given here win over it.",
)
@click.option("--out", cls=GroupedOption, group=MAIN, type=PATH, help="Run folder.  [default: runs/NAME]")
@click.option(
    "--resume",
    cls=GroupedOption,
    group=MAIN,
    is_flag=True,
    help="Continue the run in --out. Its data may be elsewhere now: say where with --data.",
)
@click.option("--save", type=PATH, help="Also write the final weights to this .pt or .safetensors file.")
@click.option("--tensorboard", is_flag=True, help="Also write TensorBoard events below --out.")
@json_option
@quiet_option
def train(
    config_file: Path | None,
    out: Path | None,
    resume: bool,
    save: Path | None,
    tensorboard: bool,
    as_json: bool,
    quiet: bool,
    assigned: dict[str, Any],
    **options: Any,
) -> None:
    """Train one model; without --data, on the bundled handwritten digits.

    The data is split by seed into disjoint train, unlabeled and test parts. The run folder holds the configuration,
    metrics, their curves and the final weights. Until the run has finished it also holds the state to resume from.

    Several GPUs or machines share a run:  torchrun --nproc-per-node N -m gm_probe train ...
    """
    from gm_probe.data.names import require_data_name
    from gm_probe.runs.records import RUNS
    from gm_probe.sweep.recipe import require_names, run_name

    # only the first of torchrun's processes prints
    console = notes_console(quiet or os.environ.get("RANK", "0") != "0")
    if config_file is not None and resume:
        raise UsageError("--config begins a run and --resume continues one; give one of them")
    given = given_settings(options, assigned)
    settings = given if config_file is None else _of_file(config_file, given)
    if resume and out is not None:
        settings = _of_run(out, given, console)
    config = TrainConfig.from_dict(settings)
    if "data" in given:
        require_data_name(config.data, here=True)
    require_names([config])
    if "data" not in settings:
        note(console, "no --data given: training on the bundled handwritten digits (1,797 images of 8×8)")
    note_settings(console, config, given)
    # all errors in the options have been reported; torch and matplotlib take seconds to import
    if out is None:
        out = RUNS / run_name(config, {"method": config.method, "model": config.model, "seed": config.seed})
    summary = _train(config, out, resume, tensorboard, quiet, console)
    if summary is None:
        return
    if save is not None:
        _save(out, config.model, save)
    if config.init is not None:
        _note_init(console, config.init, out)
    _draw_curves(out)
    if as_json:
        print_json({"out": str(out), **summary})
        return
    encoder = config.trains_encoder
    title = f"{out}  {config.method}, {summary['epochs']} epochs{', linear probe' if encoder else ''}"
    held_out = "test" if config.validation is None else "validation"
    rows = _results(summary, held_out, "probe_" if encoder else "")
    results_console().print(table(title, ["", "error", "cross-entropy", "examples"], rows))
    note(console, f"next:  gmprobe measure {out}{' --head simclr' if encoder else ''}")


def _train(
    config: TrainConfig, out: Path, resume: bool, tensorboard: bool, quiet: bool, console: Console
) -> dict[str, Any] | None:
    """Train with a progress bar and return the summary; None in all processes of torchrun but the first."""
    import torch

    from gm_probe.runs.records import CONFIG, SUMMARY
    from gm_probe.runtime import processes
    from gm_probe.runtime.devices import pick_device
    from gm_probe.runtime.machine import keep_freed_memory
    from gm_probe.training import loop

    if config.threads is not None:
        torch.set_num_threads(config.threads)
    keep_freed_memory()
    with processes.joined(pick_device(config.device)):
        speaks = processes.rank() == 0  # of several processes, one prints and writes
        began = (out / CONFIG).exists()
        if not began or (resume and not (out / SUMMARY).exists()):  # else there is nothing to train
            _note_data(console, config)
        writer = closing(Events(out)) if tensorboard and speaks else nullcontext()
        with (
            writer as events,
            progress_bar("training", config.epochs, unit="epochs", quiet=quiet or not speaks) as bar,
        ):
            notify = partial(_notify, bar, events, config.epochs)
            summary = loop.train(config, out, resume=resume, notify=notify)
        return summary if speaks else None


def _notify(bar: Bar, events: Events | None, epochs: int, row: dict[str, Any]) -> None:
    from gm_probe.training.tracking import PROBE_BATCH

    epoch, loss = row["epoch"], row["running_loss"]
    bar.update(epoch, state=f"{epoch}/{epochs}  loss {loss:.3g}")
    if PROBE_BATCH in row:
        bar.print(
            f"note: out of memory where S_ρ was measured after epoch {epoch}: went on with "
            f"batches of {row[PROBE_BATCH]}, which changes no result"
        )
    if events is not None:
        events.write(row)


def _of_run(out: Path, given: Mapping[str, Any], console: Console) -> dict[str, Any]:
    """Return the settings of the run to resume, which knows its own, and those ``given`` in their place."""
    from gm_probe.runs.records import CONFIG, read_run
    from gm_probe.training.permissions import refuse, restricted

    if not (out / CONFIG).exists():
        note(console, f"{out} holds no run to resume; starting a new one")
        return dict(given)
    recorded = TrainConfig.from_record(read_run(out).config)
    refuse({name: value for name, value in restricted(recorded).items() if name not in given}, out)
    return {**recorded.as_dict(), "download": False, **given}


def _of_file(path: Path, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings in the TOML file ``path``, and those ``given`` in their place.

    Raises:
        UsageError: one is unknown, or may come only from the command line.
        StorageError: the file cannot be read.
    """
    from gm_probe.files.atomic import read_toml
    from gm_probe.training.permissions import refuse, restricted

    found = {name: value for name, value in read_toml(path).items() if name != "environment"}
    lacking = restricted(TrainConfig.from_dict(found))
    refuse({name: value for name, value in lacking.items() if name not in given}, path)
    return {**found, "download": False, **given}


def _note_init(console: Console, init: str, out: Path) -> None:
    """Say which weights --init gave."""
    from gm_probe.runs.records import read_run

    started = read_run(out).config.get("environment", {})
    fresh = started.get("fresh_weights", [])
    note(console, f"started from {init}; fresh: {', '.join(fresh) or 'nothing'}")
    if others := started.get("init_not_taken"):
        note(
            console,
            f"note: {init} holds the weights more than once; {', '.join(others)} not used. To "
            "start from those, save them alone",
        )


def _draw_curves(out: Path) -> None:
    from gm_probe.analysis.figures import run_curves
    from gm_probe.analysis.plots import write_figure
    from gm_probe.runs.records import read_metrics

    write_figure(run_curves(list(read_metrics(out))), [out / CURVES_FILE])


def _note_data(console: Console, config: TrainConfig) -> None:
    """Say how the data of a run that begins is read."""
    from gm_probe.training.run_splits import open_data

    if console.quiet:
        return
    source = open_data(config).in_memory()
    parts = [part for part in (source.pool, source.test) if part is not None]
    notes = dict.fromkeys(text for part in parts for text in part.notes)
    note_reading(console, list(notes), [error for part in parts for error in part.skipped])


def _results(summary: Mapping[str, Any], held_out: str, prefix: str) -> list[list[str]]:
    """Return error, cross-entropy and size of both parts and, where a run has one, the gap between them."""
    parts = {"train": "train", held_out: "test"}
    rows = [
        [
            name,
            number(summary[f"{prefix}{part}_error"]),
            number(summary[f"{prefix}{part}_ce"]),
            f"{summary[f'num_{part}']:,}",
        ]
        for name, part in parts.items()
    ]
    if "error_gap" in summary:
        rows.append(["gap", number(summary["error_gap"]), number(summary["ce_gap"]), ""])
    return rows


def _save(run: Path, model_name: str, path: Path) -> None:
    """Write a run's weights to ``path`` too, in the format that its suffix names."""
    from gm_probe.models.checkpoints import read_checkpoint, save_checkpoint
    from gm_probe.models.loading import load_model

    checkpoint = read_checkpoint(run)
    assert checkpoint.model is not None
    assert checkpoint.normalization is not None
    model = load_model(checkpoint, model_name)
    save_checkpoint(path, model, checkpoint.model, checkpoint.normalization, checkpoint.classes)
