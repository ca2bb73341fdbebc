"""Standard errors and intervals of statistics over runs that share settings and seeds.

Runs of one setting are not independent, nor are runs of one seed, which start from the same weights and see the same
batches. So the variance is clustered in two ways: V = V_setting + V_seed − V_run, where V_run is what both contain.
``benchmarks/results/correlate-calibration.md`` says how often the intervals cover.
"""

import math
from dataclasses import dataclass

import numpy as np
from scipy import special  # not scipy.stats, which takes half a second to import

from gm_probe.analysis.run_pairs import Floats, Integers, dense_ranks, mid_ranks

LEVEL = 0.95
LEAST_UNITS = 5
"""Fewer settings that are paired with others allow no estimate of the error."""
LEAST_SEEDS = 3
"""Fewer shared seeds allow no estimate of their part of the error."""
SEED_LEVEL = 0.1
"""Significance level of the F tests for a difference between seeds."""
SWEEPS = 30
"""Most rounds of subtracting the means by setting and by seed, where some settings lack some seeds."""


@dataclass(frozen=True, slots=True)
class Quantity:
    """A statistic with its 95 % interval and the p of the interval; ``note`` says why one of them is absent."""

    value: float | None
    low: float | None = None
    high: float | None = None
    p: float | None = None
    n: int = 0
    note: str = ""

    @property
    def clear(self) -> bool:
        """Return whether the interval excludes 0."""
        return self.low is not None and self.high is not None and (self.low > 0 or self.high < 0)


@dataclass(frozen=True, slots=True)
class Clusters:
    """Which runs are not independent: those of one ``setting`` (n,), and those of one ``seed``.

    Both number from 0. ``seed`` is −1 where no other setting has the run's seed, and None where no seeds are shared.
    ``seeds_differ`` says whether two of the columns that a statistic is made of differ between seeds: what one alone
    shares with seeds changes no association. ``unit`` names what settings are: runs, where all have the same setting.
    """

    setting: Integers
    seed: Integers | None
    seeds_differ: bool = True
    unit: str = "settings"

    @property
    def num_settings(self) -> int:
        return int(self.setting.max(initial=-1)) + 1

    @property
    def num_seeds(self) -> int:
        return 0 if self.seed is None else int(self.seed.max()) + 1

    @property
    def limit(self) -> str | None:
        """Say why no interval is possible; None where one is."""
        if self.num_settings < LEAST_UNITS:
            return f"{self.num_settings} {self.unit}; an interval needs {LEAST_UNITS}"
        if 1 < self.num_seeds < LEAST_SEEDS:
            return f"the settings share {self.num_seeds} seeds; an interval needs {LEAST_SEEDS}"
        return None


def clusters_of(setting: np.ndarray, seed: np.ndarray | None, *columns: Floats) -> Clusters:
    """Number the settings and the seeds of runs (n,); negative seeds are unknown.

    Seeds count as shared where most runs have one that another setting has, too: among random seeds two can be
    equal. An F test of each of ``columns`` (n,) tells whether it differs between seeds.
    """
    numbers = dense_ranks(setting)
    if len(numbers) > 1 and numbers.max() == 0:
        return Clusters(np.arange(len(numbers)), None, unit="runs")
    if seed is None:
        return Clusters(numbers, None)
    seeds, settings = np.unique(np.unique(np.stack([seed, numbers]), axis=1)[0], return_counts=True)
    common = seeds[(settings > 1) & (seeds >= 0)]
    shared = np.isin(seed, common)
    if 2 * shared.sum() <= len(seed):
        return Clusters(numbers, None)
    known = np.where(shared, np.searchsorted(common, seed), -1).astype(np.int64)
    differ = [
        _differ(*_decomposed(mid_ranks(values)[shared], numbers[shared], known[shared])) for values in columns
    ]
    return Clusters(numbers, known, sum(differ) >= min(2, len(columns)))


def _differ(inside: Floats, rest: Floats, num_seeds: int, left: int) -> bool:
    """Return whether a decomposed column differs more between seeds than within."""
    if left <= 0 or num_seeds < 2:
        return num_seeds > 1
    of_seeds, of_runs = float(inside @ inside) - float(rest @ rest), float(rest @ rest)
    critical = float(special.fdtri(num_seeds - 1, left, 1 - SEED_LEVEL))
    return of_seeds / (num_seeds - 1) > critical * of_runs / left


def _decomposed(values: Floats, setting: Integers, seed: Integers) -> tuple[Floats, Floats, int, int]:
    """Return ``values`` (n,) less the settings' means, then less the seeds' too, the number of seeds, and the degrees
    of freedom that are left."""
    setting = dense_ranks(setting)
    inside = _less_means(values, setting)  # differences between settings are not due to seeds
    rest = inside
    for _ in range(SWEEPS):
        before, rest = rest, _less_means(_less_means(rest, seed), setting)
        if np.abs(rest - before).max(initial=0) <= 1e-12 * np.abs(inside).max(initial=0):
            break  # the first sweep suffices where every setting has every seed
    num_seeds = int(seed.max()) + 1
    return inside, rest, num_seeds, len(rest) - int(setting.max()) - num_seeds


