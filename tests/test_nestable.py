"""Layers whose nested forward-mode derivative torch misstates or lacks, against reverse mode over reverse mode."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.functional import vhp
from torch.func import jvp
from torch.nn import functional

from gm_probe.probe import operators  # noqa: F401  quiets what torch warns of at its first jvp
from gm_probe.probe.nestable import _SUBSTITUTES, Nestable

LAYERS: dict[str, Callable[[Tensor], Tensor]] = {
    "layer_norm": partial(functional.layer_norm, normalized_shape=(6,)),
    "layer_norm of a module": nn.LayerNorm(6).double().requires_grad_(False),
    "layer_norm over two axes": nn.LayerNorm((4, 6), eps=0.3).double().requires_grad_(False),
    "layer_norm without bias": nn.LayerNorm(6, bias=False).double().requires_grad_(False),
    "layer_norm scaled by its input": lambda x: functional.layer_norm(x, (6,), x[0, 0], x[0, 1]),
    "silu": nn.SiLU(),
    "silu in place": lambda x: nn.SiLU(inplace=True)(x * 1),
    "mish": nn.Mish(),
    "mish in place": lambda x: nn.Mish(inplace=True)(x * 1),
    "glu": nn.GLU(),
    "glu by rows": nn.GLU(dim=1),
}


@pytest.mark.parametrize("name", LAYERS)
def test_nested_forward_mode_is_reverse_mode(name: str, generator: torch.Generator) -> None:
    layer = LAYERS[name]
    x, v = torch.randn(2, 3, 4, 6, generator=generator, dtype=torch.float64).unbind(0)

    def scalar(x: Tensor) -> Tensor:
        return (layer(x) * torch.linspace(-1, 2, layer(x).numel()).view_as(layer(x))).sum().sin()

    def slope(x: Tensor) -> Tensor:
        return jvp(scalar, (x,), (v,))[1]

    with Nestable():
        value, curvature = scalar(x), jvp(slope, (x,), (v,))[1]
    expected = (vhp(scalar, x, v)[1] * v).sum()
    assert float(value.detach()) == pytest.approx(float(scalar(x).detach()), rel=1e-12)
    assert abs(float(expected)) > 1e-3
    assert float(curvature) == pytest.approx(float(expected), rel=1e-9)


def test_every_substitute_is_tried() -> None:
    named = {name.split()[0] for name in LAYERS}
    assert named == {function.__name__ for function in _SUBSTITUTES}
