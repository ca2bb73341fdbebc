"""Local inconsistency S_ρ: the paper's protocol, the converged maximum, and their relatives."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from gm_probe.core.batches import cut
from gm_probe.core.errors import UsageError
from gm_probe.probe.ascent import Maximum, ascend, kl_gradient, maximize, to_sphere
from gm_probe.probe.kl import kl_divergence
from gm_probe.probe.outputs import parameter_norm
from gm_probe.probe.probe import Figure, Probe, example_error
from gm_probe.probe.work import FORWARD, GRADIENT

NOISE_STARTS = 2
"""Of a converged maximum, beside the two from ± the Fisher matrix's top eigenvector."""


LOST = 0.1
"""Share of a perturbation that may be lost to rounding: of small networks S_ρ/ρ² then stays within a percent."""


def _require_resolved(probe: Probe, *lengths: float) -> None:
    """Raise UsageError where θ + δ is rounded to something else, be it θ, for δ of one of these ``lengths``."""
    for length in lengths:
        share = probe.parameters.rounding(length)
        if share > LOST:
            dtype = str(probe.parameters.dtype).removeprefix("torch.")
            raise UsageError(
                f"rounding of {dtype} weights takes {min(share, 1):.0%} of a perturbation of length {length:g}; raise "
                "--rho or --noise-scale, or use --dtype float64"
            )


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
    _require_resolved(probe, settings.noise_scale, *radii)
    steps = sorted({settings.k_steps, *settings.k_grid})
    ends: list[Tensor] = []
    grid: dict[tuple[float, int], list[float]] = {(rho, k): [] for rho in radii for k in steps}
    for start in probe.starts():
        first = probe.divergence.gradient(start)
        for rho in radii:
            delta = to_sphere(first, rho)
            for k in range(1, steps[-1] + 1):
                primary = (rho, k) == (settings.rho, settings.k_steps)
                if primary:
                    ends.append(probe.divergence.terms(delta))
                    value = float(ends[-1].double().mean())
                if k < steps[-1]:
                    value, gradient = probe.divergence.value_and_gradient(delta)
                    following = to_sphere(gradient, rho)
                elif not primary:
                    value = float(probe.divergence.terms(delta).double().mean())
                if (rho, k) in grid:
                    grid[rho, k].append(value)
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
    _require_resolved(probe, settings.noise_scale, settings.rho, *settings.rho_grid)
    # noise guards against a poor v₁, and finds other maxima; it is flat: one step of Algorithm 1 first, for every ρ
    noise = [probe.divergence.gradient(start) for start in islice(probe.starts(), NOISE_STARTS)]
    figure = _converged_at(probe, settings.rho, noise)
    if settings.rho_grid:
        radii = sorted({settings.rho, *settings.rho_grid})
        found = {rho: figure if rho == settings.rho else _converged_at(probe, rho, noise) for rho in radii}
        *_, details = figure
        details["grid"] = [
            {"rho": rho, "value": value, "converged": converged}
            for rho, (value, _, _, converged, _) in found.items()
        ]
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


def relative(probe: Probe) -> Figure:
    """The paper's protocol at radius ρ‖θ‖."""
    length, *_ = parameter_norm(probe)
    assert length is not None
    radius = probe.settings.rho * length
    _require_resolved(probe, probe.settings.noise_scale, radius)
    ends = (
        ascend(probe.divergence.gradient, start, radius, probe.settings.k_steps) for start in probe.starts()
    )
    return _over_starts(map(probe.divergence.terms, ends), "start", radius=radius)


def adaptive(probe: Probe) -> Figure:
    """The paper's protocol in the ball ‖δ/(|θ|+η)‖ ≤ ρ, as ASAM's (Kwon 2021): ascent in u with δ = (|θ|+η) u."""
    settings = probe.settings
    scale = probe.parameters.join(probe.parameters.values().values()).abs() + settings.eta

    def gradient(u: Tensor) -> Tensor:
        return scale * probe.divergence.gradient(scale * u)

    ends = (scale * ascend(gradient, start, settings.rho, settings.k_steps) for start in probe.starts())
    return _over_starts(map(probe.divergence.terms, ends), "start", eta=settings.eta)


def batchwise(probe: Probe) -> Figure:
    """The paper's protocol with a perturbation of its own for every m examples (m-sharpness, Foret 2021)."""
    settings, parameters = probe.settings, probe.parameters
    _require_resolved(probe, settings.noise_scale, settings.rho)
    batches = probe.batches.of_size(settings.sub_batch)
    all_terms = []
    for start in probe.starts():
        terms = []
        for batch, clean in zip(batches, cut(probe.clean, batches), strict=True):
            # no more at a time than memory was found to hold
            pieces = list(zip(*(t.split(probe.batches.batch_size) for t in (batch.x, clean)), strict=True))
            delta = ascend(_gradient_on(probe, pieces), start, settings.rho, settings.k_steps)
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
    _require_resolved(probe, probe.settings.rho)
    generator = probe.generator("average")
    draws = (probe.parameters.random(probe.settings.rho, generator) for _ in range(probe.settings.num_starts))
    return _over_starts(map(probe.divergence.terms, draws), "draw")
