"""Random vectors, drawn where the generator is: on a GPU, or on the CPU to get the same numbers on every device."""

from __future__ import annotations

import torch
from torch import Tensor

from gm_probe.linalg.operator import Operator


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
