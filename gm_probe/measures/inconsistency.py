"""Local inconsistency S_ρ: the paper's protocol, the converged maximum, and their relatives."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from gm_probe.data.batches import cut
from gm_probe.errors import PrecisionError
from gm_probe.inconsistency.ascent import Maximum, ascend, kl_gradient, maximize, to_sphere
from gm_probe.inconsistency.kl import kl_divergence
from gm_probe.linalg.work import FORWARD, GRADIENT
from gm_probe.measures.context import MeasurementContext
from gm_probe.measures.estimates import Estimate, example_error
from gm_probe.measures.settings import NOISE_STARTS
from gm_probe.measures.weights import parameter_norm

LOST = 0.1
"""Share of a perturbation that may be lost to rounding; S_ρ/ρ² of small networks then stays within a percent."""
LOST_START = 0.9
"""Share of a start that may be lost to rounding, since only its direction counts."""


def _resolved(context: MeasurementContext, offset: Tensor, most: float = LOST) -> bool:
    """Return whether θ + ``offset`` (P,) survives rounding, except for a share of ``most``."""
    return context.parameters.rounding(offset) <= most


def _require_resolved(context: MeasurementContext, offset: Tensor, most: float = LOST) -> Tensor:
    """Return ``offset`` (P,), or raise PrecisionError where rounding loses too much of it."""
    if not _resolved(context, offset, most):
        option = "--rho" if most == LOST else "--noise-scale"
        dtype = str(context.parameters.dtype).removeprefix("torch.")
        raise PrecisionError(
            f"rounding of {dtype} weights removes {min(context.parameters.rounding(offset), 1):.0%} of a "
            f"perturbation of length {float(offset.norm()):.3g}; raise {option} or use --dtype float64"
        )
    return offset


def _starts(context: MeasurementContext, scale: Tensor | float = 1.0) -> Iterator[Tensor]:
    """Yield random starts δ₀ (P,).

    Args:
        scale: the starts will be multiplied by this.

    Raises:
        PrecisionError: rounding loses the direction of a start.
    """
    for start in context.starts():
        _require_resolved(context, scale * start, LOST_START)
        yield start


def _over_starts(found: Iterable[Tensor], kind: str, **details: Any) -> Estimate:
    """Return the mean over starts (or draws) of mean divergences, given the examples' terms (N,) of each."""
    terms = list(found)
    values = torch.stack([each.double().mean() for each in terms])
    spread = float(values.std()) if len(values) > 1 else None
    error = None if spread is None else spread / math.sqrt(len(values))
    details |= {"sd_starts": spread, "num_starts": len(values), "starts": values.tolist()}
    if spread is None:
        details["reason_stderr"] = f"one {kind} has no spread"
    # it counts as converged, because the protocol is defined by K steps
    return Estimate(
        float(values.mean()),
        stderr=error,
        stderr_examples=example_error(torch.stack(terms).mean(0)),
        details=details,
    )


def paper(context: MeasurementContext) -> Estimate:
    """Take Algorithm 1's K steps from random starts (paper §4.5, App. F), also on a grid of ρ and K.

    The grid costs little: the first gradient serves every ρ, and the longest ascent passes the values at fewer steps.
    """
    settings = context.settings
    radii = sorted({settings.rho, *settings.rho_grid})
    steps = sorted({settings.k_steps, *settings.k_grid})
    ends: list[Tensor] = []
    grid: dict[tuple[float, int], list[float]] = {(rho, k): [] for rho in radii for k in steps}
    for start in _starts(context):
        first = context.divergence.gradient(start)
        for rho in radii:
            for k, delta, value in _iterates(context, to_sphere(first, rho), rho, steps[-1]):
                primary = (rho, k) == (settings.rho, settings.k_steps)
                if primary:
                    ends.append(_terms(context, delta))
                if (rho, k) not in grid:
                    continue
                if value is None:
                    end = ends[-1] if primary else context.divergence.terms(delta)
                    value = float(end.double().mean())
                grid[rho, k].append(value if primary or _resolved(context, delta) else math.nan)
    details: dict[str, Any] = {"protocol": "paper"}
    if len(grid) > 1:
        details["grid"] = [
            {"rho": rho, "k_steps": k, "value": sum(found) / len(found), "starts": found}
            for (rho, k), found in grid.items()
        ]
    return _over_starts(ends, "start", **details)


