"""``gmprobe measure``: one checkpoint or many, over unlabeled or labeled data."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from gm_probe.cli.data import DataOptions, opened_aloud
from gm_probe.cli.executors import check_executor, executor_options, ray_executor
from gm_probe.cli.measure_many import measure_all, opened_once
from gm_probe.cli.output import (
    FIGURE_SUFFIXES,
    format_options,
    note,
    notes_console,
)
from gm_probe.cli.param_types import PATH, Choice, num_bytes
from gm_probe.cli.relevance import CONVERGED, idle, quadrature, require_use_of_grids
from gm_probe.cli.settings import GroupedCommand, config_option, setting_options, taken
from gm_probe.data.sources import require_source
from gm_probe.errors import CheckpointError, UsageError
from gm_probe.measures.catalogue import BLOCKS, check_names, default_measures, expanded
from gm_probe.measures.settings import Settings

if TYPE_CHECKING:
    from gm_probe.executors.local import Executor


@click.command(
    cls=GroupedCommand,
    first=(
        *("unlabeled", "labeled", "model_names", "mean", "std", "no_normalize", "max_examples", "measures"),
        *("protocol", "rho", "device", "save", "output"),
    ),
    epilog="Example:  gmprobe measure ckpt.pt --unlabeled data/",
)
@click.argument("checkpoints", nargs=-1, type=PATH)
@click.option(
    "--unlabeled",
    metavar="DATA",
    help="Use this data without labels: an image folder (its labels are not read), "
    "an array file, or a data set name.",
)
@click.option(
    "--labeled", metavar="DATA", help="Use this data with labels: the class folders, or 'y' of an array file."
)
@click.option(
    "--measures",
    metavar="A,B",
    default="",
    help="Measures to compute, or groups of them: curvature, outputs, norms, all; see `gmprobe measures`.  "
    "[default: S_ρ, λ_max and tr of F and H; with labels also error and CE]",
)
@click.option(
    "--validation",
    metavar="DATA",
    help="Use this labeled data of the training distribution for the measures atc, doc and cot.",
)
@click.option(
    "--protocol",
    type=Choice(["paper", "converged", "both"]),
    default="paper",
    show_default=True,
    help="Report S_ρ as the mean over random starts of K steps, as the converged maximum, or both.",
)
@setting_options(Settings)
@click.option(
    "--per-layer",
    is_flag=True,
    help="Also measure λ_max and trace of F and H for each layer, with the others held constant.",
)
@click.option(
    "--layer-figure",
    metavar="FILE",
    type=PATH,
    help="Also draw these as bars to this .png, .pdf or .svg; implies --per-layer.",
)
@click.option(
    "--density",
    metavar="FILE",
    type=PATH,
    help="Also plot the spectral densities of F and H to this .png, .pdf or .svg; costs about 800 gradients.",
)
@click.option(
    "--head",
    type=Choice(["classifier", "binary", "multilabel", "simclr"]),
    default="classifier",
    show_default=True,
    help="State what the outputs mean: exclusive classes, one yes-or-no logit, several independent "
    "logits, or SimCLR's NT-Xent logits over seeded views in batches of --batch-size images (250).",
)
@click.option("--temperature", type=float, help="Temperature τ of NT-Xent.  [default: as trained]")
@click.option(
    "--memory",
    metavar="SIZE",
    help="Memory budget of a pass; it sets the batch size unless --batch-size is given.  [default: 4GB, or half of a "
    "GPU's free memory]",
)
@setting_options(DataOptions)
@config_option
@executor_options("local", "ray")
@click.option(
    "--save",
    is_flag=True,
    help="Also write measures.json into each run folder, for `gmprobe correlate`. Options that you omit "
    "keep the values of the run's earlier measurement.",
)
@format_options
def measure(
    checkpoints: tuple[Path, ...],
    unlabeled: str | None,
    labeled: str | None,
    measures: str,
    protocol: str,
    validation: str | None,
    per_layer: bool,
    layer_figure: Path | None,
    density: Path | None,
    head: str,
    temperature: float | None,
    memory: str | None,
    executor: str,
    jobs: int,
    address: str | None,
    gpus: float,
    save: bool,
    output: str | None,
    quiet: bool,
    **options: Any,
) -> None:
    """Measure how well CHECKPOINTS will generalize.

    A checkpoint is a run folder, a file that gmprobe wrote, or any .pt/.pth/.th/.ckpt/.safetensors with a
    state dict. For the last, --model names the network, and --mean/--std give its normalisation. Unlabeled
    data is enough for local inconsistency and the Fisher matrix. The Hessian then uses predicted labels,
    and its row says so. Labeled data gives the Hessian with true labels, the error and the cross-entropy. A
    run folder, or a file in one, needs no data option: its own unlabeled part is used.

    For a SimCLR encoder, --head simclr measures the NT-Xent logits of two seeded views of every image.
    NT-Xent compares all views of a batch, so results depend on the batch size. Images that do not fill a
    batch are left out, and F is a mean over batches.

    A folder of runs stands for its finished runs. --save keeps the results in each run folder, and does not
    repeat measurements that are there with the same settings. Without CHECKPOINTS the run in runs/ that
    finished last is measured.
    """
    check_executor(executor, jobs, address, gpus)
    _require_source(unlabeled, labeled, head, temperature)
    settings = Settings(
        **taken(Settings, options), protocol="converged" if protocol == "converged" else "paper"
    )
    names = _chosen(measures, protocol, labeled is not None, head == "simclr", validation is not None)
    require_use_of_grids(names, settings)
    bytes_of_memory = None if memory is None else num_bytes("--memory", memory)
    per_layer = per_layer or layer_figure is not None
    if save and (per_layer or validation is not None):
        raise UsageError("--save keeps no values per layer or by --validation; leave one of them out")
    data = DataOptions.of(options)
    source = unlabeled if labeled is None else labeled
    data.require_use(source)
    if validation is not None:
        require_source(validation, here=True)
        if head == "simclr":
            raise UsageError("NT-Xent reads no labels; leave out --validation")
    given, checkpoints = _checkpoints(checkpoints, source, save, quiet)
    own_loading = data.of_each(checkpoints)
    alone = executor == "local" and jobs == 1
    single = alone and len(checkpoints) == 1
    _require_figures({"--density": density, "--layer-figure": layer_figure}, single)
    # with --save a run's own record fills in what is not given; of torchrun's processes one speaks
    if not (quiet or save) and os.environ.get("RANK", "0") == "0":
        _note_idle([*names, *(BLOCKS if per_layer else ())], settings, density)
    # below, torch is imported, which takes seconds: what can be wrong with the options has been told
    from gm_probe.executors.local import Processes, visible_gpus
    from gm_probe.measuring.checkpoint import How
    from gm_probe.measuring.many import Request
    from gm_probe.runs.records import run_of
    from gm_probe.runtime import processes
    from gm_probe.runtime.devices import named_device, pick_device
    from gm_probe.training.run_splits import own_unlabeled

    together = (
        processes.launched() > 1
    )  # torchrun's processes share the examples of one checkpoint after another
    if together and not alone:
        raise UsageError(
            "under torchrun, checkpoints are measured one by one; leave out --jobs and --executor"
        )
    named_device(data.device)
    # each looks for its device where it is measured: a GPU may be on Ray's workers alone
    loading = (data if alone else replace(data, device="cpu")).loading() | {
        "device": data.device,
        "memory": bytes_of_memory,
        "head": head,
        "temperature": temperature,
        "quadrature": None if density is None else quadrature(settings),
        "per_layer": per_layer,
    }
    if validation is not None:
        loading["validation"] = opened_aloud(data, validation, True, quiet)[0].in_memory()
    with processes.joined(pick_device(data.device)) if together else nullcontext():
        speaks = processes.rank() == 0
        scope = _measured_over(data, source, labeled is not None, quiet or not speaks)
        examples = (
            partial(own_unlabeled, leave=data.leave())
            if source is None
            else partial(opened_once, data, source, labeled is not None)
        )
        how = How(settings, scope, loading, own_loading)
        request = Request(tuple(names), examples, how, save, _given(click.get_current_context()))
        engine: Executor | None = None
        if jobs > 1:
            engine = Processes(jobs, visible_gpus() if data.device in {"auto", "cuda"} else ())
        elif executor == "ray":
            engine = ray_executor(run_of(given[0]), address, gpus, data.threads)
        outcomes = measure_all(checkpoints, request, engine, output, quiet=quiet, speaks=speaks)
        if density is not None and speaks:
            _draw_density(outcomes[0].result, checkpoints[0].name, density)
        if layer_figure is not None and speaks:
            _draw_layers(outcomes[0].result, checkpoints[0].name, layer_figure)


def _require_source(unlabeled: str | None, labeled: str | None, head: str, temperature: float | None) -> None:
    """Raise UsageError for options that exclude each other, and for a temperature that is none."""
    if unlabeled is not None and labeled is not None:
        raise UsageError("--unlabeled and --labeled exclude each other; give one")
    if head == "simclr" and labeled is not None:
        raise UsageError("NT-Xent reads no labels; give --unlabeled")
    if temperature is not None and not 0 < temperature < math.inf:
        raise UsageError(f"--temperature {temperature} must be a finite number above 0")


def _require_figures(files: Mapping[str, Path | None], single: bool) -> None:
    """Raise UsageError where a file is of no format for figures, or is asked for of several checkpoints."""
    for option, file in files.items():
        if file is not None and file.suffix.lower() not in FIGURE_SUFFIXES:
            raise UsageError(f"{option} {file}: no format {file.suffix!r}; use {', '.join(FIGURE_SUFFIXES)}")
        if file is not None and not single:
            raise UsageError(f"{option} plots a single checkpoint; give one")


def _note_idle(names: list[str], settings: Settings, density: Path | None) -> None:
    """Name the options that were given and change nothing of what is measured."""
    context = click.get_current_context()
    given = _given(context)
    options = {p.name: p.opts[0] for p in context.command.params if p.name in given}
    for option in idle(names, settings, options, density=density is not None):
        note(notes_console(), f"note: {option} has no effect on what is measured")


def _given(context: click.Context) -> frozenset[str]:
    """The names of settings that the command line gives, and of the grids around them."""
    default = click.core.ParameterSource.DEFAULT
    names = {name for name in context.params if context.get_parameter_source(name) is not default}
    grids = {each.metadata["grid"] for each in fields(Settings) if each.name in names}
    return frozenset(names | grids - {""})


def _last_run() -> Path:
    """The run below runs/ that finished last."""
    from gm_probe.measuring.trained import last_finished
    from gm_probe.runs.records import RUNS

    if not RUNS.is_dir():
        raise UsageError(f"no checkpoint given, and there is no {RUNS}/ here; name a file or a run folder")
    return last_finished(RUNS)


def _checkpoints(
    given: tuple[Path, ...], source: str | None, save: bool, quiet: bool
) -> tuple[tuple[Path, ...], tuple[Path, ...]]:
    """The checkpoints that are ``given``, or else the last run, and these with folders of runs replaced by their runs.

    Raises:
        CheckpointError: one does not exist.
        UsageError: one has no data of its own, and there is no other ``source``; or one that is to be saved into is no
            folder.
    """
    from gm_probe.measuring.trained import checkpoints_in
    from gm_probe.runs.records import CONFIG

    if not given:
        given = (_last_run(),)
        if not quiet:
            note(notes_console(), f"no checkpoint given: measuring {given[0]}, the last run that finished")
    found = tuple(checkpoints_in(given))
    if save and not all(path.is_dir() for path in found):
        raise UsageError("--save writes into run folders; give folders, or use --json > file")
    if not any(path.exists() for path in found):  # of several, one that is missing does not stop the others
        raise CheckpointError(f"{found[0]}: no such checkpoint")
    for path in found:
        if source is None and path.exists() and not (path.is_dir() or (path.parent / CONFIG).exists()):
            raise UsageError(f"{path} is not a gmprobe run. Add --unlabeled DATA or --labeled DATA")
    return given, found


def _measured_over(data: DataOptions, source: str | None, labeled: bool, quiet: bool) -> dict[str, Any]:
    """What measures.json says of the examples of ``source``; None where each run's own are meant."""
    from gm_probe.training.run_splits import OWN_UNLABELED

    if source is None:
        return {"part": OWN_UNLABELED, "max_examples": data.max_examples}
    examples, part = opened_aloud(data, source, labeled, quiet)
    chosen = {"part": part, "max_examples": data.max_examples}
    return {**chosen, "data": examples.source, "labeled": labeled, **data.reading()}


