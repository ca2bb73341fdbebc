"""Traces: of any operator by Hutchinson's estimator, of the Fisher matrix by each example's own gradients."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from gm_probe.core.batches import Batches, cut
from gm_probe.core.errors import DivergedError
from gm_probe.core.parameters import Parameters
from gm_probe.core.processes import everywhere, gather_examples
from gm_probe.probe.example_gradients import ExampleGradients, RepeatedLayerError
from gm_probe.probe.operators import Operator
from gm_probe.probe.work import FORWARD, Work

SKETCH = 16  # products that find directions to deflate; of F they cut a probe's deviation 28 and 19 times
HEAD = 16  # classes whose covariance is diagonalised; the others are handled as one and a remainder
EXACT_CLASSES = 256  # up to so many are all diagonalised where the exact value is asked
LEAST_NORMS = (
    32  # squared norms that a standard error is told from: signs of few classes often agree by chance
)


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
        DivergedError: a term is not finite.
    """
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


class CovarianceRoot:
    """L with L Lᵀ = diag p − p pᵀ, the covariance of a class drawn from p, for probabilities p (B, C).

    Its columns are the eigenvectors: with them the columns' gradients are nearly orthogonal, so that random signs on
    them hardly disturb the squared norm. Of more than ``HEAD`` + 1 classes the less likely are lumped into one, and
    what this leaves out, p_T (diag q − q qᵀ) with q their distribution among themselves, is taken by the root
    √p_T (diag √q − q √qᵀ) (law of total variance).

    Args:
        most: classes that are diagonalised.

    Attributes:
        rank: number of columns.
        columns: (B, C, R) those of the head; all of them where ``complete``.
    """

    def __init__(self, p: Tensor, most: int = HEAD) -> None:
        p = p.double()
        ordered, self._order = p.sort(dim=1, descending=True)
        head = most if p.shape[1] > most + 1 else p.shape[1]
        self._tail = ordered[:, head:]  # (B, T)
        self._mass = self._tail.sum(1, keepdim=True)
        lumped = torch.cat([ordered[:, :head], self._mass], 1) if self._tail.shape[1] else ordered
        # p(1 − p) as a sum over the others: where p is nearly 1, the difference would be rounding alone
        products = lumped[:, :, None] * lumped[:, None, :] * (1 - torch.eye(lumped.shape[1]).to(lumped))
        covariance = torch.diag_embed(products.sum(2)) - products
        values, vectors = torch.linalg.eigh(covariance)
        columns = (vectors * values.clamp(min=0).sqrt()[:, None, :])[
            :, :, 1:
        ]  # the first belongs to eigenvalue 0
        if self._tail.shape[1]:
            columns = torch.cat([columns[:, :head], self._q[:, :, None] * columns[:, head:]], 1)
        self.columns = self._restored(columns)
        self.complete = not self._tail.shape[1]
        self.rank = columns.shape[2] + self._tail.shape[1]

    @property
    def _q(self) -> Tensor:
        return self._tail / self._mass.clamp(min=1e-300)

    def _restored(self, rows: Tensor) -> Tensor:
        """Rows (B, C, ...) of the sorted classes in the classes' own order."""
        order = self._order.view(*self._order.shape, *[1] * (rows.dim() - 2)).expand_as(rows)
        return torch.zeros_like(rows).scatter_(1, order, rows)

    def applied(self, signs: Tensor) -> Tensor:
        """L ε (B, C) for ε = ``signs`` (B, R)."""
        signs = signs.to(self.columns)
        head, tail = signs.split([self.columns.shape[2], self._tail.shape[1]], dim=1)
        result = torch.einsum("bcr,br->bc", self.columns, head)
        if self.complete:
            return result
        signed = self._q.sqrt() * tail
        rest = self._mass.sqrt() * (signed - self._q * signed.sum(1, keepdim=True))
        return result + self._restored(functional.pad(rest, (result.shape[1] - rest.shape[1], 0)))


