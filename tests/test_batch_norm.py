"""Products through batch normalisation in eval mode against dense derivatives by reverse mode alone, in float64."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional
from torch.nn.utils import parameters_to_vector

from gm_probe.curvature.operators import fisher, hessian
from gm_probe.data.batches import Batches
from gm_probe.models.parameters import Parameters

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
from kernel_counts import counted

N = 5


def frozen(model: nn.Sequential, *names: str) -> nn.Sequential:
    for name in names:
        model.get_parameter(name).requires_grad_(False)
    return model


def images(*first: nn.Module) -> nn.Sequential:
    layers = [*first, nn.Conv2d(2, 3, 2), nn.BatchNorm2d(3, eps=0.1), nn.Tanh(), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(12, 3))


NETWORKS: dict[str, Callable[[], tuple[nn.Sequential, tuple[int, ...]]]] = {
    "images": lambda: (images(), (2, 3, 3)),
    "twice": lambda: (images(nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2), nn.Sigmoid()), (2, 3, 3)),
    "first of all": lambda: (images(nn.BatchNorm2d(2)), (2, 3, 3)),
    "first of all, its bias alone": lambda: (frozen(images(nn.BatchNorm2d(2)), "0.weight"), (2, 3, 3)),
    "frozen weight": lambda: (frozen(images(), "1.weight"), (2, 3, 3)),
    "frozen": lambda: (frozen(images(), "1.weight", "1.bias"), (2, 3, 3)),
    "behind frozen layers": lambda: (frozen(images(), "0.weight", "0.bias"), (2, 3, 3)),
    "without weights": lambda: (images(nn.BatchNorm2d(2, affine=False)), (2, 3, 3)),
    "vectors": lambda: (nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Tanh(), nn.Linear(3, 3)), (4,)),
    "rows": lambda: (
        nn.Sequential(nn.Conv1d(2, 3, 2), nn.BatchNorm1d(3), nn.GELU(), nn.Flatten(), nn.Linear(9, 3)),
        (2, 4),
    ),
}


def built(name: str) -> tuple[nn.Sequential, Tensor, Tensor]:
    torch.manual_seed(3)
    model, shape = NETWORKS[name]()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.2, 3)
            for p in module.parameters():
                nn.init.normal_(p)
    return model.double().eval(), torch.randn(N, *shape, dtype=torch.float64), torch.arange(N) % 3


@pytest.mark.parametrize("name", NETWORKS)
def test_products_are_those_of_the_dense_matrices(name: str) -> None:
    model, x, y = built(name)
    parameters = Parameters(model)
    theta = parameters_to_vector([p.detach() for p in model.parameters() if p.requires_grad])

    def logits(theta: Tensor) -> Tensor:
        return functional_call(model, parameters.split(theta), (x,))

    def loss(theta: Tensor) -> Tensor:
        return functional.cross_entropy(logits(theta), y)

    z = logits(theta).detach()
    p = z.softmax(1)
    jacobian = torch.autograd.functional.jacobian(logits, theta)
    middle = torch.diag_embed(p) - p[:, :, None] * p[:, None]
    f = torch.einsum("ncp,ncd,ndq->pq", jacobian, middle, jacobian) / N
    h = torch.autograd.functional.hessian(loss, theta)
    v = torch.randn(len(theta), dtype=torch.float64)
    batches = Batches.from_tensors(x, batch_size=2)
    torch.testing.assert_close(fisher(parameters, batches, z).matvec(v), f @ v, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(hessian(parameters, batches, y).matvec(v), h @ v, rtol=1e-9, atol=1e-12)


def test_they_take_few_kernels() -> None:
    """By torch's own forward mode a layer more takes 14 in F v and some 60 in H v."""
    kernels = []
    for layers in (1, 5):
        more = [layer for _ in range(layers) for layer in (nn.Linear(4, 4), nn.BatchNorm1d(4))]
        model = nn.Sequential(*more, nn.Linear(4, 3)).eval()
        parameters, x = Parameters(model), torch.randn(N, 4)
        batches, v = Batches.from_tensors(x, batch_size=N), torch.ones(parameters.size)
        operators = (
            fisher(parameters, batches, model(x).detach()),
            hessian(parameters, batches, torch.arange(N) % 3),
        )
        kernels.append([counted(partial(operator.matvec, v)).kernels for operator in operators])
    more_f, more_h = ((many - few) / 4 for few, many in zip(*kernels, strict=True))
    assert more_f <= 20
    assert more_h <= 35
