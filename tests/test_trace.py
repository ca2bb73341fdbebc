"""Hutchinson's estimator on dense matrices; tr F by examples' own gradients against dense Fisher matrices."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch
from conftest import ATTENTION, BY_NAME, CASES, Case, seeded
from test_operators import dense_terms
from test_spectrum import operator_of
from torch import Tensor, nn
from torch.func import functional_call, jacrev
from torch.nn import functional

from gm_probe.curvature.fisher_trace import COLUMNS, HEAD, CovarianceRoot, _signs, fisher_trace
from gm_probe.data.batches import Batches
from gm_probe.errors import DivergedError
from gm_probe.linalg.operator import Operator
from gm_probe.linalg.trace import Trace, trace
from gm_probe.linalg.work import EXAMPLE_NORMS, FORWARD, GRADIENT, Work
from gm_probe.measures.context import MeasurementContext
from gm_probe.measures.measure import measure
from gm_probe.measures.settings import Settings
from gm_probe.models.parameters import Parameters, differentiable_attention

# Hutchinson


def stack(examples: int, size: int) -> Tensor:
    """(N, P, P) symmetric, indefinite and non-diagonal."""
    a = torch.from_numpy(np.random.default_rng(3).normal(size=(examples, size, size)))
    return a + a.transpose(1, 2) + 4 * torch.eye(size, dtype=torch.float64)


def test_the_error_of_what_is_known_counts() -> None:
    terms = stack(5, 20)
    known = torch.full((5,), 100.0, dtype=torch.float64)
    alone = trace(operator_of(terms), generator=seeded(1), tolerance=0.02, max_probes=300, offset=known)
    error = 0.015 * alone.value

    def with_error(tolerance: float) -> Trace:
        operator = operator_of(terms)
        return trace(
            operator,
            generator=seeded(1),
            tolerance=tolerance,
            max_probes=300,
            offset=known,
            offset_error=error,
        )

    found = with_error(0.02)
    assert alone.converged
    assert found.converged
    assert found.stderr is not None
    assert error < found.stderr <= 0.02 * found.value
    assert found.num_probes > alone.num_probes  # they make up for it
    hopeless = with_error(0.01)
    assert (hopeless.converged, hopeless.num_probes) == (False, 10)


def test_the_examples_error_is_free_of_the_probes_noise(generator: torch.Generator) -> None:
    terms = stack(50, 12)
    truth = torch.einsum("nii->n", terms).std() / 50**0.5
    estimates = [
        trace(operator_of(terms), generator=generator, tolerance=0, max_probes=10).stderr_examples ** 2
        for _ in range(60)
    ]
    # unbiased in the square; the spread over 60 repetitions gives the tolerance
    spread = float(np.std(estimates)) / 60**0.5
    assert float(np.mean(estimates)) == pytest.approx(float(truth) ** 2, abs=4 * spread)
    noisy = (
        truth**2
        + float((terms - torch.diag_embed(terms.diagonal(dim1=1, dim2=2))).square().sum((1, 2)).mean()) / 250
    )
    assert float(np.mean(estimates)) < 0.8 * float(noisy)


@pytest.mark.parametrize(
    ("tolerance", "max_probes"), [(0.0, 40), (0.05, 100)], ids=["fixed number of vectors", "default stopping"]
)
def test_standard_error_is_calibrated(tolerance: float, max_probes: int) -> None:
    terms = stack(3, 20)
    operator, truth = operator_of(terms), float(terms.mean(0).trace())
    inside = 0
    for seed in range(200):
        estimate = trace(
            operator,
            generator=torch.Generator().manual_seed(seed),
            tolerance=tolerance,
            max_probes=max_probes,
        )
        inside += abs(estimate.value - truth) < 2 * estimate.stderr
    assert 0.90 <= inside / 200 <= 0.99


@pytest.mark.parametrize(
    "values", [np.zeros(4), np.arange(6.0), np.array([3.0])], ids=["zero", "diagonal", "P = 1"]
)
def test_trace_of_diagonal_matrices_is_exact(values: np.ndarray, generator: torch.Generator) -> None:
    estimate = trace(operator_of(torch.diag(torch.from_numpy(values)).unsqueeze(0)), generator=generator)
    assert (estimate.value, estimate.stderr, estimate.converged) == (values.sum(), 0, True)
    assert estimate.num_probes == 10


def test_not_a_number_is_refused(generator: torch.Generator) -> None:
    with pytest.raises(DivergedError, match="finite"):
        trace(operator_of(torch.full((1, 3, 3), math.nan)), generator=generator)


def test_offset_adds() -> None:
    terms = stack(5, 12)
    offset = torch.linspace(-3, 8, 5, dtype=torch.float64)
    alone, both = (
        trace(operator_of(terms), generator=seeded(2), tolerance=0, max_probes=7, offset=o)
        for o in (None, offset)
    )
    assert both.value == pytest.approx(alone.value + float(offset.mean()), rel=1e-12)
    assert both.stderr == pytest.approx(alone.stderr, rel=1e-9)
    torch.testing.assert_close(both.terms, alone.terms + offset)


def test_an_offset_joins_the_tolerance() -> None:
    """What is known exactly counts towards the value that the error is relative to."""
    terms = stack(5, 20)
    known = torch.full((5,), 1e4, dtype=torch.float64)
    found = trace(operator_of(terms), generator=seeded(0), tolerance=0.01, offset=known)
    assert (found.converged, found.num_probes) == (True, 10)
    assert not trace(operator_of(terms), generator=seeded(0), tolerance=0.001).converged


# the root of diag p − p pᵀ


def decaying(examples: int = 4, size: int = 300, power: float = 2.0) -> Tensor:
    """(N, P, P) of a mean with eigenvalues k^−power in random directions: of trace 1.63 for power 2."""
    rng = np.random.default_rng(3)
    directions = np.linalg.qr(rng.normal(size=(size, size)))[0]
    mean = torch.from_numpy(directions * np.arange(1, size + 1.0) ** -power @ directions.T)
    weights = torch.tensor([0.5, 1.5, 0.8, 1.2], dtype=torch.float64)[:examples]
    return weights[:, None, None] / weights.mean() * mean


def counting(operator: Operator) -> tuple[Operator, list[str]]:
    """The operator, and a list that grows with every product it computes."""
    calls: list[str] = []

    def matvec(v: Tensor) -> Tensor:
        calls.append("matvec")
        return operator.matvec(v)

    def terms(v: Tensor) -> Tensor:
        calls.append("terms")
        return operator.terms(v)

    return replace(operator, matvec=matvec, terms=terms), calls


def test_a_decaying_spectrum_is_sketched() -> None:
    matrix = decaying()
    truth = float(matrix.mean(0).trace())
    operator, calls = counting(operator_of(matrix))
    plain = [
        trace(operator_of(matrix), generator=seeded(seed), tolerance=0.01, max_probes=40) for seed in range(5)
    ]
    assert not any(estimate.sketched or estimate.converged for estimate in plain)  # 40 leave no room for it
    found = trace(operator, generator=seeded(0), tolerance=0.01)
    assert found.sketched
    assert found.converged
    assert found.stderr is not None
    assert found.stderr <= 0.01 * truth
    assert abs(found.value - truth) < 4 * found.stderr
    assert float(found.terms.mean()) == pytest.approx(found.value)
    assert found.stderr_examples == pytest.approx(
        0.5 * math.sqrt(0.58 / 3) * truth, rel=0.05
    )  # by hand, of weights
    assert len(calls) == 10 + 16 + 16 + found.num_probes <= 100
    error = np.std([estimate.value - truth for estimate in plain])
    assert abs(found.value - truth) < error  # of as many vectors as the sketch took products


def test_the_sketchs_standard_error_is_calibrated() -> None:
    matrix = decaying(size=120, power=1.0)  # decays so slowly that much is left to the vectors
    truth = float(matrix.mean(0).trace())
    found = [
        trace(operator_of(matrix), generator=seeded(seed), tolerance=0, max_probes=82) for seed in range(60)
    ]
    assert all(estimate.sketched and estimate.num_probes == 40 for estimate in found)
    scores = [(estimate.value - truth) / (estimate.stderr or 1) for estimate in found]
    assert abs(np.mean(scores)) < 3.5 / math.sqrt(60)
    assert 0.75 < np.std(scores) < 1.3


def test_no_sketch_where_few_probes_are_needed() -> None:
    matrix = torch.eye(100, dtype=torch.float64).repeat(3, 1, 1) + 0.01 * stack(3, 100)
    assert not trace(operator_of(matrix), generator=seeded(0), tolerance=0.01).sketched


def test_a_sketch_of_low_rank_is_exact() -> None:
    factor = torch.from_numpy(np.random.default_rng(5).normal(size=(100, 3)))
    found = trace(operator_of((factor @ factor.T)[None]), generator=seeded(0), tolerance=1e-9)
    assert found.sketched
    assert found.value == pytest.approx(float(factor.square().sum()), rel=1e-12)


def probabilities(classes: int) -> Tensor:
    """Flat, spread over orders of magnitude, confident, one-hot, with classes of probability 0, of equal ones."""
    rng = np.random.default_rng(classes)
    rows = [rng.dirichlet(np.full(classes, a)) for a in (100.0, 1.0, 0.1, 0.01)]
    rows += [np.eye(classes)[-1], np.full(classes, 1 / classes)]
    rows += [np.eye(classes)[:2].mean(0), np.r_[1 - 1e-12, np.full(classes - 1, 1e-12 / (classes - 1))]]
    return torch.from_numpy(np.stack(rows))


def matrix_of(root: CovarianceRoot, rows: int) -> Tensor:
    """(B, C, R) L, column by column."""
    basis = torch.eye(root.rank, dtype=torch.float64)
    return torch.stack([root.applied(e.expand(rows, -1)) for e in basis], 2)


CLASSES = [2, 3, 5, HEAD + 1, HEAD + 2, 60]


@pytest.mark.parametrize("classes", CLASSES)
def test_root_squares_to_the_covariance(classes: int) -> None:
    p = probabilities(classes)
    root = CovarianceRoot(p)
    covariance = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    matrix = matrix_of(root, len(p))
    torch.testing.assert_close(matrix @ matrix.transpose(1, 2), covariance, rtol=1e-9, atol=1e-15)
    assert root.rank == (classes - 1 if classes <= HEAD + 1 else classes)
    columns = torch.cat(list(root.columns()))
    torch.testing.assert_close(columns.permute(1, 2, 0), matrix, rtol=1e-12, atol=1e-16)


@pytest.mark.parametrize("classes", CLASSES)
def test_root_of_saturated_probabilities(classes: int) -> None:
    """Its trace is Σ p(1 − p), with 1 − p far below float64's epsilon."""
    p = torch.full((1, classes), 1e-25, dtype=torch.float64)
    p[0, 1] = 1.0
    matrix = matrix_of(CovarianceRoot(p), 1)[0]
    assert float(matrix.square().sum()) == pytest.approx(2 * (classes - 1) * 1e-25, rel=1e-9)
    assert float(matrix[0] @ matrix[1]) == pytest.approx(-1e-25, rel=1e-9)


