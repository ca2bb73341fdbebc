"""LOWESS against a brute-force weighted least squares, statsmodels where it is installed, and straight lines."""

import numpy as np
import pytest

from gm_probe.analysis.smoothing import lowess


def brute_force(x: np.ndarray, y: np.ndarray, place: float, fraction: float) -> float:
    """numpy.polyfit through the nearest points; its weights multiply residuals, so they are square roots."""
    nearest = np.argsort(abs(x - place))[: int(fraction * len(x))]
    radius = abs(x[nearest] - place).max()
    weight = (1 - (abs(x[nearest] - place) / radius) ** 3) ** 3
    slope, intercept = np.polyfit(x[nearest], y[nearest], 1, w=np.sqrt(weight))
    return float(intercept + slope * place)


@pytest.mark.parametrize("fraction", [0.25, 0.5, 1.0])
def test_it_is_the_local_weighted_line(fraction: float) -> None:
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=60), rng.normal(size=60)
    at = np.linspace(x.min(), x.max(), 17)
    expected = [brute_force(x, y, place, fraction) for place in at]
    np.testing.assert_allclose(lowess(x, y, at, fraction), expected, rtol=1e-8)


def test_it_agrees_with_statsmodels() -> None:
    smoothers = pytest.importorskip("statsmodels.nonparametric.smoothers_lowess")
    rng = np.random.default_rng(1)
    x = np.sort(rng.uniform(0, 5, 80))
    y = np.sin(x) + 0.2 * rng.normal(size=80)
    expected = smoothers.lowess(y, x, frac=2 / 3, it=0, return_sorted=False)
    np.testing.assert_allclose(lowess(x, y, x), expected, rtol=1e-6, atol=1e-9)


def test_a_line_is_its_own_trend_wherever_there_are_points_around() -> None:
    x = np.array([0.0, 1.0, 2.0, 3.0, 10.0, 11.0, 12.0])
    at = np.array([0.5, 2.0, 6.0, 11.5])
    np.testing.assert_allclose(lowess(x, 3 - 2 * x, at), 3 - 2 * at)


def test_no_line_is_not_a_number_rather_than_a_guess() -> None:
    x = np.array([1.0, 1.0, 1.0, 1.0, 1.0, 7.0])
    trend = lowess(x, np.arange(6.0), np.array([1.0, 7.0]))
    assert np.isnan(trend[0])  # all its neighbours stand at one x
    assert np.isnan(lowess(np.ones(4), np.arange(4.0), np.array([1.0]))).all()
