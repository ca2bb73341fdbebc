"""Measure a checkpoint file over examples: what `gmprobe measure` and every run of a sweep do."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from gm_probe.core.batches import Batches, Normalization
from gm_probe.core.checkpoints import read_checkpoint
from gm_probe.core.datasets import Examples
from gm_probe.core.devices import environment
from gm_probe.core.errors import DataError, UsageError, first_line
from gm_probe.core.files import write_json
from gm_probe.core.loading import check_fit, choose_normalization, load_model
from gm_probe.core.models import logits_of
from gm_probe.core.parameters import evaluating
from gm_probe.core.records import read_run
from gm_probe.probe.measures import measure
from gm_probe.probe.probe import Settings


def measure_checkpoint(
    path: Path,
    examples: Examples,
    names: Sequence[str] | None,
    settings: Settings,
    *,
    model_name: str | None = None,
    normalization: Normalization | None = None,
    num_classes: int | None = None,
    batch_size: int = 250,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    notify: Callable[[str, float], None] | None = None,
) -> dict[str, Any]:
    """Measure the checkpoint ``path`` and return its JSON object (see ``Report.as_dict``).

    Args:
        model_name, normalization, num_classes: needed for foreign checkpoints; override the recorded ones.

    Raises:
        CheckpointError, DataError, UsageError, DivergedError: as the parts raise them.
    """
    checkpoint = read_checkpoint(path)
    check_fit(checkpoint, examples)
    chosen = choose_normalization(checkpoint, examples, normalization)
    shape = tuple(examples.x.shape[1:])
    model = load_model(checkpoint, model_name, input_shape=shape, num_classes=num_classes)
    device = torch.device(device)
    if device.type == "mps":
        raise UsageError("MPS has no float64, which the estimators need; measure with --device cpu")
    model.to(device, dtype)
    batches = Batches(examples, chosen, batch_size=batch_size, device=device, dtype=dtype)
    classes = _num_outputs(model, batches, model_name or path)
    # an array file names no classes: its labels need only lie below the number of outputs
    if examples.y is not None and examples.classes and len(examples.classes) != classes:
        raise DataError(
            f"{examples.source} has {len(examples.classes)} classes but {path} has {classes} outputs; "
            "each class needs its folder, or measure it --unlabeled"
        )
    report = measure(model, batches, names, settings, notify=notify)
    name = model_name or (checkpoint.model.name if checkpoint.model else "")
    result = report.as_dict(
        checkpoint=str(path),
        model=name,
        data=examples.source,
        num_examples=len(examples),
        mean=list(chosen.mean),
        std=list(chosen.std),
        dtype=str(dtype).removeprefix("torch."),
        **environment(device),
    )
    return {**result, "num_classes": classes}


def _num_outputs(model: torch.nn.Module, batches: Batches, name: object) -> int:
    """Logits a row, by one example: what does not fit fails here, with the data's name."""
    first = next(iter(batches)).x[:1]
    try:
        with evaluating(model), torch.no_grad():
            return logits_of(model(first)).shape[1]
    except (RuntimeError, ValueError, TypeError) as error:
        if "out of memory" in str(error).lower():
            raise
        raise DataError(
            f"{name} does not take examples of shape {tuple(first.shape[1:])} from {batches.examples.source}: "
            f"{first_line(error)}; see --image-size and --channels"
        ) from error


def merge_measures(path: Path, result: dict[str, Any]) -> None:
    """Write ``result`` to a measures.json, keeping other measures that were taken with the same settings.

    Rows of other settings are replaced as a whole: one file never mixes two.
    """
    before = read_run(path.parent)
    if before.settings == result["settings"]:
        result = {**result, "measures": {**before.measures, **result["measures"]}}
    write_json(path, result)
