"""A symmetric matrix that is known by its products, which is all that spectral algorithms see of a model.

Random vectors are drawn where their generator is: on a GPU, or on the CPU to get the same numbers on every device.
"""

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


def random_start(operator: Operator, generator: torch.Generator) -> Tensor:
    """Return a (P,) float64 Gaussian vector on the operator's device."""
    place = generator.device
    drawn = torch.randn(operator.size, generator=generator, dtype=torch.float64, device=place)
    return drawn.to(operator.device)


def random_signs(operator: Operator, generator: torch.Generator, dtype: torch.dtype) -> Tensor:
    """Return (P,) random signs of ``dtype`` on the operator's device."""
    place = generator.device
    drawn = torch.randint(0, 2, (operator.size,), generator=generator, dtype=torch.int8, device=place)
    return drawn.to(operator.device, dtype) * 2 - 1
