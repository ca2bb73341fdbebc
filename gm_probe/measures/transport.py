"""Confidence optimal transport: the largest mean confidence of an assignment of classes with given shares."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

import numpy as np
from scipy.optimize import minimize
from threadpoolctl import ThreadpoolController
from torch import Tensor

SMOOTHING = (0.03, 0.003, 0.0005)
"""Widths ε of the softened maximum; each minimisation starts where the one before ended."""
MAX_ITERATIONS = 60
_CELLS = 2**22
"""Numbers processed at a time, so that temporaries stay far below the size of the outputs."""


def transport(probabilities: Tensor, shares: Tensor, weights: Tensor | None = None) -> float:
    """Return max over assignments c with class shares π of mean_i p_{i,c(i)} (COT; Lu et al. 2023).

    It is solved by its dual in K numbers, min_w [mean_i max_c (p_ic − w_c) + Σ_c π_c w_c], with the maximum softened to
    ε logsumexp(·/ε). The returned value is the dual at the w found: an upper bound, which is tight at the minimum.

    Args:
        probabilities: (N, K).
        shares: (K,) class shares π, summing to 1; N π_c need not be whole.
        weights: (N,) weights of the examples in the mean; None = equal ones.
    """
    p = np.ascontiguousarray(probabilities.detach().cpu().numpy())
    pi = shares.detach().double().cpu().numpy()
    m = np.full(len(p), 1 / len(p)) if weights is None else weights.double().cpu().numpy()
    m = m / m.sum()
    w = np.zeros(p.shape[1])
    # for K numbers, several threads would spend more time waiting for each other than working
    with _threads().limit(limits=1, user_api="blas"):
        for epsilon in SMOOTHING:
            w = minimize(
                _soft_dual,
                w,
                (p, pi, m, epsilon),
                jac=True,
                method="L-BFGS-B",
                options={"maxiter": MAX_ITERATIONS, "ftol": 1e-9, "gtol": 1e-5},
            ).x
    return float(sum(mass @ (part - w.astype(p.dtype)).max(1) for part, mass in _parts(p, m)) + pi @ w)


@cache
def _threads() -> ThreadpoolController:
    return ThreadpoolController()


def _parts(p: np.ndarray, m: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    rows = max(1, _CELLS // p.shape[1])
    for start in range(0, len(p), rows):
        yield p[start : start + rows], m[start : start + rows]


def _soft_dual(
    w: np.ndarray, p: np.ndarray, pi: np.ndarray, m: np.ndarray, epsilon: float
) -> tuple[float, np.ndarray]:
    """Return the softened dual at w (K,) and its gradient."""
    value, taken = 0.0, np.zeros(len(w))
    for part, mass in _parts(p, m):
        z = part - w.astype(p.dtype)
        top = z.max(1, keepdims=True)
        z -= top
        z *= 1 / epsilon
        np.exp(z, out=z)
        total = z.sum(1)
        value += float(mass @ (top[:, 0] + epsilon * np.log(total)))
        taken += (mass / total) @ z
    return value + float(pi @ w), pi - taken
