"""Local inconsistency S_ρ: the paper's protocol, the converged maximum, and their relatives."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from gm_probe.data.batches import cut
from gm_probe.errors import PrecisionError
from gm_probe.inconsistency.ascent import Maximum, ascend, kl_gradient, maximize, to_sphere
from gm_probe.inconsistency.kl import kl_divergence
from gm_probe.linalg.work import FORWARD, GRADIENT
from gm_probe.measures.context import Figure, Probe, example_error
from gm_probe.measures.outputs import parameter_norm
from gm_probe.measures.settings import NOISE_STARTS

LOST = 0.1
"""Share of a perturbation that may be lost to rounding: of small networks S_ρ/ρ² then stays within a percent."""
LOST_START = 0.9
"""Likewise of a start, of which the direction alone counts."""


def _resolved(probe: Probe, offset: Tensor, most: float = LOST) -> bool:
    """Whether θ + ``offset`` (P,) is what it says, and not rounded to something else, be it θ."""
    return probe.parameters.rounding(offset) <= most


def _require_resolved(probe: Probe, offset: Tensor, most: float = LOST) -> Tensor:
    """``offset`` (P,), or a PrecisionError."""
    if not _resolved(probe, offset, most):
        option = "--rho" if most == LOST else "--noise-scale"
        dtype = str(probe.parameters.dtype).removeprefix("torch.")
        raise PrecisionError(
            f"rounding of {dtype} weights removes {min(probe.parameters.rounding(offset), 1):.0%} of a "
            f"perturbation of length {float(offset.norm()):.3g}; raise {option} or use --dtype float64"
        )
    return offset


def _starts(probe: Probe, scale: Tensor | float = 1.0) -> Iterator[Tensor]:
    """Random starts δ₀ (P,), of which rounding leaves a direction; ``scale``: by which they will be multiplied.

    Raises:
        PrecisionError: it does not.
    """
    for start in probe.starts():
        _require_resolved(probe, scale * start, LOST_START)
        yield start


def _over_starts(found: Iterable[Tensor], kind: str, **details: Any) -> Figure:
    """The mean over starts (or draws) of mean divergences, from their examples' terms (N,) each."""
    terms = list(found)
    values = torch.stack([each.double().mean() for each in terms])
    spread = float(values.std()) if len(values) > 1 else None
    error = None if spread is None else spread / math.sqrt(len(values))
    details |= {"sd_starts": spread, "num_starts": len(values), "starts": values.tolist()}
    if spread is None:
        details["reason_stderr"] = f"one {kind} has no spread"
    # K steps are the protocol's definition: there is nothing to converge
    return float(values.mean()), error, example_error(torch.stack(terms).mean(0)), True, details


def paper(probe: Probe) -> Figure:
    """Algorithm 1's K steps from random starts (paper §4.5, App. F), on a grid of ρ and K where one is asked.

    The grid costs little: the first gradient serves every ρ, and the values at fewer steps come with the way.
    """
    settings = probe.settings
    radii = sorted({settings.rho, *settings.rho_grid})
    steps = sorted({settings.k_steps, *settings.k_grid})
    ends: list[Tensor] = []
    grid: dict[tuple[float, int], list[float]] = {(rho, k): [] for rho in radii for k in steps}
    for start in _starts(probe):
        first = probe.divergence.gradient(start)
        for rho in radii:
            delta = to_sphere(first, rho)
            for k in range(1, steps[-1] + 1):
                primary = (rho, k) == (settings.rho, settings.k_steps)
                if primary:
                    _require_resolved(probe, delta)
                    ends.append(probe.divergence.terms(delta))
                    value = float(ends[-1].double().mean())
                if k < steps[-1]:
                    value, gradient = probe.divergence.value_and_gradient(delta)
                    following = to_sphere(gradient, rho)
                elif not primary:
                    value = float(probe.divergence.terms(delta).double().mean())
                if (rho, k) in grid:
                    grid[rho, k].append(value if primary or _resolved(probe, delta) else math.nan)
                if k < steps[-1]:
                    delta = following
    details: dict[str, Any] = {"protocol": "paper"}
    if len(grid) > 1:
        details["grid"] = [
            {"rho": rho, "k_steps": k, "value": sum(found) / len(found), "starts": found}
            for (rho, k), found in grid.items()
        ]
    return _over_starts(ends, "start", **details)


def converged(probe: Probe) -> Figure:
    """The largest divergence that ascents from ± the Fisher matrix's top eigenvector and from noise reach.

    A lower bound of the maximum (Eq. 3), not a certificate: the problem is not concave. A grid is over ρ alone, for K
    is of the paper's protocol.
    """
    settings = probe.settings
    # noise guards against a poor v₁, and finds other maxima; it is flat: one step of Algorithm 1 first, for every ρ
    noise = [probe.divergence.gradient(start) for start in islice(_starts(probe), NOISE_STARTS)]
    figure = _converged_at(probe, settings.rho, noise)
    if settings.rho_grid:
        radii = sorted({settings.rho, *settings.rho_grid})
        *_, details = figure
        details["grid"] = []
        for rho in radii:
            try:
                value, _, _, reached, _ = figure if rho == settings.rho else _converged_at(probe, rho, noise)
            except PrecisionError:  # the other radii stand
                value, reached = None, False
            details["grid"].append({"rho": rho, "value": value, "converged": reached})
    return figure


