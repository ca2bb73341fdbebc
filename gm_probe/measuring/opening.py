"""From a checkpoint file and examples to a model that is ready to be measured over them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from gm_probe.curvature.derivatives import TRIAL
from gm_probe.data.batches import BATCH_SIZE, Batches
from gm_probe.data.examples import Examples
from gm_probe.data.fields import arguments
from gm_probe.data.images import ImageFiles
from gm_probe.data.normalization import Normalization
from gm_probe.errors import DataError, UsageError, foreign_or
from gm_probe.models.checkpoints import Checkpoint, is_simclr, read_checkpoint
from gm_probe.models.door import Head, Outputs
from gm_probe.models.layout import settle_layout
from gm_probe.models.loading import check_classes, check_fit, choose_normalization, fitted_model
from gm_probe.models.parameters import evaluating
from gm_probe.models.zoo import ModelSpec, is_user_code
from gm_probe.runtime.devices import require_float64
from gm_probe.training.contrastive_batches import contrastive_batches


@dataclass(frozen=True, slots=True)
class LoadedCheckpoint:
    """A checkpoint's model over examples, ready to be measured.

    Attributes:
        classes: the class names that the checkpoint records.
        recorded: the network that the checkpoint records.
        outputs: how the model's outputs are read.
        key: where the weights stand in a foreign file.
        notes: what was chosen without being asked for.
    """

    model: nn.Module
    name: str
    batches: Batches
    num_classes: int
    classes: tuple[str, ...]
    recorded: ModelSpec | None
    outputs: Outputs
    key: str
    notes: tuple[str, ...]


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
    """Load the checkpoint ``path``, and cut ``examples`` into batches for it.

    Args:
        key, strip: as ``read_checkpoint`` takes them.
        model_name, normalization, num_classes: required for foreign checkpoints; they override the recorded ones.
        head: what the outputs stand for (models.door). With ``simclr`` they are NT-Xent logits over batches of two
            views of ``batch_size`` images each, drawn by ``seed``. A ``temperature`` of None is the recorded one.
        outputs: which output of the model to take, and what kind it is.

    Raises:
        CheckpointError, DataError, UsageError: as the parts raise them.
    """
    checkpoint = read_checkpoint(path, key, strip)
    simclr = _check_head(checkpoint, head, temperature)
    check_fit(checkpoint, examples)
    asked: dict[str, Any] = {"num_classes": num_classes, "temperature": temperature, "dtype": dtype}
    model, fit = fitted_model(checkpoint, model_name, input_shape=tuple(examples.x.shape[1:]), **asked)
    chosen = choose_normalization(checkpoint, examples, normalization)
    device = torch.device(device)
    require_float64(device)
    model.to(device, dtype)
    name = model_name or (checkpoint.model.name if checkpoint.model else "")
    placed: dict[str, Any] = {"device": device, "dtype": dtype}
    if simclr:
        batches = contrastive_batches(examples, chosen, images=batch_size, seed=seed, **placed)
        outputs, classes = Outputs(kind="logits"), 2 * batch_size - 1
        batches.channels_last = settle_layout(model, next(iter(batches)).x)
    else:
        batches = Batches(examples, chosen, batch_size=batch_size, **placed)
        if batches.channels_last:
            batches.channels_last = settle_layout(model, next(iter(batches.of_size(2))).x)
        outputs = replace(outputs or Outputs(), head=cast(Head, head))
        if not is_user_code(name):  # libraries' networks return logits, whatever their values look like
            outputs = replace(outputs, kind=outputs.kind or "logits")
        outputs, classes = _examined(model, batches, outputs, model_name or path)
        if num_classes is not None and num_classes != classes:
            raise UsageError(f"{model_name or path} has {classes} outputs, not --num-classes {num_classes}")
        if examples.y is not None:
            check_classes(examples, (), classes, path)
    notes = (*fit.notes(path), *_reading_notes(checkpoint, examples, normalization))
    found_at = "" if checkpoint.model else fit.key
    recorded = checkpoint.classes, checkpoint.model
    return LoadedCheckpoint(model, name, batches, classes, *recorded, outputs, found_at, notes)


def _check_head(checkpoint: Checkpoint, head: str, temperature: float | None) -> bool:
    """Return whether NT-Xent logits are to be measured.

    Raises:
        UsageError: the checkpoint does not have what ``head`` asks for.
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


def _examined(model: nn.Module, batches: Batches, outputs: Outputs, name: object) -> tuple[Outputs, int]:
    """Look at the outputs for some examples, so that what does not fit fails here, with the data's name.

    Returns:
        How the outputs are read, and the number of classes. A yes-or-no model has 2; several labels count as classes.

    Raises:
        UsageError: the outputs cannot be read as ``outputs`` says.
        DataError: the model does not accept the examples.
    """
    few = next(iter(batches.of_size(TRIAL))).x
    remedies = ["--image-size and --channels"] if few.dim() == 4 else ["the data's shape"]
    remedies += ["--dtype float32"] if few.dtype == torch.float64 else []

    def refused(cause: str) -> DataError:  # torchvision's ViT, for one, raises an AssertionError
        return DataError(
            f"{name} does not accept examples of shape {tuple(few.shape[1:])} from "
            f"{batches.examples.source}: {cause}; see {' and '.join(remedies)}"
        )

    with foreign_or(refused), evaluating(model), torch.no_grad():
        args, kwargs = arguments(model, few)
        taken = outputs.taken(model(*args, **kwargs), len(few))
        outputs = outputs.checked(taken)
        return outputs, 2 if outputs.head == "binary" else taken.shape[1]


def _reading_notes(
    checkpoint: Checkpoint, examples: Examples, normalization: Normalization | None
) -> Iterator[str]:
    """Say where images are decoded in every pass, and where a checkpoint does not record how it reads pixels."""
    if isinstance(examples.x, ImageFiles) and examples.x.not_kept:
        yield examples.x.not_kept
    recorded = checkpoint.normalization if checkpoint.model is not None and normalization is None else None
    if recorded is not None and not recorded.mean and examples.x.dtype == torch.uint8:
        yield (
            f"{checkpoint.path} records no normalisation, so pixels are read as numbers in [0, 1]. "
            "Give --mean and --std if it was trained on other values"
        )


def output_settings(loading: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the record of a measurement will say of the outputs: ``head``, ``output`` and ``outputs_are``."""
    outputs, head = loading.get("outputs") or Outputs(), loading.get("head", "classifier")
    return replace(outputs, head=cast(Head, head)).settings() if head != "simclr" else {}
