"""Intervals, most from leaving out or resampling whole settings: runs of one setting are not independent."""

import math

import numpy as np
from scipy import stats

LEAST_UNITS = 5
"""Of fewer settings, no error can be told."""
Interval = tuple[float | None, float | None, str | None]
"""Low, high and None; or None, None and the reason."""


def jackknife_error(without: np.ndarray) -> float:
    """Standard error of an estimate from its values ``without`` each of S units (S,).

    Source: Efron and Stein 1981, "The jackknife estimate of variance".
    """
    num = len(without)
    return math.sqrt((num - 1) / num * float(((without - without.mean()) ** 2).sum()))


def jackknife_interval(value: float, without: np.ndarray, unit: str = "settings") -> Interval:
    """Interval of a coefficient in (−1, 1) from its values ``without`` each unit (S,).

    On Fisher's scale: tanh(artanh τ ± t·SE/(1 − τ²)), SE the jackknife's and t Student's of S − 1 degrees.
    """
    if len(without) < LEAST_UNITS:
        return None, None, f"{len(without)} {unit}, and an interval needs {LEAST_UNITS}"
    if not np.isfinite(without).all():
        return None, None, f"undefined without one of the {unit}"
    return fisher_interval(value, jackknife_error(without), len(without) - 1)


def fisher_interval(value: float, error: float, freedom: int) -> Interval:
    """Interval of a coefficient with standard ``error``, symmetric on the scale of artanh."""
    if 1 - abs(value) < 1e-12:
        return None, None, f"at {value:+.0f} no resample differs, and none tells the error"
    half = float(stats.t.ppf(0.975, freedom)) * error / (1 - value**2)
    if half < 1e-12:
        return None, None, "no resample differs, and none tells the error"
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
