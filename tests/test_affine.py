"""Which networks are affine in each parameter tensor, against the diagonal of H − F as a dense matrix."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial

import pytest
import torch
import torchvision
from conftest import ATTENTION, CASES, Case
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.autograd.functional import hessian, jacobian
from torch.nn import functional
from torch.nn.utils import parametrizations

from gm_probe.curvature.affine import obstacle
from gm_probe.models.networks import WideResNet, cnn6, mlp
from gm_probe.models.parameters import Parameters

AFFINE_CASES = [case for case in CASES if case.affine]


def reason(model: nn.Module, x: Tensor) -> str | None:
    return obstacle(Parameters(model), x)


def curvature(model: nn.Module, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """H and F (P, P) as dense matrices."""
    parameters = Parameters(model)
    theta = parameters.join(parameters.values().values())

    def logits(flat: Tensor) -> Tensor:
        return parameters.logits(x, parameters.split(flat))

    slopes, p = jacobian(logits, theta), logits(theta).softmax(1)  # (N, C, P), (N, C)
    inner = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    fisher = (slopes.transpose(1, 2) @ inner @ slopes).mean(0)
    return hessian(lambda flat: functional.cross_entropy(logits(flat), y), theta), fisher


def diagonal_gap(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """max |diag(H − F)| / max |H|."""
    h, f = curvature(model, x, y)
    return float((h - f).diagonal().abs().max() / h.abs().max())


class Net(nn.Module):
    """``layers`` put together by a function of them and x."""

    def __init__(self, forward: Callable[[nn.ModuleList, Tensor], Tensor], *layers: nn.Module) -> None:
        super().__init__()
        self.layers, self.function = nn.ModuleList(layers), forward

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.layers, x)


class Straight(torch.autograd.Function):
    """Sign, whose backward pretends to be that of the identity."""

    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return x.sign()

    @staticmethod
    def backward(ctx: object, slope: Tensor) -> Tensor:
        return slope


# the measured networks


@pytest.mark.parametrize("case", [*CASES, ATTENTION], ids=lambda case: case.name)
@pytest.mark.parametrize("size", [1, 3])
def test_verdict_is_that_of_the_cases(case: Case, size: int) -> None:
    x = next(iter(case.batches(size))).x
    assert (reason(case.model, x) is None) == case.affine


@pytest.mark.parametrize("case", AFFINE_CASES, ids=lambda case: case.name)
def test_affine_cases_have_a_residual_without_diagonal(case: Case) -> None:
    h, f = case.hessian_terms.mean(0), case.fisher_terms.mean(0)
    residual = h - f
    assert residual.diagonal().abs().max() <= 1e-14 * h.abs().max()
    assert float(h.trace()) == pytest.approx(float(f.trace()), rel=1e-12)
    # one layer alone has no residual at all
    assert (residual.abs().max() > 1e-2 * h.abs().max()) == (case.name != "softmax-regression")


def test_other_cases_have_a_diagonal(case: Case) -> None:
    residual = case.hessian_terms.mean(0) - case.fisher_terms.mean(0)
    assert (residual.diagonal().abs().max() > 1e-4) == (not case.affine)


# networks in use: their builder, the side of the image, and whether they are affine

tv = torchvision.models
NETWORKS: dict[str, tuple[Callable[[], nn.Module], int, bool]] = {
    "resnet": (partial(tv.ResNet, tv.resnet.BasicBlock, [1, 1, 1, 1]), 32, True),
    "mobilenet_v2": (partial(tv.MobileNetV2, 10, 0.25, [[1, 16, 1, 1], [6, 24, 2, 2]]), 32, True),
    "mobilenet_v3_small": (partial(tv.mobilenet_v3_small, width_mult=0.25), 32, False),
    "vit": (partial(tv.VisionTransformer, 32, 16, 1, 2, 8, 8), 32, False),
    "convnext": (partial(tv.ConvNeXt, [tv.convnext.CNBlockConfig(8, None, 2)]), 32, False),
    "efficientnet": (tv.efficientnet_b0, 32, False),
    "6cnn": (partial(cnn6, 3, 16, 16, 10), 16, True),
    "mlp": (partial(mlp, 3 * 8 * 8, (8, 8), 10), 8, True),
    "wrn": (partial(WideResNet, 3, 10, 1, 1), 16, True),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_networks_in_use(name: str) -> None:
    build, side, affine = NETWORKS[name]
    torch.manual_seed(0)
    x = torch.randn(2, 3, side, side).to(memory_format=torch.channels_last)
    model = build().eval()
    with torch.no_grad():  # a ViT's head is all 0 at first, and nothing below it moves the logits
        for p in model.parameters():
            p.add_(0.01 * torch.randn_like(p))
    assert (reason(model, x) is None) == affine


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("size", [1, 5])
def test_dtypes_layouts_and_batch_sizes(
    dtype: torch.dtype, memory_format: torch.memory_format, size: int
) -> None:
    torch.manual_seed(0)
    x = torch.randn(size, 3, 8, 8, dtype=dtype).to(memory_format=memory_format)
    assert reason(WideResNet(3, 4, 1, 1).to(dtype), x) is None
    curved = nn.Sequential(nn.Conv2d(3, 2, 8), nn.GELU(), nn.Flatten()).to(dtype)
    assert reason(curved, x) == "the logits are not affine in parameter '0.weight'"


def test_examples_that_differ_are_tried(generator: torch.Generator) -> None:
    """A network that is curved on one example of sixteen."""
    model = nn.Sequential(linear(), nn.ELU(), linear())
    with torch.no_grad():
        model[0].bias.fill_(50)
    x = torch.randn(16, 4, generator=generator)
    assert reason(model, x) is None
    weight = model[0].weight[0].detach()
    x[15] = -52 * weight / weight.square().sum()
    assert reason(model, x) == "the logits are not affine in parameter '0.weight'"


# single layers and their combinations, on x (5, 4) unless it is told otherwise


def parallel(layers: nn.ModuleList, x: Tensor) -> Tensor:
    return layers[0](x) + layers[0](-x).relu()


def in_place_through_a_view(layers: nn.ModuleList, x: Tensor) -> Tensor:
    x = layers[0](x)
    x[:, :2].mul_(2)
    x[x < -0.5] = 0.1
    return layers[1](x)


def in_place_product(layers: nn.ModuleList, x: Tensor) -> Tensor:
    x = layers[0](x)
    x[:, 0] *= x[:, 1]
    return x


def multiplied(layers: nn.ModuleList, x: Tensor) -> Tensor:
    x = layers[0](x)
    with warnings.catch_warnings(action="ignore"):  # deprecated, and in use
        return x.scatter(1, torch.zeros(len(x), 1, dtype=torch.int64), x[:, 1:2], reduce="multiply")


def masked(layers: nn.ModuleList, x: Tensor) -> Tensor:
    x = layers[0](x)
    return layers[1](torch.where(functional.gelu(x) > 0, x, 0.1 * x) + x.argmax(1, keepdim=True))


def ranked(layers: nn.ModuleList, x: Tensor) -> Tensor:
    x = layers[0](x)
    return torch.cat([x.sort(1).values, torch.maximum(x, -x), x.topk(2).values, x.amin(1, keepdim=True)], 1)


def image(*layers: nn.Module, size: int = 8) -> nn.Module:
    """On x as images of 1×2×2 pixels, of which ``layers`` make ``size`` features."""
    return nn.Sequential(nn.Unflatten(1, (1, 2, 2)), *layers, nn.Flatten(), linear(size))


def linear(inputs: int = 4, outputs: int = 4) -> nn.Linear:
    return nn.Linear(inputs, outputs)


def tied() -> nn.Module:
    model = nn.Sequential(linear(), nn.ReLU(), linear())
    model[2].weight = model[0].weight
    return model


def frozen_block(*layers: nn.Module) -> nn.Module:
    return nn.Sequential(*layers).requires_grad_(False)


AFFINE: dict[str, Callable[[], nn.Module]] = {
    "shared by parallel branches": lambda: Net(parallel, linear()),
    "in place through a view": lambda: Net(in_place_through_a_view, linear(), linear()),
    "masks and indices": lambda: Net(masked, linear(), linear()),
    "steps": lambda: Net(lambda layers, x: layers[0](x) * layers[0](x).sign(), linear()),
    "order statistics": lambda: Net(ranked, linear()),
    "PReLU": lambda: nn.Sequential(linear(), nn.PReLU(4), linear()),
    "piecewise linear": lambda: nn.Sequential(
        linear(),
        nn.LeakyReLU(),
        linear(),
        nn.ReLU6(),
        linear(),
        nn.Softshrink(0.1),
    ),
    "pools and pads": lambda: image(
        nn.ReflectionPad2d(1),
        nn.Conv2d(1, 2, 3, padding=1),
        nn.AvgPool2d(2),
        nn.Upsample(scale_factor=2),
        nn.ReLU(),
        size=32,
    ),
    "maximum over channels": lambda: nn.Sequential(
        linear(4, 6), nn.Unflatten(1, (3, 2)), nn.AdaptiveMaxPool1d(1), nn.Flatten()
    ),
    "transposed convolution": lambda: image(nn.ConvTranspose2d(1, 2, 2), nn.ReLU(), size=18),
    "two layers' product": lambda: Net(lambda layers, x: layers[0](x) * layers[1](x), linear(), linear()),
    "bilinear": lambda: Net(lambda layers, x: layers[0](x, x), nn.Bilinear(4, 4, 3)),
    "einsum": lambda: Net(lambda layers, x: torch.einsum("bi,oi->bo", x, layers[0].weight), linear()),
    "frozen GELU": lambda: nn.Sequential(frozen_block(linear(), nn.GELU()), linear()),
    "frozen attention": lambda: nn.Sequential(
        nn.Unflatten(1, (1, 4)), frozen_block(nn.TransformerEncoderLayer(4, 2, 4)), nn.Flatten(), linear()
    ),
    "layer norm of the input": lambda: nn.Sequential(nn.LayerNorm(4), linear()),
    "dropout in eval mode": lambda: nn.Sequential(linear(), nn.Dropout(), nn.ReLU(inplace=True), linear()),
    "absolute value of complex numbers": lambda: Net(
        lambda layers, x: (layers[0](x) * (1 + 1j)).abs(), linear()
    ),
    "rows by a mask": lambda: Net(lambda layers, x: layers[0](x)[x[:, 0] > -9], linear()),
    "a path chosen by the data": lambda: Net(
        lambda layers, x: layers[0](x) if float(x.max()) < 99 else x, linear()
    ),
    "running statistics of instances": lambda: image(
        nn.Conv2d(1, 2, 1), nn.InstanceNorm2d(2, track_running_stats=True)
    ),
}


@pytest.mark.parametrize("name", AFFINE)
def test_affine_networks(name: str) -> None:
    torch.manual_seed(0)
    model, x, y = AFFINE[name]().double().eval(), torch.randn(5, 4).double(), torch.randint(0, 3, (5,))
    assert reason(model, x) is None
    assert diagonal_gap(model, x, y) <= 1e-12


CURVED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    # by name the parameter that is met first
    "functional GELU": (
        lambda: Net(lambda layers, x: layers[1](functional.gelu(layers[0](x))), linear(), linear()),
        "layers.0.weight",
    ),
    "the last of two": (lambda: nn.Sequential(linear(), nn.ReLU(), linear(), nn.Tanh()), "0.weight"),
    "tied in sequence": (
        lambda: Net(lambda layers, x: layers[0](layers[0](x).relu()), linear()),
        "layers.0.weight",
    ),
    "tied by assignment": (tied, "0.weight"),
    "square": (lambda: Net(lambda layers, x: layers[0](x) ** 2, linear()), "layers.0.weight"),
    "times itself": (
        lambda: Net(lambda layers, x: layers[0](x) * layers[0](-x), linear()),
        "layers.0.weight",
    ),
    "quotient": (
        lambda: Net(lambda layers, x: x / layers[0](x).abs().clamp(min=0.1), linear()),
        "layers.0.weight",
    ),
    "weight norm": (lambda: parametrizations.weight_norm(linear()), "parametrizations.weight.original1"),
    "spectral norm": (lambda: parametrizations.spectral_norm(linear()), "parametrizations.weight.original"),
    "batch statistics": (
        lambda: nn.Sequential(linear(), nn.BatchNorm1d(4, track_running_stats=False)),
        "0.weight",
    ),
    "instance norm": (lambda: image(nn.Conv2d(1, 2, 1), nn.InstanceNorm2d(2)), "1.weight"),
    "layer norm": (lambda: nn.Sequential(linear(), nn.LayerNorm(4)), "0.weight"),
    "group norm": (lambda: nn.Sequential(linear(), nn.GroupNorm(2, 4)), "0.weight"),
    "recurrent": (
        lambda: Net(
            lambda layers, x: layers[0](x[:, None].expand(-1, 2, -1))[0][:, 1],
            nn.RNN(4, 3, nonlinearity="relu"),
        ),
        "layers.0.weight_hh_l0",
    ),
}


@pytest.mark.parametrize("name", CURVED)
def test_reason_names_the_parameter(name: str) -> None:
    torch.manual_seed(0)
    build, parameter = CURVED[name]
    model, x, y = build().double().eval(), torch.randn(5, 4).double(), torch.randint(0, 3, (5,))
    assert reason(model, x) == f"the logits are not affine in parameter {parameter!r}"
    assert diagonal_gap(model, x, y) > 1e-6


UNTRIED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "times itself, hidden from autograd": (
        lambda: Net(lambda layers, x: layers[0](x) * layers[0](x).detach(), linear()),
        "autograd does not see every path from parameter 'layers.0.weight'",
    ),
    "straight-through": (
        lambda: Net(lambda layers, x: (z := layers[0](x)) + (z.sign() - z).detach(), linear()),
        "autograd does not see every path from parameter 'layers.0.weight'",
    ),
    "its own derivatives": (
        lambda: Net(lambda layers, x: Straight.apply(layers[0](x)), linear()),
        "the autograd function Straight defines its own derivatives",
    ),
    "in place what the gradient needs": (
        lambda: Net(in_place_product, linear()),
        "second derivatives cannot be tested (one of the variables needed for gradient computation",
    ),
    "without a second derivative": (
        lambda: Net(multiplied, linear()),
        "second derivatives cannot be tested (derivative for aten::scatter is not implemented",
    ),
    "not logits": (
        lambda: Net(lambda layers, x: layers[0](x)[0], linear()),
        "second derivatives cannot be tested (the model returned one number per example, (4,)",
    ),
    "failing": (
        lambda: Net(lambda layers, x: layers[0](x) * (1 // 0), linear()),
        "second derivatives cannot be tested (integer division or modulo by zero)",
    ),
}


@pytest.mark.parametrize("name", UNTRIED)
def test_reason_says_what_failed(name: str) -> None:
    torch.manual_seed(0)
    build, beginning = UNTRIED[name]
    found = reason(build(), torch.randn(5, 4))
    assert found is not None
    assert found.startswith(beginning)


def test_affine_without_a_second_derivative_in_torch() -> None:
    model = nn.Sequential(linear(), nn.Hardsigmoid(), linear())
    assert reason(model, torch.ones(2, 4)) is None
    with pytest.raises(RuntimeError, match="derivative for aten::hardsigmoid_backward is not implemented"):
        curvature(model, torch.ones(2, 4), torch.zeros(2, dtype=torch.long))


def test_integer_inputs() -> None:
    torch.manual_seed(0)
    x, y = torch.randint(0, 6, (5, 4)), torch.randint(0, 3, (5,))
    model = Net(lambda layers, x: layers[1](layers[0](x).mean(1).relu()), nn.Embedding(6, 3), linear(3, 3))
    model.double()
    assert reason(model, x) is None
    assert diagonal_gap(model, x, y) <= 1e-12
    assert reason(nn.Sequential(nn.EmbeddingBag(6, 3, mode="max"), nn.Linear(3, 3)), x) is None


# the model stays as it was


class Writer(nn.Module):
    """Writes to its weights, a buffer, its mode and the random generator in every pass."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(6, 4, max_norm=0.1).requires_grad_(False)
        self.norm, self.head = nn.BatchNorm1d(4), nn.Linear(4, 3)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        features = self.norm(self.table(x).mean(1))
        self.head.train()
        torch.rand(())
        return self.head(features)


