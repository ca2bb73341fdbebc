"""Labels as people keep them: class indices, or zeros and ones of yes-or-no labels, in whole numbers of any type."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from gm_probe.errors import DataError


def as_labels(y: Any, rows: int, name: str = "y") -> Tensor:
    """Return int64 labels (N,), or (N, L) of L yes-or-no labels an example.

    Args:
        y: a tensor, array or list of whole numbers. Losses of yes-or-no labels take floats, so these may be floats.
        rows: N.
        name: of ``y``, for messages.

    Raises:
        DataError: another shape, or numbers that are not whole.
    """
    y = y if isinstance(y, Tensor) else torch.as_tensor(_array(y, name))
    wanted = (
        f"give one class index per example, whole numbers of shape ({rows},), or zeros and ones for "
        "yes-or-no labels"
    )
    if y.dim() not in (1, 2) or len(y) != rows or y.is_complex():
        raise DataError(f"{name} is {y.dtype} of shape {tuple(y.shape)} for {rows} examples; {wanted}")
    whole = y.to(torch.int64)
    if y.is_floating_point() and not bool((whole == y).all()):
        raise DataError(f"{name} holds fractions, such as soft labels; {wanted}")
    return whole


def _array(y: Any, name: str) -> np.ndarray:
    try:
        array = np.array(y)
    except ValueError:  # rows of several lengths
        array = np.array(None)
    if array.dtype.kind not in "iufb":
        raise DataError(f"{name} is a {type(y).__name__} that holds no numbers of one shape; give a tensor")
    return array.astype(np.float64 if array.dtype.kind == "f" else np.int64)


def fitting_labels(y: Tensor, logits: Tensor, source: str) -> Tensor:
    """Return labels (n,) of logits (n, C), or (n, L) of logits (n, L, 2) of yes-or-no labels.

    Args:
        y: (n,), or (n, L) of yes-or-no labels.
        source: where they came from, for messages.

    Raises:
        DataError: another shape, or values that are no classes of the model.
    """
    if logits.dim() == 3:
        return _yes_or_no(y, logits.shape[1], source)
    classes = logits.shape[1]
    if y.dim() != 1:
        raise DataError(
            f"{source} has labels of shape {tuple(y.shape)} but the model has {classes} exclusive classes; "
            f"give class indices of shape ({len(y)},) (y.argmax(1) of one-hot rows), or pass --head "
            "multilabel (head= in Python)"
        )
    if int(y.min()) < 0:
        raise DataError(f"labels must be class indices ≥ 0, got {int(y.min())}. Leave out such examples")
    if int(y.max()) >= classes:
        raise DataError(
            f"{source} has labels up to {int(y.max())} but the model has {classes} classes (0 to "
            f"{classes - 1}); check the labels, or pass the data as --unlabeled"
        )
    return y


def _yes_or_no(y: Tensor, labels: int, source: str) -> Tensor:
    y = y[:, None] if y.dim() == 1 and labels == 1 else y
    if y.shape[1:] != (labels,):
        raise DataError(
            f"{source} has labels of shape {tuple(y.shape)} but the model has {labels} yes-or-no label(s); "
            f"give zeros and ones of shape ({len(y)}, {labels}), or pass the data as --unlabeled"
        )
    strange = y[(y != 0) & (y != 1)]
    if len(strange):
        raise DataError(f"yes-or-no labels must be 0 or 1, and {source} holds {int(strange[0])}")
    return y
