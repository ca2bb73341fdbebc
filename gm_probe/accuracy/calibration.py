"""How a score becomes an accuracy: a line through labeled sets, and how far it is off on sets that it has not seen."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import norm

FLOOR = 0.2
"""Errors grow with the drop of the accuracy; they are compared after division by this and the drop."""


@dataclass(frozen=True, slots=True)
class Row:
    """A labeled set: the family of shifts it was made by, its scores, and its accuracy."""

    family: str
    scores: Mapping[str, float]
    accuracy: float


@dataclass(frozen=True, slots=True)
class Calibration:
    """A score's line, accuracy ≈ intercept + slope · score.

    Attributes:
        top: accuracy without a shift, from which drops are counted.
        residuals: estimate minus accuracy of each row, with the row's whole family left out of the fit.
        scales: what each is divided by before they are compared.
    """

    intercept: float
    slope: float
    top: float
    residuals: tuple[float, ...]
    scales: tuple[float, ...]

    def accuracy(self, score: float) -> float:
        """Return the accuracy at ``score``, within [0, 1]."""
        return min(max(self.intercept + self.slope * score, 0.0), 1.0)

    @property
    def mean_error(self) -> float:
        """Return the mean absolute residual."""
        return float(np.abs(self.residuals).mean())

    def half_width(self, accuracy: float, level: float) -> float:
        """Return half the conformal interval around an estimate ``accuracy``."""
        return conformal(np.divide(self.residuals, self.scales), level) * scale_at(accuracy, self.top)


def fitted(rows: Sequence[Row], name: str, start: Row) -> Calibration:
    """Fit the line of the score ``name`` to ``rows``, and once more without each family.

    Every line goes through ``start``, the validation set without a shift.
    """
    x = np.array([row.scores[name] for row in rows]) - start.scores[name]
    y = np.array([row.accuracy for row in rows])
    families = np.array([row.family for row in rows])
    found = np.zeros(len(rows))
    for family in dict.fromkeys(families):
        out = families == family
        slope = _slope(x[~out], y[~out] - start.accuracy)
        found[out] = np.clip(start.accuracy + slope * x[out], 0, 1)
    slope = _slope(x, y - start.accuracy)
    scales = tuple(scale_at(value, start.accuracy) for value in found)
    intercept = start.accuracy - slope * start.scores[name]
    return Calibration(intercept, slope, start.accuracy, tuple((found - y).tolist()), scales)


def as_it_is(rows: Sequence[Row], name: str, top: float) -> Calibration:
    """Return the calibration of a score that is an accuracy already: no line is fitted, but errors are known."""
    residuals = tuple(row.scores[name] - row.accuracy for row in rows)
    return Calibration(0.0, 1.0, top, residuals, tuple(scale_at(row.scores[name], top) for row in rows))


def _slope(x: np.ndarray, y: np.ndarray) -> float:
    spread = float(x @ x)
    return float(x @ y) / spread if spread > 0 else 0.0


def scale_at(accuracy: float, top: float) -> float:
    """Return how large errors are around an estimated ``accuracy``, up to a constant."""
    return FLOOR + max(top - accuracy, 0.0)


def conformal(residuals: Sequence[float] | np.ndarray, level: float) -> float:
    """Return the conformal quantile of the absolute residuals; the largest where there are too few for ``level``."""
    ordered = np.sort(np.abs(residuals))
    place = math.ceil((len(ordered) + 1) * level)
    return float(ordered[min(place, len(ordered)) - 1])


def sampling_error(accuracy: float, sizes: Sequence[int], level: float) -> float:
    """Return the binomial error of an accuracy on sets of these sizes, as half an interval of ``level``.

    Half an observation is added to each kind, so that an accuracy of 1 has an error, too.
    """
    variance = 0.0
    for size in sizes:
        share = (accuracy * size + 1) / (size + 2)
        variance += share * (1 - share) / size
    return float(norm.isf((1 - level) / 2)) * math.sqrt(variance)
