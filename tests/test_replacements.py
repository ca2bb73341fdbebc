"""Layers whose second derivative torch misstates or lacks, against reverse mode over reverse mode."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.functional import vhp
from torch.func import jvp
from torch.nn import functional

from gm_probe.curvature import operators  # noqa: F401  quiets what torch warns of at its first jvp
from gm_probe.curvature.replacements import NESTABLE, Substituting

LAYERS: dict[str, Callable[[Tensor], Tensor]] = {
    "layer_norm": partial(functional.layer_norm, normalized_shape=(6,)),
    "layer_norm of a module": nn.LayerNorm(6).double().requires_grad_(False),
    "layer_norm over two axes": nn.LayerNorm((4, 6), eps=0.3).double().requires_grad_(False),
    "layer_norm without bias": nn.LayerNorm(6, bias=False).double().requires_grad_(False),
    "layer_norm scaled by its input": lambda x: functional.layer_norm(x, (6,), x[0, 0], x[0, 1]),
    "layer_norm of torch itself": lambda x: torch.layer_norm(x, [6], x[0, 0], x[0, 1], 1e-3, False),
    "glu": nn.GLU(),
    "glu by rows": nn.GLU(dim=1),
}


def input_and_direction() -> tuple[Tensor, Tensor]:
    x, v = torch.randn(2, 3, 4, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return x, v


def scalar(layer: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    result = layer(x).flatten()
    return (result @ torch.linspace(-1, 2, len(result), dtype=x.dtype)).sin()


def curvature(layer: Callable[[Tensor], Tensor]) -> float:
    """d²/dt² of the scalar at x + t v, by forward mode over forward mode."""
    x, v = input_and_direction()

    def slope(x: Tensor) -> Tensor:
        return jvp(partial(scalar, layer), (x,), (v,))[1]

    return float(jvp(slope, (x,), (v,))[1])


def by_reverse_mode(layer: Callable[[Tensor], Tensor]) -> float:
    x, v = input_and_direction()
    return float((vhp(partial(scalar, layer), x, v)[1] * v).sum())


@pytest.mark.parametrize("name", LAYERS)
def test_nested_forward_mode_is_reverse_mode(name: str) -> None:
    layer, (x, _) = LAYERS[name], input_and_direction()
    expected, value = by_reverse_mode(layer), float(scalar(layer, x))
    assert abs(expected) > 1e-3
    with Substituting(NESTABLE):
        assert float(scalar(layer, x)) == pytest.approx(value, rel=1e-12)
        assert curvature(layer) == pytest.approx(expected, rel=1e-9)


@pytest.mark.skipif(not torch.__version__.startswith("2.14."), reason="another torch may do without")
@pytest.mark.parametrize("name", LAYERS)
def test_torch_alone_misstates_or_refuses_it(name: str) -> None:
    with suppress(NotImplementedError):
        assert curvature(LAYERS[name]) != pytest.approx(by_reverse_mode(LAYERS[name]), rel=1e-3)


def test_statistics_are_of_float32_under_autocast(generator: torch.Generator) -> None:
    x = (30 + torch.randn(50, 64, generator=generator)).bfloat16()
    exact = functional.layer_norm(x.double(), (64,))
    with Substituting(NESTABLE):
        found = functional.layer_norm(x, (64,))
    assert float((found - exact).abs().max()) < 1e-2


def test_hardsigmoid_has_a_second_derivative() -> None:
    """The slope 1/6 between the kinks at ±3, of which torch's own backward pass has no derivative."""
    x = torch.tensor([-4.0, -1.0, 2.0, 5.0], dtype=torch.float64, requires_grad=True)
    with Substituting(NESTABLE):
        y = functional.hardsigmoid(x)
    [slope] = torch.autograd.grad(y.sum(), x, create_graph=True)
    assert torch.allclose(y, functional.hardsigmoid(x))
    assert torch.allclose(slope, torch.tensor([0, 1, 1, 0], dtype=torch.float64) / 6)
    assert not bool(torch.autograd.grad(slope.sum(), x)[0].any())


def test_every_substitute_is_tried() -> None:
    named = {name.split()[0] for name in LAYERS} | {"hardsigmoid"}
    assert named == {function.__name__ for function in NESTABLE}
