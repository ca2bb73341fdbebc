"""The trace of the Fisher matrix by each example's own gradients, with random signs on the outputs, or exactly."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress

import torch
from torch import Tensor
from torch.nn import functional

from gm_probe.checks import real, whole
from gm_probe.curvature.example_gradients import ExampleGradients, IrregularLayerError
from gm_probe.data.batches import Batches, cut
from gm_probe.errors import DivergedError
from gm_probe.linalg.trace import Trace
from gm_probe.linalg.work import FORWARD, GRADIENT, Work
from gm_probe.models.parameters import Parameters
from gm_probe.runtime.processes import everywhere, gather_examples

HEAD = 16  # number of classes whose covariance is diagonalised; the others are one class and a remainder
COLUMNS = 32  # columns of L whose gradients follow one forward pass
LEAST_NORMS = 32  # squared norms for a standard error, since the signs of few classes often agree by chance


class CovarianceRoot:
    """L with L Lᵀ = diag p − p pᵀ, the covariance of a class drawn from p, for probabilities p (B, C).

    For independent labels, p (B, M, C), it is block-diagonal: each label's columns are 0 elsewhere.

    The columns are eigenvectors, whose gradients are nearly orthogonal, so random signs on them hardly change the
    squared norm. With more than ``HEAD`` + 1 classes, the less likely ones become one class. The remaining covariance
    is p_T (diag q − q qᵀ), where q is their distribution among themselves; its root is √p_T (diag √q − q √qᵀ) (law of
    total variance).

    Attributes:
        rank: number of columns.
    """

    def __init__(self, p: Tensor) -> None:
        self._shape = p.shape
        p = p.double().flatten(0, -2)  # a row for each example, or for each of its labels
        ordered, self._order = p.sort(dim=1, descending=True)
        head = HEAD if p.shape[1] > HEAD + 1 else p.shape[1]
        self._tail = ordered[:, head:]  # (B, T)
        self._mass = self._tail.sum(1, keepdim=True)
        lumped = torch.cat([ordered[:, :head], self._mass], 1) if self._tail.shape[1] else ordered
        # p(1 − p) is a sum over the others; where p is nearly 1, the difference would be rounding alone
        products = lumped[:, :, None] * lumped[:, None, :] * (1 - torch.eye(lumped.shape[1]).to(lumped))
        covariance = torch.diag_embed(products.sum(2)) - products
        values, vectors = torch.linalg.eigh(covariance)
        # the first eigenvalue is 0
        columns = vectors[:, :, 1:] * values[:, None, 1:].clamp(min=0).sqrt()
        if self._tail.shape[1]:
            columns = torch.cat([columns[:, :head], self._q[:, :, None] * columns[:, head:]], 1)
        self._head = self._restored(columns)  # (B, C, R), without the columns of the tail
        self._row_rank = columns.shape[2] + self._tail.shape[1]
        self.rank = self._shape[1:-1].numel() * self._row_rank

    @property
    def _q(self) -> Tensor:
        return self._tail / self._mass.clamp(min=1e-300)

    def _restored(self, rows: Tensor) -> Tensor:
        """Return rows (B, C, ...) of the sorted classes in the original order of classes."""
        order = self._order.view(*self._order.shape, *[1] * (rows.dim() - 2)).expand_as(rows)
        return torch.zeros_like(rows).scatter_(1, order, rows)

    def applied(self, signs: Tensor) -> Tensor:
        """Return L ε (B, C) or (B, M, C) for ε = ``signs`` (B, R)."""
        return self._of_rows(signs.reshape(-1, self._row_rank).to(self._head)).view(self._shape)

    def _of_rows(self, signs: Tensor) -> Tensor:
        head, tail = signs.split([self._head.shape[2], self._tail.shape[1]], dim=1)
        result = torch.einsum("bcr,br->bc", self._head, head)
        if not self._tail.shape[1]:
            return result
        signed = self._q.sqrt() * tail
        rest = self._mass.sqrt() * (signed - self._q * signed.sum(1, keepdim=True))
        return result + self._restored(functional.pad(rest, (result.shape[1] - rest.shape[1], 0)))

    def columns(self) -> Iterator[Tensor]:
        """Yield L's columns as (K, B, ..., C), a few at a time to save memory."""
        for some in torch.arange(self.rank, device=self._head.device).split(COLUMNS):
            units = functional.one_hot(some, self.rank)
            yield torch.stack([self.applied(unit.expand(self._shape[0], -1)) for unit in units])


@torch.inference_mode(False)
def fisher_trace(
    parameters: Parameters,
    batches: Batches,
    logits: Tensor,
    work: Work,
    *,
    generator: torch.Generator,
    tolerance: float = 0.05,
    max_probes: int = 100,
) -> Trace | None:
    """Return tr F = (1/N) Σ_x E ‖∇_θ (L_x ε)ᵀ z_x‖² over random signs ε on the outputs, from per-example norms.

    The examples' errors are independent, so one random vector over N examples has the relative standard deviation of
    one example divided by √N. Where this would need more vectors than L has columns, every column is taken, if
    ``max_probes`` allows it, and the value is exact.

    Args:
        logits: (n, C) logits at θ in the order of ``batches``, or (n, L, 2) for yes-or-no labels.
        tolerance: standard error relative to the trace; 0 asks for the exact value, at about a gradient per class.
        max_probes: maximum number of passes, unless the exact value is asked for or takes at most ``HEAD`` of them.

    Returns:
        None where the model does not allow per-example gradients; see ``ExampleGradients``.

    Raises:
        UsageError: a number is outside of its range.
    """
    real("tolerance", tolerance, least=0)
    whole("max_probes", max_probes)
    batches, logits = batches.on(parameters.device), logits.to(parameters.device)
    examples = ExampleGradients(parameters, next(iter(batches)).x)
    if not everywhere(examples.supported, logits.device):
        return None
    with suppress(IrregularLayerError):
        norms = _ExampleNorms(examples, batches, logits, work, generator)
        return _within(norms, tolerance, max_probes)
    return None


