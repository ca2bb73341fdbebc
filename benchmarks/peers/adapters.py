"""How each peer gets to a requested precision, given every benefit of the doubt: it may stop where it is right.

None of the peers stops by itself at a relative error, so the reference decides for them. Products that a run did
beyond the one where it could have stopped are not charged, nor are those that looked for the number it needs.
"""

from __future__ import annotations

import math
import statistics
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.linalg import eigvalsh_tridiagonal
from torch import Tensor, nn
from torch.nn import functional

from peers.meter import Clock, Enough, Memory, OutOfTimeError
from peers.plan import TOLERANCE, Cell, matrix_of, quantity_of
from peers.subject import Subject

STAY = 5  # products that an estimate must stay within the tolerance after it first came there
MIN_PROBES = 12  # before a standard deviation over probes is believed
BY_SIZE = 10**9  # products of one size are never cut short
SIZES = (12, 24, 48, 96, 192, 384)  # products of Hutch++ (divisible by 3) and XTrace (by 2)


@dataclass(frozen=True)
class Outcome:
    """What a peer took.

    Attributes:
        status: ran; projected (seconds and products are, the value is of the part that ran); not reached;
            unsupported.
        seconds, products: until it could stop.
        per_product: median seconds of one product.
    """

    status: str
    value: float | None
    seconds: float | None
    products: float | None
    per_product: float | None
    note: str = ""


@dataclass(frozen=True)
class Task:
    """What is asked of a peer: tolerance and truth of the quantity, a clock, a seed."""

    name: str
    tolerance: float
    truth: float
    clock: Clock
    seed: int


def _unreached(task: Task, value: float | None = None) -> Outcome:
    clock = task.clock
    note = f"stopped after {clock.count} products, {clock.elapsed:.0f} s"
    return Outcome("not reached", value, None, None, clock.per_product, note)


def _arrival(values: Sequence[float], task: Task, stay: int) -> int | None:
    """How many values it took to come within the tolerance and stay there for ``stay`` more."""
    off = [i for i, value in enumerate(values) if abs(value / task.truth - 1) > task.tolerance]
    first = off[-1] + 1 if off else 0
    return first + 1 if len(values) - first > stay else None


def _by_probes(sample: Callable[[int], Iterable[float]], task: Task) -> Outcome:
    """Hutchinson's estimator: probes until their standard error is the tolerance of the truth, or its projection."""
    clock = task.clock
    values: list[float] = []
    goal = task.tolerance * abs(task.truth)
    try:
        while len(values) < MIN_PROBES or statistics.stdev(values) / math.sqrt(len(values)) > goal:
            values += sample(4)
    except OutOfTimeError:
        pass
    if len(values) < 3:
        return _unreached(task)
    sd = statistics.stdev(values)
    needed = max(2, math.ceil((sd / goal) ** 2))
    note = f"sd of a probe {100 * sd / abs(task.truth):.0f} %, from {len(values)}"
    per_product = clock.per_product
    assert per_product is not None
    if needed <= len(values):
        value = statistics.fmean(values[:needed])
        return Outcome("ran", value, clock.ends[needed - 1], needed, per_product, note)
    seconds = clock.ends[len(values) - 1] + (needed - len(values)) * per_product
    return Outcome("projected", statistics.fmean(values), seconds, needed, per_product, note)


