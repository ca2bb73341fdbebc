"""One model's accuracy under each reading of the class shares, and the interval over all that cannot be excluded."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace

from torch import Tensor

from gm_probe.accuracy.calibration import sampling_error
from gm_probe.accuracy.known import Known, Signs
from gm_probe.accuracy.predictions import Predictions
from gm_probe.accuracy.report import Accuracy
from gm_probe.accuracy.scores import ESTIMATORS
from gm_probe.accuracy.shares import same_shares

NEAREST = 5
"""Synthetic shifts of the most similar confidence, with which an unlabeled set is compared."""
SAME, CHANGED, GIVEN = "validation", "estimated", "given"
"""The readings: class shares as in the validation set, as EM finds them, or as the user says."""


def read(
    known: Known,
    predictions: Predictions,
    scores: dict[str, float],
    name: str,
    shares: Tensor | None,
    keys: Sequence[str],
    level: float,
) -> Accuracy:
    """Return one model's accuracy on the unlabeled set.

    Args:
        scores: of the unlabeled set, at the size that is known; those that use class shares, with the known ones or
            else with those of the validation set.
        name: the estimator to use.
        shares: (K,) known ones of the unlabeled set; None = unknown.
        keys: readings of the class shares, the likelier first; not used where they are known.
    """
    sizes = len(predictions.logits), len(known.validation.labels)
    if shares is not None:
        found = _calibrated(known, "cot", scores["cot"], sizes, level, given=True)
        return _over_readings({GIVEN: found})
    readings = {}
    if SAME in keys:
        readings[SAME] = _calibrated(known, name, scores[name], sizes, level)
    if CHANGED in keys:
        signs, estimated = known.signs_of(predictions)
        readings[CHANGED] = _changed(known, signs, estimated, sizes, level)
    return _over_readings({key: readings[key] for key in keys})


def plausible(everyone: Sequence[tuple[Known, Predictions]]) -> list[str]:
    """Return the readings that cannot be excluded, the likelier first: one order for all models, by their votes.

    All models see the same images. Estimates under different class shares could not be compared.
    """
    votes = [_plausible(known, predictions) for known, predictions in everyone]
    first = Counter(vote[0] for vote in votes).most_common(1)[0][0]
    return [first, *sorted({key for vote in votes for key in vote} - {first})]


def _plausible(known: Known, predictions: Predictions) -> list[str]:
    """Return the readings that one model cannot exclude.

    Under a shift that leaves the class shares as they are, EM still finds others, with which COT is larger. How much
    larger is known of the synthetic shifts: of those that a test on the confidences does not tell from a change of the
    shares, or of the most similar ones that it does. Where the test does, EM's assumption fails, and its reading only
    widens the interval. Where it does not, a larger gap than any speaks for changed shares.
    """
    if same_shares(predictions.classes, known.validation.predictions.classes, len(known.shares)):
        return [SAME]
    signs, _ = known.signs_of(predictions)
    alike = [one for one in known.signs if one.rejected == signs.rejected]
    if signs.rejected:
        alike = sorted(alike, key=lambda one: abs(one.transported - signs.transported))[:NEAREST]
    gaps = [one.gap for one in alike]
    if gaps and signs.gap <= min(gaps):
        return [SAME]
    if signs.rejected or (gaps and signs.gap <= max(gaps)):
        return [SAME, CHANGED]
    return [CHANGED]


def _calibrated(
    known: Known, name: str, score: float, sizes: tuple[int, int], level: float, *, given: bool = False
) -> Accuracy:
    calibration = known.calibrations[name]
    value = calibration.accuracy(score)
    half = math.hypot(calibration.half_width(value, level), sampling_error(value, sizes, level))
    how = (
        "calibrated on synthetic shifts"
        if known.by_shifts
        else "with errors from halves of the validation set"
    )
    assumption = "the unlabeled data has the distribution of the validation set"
    if known.by_shifts:
        whose = "those given" if name == "cot" and given else "those of the validation set"
        assumption = f"the images' shift resembles the synthetic shifts, and the class shares are {whose}"
    return _within(value, half, level, f"{name} ({ESTIMATORS[name]}), {how}", assumption)


def _within(value: float, half: float, level: float, method: str, assumption: str) -> Accuracy:
    """Return an accuracy whose interval reaches ``half`` to either side, within [0, 1]."""
    return Accuracy(value, max(value - half, 0.0), min(value + half, 1.0), level, method, assumption)


def _changed(known: Known, signs: Signs, shares: Tensor, sizes: tuple[int, int], level: float) -> Accuracy:
    """Return the reading by EM's class shares: COT with them, moved to fit, or calibrated under shifts."""
    if signs.rejected and known.by_shifts:
        found = _calibrated(known, "cot", signs.transported, sizes, level)
        return replace(
            found,
            method="cot with estimated class shares, calibrated on synthetic shifts",
            assumption="the images' shift resembles the synthetic shifts, and the class shares changed, too",
        )
    value = min(max(signs.transported + known.offset, 0.0), 1.0)
    weights = known.weights(shares)
    effective = int(weights.sum().square() / weights.square().sum())
    half = math.hypot(known.skew_error, sampling_error(value, (sizes[0], max(effective, 1)), level))
    return _within(value, half, level, "cot with estimated class shares", "only the class shares changed")


def _over_readings(readings: Mapping[str, Accuracy]) -> Accuracy:
    """Return the first reading, with an interval over all of them."""
    found = readings.values()
    return replace(
        next(iter(found)),
        low=min(one.low for one in found),
        high=max(one.high for one in found),
        assumption=", or ".join(one.assumption for one in found),
        readings={key: (one.value, one.low, one.high) for key, one in readings.items()},
    )
