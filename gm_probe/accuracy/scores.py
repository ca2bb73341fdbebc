"""Scores of a model's outputs that follow its accuracy, each a number of one set; no labels of that set are read."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from scipy.optimize import minimize_scalar
from torch import Tensor
from torch.nn import functional

from gm_probe.accuracy.predictions import Predictions
from gm_probe.accuracy.transport import transport

ESTIMATORS = {
    "average_confidence": "mean probability of the predicted class",
    "doc": "validation accuracy plus the difference of the mean confidences",
    "atc": "share of confidences above the threshold that fits the validation accuracy",
    "atc_entropy": "the same with negative entropies instead of confidences",
    "cot": "largest mean confidence of an assignment with the given class shares",
    "nuclear_norm": "nuclear norm of the matrix of outputs",
    "mano": "fourth-power mean of the normalised outputs",
    "dispersion": "spread of the predicted classes' mean features",
    "last_layer_gradient_norm": "size of the last layer's gradient with predicted labels",
    "effective_invariance": "confidence that image and mirror image share, where their classes agree",
    "agreement": "share of examples on which the other models predict the same class",
}
"""All estimators in the order of a table."""


@dataclass(frozen=True, slots=True)
class Reference:
    """What a labeled set of the training distribution fixes for the scores.

    Attributes:
        temperature: T of softmax(z/T).
        accuracy, confidence: share that is right, and mean probability of the predicted class.
        threshold, entropy_threshold: of ATC, on the confidence and on the negative entropy.
    """

    temperature: float
    accuracy: float
    confidence: float
    threshold: float
    entropy_threshold: float

    @classmethod
    def of(cls, logits: Tensor, labels: Tensor) -> Reference:
        """Fit to logits (N, K) and labels (N,)."""
        temperature = fitted_temperature(logits, labels)
        p = probabilities(logits, temperature)
        right = p.argmax(1) == labels
        confidence = p.amax(1)
        return cls(
            temperature,
            float(right.double().mean()),
            float(confidence.double().mean()),
            atc_threshold(confidence, right),
            atc_threshold(negative_entropy(p), right),
        )


def fitted_temperature(logits: Tensor, labels: Tensor) -> float:
    """Return the T in [0.05, 20] that minimises the cross-entropy of softmax(z/T)."""
    z = logits.double()

    def loss(log_t: float) -> float:
        return float(functional.cross_entropy(z / math.exp(log_t), labels))

    found = minimize_scalar(loss, bounds=(math.log(0.05), math.log(20)), method="bounded")
    return math.exp(found.x)


def probabilities(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """Return softmax(z/T) (N, K), in the dtype of the logits."""
    return (logits / temperature).softmax(1)


def negative_entropy(p: Tensor) -> Tensor:
    """Return Σ_c p_c log p_c (N,) of probabilities (N, K)."""
    return torch.special.xlogy(p, p).sum(1)


def atc_threshold(scores: Tensor, right: Tensor) -> float:
    """Return t so that as many scores (N,) lie below it as predictions are wrong."""
    wrong = int((~right).sum())
    ordered = scores.sort().values
    return float(ordered[wrong]) if wrong < len(ordered) else math.inf


def nuclear_norm(p: Tensor) -> float:
    """Return ‖P‖_* / √(min(N, K) N) of probabilities (N, K), which lies in [0, 1] (Deng et al. 2023)."""
    rows, columns = p.shape
    # singular values by the smaller Gram matrix: the outputs themselves may be large
    p = p.double() if p.numel() <= 2**24 else p
    gram = p.T @ p if columns <= rows else p @ p.T
    values = torch.linalg.eigvalsh(gram.double()).clamp(min=0).sqrt()
    return float(values.sum()) / math.sqrt(min(rows, columns) * rows)


def mano(logits: Tensor) -> float:
    """Return (mean of q⁴)^{1/4} over all entries of the normalised outputs q (Xie et al. 2024, MaNo)."""
    z = logits.double()
    if float(-z.log_softmax(1).mean()) > 5:
        q = z.softmax(1)
    else:
        q = 1 + z + z.square() / 2  # a Taylor polynomial, which is positive everywhere
        q = q / q.sum(1, keepdim=True)
    return float(q.pow(4).mean().pow(0.25))


def effective_invariance(p: Tensor, mirrored: Tensor) -> float:
    """Return the mean of √(p̂ p̂_t) where image and transformed image have the same class, else 0 (Deng et al. 2022)."""
    top, classes = p.double().max(1)
    other, others = mirrored.double().max(1)
    return float(((top * other).sqrt() * (classes == others)).mean())


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
        mean = float(confidence.double().mean())
        found["doc"] = min(max(reference.accuracy + mean - reference.confidence, 0.0), 1.0)
        found["atc"] = float((confidence >= reference.threshold).double().mean())
        found["atc_entropy"] = float((negative_entropy(p) >= reference.entropy_threshold).double().mean())
    found["cot"] = None if shares is None else transport(p, shares)
    found["nuclear_norm"] = nuclear_norm(p)
    found["mano"] = mano(logits)
    found["dispersion"] = predictions.dispersion
    found["last_layer_gradient_norm"] = predictions.gradient_norm
    if predictions.mirrored is not None:
        other = probabilities(predictions.mirrored, 1.0 if reference is None else reference.temperature)
        found["effective_invariance"] = effective_invariance(p, other)
    found["agreement"] = agreement
    return {name: value for name, value in found.items() if value is not None and math.isfinite(value)}
