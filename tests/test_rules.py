"""Training rules against hand-written steps, closed forms and finite differences."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Tied, frozen_mlp, seeded, tanh_mlp
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from gm_probe.data.batches import Batches
from gm_probe.errors import UsageError
from gm_probe.training.evaluation import evaluate
from gm_probe.training.methods import METHODS
from gm_probe.training.methods.iam import IAMD, IAMS, OnePassIAMD
from gm_probe.training.methods.sam import ASAM, SAM
from gm_probe.training.rule import Rule

RULES: dict[str, Callable[..., Rule]] = {
    "sgd": Rule,
    "sam": lambda model, **o: SAM(model, rho=0.3, **o),
    "asam": lambda model, **o: ASAM(model, rho=0.5, **o),
    "iam-d": lambda model, **o: IAMD(model, rho=0.3, beta=0.7, **o),
    "iam-d K=3": lambda model, **o: IAMD(model, rho=0.3, beta=0.7, k_steps=3, **o),
    "iam-d perturbed": lambda model, **o: IAMD(model, rho=0.3, beta=0.7, kl_grad="perturbed", **o),
    "iam-d one pass": lambda model, **o: OnePassIAMD(model, rho=0.3, beta=0.7, **o),
    "iam-s": lambda model, **o: IAMS(model, rho=0.3, **o),
    "iam-s none": lambda model, **o: IAMS(model, rho=0.3, sign="none", **o),
    "iam-s loss": lambda model, **o: IAMS(model, rho=0.3, sign="loss", **o),
}
CLOSE = {"rtol": 1e-9, "atol": 1e-12}


def data(count: int = 8, seed: int = 0) -> tuple[Tensor, Tensor]:
    x = torch.randn(count, 3, generator=seeded(seed), dtype=torch.float64)
    return x, torch.randint(0, 3, (count,), generator=seeded(seed + 1))


def make(build: Callable[[], nn.Module] = tanh_mlp, seed: int = 0) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build().double()


def normed_mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 3))


def trainable(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def grads(model: nn.Module) -> Tensor:
    return torch.cat(
        [(torch.zeros_like(p) if p.grad is None else p.grad).reshape(-1) for p in trainable(model)]
    )


def gradient_at(model: nn.Module, offset: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """∇CE at θ + offset, by moving a copy."""
    moved = copy.deepcopy(model)
    moved.zero_grad(set_to_none=True)
    vector_to_parameters(parameters_to_vector(trainable(model)).detach() + offset, trainable(moved))
    functional.cross_entropy(moved(x), y).backward()
    return grads(moved)


def algorithm_1(model: nn.Module, x: Tensor, rho: float, steps: int, seed: int) -> Tensor:
    """δ_K of Algorithm 1, with the KL written naively (float64)."""
    names = [n for n, p in model.named_parameters() if p.requires_grad]
    theta = parameters_to_vector(trainable(model)).detach()
    size = len(theta)
    noise = torch.randn(size, generator=seeded(seed), dtype=torch.float64)
    delta = noise * 0.1 / math.sqrt(size)

    def log_softmax(flat: Tensor) -> Tensor:
        pieces = flat.split([p.numel() for p in trainable(model)])
        values = {n: v.view(p.shape) for n, v, p in zip(names, pieces, trainable(model), strict=True)}
        return functional_call(model, values, (x,)).log_softmax(1)

    log_p = log_softmax(theta).detach()
    for _ in range(steps):
        delta.requires_grad_()
        mean_kl = (log_p.exp() * (log_p - log_softmax(theta + delta))).sum(1).mean()
        (g,) = torch.autograd.grad(mean_kl, delta)
        delta = rho * g / g.norm()
    return delta


def rule_gradient(rule: str, model: nn.Module, x: Tensor, y: Tensor, **options: Any) -> Tensor:
    model.zero_grad(set_to_none=True)
    RULES[rule](model, **options).backward(x, y)
    return grads(model)


# each rule by itself


@pytest.mark.parametrize("kl_grad", ["both", "perturbed"])
@pytest.mark.parametrize("steps", [1, 3])
def test_iam_d_against_finite_differences(steps: int, kl_grad: str) -> None:
    model, (x, y) = make(), data()
    theta = parameters_to_vector(model.parameters()).detach().clone()
    delta = algorithm_1(model, x, 0.3, steps, seed=5)
    twin = copy.deepcopy(model)

    def log_softmax(flat: Tensor) -> Tensor:
        vector_to_parameters(flat, twin.parameters())
        with torch.no_grad():
            return twin(x).log_softmax(1)

    frozen = log_softmax(theta)

    def objective(flat: Tensor) -> Tensor:
        log_p, log_q = log_softmax(flat), log_softmax(flat + delta)
        reference = log_p if kl_grad == "both" else frozen
        divergence = (reference.exp() * (reference - log_q)).sum(1).mean()
        return 0.7 * divergence - log_p[torch.arange(len(y)), y].mean()

    eps = 1e-5
    expected = torch.stack(
        [
            (objective(theta + eps * e) - objective(theta - eps * e)) / (2 * eps)
            for e in torch.eye(len(theta), dtype=torch.float64)
        ]
    )
    rule = IAMD(model, rho=0.3, beta=0.7, k_steps=steps, kl_grad=kl_grad, generator=seeded(5))  # type: ignore[arg-type]
    step = rule.backward(x, y)
    torch.testing.assert_close(grads(model), expected, rtol=1e-6, atol=1e-9)
    log_q = log_softmax(theta + delta)
    torch.testing.assert_close(step.inconsistency, (frozen.exp() * (frozen - log_q)).sum(1).mean())


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("seed", range(4))
def test_iam_s_is_the_gradient_at_delta(steps: int, seed: int) -> None:
    model, (x, y) = make(), data()
    delta = algorithm_1(model, x, 0.3, steps, seed)
    plus, minus = gradient_at(model, delta, x, y), gradient_at(model, -delta, x, y)

    def by(sign: str) -> Tensor:
        model.zero_grad(set_to_none=True)
        IAMS(model, rho=0.3, k_steps=steps, sign=sign, generator=seeded(seed)).backward(x, y)  # type: ignore[arg-type]
        return grads(model)

    torch.testing.assert_close(by("none"), plus, **CLOSE)
    random = by("random")
    assert torch.allclose(random, plus, **CLOSE) != torch.allclose(random, minus, **CLOSE)
    rising = float(gradient_at(model, 0 * delta, x, y) @ delta) >= 0
    torch.testing.assert_close(by("loss"), plus if rising else minus, **CLOSE)


def test_random_sign_is_fair() -> None:
    model, (x, y) = make(), data()
    kept = 0
    for seed in range(60):
        delta = algorithm_1(model, x, 0.3, 1, seed)
        found = rule_gradient("iam-s", model, x, y, generator=seeded(seed))
        kept += torch.allclose(found, gradient_at(model, delta, x, y), **CLOSE)
    assert 18 <= kept <= 42


class Reference:
    """The rules once more, slowly: a model is moved by copying it, a gradient is one loss's backward()."""

    def __init__(self, rule: str, seed: int) -> None:
        self.rule, self.generator = rule, seeded(seed)
        self.delta: list[Tensor] | None = None  # of the one-pass rule

    def moved(self, model: nn.Module, delta: list[Tensor]) -> nn.Module:
        other = copy.deepcopy(model)
        with torch.no_grad():
            for p, d in zip(other.parameters(), delta, strict=True):
                p += d
        return other

    def gradient(self, model: nn.Module, loss: Callable[[nn.Module], Tensor]) -> list[Tensor]:
        other = copy.deepcopy(model)
        other.zero_grad()
        loss(other).backward()
        return [p.grad.clone() for p in other.parameters()]  # type: ignore[union-attr]

    def scaled(self, values: list[Tensor], length: float) -> list[Tensor]:
        norm = math.sqrt(sum(float((v * v).sum()) for v in values))
        return [v * length / norm for v in values]

    def noise(self, model: nn.Module) -> list[Tensor]:
        size = sum(p.numel() for p in model.parameters())
        flat = torch.randn(size, generator=self.generator, dtype=torch.float64)
        pieces = flat.split([p.numel() for p in model.parameters()])
        return [piece.view(p.shape) for piece, p in zip(pieces, model.parameters(), strict=True)]

    def kl_from(self, model: nn.Module, x: Tensor) -> Callable[[nn.Module], Tensor]:
        """KL(model ‖ other) as a function of the other."""
        p = copy.deepcopy(model)(x).softmax(1).detach()
        return lambda other: (p * (p.log() - other(x).log_softmax(1))).sum(1).mean()

    def ascended(self, model: nn.Module, x: Tensor, steps: int) -> list[Tensor]:
        size = sum(p.numel() for p in model.parameters())
        delta = [v * 0.1 / math.sqrt(size) for v in self.noise(model)]
        for _ in range(steps):
            delta = self.scaled(self.gradient(self.moved(model, delta), self.kl_from(model, x)), 0.3)
        return delta

    def sign(self) -> int:
        return 2 * int(torch.randint(0, 2, (), generator=self.generator)) - 1

    def both_sides(self, model: nn.Module, x: Tensor, delta: list[Tensor]) -> list[Tensor]:
        """∇_θ KL(f_θ ‖ f_{θ+δ}): the sum of the gradients that each side has on its own."""
        q = self.moved(model, delta)(x).log_softmax(1).detach()

        def of_reference(other: nn.Module) -> Tensor:
            log_p = other(x).log_softmax(1)
            return (log_p.exp() * (log_p - q)).sum(1).mean()

        second = self.gradient(self.moved(model, delta), self.kl_from(model, x))
        return [a + b for a, b in zip(self.gradient(model, of_reference), second, strict=True)]

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor) -> list[Tensor]:
        def loss(other: nn.Module) -> Tensor:
            return -other(x).log_softmax(1)[torch.arange(len(y)), y].mean()

        plain = self.gradient(model, loss)
        if self.rule == "sgd":
            return plain
        if self.rule == "sam":
            return self.gradient(self.moved(model, self.scaled(plain, 0.3)), loss)
        if self.rule == "asam":
            named = model.named_parameters()
            scale = [p.detach().abs() + 0.01 if "weight" in n else torch.ones_like(p) for n, p in named]
            ahead = self.scaled([t * g for t, g in zip(scale, plain, strict=True)], 0.5)
            return self.gradient(self.moved(model, [t * e for t, e in zip(scale, ahead, strict=True)]), loss)
        if self.rule.startswith("iam-s"):
            delta = self.ascended(model, x, 1)
            sign = 1
            if self.rule == "iam-s":
                sign = self.sign()
            elif self.rule == "iam-s loss":
                rising = sum(float((g * d).sum()) for g, d in zip(plain, delta, strict=True))
                sign = 1 if rising >= 0 else -1
            return self.gradient(self.moved(model, [sign * d for d in delta]), loss)
        if self.rule == "iam-d one pass":
            if self.delta is None:
                self.delta = self.scaled(self.noise(model), 0.3)
            sign = self.sign()
            delta = [sign * d for d in self.delta]
            self.delta = self.scaled(self.gradient(self.moved(model, delta), self.kl_from(model, x)), 0.3)
        else:
            delta = self.ascended(model, x, 3 if self.rule == "iam-d K=3" else 1)
        if self.rule == "iam-d perturbed":
            term = self.gradient(self.moved(model, delta), self.kl_from(model, x))
        else:
            term = self.both_sides(model, x, delta)
        return [g + 0.7 * t for g, t in zip(plain, term, strict=True)]


