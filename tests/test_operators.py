"""Fisher and Hessian products against dense matrices, finite differences and closed forms."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from conftest import ATTENTION, BY_NAME, CASES, Case
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import vector_to_parameters

from gm_probe.curvature.operators import fisher, hessian, residual
from gm_probe.data.batches import Batches
from gm_probe.errors import UsageError
from gm_probe.linalg.operator import Operator
from gm_probe.linalg.work import GRADIENT, NESTED_JVP, TRIPLE_BACKWARD, Work
from gm_probe.models.parameters import Parameters, differentiable_attention

TIGHT = {"rtol": 1e-9, "atol": 1e-11}
KINDS = ("fisher", "hessian")
ALL = (*KINDS, "residual")


def build(kind: str, case: Case, batch_size: int = 3) -> Operator:
    model, x, y = case.data
    return over(kind, case.model, model(x).detach(), case.batches(batch_size), y)


def over(kind: str, model: nn.Module, logits: Tensor, batches: Batches, y: Tensor) -> Operator:
    parameters = Parameters(model)
    if kind == "residual":
        return residual(parameters, batches, logits, y)
    return hessian(parameters, batches, y) if kind == "hessian" else fisher(parameters, batches, logits)


def of_model(kind: str, model: nn.Module, x: Tensor, y: Tensor) -> Operator:
    return over(kind, model, model(x).detach(), Batches.from_tensors(x, batch_size=3), y)


def dense_terms(kind: str, case: Case) -> Tensor:
    if kind == "residual":
        return case.hessian_terms - case.fisher_terms
    return case.fisher_terms if kind == "fisher" else case.hessian_terms


def to_matrix(operator: Operator) -> Tensor:
    return torch.stack([operator.matvec(v) for v in torch.eye(operator.size, dtype=operator.dtype)])


def trainable(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


@pytest.mark.parametrize("kind", ALL)
def test_matrix_is_dense_matrix_and_symmetric(kind: str, case: Case) -> None:
    matrix = to_matrix(build(kind, case))
    torch.testing.assert_close(matrix, dense_terms(kind, case).mean(0), **TIGHT)
    torch.testing.assert_close(matrix, matrix.T, **TIGHT)


@pytest.mark.parametrize("kind", ALL)
def test_terms_are_quadratic_forms_of_each_example(kind: str, case: Case, generator: torch.Generator) -> None:
    operator = build(kind, case)
    v = torch.randn(operator.size, generator=generator, dtype=torch.float64)
    terms = operator.terms(v)
    torch.testing.assert_close(terms, torch.einsum("i,nij,j->n", v, dense_terms(kind, case), v), **TIGHT)
    torch.testing.assert_close(terms.mean(), v @ operator.matvec(v), **TIGHT)


@pytest.mark.parametrize("kind", ALL)
@pytest.mark.parametrize("batch_size", [1, 2, 7, 100])
def test_batch_size_does_not_matter(kind: str, batch_size: int, generator: torch.Generator) -> None:
    case = BY_NAME["max-pool-cnn"]
    one, other = build(kind, case, 3), build(kind, case, batch_size)
    v = torch.randn(one.size, generator=generator, dtype=torch.float64)
    torch.testing.assert_close(one.matvec(v), other.matvec(v), **TIGHT)
    torch.testing.assert_close(one.terms(v), other.terms(v), **TIGHT)


def test_hessian_against_finite_differences_of_backward(case: Case) -> None:
    _, x, y = case.data
    copied, eps, rows = case.model, 1e-6, []
    for direction in torch.eye(len(case.theta), dtype=torch.float64):
        ends = []
        for sign in (1, -1):
            vector_to_parameters(case.theta + sign * eps * direction, trainable(copied))
            copied.zero_grad(set_to_none=True)
            functional.cross_entropy(copied(x), y).backward()
            grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in trainable(copied)]
            ends.append(torch.cat([g.reshape(-1) for g in grads]))
        rows.append((ends[0] - ends[1]) / (2 * eps))
    torch.testing.assert_close(to_matrix(build("hessian", case)), torch.stack(rows), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("kind", KINDS)
def test_closed_form_of_softmax_regression(kind: str) -> None:
    """F = H = (1/N) Σ (diag p - p pᵀ) ⊗ x̃ x̃ᵀ with x̃ = (x, 1), whatever the labels."""
    rng = np.random.default_rng(5)
    x, y = rng.normal(size=(11, 2)), rng.integers(0, 3, size=11)
    weight, bias = rng.normal(size=(3, 2)), rng.normal(size=3)
    z = x @ weight.T + bias
    p = np.exp(z) / np.exp(z).sum(1, keepdims=True)
    extended = np.hstack([x, np.ones((11, 1))])
    expected = np.zeros((9, 9))
    for row, inputs in zip(p, extended, strict=True):
        expected += np.kron(np.diag(row) - np.outer(row, row), np.outer(inputs, inputs)) / 11
    # torch's order: the weight matrix row by row, then the biases
    order = [3 * c + i for c in range(3) for i in range(2)] + [3 * c + 2 for c in range(3)]
    expected = expected[np.ix_(order, order)]

    model = nn.Linear(2, 3).double()
    with torch.no_grad():
        model.weight.copy_(torch.from_numpy(weight))
        model.bias.copy_(torch.from_numpy(bias))
    batches = Batches.from_tensors(torch.from_numpy(x), batch_size=4)
    parameters = Parameters(model.eval())
    operator = (
        fisher(parameters, batches, torch.from_numpy(z))
        if kind == "fisher"
        else hessian(parameters, batches, torch.from_numpy(y))
    )
    np.testing.assert_allclose(to_matrix(operator).numpy(), expected, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("kind", KINDS)
def test_float32_agrees_with_dense_float64(kind: str, case: Case, generator: torch.Generator) -> None:
    model, x, y = case.data
    single = copy.deepcopy(model).float()
    batches, parameters = Batches.from_tensors(x.float(), batch_size=3), Parameters(single)
    operator = (
        hessian(parameters, batches, y)
        if kind == "hessian"
        else fisher(parameters, batches, single(x.float()).detach())
    )
    v = torch.randn(operator.size, generator=generator)
    expected = dense_terms(kind, case).mean(0) @ v.double()
    assert float((operator.matvec(v).double() - expected).norm() / expected.norm()) < 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_a_network_that_ignores_its_parameters_has_zero_curvature(kind: str) -> None:
    class Constant(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.idle = nn.Linear(2, 2)

        def forward(self, x: Tensor) -> Tensor:
            return x

    x = torch.eye(3, dtype=torch.float64)
    parameters, batches = Parameters(Constant().double().eval()), Batches.from_tensors(x, batch_size=2)
    operator = (
        fisher(parameters, batches, x)
        if kind == "fisher"
        else hessian(parameters, batches, torch.tensor([0, 1, 2]))
    )
    v = torch.ones(6, dtype=torch.float64)
    assert torch.equal(operator.matvec(v), torch.zeros(6, dtype=torch.float64))
    assert torch.equal(operator.terms(v), torch.zeros(3, dtype=torch.float64))


class Crooked(torch.autograd.Function):
    """x², whose forward-mode derivative is wrong by half, or absent."""

    absent = False

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.square()

    @staticmethod
    def setup_context(ctx, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx, g: Tensor) -> Tensor:
        return 2 * ctx.saved_tensors[0] * g

    @staticmethod
    def jvp(ctx, t: Tensor) -> Tensor:
        if Crooked.absent:
            raise NotImplementedError
        return 3 * ctx.saved_tensors[0] * t


class Squared(nn.Module):
    def __init__(self, forward_mode: str) -> None:
        super().__init__()
        self.square = torch.square if forward_mode == "right" else Crooked.apply

    def forward(self, x: Tensor) -> Tensor:
        return self.square(x)


@pytest.mark.parametrize("forward_mode", ["right", "wrong", "absent"])
@pytest.mark.parametrize("kind", ["hessian", "residual"])
def test_wrong_forward_mode_is_not_trusted(
    kind: str, forward_mode: str, monkeypatch: pytest.MonkeyPatch, generator: torch.Generator
) -> None:
    monkeypatch.setattr(Crooked, "absent", forward_mode == "absent")
    model = nn.Sequential(nn.Linear(3, 4), Squared(forward_mode), nn.Linear(4, 3)).double().eval()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator, dtype=torch.float64))
    x, y = torch.randn(5, 3, generator=generator, dtype=torch.float64), torch.tensor([0, 2, 1, 1, 0])
    parameters, batches, work = Parameters(model), Batches.from_tensors(x, batch_size=2), Work(5)
    logits = model(x).detach()
    operator = (
        hessian(parameters, batches, y, work)
        if kind == "hessian"
        else residual(parameters, batches, logits, y, work)
    )
    v = torch.randn(operator.size, generator=generator, dtype=torch.float64)

    def gradient(values: dict[str, Tensor]) -> Tensor:
        z = parameters.logits(x, values)
        if kind == "hessian":
            total = functional.cross_entropy(z, y)
        else:
            total = (z * (logits.softmax(1) - functional.one_hot(y, 3))).sum() / 5
        return parameters.join(torch.autograd.grad(total, list(values.values())))

    step, ends = 1e-5, []
    for sign in (1, -1):
        moved = parameters.values()
        moved = {n: (moved[n] + sign * step * t).requires_grad_() for n, t in parameters.split(v).items()}
        ends.append(gradient(moved))
    expected = (ends[0] - ends[1]) / (2 * step)
    torch.testing.assert_close(operator.matvec(v), expected, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(operator.terms(v).mean(), v @ expected, rtol=1e-6, atol=1e-8)
    work.evaluations = 0
    operator.terms(v)  # once it has been tried
    way = NESTED_JVP if forward_mode == "right" else TRIPLE_BACKWARD
    assert work.evaluations == pytest.approx(way / GRADIENT)


@pytest.mark.parametrize("build_operator", [fisher, hessian])
def test_train_mode_is_refused(build_operator) -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.Dropout()).double()
    batches = Batches.from_tensors(torch.eye(2, dtype=torch.float64))
    given = torch.zeros(2, 3, dtype=torch.float64) if build_operator is fisher else torch.tensor([0, 1])
    with pytest.raises(UsageError, match="eval"):
        build_operator(Parameters(model), batches, given)


def test_confident_examples_do_not_cost_the_cheap_curvature_terms() -> None:
    """Their terms are far below float32's rounding of the loss; the two ways still count as agreeing."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 3)).eval()
    with torch.no_grad():
        model[2].weight.mul_(80)
    x = torch.randn(64, 4)
    batches, work = Batches.from_tensors(x), Work(64)
    operator = hessian(Parameters(model), batches, model(x).argmax(1), work)
    operator.terms(torch.ones(operator.size))
    work.evaluations = 0
    operator.terms(torch.ones(operator.size))
    # forward over forward, not three backward passes
    assert work.evaluations == pytest.approx(NESTED_JVP / GRADIENT)
    assert NESTED_JVP < TRIPLE_BACKWARD


