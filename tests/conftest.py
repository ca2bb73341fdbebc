"""Small networks on unequal batches, and their curvature as dense matrices from torch.func."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev
from torch.nn.attention import SDPBackend, sdpa_kernel

from gm_probe.data.batches import Batches

torch.set_num_threads(1)
os.environ.pop("COLUMNS", None)  # of the caller's terminal, or of pytest-xdist: tests say how wide theirs are


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class Unused(nn.Module):
    """An MLP with a parameter that no output depends on, between two that are used."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 4)
        self.idle = nn.Linear(2, 2)
        self.last = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.first(x)))


class Tied(nn.Module):
    """Two layers that share one weight matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.relu(self.second(torch.tanh(self.first(x)))))


class Attention(nn.Module):
    """Self-attention over 3 tokens; nn.MultiheadAttention has a fast path of its own in eval mode."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.norm, self.head = nn.LayerNorm(4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        mixed, _ = self.attention(x, x, x, need_weights=False)
        return self.head(self.norm(x + mixed).mean(1))


def relu_mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3))


def tanh_mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3))


def layer_norm_mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 3))


def silu_mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.SiLU(), nn.Linear(4, 3))


def softmax_regression() -> nn.Module:
    return nn.Linear(3, 4)


def max_pool_cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 3, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(12, 3)
    )


def batch_norm_cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 2, 3, bias=False),
        nn.BatchNorm2d(2),
        nn.ReLU(),
        nn.Conv2d(2, 3, 2, bias=False),
        nn.BatchNorm2d(3),
        nn.Flatten(),
    )


def frozen_mlp() -> nn.Module:
    model = relu_mlp()
    model.get_parameter("2.weight").requires_grad_(False)
    return model


@dataclass(frozen=True)
class Case:
    """``affine``: every single parameter enters the logits (piecewise) affinely, hence tr H = tr F."""

    name: str
    build: Callable[[], nn.Module]
    shape: tuple[int, ...]
    affine: bool

    @cached_property
    def data(self) -> tuple[nn.Module, Tensor, Tensor]:
        """A float64 model in eval mode, x (7, ...) and labels y (7,). Not to be changed; see ``model``."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(len(self.name))
            model = self.build().double().eval()
            for module in model.modules():
                if isinstance(module, nn.BatchNorm2d):
                    nn.init.normal_(module.running_mean, std=0.3)
                    nn.init.uniform_(module.running_var, 0.5, 2.0)
                    nn.init.normal_(module.weight)
                    nn.init.normal_(module.bias)
            x = 1.5 * torch.randn(7, *self.shape, dtype=torch.float64)
            y = torch.randint(0, 3, (7,))
        return model, x, y

    @property
    def model(self) -> nn.Module:
        return copy.deepcopy(self.data[0])

    def batches(self, batch_size: int = 3, *, labeled: bool = True) -> Batches:
        """Batches of 3, 3 and 1 by default: a mean over batches is not a mean over examples."""
        _, x, y = self.data
        return Batches.from_tensors(x, y if labeled else None, batch_size=batch_size)

    def logits_at(self, flat: Tensor) -> Tensor:
        """(7, C) logits at trainable parameters ``flat`` (P,)."""
        model, x, _ = self.data
        values, start = {}, 0
        for name, p in model.named_parameters():
            if p.requires_grad:
                values[name] = flat[start : start + p.numel()].view(p.shape)
                start += p.numel()
        with sdpa_kernel(SDPBackend.MATH):  # the only attention kernel with second derivatives
            return functional_call(model, values, (x,))

    @cached_property
    def theta(self) -> Tensor:
        """(P,) trainable parameters."""
        return torch.cat([p.detach().reshape(-1) for p in self.data[0].parameters() if p.requires_grad])

    @cached_property
    def fisher_terms(self) -> Tensor:
        """(7, P, P) each example's Fisher matrix."""
        jacobian = jacrev(self.logits_at)(self.theta)
        p = self.logits_at(self.theta).softmax(1).detach()
        inner = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
        return (jacobian.transpose(1, 2) @ inner @ jacobian).detach()

    @cached_property
    def hessian_terms(self) -> Tensor:
        """(7, P, P) the Hessian of each example's cross-entropy."""
        labels = self.data[2]

        def losses(flat: Tensor) -> Tensor:
            z = self.logits_at(flat)
            return torch.logsumexp(z, 1) - z[torch.arange(7), labels]

        # not torch.func.hessian: torch 2.14 is wrong on layer_norm there (pytorch issue 196700)
        second = [
            torch.autograd.functional.hessian(lambda v, n=n: losses(v)[n], self.theta) for n in range(7)
        ]
        return torch.stack(second)


CASES = [
    Case("relu-mlp", relu_mlp, (3,), True),
    Case("tanh-mlp", tanh_mlp, (3,), False),
    Case("layer-norm", layer_norm_mlp, (3,), False),
    Case("silu", silu_mlp, (3,), False),
    Case("softmax-regression", softmax_regression, (3,), True),
    Case("max-pool-cnn", max_pool_cnn, (1, 4, 4), True),
    Case("batch-norm-cnn", batch_norm_cnn, (1, 4, 4), True),
    Case("frozen", frozen_mlp, (3,), True),
    Case("unused", Unused, (3,), False),
    Case("tied", Tied, (3,), False),
]
BY_NAME = {case.name: case for case in CASES}
ATTENTION = Case("attention", Attention, (3, 4), False)


@pytest.fixture(params=CASES, ids=lambda case: case.name)
def case(request: pytest.FixtureRequest) -> Case:
    return request.param


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)