class _ExampleNorms:
    """‖∇_θ cᵀz_x‖² of every example x, for cotangents c made of the root L_x: L_x ε, or the columns of L_x."""

    def __init__(
        self,
        examples: ExampleGradients,
        batches: Batches,
        logits: Tensor,
        work: Work,
        generator: torch.Generator,
    ) -> None:
        self.examples, self.batches, self.logits = examples, batches, logits
        self.work, self.generator = work, generator
        self.rank = self._root_of(logits[:1]).rank

    @staticmethod
    def _root_of(z: Tensor) -> CovarianceRoot:
        return CovarianceRoot(z.double().softmax(-1))

    def by_signs(self, number: int) -> Tensor:
        """Return (number, N) squared norms for new random signs."""
        place = self.generator.device
        seed = int(torch.randint(2**32, (), generator=self.generator, device=place))
        signs = _signs(self.batches, number * self.rank, torch.Generator(place).manual_seed(seed))

        def signed(root: CovarianceRoot) -> Iterator[Tensor]:
            some = next(signs).view(-1, number, self.rank)
            yield torch.stack([root.applied(one) for one in some.unbind(1)])

        return self._gathered(signed)

    def exact(self) -> Tensor:
        """Return (N,) squared norms summed over all columns: tr F_x itself."""
        forward = math.ceil(self.rank / COLUMNS) * FORWARD
        self.work.foresee((forward + self.rank * self.examples.passes) / GRADIENT)
        return self._gathered(CovarianceRoot.columns, summed=True).sum(0)

    def _gathered(
        self, pieces: Callable[[CovarianceRoot], Iterable[Tensor]], *, summed: bool = False
    ) -> Tensor:
        """Return (K, N) squared norms for the ``pieces`` of each batch's root, which are cotangents (some, B, ..., C).

        Args:
            summed: add the rows of each piece.

        Raises:
            IrregularLayerError: one of the processes met such examples; all of them raise.
        """
        rows = []
        held = True
        for batch, part in zip(self.batches, cut(self.logits, self.batches), strict=True):
            norms = []
            try:
                for cotangents in pieces(self._root_of(part)):
                    found = self.examples.squared_norms(batch.x, cotangents.to(self.logits.dtype)).double()
                    norms.append(found.sum(0, keepdim=True) if summed else found)
                    self.work.add(FORWARD + len(cotangents) * self.examples.passes, len(part))
            except IrregularLayerError:
                held = False
                break
            rows.append(torch.cat(norms))
        if not everywhere(held, self.logits.device):
            raise IrregularLayerError
        result = gather_examples(torch.cat(rows, 1).T).T
        if not bool(torch.isfinite(result).all()):
            raise DivergedError("an example's gradient is not finite; try --dtype float64")
        return result


def _within(norms: _ExampleNorms, tolerance: float, max_probes: int) -> Trace:
    """Draw signs until the trace is within ``tolerance``, or compute it exactly where that is less work."""
    rank = norms.rank
    if tolerance == 0 or rank <= 2:
        return _trace(norms.exact(), 0.0, None, rank, True)
    found = norms.by_signs(2)
    while True:
        taken, size = found.shape
        noise = float(found.var(0).mean()) / taken  # variance of an example's mean over random vectors
        stderr, value = math.sqrt(noise / size), float(found.mean())
        least, allowed = math.ceil(LEAST_NORMS / size), tolerance * value
        converged = stderr <= allowed and taken >= least
        if converged or taken >= max_probes:
            return _trace(found.mean(0), noise, stderr, taken, converged)
        needed: float = least
        if stderr:
            needed = max(taken * (stderr / allowed) ** 2, least) if allowed else math.inf
        if needed - taken >= rank and (rank <= HEAD or taken + rank <= max_probes):
            return _trace(norms.exact(), 0.0, None, rank, True)
        norms.work.expect(taken, min(needed, max_probes))
        more = min(math.ceil(needed) - taken if math.isfinite(needed) else max_probes, max_probes - taken, 8)
        found = torch.cat([found, norms.by_signs(max(more, 1))])


def _trace(terms: Tensor, noise: float, stderr: float | None, drawn: int, converged: bool) -> Trace:
    """Return the trace from (N,) examples' ``terms``, whose variance contains the ``noise`` of the random vectors."""
    own = float(terms.var()) - noise if len(terms) > 1 else -1.0
    error = math.sqrt(own / len(terms)) if own >= 0 else None
    return Trace(float(terms.mean()), stderr, error, drawn, converged, terms)


def _signs(batches: Batches, number: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Yield (B, number) random signs for each batch, drawn example by example in the order of the whole set.

    So they do not depend on the batch size or the process, and they take little memory.
    """

    def drawn(count: int) -> Tensor:
        place = generator.device
        return (
            torch.randint(0, 2, (count, number), generator=generator, dtype=torch.int8, device=place) * 2 - 1
        )

    step = batches.batch_size
    for start in range(0, batches.first, step):  # the signs of the processes before this one
        drawn(min(step, batches.first - start))
    for start in range(0, batches.num_examples, step):
        yield drawn(min(step, batches.num_examples - start))
