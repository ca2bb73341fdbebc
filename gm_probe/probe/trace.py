"""The trace of any operator by Hutchinson's estimator."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from gm_probe.core.checks import real, whole
from gm_probe.core.errors import DivergedError
from gm_probe.probe.operators import Operator

SKETCH = 16  # products that find directions to deflate; of F they cut a probe's deviation 28 and 19 times


@dataclass(frozen=True, slots=True)
class Trace:
    """A stochastic trace.

    Attributes:
        stderr: standard error over probes; None = exact.
        stderr_examples: standard error from the N examples being a sample, the probes' noise taken out; None
            where these few probes cannot tell the two apart, or of a single example.
        num_probes: that ``value`` is the mean of.
        terms: (N,) the examples' own shares, of mean ``value``; as noisy as the probes are few.
        sketched: directions were deflated that a sketch had found (Hutch++).
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
    deflate: Sequence[Tensor] = (),
    offset: Tensor | None = None,
    offset_error: float = 0.0,
) -> Trace:
    """Hutchinson's estimator with Rademacher probes, until its standard error is ≤ ``tolerance`` · \\|value\\|.

    Where the first probes say that many more are needed it turns into Hutch++ (Meyer et al. 2021): the span of A times
    ``SKETCH`` random vectors is deflated, and fresh probes see what is left.

    Args:
        max_probes: before giving up; a sketched direction counts as two.
        deflate: orthonormal vectors (P,) whose share is taken exactly, instead of a sketch's.
        offset: (N,) examples' known shares of another matrix, to estimate the trace of the sum.
        offset_error: standard error of their mean, which counts as this estimate's; where it is too large for the
            tolerance, the least number of probes is drawn.

    Raises:
        UsageError: a number is none that can be.
        DivergedError: a term is not finite.
    """
    real("tolerance", tolerance, least=0)
    real("offset_error", offset_error, least=0)
    whole("min_probes", min_probes)
    whole("max_probes", max_probes)
    known = torch.zeros((), dtype=torch.float64) if offset is None else offset.double()
    probes = _Probes(operator, generator, deflate, known, offset_error)
    first = max(min(min_probes, max_probes), 2)
    sketched = False
    while True:
        probes.draw()
        count = len(probes.samples)
        if count < first:
            continue
        allowed = tolerance * abs(probes.mean)
        done, hopeless = probes.stderr <= allowed, bool(allowed) and offset_error > allowed
        if done or hopeless or count >= max_probes:
            return probes.result(done, sketched)
        left = max_probes - count - 2 * SKETCH
        own = allowed**2 - offset_error**2
        needed = count * (probes.spread**2 / own) if own > 0 else math.inf
        if not (sketched or deflate) and left >= first and needed > 4 * SKETCH < operator.size:
            probes = _Probes(operator, generator, _sketch(operator, generator), known, offset_error)
            max_probes, sketched = left, True


class _Probes:
    """zᵀA z for random signs z, outside of the span of ``deflate``, whose share is taken exactly."""

    def __init__(
        self,
        operator: Operator,
        generator: torch.Generator,
        deflate: Sequence[Tensor],
        known: Tensor,
        known_error: float,
    ) -> None:
        self._operator, self._generator, self._deflate = operator, generator, deflate
        self._known, self._known_error = known, known_error
        for vector in deflate:
            self._known = self._known + operator.terms(vector).double()
        self.samples: list[float] = []
        self._total: Tensor | float = 0.0  # (N,) Σ over probes of the examples' terms
        self._variances = 0.0  # Σ over probes of the variance over examples

    def draw(self) -> None:
        operator = self._operator
        signs = torch.randint(0, 2, (operator.size,), generator=self._generator, dtype=torch.int8)
        probe = signs.to(operator.device, operator.dtype) * 2 - 1
        for vector in self._deflate:
            probe = probe - (vector @ probe) * vector
        terms = operator.terms(probe).double() + self._known
        if not bool(torch.isfinite(terms).all()):
            raise DivergedError("a curvature term is not finite; try --dtype float64")
        self._total = self._total + terms
        self._variances += float(terms.var()) if len(terms) > 1 else 0.0
        self.samples.append(float(terms.mean()))

    @property
    def mean(self) -> float:
        return float(np.mean(self.samples))

    @property
    def spread(self) -> float:
        """Standard error from the probes."""
        return float(np.std(self.samples, ddof=1)) / math.sqrt(len(self.samples))

    @property
    def stderr(self) -> float:
        """And from what is known."""
        return math.hypot(self.spread, self._known_error)

    def result(self, converged: bool, sketched: bool) -> Trace:
        total, n = self._total, len(self.samples)
        assert isinstance(total, Tensor)
        # Var(mean over n probes) = V + E/n and Var(one probe) = V + E, solved for the examples' own V
        own = (float(total.var()) - self._variances) / (n * (n - 1)) if len(total) > 1 else -1.0
        own -= len(total) * self._known_error**2  # the noise of the examples' known shares
        stderr_examples = math.sqrt(own / len(total)) if own >= 0 else None
        return Trace(self.mean, self.stderr, stderr_examples, n, converged, total / n, sketched)


def _sketch(operator: Operator, generator: torch.Generator) -> list[Tensor]:
    """Orthonormal vectors (P,) that span A times random ones: near its largest eigenvalues' where it decays."""
    found: list[Tensor] = []
    for _ in range(SKETCH):
        start = torch.randn(operator.size, generator=generator, dtype=torch.float64)
        image = operator.matvec(start.to(operator.device, operator.dtype)).double()
        before = float(image.norm())
        for _ in range(2):  # twice is enough (Kahan)
            for vector in found:
                image -= (vector.double() @ image) * vector
        if float(image.norm()) > 1e-4 * before:  # else A's rank is exhausted, and this is rounding
            found.append((image / image.norm()).to(operator.dtype))
    return found
