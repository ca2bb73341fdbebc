"""Hessian products of wrong second derivatives are refused by name; those of right networks never are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrizations

import gm_probe
from gm_probe.curvature.operators import hessian
from gm_probe.data.batches import Batches
from gm_probe.errors import DerivativeError
from gm_probe.models.parameters import Parameters


class Apply(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def mlp(function: Callable[[Tensor], Tensor]) -> nn.Module:
    return nn.Sequential(nn.Linear(5, 8), Apply(function), nn.Linear(8, 8), Apply(function), nn.Linear(8, 3))


def images(*layers: nn.Module, flat: int) -> nn.Module:
    return nn.Sequential(nn.Unflatten(1, (1, 6, 6)), *layers, nn.Flatten(), nn.Linear(flat, 3))


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.RNNBase]) -> None:
        super().__init__()
        self.inner, self.head = kind(3, 4, batch_first=True), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.inner(x.view(-1, 4, 3))[0][:, -1])


class Attending(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.norm = nn.MultiheadAttention(4, 2, batch_first=True), nn.LayerNorm(4)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = x.view(-1, 3, 4)
        return self.head(self.norm(x + self.inner(x, x, x, need_weights=False)[0]).mean(1))


class InFloat32(nn.Module):
    """A norm that computes in float32 whatever it is given, as those of language models do."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(8))

    def forward(self, x: Tensor) -> Tensor:
        single = x.float()
        return self.weight * (single * (single.square().mean(-1, keepdim=True) + 1e-6).rsqrt()).to(x.dtype)


def residual_cnn() -> nn.Module:
    from torchvision.models.resnet import BasicBlock

    return images(
        nn.Conv2d(1, 4, 3, padding=1), BasicBlock(4, 4), BasicBlock(4, 4), nn.AdaptiveAvgPool2d(1), flat=4
    )


def spectral() -> nn.Module:
    return nn.Sequential(parametrizations.spectral_norm(nn.Linear(5, 8)), nn.Tanh(), nn.Linear(8, 3))


def saturated() -> nn.Module:
    model = mlp(functional.relu)
    with torch.no_grad():
        model.get_parameter("4.weight").mul_(300)
    return model


def zero_biases() -> nn.Module:
    """On inputs of zeros every unit is at its kink."""
    model = mlp(functional.relu)
    for name, p in model.named_parameters():
        if "bias" in name:
            nn.init.zeros_(p)
    return model


RIGHT: dict[str, tuple[Callable[[], nn.Module], int]] = {
    **{
        f.__name__: (lambda f=f: mlp(f), 5)
        for f in (
            functional.relu,
            functional.gelu,
            functional.silu,
            functional.elu,
            functional.celu,
            functional.selu,
            functional.softplus,
            functional.leaky_relu,
            functional.hardtanh,
            functional.hardswish,
            functional.relu6,
            functional.mish,
            functional.softsign,
            functional.logsigmoid,
            torch.tanh,
            torch.sin,
            torch.abs,
        )
    },
    "max-pool": (lambda: images(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), flat=36), 36),
    "avg-pool": (lambda: images(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.AvgPool2d(2), flat=16), 36),
    "batch norm": (lambda: images(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), flat=64), 36),
    "group norm": (lambda: images(nn.Conv2d(1, 4, 3), nn.GroupNorm(2, 4), nn.ReLU(), flat=64), 36),
    "instance norm": (lambda: images(nn.Conv2d(1, 4, 3), nn.InstanceNorm2d(4), nn.ReLU(), flat=64), 36),
    "residual": (residual_cnn, 36),
    "layer norm": (lambda: nn.Sequential(nn.Linear(5, 8), nn.LayerNorm(8), nn.ReLU(), nn.Linear(8, 3)), 5),
    "lstm": (lambda: Recurrent(nn.LSTM), 12),
    "gru": (lambda: Recurrent(nn.GRU), 12),
    "rnn": (lambda: Recurrent(nn.RNN), 12),
    "attention": (Attending, 12),
    "spectral norm": (spectral, 5),
    "orthogonal": (lambda: nn.Sequential(parametrizations.orthogonal(nn.Linear(5, 5)), nn.Linear(5, 3)), 5),
    "prelu": (lambda: nn.Sequential(nn.Linear(5, 8), nn.PReLU(8), nn.Linear(8, 3)), 5),
    "maxout": (
        lambda: nn.Sequential(nn.Linear(5, 8), Apply(lambda h: h.view(-1, 4, 2).amax(2)), nn.Linear(4, 3)),
        5,
    ),
    "float32 inside": (lambda: nn.Sequential(nn.Linear(5, 8), InFloat32(), nn.Tanh(), nn.Linear(8, 3)), 5),
    "float32 inside, ReLU": (
        lambda: nn.Sequential(nn.Linear(5, 8), InFloat32(), nn.ReLU(), nn.Linear(8, 3)),
        5,
    ),
    "saturated": (saturated, 5),
    "deep": (
        lambda: nn.Sequential(nn.Linear(5, 8), *[Apply(torch.relu), nn.Linear(8, 8)] * 9, nn.Linear(8, 3)),
        5,
    ),
    "linear": (lambda: nn.Linear(5, 3), 5),
    "wide": (lambda: nn.Sequential(nn.Linear(5, 3000), nn.ReLU(), nn.Linear(3000, 3)), 5),
    "zero biases": (zero_biases, 5),
}


