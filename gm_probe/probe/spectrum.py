"""Largest eigenvalue and trace of a symmetric operator, from products alone. Never sees a model."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from scipy.linalg import eigh_tridiagonal
from torch import Tensor

from gm_probe.core.errors import DivergedError
from gm_probe.probe.operators import Operator


@dataclass(frozen=True, slots=True)
class Eigenpair:
    """The largest eigenvalue as Lanczos left it.

    Attributes:
        value: Ritz value θ.
        vector: (P,) unit Ritz vector.
        residual: ‖A v − θ v‖ by Lanczos' own bound; some eigenvalue lies within it of θ.
        converged: the residual met the tolerance in two successive iterations (one can be a false plateau).
    """

    value: float
    vector: Tensor
    residual: float
    iterations: int
    converged: bool


def lanczos(
    operator: Operator,
    *,
    generator: torch.Generator,
    tolerance: float = 0.01,
    max_iterations: int = 100,
) -> Eigenpair:
    """Largest (algebraic) eigenvalue by Lanczos with full reorthogonalisation, recurrences in float64.

    Args:
        generator: draws the start vector. A warm start would save products, but hides what is orthogonal to it.
        tolerance: residual relative to \\|θ\\| at which to stop.

    Raises:
        DivergedError: a product is not finite.
    """
    w = torch.randn(operator.size, generator=generator, dtype=torch.float64).to(operator.device)
    basis: list[Tensor] = []
    diagonal: list[float] = []
    off_diagonal: list[float] = []
    norm = float(w.norm())
    theta, residual, ritz, met, converged = 0.0, math.inf, np.ones(1), 0, False
    for _ in range(min(max_iterations, operator.size)):
        basis.append((w / norm).to(operator.dtype))
        w = operator.matvec(basis[-1]).double()
        if not bool(torch.isfinite(w).all()):
            raise DivergedError("a curvature product is not finite; try --dtype float64")
        diagonal.append(float(basis[-1].double() @ w))
        for _ in range(2):  # twice is enough (Kahan); once leaves float32 ghosts
            for q in basis:
                w -= (q.double() @ w) * q
        norm = float(w.norm())
        values, vectors = eigh_tridiagonal(np.array(diagonal), np.array(off_diagonal))
        theta, ritz = float(values[-1]), vectors[:, -1]
        residual = norm * abs(float(ritz[-1]))
        scale = float(np.abs(values).max())
        met = met + 1 if residual <= tolerance * abs(theta) else 0
        # a vanishing norm means an invariant subspace: the Ritz values are eigenvalues
        converged = met >= 2 or norm <= 4 * torch.finfo(operator.dtype).eps * max(scale, 1e-300)
        if converged:
            break
        off_diagonal.append(norm)
    else:
        converged = len(basis) == operator.size
    vector = torch.zeros(operator.size, dtype=torch.float64, device=operator.device)
    for coefficient, q in zip(ritz, basis, strict=True):
        vector += float(coefficient) * q
    vector = (vector / vector.norm()).to(operator.dtype)
    return Eigenpair(theta, vector, residual, len(basis), converged)


@dataclass(frozen=True, slots=True)
class Trace:
    """A stochastic trace.

    Attributes:
        stderr: standard error over probes.
        stderr_examples: standard error from the N examples being a sample, the probes' noise taken out; None
            where these few probes cannot tell the two apart, or of a single example.
    """

    value: float
    stderr: float
    stderr_examples: float | None
    num_probes: int
    converged: bool


def trace(
    operator: Operator,
    *,
    generator: torch.Generator,
    tolerance: float = 0.05,
    min_probes: int = 10,
    max_probes: int = 100,
) -> Trace:
    """Hutchinson's estimator with Rademacher probes, until its standard error is ≤ ``tolerance`` · \\|value\\|.

    Raises:
        DivergedError: a term is not finite.
    """
    samples: list[float] = []
    total: Tensor | None = None  # (N,) Σ over probes of the examples' terms
    variances = 0.0  # Σ over probes of the variance over examples
    stderr, converged = math.inf, False
    while len(samples) < max_probes and not converged:
        signs = torch.randint(0, 2, (operator.size,), generator=generator, dtype=torch.int8).to(
            operator.device
        )
        terms = operator.terms(signs.to(operator.dtype) * 2 - 1).double()
        if not bool(torch.isfinite(terms).all()):
            raise DivergedError("a curvature term is not finite; try --dtype float64")
        total = terms if total is None else total + terms
        variances += float(terms.var()) if len(terms) > 1 else 0.0
        samples.append(float(terms.mean()))
        if len(samples) >= max(min(min_probes, max_probes), 2):
            stderr = float(np.std(samples, ddof=1)) / math.sqrt(len(samples))
            converged = stderr <= tolerance * abs(float(np.mean(samples)))
    assert total is not None
    n = len(samples)
    # Var(mean over n probes) = V + E/n and Var(one probe) = V + E, solved for the examples' own V
    own = (float(total.var()) - variances) / (n * (n - 1)) if n > 1 and len(total) > 1 else -1.0
    stderr_examples = math.sqrt(own / len(total)) if own >= 0 else None
    return Trace(float(np.mean(samples)), stderr, stderr_examples, n, converged)