def fisher_trace(
    parameters: Parameters,
    batches: Batches,
    clean: Tensor,
    work: Work,
    *,
    generator: torch.Generator,
    tolerance: float = 0.05,
    max_probes: int = 100,
) -> Trace | None:
    """tr F = (1/N) Σ_x ‖∇_θ (L_x ε)ᵀ z_x‖² in expectation over output-space signs ε, by each example's own norm.

    The examples' errors are independent, so one probe over N examples has an example's relative standard deviation
    divided by √N (METHOD.md, tr F by output signs, where one norm of the summed gradient is taken instead). Where more
    probes than columns of L would be needed, every column is taken: the exact value.

    Args:
        clean: (n, C) logits at θ in the order of ``batches``.
        tolerance: standard error relative to the trace; 0 asks for the exact value, which up to ``EXACT_CLASSES``
            classes have.
        max_probes: passes before giving up, unless the exact value takes fewer or is asked for.

    Returns:
        None where examples' gradients cannot be had of this model; see ``ExampleGradients``.
    """
    examples = ExampleGradients(parameters, next(iter(batches)).x)
    if not everywhere(examples.supported, clean.device):
        return None
    with suppress(RepeatedLayerError):
        return _by_examples(examples, batches, clean, work, generator, tolerance, max_probes)
    return None


def _by_examples(
    examples: ExampleGradients,
    batches: Batches,
    clean: Tensor,
    work: Work,
    generator: torch.Generator,
    tolerance: float,
    max_probes: int,
) -> Trace:
    most = HEAD if tolerance else EXACT_CLASSES

    def root_of(logits: Tensor) -> CovarianceRoot:
        return CovarianceRoot(logits.double().softmax(1), most)

    first = root_of(clean[:1])

    def passes(number: int | None) -> Tensor:
        """(number, N) squared norms for signs; None = for every column of L.

        Raises:
            RepeatedLayerError: in all processes, where one of them met such examples.
        """
        rows = []
        held = True
        # for all examples at once, so that an example's signs hang neither on the batch size nor on the process
        shape = (number or 0, batches.total, first.rank)
        signs = torch.randint(0, 2, shape, generator=generator, dtype=torch.int8) * 2 - 1
        mine = signs[:, batches.first : batches.first + batches.num_examples].split(batches.batch_size, 1)
        for batch, part, some in zip(batches, cut(clean, batches), mine, strict=True):
            root = root_of(part)
            if number is None:
                cotangents = root.columns.permute(2, 0, 1)
            else:
                cotangents = torch.stack([root.applied(one) for one in some])
            try:
                rows.append(examples.squared_norms(batch.x, cotangents.to(clean.dtype)).double())
            except RepeatedLayerError:
                held = False
                break
            work.add(FORWARD + len(cotangents) * examples.passes, len(part))
        if not everywhere(held, clean.device):
            raise RepeatedLayerError
        norms = gather_examples(torch.cat(rows, 1).T).T
        if not bool(torch.isfinite(norms).all()):
            raise DivergedError("an example's gradient is not finite; try --dtype float64")
        return norms

    def result(terms: Tensor, noise: float, stderr: float | None, probes: int, converged: bool) -> Trace:
        own = float(terms.var()) - noise if len(terms) > 1 else -1.0
        error = math.sqrt(own / len(terms)) if own >= 0 else None
        return Trace(float(terms.mean()), stderr, error, probes, converged, terms)

    def exact() -> Trace:
        return result(passes(None).sum(0), 0.0, None, first.rank, True)

    if first.complete and (first.rank <= 2 or tolerance == 0):
        return exact()
    norms = passes(2)
    while True:
        taken, size = norms.shape
        noise = float(norms.var(0).mean()) / taken  # of an example's mean over probes
        stderr, value = math.sqrt(noise / size), float(norms.mean())
        least = math.ceil(LEAST_NORMS / size)
        converged = stderr <= tolerance * value and taken >= least
        if converged or taken >= max_probes:
            return result(norms.mean(0), noise, stderr, taken, converged)
        allowed = tolerance * value
        needed = (
            max(taken * (stderr / allowed) ** 2 if stderr else 0, least)
            if allowed or not stderr
            else math.inf
        )
        if first.complete and needed - taken >= first.rank:
            return exact()
        more = min(math.ceil(needed) - taken if math.isfinite(needed) else max_probes, max_probes - taken, 8)
        norms = torch.cat([norms, passes(max(more, 1))])
