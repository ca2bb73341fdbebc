"""What the sets must be, and what a person should know of them."""

from __future__ import annotations

from torch import Tensor

from gm_probe.accuracy.shifts import why_not_shifted
from gm_probe.data.examples import Examples, marks
from gm_probe.errors import DataError

FEW_UNLABELED, FEW_VALIDATION = 50, 200
"""Below these sizes intervals are wide, and a note says so."""
LEAST_VALIDATION = 20
"""Fewer validation examples cannot fit a temperature and a threshold."""


def examine(
    unlabeled: Examples | None, validation: Examples | None = None, few_labels: Examples | None = None
) -> list[str]:
    """Return notes on the sets.

    Raises:
        DataError: a set is empty, without labels where it needs some, too small, of one class, or of another shape.
    """
    assert unlabeled is not None
    notes = []
    for name, examples in (("validation", validation), ("few-labels", few_labels)):
        if examples is None:
            continue
        if examples.y is None or examples.y.dim() != 1:
            raise DataError(
                f"{examples.source} has no class labels, and the {name} set needs them. Give class folders "
                "or 'y'"
            )
        if tuple(examples.x.shape[1:]) != tuple(unlabeled.x.shape[1:]):
            raise DataError(
                f"{examples.source} has examples of shape {tuple(examples.x.shape[1:])} but {unlabeled.source} of "
                f"{tuple(unlabeled.x.shape[1:])}; give both the same size and channels"
            )
    if not len(unlabeled):
        raise DataError(f"{unlabeled.source} holds no examples")
    if len(unlabeled) < FEW_UNLABELED:
        notes.append(
            f"{unlabeled.source} has only {len(unlabeled)} examples; on so few, chance alone changes the "
            "accuracy"
        )
    if validation is not None:
        notes += _of_validation(validation, unlabeled)
    if few_labels is not None and not len(few_labels):
        raise DataError(f"{few_labels.source} holds no examples")
    if few_labels is not None and validation is not None and (twice := _shared(few_labels, validation)):
        notes.append(
            f"{twice} of {len(few_labels)} few-labels examples are also in {validation.source}, but they must be a "
            "random sample of the unlabeled data"
        )
    return notes


def _of_validation(validation: Examples, unlabeled: Examples) -> list[str]:
    assert validation.y is not None
    source, size = validation.source, len(validation)
    if size < LEAST_VALIDATION:
        raise DataError(
            f"{source} has {size} validation examples. Give at least {LEAST_VALIDATION}; {FEW_VALIDATION} "
            "or more give usable intervals"
        )
    if len(validation.y.unique()) < 2:
        raise DataError(
            f"{source} has examples of one class only. A validation set needs examples of every class"
        )
    notes = []
    if size < FEW_VALIDATION:
        notes.append(
            f"{source} has only {size} validation examples; give {FEW_VALIDATION} or more for narrower intervals"
        )
    twice = _shared(unlabeled, validation)
    if twice:
        notes.append(
            f"{twice} of {len(unlabeled)} unlabeled examples are also in {source}. Remove them from one of "
            "the two sets"
        )
    reason = why_not_shifted(validation)
    if reason is not None:
        notes.append(
            f"{source} cannot be shifted synthetically ({reason}). The interval holds only if the "
            "unlabeled data has the distribution of the validation set"
        )
    return notes


def _shared(examples: Examples, validation: Examples) -> int:
    """Return how many examples are in the validation set, too."""
    if not (type(examples.x) is type(validation.x) is Tensor):
        return 0  # images beyond memory are decoded only once, during the model's pass
    known = set(marks(validation.x))
    return sum(mark in known for mark in marks(examples.x))