def _by_size(estimate: Callable[[int], tuple[float, float]], task: Task) -> Outcome:
    """Hutch++ and XTrace: their size is doubled until the standard error is the tolerance of the truth.

    What is charged lies between the last size that failed and the first that did not, on the line through their
    errors in logarithms. A size that would take too long is not run, and the line is followed on instead.

    Args:
        estimate: number of products ↦ value and standard error.
    """
    clock, goal = task.clock, task.tolerance * abs(task.truth)
    runs: list[tuple[int, float, float, float]] = []  # size, value, standard error, seconds
    for size in SIZES:
        if runs and size * runs[-1][3] / runs[-1][0] > clock.limit:
            break
        elapsed = clock.elapsed
        value, error = estimate(size)
        runs.append((size, value, error, clock.elapsed - elapsed))
        if error <= goal:
            break
    size, value, error, seconds = runs[-1]
    steepness = 1.0  # their theory's best; Hutchinson's own is 0.5
    if len(runs) > 1:
        earlier, _, error_before, _ = runs[-2]
        steepness = math.log(max(error_before, error) / error) / math.log(size / earlier)
    reached = error <= goal
    if not reached:
        steepness = min(1.0, max(0.5, steepness))
    elif len(runs) == 1 or not steepness:
        steepness = math.inf
    needed = size * (error / goal) ** (1 / steepness)
    note = f"standard error {100 * error / abs(task.truth):.2g} % at {size} products"
    status = "ran" if reached else "projected"
    return Outcome(status, value, seconds * needed / size, math.ceil(needed), clock.per_product, note)


def _default(run: Callable[[], float], task: Task) -> Outcome:
    """One call as its author set it."""
    clock = task.clock
    try:
        value = run()
    except OutOfTimeError:
        return _unreached(task)
    return Outcome("ran", value, clock.elapsed, clock.count, clock.per_product)


# --- PyHessian ---------------------------------------------------------------------------------------------------


def _quadratic_form(product: Sequence[Tensor], v: Sequence[Tensor]) -> float:
    return float(sum((a * b).sum() for a, b in zip(product, v, strict=True)))


class _PyHessian:
    """H only, by double backward: anew for each batch of a loader, or through the kept graph of one batch.

    Attributes:
        forms: vᵀHv of every product, which is the Rayleigh quotient of its power iteration.
        watch: called after every product.
    """

    def __init__(self, subject: Subject, task: Task, graph: bool) -> None:
        from pyhessian import hessian

        self.clock = task.clock
        self.forms: list[float] = []
        self.watch: Callable[[], None] = lambda: None
        torch.manual_seed(task.seed)
        if graph:
            images, labels = zip(*subject.batches, strict=True)
            data: dict[str, Any] = {"data": (torch.cat(images), torch.cat(labels))}
        else:
            data = {"dataloader": subject.batches}
        self.inner = hessian(subject.model, nn.CrossEntropyLoss(), cuda=False, **data)
        # the package's attribute of that name is the class
        module: Any = sys.modules["pyhessian.hessian"]
        if graph:
            plain = module.hessian_vector_product
            module.hessian_vector_product = lambda slopes, parameters, v: self._note(
                v, lambda: plain(slopes, parameters, v)
            )
        else:
            whole = self.inner.dataloader_hv_product
            self.inner.dataloader_hv_product = lambda v: self._note(v, lambda: whole(v), pair=True)

    def _note(self, v: Sequence[Tensor], product: Callable[[], Any], pair: bool = False) -> Any:
        self.clock.check()
        result = product()
        self.clock.tick()
        self.forms.append(result[0] if pair else _quadratic_form(result, v))
        self.watch()
        return result

    def power(self, task: Task) -> Outcome:
        def watch() -> None:
            if _arrival(self.forms, task, STAY) is not None:
                raise Enough

        self.watch = watch
        try:
            self.inner.eigenvalues(maxIter=10_000, tol=0)
        except Enough:
            pass
        except OutOfTimeError:
            return _unreached(task, self.forms[-1] if self.forms else None)
        n = _arrival(self.forms, task, STAY)
        if n is None:  # its iteration has ended on something else
            return _unreached(task, self.forms[-1])
        return Outcome("ran", self.forms[n - 1], task.clock.ends[n - 1], n, task.clock.per_product)


def _graph_gibibytes(subject: Subject, task: Task) -> float:
    """Memory that the kept graph over all images will take, from that over 32 of them."""
    few, memory = subject.first(32), Memory()
    trial = Task(task.name, task.tolerance, task.truth, Clock(math.inf), task.seed)
    with _restored_pyhessian(few):
        _PyHessian(few, trial, graph=True).inner.trace(maxIter=1)
    return memory.peak_mebibytes() / 1024 * subject.num_examples / few.num_examples


