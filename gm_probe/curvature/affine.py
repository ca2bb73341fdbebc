"""Whether each parameter tensor enters a network's logits (piecewise) affinely; then tr H = tr F, with any labels.

H = F + mean over x and classes of (p − y)_c ∂²z_c/∂θ² (Lemma A.1's split). Where each tensor θ_k enters z affinely
while the others stay, every ∂²z/∂θ_i² is 0 almost everywhere: the second term has a zero diagonal, not a zero matrix.
That holds for ReLU networks of convolutions, linear layers, max-pooling, residual sums and batch norm in eval mode. It
does not hold for GELU, sigmoids, attention, layer norm or a weight used twice in sequence.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gm_probe.curvature.derivatives import gradients
from gm_probe.curvature.nestable import NESTABLE, Substituting
from gm_probe.curvature.written import written
from gm_probe.data.fields import Inputs
from gm_probe.errors import first_line, of_machine
from gm_probe.models.parameters import Parameters, as_measured
from gm_probe.runtime.randomness import generators_kept

NEGLIGIBLE = 30.0
"""Times ε: a second derivative along a tensor's random direction, relative to the first, that counts as 0.

The direction is as long as the tensor. Autograd's second derivatives of piecewise linear layers are exactly 0.
"""
APART = 0.1
"""A slope that autograd states this far from the logits' own, in standard deviations of a random slope, is another."""
_ENTRIES = 2**19
"""Parameters times examples that are tried: on few examples a large network has thousands of units to be curved."""


def obstacle(parameters: Parameters, x: Inputs) -> str | None:
    """Return why tr H = tr F cannot be relied on, or None where each parameter tensor enters the logits affinely.

    Then the second derivative of cᵀz, for random c, vanishes along a random direction of each tensor. It is taken of
    16 of the examples ``x`` (B, ...), and of a large network of 2, with a fixed seed. What only other examples run
    through is not seen. Never raises on account of the model: what cannot be tried counts as not affine.
    """
    count = max(2, min(16, _ENTRIES // parameters.size))
    try:
        with generators_kept(parameters.device, parameters.model), as_measured(parameters.model):
            return _curved(parameters, x[:count])
    except Exception as error:  # whatever a stranger's layer raises
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
    """Return whether ``slope`` is that of cᵀz along ``direction``, by central differences of the logits in float64.

    It is not where a path is hidden from autograd, as by ``detach`` in a straight-through estimator. At float32's
    longer steps too many units would change sides.
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
    """Return a random tensor of a length about 1, in the shape of another."""
    drawn = torch.randn(like.shape, generator=generator, dtype=like.dtype) / max(1, like.numel()) ** 0.5
    return drawn.to(like.device)