@pytest.mark.parametrize("fails", [False, True])
def test_model_is_left_as_it_was(fails: bool) -> None:
    torch.manual_seed(0)
    model, x = Writer(), torch.randint(0, 6, (5, 2))
    model.norm.eval()
    seen: list[nn.Module] = []

    def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        seen.append(module)
        if fails:
            raise RuntimeError("stop here")

    model.head.register_forward_pre_hook(hook)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    pointers = {name: p.data_ptr() for name, p in model.named_parameters()}
    generator = torch.get_rng_state()

    found = reason(model, x)

    assert found == ("second derivatives cannot be tested (stop here)" if fails else None)
    assert seen
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert pointers == {name: p.data_ptr() for name, p in model.named_parameters()}
    assert [p.requires_grad for p in model.parameters()] == [False, True, True, True, True]
    assert all(p.grad is None for p in model.parameters())
    assert [module.training for module in model.modules()] == [True, True, False, True]
    assert len(model.head._forward_pre_hooks) == 1
    assert torch.equal(torch.get_rng_state(), generator)


def test_train_mode_is_judged_as_eval_mode() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(), nn.Linear(4, 2)).train()
    assert reason(model, torch.ones(2, 3)) is None
    assert all(module.training for module in model.modules())


# random networks


class Branches(nn.Module):
    def __init__(self, combine: Callable[[Tensor, Tensor], Tensor], one: nn.Module, other: nn.Module) -> None:
        super().__init__()
        self.combine, self.one, self.other = combine, one, other

    def forward(self, x: Tensor) -> Tensor:
        return self.combine(self.one(x), self.other(x))


