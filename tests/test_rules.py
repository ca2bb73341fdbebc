"""Training rules against hand-written steps, closed forms and finite differences."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import Tied, frozen_mlp, tanh_mlp
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from gm_probe.core.errors import UsageError
from gm_probe.training.rules import ASAM, IAMD, IAMS, METHODS, SAM, Rule

RULES: dict[str, Callable[..., Rule]] = {
    "sgd": Rule,
    "sam": lambda model, **o: SAM(model, rho=0.3, **o),
    "asam": lambda model, **o: ASAM(model, rho=0.5, **o),
    "iam-d": lambda model, **o: IAMD(model, rho=0.3, beta=0.7, **o),
    "iam-d K=3": lambda model, **o: IAMD(model, rho=0.3, beta=0.7, k_steps=3, **o),
    "iam-d perturbed": lambda model, **o: IAMD(model, rho=0.3, beta=0.7, kl_grad="perturbed", **o),
    "iam-s": lambda model, **o: IAMS(model, rho=0.3, **o),
    "iam-s none": lambda model, **o: IAMS(model, rho=0.3, sign="none", **o),
    "iam-s loss": lambda model, **o: IAMS(model, rho=0.3, sign="loss", **o),
}
CLOSE = {"rtol": 1e-9, "atol": 1e-12}


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


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
    """δ_K of METHOD.md, with the KL written naively (float64)."""
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


def test_sgd_is_backward() -> None:
    model, (x, y) = make(), data()
    step = Rule(model).backward(x, y)
    torch.testing.assert_close(grads(model), gradient_at(model, torch.zeros(31).double(), x, y), **CLOSE)
    torch.testing.assert_close(step.logits, model(x).detach())
    torch.testing.assert_close(step.loss, functional.cross_entropy(model(x), y).detach())
    assert step.inconsistency is None


def test_three_sam_steps_with_momentum() -> None:
    model = make()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.9)
    rule = SAM(model, rho=0.3)
    theta = parameters_to_vector(model.parameters()).detach().clone()
    shadow, velocity = copy.deepcopy(model), None
    for seed in range(3):
        x, y = data(seed=seed)
        optimizer.zero_grad()
        rule.backward(x, y)
        optimizer.step()

        vector_to_parameters(theta, shadow.parameters())
        g = gradient_at(shadow, 0 * theta, x, y)
        g = gradient_at(shadow, 0.3 * g / g.norm(), x, y)
        velocity = g if velocity is None else 0.9 * velocity + g
        theta = theta - 0.2 * velocity
    torch.testing.assert_close(parameters_to_vector(model.parameters()).detach(), theta, **CLOSE)


def test_sam_of_radius_zero_is_sgd() -> None:
    model, (x, y) = make(), data()
    SAM(model, rho=0.0).backward(x, y)
    torch.testing.assert_close(grads(model), gradient_at(model, torch.zeros(31).double(), x, y), **CLOSE)


def test_asam_by_hand_on_one_weight_and_one_bias() -> None:
    """z = (0, w x + b), loss = log(1 + exp(-(w x + b))) for label 1: everything is scalar."""

    class Logistic(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.tensor(-0.8, dtype=torch.float64))
            self.bias = nn.Parameter(torch.tensor(0.3, dtype=torch.float64))

        def forward(self, x: Tensor) -> Tensor:
            z = self.weight * x + self.bias
            return torch.stack([torch.zeros_like(z), z], 1)

    w, b, x, rho, eta = -0.8, 0.3, 1.7, 0.5, 0.01

    def slope(w: float, b: float) -> float:  # dL/dz
        return -1 / (1 + math.exp(w * x + b))

    gw, gb = slope(w, b) * x, slope(w, b)
    tw, tb = abs(w) + eta, 1.0  # Kwon 2021: |θ| + η on weights, 1 elsewhere
    norm = math.hypot(tw * gw, tb * gb)
    ew, eb = rho * tw**2 * gw / norm, rho * tb**2 * gb / norm
    outer = slope(w + ew, b + eb)

    model = Logistic()
    ASAM(model, rho=rho, eta=eta).backward(torch.tensor([x], dtype=torch.float64), torch.tensor([1]))
    assert grads(model).tolist() == pytest.approx([outer * x, outer], rel=1e-12)


@pytest.mark.parametrize("kl_grad", ["both", "perturbed"])
@pytest.mark.parametrize("steps", [1, 3])
def test_iam_d_against_finite_differences(steps: int, kl_grad: str) -> None:
    model, (x, y) = make(), data()
    theta = parameters_to_vector(model.parameters()).detach().clone()
    delta = algorithm_1(model, x, 0.3, steps, seed=5)
    probe = copy.deepcopy(model)

    def log_softmax(flat: Tensor) -> Tensor:
        vector_to_parameters(flat, probe.parameters())
        with torch.no_grad():
            return probe(x).log_softmax(1)

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


def test_the_two_sides_of_the_kl_differ() -> None:
    model, (x, y) = make(), data()
    both, perturbed = (
        rule_gradient(rule, model, x, y, generator=seeded()) for rule in ("iam-d", "iam-d perturbed")
    )
    assert float((both - perturbed).norm()) > 1e-3 * float(both.norm())


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


@pytest.mark.parametrize("steps", [1, 2])
def test_noise_is_fresh_every_step(steps: int) -> None:
    model, (x, y) = make(), data()
    rule = IAMD(model, rho=0.3, k_steps=steps, generator=seeded())
    first = rule.backward(x, y).inconsistency
    assert first is not None
    assert rule.backward(x, y).inconsistency != first


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
@pytest.mark.parametrize("m", [8, 100])
def test_m_of_the_batch_or_more_changes_nothing(rule: str, m: int) -> None:
    model, (x, y) = make(), data()
    plain = rule_gradient(rule, model, x, y, generator=seeded())
    assert torch.equal(rule_gradient(rule, model, x, y, m=m, generator=seeded()), plain)


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
    ("rule", "passes"), [("sgd", 3), ("sam", 6), ("asam", 6), ("iam-d", 9), ("iam-s", 7)]
)
def test_cost_in_forward_units(rule: str, passes: float) -> None:
    """METHOD.md, training rules: counted, a backward pass as two."""
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

    built = METHODS[rule](Counted())
    built.backward(*data())
    assert calls["forward"] + 2 * calls["backward"] == passes == built.passes


@pytest.mark.parametrize(
    "make_rule",
    [
        lambda m: SAM(m, rho=-0.1),
        lambda m: SAM(m, rho=math.nan),
        lambda m: Rule(m, m=0),
        lambda m: IAMD(m, k_steps=0),
    ],
)
def test_options_that_make_no_sense(make_rule: Callable[[nn.Module], Rule]) -> None:
    with pytest.raises(UsageError):
        make_rule(make())


def test_dropout_draws_the_same_units_in_every_pass() -> None:
    """At ρ = 0 the perturbed network is the clean one, its masks included, and IAM-S is plain SGD."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 32), nn.ReLU(), nn.Dropout(0.5), nn.Linear(32, 3)).double()
    x, y = torch.randn(16, 5, dtype=torch.float64), torch.arange(16) % 3
    state = torch.get_rng_state()
    step = IAMD(model, rho=0.0).backward(x, y)
    assert step.inconsistency is not None
    assert float(step.inconsistency) == 0
    model.zero_grad()
    torch.set_rng_state(state)
    IAMS(model, rho=0.0, sign="none").backward(x, y)
    moved = [p.grad.clone() for p in model.parameters()]  # type: ignore[union-attr]
    after = torch.rand(1)
    model.zero_grad()
    torch.set_rng_state(state)
    functional.cross_entropy(model(x), y).backward()
    for p, gradient in zip(model.parameters(), moved, strict=True):
        torch.testing.assert_close(p.grad, gradient)
    assert torch.equal(torch.rand(1), after)  # the global generator went on as after one pass
