"""All scores of a model's outputs by name, each a number of one set; no labels of that set are read."""

from __future__ import annotations

import math
from statistics import fmean

import torch
from torch import Tensor

from gm_probe.accuracy.predictions import Predictions
from gm_probe.measures.catalogue import MEASURES
from gm_probe.measures.scores import (
    Reference,
    effective_invariance,
    mano,
    negative_entropy,
    nuclear_norm,
    probabilities,
)
from gm_probe.measures.transport import transport

ESTIMATORS = {
    "average_confidence": "mean probability of the predicted class",
    "doc": MEASURES["doc"].description,
    "atc": MEASURES["atc"].description,
    "atc_entropy": "share of negative entropies above the threshold that fits the accuracy on a labeled validation set",
    "cot": "largest mean confidence of an assignment with the given class shares",
    **{
        name: MEASURES[name].description
        for name in ("nuclear_norm", "mano", "dispersion", "last_layer_gradient_norm", "effective_invariance")
    },
    "agreement": "share of examples on which the other models predict the same class",
}
"""All estimators in the order of a table."""
UNSTEADY = frozenset(("dispersion", "last_layer_gradient_norm"))
"""Estimators that are shown and never chosen: their errors are those of one sum over a set, which another sample of the
same images may change by more than all synthetic shifts of one validation set tell."""
PARTS = 20
"""Most parts of a set over which a score is averaged."""


def scores_of(
    predictions: Predictions,
    reference: Reference | None,
    shares: Tensor | None,
    agreement: float | None = None,
    size: int | None = None,
    seed: int = 0,
) -> dict[str, float]:
    """Return the scores that can be computed, by their names in ``ESTIMATORS``.

    Args:
        reference: None = nothing is labeled; then T is 1, and what needs labels is left out.
        shares: (K,) class shares for COT; None leaves it out.
        agreement: mean share on which the other models predict the same.
        size: number of examples at which scores are taken that depend on it; they are means over random parts. Among
            few examples, chance moves the class shares that COT must meet. None = all examples at once.
    """
    logits = predictions.logits
    p = probabilities(logits, 1.0 if reference is None else reference.temperature)
    confidence = p.amax(1)
    found: dict[str, float | None] = {"average_confidence": float(confidence.double().mean())}
    if reference is not None:
        found["doc"] = reference.difference_of_confidences(float(confidence.double().mean()))
        found["atc"] = float(reference.above_threshold(p).double().mean())
        found["atc_entropy"] = float((negative_entropy(p) >= reference.entropy_threshold).double().mean())
    parts = [p] if size is None else _parts(p, size, seed)
    found["cot"] = None if shares is None else fmean(transport(part, shares) for part in parts)
    found["nuclear_norm"] = fmean(map(nuclear_norm, parts))
    found["mano"] = mano(logits)
    found["dispersion"] = predictions.dispersion
    found["last_layer_gradient_norm"] = predictions.gradient_norm
    if predictions.mirrored is not None:
        other = probabilities(predictions.mirrored, 1.0 if reference is None else reference.temperature)
        found["effective_invariance"] = float(effective_invariance(p, other).mean())
    found["agreement"] = agreement
    return {name: value for name, value in found.items() if value is not None and math.isfinite(value)}


def _parts(p: Tensor, size: int, seed: int) -> list[Tensor]:
    """Return random parts of ``size`` rows that cover ``p`` (N, K), the last one filled up; ``PARTS`` at most."""
    if size >= len(p):
        return [p]
    order = torch.randperm(len(p), generator=torch.Generator().manual_seed(seed))
    number = min(math.ceil(len(p) / size), PARTS)
    return [p[rows] for rows in torch.cat([order, order])[: number * size].split(size)]
