"""What ``correlation.correlate`` says of a sweep: frozen records, computed elsewhere and only carried here.

Every figure that can be undefined is None exactly where the ``reason`` beside it says why. Intervals are of
95 %. A *setting* is one choice of all hyperparameters; its runs differ in their seeds only.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from gm_probe.tables.table import Exclusion


@dataclass(frozen=True, slots=True)
class Quantity:
    """A figure, its interval ``low`` to ``high``, and its two-sided p.

    ``value`` is None exactly when ``reason`` says why; ``low`` and ``high`` when ``reason`` or
    ``interval_reason`` does. ``p`` is None where ``p_reason`` says why, or where its holder makes no test;
    ``p_reason`` may also limit a ``p`` that is there. ``n`` counts what the figure rests on: runs, pairs or
    cells, as its holder says.
    """

    value: float | None
    low: float | None = None
    high: float | None = None
    p: float | None = None
    n: int = 0
    reason: str | None = None
    interval_reason: str | None = None
    p_reason: str | None = None


@dataclass(frozen=True, slots=True)
class Correlation:
    """τ-b between a measure and a gap over the ``n`` runs that have both, in ``num_settings`` settings.

    ``tau``, ``p_naive``, ``spearman`` and ``pearson`` are None exactly when ``reason`` says why τ is undefined.
    ``low`` to ``high`` is τ's interval, ``low_percentile`` to ``high_percentile`` the plain percentile one of
    the cluster bootstrap over ``num_resamples`` resamples; all None where ``interval_reason`` says why. ``p``
    is the permutation p over ``num_permutations``; None where ``p_reason`` says why, and ``p_reason`` may also
    limit a ``p`` that is there. ``p_naive`` takes runs as independent. ``ties_measure`` and ``ties_gap`` count
    the pairs of runs equal in that variable, pairs equal in both included. ``missing`` lists the runs without
    a usable value: n + len(missing) is the number of runs looked at.
    """

    tau: float | None
    p_naive: float | None
    n: int
    ties_measure: int
    ties_gap: int
    reason: str | None = None
    missing: tuple[Exclusion, ...] = ()
    spearman: float | None = None
    pearson: float | None = None
    num_settings: int = 0
    low: float | None = None
    high: float | None = None
    low_percentile: float | None = None
    high_percentile: float | None = None
    interval_reason: str | None = None
    num_resamples: int = 0
    p: float | None = None
    p_reason: str | None = None
    num_permutations: int = 0


@dataclass(frozen=True, slots=True)
class NoiseFiltered:
    """τ-b over the ``kept`` of ``pairs`` pairs whose gaps differ by more than 1.96 binomial standard errors."""

    tau: Quantity  # n: pairs kept
    kept: int
    pairs: int


@dataclass(frozen=True, slots=True)
class Granulation:
    """ψ of one hyperparameter: the mean τ over cells in which only it differs; ``psi.n`` counts the cells.

    ``skipped`` cells have fewer than 3 of its values, or a constant measure or gap. ``runs`` are in the cells
    used, ``coverage`` is their part of all runs.
    """

    psi: Quantity
    skipped: int
    runs: int
    coverage: float


@dataclass(frozen=True, slots=True)
class Granulated:
    """ψ_i under its hyperparameter's name, and Ψ, the mean of those defined (``mean.n`` of them)."""

    psi: Mapping[str, Granulation]
    mean: Quantity


@dataclass(frozen=True, slots=True)
class ConditionalInformation:
    """K(S) given the hyperparameters ``given``: ``value`` = ``raw`` − ``null_mean``, in bits a bit (0 to 1).

    ``null_mean`` is the mean over permutations of whole settings' gaps, ``p`` the part of them with at least
    ``raw`` (None where there are too few). ``n`` pairs in ``num_cells`` cells; ``skipped`` cells have no pair
    of runs untied in both.
    """

    given: tuple[str, ...]
    value: float | None
    raw: float | None
    null_mean: float | None
    p: float | None
    n: int
    num_cells: int
    reason: str | None = None
    skipped: int = 0

    @property
    def label(self) -> str:
        return " + ".join(self.given) or "nothing"


@dataclass(frozen=True, slots=True)
class Conditioning:
    """K(S) for every S of at most two hyperparameters; ``least`` has the smallest value, None with ``reason``."""

    sets: tuple[ConditionalInformation, ...]
    least: ConditionalInformation | None
    num_permutations: int
    reason: str | None = None


