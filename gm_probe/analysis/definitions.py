"""What each measure and each statistic of a report is, in words: the page must explain itself.

The measures' own table (``gm_probe.measures.measure.MEASURES``) imports torch, which analysis does not wait for;
a test holds the two to the same names.
"""

MEASURES = {
    "local_inconsistency": (
        "S_ρ",
        "mean over examples of KL(f_θ ‖ f_{θ+δ}), outputs before and after the parameters move by δ with ‖δ‖ = ρ, "
        "δ found by K ascent steps (Algorithm 1), mean over random starts; no labels",
    ),
    "local_inconsistency_converged": (
        "max S_ρ",
        "the largest such KL with ‖δ‖ ≤ ρ that ascents from ± the top eigenvector of F and from noise reach; no labels",
    ),
    "fisher_lambda_max": (
        "λ_max(F)",
        "largest eigenvalue of the Fisher matrix F, the mean over examples of Jᵀ(diag p − p pᵀ)J with J = ∂z/∂θ, "
        "by Lanczos; S_ρ ≈ ½ρ² λ_max(F) for small ρ; no labels",
    ),
    "fisher_trace": ("tr F", "trace of the Fisher matrix F, by examples’ own gradients; no labels"),
    "hessian_lambda_max": (
        "λ_max(H)",
        "largest eigenvalue of H, the Hessian of the mean cross-entropy, by Lanczos; takes labels, or the predicted "
        "ones in their place",
    ),
    "hessian_trace": (
        "tr H",
        "trace of the loss Hessian H: equal to tr F, whatever the labels, where every parameter enters the logits "
        "affinely; elsewhere with labels given or predicted",
    ),
    "error": ("error", "fraction of examples classified wrongly; labels needed"),
    "cross_entropy": ("CE", "mean cross-entropy in nats; labels needed"),
    "hessian_lambda_min": (
        "λ_min(H)",
        "smallest (most negative) eigenvalue of the loss Hessian H, by Lanczos",
    ),
    "effective_rank": ("tr F/λ_max(F)", "over how many directions the curvature is spread; no labels"),
    "local_inconsistency_adaptive": (
        "S_ρ (adaptive)",
        "S_ρ in the ball ‖δ/(|θ| + η)‖ ≤ ρ, which rescaling the parameters does not change; no labels",
    ),
    "local_inconsistency_relative": ("S_ρ (relative)", "S_ρ at radius ρ‖θ‖; no labels"),
    "local_inconsistency_batchwise": (
        "S_ρ (batchwise)",
        "mean over batches of m examples of each batch’s own S_ρ; no labels",
    ),
    "average_inconsistency": (
        "A_ρ",
        "mean of KL(f_θ ‖ f_{θ+ε}) over random ε ~ N(0, ρ²I/P), of length about ρ; ≈ ρ² tr F/(2P); no labels",
    ),
    "mean_entropy": ("entropy", "mean entropy of the outputs in nats; no labels"),
    "mean_confidence": ("confidence", "mean probability of the predicted class; no labels"),
    "input_jacobian_norm": (
        "‖∂f/∂x‖",
        "root mean square norm of the output probabilities’ derivative by the normalised input; no labels",
    ),
    "flip_rate": ("flips", "fraction of predictions that change in the mirror image; no labels"),
    "crop_rate": (
        "crops",
        "fraction of predictions that change where the image moves by up to 4 pixels; no labels",
    ),
    "distance_from_initialization": ("‖θ − θ₀‖", "length of the way from the initial parameters; no data"),
    "parameter_norm": ("‖θ‖", "length of the parameter vector; no data"),
    "disagreement": ("disagreement", "fraction of examples that two models of the run classify differently"),
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

STATISTICS = {
    "gap": "test error − train error, or test cross-entropy − train cross-entropy; both in evaluation mode on "
    "un-augmented data. Small is good.",
    "τ-b": "Kendall’s rank correlation with a correction for ties: (concordant − discordant pairs) / "
    "√((pairs untied in the measure)(pairs untied in the gap)). 1: the measure orders the runs as the gap does.",
    "setting": "one choice of all hyperparameters; its runs differ in their seeds only and are not independent.",
    "95 % CI": "confidence interval of τ by leaving out each setting with all its seeds (jackknife, Student’s t on "
    "Fisher’s scale). Where settings take the same seeds, whose runs start from the same weights, it also "
    "holds what another choice of seeds would change, by leaving out each seed in all settings, if there are "
    "5 or more. Settings count as drawn independently: where neighbours on a grid hardly differ, it is too "
    "narrow. Bootstrap: the middle 95 % over resamples of whole settings, in which a run forms no pair with "
    "its own copy; it covers less than 95 % where settings are few or seeds shared.",
    "p": "two-sided permutation p: the gaps of whole settings are exchanged, so seeds stay together. It tests whether "
    "settings with a larger measure have a larger gap, given the seeds and, where settings differ in their number of "
    "runs, those that no other matches; so it can differ from what the interval says. p (naive) takes runs as "
    "independent and is too small where settings repeat. No p is adjusted for the number of tests but p (Holm).",
    "noise-filtered": "τ over only those pairs of runs whose error gaps differ by more than 1.96 binomial standard "
    "errors.",
    "between, within": "τ of the settings’ means; τ over pairs of runs of the same setting. Seeds that settings share "
    "are the same few draws in each: they change places in all settings alike for the p of τ within.",
    "ψ, Ψ": "granulated τ (Jiang et al. 2020): ψ of a hyperparameter is the mean τ over cells in which it alone "
    "varies, over at least 3 values; Ψ is the mean over hyperparameters.",
    "K(S)": "conditional mutual information between the signs of the differences in measure and gap, given the "
    "hyperparameters S (Jiang et al. 2020), in bits a bit, less its mean when the gaps of whole settings are "
    "exchanged (which tests for no association at all, not for none given S). The least over S of at most two "
    "hyperparameters is the conservative figure; negative: no evidence.",
    "sign error": "part of the pairs of runs of two settings that differ in one hyperparameter which the measure "
    "orders wrongly (Dziugaite et al. 2020), over environments of effective size ≥ 12. ½ is chance; robust measures "
    "have a small maximum, not only a small mean.",
    "Simpson": "τ within the values of a setting has the other sign than τ over all runs, and both intervals "
    "exclude 0.",
    "partial τ": "τ of measure and gap once what both share with a third quantity is taken out. Where the two are "
    "independent given the third it need not be 0, so its interval is no test; the test is p, by permutation within "
    "strata of the third.",
    "Δτ": "difference of two measures’ τ on the same resamples; p (Holm) is adjusted for all pairs of measures, of "
    "which those with equal values count once.",
    "skill": "1 − (error of the gap predicted from the measure by isotonic regression, whole settings left out) / "
    "(error of predicting the mean gap). Above 0: the measure helps.",
    "regret": "test error of the run with the least measure − that of the best run.",
}
