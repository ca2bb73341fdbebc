"""The table of measures: what each needs, costs and means, and the function that computes it. Imports no torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from gm_probe.measures.context import MeasurementContext
    from gm_probe.measures.estimates import Estimate

Direction = Literal["better", "worse"]


@dataclass(frozen=True, slots=True)
class Measure:
    """One row of ``MEASURES``.

    Attributes:
        home: ``module:function`` that computes it from the shared context.
        needs_labels: undefined on unlabeled data.
        cost: typical gradient evaluations at the default settings, for time estimates.
        symbol: short name for tables and axes.
        direction: whether a larger value is expected to go with better or worse generalization; None = either.
        group: a word that stands for all measures of its kind.
        independent: why it needs examples whose outputs do not depend on the rest of their batch; "" where it does not.
        needs_validation: undefined without a labeled validation set.
    """

    home: str
    needs_labels: bool
    cost: float
    symbol: str
    description: str
    direction: Direction | None
    group: Literal["curvature", "outputs", "norms"]
    independent: str = ""
    needs_validation: bool = False

    @property
    def compute(self) -> Callable[[MeasurementContext], Estimate]:
        """The function; its module is imported here, since it needs torch."""
        module, name = self.home.split(":")
        found: Callable[[MeasurementContext], Estimate] = vars(import_module(module))[name]
        return found


def _curvature(
    home: str, symbol: str, cost: float, direction: Direction | None, text: str, independent: str = ""
) -> Measure:
    home = f"gm_probe.measures.{home}"
    return Measure(home, False, cost, symbol, text, direction, "curvature", independent)


def _outputs(
    home: str, symbol: str, direction: Direction, text: str, cost: float = 0.0, **needs: Any
) -> Measure:
    home, needs = f"gm_probe.measures.{home}", {"needs_labels": False} | needs
    return Measure(
        home, cost=cost, symbol=symbol, description=text, direction=direction, group="outputs", **needs
    )


def _norms(name: str, symbol: str, text: str, cost: float = 0.0) -> Measure:
    return Measure(f"gm_probe.measures.weights:{name}", False, cost, symbol, text, "worse", "norms")


COUNTS = "counts classes"

# fmt: off
MEASURES: dict[str, Measure] = {
    "local_inconsistency": _curvature("inconsistency:local_inconsistency", "S_ρ", 13.3, "worse",
        "KL between the outputs of the model and of a copy perturbed by ρ (Algorithm 1), mean over random starts"),
    "local_inconsistency_converged": _curvature("inconsistency:converged", "max S_ρ", 35.0, "worse",
        "largest such KL found in the ball, by ascent from ± the top Fisher eigenvector and noise until convergence"),
    "fisher_lambda_max": _curvature("spectra:fisher_lambda_max", "λ_max(F)", 10.0, "worse",
        "largest eigenvalue of the Fisher matrix, by Lanczos"),
    "fisher_trace": _curvature("spectra:fisher_trace", "tr F", 2.7, "worse",
        "trace of the Fisher matrix, from per-example gradients"),
    "hessian_lambda_max": _curvature("spectra:hessian_lambda_max", "λ_max(H)", 24.0, "worse",
        "largest eigenvalue of the loss Hessian (with given or else predicted labels), by Lanczos"),
    "hessian_trace": _curvature("spectra:hessian_trace", "tr H", 2.7, "worse",
        "trace of the loss Hessian: tr F where every parameter enters affinely; else with given or predicted "
        "labels, at three gradients per probe"),
    "error": _outputs("outputs:error", "error", "worse", "fraction of examples classified wrongly",
        needs_labels=True, independent=COUNTS),
    "cross_entropy": _outputs("outputs:cross_entropy", "CE", "worse", "mean cross-entropy in nats", needs_labels=True),
    "hessian_lambda_min": _curvature("spectra:hessian_lambda_min", "λ_min(H)", 90.0, "better",
        "smallest (most negative) eigenvalue of the loss Hessian, by Lanczos"),
    "effective_rank": _curvature("spectra:effective_rank", "tr F/λ_max", 13.0, None,
        "number of directions over which the curvature is spread"),
    "local_inconsistency_adaptive": _curvature("inconsistency:adaptive", "S_ρ adapt.", 13.3, "worse",
        "S_ρ in the ball ‖δ/(|θ|+η)‖ ≤ ρ, invariant to rescaling"),
    "local_inconsistency_relative": _curvature("inconsistency:relative", "S_ρ rel.", 13.3, "worse",
        "S_ρ at radius ρ‖θ‖"),
    "local_inconsistency_batchwise": _curvature("inconsistency:batchwise", "S_ρ batch", 13.3, "worse",
        "mean of the S_ρ of each batch of m examples", independent="splits the batch"),
    "average_inconsistency": _curvature("inconsistency:average", "A_ρ", 3.3, "worse",
        "mean KL over random perturbations of length about ρ"),
    "mean_entropy": _outputs("outputs:mean_entropy", "entropy", "worse", "mean entropy of the outputs in nats"),
    "mean_confidence": _outputs("outputs:mean_confidence", "confidence", "better",
        "mean probability of the predicted class"),
    "input_jacobian_norm": _curvature("outputs:input_jacobian_norm", "‖∂f/∂x‖", 7.0, "worse",
        "root mean square norm of the output probabilities' derivative with respect to the normalised input; "
        "one pass per class", independent="differentiates an output by its own input"),
    "flip_rate": _outputs("outputs:flip_rate", "flips", "worse",
        "fraction of predictions that change when the image is mirrored", cost=0.33, independent=COUNTS),
    "crop_rate": _outputs("outputs:crop_rate", "crops", "worse",
        "fraction of predictions that change when the image is shifted by up to 4 pixels", cost=0.33,
        independent=COUNTS),
    "energy": _outputs("estimators:energy", "energy", "worse", "mean of −log Σ exp z over the logits z"),
    "margin": _outputs("estimators:margin", "margin", "better", "mean difference between the two largest logits"),
    "nuclear_norm": _outputs("estimators:nuclear_norm", "‖P‖_*", "better",
        "nuclear norm of the matrix of output probabilities, scaled to [0, 1]", independent=COUNTS),
    "mano": _outputs("estimators:mano", "MaNo", "better", "fourth-power mean of the normalised outputs",
        independent=COUNTS),
    "effective_invariance": _outputs("estimators:effective_invariance", "EI", "better",
        "mean confidence that image and mirror image share, 0 where their classes differ", cost=0.33,
        independent=COUNTS),
    "dispersion": _outputs("estimators:dispersion", "dispersion", "better",
        "log of the spread of the predicted classes' mean features, which are the inputs of the last linear layer",
        independent=COUNTS),
    "last_layer_gradient_norm": _outputs("estimators:last_layer_gradient_norm", "‖∂CE/∂W_L‖", "worse",
        "size of the gradient of the cross-entropy with predicted labels by the last linear layer", independent=COUNTS),
    "atc": _outputs("estimators:atc", "ATC", "better",
        "share of confidences above the threshold that fits the accuracy on a labeled validation set",
        independent=COUNTS, needs_validation=True),
    "doc": _outputs("estimators:doc", "DoC", "better",
        "accuracy on a labeled validation set plus the difference of the mean confidences",
        independent=COUNTS, needs_validation=True),
    "cot": _outputs("estimators:cot", "COT", "better",
        "largest mean confidence of an assignment with the class shares of a labeled validation set",
        independent=COUNTS, needs_validation=True),
    "distance_from_initialization": _norms("distance_from_initialization", "‖θ − θ₀‖",
        "distance from the initial parameters; known for run folders only"),
    "parameter_norm": _norms("parameter_norm", "‖θ‖", "norm of the parameter vector"),
    "fisher_rao": _norms("fisher_rao", "θᵀFθ",
        "Fisher-Rao norm: mean variance under the outputs of the logits' derivative along θ", cost=1.0),
    "stable_rank": _norms("stable_rank", "stable rank",
        "mean over layers of ‖W‖²_F/‖W‖²_2; a kernel counts as one matrix per position"),
    "power_law_alpha": _norms("power_law_alpha", "α",
        "mean over layers of the exponent of a power law fitted to the tail of the eigenvalues of WᵀW"),
    "log_spectral_norm": _norms("log_spectral_norm", "Σ log ‖W‖_2",
        "log of the product of the spectral norms of all layers"),
    "path_norm": _norms("path_norm", "path norm",
        "root of the sum over all paths of the product of their squared weights"),
}
# fmt: on
"""All measures by their names, in the order of a table."""
PAIR_MEASURES = {
    "disagreement": ("disagreement", "fraction of examples that two models classify differently"),
    "conditional_inconsistency": (
        "C_θ",
        "mean over pairs of models trained on the same set of mean KL(f_θ ‖ f_θ')",
    ),
    "inconsistency": ("C_P", "C_θ averaged over training sets (Johnson and Zhang 2023)"),
    "instability": (
        "S_P",
        "mean KL between the mean predictions of models trained on different training sets",
    ),
}
"""The symbol and the definition of each measure of pairs of models (``pairwise.compare``), by its name."""
