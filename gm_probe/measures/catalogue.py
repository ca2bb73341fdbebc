"""The measures by name: what each needs and costs, and how it is written. Imports no torch, which takes seconds.

``gm_probe.measures.measure.MEASURES`` adds the functions that compute them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from gm_probe.errors import DataError, UsageError, did_you_mean
from gm_probe.measures.settings import Settings


@dataclass(frozen=True, slots=True)
class Listed:
    """One measure as a list shows it.

    Attributes:
        needs_labels: undefined on unlabeled data.
        cost: typical gradient evaluations at the default settings, for time estimates.
        symbol: short name for tables and axes.
    """

    needs_labels: bool
    cost: float
    symbol: str
    description: str


CATALOGUE: dict[str, Listed] = {
    "local_inconsistency": Listed(
        False,
        13.3,
        "S_ρ",
        "KL between the outputs of the model and of a copy perturbed by ρ (Algorithm 1), mean over random "
        "starts",
    ),
    "local_inconsistency_converged": Listed(
        False,
        35.0,
        "max S_ρ",
        "largest such KL found in the ball, by ascent from ± the top Fisher eigenvector and noise until "
        "convergence",
    ),
    "fisher_lambda_max": Listed(
        False, 10.0, "λ_max(F)", "largest eigenvalue of the Fisher matrix, by Lanczos"
    ),
    "fisher_trace": Listed(False, 2.7, "tr F", "trace of the Fisher matrix, from per-example gradients"),
    "hessian_lambda_max": Listed(
        False,
        24.0,
        "λ_max(H)",
        "largest eigenvalue of the loss Hessian (with given or else predicted labels), by Lanczos",
    ),
    "hessian_trace": Listed(
        False,
        2.7,
        "tr H",
        "trace of the loss Hessian: tr F where every parameter enters affinely; else with given or "
        "predicted labels, at three gradients per probe",
    ),
    "error": Listed(True, 0.0, "error", "fraction of examples classified wrongly"),
    "cross_entropy": Listed(True, 0.0, "CE", "mean cross-entropy in nats"),
    "hessian_lambda_min": Listed(
        False,
        90.0,
        "λ_min(H)",
        "smallest (most negative) eigenvalue of the loss Hessian, by Lanczos",
    ),
    "effective_rank": Listed(
        False, 13.0, "tr F/λ_max", "number of directions over which the curvature is spread"
    ),
    "local_inconsistency_adaptive": Listed(
        False,
        13.3,
        "S_ρ adapt.",
        "S_ρ in the ball ‖δ/(|θ|+η)‖ ≤ ρ, invariant to rescaling",
    ),
    "local_inconsistency_relative": Listed(False, 13.3, "S_ρ rel.", "S_ρ at radius ρ‖θ‖"),
    "local_inconsistency_batchwise": Listed(
        False,
        13.3,
        "S_ρ batch",
        "mean of the S_ρ of each batch of m examples",
    ),
    "average_inconsistency": Listed(
        False,
        3.3,
        "A_ρ",
        "mean KL over random perturbations of length about ρ",
    ),
    "mean_entropy": Listed(False, 0.0, "entropy", "mean entropy of the outputs in nats"),
    "mean_confidence": Listed(False, 0.0, "confidence", "mean probability of the predicted class"),
    "input_jacobian_norm": Listed(
        False,
        7.0,
        "‖∂f/∂x‖",
        "root mean square norm of the output probabilities' derivative with respect to the normalised "
        "input; one pass per class",
    ),
    "flip_rate": Listed(
        False, 0.33, "flips", "fraction of predictions that change when the image is mirrored"
    ),
    "crop_rate": Listed(
        False,
        0.33,
        "crops",
        "fraction of predictions that change when the image is shifted by up to 4 pixels",
    ),
    "distance_from_initialization": Listed(
        False,
        0.0,
        "‖θ − θ₀‖",
        "distance from the initial parameters; known for run folders only",
    ),
    "parameter_norm": Listed(False, 0.0, "‖θ‖", "norm of the parameter vector"),
}
"""All measures by their names, in the order of a table."""

DEFAULT_MEASURES = (
    "local_inconsistency",
    "fisher_lambda_max",
    "fisher_trace",
    "hessian_lambda_max",
    "hessian_trace",
    "error",
    "cross_entropy",
)

SEPARATE = {
    "error": "counts classes",
    "input_jacobian_norm": "differentiates an output by its own input",
    "flip_rate": "counts classes",
    "crop_rate": "counts classes",
    "local_inconsistency_batchwise": "splits the batch",
}
"""Why some are undefined where the outputs of a batch hang together (``Batches.batch_dependent``)."""


def check_names(
    names: Sequence[str], *, labeled: bool, batch_dependent: bool = False, num_processes: int = 1
) -> None:
    """Raise UsageError for an unknown measure, one that several processes cannot share, or of
    ``batch_dependent`` examples an undefined one.

    Raises:
        DataError: one needs labels that are not there.
    """
    for name in names:
        if name not in CATALOGUE:
            raise UsageError(f"no measure {name!r}; {did_you_mean(name, CATALOGUE)}")
        if batch_dependent and name in SEPARATE:
            raise UsageError(f"{name} {SEPARATE[name]}, so it is undefined for NT-Xent logits. Leave it out")
        if name == "local_inconsistency_batchwise" and num_processes > 1:
            raise UsageError(f"{name} splits the examples into batches. Measure it in one process")
        if CATALOGUE[name].needs_labels and not labeled:
            raise DataError(f"{name} needs labels. Give class folders with --labeled")


def takes_derivatives(names: Sequence[str]) -> bool:
    """Whether one does by more than a forward pass, so that the batch must leave memory for it."""
    return any(CATALOGUE[name].cost >= 1 for name in names)


def default_measures(*, labeled: bool, batch_dependent: bool = False) -> list[str]:
    """``DEFAULT_MEASURES`` that can be taken; NT-Xent of ``batch_dependent`` examples needs no labels."""
    return [
        name
        for name in DEFAULT_MEASURES
        if (labeled or batch_dependent or not CATALOGUE[name].needs_labels)
        and not (batch_dependent and name in SEPARATE)
    ]


def by_protocol(name: str, settings: Settings) -> str:
    """``name``, or of ``local_inconsistency`` under the converged protocol the maximum's own."""
    if name == "local_inconsistency" and settings.protocol == "converged":
        return "local_inconsistency_converged"
    return name


