"""The order of the models, which of them can be told apart, what to label to tell more, and one conclusion."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import NormalDist, fmean
from typing import Any

import numpy as np
import torch

from gm_probe.accuracy.calibration import Calibration, conformal, scale_at
from gm_probe.accuracy.evidence import Evidence
from gm_probe.accuracy.few_labels import labels_to_separate, paired_difference
from gm_probe.accuracy.predictions import Predictions
from gm_probe.accuracy.report import (
    Accuracy,
    EstimateReport,
    ModelEstimate,
    Suggestion,
    percent,
)
from gm_probe.errors import listed
from gm_probe.measures.scores import probabilities

NOT_IDENTIFIABLE = (
    "accuracy on unlabeled data is not identifiable without labeled data of the training distribution; give a "
    "validation set"
)
UNLABELED_ORDER = ("agreement", "average_confidence", "nuclear_norm")
"""Scores whose mean rank orders models of which nothing labeled is known; the larger the better."""
LEADERS = 5
"""At most so many models count for the suggestions of what to label."""
NAMED = 3
"""The conclusion names at most so many models as close to the leader."""


@dataclass(frozen=True, slots=True)
class Standing:
    """What the order goes by: a model's evidence, the chosen estimator's calibration, its accuracy and its scores.

    ``estimators`` and ``agreement`` are what the model's row shows besides.
    """

    evidence: Evidence
    calibration: Calibration | None
    accuracy: Accuracy | None
    scores: Mapping[str, float]
    temperature: float = 1.0
    estimators: Mapping[str, Mapping[str, float | None]] = field(default_factory=dict)
    agreement: float | None = None

    def row(self, rank: int, separated: bool, measures: Mapping[str, Any]) -> ModelEstimate:
        """Return the model's row of the report."""
        evidence = self.evidence
        return ModelEstimate(
            name=evidence.name,
            rank=rank,
            accuracy=self.accuracy,
            reason="" if self.accuracy is not None else NOT_IDENTIFIABLE,
            estimators=self.estimators,
            measures=measures,
            agreement=self.agreement,
            separated=separated,
            validation_accuracy=None if evidence.validation is None else evidence.validation.accuracy,
            seconds=evidence.seconds,
        )


def conclude(
    standings: Sequence[Standing],
    measures: Mapping[str, Mapping[str, Any]],
    agreement: Sequence[Sequence[float]],
    level: float,
    seed: int,
    notes: Sequence[str],
) -> EstimateReport:
    """Return the report, best model first; ``measures`` are by model."""
    order = _order(standings)
    ordered = [standings[index] for index in order]
    first = ordered[0]
    apart = [False, *(separated(first, other, level) for other in ordered[1:])]
    ranked = [
        one.row(index + 1, apart[index], measures.get(one.evidence.name, {}))
        for index, one in enumerate(ordered)
    ]
    leaders = [one for one, told in zip(ordered, apart, strict=True) if not told]
    needed = _labels_needed(leaders[0], leaders[1], level) if len(leaders) > 1 else None
    evidence = first.evidence
    return EstimateReport(
        tuple(ranked),
        tuple(tuple(agreement[a][b] for b in order) for a in order),
        conclusion(ranked, needed, alike=len(evidence.unlabeled.logits) == _agreeing(leaders)),
        tuple(notes),
        needed,
        suggestions([one.evidence for one in leaders[:LEADERS]], seed),
        len(evidence.unlabeled.logits),
        None if evidence.validation is None else len(evidence.validation.labels),
        None if evidence.few_labels is None else len(evidence.few_labels.labels),
    )


def _order(standings: Sequence[Standing]) -> list[int]:
    indices = range(len(standings))
    accuracies = [one.accuracy for one in standings]
    if all(one is not None for one in accuracies):
        return sorted(indices, key=lambda i: -accuracies[i].value)  # type: ignore[union-attr]
    # of two models, each agrees with the other equally often, so agreement does not rank them
    names = [name for name in UNLABELED_ORDER if all(name in one.scores for one in standings)]
    ranks = [
        [sum(other.scores[name] > one.scores[name] for other in standings) for name in names]
        for one in standings
    ]
    return sorted(indices, key=lambda i: fmean(ranks[i]))


