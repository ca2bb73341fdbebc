"""How to measure. This file does not import torch, so that a wrong setting is reported at once."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

from gm_probe.setting import setting, validate

Protocol = Literal["paper", "converged"]
NOISE_STARTS = 2
"""Random starts of a converged maximum, in addition to ± the Fisher matrix's top eigenvector."""
MOST = 2**32 - 1
"""Upper bound of any whole number, a seed among them."""
SMALLEST = 1e-16
"""Smallest relative tolerance: float64 has no digits for less, and squares of its inverse may overflow."""
INCONSISTENCY, SPECTRA, GENERAL = "Local inconsistency", "Traces and eigenvalues", "General"


@dataclass(frozen=True, slots=True)
class Settings:
    """How to measure: each field has its help and its bounds (see ``setting``).

    ``rho_grid`` and ``k_grid`` hold more radii and numbers of steps for the paper's S_ρ. The converged maximum takes
    the radii, with one ascent each. ``min_probes`` is the number of random vectors before a trace may stop.

    Raises:
        UsageError: a field has another type or lies outside of its bounds.
    """

    rho: float = setting(
        0.1,
        INCONSISTENCY,
        "Radius ρ in parameter space; several values make a grid around the first.",
        metavar="R[,R...]",
        grid="rho_grid",
        above=0,
    )
    rho_grid: tuple[float, ...] = setting((), above=0)
    k_steps: int = setting(
        1,
        INCONSISTENCY,
        "Number K of ascent steps of Algorithm 1; several values make a grid around the first.",
        metavar="K[,K...]",
        grid="k_grid",
        least=1,
        most=MOST,
    )
    k_grid: tuple[int, ...] = setting((), least=1, most=MOST)
    noise_scale: float = setting(
        0.1, INCONSISTENCY, "Expected length of the random start δ₀ (σ = noise_scale/√P).", above=0
    )
    num_starts: int = setting(
        10, INCONSISTENCY, "Number of random starts to average over.", flag="--starts", least=1, most=MOST
    )
    protocol: Protocol = setting("paper")
    ascent_tolerance: float = setting(
        0.001,
        INCONSISTENCY,
        "Stop a converged ascent when a step's relative gain is below this.",
        least=0,
        smallest=SMALLEST,
    )
    eta: float = setting(0.01, INCONSISTENCY, "Set η of the adaptive ball ‖δ/(|θ|+η)‖ ≤ ρ.", above=0)
    sub_batch: int = setting(
        128,
        INCONSISTENCY,
        "Number of examples that share a perturbation in the batchwise S_ρ.",
        least=1,
        most=MOST,
    )
    trace_tolerance: float = setting(
        0.05,
        SPECTRA,
        "Relative standard error to reach for a trace; 0 computes tr F exactly, with one pass per class.",
        least=0,
        smallest=SMALLEST,
    )
    eigen_tolerance: float = setting(
        0.01,
        SPECTRA,
        "Relative Lanczos residual to reach for an eigenvalue.",
        least=0,
        smallest=SMALLEST,
    )
    min_probes: int = setting(10, least=2, most=MOST)
    max_probes: int = setting(
        100, SPECTRA, "Maximum number of probes for an estimated trace.", least=2, most=MOST
    )
    max_iterations: int = setting(
        100, SPECTRA, "Maximum number of Lanczos iterations or ascent steps.", least=1, most=MOST
    )
    top_eigenvalues: int = setting(
        1, SPECTRA, "Number of leading eigenvalues to report.", flag="--top", least=1, most=MOST
    )
    params: str = setting(
        "", GENERAL, "Measure only parameters whose name matches this.", unset="all", metavar="REGEX"
    )
    target_error: float = setting(
        0.0,
        GENERAL,
        "Report how many examples are needed for this relative error, such as 2%.",
        unset="none",
        metavar="PERCENT",
        least=0,
        smallest=SMALLEST,
    )
    tf32: bool = setting(
        False,
        GENERAL,
        "Let an NVIDIA GPU round float32 products to TF32. It is faster, but keeps three digits, in which short "
        "perturbations of the weights may be lost.",
    )
    noise_device: str = setting(
        "device",
        GENERAL,
        "Draw random vectors and starts on the device, or on the CPU for the draws of a measurement on the CPU.",
        choices=("device", "cpu"),
    )
    seed: int = setting(0, GENERAL, "Seed of all random draws.", least=0, most=MOST)

    def as_dict(self) -> dict[str, Any]:
        """Return the JSON object."""
        return {name: list(v) if isinstance(v, tuple) else v for name, v in asdict(self).items()}

    def __post_init__(self) -> None:
        validate(self)
