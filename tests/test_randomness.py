"""What draws at random draws the same in a perturbed pass, and the caller's generators go on as after the clean one."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import gm_probe
from gm_probe.runtime.randomness import generators_kept
from gm_probe.training.methods import METHODS

HIDDEN = np.random.default_rng(0)
"""A generator that no module holds."""


class Drawing(nn.Module):
    """Multiplies each unit by 0 or 2, as ``draw`` (n,) ↦ uniform numbers says."""

    def __init__(self, draw: Callable[[Drawing, int], Any]) -> None:
        super().__init__()
        self.draw = draw
        self.torchs = torch.Generator().manual_seed(1)
        self.numpys, self.old = np.random.default_rng(1), np.random.RandomState(1)
        self.pythons = random.Random(1)
        self.system = random.SystemRandom()  # has no state

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        numbers = torch.as_tensor(self.draw(self, x.shape[1]), dtype=x.dtype)
        return x * 2 * (numbers > 0.5)


def drop_path() -> nn.Module:
    pytest.importorskip("timm")
    from timm.layers import DropPath

    return DropPath(0.5)


def stochastic_depth() -> nn.Module:
    from torchvision.ops import StochasticDepth

    return StochasticDepth(0.5, "row")


LAYERS: dict[str, Callable[[], nn.Module]] = {
    "dropout": lambda: nn.Dropout(0.5),
    "rrelu": lambda: nn.RReLU(0.1, 0.9),
    "drop path": drop_path,
    "stochastic depth": stochastic_depth,
    "random": lambda: Drawing(lambda _, n: [random.random() for _ in range(n)]),
    "numpy": lambda: Drawing(lambda _, n: np.random.rand(n)),
    "torch": lambda: Drawing(lambda _, n: torch.rand(n)),
    "own torch": lambda: Drawing(lambda module, n: torch.rand(n, generator=module.torchs)),
    "own numpy": lambda: Drawing(lambda module, n: module.numpys.random(n)),
    "own RandomState": lambda: Drawing(lambda module, n: module.old.rand(n)),
    "own Random": lambda: Drawing(lambda module, n: [module.pythons.random() for _ in range(n)]),
}


def network(name: str) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(6, 40), LAYERS[name](), nn.Linear(40, 3)).train()


def data() -> tuple[Tensor, Tensor]:
    return torch.randn(16, 6, generator=torch.Generator().manual_seed(0)), torch.arange(16) % 3


@pytest.fixture(autouse=True)
def seeds() -> Any:
    with generators_kept():
        random.seed(0)
        np.random.seed(0)
        torch.manual_seed(0)
        yield


@pytest.mark.parametrize("rule", ["iam-d", "iam-d-onepass"])
@pytest.mark.parametrize("name", LAYERS)
def test_the_divergence_tends_to_zero(name: str, rule: str) -> None:
    built = METHODS[rule](network(name), rho=1e-6)
    for _ in range(3):
        assert float(built.backward(*data()).inconsistency) < 1e-9


@pytest.mark.parametrize("name", LAYERS)
def test_sam_without_a_radius_is_backpropagation(name: str) -> None:
    found = []
    for method in ("sgd", "sam"):
        random.seed(0)
        np.random.seed(0)
        torch.manual_seed(0)
        model = network(name)
        METHODS[method](model, **({} if method == "sgd" else {"rho": 0.0})).backward(*data())
        found.append(torch.cat([p.grad.reshape(-1) for p in model.parameters()]))
    torch.testing.assert_close(found[0], found[1])


def drawn(model: nn.Module) -> list[float]:
    """The next number of every generator."""
    layer = model[1]
    numbers = [random.random(), float(np.random.rand()), float(torch.rand(()))]
    if isinstance(layer, Drawing):
        numbers += [layer.pythons.random(), float(layer.numpys.random()), float(layer.old.rand())]
        numbers.append(float(torch.rand((), generator=layer.torchs)))
    return numbers


@pytest.mark.parametrize("rule", [name for name in METHODS if name != "sgd"])
@pytest.mark.parametrize("name", LAYERS)
def test_generators_go_on_as_after_the_clean_pass(name: str, rule: str) -> None:
    found = []
    for method in ("sgd", rule):
        random.seed(0)
        np.random.seed(0)
        torch.manual_seed(0)
        model = network(name)
        METHODS[method](model).backward(*data())
        found.append(drawn(model))
    assert found[0] == found[1]


def test_a_generator_out_of_reach_is_told() -> None:
    model = network("numpy")
    model[1].draw = lambda _, n: HIDDEN.random(n)
    with pytest.raises(gm_probe.UsageError, match="draws from a generator that is not replayed"):
        gm_probe.SAM(model).backward(*data())


def test_measuring_leaves_all_generators_alone() -> None:
    class Wasteful(Drawing):
        def forward(self, x: Tensor) -> Tensor:
            random.random(), np.random.rand(), torch.rand(()), self.numpys.random(), self.pythons.random()
            self.old.rand(), torch.rand((), generator=self.torchs)
            return x

    with torch.random.fork_rng(devices=[]):
        model = nn.Sequential(nn.Linear(6, 5), Wasteful(lambda _, n: n), nn.Linear(5, 3))
    before = drawn(model)
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    model[1] = Wasteful(lambda _, n: n)
    gm_probe.measure(
        model, gm_probe.Batches.from_tensors(*data()), ["local_inconsistency", "hessian_lambda_max"]
    )
    assert drawn(model) == before