def _iterates(
    context: MeasurementContext, delta: Tensor, rho: float, steps: int
) -> Iterator[tuple[int, Tensor, float | None]]:
    """Yield K, δ_K (P,) and the mean divergence there, from δ₁ = ``delta`` on; the last has None, and no gradient."""
    for k in range(1, steps):
        value, gradient = context.divergence.value_and_gradient(delta)
        yield k, delta, value
        delta = to_sphere(gradient, rho)
    yield steps, delta, None


def converged(context: MeasurementContext) -> Estimate:
    """Return the largest divergence that ascents from ± the Fisher matrix's top eigenvector and from noise reach.

    It is a lower bound of the maximum (Eq. 3), since the problem is not concave. A grid is over ρ alone, because K
    belongs to the paper's protocol.
    """
    settings = context.settings
    # Noise guards against a poor v₁ and finds other maxima. One step of Algorithm 1 comes first, for every ρ.
    noise = [context.divergence.gradient(start) for start in islice(_starts(context), NOISE_STARTS)]
    primary = _converged_at(context, settings.rho, noise)
    if not settings.rho_grid:
        return primary
    grid: list[dict[str, Any]] = []
    for rho in sorted({settings.rho, *settings.rho_grid}):
        try:
            found = primary if rho == settings.rho else _converged_at(context, rho, noise)
        except PrecisionError as error:  # the other radii are still measured
            found = Estimate.undefined(str(error))
        grid.append({"rho": rho, "value": found.value, "converged": found.converged})
    return replace(primary, details={**primary.details, "grid": grid})


def _converged_at(context: MeasurementContext, rho: float, noise: list[Tensor]) -> Estimate:
    """Ascend at one radius from ± the top eigenvector and from the directions ``noise`` (P,)."""
    settings, top = context.settings, context.fisher_draft
    ends: dict[str, Maximum] = {}
    reached: dict[str, float] = {}  # an ascent that joined another one reached that one's value

    def go(name: str, start: Tensor, first: tuple[float, Tensor] | None = None) -> None:
        leader = max(ends.values(), key=lambda end: end.value, default=None)
        end = maximize(
            context.divergence.value_and_gradient,
            start,
            rho,
            tolerance=settings.ascent_tolerance,
            max_steps=settings.max_iterations,
            first=first,
            rival=leader,
        )
        ends[name] = end
        reached[name] = leader.value if leader is not None and end.joined else end.value

    # beyond the quadratic regime the two signs of v₁ end 12-43 % apart, so the more promising one comes first
    signed = {"+v1": to_sphere(top.vector, rho), "-v1": to_sphere(-top.vector, rho)}
    firsts = {name: context.divergence.value_and_gradient(start) for name, start in signed.items()}
    for name in sorted(signed, key=lambda name: firsts[name][0], reverse=True):
        go(name, signed[name], firsts[name])
    for i, direction in enumerate(noise):
        go(f"noise {i}", direction)
    best = max(ends.values(), key=lambda end: end.value)
    _require_resolved(context, best.delta)
    second = sorted(reached.values())[-2]
    # a draft that stalled, as on tiny networks, is still accurate to its residual
    quadratic = rho**2 / 2 * top.value
    details = {
        "protocol": "converged",
        "starts": {name: end.value for name, end in ends.items()},
        "gains": {name: list(end.gains) for name, end in ends.items()},
        "abandoned": [name for name, end in ends.items() if end.abandoned],
        "joined": [name for name, end in ends.items() if end.joined],
        "runner_up": second / best.value if best.value > 0 else None,
        "alignment": best.alignment,
        "quadratic_ratio": best.value / quadratic if quadratic > 0 else None,
        "quadratic_residual": top.residual / top.value if quadratic > 0 else None,
    }
    return Estimate(
        best.value,
        stderr_examples=example_error(context.divergence.terms(best.delta)),
        converged=best.converged,
        details=details,
    )


