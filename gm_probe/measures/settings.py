"""How to measure. Imports no torch, so that a wrong setting is told at once."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

from gm_probe.checks import one_of, real, whole
from gm_probe.errors import UsageError

Protocol = Literal["paper", "converged"]
NOISE_STARTS = 2
"""Of a converged maximum, beside the two from ± the Fisher matrix's top eigenvector."""

MOST = 2**32 - 1
"""Of any whole number, a seed among them."""
LEAST_TOLERANCE = 1e-16
"""Relative; float64 has no digits for less, and squares of its inverse may overflow."""


@dataclass(frozen=True, slots=True)
class Settings:
    r"""How to measure.

    Attributes:
        rho: radius ρ of the ball in parameter space.
        k_steps: ascent steps K of Algorithm 1.
        noise_scale: expected length of the random start δ₀ (σ = noise_scale/√P).
        num_starts: random starts that the paper's protocol averages over (App. F: 10).
        protocol: what `local_inconsistency` reports: the paper's mean over starts, or the converged maximum.
        ascent_tolerance: relative gain of a step at which a converged ascent stops.
        eigen_tolerance: Lanczos residual relative to the eigenvalue.
        trace_tolerance: standard error of a trace relative to its value.
        min_probes: of a trace before its standard error may stop it; from fewer than 10 it is too uncertain.
        max_probes: of a trace, also where it is below ``min_probes``; an exact tr F takes a pass a class.
        max_iterations: Lanczos iterations and ascent steps before giving up (and saying so).
        seed: of every random draw.
        rho_grid, k_grid: more radii and steps at which the paper's S_ρ is taken along the way; the converged maximum
            at more radii, an ascent each.
        eta: η of the adaptive ball ‖δ/(\|θ\|+η)‖ ≤ ρ.
        sub_batch: examples m that share a perturbation in the batchwise variant.
        params: regular expression that chooses parameters by name; empty = all trainable ones.
        top_eigenvalues: how many of the largest eigenvalues λ_max rows list.
        target_error: relative error at which rows say how many examples they would need; 0 = don't.
    """

    rho: float = 0.1
    k_steps: int = 1
    noise_scale: float = 0.1
    num_starts: int = 10
    protocol: Protocol = "paper"
    ascent_tolerance: float = 1e-3
    eigen_tolerance: float = 0.01
    trace_tolerance: float = 0.05
    min_probes: int = 10
    max_probes: int = 100
    max_iterations: int = 100
    seed: int = 0
    rho_grid: tuple[float, ...] = ()
    k_grid: tuple[int, ...] = ()
    eta: float = 0.01
    sub_batch: int = 128
    params: str = ""
    top_eigenvalues: int = 1
    target_error: float = 0.0

    def as_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        return {name: list(v) if isinstance(v, tuple) else v for name, v in asdict(self).items()}

    def __post_init__(self) -> None:
        for name in ("k_steps", "num_starts", "max_iterations", "sub_batch", "top_eigenvalues"):
            object.__setattr__(self, name, whole(name, getattr(self, name), 1, MOST))
        for name in ("min_probes", "max_probes"):  # of one there is no standard error
            object.__setattr__(self, name, whole(name, getattr(self, name), 2, MOST))
        object.__setattr__(self, "seed", whole("seed", self.seed, 0, MOST))
        for name in ("rho", "noise_scale", "eta"):
            object.__setattr__(self, name, real(name, getattr(self, name), above=0))
        for name in ("ascent_tolerance", "eigen_tolerance", "trace_tolerance", "target_error"):
            object.__setattr__(self, name, tolerance(name, getattr(self, name)))
        for name, grid in (("rho_grid", self.rho_grid), ("k_grid", self.k_grid)):
            if not isinstance(grid, tuple):
                raise UsageError(f"{name} = {grid!r} must be a tuple of numbers")
        object.__setattr__(self, "rho_grid", tuple(real("rho", rho, above=0) for rho in self.rho_grid))
        object.__setattr__(self, "k_grid", tuple(whole("k_steps", k, 1, MOST) for k in self.k_grid))
        one_of("protocol", self.protocol, get_args(Protocol))
        if not isinstance(self.params, str):
            raise UsageError(f"params = {self.params!r} must be a regular expression, a text")


def tolerance(name: str, value: Any) -> float:
    """Return a relative tolerance, 0 or at least ``LEAST_TOLERANCE``; raise UsageError where it is neither."""
    found = real(name, value, least=0)
    if 0 < found < LEAST_TOLERANCE:
        raise UsageError(f"{name} = {value!r} must be 0 or at least {LEAST_TOLERANCE:g}")
    return found
