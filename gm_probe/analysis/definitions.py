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

STATISTICS = {
    "gap": "test error − train error, or test cross-entropy − train cross-entropy; both in evaluation "
    "mode on un-augmented data. Smaller is better.",
    "τ-b": "Kendall’s rank correlation with a correction for ties: (concordant − discordant pairs) / "
    "√((pairs untied in the measure)(pairs untied in the gap)). τ = 1: the measure orders the runs "
    "as the gap does.",
    "setting": (
        "one choice of all hyperparameters. Its runs differ in their seeds only and are not independent."
    ),
    "95 % CI": "confidence interval of τ, from a jackknife that leaves out each setting with all its "
    "seeds (Student’s t on Fisher’s scale). Settings may share seeds, whose runs start from "
    "the same weights. With 5 or more shared seeds the interval also covers seed variation, by "
    "leaving out each seed in all settings. Settings count as independent draws, so the "
    "interval is too narrow where neighbours on a grid hardly differ. Bootstrap: the middle 95 "
    "% over resamples of whole settings, in which a run forms no pair with its own copy. It "
    "covers less than 95 % where settings are few or seeds are shared.",
    "p": "two-sided permutation p: the gaps of whole settings are exchanged, so seeds stay together. It "
    "tests whether settings with a larger measure have a larger gap, given the seeds. A setting "
    "whose number of runs no other setting matches stays in place. So p and the interval can "
    "disagree. p (naive) treats runs as independent and is too small where settings repeat. Only p "
    "(Holm) is adjusted for the number of tests.",
    "noise-filtered": "τ over only those pairs of runs whose error gaps differ by more than 1.96 binomial standard "
    "errors.",
    "between, within": "τ of the settings’ means; τ over pairs of runs of the same setting. Shared seeds "
    "are the same few draws in every setting, so the p of τ within permutes them in "
    "all settings alike.",
    "ψ, Ψ": "granulated τ (Jiang et al. 2020): ψ of a hyperparameter is the mean τ over cells in which "
    "only it varies, over at least 3 values; Ψ is the mean over hyperparameters.",
    "K(S)": "conditional mutual information between the signs of the differences in measure and gap, "
    "given the hyperparameters S (Jiang et al. 2020), in bits per bit. Its mean under exchange of "
    "the gaps of whole settings is subtracted; that null is no association at all, not none given "
    "S. The minimum over S of at most two hyperparameters is the conservative value; a negative "
    "value is no evidence.",
    "sign error": "fraction of pairs of runs that the measure orders wrongly, where the two settings "
    "differ in one hyperparameter (Dziugaite et al. 2020). Environments have effective size "
    "≥ 12. ½ is chance; robust measures have a small maximum, not only a small mean.",
    "Simpson": "τ within the values of a setting has the opposite sign of τ over all runs, and both "
    "intervals exclude 0.",
    "partial τ": "τ of measure and gap after removing what both share with a third quantity. It need not "
    "be 0 where the two are independent given the third, so its interval is not a test. The "
    "test is p, by permutation within strata of the third.",
    "Δτ": "difference of two measures’ τ on the same resamples; p (Holm) is adjusted for all pairs of "
    "measures; pairs with equal values count once.",
    "skill": "1 − (error of the gap predicted from the measure by isotonic regression, whole settings left out) / "
    "(error of predicting the mean gap). Above 0: the measure helps.",
    "regret": "test error of the run with the smallest measure − that of the best run.",
}