@pytest.mark.parametrize("classes", CLASSES)
def test_applied_signs_have_the_covariance(classes: int, generator: torch.Generator) -> None:
    p = probabilities(classes)
    root, draws = CovarianceRoot(p), 1500
    signs = torch.randint(0, 2, (draws, len(p), root.rank), generator=generator, dtype=torch.int8) * 2 - 1
    applied = torch.stack([root.applied(one) for one in signs])  # (D, B, C)
    columns = torch.cat(list(root.columns()))  # (R, B, C)
    torch.testing.assert_close(applied[0], torch.einsum("rbc,br->bc", columns, signs[0].double()))
    products = applied[:, :, :, None] * applied[:, :, None, :]
    error = products.std(0) / math.sqrt(draws)
    covariance = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    # of 8 · 60² entries not one in 10⁴ goes beyond six of its standard errors
    assert bool(((products.mean(0) - covariance).abs() <= 6 * error + 1e-12).all())
    # a shift of all logits is no change; the root of rounding in an eigenvalue of 0 is left
    assert float(applied.sum(2).abs().max()) < 1e-7


# tr F by examples' own gradients


class Setup:
    """A tanh network with ``classes`` outputs on N examples, and its examples' traces by a dense Jacobian."""

    def __init__(self, classes: int, examples: int) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(classes)
            self.model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, classes)).double().eval()
            self.x = 2 * torch.randn(examples, 4, dtype=torch.float64)
        self.logits = self.model(self.x).detach()
        values = dict(self.model.named_parameters())
        jacobian = jacrev(lambda v: functional_call(self.model, v, (self.x,)))(values)
        p = self.logits.softmax(1)
        flat = torch.cat([j.flatten(2) for j in jacobian.values()], 2).detach()
        centred = flat - torch.einsum("nc,ncp->np", p, flat)[:, None]
        self.terms = torch.einsum("nc,ncp,ncp->n", p, centred, centred)

    @property
    def truth(self) -> float:
        return float(self.terms.mean())

    def trace(self, seed: int = 0, batch_size: int = 7, work: Work | None = None, **options: float) -> Trace:
        batches = Batches.from_tensors(self.x, batch_size=batch_size)
        work = work or Work(len(self.x))
        found = fisher_trace(
            Parameters(self.model), batches, self.logits, work, generator=seeded(seed), **options
        )
        assert found is not None
        return found


