"""The passes of a model: over the unlabeled set, the validation set and its shifts, and the few labels."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from gm_probe.accuracy.predictions import Predictions, predict, require_predictable
from gm_probe.accuracy.shifts import shifted, synthetic_shifts, why_not_shifted
from gm_probe.data.batches import Batches
from gm_probe.data.examples import Examples
from gm_probe.data.labels import fitting_labels
from gm_probe.errors import DataError, UsageError
from gm_probe.models.door import Outputs

SHIFTED = 2000
"""Each shift is applied to at most so many validation examples."""


@dataclass(frozen=True, slots=True)
class Labeled:
    """A model's predictions for a labeled set, and the labels (N,)."""

    predictions: Predictions
    labels: Tensor

    @property
    def right(self) -> Tensor:
        """Return whether each prediction is right (N,)."""
        return self.predictions.classes == self.labels

    @property
    def accuracy(self) -> float:
        """Return the share of right predictions."""
        return float(self.right.double().mean())


@dataclass(frozen=True, slots=True)
class Evidence:
    """The predictions of one model for every set.

    Attributes:
        shifted: each synthetic shift's family and the predictions for the validation set under it.
        seconds: that the passes took.
    """

    name: str
    unlabeled: Predictions
    validation: Labeled | None = None
    few_labels: Labeled | None = None
    shifted: tuple[tuple[str, Labeled], ...] = ()
    seconds: float = 0.0

    @property
    def size(self) -> int:
        """The number of examples at which scores are compared: that of the smallest set, of few labels apart."""
        labeled = [*([self.validation] if self.validation else []), *(found for _, found in self.shifted)]
        return min(len(one.logits) for one in (self.unlabeled, *(one.predictions for one in labeled)))

    @property
    def num_classes(self) -> int:
        """Return K."""
        return self.unlabeled.logits.shape[1]


def gather(
    name: str,
    model: nn.Module,
    unlabeled: Batches,
    validation: Batches | None = None,
    few_labels: Batches | None = None,
    *,
    outputs: Outputs | None = None,
    mirror: bool = False,
    seed: int = 0,
    notify: Callable[[int], None] | None = None,
) -> Evidence:
    """Run ``model`` over all sets once, and over the validation set once more for each synthetic shift.

    Args:
        mirror: also run it over the mirror images of each set, for the effective invariance.
        notify: called with the number of examples of each batch that is done.

    Raises:
        UsageError, CheckpointError, DataError, DivergedError: as ``require_predictable`` and ``predict`` raise them.
        UsageError: mirror images of what is no image.
        DataError: labels that are none of the model's classes.
    """
    if mirror and unlabeled.examples.x.dim() != 4:
        raise UsageError("effective_invariance mirrors images, and the examples are none; leave it out")
    began = time.perf_counter()
    read = require_predictable(model, unlabeled, outputs)
    size = None if validation is None else min(unlabeled.num_examples, validation.num_examples, SHIFTED)

    def run(batches: Batches) -> Predictions:
        summed = None
        if size is not None and size < batches.num_examples:
            order = torch.randperm(batches.num_examples, generator=torch.Generator().manual_seed(seed))
            summed = order < size
        return predict(model, batches, read, mirror=mirror, summed=summed, notify=notify)

    def labeled(batches: Batches) -> Labeled:
        found, examples = run(batches), batches.examples
        if examples.y is None:
            raise DataError(
                f"{examples.source} has no labels, and they are needed here. Give class folders or 'y'"
            )
        return Labeled(found, fitting_labels(examples.y, found.logits, examples.source).cpu())

    moved = []
    if validation is not None and why_not_shifted(validation.examples) is None:
        some = validation.examples.subset(SHIFTED, seed)
        for shift in synthetic_shifts(some.x.shape[1], min(some.x.shape[2:])):
            x = shifted(some.x, shift, seed, validation.device)
            moved.append((shift.family, labeled(validation.over(replace(some, x=x)))))
    return Evidence(
        name,
        run(unlabeled),
        None if validation is None else labeled(validation),
        None if few_labels is None else labeled(few_labels),
        tuple(moved),
        time.perf_counter() - began,
    )


def num_passes(unlabeled: Examples, validation: Examples | None, few_labels: Examples | None) -> int:
    """Return over how many examples ``gather`` runs each model, for a progress bar."""
    total = len(unlabeled) + (len(few_labels) if few_labels is not None else 0)
    if validation is None:
        return total
    shifts = 0
    if why_not_shifted(validation) is None:
        shifts = len(synthetic_shifts(validation.x.shape[1]))
    return total + len(validation) + shifts * min(SHIFTED, len(validation))
