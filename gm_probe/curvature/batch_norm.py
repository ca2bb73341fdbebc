"""Batch normalisation in eval mode whose forward-mode derivatives are batch normalisations, too.

torch needs about fourteen operations per layer for them, and forty for those of the backward pass. Here a tangent's
image is x̂ dw + (the layer applied to dx, without its mean), which is two of torch's own kernels.
"""

from __future__ import annotations

from functools import lru_cache, reduce
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional


class _BatchNorm(torch.autograd.Function):
    """Compute (x − mean) · w / √(var + ε) + b over dimension 1 of x (B, C, ...); mean and var are constants."""

    @staticmethod
    def forward(
        x: Tensor, weight: Tensor, bias: Tensor | None, mean: Tensor, var: Tensor, eps: float
    ) -> Tensor:
        return torch.native_batch_norm(x, weight, bias, mean, var, False, 0.0, eps)[0]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        x, weight, _, mean, var, ctx.eps = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, weight, mean, var)
        ctx.save_for_forward(x, weight, mean, var)

    @staticmethod
    def jvp(ctx: Any, dx: Tensor | None, dw: Tensor | None, db: Tensor | None, *_: None) -> Tensor:
        x, weight, mean, var = ctx.saved_tensors
        terms = []
        if dx is not None:
            terms.append(
                _BatchNorm.apply(dx, weight, db, _zeros(len(mean), mean.dtype, mean.device), var, ctx.eps)
            )
            db = None
        if dw is not None:
            terms.append(_BatchNorm.apply(x, dw, db, mean, var, ctx.eps))
            db = None
        if db is not None:
            terms.append(db.view(-1, *[1] * (x.dim() - 2)).expand_as(x))
        return reduce(torch.add, terms)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        return *_Backward.apply(gradient, *ctx.saved_tensors, ctx.eps), None, None, None


class _Backward(torch.autograd.Function):
    """Compute the gradients of ``_BatchNorm`` by x, w and b, which are linear in the gradient g and in (x, w)."""

    @staticmethod
    def forward(
        g: Tensor, x: Tensor, weight: Tensor, mean: Tensor, var: Tensor, eps: float
    ) -> tuple[Tensor, ...]:
        kernel = torch.ops.aten.native_batch_norm_backward
        found: tuple[Tensor, ...] = kernel(
            g, x, weight, mean, var, None, None, False, eps, [True, True, True]
        )
        return found

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        *tensors, ctx.eps = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_forward(*tensors)

    @staticmethod
    def jvp(
        ctx: Any, dg: Tensor | None, dx: Tensor | None, dw: Tensor | None, *_: None
    ) -> tuple[Tensor, ...]:
        g, x, weight, mean, var = ctx.saved_tensors
        found = []
        if dg is not None:
            found.append(_Backward.apply(dg, x, weight, mean, var, ctx.eps))
        if dx is not None or dw is not None:
            dx = torch.zeros_like(x) if dx is None else dx
            dw = torch.zeros_like(weight) if dw is None else dw
            by_x, by_w, by_b = _Backward.apply(
                g, dx, dw, _zeros(len(mean), mean.dtype, mean.device), var, ctx.eps
            )
            found.append((by_x, by_w, None if found else torch.zeros_like(by_b)))
        first, *others = found
        for other in others:
            first = (first[0] + other[0], first[1] + other[1], first[2])
        return first


@lru_cache(maxsize=64)
def _zeros(count: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return zeros (count,), shared by the layers that take them as their mean, to save a kernel per layer."""
    with torch.inference_mode(False):
        return torch.zeros(count, dtype=dtype, device=device)


def batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """Compute ``torch.nn.functional.batch_norm``, in eval mode with few kernels for forward-mode derivatives."""
    if training or running_mean is None or running_var is None or weight is None or bias is None:
        return functional.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)
    found: Tensor = _BatchNorm.apply(input, weight, bias, running_mean, running_var, eps)
    return found