@pytest.mark.parametrize("build", [tanh_mlp, normed_mlp], ids=lambda b: b.__name__)
@pytest.mark.parametrize("rule", RULES)
def test_five_steps_against_a_slow_derivation(rule: str, build: Callable[[], nn.Module]) -> None:
    """With momentum and weight decay, and BatchNorm in train mode in every pass."""
    model = make(build)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.9, weight_decay=0.01)
    built, reference = RULES[rule](model, generator=seeded(9)), Reference(rule, 9)
    twin, velocity = copy.deepcopy(model), [torch.zeros_like(p) for p in model.parameters()]
    for seed in range(5):
        x, y = data(seed=seed)
        optimizer.zero_grad()
        built.backward(x, y)
        optimizer.step()

        gradients = reference(twin, x, y)
        twin(x)  # the one pass that BatchNorm's statistics see
        with torch.no_grad():
            for p, v, g in zip(twin.parameters(), velocity, gradients, strict=True):
                v.mul_(0.9).add_(g + 0.01 * p)
                p -= 0.2 * v
    for (name, ours), theirs in zip(model.state_dict().items(), twin.state_dict().values(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-7, atol=1e-9, msg=name)


@pytest.mark.parametrize(
    "build",
    [
        lambda m: SAM(m, rho=0.0),
        lambda m: ASAM(m, rho=0.0),
        lambda m: IAMD(m, rho=0.0),
        lambda m: OnePassIAMD(m, rho=0.0),
        lambda m: IAMS(m, rho=0.0),
    ],
)
def test_radius_zero_is_sgd(build: Callable[[nn.Module], Rule]) -> None:
    model = make(normed_mlp)
    twin = copy.deepcopy(model)
    rule, plain = build(model), torch.optim.SGD(twin.parameters(), lr=0.3, momentum=0.9)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.9)
    for seed in range(4):
        x, y = data(seed=seed)
        optimizer.zero_grad()
        rule.backward(x, y)
        optimizer.step()
        plain.zero_grad()
        functional.cross_entropy(twin(x), y).backward()
        plain.step()
    for ours, theirs in zip(model.state_dict().values(), twin.state_dict().values(), strict=True):
        torch.testing.assert_close(ours, theirs, **CLOSE)