CLEAN_PASSES = 2 / 3
"""Gradient evaluations of the two clean passes, before the first measure."""


def expected_cost(names: Sequence[str], settings: Settings) -> float:
    """Gradient evaluations that ``measure`` will take, roughly: for progress bars and estimates."""
    return CLEAN_PASSES + sum(expected_costs(names, settings).values())


def expected_costs(names: Sequence[str], settings: Settings) -> dict[str, float]:
    """The same by measure, without the clean passes."""
    costs = {}
    for listed in names:
        name = by_protocol(listed, settings)
        cost = CATALOGUE[name].cost
        if name == "local_inconsistency":
            cost = _cost_of_starts(settings)
        if name == "local_inconsistency_converged":
            cost *= len({settings.rho, *settings.rho_grid})
        if name == "hessian_trace" and "fisher_trace" in names:
            cost = 0.0  # of networks that are affine in each parameter, it is the same
        costs[listed] = cost
    return costs


class Outlook:
    """How many gradient evaluations a measurement will take in all, as far as it can be told while it runs.

    Args:
        costs: what each stage usually takes, by its name, in order.
    """

    def __init__(self, costs: Mapping[str, float]) -> None:
        self.costs = costs
        self._name, self._began = "", 0.0

    def total(self, name: str, evaluations: float) -> float | None:
        """The total, where stage ``name`` is at work and ``evaluations`` are done; None where it is unknown.

        A ``linalg.work.Count`` says what is left of the stage; else it is what the stage usually takes, until it has
        taken more.
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
    """Gradient evaluations of the paper's protocol: the first gradient serves every ρ of a grid."""
    radii = len({settings.rho, *settings.rho_grid})
    most = max((settings.k_steps, *settings.k_grid))
    along = 1 / 3 if settings.k_steps < most else 0  # the examples' terms, in passing
    return settings.num_starts * (1 + radii * (most - 1 + 1 / 3) + along)