@pytest.mark.parametrize("name", ["layer-norm", "silu", "attention"])
def test_layers_that_torchs_nested_jvps_misstate_do_not_cost_them(name: str) -> None:
    case = next(c for c in (*CASES, ATTENTION) if c.name == name)
    work = Work(7)
    with differentiable_attention():
        operator = hessian(Parameters(case.model), case.batches(), case.data[2], work)
        operator.terms(torch.ones(operator.size, dtype=torch.float64))
        work.evaluations = 0
        operator.terms(torch.ones(operator.size, dtype=torch.float64))
    assert work.evaluations == pytest.approx(NESTED_JVP / GRADIENT)


class Swish(torch.autograd.Function):
    """Of the old kind: reverse mode only, not to be had of torch.func."""

    @staticmethod
    def forward(ctx, x):  # type: ignore[no-untyped-def,override]
        ctx.save_for_backward(x)
        return x * x.sigmoid()

    @staticmethod
    def backward(ctx, gradient):  # type: ignore[no-untyped-def,override]
        [x] = ctx.saved_tensors
        return gradient * x.sigmoid() * (1 + x * (1 - x.sigmoid()))


class Activation(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return Swish.apply(x)


class Lstm(nn.Module):
    """Its kernel for float32 on a CPU has no forward mode."""

    def __init__(self) -> None:
        super().__init__()
        self.cells, self.head = nn.LSTM(2, 3, batch_first=True), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.cells(x)[0][:, -1])