def test_the_carried_delta_finds_the_sharpest_direction() -> None:
    """On one batch and still weights the one-pass rule is the power iteration: δ ends at F's eigenvector."""
    model, (x, y) = make(), data(30)
    rule = OnePassIAMD(model, rho=1e-4, generator=seeded(1))
    for _ in range(200):
        rule.backward(x, y)
    names, flat = [n for n, _ in model.named_parameters()], [p.detach() for p in model.parameters()]

    def logits(*values: Tensor) -> Tensor:
        return functional_call(model, dict(zip(names, values, strict=True)), (x,))

    jacobians = torch.autograd.functional.jacobian(logits, tuple(flat))
    j = torch.cat([part.reshape(30, 3, -1) for part in jacobians], 2)
    p = model(x).softmax(1).detach()
    middle = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    fisher = torch.einsum("ncp,ncd,ndq->pq", j, middle, j) / 30
    leading = torch.linalg.eigh(fisher).eigenvectors[:, -1]
    assert rule.delta is not None
    assert float(rule.delta.norm()) == pytest.approx(1e-4)
    assert abs(float(functional.cosine_similarity(rule.delta, leading, dim=0))) > 0.99


def test_a_delta_without_a_direction_stays() -> None:
    """A network that no parameter moves has a flat KL; then one that overflows."""

    class Idle(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.factor = nn.Parameter(torch.ones(3, 3)), 0.0

        def forward(self, x: Tensor) -> Tensor:
            return x + self.factor * (x @ self.weight)

    model, x, y = Idle(), torch.randn(4, 3, generator=seeded()), torch.arange(4) % 3
    rule = OnePassIAMD(model, generator=seeded())
    rule.backward(x, y)
    first = rule.delta
    for factor in (0.0, math.inf):
        model.factor = factor
        rule.backward(x, y)
        assert first is not None
        assert rule.delta is not None
        assert torch.equal(rule.delta, first)
    model.factor = 1.0
    rule.backward(x, y)
    assert not torch.equal(rule.delta, first)  # type: ignore[arg-type]


@pytest.mark.parametrize("rule", RULES)
def test_state_dict_round_trip(rule: str, tmp_path: Path) -> None:
    """Two steps, saved through a file, two more in a new rule: as four in one."""

    def four(broken: bool) -> list[Tensor]:
        model, gradients = make(), []
        built = RULES[rule](model, generator=seeded(3))
        for seed in range(4):
            if seed == 2 and broken:
                torch.save(built.state_dict(), tmp_path / "rule.pt")
                built = RULES[rule](model, generator=seeded(77))
                built.load_state_dict(torch.load(tmp_path / "rule.pt", weights_only=True))
            model.zero_grad()
            built.backward(*data(seed=seed))
            gradients.append(grads(model))
        return gradients

    for straight, resumed in zip(four(broken=False), four(broken=True), strict=True):
        assert torch.equal(straight, resumed)


# what holds for all of them


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("build", [tanh_mlp, normed_mlp, Tied, frozen_mlp], ids=lambda b: b.__name__)
def test_the_model_itself_is_not_moved(rule: str, build: Callable[[], nn.Module]) -> None:
    model, (x, y) = make(build), data()
    before = [p.detach().clone() for p in model.parameters()]
    flags = [p.requires_grad for p in model.parameters()]
    RULES[rule](model).backward(x, y)
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))
    assert [p.requires_grad for p in model.parameters()] == flags
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)
    assert all(not p.grad.requires_grad for p in trainable(model) if p.grad is not None)
    assert model.training


