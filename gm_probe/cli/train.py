"""``gmprobe train``: one run, into a folder that can be measured, correlated and resumed."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from gm_probe.cli.kinds import AT_ONCE, PATH
from gm_probe.cli.output import note, note_reading, notes_console, number, print_json, results_console, table
from gm_probe.cli.progress import progress_bar
from gm_probe.cli.tensorboard import Events
from gm_probe.errors import UsageError

if TYPE_CHECKING:
    from rich.console import Console

    from gm_probe.training.config import TrainConfig


def _milestones(_: click.Context, __: click.Parameter, text: str | None) -> list[int] | None:
    if text is None:
        return None
    try:
        return [int(part) for part in text.split(",")]
    except ValueError as error:
        raise UsageError(f"--milestones {text!r} must be comma-separated epochs, e.g. 60,120,160") from error


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


@click.command(epilog="Example:  gmprobe train --method iam-d")
@click.option(
    "--data",
    help="Train on this image folder, array file or data set; see `gmprobe datasets`. With --resume, it "
    "says where the same data is now.  [default: digits]",
)
@click.option("--data-root", metavar="DIR", help="Folder in which torchvision keeps its data sets.")
@click.option("--download", is_flag=True, default=None, help="Let torchvision download a missing data set.")
@click.option(
    "--image-size",
    type=click.IntRange(1),
    help="Resize images to this many pixels per side, ignoring their aspect ratio.",
)
@click.option(
    "--resize",
    type=click.IntRange(1),
    help="Resize the shorter side of images to this many pixels, as torchvision does.",
)
@click.option(
    "--crop", type=click.IntRange(1), help="Then cut the central square with this many pixels per side."
)
@click.option(
    "--skip-bad",
    is_flag=True,
    default=None,
    help="Leave out images that cannot be decoded; split.json lists them.",
)
@click.option(
    "--num-train", type=click.IntRange(1), help="Number of training examples.  [default: all that remain]"
)
@click.option(
    "--labels",
    type=click.IntRange(1),
    help="Number of training examples that keep their labels, equally many per class.  [default: all]",
)
@click.option(
    "--num-unlabeled",
    type=click.IntRange(1),
    help="Number of unlabeled examples to measure on, disjoint from the others.  [default: a quarter ≤ 5000]",
)
@click.option(
    "--num-test",
    type=click.IntRange(1),
    help="Number of test examples.  [default: the data's own test part, or a quarter]",
)
@click.option(
    "--validation",
    type=float,
    help="Hold out this share of the training part and evaluate on it instead of the test part.  "
    "[default: none]",
)
@click.option("--split-seed", type=int, help="Seed of the data split, independent of --seed.  [default: 0]")
@click.option("--model", help="Network to train; see `gmprobe models`.  [default: 6cnn]")
@click.option(
    "--init", metavar="PATH", help="Start from these weights; a head for other classes is initialised anew."
)
@click.option(
    "--objective",
    help="Training objective: supervised, joint, fixmatch or simclr; joint and fixmatch need --labels.  "
    "[default: supervised]",
)
@click.option(
    "--mu",
    type=click.IntRange(1),
    help="Unlabeled examples per labeled example in joint and fixmatch.  [default: 7]",
)
@click.option(
    "--threshold", type=float, help="FixMatch: least confidence of a pseudo-label.  [default: 0.95]"
)
@click.option("--lambda-u", type=float, help="FixMatch: weight of the unlabeled loss.  [default: 1]")
@click.option(
    "--unlabeled-mean",
    help="FixMatch: average the unlabeled loss over the whole batch, or over "
    "confident views only.  [default: batch]",
)
@click.option("--temperature", type=float, help="SimCLR: temperature τ of NT-Xent.  [default: 0.5]")
@click.option(
    "--probe-every",
    type=int,
    help="SimCLR: epochs between linear probes (0 = only at the end).  [default: 0]",
)
@click.option(
    "--method", help="Training method: sgd, sam, asam, iam-d, iam-d-onepass or iam-s.  [default: sgd]"
)
@click.option(
    "--rho", type=float, help="Radius ρ of the perturbation.  [default: 0.05 sam, 0.5 asam, 0.1 iam-*]"
)
@click.option("--beta", type=float, help="Weight β of IAM-D's KL term.  [default: 1]")
@click.option("--k-steps", type=int, help="Number K of ascent steps.  [default: 1]")
@click.option("--noise-scale", type=float, help="Length of the ascent's random start.  [default: 0.1]")
@click.option(
    "--kl-grad",
    help="IAM-D: differentiate both sides of the KL, or the perturbed side only.  [default: both]",
)
@click.option("--sign", help="IAM-S: how the sign of δ is chosen: random, none or loss.  [default: random]")
@click.option("--eta", type=float, help="ASAM: the constant η.  [default: 0.01]")
@click.option(
    "--m",
    type=click.IntRange(1),
    help="Process each batch in sub-batches of this size: gradient accumulation, m-sharpness.  [default: "
    "whole]",
)
@click.option("--optimizer", help="Base optimizer: sgd or adamw.  [default: sgd]")
@click.option("--lr", type=float, help="Learning rate.  [default: 0.05]")
@click.option("--momentum", type=float, help="Momentum of SGD.  [default: 0.9]")
@click.option("--nesterov", is_flag=True, default=None, help="Use Nesterov momentum.")
@click.option("--weight-decay", type=float, help="Weight decay.  [default: 0]")
@click.option("--epochs", type=int, help="Number of epochs.  [default: 30]")
@click.option("--batch-size", type=int, help="Number of examples per batch.  [default: 128]")
@click.option(
    "--schedule", help="Learning-rate schedule: constant, cosine, linear or multi-step.  [default: constant]"
)
@click.option(
    "--milestones",
    callback=_milestones,
    metavar="E1,E2",
    help="Epochs at which multi-step lowers the learning rate.",
)
@click.option("--gamma", type=float, help="Factor on the learning rate at each milestone.  [default: 0.2]")
@click.option("--warmup-epochs", type=float, help="Number of epochs of linear warm-up.  [default: 0]")
@click.option("--min-lr", type=float, help="Learning rate at the end of cosine and linear.  [default: 0]")
@click.option(
    "--clip-norm", type=float, help="Scale gradients down to this norm when they exceed it.  [default: never]"
)
@click.option(
    "--ema-decay",
    type=float,
    help="Evaluate and save a moving average of the weights with this decay.  [default: none]",
)
@click.option("--label-smoothing", type=float, help="Amount of label smoothing.  [default: 0]")
@click.option(
    "--augment", is_flag=True, default=None, help="Augment images: zero-pad by 4 pixels, crop and flip."
)
@click.option("--stop-ce", type=float, help="Stop once the training cross-entropy is at most this.")
@click.option(
    "--eval-every", type=int, help="Epochs between evaluations (0 = only at the end).  [default: 0]"
)
@click.option("--track-every", type=int, help="Epochs between measurements of S_ρ (0 = never).  [default: 0]")
@click.option(
    "--track-rho", type=float, help="Radius ρ of the S_ρ that --track-every measures.  [default: 0.1]"
)
@click.option("--amp", help="Mixed precision: none, bf16 or fp16.  [default: none]")
@click.option(
    "--tf32",
    is_flag=True,
    default=None,
    help="Allow TF32 products on an NVIDIA GPU: faster, about three digits.",
)
@click.option(
    "--deterministic", is_flag=True, default=None, help="Make runs bit-identical on a GPU too; slower."
)
@click.option(
    "--checkpoint-every",
    type=click.IntRange(1),
    help="Save the state every this many steps, besides after every epoch.",
)
@click.option("--seed", type=int, help="Seed of the initial weights and all draws in training.  [default: 0]")
@click.option(
    "--device",
    help="Compute on this device: auto, cpu, cuda, cuda:1, or another that torch knows.  [default: auto]",
)
@click.option("--threads", type=AT_ONCE, help="Number of CPU threads.")
@click.option("--out", type=PATH, help="Folder for the run.  [default: runs/NAME]")
@click.option("--resume", is_flag=True, help="Continue the run in --out where it stopped.")
@click.option("--save", type=PATH, help="Also write the final weights to this .pt or .safetensors file.")
@click.option("--tensorboard", is_flag=True, help="Also write TensorBoard events below --out.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.option("-q", "--quiet", is_flag=True, help="Print no progress and no notes on stderr.")
def train(
    out: Path | None,
    resume: bool,
    save: Path | None,
    tensorboard: bool,
    as_json: bool,
    quiet: bool,
    **given: Any,
) -> None:
    """Train one model; without --data, on the bundled handwritten digits.

    A seed splits the data into disjoint train, unlabeled and test parts. The run folder holds the
    configuration, metrics, their curves and the final weights. Until training has finished, it also holds
    the state to resume from.

    With several GPUs or machines:  torchrun --nproc-per-node N -m gm_probe train ...
    """
    from gm_probe.data.sources import require_source
    from gm_probe.runs.records import CONFIG, RUNS, SUMMARY, read_metrics, read_run
    from gm_probe.sweep.recipe import require_names, run_name
    from gm_probe.training.config import TrainConfig
    from gm_probe.training.leave import asked, refuse

    console = notes_console(quiet or os.environ.get("RANK", "0") != "0")  # torchrun's others are silent
    settings = {key: value for key, value in given.items() if value is not None}
    if resume and out is not None and (out / CONFIG).exists():  # a run knows its own settings
        recorded = TrainConfig.from_record(read_run(out).config)
        refuse({name: value for name, value in asked(recorded).items() if name not in settings}, out)
        settings = {**recorded.as_dict(), "download": False, **settings}
    elif resume and out is not None:
        note(console, f"{out} holds no run to resume; starting a new one")
    config = TrainConfig.from_dict(settings)
    if given.get("data") is not None:
        require_source(config.data, here=True)
    require_names([config])
    if "data" not in settings:
        note(console, "no --data given: training on the bundled handwritten digits (1,797 images of 8×8)")
    note_settings(console, config, given)
    # below, torch and matplotlib are imported, which takes seconds: what can be wrong with the options has been told
    import torch

    from gm_probe.analysis.figures import run_curves
    from gm_probe.analysis.plots import write_figure
    from gm_probe.runtime import processes
    from gm_probe.runtime.devices import keep_freed_memory, pick_device
    from gm_probe.training import loop
    from gm_probe.training.tracking import PROBE_BATCH

    if config.threads is not None:
        torch.set_num_threads(config.threads)
    if out is None:
        out = RUNS / run_name(config, {"method": config.method, "model": config.model, "seed": config.seed})
    keep_freed_memory()
    with processes.joined(pick_device(config.device)):
        speaks = processes.rank() == 0  # of several processes, one prints and writes
        began = (out / CONFIG).exists()
        if not began or (resume and not (out / SUMMARY).exists()):  # else there is nothing to train
            _note_data(console, config)
        events = Events(out) if tensorboard and speaks else None
        with progress_bar("training", config.epochs, unit="epochs", quiet=quiet or not speaks) as bar:

            def notify(row: dict[str, Any]) -> None:
                epoch, loss = row["epoch"], row["running_loss"]
                bar.update(epoch, state=f"{epoch}/{config.epochs}  loss {loss:.3g}")
                if PROBE_BATCH in row:
                    bar.print(
                        f"note: out of memory where S_ρ was measured after epoch {epoch}: went on with "
                        f"batches of {row[PROBE_BATCH]}, which changes no result"
                    )
                if events is not None:
                    events.write(row)

            try:
                summary = loop.train(config, out, resume=resume, notify=notify)
            finally:
                if events is not None:
                    events.close()
    if not speaks:
        return
    if save is not None:
        _save(out, config.model, save)
    if config.init is not None:
        started = read_run(out).config.get("environment", {})
        fresh = started.get("fresh_weights", [])
        note(console, f"started from {config.init}; fresh: {', '.join(fresh) or 'nothing'}")
        if others := started.get("init_not_taken"):
            note(
                console,
                f"note: {config.init} holds the weights more than once; {', '.join(others)} not used. To "
                "start from those, save them alone",
            )
    write_figure(run_curves(list(read_metrics(out))), [out / CURVES_FILE])
    if as_json:
        print_json({"out": str(out), **summary})
        return
    simclr = config.objective == "simclr"
    title = f"{out}  {config.method}, {summary['epochs']} epochs{', linear probe' if simclr else ''}"
    rows = _results(
        summary, "test" if config.validation is None else "validation", "probe_" if simclr else ""
    )
    results_console().print(table(title, ["", "error", "cross-entropy", "examples"], rows))
    note(console, f"next:  gmprobe measure {out}{' --head simclr' if simclr else ''}")


def _note_data(console: Console, config: TrainConfig) -> None:
    """Say how the data of a run that begins is read."""
    from gm_probe.training.parts import open_data

    if console.quiet:
        return
    source = open_data(config)
    parts = [part for part in (source.pool, source.test) if part is not None]
    notes = dict.fromkeys(text for part in parts for text in part.notes)
    note_reading(console, list(notes), [error for part in parts for error in part.skipped])


def _results(summary: Mapping[str, Any], held_out: str, prefix: str) -> list[list[str]]:
    """Error, cross-entropy and examples of both parts and, where a run has one, the gap between them."""
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
