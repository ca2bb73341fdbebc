"""The measures by name, as data: what each needs, costs and means. Imports no torch, which takes seconds.

``gm_probe.measures.measure.MEASURES`` adds the functions that compute them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


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
    direction: Literal["better", "worse"] | None
    group: Literal["curvature", "outputs", "norms"]


CATALOGUE: dict[str, Listed] = {
    "local_inconsistency": Listed(
        False,
        13.3,
        "S_ρ",
        "KL between the outputs of the model and of a copy perturbed by ρ (Algorithm 1), mean over random starts",
        "worse",
        "curvature",
    ),
    "local_inconsistency_converged": Listed(
        False,
        35.0,
        "max S_ρ",
        "largest such KL found in the ball, by ascent from ± the top Fisher eigenvector and noise until convergence",
        "worse",
        "curvature",
    ),
    "fisher_lambda_max": Listed(
        False, 10.0, "λ_max(F)", "largest eigenvalue of the Fisher matrix, by Lanczos", "worse", "curvature"
    ),
    "fisher_trace": Listed(
        False, 2.7, "tr F", "trace of the Fisher matrix, from per-example gradients", "worse", "curvature"
    ),
    "hessian_lambda_max": Listed(
        False,
        24.0,
        "λ_max(H)",
        "largest eigenvalue of the loss Hessian (with given or else predicted labels), by Lanczos",
        "worse",
        "curvature",
    ),
    "hessian_trace": Listed(
        False,
        2.7,
        "tr H",
        "trace of the loss Hessian: tr F where every parameter enters affinely; else with given or "
        "predicted labels, at three gradients per probe",
        "worse",
        "curvature",
    ),
    "error": Listed(True, 0.0, "error", "fraction of examples classified wrongly", "worse", "outputs"),
    "cross_entropy": Listed(True, 0.0, "CE", "mean cross-entropy in nats", "worse", "outputs"),
    "hessian_lambda_min": Listed(
        False,
        90.0,
        "λ_min(H)",
        "smallest (most negative) eigenvalue of the loss Hessian, by Lanczos",
        "better",
        "curvature",
    ),
    "effective_rank": Listed(
        False,
        13.0,
        "tr F/λ_max",
        "number of directions over which the curvature is spread",
        None,
        "curvature",
    ),
    "local_inconsistency_adaptive": Listed(
        False,
        13.3,
        "S_ρ adapt.",
        "S_ρ in the ball ‖δ/(|θ|+η)‖ ≤ ρ, invariant to rescaling",
        "worse",
        "curvature",
    ),
    "local_inconsistency_relative": Listed(
        False, 13.3, "S_ρ rel.", "S_ρ at radius ρ‖θ‖", "worse", "curvature"
    ),
    "local_inconsistency_batchwise": Listed(
        False, 13.3, "S_ρ batch", "mean of the S_ρ of each batch of m examples", "worse", "curvature"
    ),
    "average_inconsistency": Listed(
        False, 3.3, "A_ρ", "mean KL over random perturbations of length about ρ", "worse", "curvature"
    ),
    "mean_entropy": Listed(False, 0.0, "entropy", "mean entropy of the outputs in nats", "worse", "outputs"),
    "mean_confidence": Listed(
        False, 0.0, "confidence", "mean probability of the predicted class", "better", "outputs"
    ),
    "input_jacobian_norm": Listed(
        False,
        7.0,
        "‖∂f/∂x‖",
        "root mean square norm of the output probabilities' derivative with respect to the normalised "
        "input; one pass per class",
        "worse",
        "curvature",
    ),
    "flip_rate": Listed(
        False,
        0.33,
        "flips",
        "fraction of predictions that change when the image is mirrored",
        "worse",
        "outputs",
    ),
    "crop_rate": Listed(
        False,
        0.33,
        "crops",
        "fraction of predictions that change when the image is shifted by up to 4 pixels",
        "worse",
        "outputs",
    ),
    "energy": Listed(False, 0.0, "energy", "mean of −log Σ exp z over the logits z", "worse", "outputs"),
    "margin": Listed(
        False, 0.0, "margin", "mean difference between the two largest logits", "better", "outputs"
    ),
    "nuclear_norm": Listed(
        False,
        0.0,
        "‖P‖_*",
        "nuclear norm of the matrix of output probabilities, scaled to [0, 1]",
        "better",
        "outputs",
    ),
    "mano": Listed(False, 0.0, "MaNo", "fourth-power mean of the normalised outputs", "better", "outputs"),
    "effective_invariance": Listed(
        False,
        0.33,
        "EI",
        "mean confidence that image and mirror image share, 0 where their classes differ",
        "better",
        "outputs",
    ),
    "dispersion": Listed(
        False,
        0.0,
        "dispersion",
        "log of the spread of the predicted classes' mean features, which are the inputs of the last linear layer",
        "better",
        "outputs",
    ),
    "last_layer_gradient_norm": Listed(
        False,
        0.0,
        "‖∂CE/∂W_L‖",
        "size of the gradient of the cross-entropy with predicted labels by the last linear layer",
        "worse",
        "outputs",
    ),
    "atc": Listed(
        False,
        0.0,
        "ATC",
        "share of confidences above the threshold that fits the accuracy on a labeled validation set",
        "better",
        "outputs",
    ),
    "doc": Listed(
        False,
        0.0,
        "DoC",
        "accuracy on a labeled validation set plus the difference of the mean confidences",
        "better",
        "outputs",
    ),
    "cot": Listed(
        False,
        0.0,
        "COT",
        "largest mean confidence of an assignment with the class shares of a labeled validation set",
        "better",
        "outputs",
    ),
    "distance_from_initialization": Listed(
        False,
        0.0,
        "‖θ − θ₀‖",
        "distance from the initial parameters; known for run folders only",
        "worse",
        "norms",
    ),
    "parameter_norm": Listed(False, 0.0, "‖θ‖", "norm of the parameter vector", "worse", "norms"),
    "fisher_rao": Listed(
        False,
        1.0,
        "θᵀFθ",
        "Fisher-Rao norm: mean variance under the outputs of the logits' derivative along θ",
        "worse",
        "norms",
    ),
    "stable_rank": Listed(
        False,
        0.0,
        "stable rank",
        "mean over layers of ‖W‖²_F/‖W‖²_2; a kernel counts as one matrix per position",
        "worse",
        "norms",
    ),
    "power_law_alpha": Listed(
        False,
        0.0,
        "α",
        "mean over layers of the exponent of a power law fitted to the tail of the eigenvalues of WᵀW",
        "worse",
        "norms",
    ),
    "log_spectral_norm": Listed(
        False, 0.0, "Σ log ‖W‖_2", "log of the product of the spectral norms of all layers", "worse", "norms"
    ),
    "path_norm": Listed(
        False,
        0.0,
        "path norm",
        "root of the sum over all paths of the product of their squared weights",
        "worse",
        "norms",
    ),
}
"""All measures by their names, in the order of a table."""