@pytest.mark.parametrize("rule", RULES)
def test_batch_norm_sees_one_clean_pass(rule: str) -> None:
    model, (x, y) = make(normed_mlp), data()
    reference = copy.deepcopy(model)
    reference(x)
    RULES[rule](model).backward(x, y)
    expected = dict(reference.named_buffers())
    assert expected["1.num_batches_tracked"] == 1
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, expected[name]), name


class Shifting(nn.Sequential):
    """Begins by an operation in place."""

    def forward(self, x: Tensor) -> Tensor:
        x -= 0.5
        return super().forward(x)


@pytest.mark.parametrize("rule", RULES)
def test_a_model_that_writes_to_its_input(rule: str) -> None:
    x, y = data()
    before = x.clone()
    found = rule_gradient(rule, make(lambda: Shifting(*tanh_mlp())), x, y)
    assert torch.equal(x, before)
    torch.testing.assert_close(found, rule_gradient(rule, make(), x - 0.5, y), **CLOSE)


def test_examples_are_left_alone_where_a_model_that_writes_to_its_input_is_evaluated() -> None:
    x, y = data()
    before, model = x.clone(), make(lambda: Shifting(*tanh_mlp()))
    found = evaluate(model, Batches.from_tensors(x, y))
    assert torch.equal(x, before)
    assert found == evaluate(make(), Batches.from_tensors(x - 0.5, y))


