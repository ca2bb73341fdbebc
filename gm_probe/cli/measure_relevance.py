"""Which options of ``gmprobe measure`` change which measures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from gm_probe.errors import UsageError
from gm_probe.measures.costs import by_protocol
from gm_probe.measures.settings import NOISE_STARTS, Settings

PAPER, CONVERGED = "local_inconsistency", "local_inconsistency_converged"
ASCENTS = {f"{PAPER}{kind}" for kind in ("", "_adaptive", "_relative", "_batchwise")}
INCONSISTENCIES = {*ASCENTS, CONVERGED, "average_inconsistency"}
TRACES = {"fisher_trace", "hessian_trace", "effective_rank"}
LARGEST = {"fisher_lambda_max", "hessian_lambda_max", "effective_rank"}
ITERATED = {*LARGEST, "hessian_lambda_min", CONVERGED}
READ_BY = {
    "rho": INCONSISTENCIES,
    "k_steps": ASCENTS,
    "noise_scale": {*ASCENTS, CONVERGED},
    "num_starts": INCONSISTENCIES,
    "ascent_tolerance": {CONVERGED},
    "eta": {"local_inconsistency_adaptive"},
    "sub_batch": {"local_inconsistency_batchwise"},
    "trace_tolerance": TRACES,
    "max_probes": TRACES,
    "eigen_tolerance": ITERATED,
    "max_iterations": ITERATED,
    "top_eigenvalues": LARGEST,
}
"""The measures that read each setting; tests/test_cli.py holds it to the measures themselves."""


def idle(names: Sequence[str], settings: Settings, given: Mapping[str, str], *, density: bool) -> list[str]:
    """Return which of the options ``given`` (by their settings) change no measure of ``names`` and no ``density``."""
    taken = _taken(names, settings)
    read = {key for key, readers in READ_BY.items() if taken & readers}
    read |= {"protocol"} if PAPER in names else set()
    read |= {"num_starts", "max_iterations"} if density else set()
    known = ("protocol", *READ_BY)
    found = [given[key] for key in known if key in given and key not in read]
    if (
        "num_starts" in given
        and not density
        and taken & INCONSISTENCIES == {CONVERGED}
        and settings.num_starts > NOISE_STARTS
    ):
        found.append(f"{given['num_starts']} beyond {NOISE_STARTS}")
    return found


def quadrature(settings: Settings) -> tuple[int, int]:
    """Return the random starts of a spectral density, and the Lanczos steps of each."""
    return min(4, settings.num_starts), min(40, settings.max_iterations)


def require_use_of_grids(names: Sequence[str], settings: Settings) -> None:
    """Raise UsageError where more than one ρ or K is given, and no measure takes them."""
    taken = _taken(names, settings)
    if settings.k_grid and PAPER not in taken:
        raise UsageError(
            "--k-steps: only local_inconsistency by the paper's protocol takes several K; give one"
        )
    if settings.rho_grid and not taken & {PAPER, CONVERGED}:
        raise UsageError("--rho: only local_inconsistency takes several ρ; give one")


def _taken(names: Sequence[str], settings: Settings) -> set[str]:
    return {by_protocol(name, settings) for name in names}
