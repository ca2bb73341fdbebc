"""Turn the predictions of several models into one ranked report."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gm_probe.accuracy.calibration import Calibration
from gm_probe.accuracy.evidence import Evidence, Labeled
from gm_probe.accuracy.few_labels import prediction_powered
from gm_probe.accuracy.known import Known, know
from gm_probe.accuracy.predictions import Predictions
from gm_probe.accuracy.ranking import Standing, conclude
from gm_probe.accuracy.readings import plausible, read
from gm_probe.accuracy.report import CLASS_SHARES, Accuracy, EstimateReport, percent
from gm_probe.accuracy.scores import ESTIMATORS, UNSTEADY, scores_of
from gm_probe.accuracy.shares import SURE, rejected
from gm_probe.checks import real
from gm_probe.errors import DataError, UsageError, did_you_mean
from gm_probe.measures.scores import probabilities

MANY = 20
"""Labels of which a model that is better than chance gets more right than chance would."""


@dataclass(frozen=True, slots=True)
class EstimateRequest:
    """How to estimate: class shares (K,) or one of ``CLASS_SHARES``, the level of intervals, the seed."""

    choice: str = "auto"
    shares: Tensor | None = None
    level: float = 0.9
    seed: int = 0

    @classmethod
    def of(cls, class_shares: str | Tensor | Sequence[float], level: float, seed: int) -> EstimateRequest:
        """Check the values.

        Raises:
            UsageError: an unknown word, numbers that are no shares, or a level outside of (0, 1).
        """
        level = real("level", level, above=0, below=1)
        if isinstance(class_shares, str):
            if class_shares not in CLASS_SHARES:
                raise UsageError(
                    f"no class shares {class_shares!r}; {did_you_mean(class_shares, CLASS_SHARES)}"
                )
            return cls(class_shares, None, level, seed)
        try:
            shares = torch.as_tensor(np.asarray(class_shares, dtype=float))
        except (TypeError, ValueError) as error:
            raise UsageError(f"class shares hold no numbers ({error}); give one a class") from error
        if (
            shares.dim() != 1
            or len(shares) < 2
            or not bool((shares >= 0).all())
            or not 0 < float(shares.sum()) < math.inf
        ):
            raise UsageError("class shares must be one number ≥ 0 per class, with a sum above 0")
        return cls("given", shares / shares.sum(), level, seed)

    def shares_of(self, classes: int) -> Tensor | None:
        """Return the shares (K,) that are known beforehand; None = unknown.

        Raises:
            UsageError: another number of shares than classes.
        """
        if self.choice == "uniform":
            return torch.full((classes,), 1 / classes, dtype=torch.float64)
        if self.shares is not None and len(self.shares) != classes:
            raise UsageError(
                f"{len(self.shares)} class shares are given, but the models have {classes} classes"
            )
        return self.shares


def judge(
    evidence: Sequence[Evidence],
    request: EstimateRequest,
    measures: Mapping[str, dict[str, Any]] | None = None,
    notes: Sequence[str] = (),
) -> EstimateReport:
    """Rank the models by their predictions for the sets.

    Raises:
        DataError: models of different numbers of classes.
        UsageError: class shares that do not fit.
    """
    _require_comparable(evidence, request)
    shares = request.shares_of(evidence[0].num_classes)
    agreement = agreements([one.unlabeled for one in evidence])
    everyone = _known(evidence, request)
    default = _best(everyone)
    keys = [request.choice]
    if request.choice == "auto":
        seen = [(known, one.unlabeled) for known, one in zip(everyone, evidence, strict=True) if known]
        keys = plausible(seen) if seen else []
    standings = []
    for one, known, mutual in zip(evidence, everyone, _means(agreement), strict=True):
        given = known.shares if known and shares is None else shares
        reference = known.reference if known else None
        scores = scores_of(one.unlabeled, reference, given, mutual, one.size, request.seed)
        temperature = known.reference.temperature if known else 1.0
        accuracy = None
        if one.few_labels is not None:
            accuracy = _by_labels(one, one.few_labels, temperature, request.level)
        elif known:
            accuracy = read(known, one.unlabeled, scores, default, shares, keys, request.level)
        calibrations = known.calibrations if known else {}
        estimators = {name: _estimator(calibrations.get(name), score) for name, score in scores.items()}
        calibration = calibrations.get(default)
        standings.append(Standing(one, calibration, accuracy, scores, temperature, estimators, mutual))
    notes = [
        *notes,
        *_doubts(evidence),
        *_no_sample(evidence),
        *_too_few(standings[0].calibration, request.level),
    ]
    return conclude(standings, measures or {}, agreement, request.level, request.seed, notes)


def _require_comparable(evidence: Sequence[Evidence], request: EstimateRequest) -> None:
    for one in evidence:
        if one.num_classes != evidence[0].num_classes:
            raise DataError(
                f"{one.name} has {one.num_classes} classes but {evidence[0].name} has "
                f"{evidence[0].num_classes}; only models with the same classes can be compared"
            )
    if request.choice != "auto" and evidence[0].validation is None:
        raise UsageError(
            "class shares are used with a validation set alone; give one, or leave the shares out"
        )


def _too_few(calibration: Calibration | None, level: float) -> list[str]:
    """Return a note where so high a level needs more labeled sets than there are."""
    count = len(calibration.residuals) if calibration else 0
    if not count or math.ceil((count + 1) * level) <= count:
        return []
    return [
        f"errors on {count} labeled sets are too few for a level of {level:g}; the interval is by the largest of them, "
        f"and its level is about {count / (count + 1):.2f}"
    ]


def _doubts(evidence: Sequence[Evidence]) -> list[str]:
    """Return notes on labeled sets that the models seem trained on, do not fit, or that lack classes."""
    notes = []
    for one in evidence:
        if one.validation is not None and one.validation.accuracy == 1:
            notes.append(
                f"{one.name} makes no error on the {len(one.validation.labels):,} validation examples; if it was "
                "trained on them, its estimate is worthless. Give held-out examples"
            )
        chance = 1 / one.num_classes
        for what, labeled in (("validation", one.validation), ("few-labels", one.few_labels)):
            if labeled is not None and len(labeled.labels) >= MANY and labeled.accuracy <= chance:
                notes.append(
                    f"{one.name} is right on {percent(labeled.accuracy)} of the {what} examples, no better than chance "
                    f"({percent(chance)}). Check that its classes are numbered as the labels are"
                )
    known = evidence[0].validation
    counts = None if known is None else known.labels.bincount(minlength=evidence[0].num_classes)
    if counts is not None and not bool(counts.all()):
        missing = (counts == 0).nonzero()[:, 0].tolist()
        notes.append(
            f"the validation set has no example of {len(missing)} of {len(counts)} classes (the first: index "
            f"{missing[0]}). Estimates assume that the unlabeled data has none either"
        )
    return notes


def _no_sample(evidence: Sequence[Evidence]) -> list[str]:
    """Return a note where the few labels are no random sample of the unlabeled data, as the models see them.

    It compares the confidences, and on how many examples the models disagree.
    """
    if evidence[0].few_labels is None:
        return []
    few = [one.few_labels.predictions for one in evidence if one.few_labels is not None]
    everyone = [one.unlabeled for one in evidence]
    scores = [
        [probabilities(found.logits, 1.0).amax(1) for found in sets]
        for sets in zip(few, everyone, strict=True)
    ]
    apart = [
        (torch.stack([one.classes for one in sets]).diff(dim=0) != 0).any(0).double()
        for sets in (few, everyone)
    ]
    differ = sum(
        rejected(one, other, torch.ones(len(other)).double(), SURE) for one, other in [*scores, apart]
    )
    if not differ:
        return []
    return [
        "the labeled images differ from the unlabeled data in the models' confidence or agreement, so they are no "
        "random sample of it, and the intervals do not hold. Draw the images to label at random"
    ]


def _known(evidence: Sequence[Evidence], request: EstimateRequest) -> list[Known | None]:
    if evidence[0].validation is None:
        return [None] * len(evidence)
    sets: list[list[Predictions]] = []  # of each labeled set, the models' predictions
    for place in range(1 + len(evidence[0].shifted)):
        found = [one.validation if place == 0 else one.shifted[place - 1][1] for one in evidence]
        sets.append([one.predictions for one in found if one is not None])
    means = [_means(agreements(predictions)) for predictions in sets]
    return [know(one, [mean[index] for mean in means], request.seed) for index, one in enumerate(evidence)]


def _best(everyone: Sequence[Known | None]) -> str:
    """Return the estimator with the smallest mean error on labeled sets that its calibration had not seen.

    The mean is over all models. Without a validation set there is none: "".
    """
    known = [one.calibrations for one in everyone if one]
    names = set.intersection(*map(set, known)) if known else set()
    ordered = [name for name in ESTIMATORS if name in names and name not in UNSTEADY]
    return min(ordered, key=lambda name: sum(one[name].mean_error for one in known), default="")


def _by_labels(evidence: Evidence, few: Labeled, temperature: float, level: float) -> Accuracy:
    confidence, everywhere = (
        probabilities(found.logits, temperature).amax(1) for found in (few.predictions, evidence.unlabeled)
    )
    return prediction_powered(few.right, confidence, everywhere, level)


def _estimator(calibration: Calibration | None, score: float) -> dict[str, float | None]:
    return {
        "value": calibration.accuracy(score) if calibration else None,
        "score": score,
        "mean_error": calibration.mean_error if calibration else None,
    }


def agreements(predictions: Sequence[Predictions]) -> tuple[tuple[float, ...], ...]:
    """Return (M, M) shares of examples on which two models predict the same class."""
    classes = [one.classes for one in predictions]
    return tuple(tuple(float((a == b).double().mean()) for b in classes) for a in classes)


def _means(agreement: Sequence[Sequence[float]]) -> list[float | None]:
    """Return each model's mean agreement with the others; None for a single model."""
    count = len(agreement)
    return [None if count < 2 else (sum(row) - 1) / (count - 1) for row in agreement]