@pytest.mark.parametrize("rule", RULES)
def test_gradients_accumulate_as_backward_does(rule: str) -> None:
    model, (x, y) = make(), data()
    fresh = rule_gradient(rule, model, x, y, generator=seeded(3))
    for p in model.parameters():
        p.grad = torch.full_like(p, 2.0)
    held = [p.grad for p in model.parameters()]
    RULES[rule](model, generator=seeded(3)).backward(x, y)
    torch.testing.assert_close(grads(model), fresh + 2.0, **CLOSE)
    assert all(p.grad is g for p, g in zip(model.parameters(), held, strict=True))


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("m", [3, 4])
def test_m_sharpness_is_the_mean_over_sub_batches(rule: str, m: int) -> None:
    model, (x, y) = make(), data()
    whole = rule_gradient(rule, model, x, y, m=m, generator=seeded(7))
    model.zero_grad(set_to_none=True)
    shared, total = RULES[rule](model, generator=seeded(7)), torch.zeros(31, dtype=torch.float64)
    for start in range(0, 8, m):
        model.zero_grad(set_to_none=True)
        part = slice(start, start + m)
        shared.backward(x[part], y[part])
        total += grads(model) * len(y[part]) / 8
    torch.testing.assert_close(whole, total, **CLOSE)


@pytest.mark.parametrize("rule", RULES)
def test_m_sharpness_reports_the_whole_batch(rule: str) -> None:
    model, (x, y) = make(), data()
    step = RULES[rule](model, m=3).backward(x, y)
    torch.testing.assert_close(step.logits, model(x).detach(), **CLOSE)
    torch.testing.assert_close(step.loss, functional.cross_entropy(model(x), y).detach(), **CLOSE)
    assert (step.inconsistency is not None) == rule.startswith("iam-d")


@pytest.mark.parametrize("rule", RULES)
def test_tied_weights_move_together(rule: str) -> None:
    """A tied network gives the same gradient as one that is written with a single matrix."""

    class Written(nn.Module):
        def __init__(self, tied: Tied) -> None:
            super().__init__()
            self.weight = nn.Parameter(tied.first.weight.detach().clone())
            self.one = nn.Parameter(tied.first.bias.detach().clone())
            self.two = nn.Parameter(tied.second.bias.detach().clone())
            self.last = copy.deepcopy(tied.last)

        def forward(self, x: Tensor) -> Tensor:
            hidden = torch.tanh(x @ self.weight.T + self.one)
            return self.last(torch.relu(hidden @ self.weight.T + self.two))

    tied, (x, y) = make(Tied), data()
    assert isinstance(tied, Tied)
    written = Written(tied)
    expected = rule_gradient(rule, written, x, y, generator=seeded(2))
    torch.testing.assert_close(rule_gradient(rule, tied, x, y, generator=seeded(2)), expected, **CLOSE)


