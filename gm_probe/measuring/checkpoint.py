"""Measure a checkpoint file over examples: what `gmprobe measure` and every run of a sweep do."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import torch

from gm_probe.curvature.speed import TRIAL, within
from gm_probe.data.batches import BATCH_SIZE, Batches, Normalization
from gm_probe.data.datasets import Examples
from gm_probe.data.fields import arguments
from gm_probe.data.images import ImageFiles
from gm_probe.data.memory import within_memory
from gm_probe.errors import DataError, UsageError, foreign_or, one_device
from gm_probe.files.locks import FolderLock
from gm_probe.linalg.density import density
from gm_probe.linalg.work import Work
from gm_probe.measures.catalogue import (
    DEFAULT_MEASURES,
    Outlook,
    check_names,
    expected_costs,
    takes_derivatives,
)
from gm_probe.measures.context import MeasurementContext
from gm_probe.measures.layers import by_layer
from gm_probe.measures.measure import UNDEFINING, Report, measure
from gm_probe.measures.settings import Settings
from gm_probe.models.checkpoints import Checkpoint, is_simclr, read_checkpoint
from gm_probe.models.contrastive import Contrastive
from gm_probe.models.door import Head, Outputs
from gm_probe.models.layout import settle_layout
from gm_probe.models.loading import check_classes, check_fit, choose_normalization, fitted_model
from gm_probe.models.parameters import as_measured, evaluating
from gm_probe.models.pretrained import load_pretrained
from gm_probe.models.zoo import ModelSpec, initial_model, is_user_code
from gm_probe.runs.records import CONFIG, read_run, run_of
from gm_probe.runtime.devices import environment, require_float64
from gm_probe.runtime.processes import count, failing_together, rank
from gm_probe.runtime.randomness import generators_kept
from gm_probe.training.contrastive_batches import contrastive_batches


@dataclass(frozen=True, slots=True)
class LoadedCheckpoint:
    """A checkpoint's model over examples, ready to be measured."""

    model: torch.nn.Module
    name: str
    batches: Batches
    num_classes: int
    classes: tuple[str, ...]  # as the checkpoint records them
    recorded: ModelSpec | None  # likewise
    outputs: Outputs  # how what the model returns is read
    key: str = ""  # where the weights stand in a foreign file
    notes: tuple[str, ...] = ()  # what was chosen of a file without being asked for


def open_checkpoint(
    path: Path,
    examples: Examples,
    *,
    model_name: str | None = None,
    key: str | None = None,
    strip: str | None = None,
    normalization: Normalization | None = None,
    num_classes: int | None = None,
    batch_size: int = BATCH_SIZE,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    head: str = "classifier",
    outputs: Outputs | None = None,
    temperature: float | None = None,
    seed: int = 0,
) -> LoadedCheckpoint:
    """Load the checkpoint ``path`` and lay ``examples`` out for it.

    Args:
        key, strip: as ``read_checkpoint`` takes them.
        model_name, normalization, num_classes: needed for foreign checkpoints; override the recorded ones.
        head: what the outputs stand for (models.door); or ``simclr``: they are NT-Xent logits, over batches of two
            views, drawn by ``seed``, of ``batch_size`` images each. ``temperature`` None is the recorded one.
        outputs: which output of the model to take, and what kind it is.

    Raises:
        CheckpointError, DataError, UsageError: as the parts raise them.
    """
    checkpoint = read_checkpoint(path, key, strip)
    simclr = _check_head(checkpoint, head, temperature)
    check_fit(checkpoint, examples)
    shape = tuple(examples.x.shape[1:])
    model, fit = fitted_model(
        checkpoint,
        model_name,
        input_shape=shape,
        num_classes=num_classes,
        temperature=temperature,
        dtype=dtype,
    )
    chosen = choose_normalization(checkpoint, examples, normalization)
    device = torch.device(device)
    require_float64(device)
    model.to(device, dtype)
    name = model_name or (checkpoint.model.name if checkpoint.model else "")
    notes = [*fit.notes(path), *_reading_notes(checkpoint, examples, normalization)]
    said = "" if checkpoint.model else fit.key, tuple(notes)
    if simclr:
        views = contrastive_batches(
            examples, chosen, images=batch_size, seed=seed, device=device, dtype=dtype
        )
        views.channels_last = settle_layout(model, next(iter(views)).x)
        return LoadedCheckpoint(
            model,
            name,
            views,
            2 * batch_size - 1,
            checkpoint.classes,
            checkpoint.model,
            Outputs(kind="logits"),
            *said,
        )
    batches = Batches(examples, chosen, batch_size=batch_size, device=device, dtype=dtype)
    if batches.channels_last:
        batches.channels_last = settle_layout(model, next(iter(batches.of_size(2))).x)
    outputs = replace(outputs or Outputs(), head=cast(Head, head))
    if not is_user_code(name):  # libraries' networks return logits, however they look
        outputs = replace(outputs, kind=outputs.kind or "logits")
    outputs, classes = _examined(model, batches, outputs, model_name or path)
    if num_classes is not None and num_classes != classes:
        raise UsageError(f"{model_name or path} has {classes} outputs, not --num-classes {num_classes}")
    if examples.y is not None:
        check_classes(examples, (), classes, path)
    return LoadedCheckpoint(
        model, name, batches, classes, checkpoint.classes, checkpoint.model, outputs, *said
    )


