"""Scores that follow accuracy: functions of a classifier's logits (N, K) that do not need their labels."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from scipy.optimize import minimize_scalar
from torch import Tensor
from torch.nn import functional


@dataclass(frozen=True, slots=True)
class Reference:
    """The parameters of the scores that come from a labeled set of the training distribution.

    Attributes:
        temperature: T of softmax(z/T).
        accuracy, confidence: share of right predictions, and mean probability of the predicted class.
        threshold, entropy_threshold: ATC's thresholds on the confidence and on the negative entropy.
    """

    temperature: float
    accuracy: float
    confidence: float
    threshold: float
    entropy_threshold: float

    def above_threshold(self, p: Tensor) -> Tensor:
        """Return (N,) whether the confidence in each row of probabilities (N, K) reaches ATC's threshold."""
        return p.amax(1) >= self.threshold

    def difference_of_confidences(self, confidence: float) -> float:
        """Return DoC's accuracy for a mean confidence, within [0, 1]."""
        return min(max(self.accuracy + confidence - self.confidence, 0.0), 1.0)

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
    # singular values come from the smaller Gram matrix, because the outputs themselves may be large
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


def effective_invariance(p: Tensor, mirrored: Tensor) -> Tensor:
    """Return (N,) √(p̂ p̂_t) where image and transformed image have the same class, else 0 (Deng et al. 2022)."""
    top, classes = p.double().max(1)
    other, others = mirrored.double().max(1)
    return (top * other).sqrt() * (classes == others)


def energy(logits: Tensor) -> Tensor:
    """Return −log Σ_c exp z_c (...) of logits (..., K) (Liu et al. 2020)."""
    return -logits.double().logsumexp(-1)


def margin(logits: Tensor) -> Tensor:
    """Return the difference (...) between the two largest of logits (..., K)."""
    first, second = logits.double().topk(2, dim=-1).values.unbind(-1)
    return first - second


def by_class(logits: Tensor) -> Tensor:
    """Return logits (N, K), of a yes-or-no model (N, 1, 2) those of its two classes."""
    return logits.squeeze(1) if logits.dim() == 3 else logits


def counted_shares(labels: Tensor, classes: int) -> Tensor:
    """Return the shares (K,) of the labels (N,)."""
    return labels.bincount(minlength=classes).double() / len(labels)