def _draw_density(result: dict[str, Any], checkpoint: str, file: Path) -> None:
    from gm_probe.analysis.density_plot import density_panels
    from gm_probe.analysis.plots import write_figure

    known = {name: one for name, one in result["density"].items() if "reason" not in one}
    if known:
        write_figure(
            density_panels(known, checkpoint=checkpoint, num_examples=result["num_examples"]), [file]
        )


def _draw_layers(result: dict[str, Any], checkpoint: str, file: Path) -> None:
    from gm_probe.analysis.layer_plot import layer_bars
    from gm_probe.analysis.plots import write_figure

    figure = layer_bars(result["layers"], checkpoint=checkpoint, num_examples=result["num_examples"])
    write_figure(figure, [file])


def _chosen(
    measures: str, protocol: str, labeled: bool, batch_dependent: bool, validation: bool
) -> list[str]:
    given = [name.strip() for name in measures.split(",") if name.strip()]
    some = labeled or batch_dependent
    names = expanded(given, labeled=some, batch_dependent=batch_dependent, validation=validation)
    check_names(names, labeled=some, batch_dependent=batch_dependent)
    names = names or default_measures(labeled=labeled, batch_dependent=batch_dependent)
    if protocol == "both" and "local_inconsistency" in names:
        # last of all: it then starts from the Fisher eigenvector that λ_max(F) has paid for
        names = [*(name for name in names if name != CONVERGED), CONVERGED]
    return names
