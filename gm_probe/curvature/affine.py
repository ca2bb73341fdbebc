"""Whether each parameter tensor enters a network's logits (piecewise) affinely; then tr H = tr F for any labels.

H = F + mean over x and classes of (p − y)_c ∂²z_c/∂θ² (Lemma A.1's split). Where each tensor θ_k enters z affinely
while the others stay fixed, every ∂²z/∂θ_i² is 0 almost everywhere. The second term then has a zero diagonal, though it
is not a zero matrix. This holds for ReLU networks of convolutions, linear layers, max-pooling, residual sums and batch
norm in eval mode. It does not hold for GELU, sigmoids, attention, layer norm, or a weight used twice in sequence.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gm_probe.curvature.custom_functions import written
from gm_probe.curvature.derivatives import gradients
from gm_probe.curvature.replacements import NESTABLE, Substituting
from gm_probe.data.fields import Inputs
from gm_probe.errors import first_line, of_machine
from gm_probe.models.parameters import Parameters, as_measured
from gm_probe.runtime.randomness import generators_kept

NEGLIGIBLE = 30.0
"""A second derivative along a random direction counts as 0 if it is below this many ε, relative to the first.

The direction is as long as the tensor. Autograd's second derivatives of piecewise linear layers are exactly 0.
"""
APART = 0.1
"""Autograd's slope counts as wrong at this distance from the logits' own, in standard deviations of a random slope."""
_ENTRIES = 2**19
"""Parameters times examples in the test. A large network needs few examples, since each has thousands of units."""


def obstacle(parameters: Parameters, x: Inputs) -> str | None:
    """Return why tr H = tr F need not hold, or None where each parameter tensor enters the logits affinely.

    The test is that the second derivative of cᵀz, for random c, vanishes along a random direction of each tensor. It
    uses 16 of the examples ``x`` (B, ...), or 2 for a large network, and a fixed seed. Paths that only other examples
    take are not seen. The model never makes it raise: what cannot be tested counts as not affine.
    """
    count = max(2, min(16, _ENTRIES // parameters.size))
    try:
        with generators_kept(parameters.device, parameters.model), as_measured(parameters.model):
            return _curved(parameters, x[:count])
    except Exception as error:  # layers may raise anything
        if of_machine(error):
            raise
        return f"second derivatives cannot be tested ({first_line(error)})"


def _curved(parameters: Parameters, x: Inputs) -> str | None:
    generator = torch.Generator().manual_seed(0)
    negligible = NEGLIGIBLE * torch.finfo(parameters.dtype).eps
    with torch.enable_grad(), Substituting(NESTABLE):
        values = parameters.leaves()
        logits = parameters.logits(x, values)
        function = next(written(logits), None)
        if function is not None:
            return f"the autograd function {function} defines its own derivatives"
        cotangent = _random(logits, generator)
        in_float64 = parameters.values(torch.float64)
        slopes = gradients(logits, values, cotangent, create_graph=True)
        for (name, value), slope in zip(values.items(), slopes, strict=True):
            direction = _random(value, generator) * (float(value.detach().norm()) or 1.0)
            first = logits.new_zeros(()) if slope is None else (slope * direction).sum()
            [change] = gradients(first, {name: value}, keep_graph=True)
            second = 0.0 if change is None else float((change * direction).sum())
            if not abs(second) <= negligible * abs(float(first.detach())):
                return f"the logits are not affine in parameter {name!r}"
            if not _stated(parameters, x, in_float64, name, direction, cotangent, float(first.detach())):
                return f"autograd does not see every path from parameter {name!r}"
    return None


def _stated(
    parameters: Parameters,
    x: Inputs,
    values: dict[str, Tensor],
    name: str,
    direction: Tensor,
    cotangent: Tensor,
    slope: float,
) -> bool:
    """Compare ``slope`` with that of cᵀz along ``direction``, by central differences of the logits in float64.

    They differ where a path is hidden from autograd, as by ``detach`` in a straight-through estimator. Float32 would
    need longer steps, on which too many units change sides.
    """
    length = torch.finfo(torch.float64).eps ** (1 / 3)
    step, cotangent = length * direction.double(), cotangent.double()
    inputs = x.double() if x.is_floating_point() else x
    with torch.no_grad():
        try:
            ahead = parameters.logits(inputs, {**values, name: values[name] + step})
            behind = parameters.logits(inputs, {**values, name: values[name] - step})
        except RuntimeError as error:
            if of_machine(error):
                raise
            return True  # a layer insists on its own dtype
    quotient = (ahead - behind) / (2 * length)
    spread = float(cotangent.norm() * quotient.norm()) / quotient.numel() ** 0.5
    return abs(float((cotangent * quotient).sum()) - slope) <= APART * max(spread, abs(slope))


def _random(like: Tensor, generator: torch.Generator) -> Tensor:
    """Return a random tensor of length about 1, with the shape of another."""
    drawn = torch.randn(like.shape, generator=generator, dtype=like.dtype) / max(1, like.numel()) ** 0.5
    return drawn.to(like.device)
