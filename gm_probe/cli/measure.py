"""``gmprobe measure``: one checkpoint or many, over unlabeled or labeled data."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from gm_probe.cli.figures import as_rows, print_result, warn
from gm_probe.cli.output import format_options, note, notes_console, print_csv, print_json
from gm_probe.cli.progress import Bar, progress_bar
from gm_probe.core.errors import CheckpointError, UsageError

if TYPE_CHECKING:
    from gm_probe.core.batches import Normalization
    from gm_probe.core.datasets import Examples, Source


@click.command(
    epilog="Example:  gmprobe measure ckpt.pt --unlabeled data/",
)
@click.argument("checkpoints", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option(
    "--unlabeled", metavar="DATA", help="Folder of images (labels unread), array file, or data set name."
)
@click.option("--labeled", metavar="DATA", help="The same, with class folders (or 'y') read as labels.")
@click.option(
    "--part",
    type=click.Choice(["test", "train"]),
    help="Of data that has both.  [default: test where the data has one]",
)
@click.option("--model", metavar="NAME", help="Network of a foreign checkpoint; see `gmprobe models`.")
@click.option(
    "--measures", metavar="A,B", default="", help="Which to take; see `gmprobe measures`.  [default: all]"
)
@click.option(
    "--protocol",
    type=click.Choice(["paper", "converged", "both"]),
    default="paper",
    show_default=True,
    help="S_ρ as the mean over random starts of K steps, or as the converged maximum.",
)
@click.option("--rho", type=float, default=0.1, show_default=True, help="Radius ρ in parameter space.")
@click.option("--k-steps", type=int, default=1, show_default=True, help="Ascent steps K of Algorithm 1.")
@click.option("--noise-scale", type=float, default=0.1, show_default=True, help="Length of the random start.")
@click.option(
    "--starts", "num_starts", type=int, default=10, show_default=True, help="Random starts averaged over."
)
@click.option(
    "--trace-tolerance", type=float, default=0.05, show_default=True, help="Relative standard error."
)
@click.option(
    "--eigen-tolerance", type=float, default=0.01, show_default=True, help="Relative Lanczos residual."
)
@click.option(
    "--max-probes", type=int, default=100, show_default=True, help="Most probes of a trace estimate."
)
@click.option(
    "--max-iterations",
    type=int,
    default=100,
    show_default=True,
    help="Most Lanczos iterations or ascent steps.",
)
@click.option(
    "--max-examples", type=click.IntRange(1), help="Measure on a seeded random subset of this size."
)
@click.option(
    "--batch-size", type=click.IntRange(1), default=250, show_default=True, help="Memory only, not results."
)
@click.option("--mean", metavar="R,G,B", help="Normalisation of a foreign checkpoint, for pixels in [0, 1].")
@click.option("--std", metavar="R,G,B", help="Likewise.")
@click.option("--no-normalize", is_flag=True, help="Pixels in [0, 1] as they are.")
@click.option("--image-size", type=click.IntRange(1), help="Resize a folder's images to this many pixels.")
@click.option("--channels", type=click.Choice(["1", "3"]), help="Read a folder's images as grey or RGB.")
@click.option(
    "--num-classes", type=click.IntRange(2), help="Classes of a foreign checkpoint.  [default: its head's]"
)
@click.option(
    "--data-root", metavar="DIR", type=click.Path(path_type=Path), help="Where torchvision keeps data."
)
@click.option("--download", is_flag=True, help="Let torchvision download what is missing.")
@click.option("--dtype", type=click.Choice(["float32", "float64"]), default="float32", show_default=True)
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:1 or mps.")
@click.option("--threads", type=click.IntRange(1), help="CPU threads.")
@click.option("--seed", type=int, default=0, show_default=True)
@click.option(
    "--save", is_flag=True, help="Also write measures.json into each run folder, for `gmprobe correlate`."
)
@format_options
def measure(
    checkpoints: tuple[Path, ...],
    unlabeled: str | None,
    labeled: str | None,
    part: str | None,
    model: str | None,
    measures: str,
    protocol: str,
    rho: float,
    k_steps: int,
    noise_scale: float,
    num_starts: int,
    trace_tolerance: float,
    eigen_tolerance: float,
    max_probes: int,
    max_iterations: int,
    max_examples: int | None,
    batch_size: int,
    mean: str | None,
    std: str | None,
    no_normalize: bool,
    image_size: int | None,
    channels: str | None,
    num_classes: int | None,
    data_root: Path | None,
    download: bool,
    dtype: str,
    device: str,
    threads: int | None,
    seed: int,
    save: bool,
    output: str | None,
    quiet: bool,
) -> None:
    """Measure how well CHECKPOINTS will generalize.

    A checkpoint is a run folder, a file that gmprobe wrote, or any .pt/.pth/.th/.ckpt/.safetensors with a state
    dict (then --model names its network, and --mean/--std its normalisation). Unlabeled data gives local
    inconsistency and the Fisher matrix exactly as defined, and the Hessian with predicted labels, marked so;
    labeled data gives the Hessian proper, the error and the cross-entropy too. A run folder needs no data option:
    its own unlabeled part is used.
    """
    if unlabeled is not None and labeled is not None:
        raise UsageError("--unlabeled and --labeled exclude each other; give one")
    if save and not all(path.is_dir() for path in checkpoints):
        raise UsageError("--save writes into run folders; give folders, or use --json > file")
    source = unlabeled if labeled is None else labeled
    for path in checkpoints:
        if not path.exists():
            raise CheckpointError(f"{path}: no such checkpoint")
        if source is None and not path.is_dir():
            raise UsageError(
                f"{path} is no run folder with data of its own; give --unlabeled or --labeled DATA"
            )
    if source is None and (part or image_size or channels):
        raise UsageError("--part, --image-size and --channels go with --unlabeled or --labeled DATA")
    import torch

    from gm_probe.core.datasets import open_source
    from gm_probe.core.devices import pick_device
    from gm_probe.core.records import MEASURES as MEASURES_FILE
    from gm_probe.probe.measures import expected_cost
    from gm_probe.probe.probe import Settings
    from gm_probe.sweep.measuring import measure_checkpoint, merge_measures
    from gm_probe.training.parts import OWN_UNLABELED, own_unlabeled

    if threads is not None:
        torch.set_num_threads(threads)
    settings = Settings(
        rho=rho,
        k_steps=k_steps,
        noise_scale=noise_scale,
        num_starts=num_starts,
        protocol="converged" if protocol == "converged" else "paper",
        trace_tolerance=trace_tolerance,
        eigen_tolerance=eigen_tolerance,
        max_probes=max_probes,
        max_iterations=max_iterations,
        seed=seed,
    )
    normalization = _normalization(mean, std, no_normalize)
    names = _chosen(measures, protocol, labeled is not None)
    chosen_device = pick_device(device)
    examples, measured_part = None, OWN_UNLABELED
    if source is not None:
        opened = open_source(
            source,
            labeled=labeled is not None,
            root=data_root,
            download=download,
            channels=int(channels) if channels else None,
            image_size=image_size,
        )
        examples, measured_part = _part(opened, part)
        if opened.test is not None and part is None and not quiet:
            note(notes_console(), f"note: {source} has two parts; measuring over its test part (see --part)")
    results: list[dict[str, Any]] = []
    try:
        for path in checkpoints:
            with progress_bar(path.name, expected_cost(names, settings), quiet=quiet) as bar:

                def notify(name: str, evaluations: float, bar: Bar = bar) -> None:
                    rate = f"{bar.speed:.2g} grad/s" if bar.speed else ""
                    bar.update(evaluations, state=rate, label=name)

                result = measure_checkpoint(
                    path,
                    (own_unlabeled(path) if examples is None else examples).subset(max_examples, seed),
                    names,
                    settings,
                    model_name=model,
                    normalization=normalization,
                    num_classes=num_classes,
                    batch_size=batch_size,
                    dtype=getattr(torch, dtype),
                    device=chosen_device,
                    notify=notify,
                )
            result["settings"] |= {"part": measured_part, "max_examples": max_examples}
            if save:
                merge_measures(path / MEASURES_FILE, result)
            results.append(result)
            if output is None:  # one checkpoint's table as soon as it is known
                print_result(result)
            if not quiet:
                warn(result)
    finally:  # an error costs what it struck, not what is done
        if output == "json" and results:
            print_json(results)
        elif output == "csv" and results:
            print_csv(as_rows(results))


def _part(source: Source, wanted: str | None) -> tuple[Examples, str]:
    """The part to measure over, and its name in the settings."""
    if source.test is None:
        if wanted == "test":
            raise UsageError(f"{source.pool.source} has no test part; leave --part out")
        return source.pool, "all"
    return (source.pool, "train") if wanted == "train" else (source.test, "test")


def _normalization(mean: str | None, std: str | None, none: bool) -> Normalization | None:
    from gm_probe.core.batches import Normalization

    if none:
        if mean or std:
            raise UsageError("--no-normalize and --mean/--std exclude each other; give one")
        return Normalization()
    if mean is None and std is None:
        return None
    if mean is None or std is None:
        raise UsageError("--mean and --std go together; give both")
    return Normalization(_floats("--mean", mean), _floats("--std", std))


def _floats(option: str, text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError as error:
        raise UsageError(f"{option} {text!r} must be comma-separated numbers, one a channel") from error


def _chosen(measures: str, protocol: str, labeled: bool) -> list[str]:
    from gm_probe.probe.measures import DEFAULT_MEASURES, MEASURES, check_names

    names = [name.strip() for name in measures.split(",") if name.strip()]
    check_names(names, labeled=labeled)
    names = names or [n for n in DEFAULT_MEASURES if labeled or not MEASURES[n].needs_labels]
    if protocol == "both" and "local_inconsistency" in names:
        extra = "local_inconsistency_converged"
        # last of all: it then starts from the Fisher eigenvector that λ_max(F) has paid for
        names = [*(name for name in names if name != extra), extra]
    return names
