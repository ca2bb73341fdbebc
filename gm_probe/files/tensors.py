"""What a tensor from a file may be, and which of its values are not finite."""

from __future__ import annotations

import math

import torch
from torch import Tensor

PIECE = 2**20
"""Values that are looked at together: what a look takes for all at once could be twice the file."""


def unusable(value: Tensor, size: float = math.inf) -> str | None:
    """Return why a tensor from a file of ``size`` bytes is no dense array of real numbers; None where it is one."""
    if value.is_meta:
        return "has no data (it was saved from the meta device)"
    if value.is_nested or value.layout != torch.strided or value.is_quantized:
        return "is nested, sparse or quantized, but a dense tensor is needed"
    if value.is_complex():
        return "is complex, but real numbers are needed"
    held = value.untyped_storage().nbytes()
    if held > size or value.numel() * value.element_size() > max(held, PIECE):
        return f"claims {value.numel():,} values but the file holds fewer"
    try:
        widened(value)
    except NotImplementedError:
        return f"is {value.dtype}, which torch cannot convert to float32"
    return None


def widened(value: Tensor) -> Tensor:
    """Return floats of 8 bits or less, for which torch has few operations, as float32, and others as they are."""
    return value.float() if value.is_floating_point() and value.element_size() == 1 else value


def not_finite(value: Tensor, *, mask: bool) -> int:
    """Return how many values are NaN or infinite; −∞ does not count where the tensor may be an attention ``mask``."""
    if not value.is_floating_point():
        return 0
    pieces = widened(value).reshape(-1).split(PIECE)
    return sum(int((~(torch.isfinite(p) | (torch.isneginf(p) & mask))).sum()) for p in pieces)