@pytest.mark.parametrize("rule", RULES)
def test_frozen_parameters_are_constants(rule: str) -> None:
    """A frozen layer gives the same gradient as the same matrix held in a buffer."""

    class Constant(nn.Module):
        def __init__(self, linear: nn.Linear) -> None:
            super().__init__()
            self.register_buffer("matrix", linear.weight.detach().clone())
            self.bias = nn.Parameter(linear.bias.detach().clone())

        def forward(self, x: Tensor) -> Tensor:
            return functional.linear(x, self.matrix, self.bias)

    frozen, (x, y) = make(frozen_mlp), data()
    constant = copy.deepcopy(frozen)
    constant[2] = Constant(frozen[2])  # type: ignore[index, operator]
    expected = rule_gradient(rule, constant, x, y, generator=seeded(2))
    torch.testing.assert_close(rule_gradient(rule, frozen, x, y, generator=seeded(2)), expected, **CLOSE)


@pytest.mark.parametrize("rule", list(RULES))
def test_layers_unfrozen_and_frozen_between_steps(rule: str) -> None:
    """What is trainable is looked up at every step: the gradients are those of a rule built anew."""
    model, (x, y) = make(), data()
    first = next(iter(model.parameters()))
    first.requires_grad_(False)
    before = RULES[rule](model, generator=seeded(3))
    before.backward(x, y)
    assert first.grad is None
    for trains in (True, False):
        first.requires_grad_(trains)
        model.zero_grad(set_to_none=True)
        before.generator.manual_seed(4)
        before.backward(x, y)
        there, fresh = grads(model), RULES[rule](model, generator=seeded(4))
        assert (first.grad is not None) == trains
        model.zero_grad(set_to_none=True)
        fresh.backward(x, y)
        torch.testing.assert_close(there, grads(model), **CLOSE)


def test_parameters_of_several_dtypes_are_refused() -> None:
    model = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 3).bfloat16())
    with pytest.raises(
        UsageError, match=r"'1.weight' is torch.bfloat16 and '0.weight' torch.float32. .*float"
    ):
        IAMD(model)
    model[1].requires_grad_(False)  # a frozen part may have its own
    IAMD(model)


@pytest.mark.parametrize("method", [SAM, ASAM])
def test_a_penalty_in_the_loss_is_taken_at_perturbed_weights(method: type[SAM]) -> None:
    """Against the weights themselves moved and moved back, as in the methods' own loops."""
    x, y = torch.randn(6, 3).double(), torch.arange(6) % 2
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    held = list(model.parameters())

    def penalised(outputs: Tensor, y: Tensor, parameters: Iterable[Tensor] | None = None) -> Tensor:
        every = model.parameters() if parameters is None else parameters
        return functional.cross_entropy(outputs, y) + sum(p.pow(4).sum() for p in every)

    rule = method(model, penalised, rho=0.5)
    gradient = torch.autograd.grad(penalised(model(x), y), held)
    offset = rule._perturbation(torch.cat([g.reshape(-1) for g in gradient]))
    before = [p.detach().clone() for p in held]
    with torch.no_grad():
        for p, piece in zip(held, rule.parameters.split(offset).values(), strict=True):
            p += piece
    expected = torch.autograd.grad(penalised(model(x), y), held)
    with torch.no_grad():
        for p, value in zip(held, before, strict=True):
            p.copy_(value)
    rule.backward(x, y)
    for p, right in zip(held, expected, strict=True):
        torch.testing.assert_close(p.grad, right)
    with pytest.raises(UsageError, match="from a list or a cache"):
        method(model, lambda outputs, y: penalised(outputs, y, held)).backward(x, y)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_in_which_a_perturbation_is_lost_are_refused(dtype: torch.dtype) -> None:
    model = nn.Linear(3, 3).to(dtype)
    for method in (SAM, IAMD, IAMS):
        with pytest.raises(UsageError, match="rounds much of a perturbation away"):
            method(model)
    Rule(model).backward(torch.randn(4, 3).to(dtype), torch.arange(4) % 3)  # as loss.backward() does


@pytest.mark.parametrize("rule", RULES)
def test_generator_alone_decides(rule: str) -> None:
    model, (x, y) = make(), data()
    state = torch.get_rng_state()
    one = rule_gradient(rule, model, x, y, generator=seeded(4))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(99)
        assert torch.equal(rule_gradient(rule, model, x, y, generator=seeded(4)), one)
    assert torch.equal(torch.get_rng_state(), state)
    if rule.startswith("iam"):
        assert not torch.equal(rule_gradient(rule, model, x, y, generator=seeded(5)), one)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("m", [None, 4])