@cache
def setup(classes: int, examples: int = 30) -> Setup:
    return Setup(classes, examples)


@pytest.mark.parametrize("case", [*CASES, ATTENTION], ids=lambda case: case.name)
def test_exact_trace_is_the_dense_one(case: Case) -> None:
    model, x, _ = case.data
    with differentiable_attention():
        found = fisher_trace(
            Parameters(case.model),
            case.batches(),
            model(x).detach(),
            Work(7),
            generator=seeded(0),
            tolerance=0,
        )
    expected = torch.einsum("nii->n", case.fisher_terms)
    assert found is not None
    torch.testing.assert_close(found.terms, expected, rtol=1e-9, atol=1e-14)
    assert found.value == pytest.approx(float(expected.mean()), rel=1e-9)
    assert (found.stderr, found.converged) == (None, True)
    assert found.stderr_examples == pytest.approx(float(expected.std()) / math.sqrt(7), rel=1e-9)


@pytest.mark.parametrize("classes", [2, 3, 10, HEAD + 1])
def test_exact_where_it_is_asked_or_cheap(classes: int) -> None:
    work = Work(30)
    found = setup(classes).trace(work=work, tolerance=0 if classes > 3 else 0.5)
    assert found.value == pytest.approx(setup(classes).truth, rel=1e-9)
    assert (found.stderr, found.num_probes) == (None, classes - 1)
    assert work.evaluations == pytest.approx((FORWARD + (classes - 1) * EXAMPLE_NORMS) / GRADIENT)