@pytest.mark.parametrize("kind", ALL)
def test_a_function_without_forward_mode(kind: str) -> None:
    """The same as of the same network without such a function."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        plain = nn.Sequential(nn.Linear(3, 4), nn.SiLU(), nn.Linear(4, 3)).double().eval()
        x, y = torch.randn(5, 3, dtype=torch.float64), torch.tensor([0, 1, 2, 0, 1])
    odd = nn.Sequential(plain[0], Activation(), plain[2]).eval()
    operators = [of_model(kind, model, x, y) for model in (plain, odd)]
    expected, found = map(to_matrix, operators)
    torch.testing.assert_close(found, expected, **TIGHT)
    v = expected[0]
    torch.testing.assert_close(operators[1].terms(v), operators[0].terms(v), **TIGHT)


@pytest.mark.parametrize("kind", ALL)
def test_lstm_in_float32(kind: str) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model, x, y = Lstm().eval(), torch.randn(5, 4, 2), torch.tensor([0, 1, 2, 0, 1])
    found = of_model(kind, model, x, y)
    expected = to_matrix(of_model(kind, copy.deepcopy(model).double(), x.double(), y))
    v = torch.randn(found.size, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(found.matvec(v).double(), expected @ v.double(), rtol=1e-3, atol=1e-5)
    assert float(found.terms(v).mean()) == pytest.approx(float(v.double() @ expected @ v.double()), rel=1e-3)


class Cubed(torch.autograd.Function):
    """x³, whose backward pass counts as a constant where it is differentiated."""

    @staticmethod
    def forward(ctx, x):  # type: ignore[no-untyped-def,override]
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient):  # type: ignore[no-untyped-def,override]
        (x,) = ctx.saved_tensors
        return 3 * gradient * x * x


class Cubes(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Linear(3, 4), nn.Linear(4, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self[1](Cubed.apply(self[0](x)))


class Bag(nn.Sequential):
    """torch has no derivative of its backward pass, and no forward mode."""

    def __init__(self) -> None:
        super().__init__(nn.EmbeddingBag(5, 4), nn.Tanh(), nn.Linear(4, 3))


@pytest.mark.parametrize("how", ["matvec", "terms"])
@pytest.mark.parametrize("kind", ALL)
@pytest.mark.parametrize("net", [Cubes, Bag])
def test_a_derivative_that_is_absent_or_wrong_is_told(net: type[nn.Module], kind: str, how: str) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = net().double().eval()
        x = torch.randint(0, 5, (6, 3)) if net is Bag else torch.randn(6, 3, dtype=torch.float64)
    operator = of_model(kind, model, x, torch.tensor([0, 1, 2, 0, 1, 2]))
    v = torch.randn(operator.size, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    with pytest.raises(
        UsageError,
        match="_embedding_bag_backward" if net is Bag else "these would be wrong|disagree with differences",
    ):
        getattr(operator, how)(v)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scale", [100.0, 300.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_saturated_probabilities_keep_their_digits(kind: str, dtype: torch.dtype, scale: float) -> None:
    """Against Σ_{i<j} p_i p_j (J_i − J_j)ᵀ(J_i − J_j), which no difference from 1 disturbs; H = F of one layer."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model = nn.Linear(3, 4).eval()
        x, v = torch.randn(5, 3), torch.randn(16)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(scale)
    exact = copy.deepcopy(model).double()
    p = exact(x.double()).detach().softmax(1)
    assert float((1 - p.amax(1)).max()) < 0.2
    assert float(p.sort(1)[0][:, -2].min()) < 1e-15
    change = v[:12].view(4, 3).double() @ x.double().T + v[12:, None].double()  # J v, (C, N)
    pairs = p.T[:, None] * p.T[None] * (change[:, None] - change[None]).square()
    expected = pairs.sum((0, 1)) / 2
    labels = torch.tensor([0, 1, 2, 3, 0])  # right and wrong ones
    operator = of_model(kind, model.to(dtype), x.to(dtype), labels)
    found = operator.terms(v.to(dtype)).double()
    rel = 1e-3 if dtype == torch.float32 else 1e-10
    torch.testing.assert_close(found, expected, rtol=rel, atol=1e-35)
    assert float(v.to(dtype) @ operator.matvec(v.to(dtype))) == pytest.approx(float(expected.mean()), rel=rel)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_residual_of_confident_examples_keeps_its_digits(dtype: torch.dtype) -> None:
    """Σ_c (p_c − y_c) ∇²z_c, where p − 1 of the label is what the other classes have."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(4)
        model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).double().eval()
        x, v = torch.randn(5, 3, dtype=torch.float64), torch.randn(31, dtype=torch.float64)
    with torch.no_grad():
        model[2].weight.mul_(80)
    z = model(x).detach()
    labels = z.argmax(1)
    p = z.softmax(1)
    others = torch.ones_like(p).scatter(1, labels[:, None], 0)
    assert float((p * others).sum(1).median()) < 1e-10
    slopes = p * others - (1 - others) * (p * others).sum(1, keepdim=True)
    parameters = Parameters(model)

    def along_v(t: Tensor) -> Tensor:  # (5,)
        return (slopes * parameters.logits(x, parameters.moved(t * v))).sum(1)

    zero = torch.zeros((), dtype=torch.float64)
    expected = torch.stack(
        [torch.autograd.functional.hessian(lambda t, n=n: along_v(t)[n], zero) for n in range(5)]
    )
    found = of_model("residual", model.to(dtype), x.to(dtype), labels).terms(v.to(dtype)).double()
    rel = 2e-3 if dtype == torch.float32 else 1e-9
    torch.testing.assert_close(found, expected, rtol=rel, atol=1e-12 * float(expected.abs().max()))