def _reading_notes(
    checkpoint: Checkpoint, examples: Examples, normalization: Normalization | None
) -> Iterator[str]:
    """Say where images are decoded at every pass, and where a checkpoint does not record how pixels became floats."""
    if isinstance(examples.x, ImageFiles) and examples.x.not_kept:
        yield examples.x.not_kept
    recorded = checkpoint.normalization if checkpoint.model is not None and normalization is None else None
    if recorded is not None and not recorded.mean and examples.x.dtype == torch.uint8:
        yield (
            f"{checkpoint.path} records no normalisation, so pixels are read as numbers in [0, 1]. "
            "Give --mean and --std if it was trained on other values"
        )


def _check_head(checkpoint: Checkpoint, head: str, temperature: float | None) -> bool:
    """Whether NT-Xent logits are to be measured.

    Raises:
        UsageError: the checkpoint has not what ``head`` asks for.
    """
    simclr, path = is_simclr(checkpoint), checkpoint.path
    if head != "simclr":
        if simclr:
            raise UsageError(
                f"{path} holds a SimCLR encoder, which has no classes. Measure its NT-Xent logits with "
                "`gmprobe measure --head simclr`"
            )
        if temperature is not None:
            raise UsageError("--temperature goes with --head simclr")
        return False
    if checkpoint.model is not None and not simclr:
        raise UsageError(f"{path} holds a classifier without SimCLR's projector. Leave out --head simclr")
    if not simclr and temperature is None:
        raise UsageError(f"{path} records no temperature; give --temperature")
    return True


def measure_checkpoint(
    path: Path,
    examples: Examples,
    names: Sequence[str] | None,
    settings: Settings,
    *,
    quadrature: tuple[int, int] | None = None,
    per_layer: bool = False,
    validation: Examples | None = None,
    batch_size: int | None = None,
    memory: float | None = None,
    notify: Callable[[str, float], None] | None = None,
    **loading: Any,
) -> dict[str, Any]:
    """Measure the checkpoint ``path`` and return its JSON object (see ``Report.as_dict``).

    Under ``torchrun`` each process takes its share of the examples; all return the same.

    Args:
        quadrature: random vectors and steps of the spectral densities; None = do without.
        per_layer: also measure each layer alone.
        validation: labeled examples of the training distribution, for atc, doc and cot.
        batch_size: None = what ``memory`` bytes hold.
        memory: bytes that a product may take; None = 4 GB, or half of a GPU's free memory.
        loading: as ``open_checkpoint`` takes them.

    Raises:
        CheckpointError, DataError, UsageError, DivergedError: as the parts raise them.
    """
    simclr = loading.get("head") == "simclr"
    check_names(
        names or (), labeled=simclr or examples.y is not None, batch_dependent=simclr, num_processes=count()
    )
    with failing_together():
        loaded = open_checkpoint(
            path, examples, batch_size=batch_size or BATCH_SIZE, seed=settings.seed, **loading
        )
        if validation is not None:
            check_classes(validation, loaded.classes, loaded.num_classes, path)
    batches = loaded.batches
    derivatives = quadrature is not None or per_layer or takes_derivatives(names or DEFAULT_MEASURES)
    if batch_size is None and derivatives and not simclr:
        batches = within(memory, loaded.model, batches, loaded.outputs)
    part = batches.shard(rank(), count())
    initial = _initial(path, loaded) if "distance_from_initialization" in (names or ()) else None
    spent = 0.0

    def tick(name: str, evaluations: float) -> None:
        nonlocal spent
        spent = evaluations
        if notify is not None:
            notify(name, evaluations)

    def later() -> Callable[[str, float], None]:
        before = spent
        return lambda name, evaluations: tick(name, before + evaluations)

    report = measure(
        loaded.model,
        part,
        names,
        settings,
        initial=initial,
        validation=None if validation is None else batches.over(validation),
        memory=memory,
        notify=tick,
        outputs=loaded.outputs,
    )
    result = _described(path, examples, loaded, batches, report)
    if validation is not None:
        result["settings"] |= {"validation": validation.source, "validation_sha256": validation.digest}
    part = part.of_size(report.batch_size)
    if per_layer:
        result["layers"] = by_layer(loaded.model, part, settings, loaded.outputs, later())
    if quadrature is not None:
        notify_density = later()
        result["density"], _ = within_memory(
            part, lambda part: _densities(loaded, part, settings, quadrature, notify_density)
        )
    return result


