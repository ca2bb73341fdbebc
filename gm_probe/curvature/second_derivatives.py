"""Whether Hessian-vector products are the derivative of the gradient, tried on a few examples by differences.

A layer may have a wrong or incomplete second derivative: if its backward pass uses an intermediate value saved in the
forward pass, it treats that value as a constant. The resulting matrix may still be symmetric.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

from gm_probe.curvature.custom_functions import located
from gm_probe.curvature.derivatives import REMEDY, Arguments, Product, gradients, refusals_noted
from gm_probe.data.fields import Inputs
from gm_probe.errors import DerivativeError, first_line
from gm_probe.models.parameters import Parameters

STEPS = (30.0, 3.0, 0.3, 300.0)
"""Step lengths in √ε, relative to the weights: short ones, on which few ReLUs change sides, and a long one against
rounding."""
_AS_ONE = 0.1
"""Quotients of two steps count as equal if they differ by less than this, relative to the quotient and to its distance
from the product."""

Scalar = Callable[[Tensor, Inputs, Tensor], Tensor]
"""θ (P,), input (B, ...), data (B, ...) ↦ the sum over examples of the scalar that is differentiated twice"""


def require_second_derivative(
    parameters: Parameters, scalar: Scalar, product: Product, few: Arguments, in_float64: Arguments
) -> None:
    """Raise DerivativeError where ``product`` cannot be taken, or is not the derivative of the gradient.

    Args:
        product: v (P,), x, d ↦ H v (P,) of ``scalar``.
        few: the examples in the model's own dtype, in case a layer insists on it.
    """
    for v, x, d in (in_float64, few):
        with refusals_noted() as refusals:  # a layer may insist on its dtype
            wrong = all(_contradicted(parameters, scalar, product, u, x, d) for u in (v, v.flip(0)))
        if not refusals:
            break
    if refusals:
        cause = refusals[0]
        raise DerivativeError(f"a layer has no second derivative ({first_line(cause)}); {REMEDY}") from cause
    if wrong:
        raise DerivativeError(_flaw(located(parameters, few[1], others="WeightNorm")))


def _contradicted(
    parameters: Parameters, scalar: Scalar, product: Product, v: Tensor, x: Inputs, d: Tensor
) -> bool:
    """Return whether central differences of the gradient along ``v`` (P,) converge to something other than H v.

    At a kink they do not converge: their quotients grow with the reciprocal of the step.
    """
    precision = _Precision(v.dtype)
    with precision:
        found = product(v, x, d).double()
    theta = parameters.vector(v.dtype)
    length = float(theta.norm()) or float(v.norm())

    def gradient(step: float) -> Tensor:
        with torch.enable_grad():
            moved = (theta + step * v).requires_grad_()
            [slope] = gradients(scalar(moved, x, d), {"": moved})
        return torch.zeros_like(v).double() if slope is None else slope.double()

    quotients: list[tuple[float, Tensor, float]] = []
    for factor in STEPS:
        step = factor * precision.eps**0.5 * length / float(v.norm())
        ahead = gradient(step)
        quotient = (ahead - gradient(-step)) / (2 * step)
        # the gradient of a confident wrong example is almost constant, and its change is lost in rounding
        lost = 10 * precision.eps * float(ahead.norm()) / step
        expected = precision.eps**0.25 * float(found.norm() + quotient.norm())
        if float((quotient - found).norm()) <= max(expected, lost):
            return False
        quotients.append((step, quotient, lost))
    quotients.sort(key=lambda entry: -entry[0])
    return any(_settled(one, other, found, lost) for (_, one, _), (_, other, lost) in pairwise(quotients))


def _settled(one: Tensor, other: Tensor, found: Tensor, lost: float) -> bool:
    """Return whether two quotients (P,) are equal, up to what is ``lost`` in rounding, and differ from ``found``."""
    apart = float((one - other).norm())
    far = min(float((one - found).norm()), float((other - found).norm()))
    return apart <= _AS_ONE * far and apart <= max(_AS_ONE * float(one.norm()), lost)


class _Precision(torch.autograd.graph.saved_tensors_hooks):
    """The largest ε of what autograd saves, because some layers always compute in float32."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.eps = torch.finfo(dtype).eps
        super().__init__(self._save, lambda value: value)

    def _save(self, value: Tensor) -> Tensor:
        if value.is_floating_point():
            self.eps = max(self.eps, torch.finfo(value.dtype).eps)
        return value


def _flaw(suspects: list[str]) -> str:
    named = f" ({'; '.join(suspects[:3])})" if suspects else ""
    remedy = "write its backward pass as torch operations on its saved inputs"
    if any("WeightNorm" in suspect for suspect in suspects):
        remedy = "fold weight_norm into its weight by torch.nn.utils.parametrize.remove_parametrizations"
    return (
        "the Hessian's products disagree with differences of the gradient: a layer's second derivative is "
        f"wrong or incomplete{named}; {remedy}, or leave out the Hessian's measures by --measures"
    )