def product(model: nn.Module, inputs: int, *, scale: float = 1.0, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    parameters = Parameters(model.eval())
    batches = Batches.from_tensors(scale * torch.randn(24, inputs, generator=generator), torch.arange(24) % 3)
    v = torch.randn(parameters.size, generator=generator)
    return hessian(parameters, batches, torch.arange(24) % 3).matvec(v)


@pytest.mark.parametrize("name", RIGHT)
def test_right_networks_are_taken(name: str) -> None:
    build, inputs = RIGHT[name]
    for seed in range(2):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = build()
        assert bool(torch.isfinite(product(model, inputs, seed=seed)).all())


def test_units_at_their_kinks_are_no_fault() -> None:
    assert bool(torch.isfinite(product(zero_biases(), 5, scale=0.0)).all())


class LeanSiLU(torch.autograd.Function):
    """Keeps the sigmoid, which its backward pass then takes for a constant."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        s = torch.sigmoid(x)
        ctx.save_for_backward(x, s)
        return x * s

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        x, s = ctx.saved_tensors
        return g * s * (1 + x * (1 - s))


class LeanSine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.slope = 3 * torch.cos(3 * x)
        return torch.sin(3 * x)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g * ctx.slope


class Rounded(torch.autograd.Function):
    """The step function with a straight-through gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return (4 * x).round() / 4

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g


class Silu(torch.autograd.Function):
    """Right: a backward pass of what it saved of its input."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * torch.sigmoid(x)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        s = torch.sigmoid(x)
        return g * s * (1 + x * (1 - s))


@pytest.mark.parametrize("function", [LeanSiLU, LeanSine, Rounded])
def test_incomplete_ones_are_named(function: type[torch.autograd.Function]) -> None:
    for seed in range(3):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = mlp(function.apply)
        with pytest.raises(DerivativeError, match=f"{function.__name__} in module '1'"):
            product(model, 5, seed=seed)


def test_one_layer_among_many_is_found() -> None:
    relu = [nn.Linear(40, 40), nn.ReLU()]
    model = nn.Sequential(nn.Linear(5, 40), *relu * 6, Apply(LeanSiLU.apply), nn.Linear(40, 3))
    with pytest.raises(DerivativeError, match="LeanSiLU in module '13'"):
        product(model, 5)


def test_a_right_function_is_taken() -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model, plain = mlp(Silu.apply), mlp(functional.silu)
    plain.load_state_dict(model.state_dict())
    torch.testing.assert_close(product(model, 5), product(plain, 5), rtol=1e-4, atol=1e-6)


def test_weight_norm_is_told_to_be_folded() -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(parametrizations.weight_norm(nn.Linear(5, 8)), nn.Tanh(), nn.Linear(8, 3))
    with pytest.raises(DerivativeError, match=r"WeightNormInterface in module .*remove_parametrizations"):
        product(model, 5)
    nn.utils.parametrize.remove_parametrizations(model[0], "weight")
    assert bool(torch.isfinite(product(model, 5)).all())


def test_other_measures_stand() -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model, x = mlp(LeanSiLU.apply), torch.randn(30, 5)
    report = gm_probe.measure(
        model,
        gm_probe.Batches.from_tensors(x, torch.arange(30) % 3),
        ["hessian_lambda_min", "fisher_lambda_max"],
    )
    assert report.rows["hessian_lambda_min"].value is None
    assert "LeanSiLU in module '1'" in report.rows["hessian_lambda_min"].details["reason"]
    assert report.rows["fisher_lambda_max"].value is not None