def _converged_at(probe: Probe, rho: float, noise: list[Tensor]) -> Figure:
    """``noise``: directions (P,) to ascend in beside ± the top eigenvector."""
    settings, top = probe.settings, probe.fisher_draft
    ends: dict[str, Maximum] = {}
    reached: dict[str, float] = {}  # of an ascent that joined another, by that one

    def go(name: str, start: Tensor, first: tuple[float, Tensor] | None = None) -> None:
        leader = max(ends.values(), key=lambda end: end.value, default=None)
        end = maximize(
            probe.divergence.value_and_gradient,
            start,
            rho,
            tolerance=settings.ascent_tolerance,
            max_steps=settings.max_iterations,
            first=first,
            rival=leader,
        )
        ends[name] = end
        reached[name] = leader.value if leader is not None and end.joined else end.value

    # the two signs of v₁ end 12-43 % apart beyond the quadratic regime: the more promising one first
    signed = {"+v1": to_sphere(top.vector, rho), "-v1": to_sphere(-top.vector, rho)}
    firsts = {name: probe.divergence.value_and_gradient(start) for name, start in signed.items()}
    for name in sorted(signed, key=lambda name: firsts[name][0], reverse=True):
        go(name, signed[name], firsts[name])
    for i, direction in enumerate(noise):
        go(f"noise {i}", direction)
    best = max(ends.values(), key=lambda end: end.value)
    _require_resolved(probe, best.delta)
    second = sorted(reached.values())[-2]
    # a draft that stalled, as of tiny networks, is good to its residual, too
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
    return best.value, None, example_error(probe.divergence.terms(best.delta)), best.converged, details


def local_inconsistency(probe: Probe) -> Figure:
    """By the protocol that the settings name."""
    return converged(probe) if probe.settings.protocol == "converged" else paper(probe)


def _terms(probe: Probe, offset: Tensor) -> Tensor:
    return probe.divergence.terms(_require_resolved(probe, offset))


def relative(probe: Probe) -> Figure:
    """The paper's protocol at radius ρ‖θ‖."""
    length, *_ = parameter_norm(probe)
    assert length is not None
    radius = probe.settings.rho * length
    ends = (
        ascend(probe.divergence.gradient, start, radius, probe.settings.k_steps) for start in _starts(probe)
    )
    return _over_starts((_terms(probe, end) for end in ends), "start", radius=radius)


def adaptive(probe: Probe) -> Figure:
    """The paper's protocol in the ball ‖δ/(|θ|+η)‖ ≤ ρ, as ASAM's (Kwon 2021): ascent in u with δ = (|θ|+η) u."""
    settings = probe.settings
    scale = probe.parameters.join(probe.parameters.values().values()).abs() + settings.eta

    def gradient(u: Tensor) -> Tensor:
        return scale * probe.divergence.gradient(scale * u)

    ends = (
        scale * ascend(gradient, start, settings.rho, settings.k_steps) for start in _starts(probe, scale)
    )
    return _over_starts((_terms(probe, end) for end in ends), "start", eta=settings.eta)


def batchwise(probe: Probe) -> Figure:
    """The paper's protocol with a perturbation of its own for every m examples (m-sharpness, Foret 2021)."""
    settings, parameters = probe.settings, probe.parameters
    batches = probe.batches.of_size(settings.sub_batch)
    all_terms = []
    for start in _starts(probe):
        terms = []
        for batch, clean in zip(batches, cut(probe.clean, batches), strict=True):
            # no more at a time than memory was found to hold
            pieces = list(zip(*(t.split(probe.batches.batch_size) for t in (batch.x, clean)), strict=True))
            delta = ascend(_gradient_on(probe, pieces), start, settings.rho, settings.k_steps)
            _require_resolved(probe, delta)
            for x, part in pieces:
                with torch.no_grad():
                    terms.append(kl_divergence(part, parameters.logits(x, parameters.moved(delta))))
                probe.work.add(FORWARD, len(part))
        all_terms.append(torch.cat(terms))
    return _over_starts(all_terms, "start", sub_batch=settings.sub_batch)


def _gradient_on(probe: Probe, pieces: list[tuple[Tensor, Tensor]]) -> Callable[[Tensor], Tensor]:
    """The gradient of the summed divergence over pairs of inputs (B, ...) and their clean logits (B, C)."""

    def gradient(offset: Tensor) -> Tensor:
        total = torch.zeros_like(offset)
        for x, clean in pieces:
            total += kl_gradient(probe.parameters, x, clean, offset)[1]
            probe.work.add(GRADIENT, len(clean))
        return total

    return gradient


def average(probe: Probe) -> Figure:
    """A_ρ = E mean KL(f_θ ‖ f_{θ+ε}) over ε ~ N(0, ρ²I/P): what the maximum is compared with."""
    generator = probe.generator("average")
    draws = (probe.parameters.random(probe.settings.rho, generator) for _ in range(probe.settings.num_starts))
    return _over_starts((_terms(probe, draw) for draw in draws), "draw")