def test_bf16_autocast_needs_no_scaler(rule: str, m: int | None) -> None:
    model, (x, y) = make(seed=1).float(), data(64)
    exact = rule_gradient(rule, model, x.float(), y, m=m, generator=seeded(1))
    with torch.autocast("cpu", torch.bfloat16):
        half = rule_gradient(rule, model, x.float(), y, m=m, generator=seeded(1))
    assert half.dtype == torch.float32
    assert bool(torch.isfinite(half).all())
    assert float(functional.cosine_similarity(half, exact, dim=0)) > 0.98


@pytest.mark.parametrize("rule", RULES)
def test_the_criterion_is_used(rule: str) -> None:
    model, (x, y) = make(), data()
    plain = rule_gradient(rule, model, x, y, generator=seeded())
    smoothed = rule_gradient(
        rule,
        model,
        x,
        y,
        generator=seeded(),
        criterion=lambda z, t: functional.cross_entropy(z, t, label_smoothing=0.3),
    )
    assert float((plain - smoothed).norm()) > 0.01 * float(plain.norm())


@pytest.mark.parametrize(
    ("rule", "options", "passes"),
    [
        ("sgd", {}, 3),
        ("sam", {}, 6),
        ("asam", {}, 6),
        ("iam-d", {}, 9),
        ("iam-d", {"k_steps": 3}, 15),
        ("iam-d-onepass", {}, 6),
        ("iam-s", {}, 7),
        ("iam-s", {"sign": "loss"}, 9),
    ],
)
def test_cost_in_forward_units(rule: str, options: dict[str, Any], passes: float) -> None:
    """Counted, a backward pass as two."""
    calls = {"forward": 0, "backward": 0}

    class Count(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, z: Tensor) -> Tensor:
            calls["forward"] += 1
            return z.clone()

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            calls["backward"] += 1
            return grad

    class Counted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = make()

        def forward(self, x: Tensor) -> Tensor:
            return Count.apply(self.inner(x))

    built = METHODS[rule](Counted(), **options)
    built.backward(*data())  # the first step tries the model, too
    calls |= {"forward": 0, "backward": 0}
    built.backward(*data())
    assert calls["forward"] + 2 * calls["backward"] == passes == built.passes


@pytest.mark.parametrize(
    "make_rule",
    [
        lambda m: SAM(m, rho=-0.1),
        lambda m: SAM(m, rho=math.nan),
        lambda m: Rule(m, m=0),
        lambda m: IAMD(m, k_steps=0),
        lambda m: OnePassIAMD(m, beta=0.0),
        lambda m: OnePassIAMD(m, rho=-1.0),
    ],
)
def test_options_that_make_no_sense(make_rule: Callable[[nn.Module], Rule]) -> None:
    with pytest.raises(UsageError):
        make_rule(make())