@dataclass(frozen=True, slots=True)
class Environment:
    """Two settings that differ in ``hyperparameter`` alone: the part of their pairs of runs ordered wrongly.

    ``error`` weighs each pair by how sure the sign of its gap difference is; ties in the measure count half.
    """

    hyperparameter: str
    label: str
    error: float
    pairs: int
    effective_size: float


@dataclass(frozen=True, slots=True)
class SignError:
    """Sign error over ``environments`` of effective size ≥ 12; ``skipped`` others are too small.

    ``mean``, ``percentile_90`` and ``maximum`` are None exactly when ``reason`` says why. ``note`` says how
    pairs were weighed.
    """

    environments: tuple[Environment, ...]
    mean: float | None
    percentile_90: float | None
    maximum: float | None
    skipped: int
    reason: str | None = None
    note: str | None = None


@dataclass(frozen=True, slots=True)
class Stratified:
    """τ over the pairs within the same stratum of ``by``, pooled; ``tau.n`` counts the pairs.

    ``opposes`` is True when its sign is not the whole's and both intervals exclude 0: Simpson's paradox.
    """

    by: str
    tau: Quantity
    num_strata: int
    opposes: bool


@dataclass(frozen=True, slots=True)
class Prediction:
    """Absolute error of the gap predicted by isotonic regression on the measure, settings left out whole.

    ``error_mean`` is that of predicting the training runs' mean; ``skill`` = 1 − ``error`` / ``error_mean``.
    ``folds`` equals the number of settings where each was left out alone.
    """

    error: float | None
    error_mean: float | None
    skill: float | None
    folds: int
    n: int
    reason: str | None = None


@dataclass(frozen=True, slots=True)
class Selection:
    """Test error of the run with the least measure, its ``regret`` over the best run, and that of chance."""

    run: str | None
    test_error: float | None
    regret: float | None
    regret_random: float | None
    n: int
    reason: str | None = None


@dataclass(frozen=True, slots=True)
class Details:
    """What goes beyond τ of one measure and gap; ``conditioning`` and ``prediction`` None where switched off.

    Of ``noise_filtered``, ``granulated`` and ``strata`` no p is taken; of ``partial``, it permutes within strata
    of the control.
    """

    noise_filtered: NoiseFiltered
    between: Quantity  # τ of the settings' means; n: settings
    within: Quantity  # τ over pairs of runs of the same setting; n: pairs
    granulated: Granulated
    conditioning: Conditioning | None
    sign_error: SignError
    strata: tuple[Stratified, ...]
    partial: Mapping[str, Quantity]  # under the control's name; n: runs
    prediction: Prediction | None
    selection: Selection

    @property
    def simpson(self) -> tuple[str, ...]:
        """The groupings within which the association runs against the whole."""
        return tuple(each.by for each in self.strata if each.opposes)


@dataclass(frozen=True, slots=True)
class Comparison:
    """Δτ = τ of ``first`` − τ of ``second`` on the ``difference.n`` runs that have both, on shared resamples.

    ``p_holm`` is ``difference.p`` adjusted over all pairs of measures of this gap; None where p is.
    """

    first: str
    second: str
    difference: Quantity
    p_holm: float | None


@dataclass(frozen=True, slots=True)
class MeasureStatistics:
    """All about one measure: ``gaps[gap]`` over all runs, ``subgroups[label][gap]`` within a subgroup.

    ``labels`` is the measure's in ``RunTable.labels``; ``warnings`` say in which settings of the measurement
    the runs differ, so that their values are not comparable. ``details[gap]`` is empty where switched off.
    """

    name: str
    labels: str | None
    gaps: dict[str, Correlation]
    subgroups: dict[str, dict[str, Correlation]]
    warnings: tuple[str, ...]
    notes: tuple[str, ...]
    details: dict[str, Details] = field(default_factory=dict)

    def flags(self, gap: str) -> tuple[str, ...]:
        """What to beware of when reading this measure's τ with ``gap``, a word or two each."""
        flags = ["not comparable"] if self.warnings else []
        details = self.details.get(gap)
        if details is not None and details.simpson:
            flags.append("Simpson")
        return tuple(flags)


@dataclass(frozen=True, slots=True)
class SweepStatistics:
    """Every measure's statistics, in the table's order, and their comparisons under each gap.

    ``num_settings`` groups of runs with all hyperparameters equal, ``largest_setting`` runs in the largest.
    ``notes`` say what was done otherwise than asked or usual (smaller samples, clusters of one).
    """

    measures: tuple[MeasureStatistics, ...]
    comparisons: dict[str, tuple[Comparison, ...]]
    num_runs: int
    num_settings: int
    largest_setting: int
    seed: int
    resamples: int
    notes: tuple[str, ...] = ()
