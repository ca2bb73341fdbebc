"""Which measures are computed, and what they will cost. This file does not import torch, which takes seconds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from gm_probe.errors import DataError, UsageError, did_you_mean
from gm_probe.measures.settings import Settings
from gm_probe.runs.catalogue import CATALOGUE

DEFAULT_MEASURES = (
    "local_inconsistency",
    "fisher_lambda_max",
    "fisher_trace",
    "hessian_lambda_max",
    "hessian_trace",
    "error",
    "cross_entropy",
)

BLOCKS = ("fisher_trace", "fisher_lambda_max", "hessian_trace", "hessian_lambda_max")
"""The measures of each layer alone."""

NEED_VALIDATION = ("atc", "doc", "cot")
"""The measures that need a labeled validation set."""

SEPARATE = {
    "error": "counts classes",
    "input_jacobian_norm": "differentiates an output by its own input",
    "flip_rate": "counts classes",
    "crop_rate": "counts classes",
    "local_inconsistency_batchwise": "splits the batch",
    "nuclear_norm": "counts classes",
    "mano": "counts classes",
    "effective_invariance": "counts classes",
    "dispersion": "counts classes",
    "last_layer_gradient_norm": "counts classes",
    **dict.fromkeys(NEED_VALIDATION, "counts classes"),
}
"""Why some measures are undefined where an output depends on the rest of its batch (``Batches.batch_dependent``)."""

GROUPS = ("curvature", "outputs", "norms")
"""Names that stand for all measures of a group; ``all`` stands for every measure."""


def expanded(
    names: Sequence[str], *, labeled: bool, batch_dependent: bool = False, validation: bool = False
) -> list[str]:
    """Return ``names`` with each group replaced by its measures that are defined on such data.

    Args:
        validation: whether there is a labeled validation set, too.
    """
    found: list[str] = []
    for name in names:
        if name != "all" and name not in GROUPS:
            found.append(name)
            continue
        found += [
            each
            for each, one in CATALOGUE.items()
            if name in ("all", one.group)
            and (labeled or not one.needs_labels)
            and (validation or each not in NEED_VALIDATION)
            and not (batch_dependent and each in SEPARATE)
        ]
    return list(dict.fromkeys(found))


def unknown_measure(name: str) -> str:
    """Say that no measure is called ``name``, and which one may be meant."""
    called = next((key for key, each in CATALOGUE.items() if each.symbol == name), None)
    meant = f"{name} is called {called}" if called else did_you_mean(name, (*CATALOGUE, *GROUPS, "all"))
    return f"no measure {name!r}; {meant}"


def check_names(
    names: Sequence[str], *, labeled: bool, batch_dependent: bool = False, num_processes: int = 1
) -> None:
    """Raise unless each measure is defined on such data.

    Raises:
        UsageError: a measure is unknown, several processes cannot share it, or it is undefined where examples are
            ``batch_dependent``.
        DataError: a measure needs labels, and there are none.
    """
    for name in names:
        if name not in CATALOGUE:
            raise UsageError(unknown_measure(name))
        if batch_dependent and name in SEPARATE:
            raise UsageError(f"{name} {SEPARATE[name]}, so it is undefined for NT-Xent logits. Leave it out")
        if name == "local_inconsistency_batchwise" and num_processes > 1:
            raise UsageError(f"{name} splits the examples into batches. Measure it in one process")
        if CATALOGUE[name].needs_labels and not labeled:
            raise DataError(f"{name} needs labels. Give class folders with --labeled")


def takes_derivatives(names: Sequence[str]) -> bool:
    """Return whether a measure takes more than forward passes, so that its batch must leave memory for derivatives."""
    return any(CATALOGUE[name].cost >= 1 for name in names)


def default_measures(*, labeled: bool, batch_dependent: bool = False) -> list[str]:
    """Return the ``DEFAULT_MEASURES`` that can be computed; NT-Xent of ``batch_dependent`` examples needs no labels."""
    return [
        name
        for name in DEFAULT_MEASURES
        if (labeled or batch_dependent or not CATALOGUE[name].needs_labels)
        and not (batch_dependent and name in SEPARATE)
    ]


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
    for listed in names:
        name = by_protocol(listed, settings)
        cost = CATALOGUE[name].cost
        if name == "local_inconsistency":
            cost = _cost_of_starts(settings)
        if name == "local_inconsistency_converged":
            cost *= len({settings.rho, *settings.rho_grid})
        if name == "hessian_trace" and "fisher_trace" in names:
            cost = 0.0  # for networks that are affine in each parameter, it equals tr F
        costs[listed] = cost
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