@contextmanager
def _restored_pyhessian(subject: Subject) -> Iterator[None]:
    """Undo what ``_PyHessian`` patches, and drop the graph that it leaves in the parameters' ``grad``."""
    import pyhessian  # noqa: F401  loads the module

    module: Any = sys.modules["pyhessian.hessian"]
    plain = module.hessian_vector_product
    try:
        yield
    finally:
        module.hessian_vector_product = plain
        for parameter in subject.parameters:
            parameter.grad = None


def _pyhessian(subject: Subject, cell: Cell, task: Task) -> Outcome:
    subject = subject.laid_out(torch.contiguous_format)  # faster by 0–20 % for its double backward
    graph = cell.tool == "pyhessian-graph"
    if graph:
        needed, free = _graph_gibibytes(subject, task), _available_gibibytes()
        if needed > free / 2:
            return Outcome("unsupported", None, None, None, None, f"its graph would hold {needed:.0f} GiB")
    task.clock.restart()
    tool = _PyHessian(subject, task, graph)

    def sample(count: int) -> list[float]:
        # a negative tolerance: at 0 it would stop as soon as its running mean is negative
        return tool.inner.trace(maxIter=count, tol=-math.inf)

    match cell.method:
        case "power iteration":
            return tool.power(task)
        case "hutchinson":
            return _by_probes(sample, task)
        case "eigenvalues()":
            return _default(lambda: tool.inner.eigenvalues()[0][0], task)
        case _:
            return _default(lambda: float(np.mean(tool.inner.trace())), task)


def _available_gibibytes() -> float:
    lines = Path("/proc/meminfo").read_text().splitlines()
    [line] = [line for line in lines if line.startswith("MemAvailable:")]
    return int(line.split()[1]) / 2**20


# --- hessian-eigenthings -----------------------------------------------------------------------------------------


class _RitzValues:
    """Largest Ritz value after each product, read off the Lanczos vectors that a product is asked for."""

    def __init__(self, product: Callable[[Tensor], Tensor], watch: Callable[[list[float]], None]) -> None:
        self.product, self.watch = product, watch
        self.diagonal: list[float] = []
        self.below: list[float] = []
        self.values: list[float] = []
        self._previous: Tensor | None = None

    def __call__(self, v: Tensor) -> Tensor:
        result = self.product(v)
        if self._previous is not None:
            self.below.append(float(v @ self._previous))
        self.diagonal.append(float(v @ result))
        self._previous = result
        self.values.append(float(eigvalsh_tridiagonal(np.array(self.diagonal), np.array(self.below))[-1]))
        self.watch(self.values)
        return result


