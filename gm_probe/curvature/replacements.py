"""Replacements for layers whose second derivative torch 2.14 misstates or lacks, by operations that have one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

Substitutes = Mapping[Callable[..., Any], Callable[..., Tensor]]


def _layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enable: bool = True,
) -> Tensor:
    """Layer normalisation; torch's own jvp of a jvp is silently wrong (pytorch issue 196700)."""
    # under autocast, torch computes the statistics in float32, too
    if input.dtype in (torch.float16, torch.bfloat16):
        input = input.float()
    axes = tuple(range(-len(normalized_shape), 0))
    centred = input - input.mean(axes, keepdim=True)
    result = centred * (centred.square().mean(axes, keepdim=True) + eps).rsqrt()
    result = result if weight is None else result * weight
    return result if bias is None else result + bias


def _glu(input: Tensor, dim: int = -1) -> Tensor:
    value, gate = input.chunk(2, dim)
    return value * gate.sigmoid()


def _hardsigmoid(input: Tensor, inplace: bool = False) -> Tensor:
    """Hardsigmoid; torch's own backward pass has no derivative."""
    return functional.relu6(input + 3) / 6


NESTABLE: Substitutes = {
    functional.layer_norm: _layer_norm,
    torch.layer_norm: _layer_norm,
    functional.glu: _glu,
    functional.hardsigmoid: _hardsigmoid,
}


class Substituting(TorchFunctionMode):
    """In this context, functions of torch are replaced by others that compute the same."""

    def __init__(self, substitutes: Substitutes) -> None:
        super().__init__()
        self._substitutes = substitutes

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        return self._substitutes.get(func, func)(*args, **(kwargs or {}))