def _described(
    path: Path, examples: Examples, loaded: LoadedCheckpoint, batches: Batches, report: Report
) -> dict[str, Any]:
    """Return a report as the JSON object of its checkpoint."""
    result = report.as_dict(
        checkpoint=str(path),
        model=loaded.name,
        data=examples.source,
        num_examples=len(examples),
        mean=list(batches.normalization.mean),
        std=list(batches.normalization.std),
        passed_over=dict(examples.passed_over),
        dtype=str(batches.dtype).removeprefix("torch."),
        processes=count(),
        **({"key": loaded.key} if loaded.key else {}),
        **_batch_settings(loaded),
        **environment(batches.device, tf32=report.settings.tf32),
    )
    result |= {
        "num_classes": loaded.num_classes,
        "batch_size": report.batch_size,
        "out_of_memory_at": batches.batch_size if report.batch_size < batches.batch_size else None,
        "channels_last": batches.channels_last,
        "skipped": list(examples.skipped),
    }
    return result | ({"notes": list(loaded.notes)} if loaded.notes else {})


DENSITY_OF = "density of the {}"
"""The stage in which a density is taken, as ``notify`` is told of it."""


@dataclass(frozen=True, slots=True)
class How:
    """All that the figures of a run depend on beside its weights.

    Attributes:
        scope: over what, as a measures.json says it beside ``settings``: ``part``, ``max_examples`` and, of other data
            than the run's own, ``data`` and whether it is ``labeled``.
        loading: as ``measure_checkpoint`` takes it.
        own_loading: what belongs to one checkpoint alone, such as its network's name.
    """

    settings: Settings
    scope: Mapping[str, Any]
    loading: Mapping[str, Any]
    own_loading: Mapping[Path, Mapping[str, Any]] = field(default_factory=dict)

    @property
    def of_other_data(self) -> bool:
        """Whether the data is not the run's own."""
        return "data" in self.scope

    def chosen(self, examples: Examples) -> Examples:
        """What it takes of ``examples``."""
        return examples.subset(self.scope["max_examples"], self.settings.seed)


def measure_as(
    path: Path,
    examples: Examples,
    names: Sequence[str],
    how: How,
    notify: Callable[[str, float], None] | None = None,
) -> dict[str, Any]:
    """``measure_checkpoint`` over what ``how`` takes of ``examples``, which the result's settings then say."""
    chosen = how.chosen(examples)
    loading = {**how.loading, **how.own_loading.get(path, {})}
    result = measure_checkpoint(path, chosen, names, how.settings, notify=notify, **loading)
    result["settings"] |= how.scope
    if how.of_other_data:
        result["settings"][DIGEST] = chosen.digest
    return result


DIGEST = "data_sha256"
"""A setting of what was measured over other data than the run's own: a file may change under its name."""


def reporting(lock: FolderLock, names: Sequence[str], settings: Settings) -> Callable[[str, float], None]:
    """A ``notify`` of ``measure_checkpoint`` that reports progress in the held run folder."""
    outlook = Outlook(expected_costs(names, settings))

    def notify(name: str, evaluations: float) -> None:
        total = outlook.total(name, evaluations)
        lock.report_progress(
            "measuring", evaluations, evaluations if total is None else total, lambda: {"measure": name}
        )

    return notify


def density_costs(quadrature: tuple[int, int] | None) -> dict[str, float]:
    """Gradient evaluations of each density, roughly, by the name that ``notify`` is called with."""
    if not quadrature:
        return {}
    products = float(quadrature[0] * quadrature[1])
    return {DENSITY_OF.format("fisher"): 2 * products, DENSITY_OF.format("hessian"): 3 * products}


