"""A symmetric matrix that is known by its products: all that the spectral algorithms see of a model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Operator:
    """A symmetric (P, P) matrix A = (1/N) Σ_x A_x, known by its products.

    Attributes:
        matvec: v (P,) ↦ A v (P,).
        terms: v (P,) ↦ (N,) values vᵀA_x v, whose mean is vᵀA v. Where examples depend on their batch (``Batches``),
            there is one mean per batch instead.
        size: P.
    """

    matvec: Callable[[Tensor], Tensor]
    terms: Callable[[Tensor], Tensor]
    size: int
    dtype: torch.dtype
    device: torch.device