def same(layer: nn.Module, combine: Callable[[nn.Module, Tensor], Tensor]) -> nn.Module:
    return Net(lambda layers, x: combine(layers[0], x), layer)


def batch_norm() -> nn.Module:
    norm = nn.BatchNorm1d(4)
    for values in (norm.weight, norm.bias, norm.running_mean):
        nn.init.normal_(values)
    nn.init.uniform_(norm.running_var, 0.5, 2)
    return norm


def convolution() -> nn.Module:
    return nn.Sequential(
        nn.Unflatten(1, (1, 4)), nn.Conv1d(1, 2, 3, padding=1), nn.MaxPool1d(2), nn.Flatten()
    )


PIECEWISE: list[Callable[[], nn.Module]] = [
    linear,
    nn.ReLU,
    nn.LeakyReLU,
    nn.PReLU,
    nn.Hardtanh,
    nn.Dropout,
    batch_norm,
    convolution,
    lambda: Branches(torch.add, nn.Identity(), nn.Sequential(linear(), nn.ReLU())),
    lambda: Branches(torch.maximum, linear(), linear()),
    lambda: same(linear(), lambda layer, x: layer(x) - layer(x.roll(1, 1)).abs()),
]
ANY: list[Callable[[], nn.Module]] = [
    *PIECEWISE,
    nn.Tanh,
    nn.GELU,
    nn.Hardswish,
    nn.Softplus,
    partial(nn.LayerNorm, 4),
    partial(nn.Softmax, 1),
    partial(nn.BatchNorm1d, 4, track_running_stats=False),
    lambda: Branches(torch.mul, linear(), linear()),
    lambda: Branches(torch.mul, nn.Identity(), nn.Sequential(linear(), nn.Sigmoid())),
    lambda: same(linear(), lambda layer, x: layer(layer(x).relu())),
    lambda: same(nn.PReLU(), lambda layer, x: layer(layer(x))),
    lambda: parametrizations.weight_norm(linear()),
    lambda: linear().requires_grad_(False),
]