def _eigenthings(subject: Subject, cell: Cell, task: Task) -> Outcome:
    import hessian_eigenthings as he

    matrix = matrix_of(cell.task)
    # the faster layout of the two for each
    subject = subject.laid_out(torch.contiguous_format if matrix == "H" else torch.channels_last)
    clock, seed = task.clock, task.seed
    clock.restart()
    operator: Any
    if matrix == "H":
        operator = he.HessianOperator(
            subject.model, subject.batches, he.supervised_loss(functional.cross_entropy)
        )
    else:
        operator = he.GGNOperator(
            subject.model,
            subject.batches,
            he.supervised_forward,
            he.supervised_loss_of_output(functional.cross_entropy),
        )
    product = operator.matvec
    operator.matvec = clock.counted(product)

    def lanczos() -> Outcome:
        """It makes as many steps as it is told and looks at its residual afterwards: find the number first."""

        def watch(values: list[float]) -> None:
            # Ritz values only rise, to λ_max: the first within the tolerance stays
            if _arrival(values, task, 0) is not None:
                raise Enough

        ritz = _RitzValues(operator.matvec, watch)
        operator.matvec = ritz
        try:
            he.lanczos(operator, k=1, max_iter=1000, reorthogonalize=True, which="LA", seed=seed)
        except Enough:
            pass
        except OutOfTimeError:
            return _unreached(task, max(ritz.values, default=None))
        fresh = Clock(math.inf)
        operator.matvec = fresh.counted(product)
        result = he.lanczos(operator, k=1, max_iter=len(ritz.values), which="LA", seed=seed)
        value = float(result.eigenvalues[0])
        return Outcome("ran", value, fresh.elapsed, fresh.count, fresh.per_product)

    def hutch_plus_plus(size: int) -> tuple[float, float]:
        result = he.hutch_plus_plus(operator, num_matvecs=size, seed=seed)
        return result.estimate, result.stderr

    chunks = iter(range(1_000_000))  # it draws from a seed of its own each time
    match cell.method:
        case "lanczos":
            return lanczos()
        case "hutchinson":
            return _by_probes(
                lambda count: he.hutchinson(
                    operator, num_samples=count, seed=seed + next(chunks)
                ).samples.tolist(),
                task,
            )
        case "hutch++":
            return _by_size(hutch_plus_plus, task)
        case "lanczos(k=1)":
            return _default(lambda: float(he.lanczos(operator, k=1, seed=seed).eigenvalues[0]), task)
        case "lanczos()":
            return _default(lambda: float(he.lanczos(operator, seed=seed).eigenvalues[0]), task)
        case _:
            return _default(lambda: he.trace(operator, seed=seed).estimate, task)


# --- curvlinops --------------------------------------------------------------------------------------------------


class _Columns:
    """A curvlinops operator whose matrix products go a few columns at a time (it takes all of them at once).

    Attributes:
        forms: vᵀAv of every column v so far.
    """

    def __init__(self, inner: Any, columns: int, clock: Clock) -> None:
        self.inner, self.columns, self.clock = inner, columns, clock
        self.shape, self.device, self.dtype = inner.shape, inner.device, inner.dtype
        self.forms: list[float] = []

    def __matmul__(self, other: Tensor) -> Tensor:
        results = []
        for some in other.split(self.columns, dim=1):
            self.clock.check()
            results.append(self.inner @ some)
            self.clock.tick(some.shape[1])
            self.forms += (some * results[-1]).sum(0).tolist()
        return torch.cat(results, dim=1)


def _best_columns(operator: Any, subject: Subject) -> int:
    """1 or 4 columns at a time, whichever is faster a column over 32 images."""
    few = subject.first(32)
    small = operator(few.model, nn.CrossEntropyLoss(), few.parameters, few.batches, check_deterministic=False)
    seconds = {}
    for columns in (1, 4):
        vectors, clock = torch.randn(small.shape[0], columns), Clock(math.inf)
        for _ in range(4):
            _ = small @ vectors
            clock.tick()
        seconds[columns] = (clock.per_product or 0) / columns
    return min(seconds, key=lambda columns: seconds[columns])


