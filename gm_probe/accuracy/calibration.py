"""How a score becomes an accuracy: a line through labeled sets, and how far it is off on sets that it has not seen."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import norm

UNSHIFTED = "none"
"""The family of the validation set as it is."""
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
        """Mean absolute residual."""
        return float(np.abs(self.residuals).mean())

    def half_width(self, accuracy: float, level: float) -> float:
        """Return half the conformal interval around an estimate ``accuracy``."""
        return conformal(np.divide(self.residuals, self.scales), level) * scale_at(accuracy, self.top)


def fitted(rows: Sequence[Row], name: str, top: float) -> Calibration:
    """Fit the line of the score ``name`` to ``rows``, and once more without each family."""
    x = np.array([row.scores[name] for row in rows])
    y = np.array([row.accuracy for row in rows])
    families = np.array([row.family for row in rows])
    found = np.zeros(len(rows))
    for family in dict.fromkeys(families):
        out = families == family
        intercept, slope = _line(x[~out], y[~out])
        found[out] = np.clip(intercept + slope * x[out], 0, 1)
    scales = tuple(scale_at(value, top) for value in found)
    return Calibration(*_line(x, y), top, tuple((found - y).tolist()), scales)


def as_it_is(rows: Sequence[Row], name: str, top: float) -> Calibration:
    """Return the calibration of a score that is an accuracy already: no line is fitted, but errors are known."""
    residuals = tuple(row.scores[name] - row.accuracy for row in rows)
    return Calibration(0.0, 1.0, top, residuals, tuple(scale_at(row.scores[name], top) for row in rows))


def _line(x: np.ndarray, y: np.ndarray) -> tuple[float, float]:
    away = x - x.mean()
    spread = float(away @ away)
    slope = float(away @ (y - y.mean())) / spread if spread > 0 else 0.0
    return float(y.mean()) - slope * float(x.mean()), slope


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