def random_network(layers: list[Callable[[], nn.Module]], seed: int) -> tuple[nn.Module, Tensor, Tensor]:
    """A float64 network in eval mode, x (4, 4) and labels (4,)."""
    torch.manual_seed(seed)
    model = nn.Sequential(*[build() for build in layers], nn.Linear(4, 3)).double().eval()
    return model, torch.randn(4, 4, dtype=torch.float64), torch.randint(0, 3, (4,))


@settings(derandomize=True, deadline=None, max_examples=40)
@given(st.lists(st.sampled_from(ANY), min_size=1, max_size=4), st.integers(0, 2**31))
def test_affine_means_no_diagonal(layers: list[Callable[[], nn.Module]], seed: int) -> None:
    model, x, y = random_network(layers, seed)
    if reason(model, x) is None:
        assert diagonal_gap(model, x, y) <= 1e-10


@settings(derandomize=True, deadline=None, max_examples=20)
@given(st.lists(st.sampled_from(PIECEWISE), min_size=1, max_size=4), st.integers(0, 2**31))
def test_piecewise_linear_layers_make_affine_networks(
    layers: list[Callable[[], nn.Module]], seed: int
) -> None:
    model, x, y = random_network(layers, seed)
    assert reason(model, x) is None
    assert diagonal_gap(model, x, y) <= 1e-10