def _curvlinops(subject: Subject, cell: Cell, task: Task) -> Outcome:
    import curvlinops
    from scipy.sparse.linalg import LinearOperator, eigsh

    matrix = matrix_of(cell.task)
    subject = subject.laid_out(torch.contiguous_format if matrix == "H" else torch.channels_last)
    if cell.method.startswith("EKFAC"):
        return _ekfac(subject, task)
    operator = curvlinops.HessianLinearOperator if matrix == "H" else curvlinops.GGNLinearOperator
    spectral = cell.method.startswith("eigsh")
    columns = 1 if spectral else _best_columns(operator, subject)
    clock = task.clock
    torch.manual_seed(task.seed)
    clock.restart()
    # its own checks cost gradients and products: left out, but for its defaults
    own = {} if cell.task == "defaults" else {"check_deterministic": False, "num_data": subject.num_examples}
    inner = operator(subject.model, nn.CrossEntropyLoss(), subject.parameters, subject.batches, **own)
    if spectral:
        exported = inner.to_scipy()
        counted = LinearOperator(exported.shape, clock.counted(exported.matvec), dtype=exported.dtype)
        start = np.random.default_rng(task.seed).standard_normal(exported.shape[0])
        if cell.task == "defaults":
            return _default(lambda: float(eigsh(counted, k=1, return_eigenvectors=False)[0]), task)
        krylov = int(cell.method.split("=")[1])
        return _default(
            lambda: float(
                eigsh(
                    counted,
                    k=1,
                    which="LA",
                    tol=task.tolerance,
                    ncv=krylov,
                    v0=start,
                    return_eigenvectors=False,
                )[0]
            ),
            task,
        )
    wide = _Columns(inner, columns, clock)
    if cell.method == "hutchinson":

        def sample(count: int) -> list[float]:
            before = len(wide.forms)
            curvlinops.hutchinson_trace(wide, count)
            return wide.forms[before:]

        return _by_probes(sample, task)
    if cell.method == "hutchpp_trace":

        def hutchpp(size: int) -> tuple[float, float]:
            value = float(curvlinops.hutchpp_trace(wide, size))
            samples = wide.forms[-(size // 3) :]  # of the last third, which is Hutchinson's on what is left
            return value, statistics.stdev(samples) / math.sqrt(len(samples))

        return _by_size(hutchpp, task)

    traces: list[Tensor] = []
    module: Any = sys.modules["curvlinops.trace.epperly2024xtrace"]
    average = module.mean

    def noting_average(found: Tensor) -> Tensor:
        traces.append(found)
        return average(found)

    module.mean = noting_average

    def xtrace(size: int) -> tuple[float, float]:
        value = float(curvlinops.xtrace(wide, size))
        samples = traces[-1].tolist()  # one a vector left out; this is its paper's error estimate
        return value, statistics.stdev(samples) / math.sqrt(len(samples))

    return _by_size(xtrace, task)


def _ekfac(subject: Subject, task: Task) -> Outcome:
    """Eigenvalue-corrected K-FAC keeps the trace: exactly tr F where it knows every layer."""
    from curvlinops import EKFACLinearOperator, FisherType

    clock = task.clock
    clock.restart()
    try:
        inner = EKFACLinearOperator(
            subject.model,
            nn.CrossEntropyLoss(),
            subject.parameters,
            subject.batches,
            check_deterministic=False,
            fisher_type=FisherType.TYPE2,
            num_data=subject.num_examples,
        )
        value = float(inner.trace)
    except NotImplementedError as error:
        return Outcome("unsupported", None, None, None, None, str(error).partition("\n")[0])
    return Outcome("ran", value, clock.elapsed, None, None, "exact: no products")


_RUN = {
    "pyhessian": _pyhessian,
    "pyhessian-graph": _pyhessian,
    "eigenthings": _eigenthings,
    "curvlinops": _curvlinops,
}


def run_peer(subject: Subject, cell: Cell, truth: dict[str, float], limit: float, seed: int) -> Outcome:
    """One cell of a peer. ``limit``: seconds after which it is stopped and projected, where it has enough probes."""
    quantity = default_quantity(cell) if cell.task == "defaults" else quantity_of(cell.task)
    # what a projection needs is run in any case
    minimum = {"hutchinson": MIN_PROBES, "hutch++": BY_SIZE, "hutchpp_trace": BY_SIZE, "xtrace": BY_SIZE}
    # a default call is not projected: it may take longer
    clock = Clock(4 * limit if cell.task == "defaults" else limit, minimum.get(cell.method, 0))
    task = Task(cell.task, TOLERANCE.get(cell.task, 0.01), truth[quantity], clock, seed)
    return _RUN[cell.tool](subject, cell, task)


def default_quantity(cell: Cell) -> str:
    return "trace_H" if cell.method == "trace()" else "lambda_H"
