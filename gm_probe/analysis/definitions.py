"""What each measure and each statistic of a report is, in words: the page must explain itself."""

from gm_probe.runs.catalogue import CATALOGUE

MEASURES = {
    **{
        name: (one.symbol, one.description + "; labels needed" * one.needs_labels)
        for name, one in CATALOGUE.items()
    },
    # below, what a page says at greater length than a list of measures does
    "local_inconsistency": (
        "S_ρ",
        "mean over examples of KL(f_θ ‖ f_{θ+δ}), between the outputs before and after the parameters "
        "move by δ. K ascent steps find δ with ‖δ‖ = ρ (Algorithm 1). Mean over random starts; no labels "
        "needed",
    ),
    "local_inconsistency_converged": (
        "max S_ρ",
        (
            "the largest such KL with ‖δ‖ ≤ ρ reached by ascents from ± the top eigenvector of F and from "
            "noise; no labels needed"
        ),
    ),
    "fisher_lambda_max": (
        "λ_max(F)",
        "largest eigenvalue of the Fisher matrix F, the mean over examples of Jᵀ(diag p − p pᵀ)J with J = "
        "∂z/∂θ, by Lanczos; S_ρ ≈ ½ρ² λ_max(F) for small ρ; no labels needed",
    ),
    "hessian_lambda_max": (
        "λ_max(H)",
        "largest eigenvalue of H, the Hessian of the mean cross-entropy, by Lanczos, with given labels or "
        "else predicted ones",
    ),
    "hessian_trace": (
        "tr H",
        "trace of the loss Hessian H. It equals tr F for any labels where every parameter enters the "
        "logits affinely; elsewhere it uses given or predicted labels",
    ),
    "effective_rank": (
        "tr F/λ_max(F)",
        "number of directions over which the curvature is spread; no labels needed",
    ),
    "local_inconsistency_adaptive": (
        "S_ρ (adaptive)",
        (
            "S_ρ in the ball ‖δ/(|θ| + η)‖ ≤ ρ, which is invariant to rescaling of parameters; no labels "
            "needed"
        ),
    ),
    "local_inconsistency_relative": ("S_ρ (relative)", "S_ρ at radius ρ‖θ‖; no labels needed"),
    "local_inconsistency_batchwise": (
        "S_ρ (batchwise)",
        "mean of the S_ρ of each batch of m examples; no labels needed",
    ),
    "average_inconsistency": (
        "A_ρ",
        (
            "mean of KL(f_θ ‖ f_{θ+ε}) over random ε ~ N(0, ρ²I/P), of length about ρ; ≈ ρ² tr F/(2P); no "
            "labels needed"
        ),
    ),
    "input_jacobian_norm": (
        "‖∂f/∂x‖",
        (
            "root mean square norm of the output probabilities’ derivative with respect to the normalised "
            "input; no labels needed"
        ),
    ),
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

DIRECTIONS = {
    **dict.fromkeys(
        (
            *("local_inconsistency", "local_inconsistency_converged", "local_inconsistency_adaptive"),
            *("local_inconsistency_relative", "local_inconsistency_batchwise", "average_inconsistency"),
            *("fisher_lambda_max", "fisher_trace", "hessian_lambda_max", "hessian_trace"),
            *("error", "cross_entropy", "mean_entropy", "input_jacobian_norm", "flip_rate", "crop_rate"),
            *("distance_from_initialization", "parameter_norm", "disagreement"),
            *("conditional_inconsistency", "inconsistency", "instability"),
        ),
        "worse",
    ),
    "mean_confidence": "better",
}
"""What a larger value of a measure is expected to go with: worse or better generalization."""


def symbol(name: str) -> str:
    """Return the symbol of a measure, or its name where it has none."""
    return MEASURES[name][0] if name in MEASURES else name


def direction_of(name: str) -> str | None:
    """Return what a larger value of a measure is expected to go with; None where nothing is known."""
    return DIRECTIONS.get(name)


STATISTICS = {
    "gap": "test error − train error, or test cross-entropy − train cross-entropy; both in evaluation "
    "mode on un-augmented data. Smaller is better.",
    "τ": "Kendall’s rank correlation τ-b: (concordant − discordant pairs) / √((pairs untied in the measure)(pairs "
    "untied in the target)). τ = 1: the measure orders the runs as the target does.",
    "setting": (
        "one choice of all hyperparameters. Its runs differ in their seeds only and are not independent."
    ),
    "95 % CI, p": "confidence interval, clustered by setting and by the seeds that settings share: V = V_setting + "
    "V_seed − V_run, Student’s t on Fisher’s scale. p is the interval’s own. Settings count as independent draws, so "
    "the interval is too narrow where neighbours on a grid hardly differ.",
    "τ within": "τ over the pairs of runs that agree in a hyperparameter, or in all of them (setting). Simpson’s "
    "paradox is noted where its sign is opposite to τ’s and both intervals exclude 0.",
    "naive p": "treats runs as independent; it is too small where settings repeat or share seeds.",
    "Spearman’s ρ": "rank correlation; its p exchanges the gaps of whole settings with the same seeds, and tests for "
    "no association at all.",
    "ψ, Ψ": "granulated τ (Jiang et al. 2020): ψ of a hyperparameter is the mean over cells of the τ of the runs that "
    "differ in it alone; Ψ is the mean over hyperparameters.",
    "K(S)": "conditional mutual information between the signs of the differences in measure and target, given the "
    "hyperparameters S, as published (Jiang et al. 2020): the least over S of at most two. Few runs a cell "
    "give values far above 0 by chance.",
    "sign error": "fraction of pairs of runs that the measure orders wrongly, where the two settings "
    "differ in one hyperparameter, as published (Dziugaite et al. 2020). Environments have effective size "
    "≥ 12. ½ is chance; robust measures have a small maximum, not only a small mean.",
    "partial τ": "τ of measure and target after removing what both share with a third quantity. It need not "
    "be 0 where the two are independent given the third.",
    "Δτ": "difference of two measures’ τ over the same runs; p is not adjusted for the number of pairs.",
    "regret": "test error of the run at the good end of the measure (at either end where its direction is unknown) − "
    "that of the best run.",
}