@dataclass(frozen=True, slots=True)
class Spread:
    """The variance of a statistic with its degrees of freedom."""

    variance: float
    freedom: float


def settings_spread(sums: Floats, num: int, groups: int = 1) -> Spread:
    """Return the variance that independent settings give, from each setting's share ``sums`` in a sum over pairs.

    ``num`` settings are paired with others, each with those of one of ``groups`` groups alone. A pair counts in the
    shares of both its settings, and every group has a τ of its own. Both together make the sum of squares too large by
    (S + 2G − 4)/S on average, for the covariance of normal values in groups of one size. It is S/(S − 2) in place of
    the jackknife's S/(S − 1) for one group, and counts each pair once where every group is one pair.
    ``num`` = ``groups``: all pairs are inside settings.
    """
    if num == groups:
        return Spread(num / (num - 1) * float(sums @ sums), num - 1)
    return Spread(num / (num + 2 * groups - 4) * float(sums @ sums), num - groups)


def with_seeds(settings: Spread, influence: Floats, clusters: Clusters) -> Spread:
    """Add what another choice of shared seeds would add to the variance ``settings``, if above 0.

    ``influence`` (n,) is what each run's weight changes the statistic by. V_run is the mean square that is left of it
    after settings and seeds, so that the variance of single runs is not counted twice. The factor (K + 3)/(K − 1) of K
    seeds was chosen in simulations. It is that of pairs, K/(K − 2), for K = 3, and more for more seeds.

    Source: Cameron, Gelbach and Miller 2011, "Robust inference with multiway clustering"; degrees of freedom by
    Satterthwaite 1946, "An approximate distribution of estimates of variance components".
    """
    num = clusters.num_seeds
    if clusters.seed is None or num < LEAST_SEEDS:
        return settings
    shared = clusters.seed >= 0
    seed = clusters.seed[shared]
    inside, rest, _, left = _decomposed(influence[shared], clusters.setting[shared], seed)
    if not clusters.seeds_differ and not _differ(inside, rest, num, left):
        return settings
    sums = np.bincount(seed, inside)
    of_runs = (num - 1) / num * len(rest) / left * float(rest @ rest) if left > 0 else 0.0
    added = (num + 3) / (num - 1) * float(sums @ sums) - of_runs
    if added <= 0:
        return settings
    variance = settings.variance + added
    freedom = variance**2 / (settings.variance**2 / settings.freedom + added**2 / (num - 1))
    return Spread(variance, float(np.clip(freedom, min(num - 1, settings.freedom), settings.freedom)))


def _less_means(values: Floats, group: Integers) -> Floats:
    return values - (np.bincount(group, values) / np.bincount(group))[group]


def coefficient(value: float, spread: Spread, n: int) -> Quantity:
    """Return a coefficient in (−1, 1) with its interval: tanh(artanh τ ± t·SE/(1 − τ²)), on Fisher's scale."""
    if 1 - abs(value) < 1e-12:
        return Quantity(value, n=n, note=f"no interval: at {value:+.0f} the error cannot be estimated")
    error = math.sqrt(max(spread.variance, 0.0)) / (1 - value**2)
    if error < 1e-12:
        return Quantity(value, n=n, note="no interval: the error cannot be estimated, as no setting differs")
    centre, half = math.atanh(value), float(special.stdtrit(spread.freedom, (1 + LEVEL) / 2)) * error
    p = 2 * float(special.stdtr(spread.freedom, -abs(centre) / error))
    return Quantity(value, math.tanh(centre - half), math.tanh(centre + half), p, n)


def difference(value: float, spread: Spread, n: int) -> Quantity:
    """Return a difference of two coefficients with its Student interval."""
    error = math.sqrt(max(spread.variance, 0.0))
    if error < 1e-12:
        return Quantity(value, n=n, note="no interval: the two order the runs alike")
    half = float(special.stdtrit(spread.freedom, (1 + LEVEL) / 2)) * error
    p = 2 * float(special.stdtr(spread.freedom, -abs(value) / error))
    return Quantity(value, value - half, value + half, p, n)


def mean_interval(values: np.ndarray, level: float = 0.99) -> tuple[float, float, float]:
    """Return the mean of independent ``values`` (n,), n ≥ 2, and its Student interval: mean, low, high."""
    mean = float(values.mean())
    half = float(special.stdtrit(len(values) - 1, (1 + level) / 2) * values.std(ddof=1)) / math.sqrt(
        len(values)
    )
    return mean, mean - half, mean + half
