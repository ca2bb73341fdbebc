"""All scores of a model's outputs by name, each a number of one set; no labels of that set are read."""

from __future__ import annotations

import math

from torch import Tensor

from gm_probe.accuracy.predictions import Predictions
from gm_probe.measures.scores import (
    Reference,
    effective_invariance,
    mano,
    negative_entropy,
    nuclear_norm,
    probabilities,
)
from gm_probe.measures.transport import transport
from gm_probe.runs.catalogue import CATALOGUE

ESTIMATORS = {
    "average_confidence": "mean probability of the predicted class",
    "doc": CATALOGUE["doc"].description,
    "atc": CATALOGUE["atc"].description,
    "atc_entropy": "share of negative entropies above the threshold that fits the accuracy on a labeled validation set",
    "cot": "largest mean confidence of an assignment with the given class shares",
    **{
        name: CATALOGUE[name].description
        for name in ("nuclear_norm", "mano", "dispersion", "last_layer_gradient_norm", "effective_invariance")
    },
    "agreement": "share of examples on which the other models predict the same class",
}
"""All estimators in the order of a table."""


def scores_of(
    predictions: Predictions,
    reference: Reference | None,
    shares: Tensor | None,
    agreement: float | None = None,
) -> dict[str, float]:
    """Return the scores that can be computed, by their names in ``ESTIMATORS``.

    Args:
        reference: None = nothing is labeled; then T is 1, and what needs labels is left out.
        shares: (K,) class shares for COT; None leaves it out.
        agreement: mean share on which the other models predict the same.
    """
    logits = predictions.logits
    p = probabilities(logits, 1.0 if reference is None else reference.temperature)
    confidence = p.amax(1)
    found: dict[str, float | None] = {"average_confidence": float(confidence.double().mean())}
    if reference is not None:
        found["doc"] = reference.difference_of_confidences(float(confidence.double().mean()))
        found["atc"] = float(reference.above_threshold(p).double().mean())
        found["atc_entropy"] = float((negative_entropy(p) >= reference.entropy_threshold).double().mean())
    found["cot"] = None if shares is None else transport(p, shares)
    found["nuclear_norm"] = nuclear_norm(p)
    found["mano"] = mano(logits)
    found["dispersion"] = predictions.dispersion
    found["last_layer_gradient_norm"] = predictions.gradient_norm
    if predictions.mirrored is not None:
        other = probabilities(predictions.mirrored, 1.0 if reference is None else reference.temperature)
        found["effective_invariance"] = float(effective_invariance(p, other).mean())
    found["agreement"] = agreement
    return {name: value for name, value in found.items() if value is not None and math.isfinite(value)}
