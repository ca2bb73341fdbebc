"""What each measure and each statistic of a report is, in words: the page must explain itself."""

from gm_probe.measures.catalogue import MEASURES, PAIR_MEASURES
from gm_probe.tables.columns import direction
from gm_probe.tables.table import RunTable

DEFINITIONS = {
    name: (one.symbol, f"{one.description}; {'' if one.needs_labels else 'no '}labels needed")
    for name, one in MEASURES.items()
} | PAIR_MEASURES
"""The symbol and the definition of each measure that is known."""


def symbol(name: str) -> str:
    """Return the symbol of a measure, or its name where it has none."""
    return DEFINITIONS[name][0] if name in DEFINITIONS else name


def direction_of(name: str) -> str | None:
    """Return what a larger value of a measure is expected to go with; None where nothing is known."""
    if name in PAIR_MEASURES:
        return "worse"
    return MEASURES[name].direction if name in MEASURES else None


def direction_of_target(table: RunTable, target: str) -> str | None:
    """Return what a larger value of a target is: ``worse`` or ``better``; None where that is unknown."""
    return table.directions.get(target, direction(target))


STATISTICS = {
    "gap": "test error − train error, or test cross-entropy − train cross-entropy; both in evaluation "
    "mode on un-augmented data. Smaller is better.",
    "τ": "Kendall’s rank correlation τ-b: (concordant − discordant pairs) / √((pairs untied in the measure)(pairs "
    "untied in the target)). τ = 1: the measure orders the runs as the target does.",
    "setting": "one choice of all hyperparameters. Its runs differ in their seeds only and are not independent.",
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