def local_inconsistency(context: MeasurementContext) -> Estimate:
    """Measure S_ρ by the protocol that the settings name."""
    return converged(context) if context.settings.protocol == "converged" else paper(context)


def _terms(context: MeasurementContext, offset: Tensor) -> Tensor:
    return context.divergence.terms(_require_resolved(context, offset))


def relative(context: MeasurementContext) -> Estimate:
    """Return the paper's protocol at radius ρ‖θ‖."""
    length = parameter_norm(context).value
    assert length is not None
    radius = context.settings.rho * length
    ends = (
        ascend(context.divergence.gradient, start, radius, context.settings.k_steps)
        for start in _starts(context)
    )
    return _over_starts((_terms(context, end) for end in ends), "start", radius=radius)


def adaptive(context: MeasurementContext) -> Estimate:
    """Return the paper's protocol in ASAM's ball ‖δ/(|θ|+η)‖ ≤ ρ (Kwon 2021), by ascent in u with δ = (|θ|+η) u."""
    settings = context.settings
    scale = context.parameters.vector().abs() + settings.eta

    def gradient(u: Tensor) -> Tensor:
        return scale * context.divergence.gradient(scale * u)

    ends = (
        scale * ascend(gradient, start, settings.rho, settings.k_steps) for start in _starts(context, scale)
    )
    return _over_starts((_terms(context, end) for end in ends), "start", eta=settings.eta)


def batchwise(context: MeasurementContext) -> Estimate:
    """Return the paper's protocol with a separate perturbation for every m examples (m-sharpness, Foret 2021)."""
    settings, parameters = context.settings, context.parameters
    batches = context.batches.of_size(settings.sub_batch)
    all_terms = []
    for start in _starts(context):
        terms = []
        for batch, logits in zip(batches, cut(context.logits, batches), strict=True):
            # at most as many at a time as memory was found to hold
            pieces = list(zip(*(t.split(context.batches.batch_size) for t in (batch.x, logits)), strict=True))
            delta = ascend(_gradient_on(context, pieces), start, settings.rho, settings.k_steps)
            _require_resolved(context, delta)
            for x, part in pieces:
                with torch.no_grad():
                    terms.append(kl_divergence(part, parameters.logits(x, parameters.vector() + delta)))
                context.work.add(FORWARD, len(part))
        all_terms.append(torch.cat(terms))
    return _over_starts(all_terms, "start", sub_batch=settings.sub_batch)


def _gradient_on(
    context: MeasurementContext, pieces: list[tuple[Tensor, Tensor]]
) -> Callable[[Tensor], Tensor]:
    """Return the gradient of the summed divergence over pairs of inputs (B, ...) and their logits at θ (B, C)."""

    def gradient(offset: Tensor) -> Tensor:
        total = torch.zeros_like(offset)
        for x, logits in pieces:
            total += kl_gradient(context.parameters, x, logits, offset)[1]
            context.work.add(GRADIENT, len(logits))
        return total

    return gradient


def average(context: MeasurementContext) -> Estimate:
    """Return A_ρ = E mean KL(f_θ ‖ f_{θ+ε}) over ε ~ N(0, ρ²I/P), to compare the maximum with."""
    generator = context.generator("average")
    draws = (
        context.parameters.random(context.settings.rho, generator) for _ in range(context.settings.num_starts)
    )
    return _over_starts((_terms(context, draw) for draw in draws), "draw")
