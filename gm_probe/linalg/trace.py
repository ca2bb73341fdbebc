"""The trace of any operator by Hutchinson's estimator."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from gm_probe.checks import real, whole
from gm_probe.errors import DivergedError
from gm_probe.linalg.operator import Operator, random_signs, random_start
from gm_probe.linalg.work import Expect

SKETCH = (
    16  # products that find directions to deflate; on F they reduced a vector's deviation 28 and 19 times
)


@dataclass(frozen=True, slots=True)
class Trace:
    """A stochastic trace.

    Attributes:
        stderr: standard error over random vectors; None = exact.
        stderr_examples: standard error from the N examples being a sample, without the noise of the vectors. It is None
            for a single example, and where so few vectors cannot separate the two.
        num_probes: number of random vectors whose mean ``value`` is.
        terms: (N,) the examples' own shares, with mean ``value``. They are noisy where the vectors are few.
        sketched: whether directions that a sketch found were deflated (Hutch++).
    """

    value: float
    stderr: float | None
    stderr_examples: float | None
    num_probes: int
    converged: bool
    terms: Tensor
    sketched: bool = False


def trace(
    operator: Operator,
    *,
    generator: torch.Generator,
    tolerance: float = 0.05,
    min_probes: int = 10,
    max_probes: int = 100,
    offset: Tensor | None = None,
    offset_error: float = 0.0,
) -> Trace:
    """Estimate tr A by random signs (Hutchinson), until the standard error is at most ``tolerance`` · \\|value\\|.

    Where the first vectors show that many more are needed, it becomes Hutch++ (Meyer et al. 2021): the span of A times
    ``SKETCH`` random vectors is deflated, and new vectors see what is left.

    Args:
        max_probes: maximum number of vectors; a sketched direction counts as two.
        offset: (N,) examples' known shares of another matrix, to estimate the trace of the sum.
        offset_error: standard error of the mean of ``offset``, which is part of this estimate's. Where it alone exceeds
            the tolerance, only ``min_probes`` vectors are drawn.

    Raises:
        UsageError: a number is outside of its range.
        DivergedError: a term is not finite.
    """
    estimator = Hutchinson(
        operator, generator=generator, tolerance=tolerance, min_probes=min_probes, max_probes=max_probes
    )
    return estimator.estimate(offset, offset_error)


class Hutchinson:
    """The estimator of ``trace``, which uses its random vectors again for another ``offset``.

    Args:
        expect: called after every product with the number of vectors done and the expected total.
    """

    def __init__(
        self,
        operator: Operator,
        *,
        generator: torch.Generator,
        tolerance: float,
        min_probes: int,
        max_probes: int,
        expect: Expect | None = None,
    ) -> None:
        self.tolerance = real("tolerance", tolerance, least=0)
        self.most = whole("max_probes", max_probes)
        self.first = max(min(whole("min_probes", min_probes), max_probes), 2)
        self._operator, self._generator, self._expect = operator, generator, expect
        self._spent = 0  # products for a sketch, and for the vectors that it replaced
        self._vectors = _RandomVectors(operator, generator)

    def estimate(self, offset: Tensor | None = None, offset_error: float = 0.0) -> Trace:
        """Estimate the trace, as ``trace`` does."""
        real("offset_error", offset_error, least=0)
        while True:
            count = self._vectors.count
            if count >= self.first:
                value = self._vectors.mean + (0.0 if offset is None else float(offset.double().mean()))
                allowed = self.tolerance * abs(value)
                error = math.hypot(self._vectors.spread, offset_error)
                done, hopeless = error <= allowed, bool(allowed) and offset_error > allowed
                if done or hopeless or count >= self.most - self._spent:
                    return self._vectors.result(offset, offset_error, done, self._spent > 0)
                self._look_ahead(allowed**2 - offset_error**2)
            self._vectors.draw()
            if count == 0:  # the cost of a product is measured from here
                self._tell(self.first)

    def _look_ahead(self, own: float) -> None:
        """Report how many vectors a variance of ``own`` needs, and sketch once where they are many."""
        count = self._vectors.count
        needed = count * (self._vectors.spread**2 / own) if own > 0 else math.inf
        self._tell(needed)
        left = self.most - count - 2 * SKETCH
        if not self._spent and left >= self.first and needed > 4 * SKETCH < self._operator.size:
            sketch = _sketch(self._operator, self._generator)
            self._vectors = _RandomVectors(self._operator, self._generator, sketch)
            self._spent = count + 2 * SKETCH
            self._tell(left)

    def _tell(self, needed: float) -> None:
        if self._expect is not None:
            self._expect(self._spent + self._vectors.count, min(self._spent + needed, self.most))


class _RandomVectors:
    """zᵀA z for random signs z outside of the span of ``deflate``, whose share is computed exactly."""

    def __init__(
        self, operator: Operator, generator: torch.Generator, deflate: Sequence[Tensor] = ()
    ) -> None:
        self._operator, self._generator, self._deflate = operator, generator, deflate
        self._deflated: Tensor | float = 0.0  # (N,) the examples' shares in the span
        for vector in deflate:
            self._deflated = self._deflated + operator.terms(vector).double()
        self._means: list[float] = []
        self._total: Tensor | float = 0.0  # (N,) Σ over vectors of the examples' terms
        self._variances = 0.0  # Σ over vectors of the variance over examples

    def draw(self) -> None:
        operator = self._operator
        z = random_signs(operator, self._generator, operator.dtype)
        for vector in self._deflate:
            z = z - (vector @ z) * vector
        terms = operator.terms(z).double() + self._deflated
        if not bool(torch.isfinite(terms).all()):
            raise DivergedError("a curvature term is not finite; try --dtype float64")
        self._total = self._total + terms
        self._variances += float(terms.var()) if len(terms) > 1 else 0.0
        self._means.append(float(terms.mean()))

    @property
    def count(self) -> int:
        return len(self._means)

    @property
    def mean(self) -> float:
        return float(np.mean(self._means))

    @property
    def spread(self) -> float:
        """Standard error over the random vectors."""
        return float(np.std(self._means, ddof=1)) / math.sqrt(self.count)

    def result(self, offset: Tensor | None, offset_error: float, converged: bool, sketched: bool) -> Trace:
        """Return tr A plus the mean of the known shares ``offset`` (N,), which has the error ``offset_error``."""
        total, variances, n = self._total, self._variances, self.count
        assert isinstance(total, Tensor)
        if offset is not None:
            known = offset.double()
            if not bool(torch.isfinite(known).all()):
                raise DivergedError("a curvature term is not finite; try --dtype float64")
            if len(total) > 1:  # Σ Var(tᵢ + k) = Σ Var(tᵢ) + 2 Cov(Σ tᵢ, k) + n Var(k)
                variances += float(2 * torch.cov(torch.stack([total, known]))[0, 1] + n * known.var())
            total = total + n * known
        # Var(mean over n vectors) = V + E/n and Var(one vector) = V + E are solved for the examples' own variance V
        own = (float(total.var()) - variances) / (n * (n - 1)) if len(total) > 1 else -1.0
        own -= len(total) * offset_error**2  # the noise of the known shares
        stderr_examples = math.sqrt(own / len(total)) if own >= 0 else None
        error = math.hypot(self.spread, offset_error)
        return Trace(float(total.mean()) / n, error, stderr_examples, n, converged, total / n, sketched)


def _sketch(operator: Operator, generator: torch.Generator) -> list[Tensor]:
    """Return orthonormal vectors (P,) that span A times random ones, near the leading eigenvectors of A."""
    found: list[Tensor] = []
    for _ in range(SKETCH):
        start = random_start(operator, generator)
        image = operator.matvec(start.to(operator.dtype)).double()
        before = float(image.norm())
        for _ in range(2):  # twice is enough (Kahan)
            for vector in found:
                image -= (vector.double() @ image) * vector
        if float(image.norm()) > 1e-4 * before:  # otherwise A's rank is exhausted, and the rest is rounding
            found.append((image / image.norm()).to(operator.dtype))
    return found
