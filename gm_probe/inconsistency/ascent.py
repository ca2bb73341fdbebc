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
    """Per-example KL(f_θ ‖ f_{θ+δ}) and the gradient of its sum with respect to δ; f_θ held constant.

    Args:
        x: (B, ...) model input.
        logits: (n, C) logits at θ, detached.
        offset: (P,) δ.
        factor: multiplies the sum before it is differentiated, lest float16 gradients underflow.
        compared: maps the outputs (B, ...) at θ + δ to the n rows that ``logits`` is compared with.

    Returns:
        (n,) divergences and the (P,) gradient.
    """
    with torch.inference_mode(False), torch.enable_grad():
        moved = (parameters.vector() + offset).requires_grad_()
        outputs = compared(parameters.taken(x, moved))
        terms = kl_divergence(logits, parameters.outputs.logits(outputs))
        total = factor * terms.sum()
        gradient = None
        if total.requires_grad:  # else the outputs depend on none of them
            [gradient] = torch.autograd.grad(total, [moved], allow_unused=True)
    return terms.detach(), torch.zeros_like(offset) if gradient is None else gradient


def to_sphere(vector: Tensor, radius: float | Tensor) -> Tensor:
    """``vector`` (P,) scaled to length ``radius``; the zero vector stays zero (no direction to go).

    A tensor (P,) of radii scales each entry by its own.
    """
    # by the largest entry first: squares of a tiny gradient would underflow in the norm
    tiny = torch.finfo(vector.dtype).tiny
    scaled = vector / vector.abs().max().clamp(min=tiny)
    return scaled / scaled.norm().clamp(min=tiny) * radius


def ascend(gradient: Callable[[Tensor], Tensor], start: Tensor, radius: float | Tensor, steps: int) -> Tensor:
    """Algorithm 1 (paper §4.5): δ ← ρ·g/‖g‖ with g = ∇_δ KL(f_θ ‖ f_{θ+δ}), ``steps`` times from ``start``.

    Under the quadratic approximation each step is one power iteration with the Fisher matrix.

    Args:
        gradient: maps δ (P,) to g (P,).
        start: δ₀ (P,), usually Gaussian noise: at δ = 0 the gradient vanishes.
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
    """δ ↦ mean KL(f_θ ‖ f_{θ+δ}) over examples, with f_θ computed once.

    Args:
        logits: (N, C) logits at θ in the order of ``batches``.
    """

    def __init__(self, parameters: Parameters, batches: Batches, logits: Tensor, work: Work) -> None:
        self.parameters, self.batches, self.work = parameters, batches, work
        self._logits = cut(logits, batches)

    def terms(self, offset: Tensor) -> Tensor:
        """Per-example divergences (N,) at ``offset`` (P,); one mean per batch where examples depend on each other."""
        result = []
        with torch.no_grad(), self.parameters.one_pass():
            moved = self.parameters.vector() + offset
            for batch, logits in zip(self.batches, self._logits, strict=True):
                result.append(kl_divergence(logits, self.parameters.logits(batch.x, moved)))
                self.work.add(FORWARD, len(logits))
        return gather_examples(self.batches.independent(torch.cat(result)))

    def value_and_gradient(self, offset: Tensor) -> tuple[float, Tensor]:
        """Mean divergence at ``offset`` and its gradient (P,).

        Raises:
            DivergedError: it is not finite.
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
        value, fine = torch.stack([total, finite]).tolist()  # the one wait for the device in a pass
        if not fine:
            raise DivergedError(
                f"the KL gradient at ‖δ‖ = {float(offset.norm()):.3g} is not finite; lower --rho or use --dtype float64"
            )
        return value / self.batches.total, gradient / self.batches.total

    def gradient(self, offset: Tensor) -> Tensor:
        """Gradient (P,) of the mean divergence at ``offset``."""
        return self.value_and_gradient(offset)[1]


class FisherByDifference:
    """v ↦ F v by one gradient pass: ∇_δ mean KL(f_θ ‖ f_{θ+δ}) at δ = εv, over ε.

    Off by rounding over ε and by the network's nonlinearity times ε: in float32 by half a percent on CIFAR-10 networks,
    by a few percent on tiny ones. Good for finding an eigenvector, not for certifying it: of saturated outputs, which
    hardly a step moves, all is rounding.
    """

    def __init__(self, divergence: Divergence) -> None:
        self._divergence = divergence
        self._step = 1e-3
        self._longest = max(
            1.0, float(divergence.parameters.vector().norm())
        )  # beyond it activations may overflow

    def __call__(self, v: Tensor) -> Tensor:
        aim = torch.finfo(v.dtype).eps ** 0.4  # between √eps, where rounding rules, and the cube root
        # bounded: where F v = 0 the logits move by the step's square, and no step may suit
        for _ in range(5):
            step = self._step
            value, gradient = self._divergence.value_and_gradient(step * v)
            moved = math.sqrt(2 * value)  # √(vᵀF v) · ε: the logits' root mean square change
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
        abandoned: it stopped early, for it fell behind.
        joined: it stopped early, for it came where another ascent had ended.
    """

    delta: Tensor
    value: float
    gains: tuple[float, ...]
    alignment: float
    converged: bool
    abandoned: bool
    joined: bool


JOINED = 0.95
"""Cosine of two ascents' δ from which they count as in one basin. At ρ = 0.1 on a resnet20 and a 6CNN all that came so
near went on to the same end; at ρ = 1, where maxima lie closer, none came so near."""


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
    """Ascend on the sphere ‖δ‖ = ρ until a step gains less than ``tolerance`` relative.

    Steps are Algorithm 1's while they gain. Beyond the quadratic regime that iteration oscillates,
    so a step that loses is undone and shortened, and the best iterate is kept.

    Args:
        objective: maps δ (P,) to the mean KL and its gradient.
        start: (P,) direction to start in.
        first: what the objective is there, where it is known.
        rival: another ascent's end; one that comes there, or would not reach its value by two more gains like its
            last, goes no further.
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
    # of unit vectors, for squares of a tiny gradient underflow
    alignment = float(to_sphere(gradient, 1.0) @ to_sphere(delta, 1.0)) if bool(gradient.any()) else 1.0
    return Maximum(delta, value, tuple(gains), alignment, converged, abandoned, joined)
