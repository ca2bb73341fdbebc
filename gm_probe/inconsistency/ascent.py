"""Algorithm 1 of the paper: gradient ascent on the KL divergence within a ball in parameter space.

Local inconsistency, IAM-D and IAM-S all take their perturbation from here.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from gm_probe.data.batches import Batches, cut
from gm_probe.data.fields import Inputs
from gm_probe.errors import DivergedError
from gm_probe.inconsistency.kl import kl_divergence
from gm_probe.linalg.work import FORWARD, GRADIENT, Work
from gm_probe.models.parameters import Parameters
from gm_probe.runtime.processes import gather_examples, sum_over_processes


def kl_gradient(
    parameters: Parameters,
    x: Inputs,
    logits: Tensor,
    offset: Tensor,
    factor: Tensor | float = 1.0,
    compared: Callable[[Tensor], Tensor] = lambda outputs: outputs,
) -> tuple[Tensor, Tensor]:
    """Return per-example KL(f_θ ‖ f_{θ+δ}) and the gradient of its sum with respect to δ, with f_θ constant.

    Args:
        x: (B, ...) model input.
        logits: (n, C) logits at θ, detached.
        offset: (P,) δ.
        factor: multiplies the sum before it is differentiated, so that float16 gradients do not underflow.
        compared: maps the outputs (B, ...) at θ + δ to the n rows that are compared with ``logits``.

    Returns:
        (n,) divergences and the (P,) gradient.
    """
    with torch.inference_mode(False), torch.enable_grad():
        moved = (parameters.vector() + offset).requires_grad_()
        outputs = compared(parameters.taken(x, moved))
        terms = kl_divergence(logits, parameters.outputs.logits(outputs))
        total = factor * terms.sum()
        gradient = None
        if total.requires_grad:  # otherwise the outputs depend on no parameter
            [gradient] = torch.autograd.grad(total, [moved], allow_unused=True)
    return terms.detach(), torch.zeros_like(offset) if gradient is None else gradient


def to_sphere(vector: Tensor, radius: float | Tensor) -> Tensor:
    """Return ``vector`` (P,) scaled to length ``radius``; the zero vector has no direction and stays zero.

    A tensor (P,) of radii scales each entry by its own.
    """
    # divided by the largest entry first, because squares of a tiny gradient would underflow in the norm
    tiny = torch.finfo(vector.dtype).tiny
    scaled = vector / vector.abs().max().clamp(min=tiny)
    return scaled / scaled.norm().clamp(min=tiny) * radius


def ascend(gradient: Callable[[Tensor], Tensor], start: Tensor, radius: float | Tensor, steps: int) -> Tensor:
    """Run Algorithm 1 (paper §4.5): δ ← ρ·g/‖g‖ with g = ∇_δ KL(f_θ ‖ f_{θ+δ}), ``steps`` times from ``start``.

    Under the quadratic approximation each step is one power iteration with the Fisher matrix.

    Args:
        gradient: maps δ (P,) to g (P,).
        start: δ₀ (P,), usually Gaussian noise, because the gradient vanishes at δ = 0.
        radius: ρ.
        steps: K ≥ 1.

    Returns:
        δ_K (P,), of length ρ.
    """
    delta = start
    for _ in range(steps):
        delta = to_sphere(gradient(delta), radius)
    return delta


class Divergence:
    """The function δ ↦ mean KL(f_θ ‖ f_{θ+δ}) over examples, with f_θ computed once.

    Args:
        logits: (N, C) logits at θ in the order of ``batches``.
    """

    def __init__(self, parameters: Parameters, batches: Batches, logits: Tensor, work: Work) -> None:
        self.parameters, self.batches, self.work = parameters, batches, work
        self._logits = cut(logits, batches)

    def terms(self, offset: Tensor) -> Tensor:
        """Return per-example divergences (N,) at ``offset`` (P,), or one mean per batch of dependent examples."""
        result = []
        with torch.no_grad(), self.parameters.one_pass():
            moved = self.parameters.vector() + offset
            for batch, logits in zip(self.batches, self._logits, strict=True):
                result.append(kl_divergence(logits, self.parameters.logits(batch.x, moved)))
                self.work.add(FORWARD, len(logits))
        return gather_examples(self.batches.independent(torch.cat(result)))

    def value_and_gradient(self, offset: Tensor) -> tuple[float, Tensor]:
        """Return the mean divergence at ``offset`` and its gradient (P,).

        Raises:
            DivergedError: one of them is not finite.
        """
        total, gradient = offset.new_zeros((), dtype=torch.float64), torch.zeros_like(offset)
        with self.parameters.one_pass():
            for batch, logits in zip(self.batches, self._logits, strict=True):
                terms, part = kl_gradient(self.parameters, batch.x, logits, offset)
                total += terms.sum(dtype=torch.float64)
                gradient += part
                self.work.add(GRADIENT, len(logits))
        total, gradient = sum_over_processes(total), sum_over_processes(gradient)
        finite = torch.isfinite(gradient).all() & ~total.isnan()
        value, fine = torch.stack([total, finite]).tolist()  # the only wait for the device in a pass
        if not fine:
            raise DivergedError(
                f"the KL gradient at ‖δ‖ = {float(offset.norm()):.3g} is not finite; lower --rho or use --dtype float64"
            )
        return value / self.batches.total, gradient / self.batches.total

    def gradient(self, offset: Tensor) -> Tensor:
        """Return the gradient (P,) of the mean divergence at ``offset``."""
        return self.value_and_gradient(offset)[1]


class FisherByDifference:
    """The map v ↦ F v by one gradient pass: ∇_δ mean KL(f_θ ‖ f_{θ+δ}) at δ = εv, divided by ε.

    Its error is rounding divided by ε, plus the network's nonlinearity times ε. In float32 this is half a percent on
    CIFAR-10 networks and a few percent on tiny ones. So it can find an eigenvector, but not certify it: on saturated
    outputs, which hardly any step moves, the result is rounding alone.
    """

    def __init__(self, divergence: Divergence) -> None:
        self._divergence = divergence
        self._step = 1e-3
        # beyond this step, activations may overflow
        self._longest = max(1.0, float(divergence.parameters.vector().norm()))

    def __call__(self, v: Tensor) -> Tensor:
        aim = torch.finfo(v.dtype).eps ** 0.4  # between √eps, where rounding dominates, and the cube root
        # at most 5 times: where F v = 0, the logits move by the step's square, and no step may be right
        for _ in range(5):
            step = self._step
            value, gradient = self._divergence.value_and_gradient(step * v)
            moved = math.sqrt(2 * value)  # √(vᵀF v) · ε, the root mean square change of the logits
            if moved > 0:
                self._step = min(step * aim / moved, self._longest)
            if moved == 0 or 0.1 < moved / aim < 10:
                break
        return gradient / step


@dataclass(frozen=True, slots=True)
class Maximum:
    """Where an ascent ended.

    Attributes:
        delta: (P,) the best iterate, of length ρ.
        value: mean KL there.
        gains: relative gain of each accepted step.
        alignment: cosine of δ and the gradient; 1 at a stationary point of the sphere.
        converged: the last full step gained less than the tolerance.
        abandoned: it stopped early because it fell behind another ascent.
        joined: it stopped early because it came near the end of another ascent.
    """

    delta: Tensor
    value: float
    gains: tuple[float, ...]
    alignment: float
    converged: bool
    abandoned: bool
    joined: bool


JOINED = 0.95
"""Two ascents count as being in one basin above this cosine of their δ. At ρ = 0.1 on a resnet20 and a 6CNN, all that
came so near went on to the same end. At ρ = 1, where maxima lie closer, none came so near."""


def maximize(
    objective: Callable[[Tensor], tuple[float, Tensor]],
    start: Tensor,
    radius: float,
    *,
    tolerance: float = 1e-3,
    max_steps: int = 50,
    first: tuple[float, Tensor] | None = None,
    rival: Maximum | None = None,
) -> Maximum:
    """Ascend on the sphere ‖δ‖ = ρ until the relative gain of a step is below ``tolerance``.

    Steps are Algorithm 1's while they gain. Beyond the quadratic regime that iteration oscillates, so a step that loses
    is undone and shortened, and the best iterate is kept.

    Args:
        objective: maps δ (P,) to the mean KL and its gradient.
        start: (P,) direction to start in.
        first: the objective at the start, where it is known.
        rival: the end of another ascent. This one stops where it comes near that end, or where two more gains like its
            last would not reach that value.
    """
    delta = to_sphere(start, radius)
    value, gradient = objective(delta) if first is None else first
    gains: list[float] = []
    step = float("inf")  # in radii; infinite = Algorithm 1's full step
    converged = abandoned = joined = False
    for _ in range(max_steps):
        if not bool(gradient.any()):  # a flat divergence has no ascent direction
            converged = True
            break
        direction = to_sphere(gradient, radius)
        candidate = direction if step == float("inf") else to_sphere(delta + step * direction, radius)
        new_value, new_gradient = objective(candidate)
        if new_value < value:
            step = 1.0 if step == float("inf") else step / 2
            if step < 2**-7:  # no step along the gradient gains: a kink of a piecewise-linear network
                break
            continue
        gain = new_value / value - 1 if value > 0 else float("inf")
        delta, value, gradient = candidate, new_value, new_gradient
        gains.append(gain)
        if gain <= tolerance and step >= 1:
            converged = True
            break
        if rival is not None and value <= rival.value:
            joined = rival.converged and float(delta @ rival.delta) > JOINED * radius**2
            abandoned = not joined and value * (1 + gain) ** 2 < rival.value
            if joined or abandoned:
                break
        step = step * 2 if step < 4 else float("inf")
    # from unit vectors, because squares of a tiny gradient underflow
    alignment = float(to_sphere(gradient, 1.0) @ to_sphere(delta, 1.0)) if bool(gradient.any()) else 1.0
    return Maximum(delta, value, tuple(gains), alignment, converged, abandoned, joined)
