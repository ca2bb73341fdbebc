"""LOWESS: the trend of scattered points, by weighted straight lines fitted around each place."""

import numpy as np


def lowess(x: np.ndarray, y: np.ndarray, at: np.ndarray, fraction: float = 2 / 3) -> np.ndarray:
    """The trend (G,) at the places ``at`` (G,), of finite points ``x``, ``y`` (n,).

    Each value is that of a line through the nearest ``fraction`` of the points, least squares with tricube
    weights; without the later robustness iterations. NaN where the points around a place give no line: fewer
    than 2 distinct x have weight.

    Source: Cleveland 1979, "Robust locally weighted regression and smoothing scatterplots".
    """
    neighbours = min(len(x), max(2, int(fraction * len(x) + 1e-9)))
    away = x[None, :] - at[:, None]  # (G, n)
    distance = np.abs(away)
    radius = np.partition(distance, neighbours - 1, axis=1)[:, neighbours - 1 : neighbours]
    with np.errstate(divide="ignore", invalid="ignore"):
        weight = np.where(distance < radius, (1 - (distance / radius) ** 3) ** 3, 0.0)
        weight /= weight.sum(axis=1, keepdims=True)
        centre = (weight * away).sum(axis=1)
        spread = (weight * (away - centre[:, None]) ** 2).sum(axis=1)
        slope = (weight * (away - centre[:, None]) * y).sum(axis=1) / spread
        trend = (weight * y).sum(axis=1) - slope * centre
    flat = ~(spread > (1e-9 * radius[:, 0]) ** 2)  # also where no weight is left: then spread is NaN
    return np.where(flat, np.nan, trend)