@pytest.mark.parametrize(
    "build",
    [lambda m: SAM(m, rho=0.0), lambda m: ASAM(m, rho=0.0), lambda m: IAMS(m, rho=0.0, sign="none")],
    ids=["sam", "asam", "iam-s"],
)
def test_dropout_draws_the_same_units_in_every_pass(build: Callable[[nn.Module], Rule]) -> None:
    """At ρ = 0 the perturbed network is the clean one, its masks included, and every rule is plain SGD."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 32), nn.ReLU(), nn.Dropout(0.5), nn.Linear(32, 3)).double()
    x, y = torch.randn(16, 5, dtype=torch.float64), torch.arange(16) % 3
    state = torch.get_rng_state()
    step = IAMD(model, rho=0.0).backward(x, y)
    assert step.inconsistency is not None
    assert float(step.inconsistency) == 0
    model.zero_grad()
    torch.set_rng_state(state)
    build(model).backward(x, y)
    moved = [p.grad.clone() for p in model.parameters()]  # type: ignore[union-attr]
    after = torch.rand(1)
    model.zero_grad()
    torch.set_rng_state(state)
    functional.cross_entropy(model(x), y).backward()
    for p, gradient in zip(model.parameters(), moved, strict=True):
        torch.testing.assert_close(p.grad, gradient)
    assert torch.equal(torch.rand(1), after)  # the global generator went on as after one pass


# float16


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("m", [None, 3])
def test_scaler_multiplies_the_final_gradient_only(rule: str, m: int | None) -> None:
    """Whatever the factor, the perturbation is the same: unscaled, the gradient is the plain one."""
    model, (x, y) = make(), data()
    plain = rule_gradient(rule, model, x, y, m=m, generator=seeded(2))
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model.zero_grad(set_to_none=True)
    RULES[rule](model, m=m, generator=seeded(2)).backward(x, y, scaler=scaler)
    torch.testing.assert_close(grads(model), plain * 1024, **CLOSE)
    scaler.unscale_(optimizer)
    torch.testing.assert_close(grads(model), plain, **CLOSE)


@pytest.mark.parametrize("rule", [rule for rule in RULES if rule != "sgd"])
def test_overflow_in_the_inner_gradient_skips_the_step(rule: str) -> None:
    """The first backward pass, at which the perturbation is found, overflows; the outer one would not have."""

    class Overflow(torch.autograd.Function):
        calls = 0

        @staticmethod
        def forward(ctx: Any, z: Tensor) -> Tensor:
            return z.clone()

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            Overflow.calls += 1
            return grad * math.inf if Overflow.calls == 1 else grad

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = make()

        def forward(self, x: Tensor) -> Tensor:
            return Overflow.apply(self.inner(x))

    model, (x, y) = Model(), data()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    built = RULES[rule](model, generator=seeded())
    Overflow.calls = 1
    built.backward(x, y)  # the first step tries the model, too
    Overflow.calls = 0
    before = copy.deepcopy(model.state_dict())

    def step() -> None:
        optimizer.zero_grad()
        built.backward(x, y, scaler=scaler)
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()

    step()
    assert scaler.get_scale() == 4.0
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    step()  # nothing of the overflow has stayed
    assert scaler.get_scale() == 4.0
    assert not torch.equal(model.inner[0].weight, before["inner.0.weight"])  # type: ignore[index]
    assert all(bool(torch.isfinite(value).all()) for value in model.state_dict().values())


@pytest.mark.parametrize("rule", RULES)
def test_small_gradients_survive_float16(rule: str) -> None:
    """A gradient that float16 rounds to zero: with the scaler's factor its direction is the exact one."""

    class Half(torch.autograd.Function):
        """Passes gradients on as float16 does."""

        @staticmethod
        def forward(ctx: Any, z: Tensor) -> Tensor:
            return z.clone()

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            return (grad * 2.0**-24).half().double() * 2.0**24

    class Model(nn.Module):
        def __init__(self, half: bool) -> None:
            super().__init__()
            self.inner, self.half = make(), half

        def forward(self, x: Tensor) -> Tensor:
            z = self.inner(x)
            return Half.apply(z) if self.half else z

    x, y = data()
    exact, half = Model(False), Model(True)
    expected = rule_gradient(rule, exact, x, y, generator=seeded(2))
    assert float(rule_gradient(rule, half, x, y, generator=seeded(2)).nan_to_num().abs().max()) == 0
    half.zero_grad(set_to_none=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**22)
    RULES[rule](half, generator=seeded(2)).backward(x, y, scaler=scaler)
    assert float(functional.cosine_similarity(grads(half), expected, dim=0)) > 0.9999


# in anybody's loop


def test_gradients_of_two_parameters_are_two_tensors() -> None:
    """Autograd hands out one tensor for both summands; clipped in place it would be clipped twice."""

    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = (nn.Parameter(torch.zeros(4, 3)) for _ in range(2))

        def forward(self, x: Tensor) -> Tensor:
            return x + (self.one + self.two)

    for rule in RULES.values():
        model = Sum()
        rule(model).backward(torch.randn(4, 3, generator=seeded()), torch.arange(4) % 3)
        before = model.one.grad.clone()  # type: ignore[union-attr]
        torch.nn.utils.clip_grad_norm_(model.parameters(), float(before.norm()))
        torch.testing.assert_close(model.one.grad, before / math.sqrt(2))
        torch.testing.assert_close(model.two.grad, before / math.sqrt(2))


@pytest.mark.parametrize("rule", ["sam", "iam-d", "iam-d one pass", "iam-s loss"])
@pytest.mark.filterwarnings("ignore")  # torch's own, while it compiles
def test_compiled_model(rule: str) -> None:
    model, (x, y) = make(normed_mlp), data()
    plain = rule_gradient(rule, copy.deepcopy(model), x, y, generator=seeded(2))
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager")
    torch.testing.assert_close(rule_gradient(rule, compiled, x, y, generator=seeded(2)), plain, **CLOSE)
