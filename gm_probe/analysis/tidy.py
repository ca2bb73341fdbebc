"""Every statistic of a sweep as one tidy table: a line for each measure, gap, statistic and group."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from gm_probe.analysis.results import Correlation, Details, Quantity, SweepStatistics

NO_P = "too few permutations for a p"


@dataclass(frozen=True, slots=True)
class Line:
    """One statistic.

    Attributes:
        section: the table that it belongs to: correlations, subgroups, beyond, prediction or comparisons.
        group: the subgroup, the control or the other measure; '' where there is none.
    """

    section: str
    measure: str
    gap: str
    statistic: str
    group: str
    found: Quantity

    @property
    def label(self) -> str:
        return f"{self.statistic} {self.group}".rstrip()

    @property
    def reasons(self) -> tuple[str, ...]:
        """Why the value, its interval or its p are missing or limited."""
        found = (self.found.reason, self.found.interval_reason, self.found.p_reason)
        return tuple(dict.fromkeys(reason for reason in found if reason is not None))


def tidy(statistics: SweepStatistics, gaps: Sequence[str]) -> Iterator[Line]:
    """The lines of every gap, measure by measure, then those of the measures' comparisons."""
    for gap in gaps:
        for measure in statistics.measures:
            for statistic, found in _correlation(measure.gaps[gap]):
                yield Line("correlations", measure.name, gap, statistic, "", found)
            for label, results in measure.subgroups.items():
                yield Line("subgroups", measure.name, gap, "τ-b", label, tau_of(results[gap]))
            if gap in measure.details:
                for section, statistic, group, found in _details(measure.details[gap]):
                    yield Line(section, measure.name, gap, statistic, group, found)
        for each in statistics.comparisons.get(gap, ()):
            found = replace(each.difference, p=each.p_holm)
            yield Line("comparisons", each.first, gap, "Δτ", f"against {each.second}", found)


def tau_of(result: Correlation) -> Quantity:
    """τ-b with its interval and permutation p."""
    return Quantity(
        result.tau,
        result.low,
        result.high,
        result.p,
        result.n,
        result.reason,
        result.interval_reason,
        result.p_reason,
    )


def _correlation(result: Correlation) -> Iterator[tuple[str, Quantity]]:
    low, high, n, why = result.low_percentile, result.high_percentile, result.n, result.reason
    yield "τ-b", tau_of(result)
    yield (
        "τ-b, percentile bootstrap, naive p",
        Quantity(result.tau, low, high, result.p_naive, n, why, result.interval_reason),
    )
    yield "Spearman", Quantity(result.spearman, n=n, reason=why)
    yield "Pearson", Quantity(result.pearson, n=n, reason=why)


def _details(details: Details) -> Iterator[tuple[str, str, str, Quantity]]:
    noise = details.noise_filtered
    yield "beyond", "τ between settings", "", details.between
    yield "beyond", "τ within settings", "", details.within
    yield "beyond", "τ beyond noise,", f"of {noise.pairs:,} pairs", noise.tau
    for stratum in details.strata:
        turned = " (Simpson's paradox)" if stratum.opposes else ""
        yield "beyond", "τ within", f"{stratum.by}{turned}", stratum.tau
    for name, partial in details.partial.items():
        yield "beyond", "partial τ given", name, partial
    for name, granulation in details.granulated.psi.items():
        yield "beyond", "ψ", name, granulation.psi
    yield "beyond", "Ψ, their mean", "", details.granulated.mean
    conditioning, signs = details.conditioning, details.sign_error
    for each in conditioning.sets if conditioning is not None else ():
        no_p = None if each.p is not None or each.reason else NO_P
        found = Quantity(each.value, p=each.p, n=each.n, reason=each.reason, p_reason=no_p)
        yield "beyond", "K given", each.label, found
    if conditioning is not None and conditioning.least is None:
        yield "beyond", "least K", "", Quantity(None, reason=conditioning.reason)
    num = len(signs.environments)
    for name, value in (
        ("mean", signs.mean),
        ("90th percentile", signs.percentile_90),
        ("maximum", signs.maximum),
    ):
        yield "beyond", "sign error,", name, Quantity(value, n=num, reason=signs.reason)
    told, pick = details.prediction, details.selection
    if told is not None:
        for name, value in (
            ("prediction error", told.error),
            ("prediction error of the mean alone", told.error_mean),
            ("prediction skill", told.skill),
        ):
            yield "prediction", name, "", Quantity(value, n=told.n, reason=told.reason)
    for name, value in (
        ("test error of the chosen run", pick.test_error),
        ("regret of the chosen run", pick.regret),
        ("regret of a random run", pick.regret_random),
    ):
        yield "prediction", name, "", Quantity(value, n=pick.n, reason=pick.reason)