def _batch_settings(loaded: LoadedCheckpoint) -> dict[str, Any]:
    """What NT-Xent's figures depend on beside the model; nothing of a classifier."""
    if not isinstance(loaded.model, Contrastive):
        return {}
    images = loaded.batches.batch_size // 2
    return {
        "head": "simclr",
        "temperature": loaded.model.temperature,
        "batch_images": images,
        "num_images": loaded.batches.total // 2,
        "per_example": f"a view, among the {2 * images} of its batch; standard errors over batches",
    }


def _initial(path: Path, loaded: LoadedCheckpoint) -> torch.nn.Module | None:
    """What a run's training started from; None of other checkpoints.

    A record that names another network than the one that was loaded is not followed: it could name anybody's code.
    """
    recorded = loaded.recorded
    run = run_of(path)
    if recorded is None or recorded.name != loaded.name or not (run / CONFIG).exists():
        return None
    config = read_run(run).config
    seed, given = config.get("seed"), config.get("init")
    if not isinstance(seed, int):
        return None
    model = initial_model(recorded, seed)
    if given is not None:
        if not Path(given).exists():  # the weights that it started from are gone
            return None
        load_pretrained(model, read_checkpoint(Path(given)))
    return model.to(loaded.batches.device, loaded.batches.dtype)


def _densities(
    loaded: LoadedCheckpoint,
    part: Batches,
    settings: Settings,
    quadrature: tuple[int, int],
    notify: Callable[[str, float], None],
) -> dict[str, Any]:
    """The spectral densities of F and H as JSON objects by name; see ``density``. ``reason``: why there is none."""
    num_probes, num_steps = quadrature
    measured = as_measured(loaded.model, tf32=settings.tf32)
    with one_device(), generators_kept(part.device, loaded.model), measured:
        work = Work(part.num_examples)
        context = MeasurementContext(loaded.model, part, settings, work, outputs=loaded.outputs)
        found = {}
        for name, operator in (("fisher", context.fisher), ("hessian", context.hessian)):
            before = context.work.evaluations

            def tick(_: int, __: int, name: str = name) -> None:
                notify(DENSITY_OF.format(name), context.work.evaluations)

            try:
                found[name] = density(
                    operator,
                    generator=context.generator(f"{name} density"),
                    num_probes=num_probes,
                    num_steps=num_steps,
                    notify=tick,
                ).as_dict()
            except UNDEFINING as error:  # as ``measure`` has it: what there is stands
                if count() > 1:
                    raise
                found[name] = {"reason": str(error)}
            found[name]["num_evals"] = round(context.work.evaluations - before, 3)
        found["hessian"]["labels"] = context.label_kind
    return found


def _examined(
    model: torch.nn.Module, batches: Batches, outputs: Outputs, name: object
) -> tuple[Outputs, int]:
    """Look at the outputs of some examples: what does not fit fails here, with the data's name.

    Returns:
        How the outputs are read, and the number of classes: 2 of a yes-or-no model, and of several labels theirs.

    Raises:
        UsageError: outputs that cannot be read as ``outputs`` says.
        DataError: the model does not take the examples.
    """
    few = next(iter(batches.of_size(TRIAL))).x
    remedies = ["--image-size and --channels"] if few.dim() == 4 else ["the data's shape"]
    remedies += ["--dtype float32"] if few.dtype == torch.float64 else []

    def refused(cause: str) -> DataError:  # torchvision's ViT asserts
        return DataError(
            f"{name} does not accept examples of shape {tuple(few.shape[1:])} from "
            f"{batches.examples.source}: {cause}; see {' and '.join(remedies)}"
        )

    with foreign_or(refused), evaluating(model), torch.no_grad():
        args, kwargs = arguments(model, few)
        taken = outputs.taken(model(*args, **kwargs), len(few))
        outputs = outputs.checked(taken)
        return outputs, 2 if outputs.head == "binary" else taken.shape[1]


def output_settings(loading: Mapping[str, Any]) -> dict[str, Any]:
    """What the record of a measurement will say of the outputs: ``head``, ``output`` and ``outputs_are``."""
    outputs, head = loading.get("outputs") or Outputs(), loading.get("head", "classifier")
    return replace(outputs, head=cast(Head, head)).settings() if head != "simclr" else {}
