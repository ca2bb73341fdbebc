"""Intervals, most from leaving out or resampling whole settings: runs of one setting are not independent.

Nor are runs of one seed, where all settings take the same few: they start from the same weights and see the same
batches. ``seeds_share`` says what another choice of seeds would add to the variance.
"""

import math
from dataclasses import dataclass

import numpy as np
from scipy import stats

from gm_probe.analysis.rank import Floats, Integers

LEAST_UNITS = 5
"""Of fewer settings, or seeds, no error can be told."""
SWEEPS = 30
"""Of taking off the means by setting and by seed in turn, where some settings lack some seeds."""
Interval = tuple[float | None, float | None, str | None]
"""Low, high and None; or None, None and the reason."""


def jackknife_error(without: np.ndarray) -> float:
    """Standard error of an estimate from its values ``without`` each of S units (S,).

    Source: Efron and Stein 1981, "The jackknife estimate of variance".
    """
    num = len(without)
    return math.sqrt((num - 1) / num * float(((without - without.mean()) ** 2).sum()))


@dataclass(frozen=True, slots=True)
class Share:
    """What seeds that settings share add to an estimate's variance: ``of_seeds`` less ``of_runs``, if above 0.

    ``of_seeds`` is the variance of leaving out seeds, to ``num_seeds`` − 1 degrees; ``of_runs`` what of it the runs
    would bring were no seed shared, to ``freedom`` degrees.
    """

    of_seeds: float = 0.0
    num_seeds: int = 0
    of_runs: float = 0.0
    freedom: int = 0

    def added_to(self, error: float, freedom: int) -> tuple[float, float]:
        """Standard error and degrees of freedom of settings and seeds, from the settings' own.

        Source: degrees by Satterthwaite 1946, "An approximate distribution of estimates of variance components".
        """
        variance = error**2 + self.of_seeds - self.of_runs
        if variance <= error**2:
            return error, freedom
        parts = [(error**2, freedom), (self.of_seeds, self.num_seeds - 1), (self.of_runs, self.freedom)]
        satterthwaite = variance**2 / sum(part**2 / of for part, of in parts if part)
        # of a difference of parts they can fall to nothing
        return math.sqrt(variance), max(satterthwaite, min(freedom, self.num_seeds - 1))


NO_SHARE = Share()


def seeds_share(value: float, without: Floats, setting: Integers, seed: Integers | None) -> Share:
    """The part of shared seeds in the variance of an estimate, from its values ``without`` each run (n,).

    ``setting`` and ``seed`` (n,) number each run's, as ``Sample`` has them. An analysis of variance of the runs'
    influences within settings: seeds, and the rest. Nothing of fewer than ``LEAST_UNITS`` seeds: the interval is then
    for these.

    Source: Efron and Stein 1981 for the influences.
    """
    if seed is None or seed.max() + 1 < LEAST_UNITS or not np.isfinite(without).all():
        return NO_SHARE
    n, num_seeds, shared = len(without), int(seed.max()) + 1, seed >= 0
    influence = ((n - 1) * (value - without))[shared]
    setting, seed = np.unique(setting[shared], return_inverse=True)[1], seed[shared]
    inside = _less_means(influence, setting)  # what settings differ by is not the seeds'
    sums = np.bincount(seed, inside)
    of_seeds = num_seeds / (num_seeds - 1) * float(sums @ sums) / n**2
    rest = inside
    for _ in range(SWEEPS):  # one is exact where every setting has every seed
        rest = _less_means(_less_means(rest, seed), setting)
    freedom = len(rest) - int(setting.max()) - num_seeds
    of_runs = float(rest @ rest) / freedom * len(rest) / n**2 if freedom > 0 else 0.0
    return Share(of_seeds, num_seeds, of_runs, freedom)


def _less_means(values: Floats, group: Integers) -> Floats:
    return values - (np.bincount(group, values) / np.bincount(group))[group]


def jackknife_interval(
    value: float, without: np.ndarray, unit: str = "settings", share: Share = NO_SHARE
) -> Interval:
    """Interval of a coefficient in (−1, 1) from its values ``without`` each unit (S,).

    On Fisher's scale: tanh(artanh τ ± t·SE/(1 − τ²)), SE the jackknife's and t Student's of S − 1 degrees, or with
    what shared seeds add.
    """
    if len(without) < LEAST_UNITS:
        return None, None, f"{len(without)} {unit}; an interval needs {LEAST_UNITS}"
    if not np.isfinite(without).all():
        return None, None, f"undefined when one of the {unit} is left out"
    return fisher_interval(value, *share.added_to(jackknife_error(without), len(without) - 1))


def fisher_interval(value: float, error: float, freedom: float) -> Interval:
    """Interval of a coefficient with standard ``error``, symmetric on the scale of artanh."""
    if 1 - abs(value) < 1e-12:
        return None, None, f"at {value:+.0f} no resample differs, so the error cannot be estimated"
    half = float(stats.t.ppf(0.975, freedom)) * error / (1 - value**2)
    if half < 1e-12:
        return None, None, "no resample differs, so the error cannot be estimated"
    return math.tanh(math.atanh(value) - half), math.tanh(math.atanh(value) + half), None


def percentile_interval(values: np.ndarray) -> tuple[float, float]:
    """The middle 95 % of ``values`` (B,)."""
    low, high = np.quantile(values, [0.025, 0.975])
    return float(low), float(high)


def mean_interval(values: np.ndarray, level: float = 0.99) -> tuple[float, float, float]:
    """The mean of independent ``values`` (n,), n ≥ 2, and its Student interval: mean, low, high."""
    mean = float(values.mean())
    half = float(stats.t.ppf((1 + level) / 2, len(values) - 1) * values.std(ddof=1)) / math.sqrt(len(values))
    return mean, mean - half, mean + half


def excludes_zero(low: float | None, high: float | None) -> bool:
    return low is not None and high is not None and (low > 0 or high < 0)
