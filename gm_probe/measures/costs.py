"""What measures will cost, in gradient evaluations: for progress bars and estimates. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from gm_probe.measures.catalogue import MEASURES
from gm_probe.measures.settings import Settings


def takes_derivatives(names: Sequence[str]) -> bool:
    """Return whether a measure takes more than forward passes, so that its batch must leave memory for derivatives."""
    return any(MEASURES[name].cost >= 1 for name in names)


def by_protocol(name: str, settings: Settings) -> str:
    """Return ``name``, or the name of the converged maximum where the protocol asks for it."""
    if name == "local_inconsistency" and settings.protocol == "converged":
        return "local_inconsistency_converged"
    return name


CLEAN_PASSES = 2 / 3
"""Gradient evaluations of the two clean passes, before the first measure."""


def expected_cost(names: Sequence[str], settings: Settings) -> float:
    """Return about how many gradient evaluations ``measure`` will take, for progress bars and estimates."""
    return CLEAN_PASSES + sum(expected_costs(names, settings).values())


def expected_costs(names: Sequence[str], settings: Settings) -> dict[str, float]:
    """Return the expected cost of each measure, without the two clean passes."""
    costs = {}
    for asked in names:
        name = by_protocol(asked, settings)
        cost = MEASURES[name].cost
        if name == "local_inconsistency":
            cost = _cost_of_starts(settings)
        if name == "local_inconsistency_converged":
            cost *= len({settings.rho, *settings.rho_grid})
        if name == "hessian_trace" and "fisher_trace" in names:
            cost = 0.0  # for networks that are affine in each parameter, it equals tr F
        costs[asked] = cost
    return costs


class Outlook:
    """Predicts the total gradient evaluations of a measurement while it runs.

    Args:
        costs: the usual cost of each stage, by its name, in order.
    """

    def __init__(self, costs: Mapping[str, float]) -> None:
        self.costs = costs
        self._name, self._began = "", 0.0

    def total(self, name: str, evaluations: float) -> float | None:
        """Return the total, given the stage at work and the ``evaluations`` done so far; None where it is unknown.

        A ``linalg.work.Count`` knows what is left of the stage. Otherwise its usual cost counts, until it took more.
        """
        if name != self._name:
            self._began = float(evaluations) if self._name else CLEAN_PASSES
            self._name = name
        names = list(self.costs)
        later = names[names.index(name) + 1 :] if name in names else []
        left = getattr(evaluations, "left", None)
        if left is None:
            left = self.costs.get(name, 0.0) - (evaluations - self._began)
        return None if left < 0 else evaluations + left + sum(self.costs[each] for each in later)


def _cost_of_starts(settings: Settings) -> float:
    """Return the gradient evaluations of the paper's protocol, whose first gradient serves every ρ of a grid."""
    radii = len({settings.rho, *settings.rho_grid})
    most = max((settings.k_steps, *settings.k_grid))
    along = 1 / 3 if settings.k_steps < most else 0  # a forward pass for the primary cell's examples
    return settings.num_starts * (1 + radii * (most - 1 + 1 / 3) + along)
