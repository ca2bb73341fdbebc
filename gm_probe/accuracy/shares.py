"""Class shares of unlabeled data, under the assumption that nothing else changed, and a test of that assumption."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from scipy.optimize import minimize
from scipy.stats import chi2
from torch import Tensor
from torch.nn import functional

STEPS, CLOSE = 300, 1e-6
"""Most EM steps, and the change of a share at which they end."""
PENALTY = 1e-3
"""Weight of the squared biases: a class with few labels gets no bias without bound."""
CRITICAL = 1.36
"""Kolmogorov-Smirnov's statistic times √n at the 5 % level."""
SURE = 2.23
"""The same at the 0.01 % level, for an assumption that is tested with each of several models."""


@dataclass(frozen=True, slots=True)
class Corrected:
    """Bias-corrected temperature scaling softmax(s z + b): what EM needs to find the class shares (Alexandari 2020)."""

    scale: float
    biases: Tensor  # (K,)

    @classmethod
    def of(cls, logits: Tensor, labels: Tensor) -> Corrected:
        """Fit to logits (N, K) and labels (N,) by the cross-entropy."""
        z = logits.double()

        def loss(values: np.ndarray) -> tuple[float, np.ndarray]:
            free = torch.tensor(values, requires_grad=True)
            with torch.enable_grad():
                found = functional.cross_entropy(z * free[0].exp() + free[1:], labels)
                found = found + PENALTY * free[1:].square().sum()
                (gradient,) = torch.autograd.grad(found, free)
            return found.item(), gradient.numpy()

        best = minimize(loss, np.zeros(z.shape[1] + 1), jac=True, method="L-BFGS-B").x
        return cls(math.exp(best[0]), torch.from_numpy(best[1:]))

    def probabilities(self, logits: Tensor) -> Tensor:
        """Return (N, K) probabilities in float64."""
        return (logits.double() * self.scale + self.biases).softmax(1)


def em_shares(p: Tensor, known: Tensor, weights: Tensor | None = None) -> Tensor:
    """Return the class shares (K,) of a set by EM (Saerens et al. 2002).

    Args:
        p: (N, K) probabilities, calibrated where the class shares are ``known`` (K,).
        weights: (N,) of the examples; None = equal ones.
    """
    mass = torch.full((len(p),), 1 / len(p), dtype=torch.float64) if weights is None else weights
    mass = mass / mass.sum()
    known = known.clamp(min=1e-9)
    shares = known / known.sum()
    for _ in range(STEPS):
        posterior = p * (shares / known)
        after = (mass / posterior.sum(1)) @ posterior
        if float((after - shares).abs().max()) < CLOSE:
            return after
        shares = after
    return shares


def rejected(scores: Tensor, reference: Tensor, weights: Tensor, critical: float = CRITICAL) -> bool:
    """Return whether ``scores`` (N,) and ``reference`` (M,) under ``weights`` (M,) differ in distribution.

    It is the Kolmogorov-Smirnov test, at the 5 % level unless ``critical`` says otherwise. With confidences as scores,
    and weights that give the reference the class shares of the other set, it tests whether only these changed.
    """
    values, order = torch.cat([scores, reference]).sort()
    # equal values, such as 1.0, are one step: only the last of them counts
    last = torch.cat([values[1:] != values[:-1], torch.ones(1, dtype=torch.bool)])
    steps = torch.cat([torch.full((len(scores),), 1 / len(scores)).double(), -weights / weights.sum()])
    distance = float(steps[order].cumsum(0)[last].abs().max())
    effective = float(weights.sum().square() / weights.square().sum())
    return distance * math.sqrt(len(scores) * effective / (len(scores) + effective)) > critical


def skewed(shares: Tensor, ratio: float, generator: torch.Generator) -> Tensor:
    """Return ``shares`` (K,) times factors from 1 to ``ratio`` in random order, summing to 1."""
    places = torch.randperm(len(shares), generator=generator).double() / max(len(shares) - 1, 1)
    found = shares * ratio**places
    return found / found.sum()


def same_shares(predicted: Tensor, reference: Tensor, classes: int, significance: float = 0.01) -> bool:
    """Return whether a chi-square test finds no difference between two sets of predicted classes (N,), (M,)."""
    counts = torch.stack([labels.bincount(minlength=classes).double() for labels in (predicted, reference)])
    counts = counts[:, counts.sum(0) > 0]
    if counts.shape[1] < 2:
        return True
    expected = counts.sum(1, keepdim=True) * counts.sum(0) / counts.sum()
    statistic = float(((counts - expected).square() / expected).sum())
    return float(chi2.sf(statistic, counts.shape[1] - 1)) >= significance
