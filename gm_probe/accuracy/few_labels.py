"""Accuracy from some labels of a random sample of the target, helped by the model's confidence on all of it."""

from __future__ import annotations

import math

from scipy.stats import binomtest, norm, t
from torch import Tensor

from gm_probe.accuracy.report import Accuracy

ENOUGH = 10
"""Right, and wrong, predictions among the labels before a normal approximation is trusted."""
POWER = 0.8
"""Chance of telling two models apart with the number of labels that is advised."""
ASSUMPTION = "the labeled images are a random sample of the unlabeled data"


def clopper_pearson(successes: int, trials: int, level: float) -> tuple[float, float]:
    """Return the exact interval of a share."""
    found = binomtest(successes, trials).proportion_ci(level)
    return float(found.low), float(found.high)


def prediction_powered(right: Tensor, confidence: Tensor, everywhere: Tensor, level: float) -> Accuracy:
    """Return the PPI++ mean (Angelopoulos et al. 2023) of ``right``, or the share with its exact interval.

    The latter where fewer than ``ENOUGH`` predictions are right or wrong, or where its interval is not the wider one.

    Args:
        right: (n,) whether each labeled prediction is right.
        confidence: (n,) the model's confidence there.
        everywhere: (N,) its confidence on the unlabeled set, from which the labeled examples are a random sample.
    """
    n, hits = len(right), int(right.sum())
    low, high = clopper_pearson(hits, n, level)
    alone = Accuracy(hits / n, low, high, level, "labels alone (Clopper-Pearson)", ASSUMPTION)
    if min(hits, n - hits) < ENOUGH:
        return alone
    y, f, all_f = right.double(), confidence.double(), everywhere.double()
    spread = float(f.var())
    if spread <= 0:
        return alone
    covariance = float(((y - y.mean()) * (f - f.mean())).sum()) / (n - 1)
    weight = min(max(covariance / (spread * (1 + n / len(all_f))), 0.0), 1.0)
    value = float(weight * all_f.mean() + (y - weight * f).mean())
    # two degrees of freedom are spent on the mean and on the weight
    variance = float((y - weight * f).var()) * (n - 1) / (n - 2) / n
    variance += weight**2 * float(all_f.var(correction=0)) / len(all_f)
    half = float(t.isf((1 - level) / 2, n - 2)) * math.sqrt(variance)
    low, high = max(value - half, 0.0), min(value + half, 1.0)
    if high - low >= alone.high - alone.low:
        return alone
    return Accuracy(
        min(max(value, 0.0), 1.0), low, high, level, "prediction-powered mean (PPI++)", ASSUMPTION
    )


def paired_difference(right: Tensor, other: Tensor, level: float) -> tuple[float, float, float]:
    """Return the difference of two models' accuracies on the same labels, and its interval: value, low, high.

    The interval is that of Agresti and Min (2005): half an observation is added to each cell.
    """
    n = len(right)
    first, second = int((right & ~other).sum()), int((other & ~right).sum())
    a, b, total = first + 0.5, second + 0.5, n + 2
    middle = (a - b) / total
    half = float(norm.isf((1 - level) / 2)) * math.sqrt(a + b - (a - b) ** 2 / total) / total
    return (first - second) / n, max(middle - half, -1.0), min(middle + half, 1.0)


def labels_to_separate(difference: float, disagreement: float, one_right: float, level: float) -> float:
    """Return about how many labels of images on which two models disagree tell which model is better.

    It is the size of a sign test of power ``POWER``, divided by the share of those images that tell.

    Args:
        difference: of the two accuracies on all images, as estimated.
        disagreement: share of images on which the models disagree.
        one_right: share of these on which one of the two is right.
    """
    if disagreement <= 0 or one_right <= 0 or difference == 0:
        return math.inf
    share = min(0.5 + abs(difference) / disagreement / one_right / 2, 1.0)
    wanted = float(norm.isf((1 - level) / 2)) / 2 + float(norm.ppf(POWER)) * math.sqrt(share * (1 - share))
    return max((wanted / (share - 0.5)) ** 2, 1 / (1 - level)) / one_right
