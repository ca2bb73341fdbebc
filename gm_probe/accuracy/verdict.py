"""From what the models said of the sets to one ranked report."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gm_probe.accuracy.evidence import Evidence
from gm_probe.accuracy.few_labels import prediction_powered
from gm_probe.accuracy.known import Known, know
from gm_probe.accuracy.predictions import Predictions
from gm_probe.accuracy.ranking import Standing, conclude
from gm_probe.accuracy.readings import plausible, read
from gm_probe.accuracy.report import CLASS_SHARES, Accuracy, EstimateReport, ModelEstimate, percent
from gm_probe.accuracy.scores import scores_of
from gm_probe.checks import real
from gm_probe.errors import DataError, UsageError, did_you_mean
from gm_probe.measures.scores import probabilities

NOT_IDENTIFIABLE = (
    "accuracy on unlabeled data is not identifiable without labeled data of the training distribution; give a "
    "validation set"
)


@dataclass(frozen=True, slots=True)
class Request:
    """How to estimate: class shares (K,) or one of ``CLASS_SHARES``, the level of intervals, the seed."""

    choice: str = "auto"
    shares: Tensor | None = None
    level: float = 0.9
    seed: int = 0

    @classmethod
    def of(cls, class_shares: str | Tensor | Sequence[float], level: float, seed: int) -> Request:
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
    request: Request,
    measures: Mapping[str, dict[str, Any]] | None = None,
    notes: Sequence[str] = (),
) -> EstimateReport:
    """Rank the models by what they said of the sets.

    Raises:
        DataError: models of different numbers of classes.
        UsageError: class shares that do not fit.
    """
    _require_comparable(evidence, request)
    shares = request.shares_of(evidence[0].num_classes)
    agreement = agreements([one.unlabeled for one in evidence])
    mutual = _means(agreement)
    everyone = _known(evidence, request)
    default = _best(everyone)
    keys = _keys(evidence, everyone, request)
    rows, standings = [], []
    for index, one in enumerate(evidence):
        known = everyone[index]
        scores = scores_of(
            one.unlabeled,
            None if known is None else known.reference,
            known.shares if shares is None and known is not None else shares,
            mutual[index],
        )
        accuracy = _accuracy(one, known, scores, default, shares, keys, request.level)
        rows.append(
            ModelEstimate(
                one.name,
                0,
                accuracy,
                "" if accuracy is not None else NOT_IDENTIFIABLE,
                _estimators(known, scores),
                (measures or {}).get(one.name, {}),
                mutual[index],
                False,
                None if one.validation is None else one.validation.accuracy,
                one.seconds,
            )
        )
        standings.append(
            Standing(
                one,
                None if known is None or default is None else known.calibrations[default],
                accuracy,
                scores,
                1.0 if known is None else known.reference.temperature,
            )
        )
    notes = [*notes, *_doubts(evidence), *_too_few(everyone, default, request.level)]
    return conclude(rows, standings, agreement, request.level, request.seed, notes)


def _require_comparable(evidence: Sequence[Evidence], request: Request) -> None:
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


def _too_few(everyone: Sequence[Known | None], default: str | None, level: float) -> list[str]:
    """A note where so high a level needs more labeled sets than there are."""
    known = everyone[0]
    if known is None or default is None:
        return []
    count = len(known.calibrations[default].residuals)
    if math.ceil((count + 1) * level) <= count:
        return []
    return [
        f"errors on {count} labeled sets are too few for a level of {level:g}; the interval is by the largest of them, "
        f"and its level is about {count / (count + 1):.2f}"
    ]


def _doubts(evidence: Sequence[Evidence]) -> list[str]:
    """Notes on a validation set that the models seem to be trained on, do not fit, or that lacks classes."""
    notes = []
    for one in evidence:
        if one.validation is None:
            continue
        accuracy, chance = one.validation.accuracy, 1 / one.num_classes
        if accuracy == 1:
            notes.append(
                f"{one.name} makes no error on the {len(one.validation.labels):,} validation examples; if it was "
                "trained on them, its estimate is worthless. Give held-out examples"
            )
        elif accuracy <= chance:
            notes.append(
                f"{one.name} is right on {percent(accuracy)} of the validation examples, no better than chance "
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


def _known(evidence: Sequence[Evidence], request: Request) -> list[Known | None]:
    if evidence[0].validation is None:
        return [None] * len(evidence)
    sets: list[list[Predictions]] = []  # of each labeled set, the models' predictions
    for place in range(1 + len(evidence[0].shifted)):
        found = [one.validation if place == 0 else one.shifted[place - 1][1] for one in evidence]
        sets.append([one.predictions for one in found if one is not None])
    means = [_means(agreements(predictions)) for predictions in sets]
    return [know(one, [mean[index] for mean in means], request.seed) for index, one in enumerate(evidence)]


def _keys(evidence: Sequence[Evidence], everyone: Sequence[Known | None], request: Request) -> list[str]:
    """The readings of the class shares that are shown."""
    if request.choice != "auto":
        return [request.choice]
    seen = [
        (known, one.unlabeled) for known, one in zip(everyone, evidence, strict=True) if known is not None
    ]
    return plausible(seen) if seen else []


def _best(everyone: Sequence[Known | None]) -> str | None:
    """The estimator with the smallest mean error on labeled sets that its calibration had not seen, over all models."""
    known = [one for one in everyone if one is not None]
    if not known:
        return None
    names = [name for name in known[0].calibrations if all(name in one.calibrations for one in known)]
    return min(names, key=lambda name: sum(one.calibrations[name].mean_error for one in known))


def _accuracy(
    evidence: Evidence,
    known: Known | None,
    scores: dict[str, float],
    default: str | None,
    shares: Tensor | None,
    keys: Sequence[str],
    level: float,
) -> Accuracy | None:
    few = evidence.few_labels
    if few is not None:
        temperature = 1.0 if known is None else known.reference.temperature
        confidence, everywhere = (
            probabilities(found.logits, temperature).amax(1)
            for found in (few.predictions, evidence.unlabeled)
        )
        found = prediction_powered(few.right, confidence, everywhere, level)
        assumption = "the labeled images are a random sample of the unlabeled data"
        return Accuracy(found.value, found.low, found.high, level, found.method, assumption)
    if known is None or default is None:
        return None
    return read(known, evidence.unlabeled, scores, default, shares, keys, level)


def _estimators(known: Known | None, scores: dict[str, float]) -> dict[str, dict[str, float | None]]:
    found: dict[str, dict[str, float | None]] = {}
    for name, score in scores.items():
        calibration = None if known is None else known.calibrations.get(name)
        found[name] = {
            "value": None if calibration is None else calibration.accuracy(score),
            "score": score,
            "mean_error": None if calibration is None else calibration.mean_error,
        }
    return found


def agreements(predictions: Sequence[Predictions]) -> tuple[tuple[float, ...], ...]:
    """Return (M, M) shares of examples on which two models predict the same class."""
    classes = [one.classes for one in predictions]
    return tuple(tuple(float((a == b).double().mean()) for b in classes) for a in classes)


def _means(agreement: Sequence[Sequence[float]]) -> list[float | None]:
    """Each model's mean agreement with the others; None of a single model."""
    count = len(agreement)
    return [None if count < 2 else (sum(row) - 1) / (count - 1) for row in agreement]
