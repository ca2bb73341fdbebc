"""What a labeled validation set and its synthetic shifts say about one model: scores with known accuracies."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from gm_probe.accuracy.calibration import Calibration, Row, as_it_is, fitted
from gm_probe.accuracy.evidence import Evidence, Labeled
from gm_probe.accuracy.predictions import Predictions
from gm_probe.accuracy.scores import ESTIMATORS, scores_of
from gm_probe.accuracy.shares import Corrected, em_shares, rejected, skewed
from gm_probe.measures.scores import Reference, counted_shares, probabilities
from gm_probe.measures.transport import transport

HALVES = 20
"""Number of random halves that replace shifts where the validation set cannot be shifted."""
SKEWS = (4.0, 4.0, 16.0, 16.0)
"""Ratios between the largest and the smallest share by which those of the validation set are changed for a trial."""
ON_HALVES = ("average_confidence", "doc", "atc", "atc_entropy", "cot")
"""Estimators that need no synthetic shifts: their scores are accuracies."""


@dataclass(frozen=True, slots=True)
class Signs:
    """What tells a change of the class shares from other shifts.

    Attributes:
        transported: COT under the shares that EM finds.
        gap: that minus COT under the validation's shares.
        rejected: whether the confidences are distributed otherwise than a mere change of the shares explains.
    """

    transported: float
    gap: float
    rejected: bool


@dataclass(frozen=True, slots=True)
class Known:
    """What is known of one model.

    Attributes:
        shares: (K,) class shares of the validation set.
        size: number of examples at which scores are compared.
        calibrations: of each estimator.
        signs: of each shifted validation set, at the size of the unlabeled set.
        offset: validation accuracy minus COT there, which is added to COT where only the class shares changed.
        skew_error: how far that was off on the validation set with other class shares, by reweighting.
        by_shifts: whether the calibrations are by synthetic shifts, not by random halves.
    """

    reference: Reference
    corrected: Corrected
    validation: Labeled
    shares: Tensor
    size: int
    calibrations: Mapping[str, Calibration] = field(default_factory=dict)
    signs: tuple[Signs, ...] = ()
    offset: float = 0.0
    skew_error: float = 0.0
    by_shifts: bool = False

    def weights(self, shares: Tensor) -> Tensor:
        """Return the weights (N,) that give the validation set the class ``shares`` (K,)."""
        return (shares / self.shares.clamp(min=1e-9))[self.validation.labels]

    def signs_of(self, predictions: Predictions) -> tuple[Signs, Tensor]:
        """Return the signs of an unlabeled set, and the class shares (K,) that EM finds."""
        temperature = self.reference.temperature
        found = em_shares(self.corrected.probabilities(predictions.logits), self.shares)
        p = probabilities(predictions.logits, temperature)
        own = probabilities(self.validation.predictions.logits, temperature).amax(1)
        transported = transport(p, found)
        gap = transported - transport(p, self.shares)
        return Signs(transported, gap, rejected(p.amax(1), own, self.weights(found))), found

    def on_skewed(self, generator: torch.Generator) -> tuple[float, float]:
        """Return COT's offset on the validation set, and its largest error there under ``SKEWS`` of the shares."""
        logits, right = self.validation.predictions.logits, self.validation.right.double()
        p, q = probabilities(logits, self.reference.temperature), self.corrected.probabilities(logits)
        offset = self.reference.accuracy - transport(p, self.shares)
        errors = [0.0]
        for ratio in SKEWS:
            weights = self.weights(skewed(self.shares, ratio, generator))
            estimate = transport(p, em_shares(q, self.shares, weights), weights) + offset
            errors.append(estimate - float(weights @ right / weights.sum()))
        return offset, max(map(abs, errors))


def know(evidence: Evidence, agreements: Sequence[float | None], seed: int) -> Known:
    """Learn from the validation set and its shifts.

    Args:
        agreements: mean share on which the other models agree, of the validation set and each shifted one.
    """
    validation = evidence.validation
    assert validation is not None
    logits, labels = validation.predictions.logits, validation.labels
    shares = counted_shares(labels, logits.shape[1])
    reference, size = Reference.of(logits, labels), evidence.size
    known = Known(reference, Corrected.of(logits, labels), validation, shares, size)
    if evidence.shifted:
        start, *rows = [
            Row(
                family,
                scores_of(found.predictions, reference, shares, agreement, size, seed),
                found.accuracy,
            )
            for (family, found), agreement in zip(
                [("none", validation), *evidence.shifted], agreements, strict=True
            )
        ]
        names = [name for name in ESTIMATORS if all(name in row.scores for row in (start, *rows))]
        calibrations = {name: fitted(rows, name, start) for name in names}
    else:
        rows = _halves(validation, seed)
        calibrations = {name: as_it_is(rows, name, reference.accuracy) for name in ON_HALVES}
    generator = torch.Generator().manual_seed(seed)
    signs = []
    for _, found in evidence.shifted:
        chosen = found.predictions.logits
        some = chosen[torch.randperm(len(chosen), generator=generator)[:size]]
        signs.append(known.signs_of(Predictions(some))[0])
    offset, error = known.on_skewed(generator)
    return replace(
        known,
        calibrations=calibrations,
        signs=tuple(signs),
        offset=offset,
        skew_error=error,
        by_shifts=bool(evidence.shifted),
    )


def _halves(validation: Labeled, seed: int) -> list[Row]:
    """Estimate the accuracy of one half from the labels of the other, ``HALVES`` times."""
    generator = torch.Generator().manual_seed(seed)
    logits, labels = validation.predictions.logits, validation.labels
    rows = []
    for index in range(HALVES):
        order = torch.randperm(len(labels), generator=generator)
        first, second = order[: len(order) // 2], order[len(order) // 2 :]
        reference = Reference.of(logits[first], labels[first])
        shares = counted_shares(labels[first], logits.shape[1])
        right = (logits[second].argmax(1) == labels[second]).double().mean()
        scores = scores_of(Predictions(logits[second]), reference, shares)
        rows.append(Row(f"half {index}", scores, float(right)))
    return rows
