"""Measure one checkpoint over examples: from its file to its JSON object."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from gm_probe.curvature.batch_size import batches_within
from gm_probe.data.batches import BATCH_SIZE, Batches
from gm_probe.data.examples import Examples
from gm_probe.data.memory import within_memory
from gm_probe.linalg.work import Tally
from gm_probe.measures.costs import takes_derivatives
from gm_probe.measures.layers import by_layer
from gm_probe.measures.measure import Report, measure
from gm_probe.measures.names import DEFAULT_MEASURES, check_names
from gm_probe.measures.settings import Settings
from gm_probe.measuring.densities import densities
from gm_probe.measuring.opening import LoadedCheckpoint, open_checkpoint
from gm_probe.models.checkpoints import read_checkpoint
from gm_probe.models.contrastive import Contrastive
from gm_probe.models.loading import check_classes
from gm_probe.models.pretrained import load_pretrained
from gm_probe.models.zoo import initial_model
from gm_probe.runs.records import CONFIG, read_run, run_of
from gm_probe.runtime.machine import environment
from gm_probe.runtime.processes import count, failing_together, rank


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

    Under ``torchrun`` each process measures its share of the examples, and all return the same.

    Args:
        quadrature: number of random vectors and of steps of the spectral densities; None = no densities.
        per_layer: also measure each layer alone.
        validation, memory: as ``measure`` takes them.
        batch_size: None = what ``memory`` bytes hold.
        loading: as ``open_checkpoint`` takes them.

    Raises:
        CheckpointError, DataError, UsageError, DivergedError: as the parts raise them.
    """
    simclr, labeled = loading.get("head") == "simclr", examples.y is not None
    check_names(names or (), labeled=simclr or labeled, batch_dependent=simclr, num_processes=count())
    with failing_together():
        size = batch_size or BATCH_SIZE
        loaded = open_checkpoint(path, examples, batch_size=size, seed=settings.seed, **loading)
        if validation is not None:
            check_classes(validation, loaded.classes, loaded.num_classes, path)
    model, batches, outputs = loaded.model, loaded.batches, loaded.outputs
    derivatives = quadrature is not None or per_layer or takes_derivatives(names or DEFAULT_MEASURES)
    if batch_size is None and derivatives and not simclr:
        batches = batches_within(memory, model, batches, outputs)
    part, tally = batches.shard(rank(), count()), Tally(notify)
    report = measure(
        model,
        part,
        names,
        settings,
        initial=_initial(path, loaded) if "distance_from_initialization" in (names or ()) else None,
        validation=None if validation is None else batches.over(validation),
        memory=memory,
        notify=tally.next(),
        outputs=outputs,
    )
    result = _described(path, examples, validation, loaded, batches, report)
    part = part.of_size(report.batch_size)
    if per_layer:
        result["layers"] = by_layer(model, part, settings, outputs, tally.next())
    if quadrature is not None:
        compute = partial(densities, loaded, settings, quadrature, tally.next())
        result["density"], _ = within_memory(part, compute)
    return result


def _described(
    path: Path,
    examples: Examples,
    validation: Examples | None,
    loaded: LoadedCheckpoint,
    batches: Batches,
    report: Report,
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
    if validation is not None:
        result["settings"] |= {"validation": validation.source, "validation_sha256": validation.digest}
    result |= {
        "num_classes": loaded.num_classes,
        "batch_size": report.batch_size,
        "out_of_memory_at": batches.batch_size if report.batch_size < batches.batch_size else None,
        "channels_last": batches.channels_last,
        "skipped": list(examples.skipped),
    }
    return result | ({"notes": list(loaded.notes)} if loaded.notes else {})


def _batch_settings(loaded: LoadedCheckpoint) -> dict[str, Any]:
    """Return what NT-Xent results depend on apart from the model; nothing for a classifier."""
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


def _initial(path: Path, loaded: LoadedCheckpoint) -> nn.Module | None:
    """Return the model that a run's training started from; None for other checkpoints.

    A record that names another network than the loaded one is not followed, because it could name anybody's code.
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
