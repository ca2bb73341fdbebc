"""The measures by name, as data: what each needs, costs and means. Imports no torch, which takes seconds.

``gm_probe.measures.measure.MEASURES`` adds the functions that compute them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Direction = Literal["better", "worse"]


@dataclass(frozen=True, slots=True)
class Listed:
    """One measure as a list shows it.

    Attributes:
        needs_labels: undefined on unlabeled data.
        cost: typical gradient evaluations at the default settings, for time estimates.
        symbol: short name for tables and axes.
        direction: whether a larger value is expected to go with better or worse generalization; None = either.
        group: a word that stands for all measures of its kind.
    """

    needs_labels: bool
    cost: float
    symbol: str
    description: str
    direction: Direction | None
    group: Literal["curvature", "outputs", "norms"]


def _curvature(symbol: str, cost: float, direction: Direction | None, description: str) -> Listed:
    return Listed(False, cost, symbol, description, direction, "curvature")


def _outputs(
    symbol: str, direction: Direction, description: str, *, cost: float = 0.0, needs_labels: bool = False
) -> Listed:
    return Listed(needs_labels, cost, symbol, description, direction, "outputs")


def _norms(symbol: str, description: str, *, cost: float = 0.0) -> Listed:
    return Listed(False, cost, symbol, description, "worse", "norms")


# fmt: off
CATALOGUE: dict[str, Listed] = {
    "local_inconsistency": _curvature("S_ρ", 13.3, "worse",
        "KL between the outputs of the model and of a copy perturbed by ρ (Algorithm 1), mean over random starts"),
    "local_inconsistency_converged": _curvature("max S_ρ", 35.0, "worse",
        "largest such KL found in the ball, by ascent from ± the top Fisher eigenvector and noise until convergence"),
    "fisher_lambda_max": _curvature("λ_max(F)", 10.0, "worse", "largest eigenvalue of the Fisher matrix, by Lanczos"),
    "fisher_trace": _curvature("tr F", 2.7, "worse", "trace of the Fisher matrix, from per-example gradients"),
    "hessian_lambda_max": _curvature("λ_max(H)", 24.0, "worse",
        "largest eigenvalue of the loss Hessian (with given or else predicted labels), by Lanczos"),
    "hessian_trace": _curvature("tr H", 2.7, "worse",
        "trace of the loss Hessian: tr F where every parameter enters affinely; else with given or predicted "
        "labels, at three gradients per probe"),
    "error": _outputs("error", "worse", "fraction of examples classified wrongly", needs_labels=True),
    "cross_entropy": _outputs("CE", "worse", "mean cross-entropy in nats", needs_labels=True),
    "hessian_lambda_min": _curvature("λ_min(H)", 90.0, "better",
        "smallest (most negative) eigenvalue of the loss Hessian, by Lanczos"),
    "effective_rank": _curvature("tr F/λ_max", 13.0, None, "number of directions over which the curvature is spread"),
    "local_inconsistency_adaptive": _curvature("S_ρ adapt.", 13.3, "worse",
        "S_ρ in the ball ‖δ/(|θ|+η)‖ ≤ ρ, invariant to rescaling"),
    "local_inconsistency_relative": _curvature("S_ρ rel.", 13.3, "worse", "S_ρ at radius ρ‖θ‖"),
    "local_inconsistency_batchwise": _curvature("S_ρ batch", 13.3, "worse",
        "mean of the S_ρ of each batch of m examples"),
    "average_inconsistency": _curvature("A_ρ", 3.3, "worse", "mean KL over random perturbations of length about ρ"),
    "mean_entropy": _outputs("entropy", "worse", "mean entropy of the outputs in nats"),
    "mean_confidence": _outputs("confidence", "better", "mean probability of the predicted class"),
    "input_jacobian_norm": _curvature("‖∂f/∂x‖", 7.0, "worse",
        "root mean square norm of the output probabilities' derivative with respect to the normalised input; "
        "one pass per class"),
    "flip_rate": _outputs("flips", "worse",
        "fraction of predictions that change when the image is mirrored", cost=0.33),
    "crop_rate": _outputs("crops", "worse",
        "fraction of predictions that change when the image is shifted by up to 4 pixels", cost=0.33),
    "energy": _outputs("energy", "worse", "mean of −log Σ exp z over the logits z"),
    "margin": _outputs("margin", "better", "mean difference between the two largest logits"),
    "nuclear_norm": _outputs("‖P‖_*", "better", "nuclear norm of the matrix of output probabilities, scaled to [0, 1]"),
    "mano": _outputs("MaNo", "better", "fourth-power mean of the normalised outputs"),
    "effective_invariance": _outputs("EI", "better",
        "mean confidence that image and mirror image share, 0 where their classes differ", cost=0.33),
    "dispersion": _outputs("dispersion", "better",
        "log of the spread of the predicted classes' mean features, which are the inputs of the last linear layer"),
    "last_layer_gradient_norm": _outputs("‖∂CE/∂W_L‖", "worse",
        "size of the gradient of the cross-entropy with predicted labels by the last linear layer"),
    "atc": _outputs("ATC", "better",
        "share of confidences above the threshold that fits the accuracy on a labeled validation set"),
    "doc": _outputs("DoC", "better",
        "accuracy on a labeled validation set plus the difference of the mean confidences"),
    "cot": _outputs("COT", "better",
        "largest mean confidence of an assignment with the class shares of a labeled validation set"),
    "distance_from_initialization": _norms("‖θ − θ₀‖",
        "distance from the initial parameters; known for run folders only"),
    "parameter_norm": _norms("‖θ‖", "norm of the parameter vector"),
    "fisher_rao": _norms("θᵀFθ",
        "Fisher-Rao norm: mean variance under the outputs of the logits' derivative along θ", cost=1.0),
    "stable_rank": _norms("stable rank",
        "mean over layers of ‖W‖²_F/‖W‖²_2; a kernel counts as one matrix per position"),
    "power_law_alpha": _norms("α",
        "mean over layers of the exponent of a power law fitted to the tail of the eigenvalues of WᵀW"),
    "log_spectral_norm": _norms("Σ log ‖W‖_2", "log of the product of the spectral norms of all layers"),
    "path_norm": _norms("path norm", "root of the sum over all paths of the product of their squared weights"),
}
# fmt: on
"""All measures by their names, in the order of a table."""