def separated(first: Standing, other: Standing, level: float) -> bool:
    """Return whether the first model's accuracy is told from the other's.

    With few labels by the same labels. Else by how far the difference of their estimates was off on labeled sets, which
    is less than each estimate was, since both err alike; and by the sampling error of the difference on both sets.
    """
    few, others = first.evidence.few_labels, other.evidence.few_labels
    if few is not None and others is not None:
        _, low, _ = paired_difference(few.right, others.right, level)
        return low > 0
    if first.accuracy is None or other.accuracy is None:
        return False
    ours, theirs = first.calibration, other.calibration
    assert ours is not None
    assert theirs is not None
    differences = np.subtract(ours.residuals, theirs.residuals) / np.add(ours.scales, theirs.scales)
    scale = scale_at(first.accuracy.value, ours.top) + scale_at(other.accuracy.value, theirs.top)
    quantile = conformal(differences, level) * scale
    variance = sum(_apart(a, b) / len(a.logits) for a, b in zip(_sets(first), _sets(other), strict=True))
    sampling = NormalDist().inv_cdf((1 + level) / 2) * variance**0.5
    return first.accuracy.value - other.accuracy.value > (quantile**2 + sampling**2) ** 0.5


def _sets(one: Standing) -> list[Predictions]:
    """Return a model's predictions for the unlabeled set and for the validation set."""
    assert one.evidence.validation is not None
    return [one.evidence.unlabeled, one.evidence.validation.predictions]


def _apart(ours: Predictions, theirs: Predictions) -> float:
    """Return the share of examples on which two models predict different classes."""
    return float((ours.classes != theirs.classes).double().mean())


def _labels_needed(first: Standing, other: Standing, level: float) -> int | None:
    """Return about how many labels of images on which both disagree tell them apart; None where all are too few."""
    if first.accuracy is None or other.accuracy is None:
        return None
    ours, theirs = first.evidence.unlabeled, other.evidence.unlabeled
    apart = ours.classes != theirs.classes
    if not bool(apart.any()):
        return None
    right = sum(
        float(probabilities(one.evidence.unlabeled.logits[apart], one.temperature).amax(1).mean())
        for one in (first, other)
    )
    share = float(apart.double().mean())
    difference = first.accuracy.value - other.accuracy.value
    needed = labels_to_separate(difference, share, min(right, 1.0), level)
    return math.ceil(needed) if needed <= int(apart.sum()) else None


def suggestions(leaders: Sequence[Evidence], seed: int) -> tuple[Suggestion, ...]:
    """Return the examples on which the leaders disagree, in random order, so that any first part is a fair sample."""
    if len(leaders) < 2:
        return ()
    classes = torch.stack([one.unlabeled.classes for one in leaders])
    apart = (classes != classes[0]).any(0).nonzero()[:, 0]
    order = torch.randperm(len(apart), generator=torch.Generator().manual_seed(seed))
    return tuple(
        Suggestion(int(index), {one.name: int(classes[row, index]) for row, one in enumerate(leaders)})
        for index in apart[order]
    )


def _agreeing(leaders: Sequence[Standing]) -> int:
    """Count the unlabeled examples on which all of them predict the same class."""
    classes = torch.stack([one.evidence.unlabeled.classes for one in leaders])
    return int((classes == classes[0]).all(0).sum())


def conclusion(ranked: Sequence[ModelEstimate], needed: int | None, *, alike: bool) -> str:
    """Say what follows, in plain words; ``alike``: whether the leaders predict the same on every example."""
    first = ranked[0]
    close = [one.name for one in ranked[1:] if not one.separated]
    if first.accuracy is None:
        order = ", ".join(one.name for one in ranked)
        guide = f" Agreement and confidence, a weak guide, give the order {order}." if len(ranked) > 1 else ""
        return f"No accuracy is claimed: {first.reason}.{guide}"
    found = first.accuracy
    interval = f"{100 * found.level:g} % interval {percent(found.low)} to {percent(found.high)}"
    if len(ranked) == 1:
        return (
            f"{first.name} classifies an estimated {percent(found.value)} of the unlabeled data "
            f"correctly ({interval})."
        )
    leads = f"{first.name} leads with {percent(found.value)} ({interval})"
    if not close:
        return f"{leads}; it differs detectably from every other model."
    some = close if len(close) <= NAMED else [*close[: NAMED - 1], f"{len(close) - NAMED + 1} more"]
    said = f"{leads}; {listed(some)} cannot be distinguished from it."
    if alike:
        return f"{said} They predict the same class for every unlabeled example."
    if needed is None:
        return (
            f"{said} The estimates of {first.name} and {close[0]} are so close that labels of all images on which they "
            "disagree would not separate them."
        )
    return f"{said} To separate {first.name} from {close[0]}, label about {needed:,} images on which they disagree."