def test_exact_where_signs_would_cost_more() -> None:
    assert setup(5).trace(tolerance=0.002).stderr is None
    assert setup(5).trace(tolerance=0.2).stderr is not None


@pytest.mark.parametrize("classes", [HEAD + 2, COLUMNS, COLUMNS + 1, 300])
def test_exact_of_many_classes_where_it_is_asked(classes: int) -> None:
    work = Work(5)
    found = setup(classes, 5).trace(work=work, batch_size=5, tolerance=0, max_probes=6)
    assert found.value == pytest.approx(setup(classes, 5).truth, rel=1e-9)
    assert (found.num_probes, found.stderr, found.converged) == (classes, None, True)
    forwards = -(-classes // COLUMNS)
    assert work.evaluations == pytest.approx((forwards * FORWARD + classes * EXAMPLE_NORMS) / GRADIENT)


def test_no_more_passes_than_allowed_where_the_exact_value_is_not_asked() -> None:
    for allowed in (12, 31):
        found = setup(30, 5).trace(tolerance=1e-6, max_probes=allowed)
        assert (found.num_probes, found.converged) == (allowed, False)
    assert setup(30, 5).trace(tolerance=1e-6, max_probes=32).stderr is None


def test_an_examples_signs_hang_on_no_process() -> None:
    batches = Batches.from_tensors(torch.zeros(10, 1), batch_size=3)
    everyone = torch.cat(list(_signs(batches, 7, seeded(1))))
    assert set(everyone.unique().tolist()) == {-1, 1}
    for rank, part in enumerate(everyone.split([3, 3, 4])):
        torch.testing.assert_close(torch.cat(list(_signs(batches.shard(rank, 3), 7, seeded(1)))), part)


@pytest.mark.parametrize(("classes", "examples"), [(4, 1), (5, 1), (4, 2), (20, 1)])
def test_signs_that_agree_by_chance_are_no_certificate(classes: int, examples: int) -> None:
    """Two draws for one example of 4 classes have the same norm in a quarter of all cases."""
    few = setup(classes, examples)
    for seed in range(40):
        found = few.trace(seed, batch_size=examples, tolerance=0.05)
        assert found.converged
        error = 1e-9 * few.truth if found.stderr is None else 5 * found.stderr
        assert abs(found.value - few.truth) <= error


@pytest.mark.parametrize("examples", [1, 7, 40])
@pytest.mark.parametrize("classes", [3, 5, 30])
def test_a_trace_of_zero_is_zero(classes: int, examples: int) -> None:
    model, x = nn.Linear(3, classes).eval(), torch.eye(3)[torch.arange(examples) % 3]
    with torch.no_grad():
        model.weight.copy_(1e4 * torch.randn(classes, 3, generator=seeded(0)))
    logits = model(x).detach()
    found = fisher_trace(
        Parameters(model), Batches.from_tensors(x), logits, Work(examples), generator=seeded(0)
    )
    assert found is not None
    assert (found.value, found.converged) == (0, True)


def test_parameters_without_a_rule_cost_a_gradient_a_pass() -> None:
    class Scaled(nn.Sequential):
        def __init__(self) -> None:
            super().__init__(nn.Linear(4, 3))
            self.scale = nn.Parameter(torch.ones(4))

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(self.scale * x)

    model, x, work = Scaled().double().eval(), torch.ones(6, 4, dtype=torch.float64), Work(6)
    batches, logits = Batches.from_tensors(x), model(x).detach()
    found = fisher_trace(Parameters(model), batches, logits, work, generator=seeded(0), tolerance=0)
    assert found is not None
    assert work.evaluations == pytest.approx((FORWARD + 2 * (EXAMPLE_NORMS + GRADIENT)) / GRADIENT)


@pytest.mark.parametrize("classes", [5, 10, HEAD + 2, 40])
def test_within_four_standard_errors(classes: int) -> None:
    for seed in range(10):
        found = setup(classes).trace(seed, tolerance=0.1)
        assert found.converged
        assert found.stderr is not None
        assert found.stderr <= 0.1 * found.value
        assert abs(found.value - setup(classes).truth) < 4 * found.stderr


@pytest.mark.parametrize(
    ("tolerance", "max_probes"), [(1e-9, 4), (0.02, 100)], ids=["four vectors", "stopping by tolerance"]
)
def test_standard_error_of_signs_is_calibrated(tolerance: float, max_probes: int) -> None:
    many, inside, values = setup(20, 100), 0, []  # of 30 examples the error itself is too uncertain
    for seed in range(200):
        found = many.trace(seed, batch_size=100, tolerance=tolerance, max_probes=max_probes)
        assert found.stderr is not None
        inside += abs(found.value - many.truth) < 2 * found.stderr
        values.append(found.value)
    assert 0.90 <= inside / 200 <= 0.99
    assert abs(np.mean(values) - many.truth) < 4 * np.std(values) / math.sqrt(200)


def test_examples_error_of_signs_is_free_of_their_noise() -> None:
    truth = float(setup(20).terms.var()) / 30
    found = [
        setup(20).trace(s, batch_size=30, tolerance=1e-9, max_probes=2).stderr_examples for s in range(100)
    ]
    squares = np.array([0.0 if error is None else error**2 for error in found])
    assert abs(squares.mean() - truth) < 4 * squares.std(ddof=1) / math.sqrt(100)


@pytest.mark.parametrize("tolerance", [0.0, 1e-9, 0.3])
@pytest.mark.parametrize("classes", [10, 20])
def test_batch_size_does_not_matter(classes: int, tolerance: float) -> None:
    """An example's signs are its own, whatever the batches."""
    one, *others = (
        setup(classes).trace(batch_size=size, tolerance=tolerance, max_probes=5) for size in (1, 4, 7, 30, 99)
    )
    for other in others:
        assert other.value == pytest.approx(one.value, rel=1e-12)
        assert other.num_probes == one.num_probes
        torch.testing.assert_close(other.terms, one.terms, rtol=1e-12, atol=1e-14)


def test_seed_matters() -> None:
    one, same, other = (setup(20).trace(seed, tolerance=0.3).value for seed in (1, 1, 2))
    assert one == same
    assert one != other


def test_none_where_examples_have_no_gradients_of_their_own() -> None:
    class Paired(nn.Module):
        """Its weights are used beside their layer, and it takes no example by itself."""

        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            if len(x) < 2:
                raise ValueError("a single example")
            return functional.linear(x, self.layer.weight, self.layer.bias)

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model, x = Paired().double().eval(), torch.randn(9, 3, dtype=torch.float64)
    parameters, batches = Parameters(model), Batches.from_tensors(x)
    assert fisher_trace(parameters, batches, model(x).detach(), Work(9), generator=seeded(0)) is None
    # then Hutchinson takes over
    settings = Settings(trace_tolerance=0, max_probes=50)
    rows = measure(model, batches, ["fisher_trace", "hessian_trace"], settings).rows
    jacobian = torch.autograd.functional.jacobian(
        lambda *v: functional_call(model, dict(zip(parameters.named, v, strict=True)), (x,)),
        tuple(p.detach() for p in model.parameters()),
    )
    flat = torch.cat([j.flatten(2) for j in jacobian], 2)
    p = model(x).softmax(1).detach()
    centred = flat - torch.einsum("nc,ncp->np", p, flat)[:, None]
    truth = float(torch.einsum("nc,ncp,ncp->n", p, centred, centred).mean())
    assert [row.details["method"] for row in rows.values()] == [
        "Hutchinson",
        "tr F, because every parameter enters affinely: Hutchinson",
    ]
    found = rows["fisher_trace"]
    assert found.stderr is not None
    assert found.stderr > 0
    assert abs(found.value - truth) < 4 * found.stderr


def test_not_a_number_in_an_examples_gradient_is_refused() -> None:
    """√|z| at z = 0 has an infinite slope though its value is finite."""

    class Root(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(2, 3, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x).abs().sqrt()

    x = torch.tensor(
        [[1.0, 2.0], [2.0, 1.0], [3.0, 1.0], [1.0, 3.0], [1.0, 1.0], [0.0, 0.0], [2.0, 2.0], [4.0, 1.0]]
    )
    model = Root().eval()
    with torch.no_grad():
        model.layer.weight.copy_(torch.tensor([[1.0, 0.5], [0.3, 1.0], [1.0, 1.0]]))
    with pytest.raises(DivergedError, match="finite"):
        fisher_trace(
            Parameters(model), Batches.from_tensors(x), model(x).detach(), Work(8), generator=seeded(0)
        )


# tr H


def dense_hessian_trace(case: Case, labels: Tensor) -> float:
    def loss(flat: Tensor) -> Tensor:
        z = case.logits_at(flat)
        return (torch.logsumexp(z, 1) - z[torch.arange(7), labels]).mean()

    return float(torch.autograd.functional.hessian(loss, case.theta).trace())


@pytest.mark.parametrize("labeled", [True, False])
def test_hessian_trace(case: Case, labeled: bool) -> None:
    model, x, y = case.data
    labels = y if labeled else model(x).argmax(1)
    truth = dense_hessian_trace(case, labels)
    settings = Settings(trace_tolerance=0, max_probes=40)
    row = measure(case.model, case.batches(labeled=labeled), ["hessian_trace"], settings).rows[
        "hessian_trace"
    ]
    if case.affine:
        assert row.details["labels"] == "none needed"
        assert row.stderr is None
        assert row.value == pytest.approx(truth, rel=1e-9)
    else:
        assert row.details["labels"] == ("given" if labeled else "predicted")
        assert row.details["not_affine"]
        assert row.stderr is not None
        assert row.stderr > 0
        assert abs(row.value - truth) < 4 * row.stderr


def test_hessian_trace_is_the_fishers_also_without_examples_gradients(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(MeasurementContext, "fisher_trace_to", lambda self, tolerance: None)
    settings = Settings(trace_tolerance=0, max_probes=6)
    for case in CASES:
        rows = measure(case.model, case.batches(), ["fisher_trace", "hessian_trace"], settings).rows
        one, other = rows["fisher_trace"], rows["hessian_trace"]
        assert "Hutchinson" in other.details["method"]
        assert (other.details["labels"] == "none needed") == case.affine
        assert (other.num_evals == 0) == case.affine
        if case.affine:
            assert (other.value, other.stderr, other.stderr_examples) == (
                one.value,
                one.stderr,
                one.stderr_examples,
            )
        else:
            assert other.details["not_affine"]


@pytest.mark.parametrize("case", [c for c in CASES if not c.affine], ids=lambda case: case.name)
def test_hessian_trace_is_the_fishers_and_an_estimate_of_the_rest(case: Case) -> None:
    """The same random vectors on dense matrices."""
    settings = Settings(trace_tolerance=0, max_probes=6, seed=5)
    row = measure(case.model, case.batches(), ["hessian_trace"], settings).rows["hessian_trace"]
    found = trace(
        operator_of(dense_terms("residual", case)),
        generator=MeasurementContext(case.model, case.batches(), settings, Work(7)).generator(
            "hessian trace"
        ),
        tolerance=0,
        max_probes=6,
        offset=torch.einsum("nii->n", case.fisher_terms),
    )
    assert row.value == pytest.approx(found.value, rel=1e-9)
    assert row.stderr == pytest.approx(found.stderr, rel=1e-6)
    assert row.stderr_examples == (found.stderr_examples and pytest.approx(found.stderr_examples, rel=1e-6))


def test_hessian_traces_error_is_calibrated() -> None:
    """tr F exact, tr(H − F) by Hutchinson."""
    case = BY_NAME["tanh-mlp"]
    truth, inside = dense_hessian_trace(case, case.data[2]), 0
    operator = operator_of(dense_terms("residual", case))
    known = torch.einsum("nii->n", case.fisher_terms)
    for seed in range(200):
        found = trace(operator, generator=seeded(seed), tolerance=0, max_probes=20, offset=known)
        inside += abs(found.value - truth) < 2 * found.stderr
    assert 0.90 <= inside / 200 <= 0.99
