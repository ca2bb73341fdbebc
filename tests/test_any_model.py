"""Somebody's model is measured right, against dense matrices of the plain network in float64, or refused by name.

The kinds are the rows of docs/models.md: each stands there, and each row is tried here.
"""

import copy
import random
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import seeded
from networks import Recomputes
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional
from torch.nn.utils import parametrizations, parametrize
from torch.optim.swa_utils import AveragedModel
from torch.utils.checkpoint import checkpoint

from gm_probe.data.batches import Batches
from gm_probe.errors import ProbeError, UsageError
from gm_probe.inconsistency.ascent import kl_gradient, to_sphere
from gm_probe.measures.measure import measure
from gm_probe.measures.settings import Settings
from gm_probe.models.door import Outputs
from gm_probe.models.parameters import Parameters
from gm_probe.training.methods import METHODS

PAGE = Path(__file__).parents[1] / "docs" / "models.md"
N, D, C = 14, 5, 3


def vectors() -> Tensor:
    return torch.randn(N, D, generator=seeded(1))


def images() -> Tensor:
    return torch.randn(N, 2, 6, 6, generator=seeded(1))


def tokens() -> Tensor:
    return torch.randint(0, 9, (N, 4), generator=seeded(1))


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(D, 6), nn.Tanh(), nn.Linear(6, C))


class Wrapped(nn.Module):
    """A network whose outputs z for x ``after(z, x)`` changes."""

    def __init__(self, net: nn.Module, after: Callable[..., Any] = lambda z, _: z) -> None:
        super().__init__()
        self.net, self.after = net, after

    def forward(self, x: Tensor) -> Any:
        return self.after(self.net(x), x)


class Autocast(nn.Module):
    """Computes in bfloat16 and returns float32."""

    def __init__(self) -> None:
        super().__init__()
        self.net = mlp()

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return self.net(x).float()


class Cnn(nn.Module):
    def __init__(self, *, view: bool = False) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3)
        self.head, self.view = nn.Linear(48, C), view

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.norm(self.conv(x)))
        return self.head(x.view(x.size(0), -1) if self.view else x.flatten(1))


class Recomputed(nn.Module):
    """Activation checkpointing, as ``reentrant`` says; None without."""

    def __init__(self, reentrant: bool | None) -> None:
        super().__init__()
        self.stem, self.block = nn.Linear(D, 6), nn.Sequential(nn.Linear(6, 6), nn.Tanh())
        self.head, self.reentrant = nn.Linear(6, C), reentrant

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.stem(x))
        if self.reentrant is None:
            return self.head(self.block(x))
        return self.head(checkpoint(self.block, x, use_reentrant=self.reentrant))


class RecomputedByHand(Recomputed):
    def __init__(self) -> None:
        super().__init__(None)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(Recomputes.apply(self.block, torch.tanh(self.stem(x)), *self.block.parameters()))


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.RNNBase] = nn.GRU) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(9, 3), nn.Linear(4, C)
        self.rnn = kind(3, 4, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(self.embedding(x))[0][:, -1])


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(9, 4)
        self.layer = nn.TransformerEncoderLayer(4, 2, 6, dropout=0.2, batch_first=True)
        self.head = nn.Linear(4, C)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(self.embedding(x)).mean(1))


class Bag(nn.Module):
    def __init__(self, *, sparse: bool) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(9, 4, sparse=sparse), nn.Linear(4, C)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.embedding(x).mean(1)))


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.decoder = nn.Embedding(9, 4), nn.Linear(4, 9, bias=False)
        self.decoder.weight = self.embedding.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.decoder(torch.tanh(self.embedding(x).mean(1)))


class ByName(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = mlp()

    def forward(self, input_values: Tensor, mask: Tensor) -> Any:
        return SimpleNamespace(logits=self.net(input_values * mask))


class Noisy(nn.Module):
    """Draws from Python's, NumPy's or torch's generator in train mode."""

    def __init__(self, draw: Callable[[], float], *, always: bool = False) -> None:
        super().__init__()
        self.net, self.draw, self.always = mlp(), draw, always

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x * (1 + self.draw())) if self.training or self.always else self.net(x)


class Complex(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(D, C, dtype=torch.complex64))

    def forward(self, x: Tensor) -> Tensor:
        return (x.to(self.weight.dtype) @ self.weight).abs()


class LeanSine(torch.autograd.Function):
    """Its backward pass keeps the slope, so that the second derivative lacks a term."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.slope = 3 * torch.cos(3 * x)
        return torch.sin(3 * x)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g * ctx.slope


class Kept(nn.Module):
    """In eval mode its first weight is computed once, as LeViT's attention biases are."""

    def __init__(self, *, keeps: bool) -> None:
        super().__init__()
        self.stem, self.head, self.keeps = nn.Linear(D, 6), nn.Linear(6, C), keeps
        self.cache: dict[str, Tensor] = {}

    def forward(self, x: Tensor) -> Tensor:
        if self.training or not self.keeps:
            weight = 2 * self.stem.weight
        else:
            weight = self.cache.setdefault("cpu", 2 * self.stem.weight)
        return self.head(torch.tanh(functional.linear(x, weight, self.stem.bias)))


class Listed(nn.Module):
    """Forward reaches a weight by a list of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(D, 6), nn.Linear(6, C)
        self.weights = [self.stem.weight]

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(functional.linear(x, self.weights[0])))


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.experts = nn.Linear(D, 3), nn.ModuleList(nn.Linear(D, C) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        share = self.gate(x).softmax(1)
        chosen = functional.one_hot(share.argmax(1), 3)
        outputs = torch.stack([expert(x) for expert in self.experts], 1)
        return (outputs * (share * chosen)[..., None]).sum(1)


class Slope(nn.Module):
    """Its logits are a derivative by the input."""

    def __init__(self) -> None:
        super().__init__()
        self.net = mlp()

    def forward(self, x: Tensor) -> Tensor:
        return torch.func.jvp(self.net, (x,), (torch.ones_like(x),))[1]


class Marked(Tensor):
    """A tensor subclass of somebody's."""


def with_nothing() -> nn.Module:
    net = mlp()
    net.register_parameter("nothing", nn.Parameter(torch.zeros(0, 3)))
    return net


def frozen() -> nn.Module:
    net = mlp()
    net[0].requires_grad_(False)
    return net


def half_precision() -> nn.Module:
    net = mlp()
    net[2].half()
    return net


@dataclass(frozen=True)
class Kind:
    """A row of the page.

    Attributes:
        build: the model; ``plain``: a network of the same parameters that needs no special care (None: itself).
        refused: words of the refusal; empty where it is measured.
        undefined: measures that are undefined.
    """

    build: Callable[[], nn.Module]
    plain: Callable[[], nn.Module] | None = None
    x: Callable[[], Any] = vectors
    outputs: Outputs = field(default_factory=Outputs)
    refused: str = ""
    undefined: tuple[str, ...] = ()
    plain_x: Callable[[], Tensor] | None = None


def binary() -> nn.Module:
    return nn.Sequential(nn.Linear(D, 6), nn.Tanh(), nn.Linear(6, 1))


def pair(z: Tensor, _: Tensor) -> Tensor:
    return torch.cat([torch.zeros_like(z), z], 1)


def sine(function: Callable[[Tensor], Tensor]) -> nn.Module:
    return nn.Sequential(nn.Linear(D, 6), Wrapped(nn.Identity(), lambda z, x: function(z)), nn.Linear(6, C))


def training(model: nn.Module) -> nn.Module:
    """``model`` in train mode, by its flags: exported modules have no train()."""
    for module in model.modules():
        module.training = True
    return model


def inner() -> nn.Module:
    return Wrapped(mlp())


def after(change: Callable[..., Any]) -> Callable[[], nn.Module]:
    return lambda: Wrapped(mlp(), change)


KINDS: dict[str, Kind] = {
    "a tensor of logits (B, C)": Kind(mlp),
    "an object with .logits": Kind(after(lambda z, x: SimpleNamespace(logits=z, hidden=x)), inner),
    'a mapping with "logits"': Kind(after(lambda z, x: {"features": x, "logits": z}), inner),
    "a tuple, list or mapping": Kind(after(lambda z, x: (x, z)), refused="--output"),
    "a tuple, list or mapping, with --output": Kind(after(lambda z, x: (x, z)), inner, outputs=Outputs(1)),
    "probabilities": Kind(after(lambda z, x: z.softmax(1)), refused="probabilities"),
    "probabilities, with --outputs-are": Kind(
        after(lambda z, x: z.softmax(1)), inner, outputs=Outputs(kind="probabilities")
    ),
    "log-probabilities": Kind(after(lambda z, x: z.log_softmax(1)), inner),
    "classes masked by −∞": Kind(after(lambda z, x: functional.pad(z, (0, 2), value=-torch.inf)), inner),
    "a loss": Kind(after(lambda z, x: z.mean()), refused="a single number"),
    "several rows of logits an example": Kind(
        after(lambda z, x: z[:, None].expand(-1, 2, -1)), refused="not one row"
    ),
    "one logit": Kind(binary, refused="--head binary"),
    "one logit, with --head binary": Kind(
        lambda: Wrapped(binary()), lambda: Wrapped(binary(), pair), outputs=Outputs(head="binary")
    ),
    "DataParallel, DistributedDataParallel": Kind(lambda: nn.DataParallel(mlp()), mlp),
    "torch.compile": Kind(lambda: torch.compile(mlp(), backend="eager"), mlp),
    "AveragedModel (EMA, SWA)": Kind(lambda: AveragedModel(mlp()), mlp),
    "fx graph modules": Kind(lambda: torch.fx.symbolic_trace(mlp()), mlp),
    "exported modules": Kind(
        lambda: torch.export.export(
            mlp(), (vectors(),), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},)
        ).module(),
        mlp,
    ),
    "TorchScript": Kind(lambda: torch.jit.trace(mlp(), vectors()), refused="TorchScript"),
    "networks that flatten by view": Kind(lambda: Cnn(view=True), Cnn, images),
    "BatchNorm": Kind(Cnn, x=images),
    "BatchNorm without running statistics": Kind(
        lambda: nn.Sequential(nn.Linear(D, 6), nn.BatchNorm1d(6, track_running_stats=False), nn.Linear(6, C)),
        refused="batch",
    ),
    "activation checkpointing": Kind(lambda: Recomputed(False), lambda: Recomputed(None)),
    "activation checkpointing, reentrant": Kind(lambda: Recomputed(True), lambda: Recomputed(None)),
    "activation checkpointing by an autograd function of one's own": Kind(
        RecomputedByHand, refused="reruns a part of itself"
    ),
    "recurrent networks": Kind(Recurrent, x=tokens),
    "attention": Kind(Attention, x=tokens),
    "sparse embeddings": Kind(lambda: Bag(sparse=True), lambda: Bag(sparse=False), tokens),
    "tied weights": Kind(Tied, x=tokens),
    "weight_norm, spectral_norm": Kind(
        lambda: nn.Sequential(nn.Linear(D, 6), nn.Tanh(), parametrizations.spectral_norm(nn.Linear(6, C)))
    ),
    "frozen parameters": Kind(frozen),
    "several inputs by name": Kind(
        ByName, inner, lambda: {"input_values": vectors(), "mask": torch.ones(N, D)}, plain_x=vectors
    ),
    "layers that draw in train mode": Kind(lambda: Noisy(random.random), inner),
    "layers that draw in eval mode": Kind(
        lambda: Noisy(lambda: float(np.random.rand()), always=True), refused="different outputs"
    ),
    "complex parameters": Kind(Complex, refused="complex"),
    "parameters of several dtypes": Kind(half_precision, refused="float16"),
    "outputs in bfloat16 or float16": Kind(
        after(lambda z, x: z.bfloat16()), refused="outputs are torch.bfloat16"
    ),
    "autocast inside": Kind(Autocast, refused="computes in torch.bfloat16 inside"),
    "parameters without elements": Kind(with_nothing, mlp),
    "values kept in eval mode": Kind(lambda: Kept(keeps=True), lambda: Kept(keeps=False)),
    "weights taken from a list or a cache": Kind(Listed, refused="'stem.weight' from a list"),
    "experts chosen by argmax": Kind(Experts),
    "derivatives taken in forward": Kind(Slope),
    "tensor subclasses": Kind(after(lambda z, x: z.as_subclass(Marked)), inner),
    "a backward pass without its second derivative": Kind(
        lambda: sine(LeanSine.apply),
        lambda: sine(lambda z: torch.sin(3 * z)),
        undefined=("hessian_lambda_max", "hessian_trace"),
    ),
    "weights that are not finite": Kind(
        lambda: nn.Linear(D, C).requires_grad_(True).apply(lambda m: m.weight.data.fill_(float("nan"))),
        refused="NaN",
    ),
}


def built(make: Callable[[], nn.Module]) -> nn.Module:
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        model = make()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.7)
    return model


def dense(model: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """F and H (P, P) in float64: F by Jacobians of single logits, H by central differences of the gradient."""
    model = copy.deepcopy(model).double().eval()
    x = x.double() if x.is_floating_point() else x
    named = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    theta = torch.cat([p.reshape(-1) for p in named.values()])

    def logits(flat: Tensor) -> Tensor:
        pieces = flat.split([p.numel() for p in named.values()])
        values = {name: v.view(p.shape) for (name, p), v in zip(named.items(), pieces, strict=True)}
        return functional_call(model, values, (x,))

    theta.requires_grad_()
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        z = logits(theta)
        labels = z.argmax(1)
        rows = [torch.autograd.grad(value, theta, retain_graph=True)[0] for value in z.reshape(-1)]
        jacobian = torch.stack(rows).view(len(x), -1, len(theta))
        p = z.detach().softmax(1)
        covariance = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
        fisher = torch.einsum("ncp,ncd,ndq->pq", jacobian, covariance, jacobian) / len(x)

        def slope(flat: Tensor) -> Tensor:
            flat = flat.detach().requires_grad_()
            return torch.autograd.grad(functional.cross_entropy(logits(flat), labels), flat)[0]

        step = 1e-6
        steps = step * torch.eye(len(theta), dtype=torch.float64)
        hessian = torch.stack([(slope(theta + e) - slope(theta - e)) / (2 * step) for e in steps])
    return fisher, (hessian + hessian.T) / 2


NAMES = [
    "fisher_trace",
    "fisher_lambda_max",
    "hessian_lambda_max",
    "hessian_trace",
    "local_inconsistency_converged",
]
SETTINGS = Settings(rho=0.02, trace_tolerance=0.03, max_probes=60, eigen_tolerance=1e-4)


@pytest.mark.filterwarnings("ignore")  # torch's own, of checkpointing, tracing and compiling
@pytest.mark.parametrize("name", KINDS)
def test_measures_are_those_of_the_plain_network_or_the_model_is_refused(name: str) -> None:
    kind = KINDS[name]
    model = built(kind.build)
    batches = Batches.from_tensors(kind.x())
    before = {key: value.clone() for key, value in model.state_dict().items()}
    if kind.refused:
        with pytest.raises(ProbeError, match=kind.refused):
            measure(model, batches, NAMES, SETTINGS, outputs=kind.outputs)
        return
    rows = measure(model, batches, NAMES, SETTINGS, outputs=kind.outputs).rows
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    fisher, hessian = dense(built(kind.plain or kind.build), (kind.plain_x or kind.x)())
    top = torch.linalg.eigvalsh(fisher)[-1]
    expected = {
        "fisher_trace": fisher.trace(),
        "fisher_lambda_max": top,
        "hessian_lambda_max": torch.linalg.eigvalsh(hessian)[-1],
        "hessian_trace": hessian.trace(),
        "local_inconsistency_converged": SETTINGS.rho**2 / 2 * top,
    }
    for measured, right in expected.items():
        estimate = rows[measured]
        if measured in kind.undefined:
            assert estimate.value is None
            assert estimate.details["reason"]
            continue
        # S_ρ is the quadratic form's to first order in ρ alone
        loose = 0.1 if measured == "local_inconsistency_converged" else 2e-3
        allowed = loose * abs(float(right)) + 5 * (estimate.stderr or 0) + 1e-6
        assert estimate.value == pytest.approx(float(right), abs=allowed), measured


TAKEN = [name for name in KINDS if not KINDS[name].refused]


def criterion(kind: Kind, outputs: Outputs) -> tuple[Any, Tensor]:
    """A loss and targets for outputs that are read as ``outputs`` says."""
    labels = torch.arange(N) % (2 if kind.outputs.head == "binary" else C)
    if outputs.head == "binary":
        return nn.BCEWithLogitsLoss(), labels[:, None].float()
    if outputs.kind == "probabilities":
        return lambda p, y: functional.nll_loss(p.log(), y), labels
    return functional.cross_entropy, labels


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", TAKEN)
def test_rules_in_train_mode_are_those_of_the_plain_network(name: str) -> None:
    kind = KINDS[name]
    found = []
    for make, x, outputs in (
        (kind.build, kind.x(), kind.outputs),
        (kind.plain or kind.build, (kind.plain_x or kind.x)(), Outputs()),
    ):
        loss, y = criterion(kind, outputs)
        gradients = []
        for method in ("sam", "iam-d", "iam-d-onepass", "iam-s"):
            model = training(built(make))
            random.seed(0)
            torch.manual_seed(0)
            METHODS[method](model, loss, rho=0.3, generator=seeded(3), outputs=outputs).backward(x, y)
            gradients.append(
                torch.cat([p.grad.reshape(-1) for p in model.parameters() if p.grad is not None])
            )
        found.append(torch.stack(gradients))
    if name != "layers that draw in train mode":  # which has another gradient than the network without them
        torch.testing.assert_close(found[0], found[1], rtol=2e-3, atol=2e-5)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", TAKEN)
def test_the_divergence_vanishes_with_the_radius(name: str) -> None:
    kind = KINDS[name]
    loss, y = criterion(kind, replace(kind.outputs, kind=None))
    rule = METHODS["iam-d"](training(built(kind.build)), loss, rho=1e-6, outputs=kind.outputs)
    assert float(rule.backward(kind.x(), y).inconsistency) < 1e-9


class Masked(nn.Module):
    """A network whose last class is masked by a large number, and which misbehaves as ``change`` says."""

    def __init__(self, change: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.net, self.head, self.change = mlp(), nn.Linear(C, C), change

    def forward(self, x: Tensor) -> Tensor:
        return functional.pad(self.head(self.change(self.net(x))), (0, 1), value=-1e9)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda z: functional.dropout(z, 0.3, training=True), "two passes"),
        (lambda z: z - z.mean(0), "rest of its batch"),
        (torch.detach, "no gradient"),
    ],
)
def test_a_mask_hides_no_misbehaviour(change: Callable[[Tensor], Tensor], told: str) -> None:
    """Its size is no scale for differences of the other outputs."""
    with pytest.raises(ProbeError, match=told):
        measure(Masked(change), vectors(), ["fisher_trace"])


def test_a_mask_hides_no_draws_from_a_rule() -> None:
    generators = iter(range(100))

    def drawn(z: Tensor) -> Tensor:
        return z * torch.rand(C, generator=seeded(next(generators)))

    with pytest.raises(UsageError, match="not replayed"):
        METHODS["sam"](Masked(drawn)).backward(vectors(), torch.arange(N) % C)


def test_modules_that_are_compiled_inside_run_uncompiled() -> None:
    def refused(graph: object, inputs: object) -> Any:
        raise AssertionError("compiled code has no second derivatives")

    x, model, inside = vectors(), built(inner), built(inner)
    inside.net.compile(backend=refused)
    within = Wrapped(torch.compile(built(mlp), backend=refused))
    expected = measure(model, x, ["hessian_lambda_max"]).rows["hessian_lambda_max"].value
    for compiled in (inside, within):
        found = measure(compiled, x, ["hessian_lambda_max"]).rows["hessian_lambda_max"].value
        assert found == pytest.approx(expected, rel=1e-5)


def test_parametrized_weights_are_not_cached_across_moves() -> None:
    model = nn.Sequential(parametrizations.weight_norm(nn.Linear(D, 6)), nn.ReLU(), nn.Linear(6, C))
    names = ["fisher_lambda_max", "local_inconsistency"]
    expected = {name: row.value for name, row in measure(model, vectors(), names).rows.items()}
    with parametrize.cached():
        model(vectors())
        found = {name: row.value for name, row in measure(model, vectors(), names).rows.items()}
    assert found == pytest.approx(expected, rel=1e-6)


def test_what_was_kept_before_a_measurement_is_refused_and_what_is_kept_in_it_is_let_go() -> None:
    model = built(lambda: Kept(keeps=True))
    measure(model, vectors(), ["fisher_trace"])
    assert not model.cache
    with torch.no_grad():
        model.eval()(vectors())
    with pytest.raises(ProbeError, match=r"'stem.weight' does not change the outputs.*'cache'"):
        measure(model, vectors(), ["fisher_trace"])


def test_a_hook_that_masks_a_gradient_masks_the_ascent_too() -> None:
    model, x, y = built(mlp), vectors(), torch.arange(N) % C
    mask = torch.cat([torch.ones(30), torch.zeros(27)])  # the first weight is trained, the rest is not
    parameters = Parameters(model)
    start = parameters.random(0.1, seeded(3))
    logits = model(x).detach()
    direction = kl_gradient(parameters, x, logits, start, 1 / N)[1]
    moved = parameters.moved(to_sphere(mask * direction, 0.3))
    loss = functional.cross_entropy(parameters.logits(x, moved), y)
    expected = mask * parameters.join(torch.autograd.grad(loss, list(model.parameters())))
    for p in list(model.parameters())[1:]:
        p.register_hook(torch.zeros_like)
    METHODS["iam-s"](model, rho=0.3, sign="none", generator=seeded(3)).backward(x, y)
    torch.testing.assert_close(parameters.join(p.grad for p in model.parameters()), expected)
    rule: Any = METHODS["iam-d-onepass"](model, rho=0.3, generator=seeded(3))
    rule.backward(x, y)
    assert not rule.delta[30:].any()


def test_targets_and_inputs_that_the_code_does_not_take_are_told() -> None:
    x, y = vectors(), torch.arange(N) % C
    for method in ("sgd", "sam"):
        with pytest.raises(ProbeError, match="the criterion does not accept a tuple of 2"):
            METHODS[method](built(mlp)).backward(x, (y, y))
        with pytest.raises(ProbeError, match="the model does not accept a dict of 'pixels'"):
            METHODS[method](built(mlp)).backward({"pixels": x}, y)


@pytest.mark.parametrize(
    "wrong",
    [
        {"names": "error"},
        {"names": 3},
        {"settings": {}},
        {"outputs": "logits"},
        {"memory": "4G"},
        {"initial": 1},
    ],
)
def test_arguments_of_another_type_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=next(iter(wrong))):
        measure(built(mlp), vectors(), **wrong)


def test_the_page_lists_these_kinds() -> None:
    rows = re.findall(r"^\| (.+?) \| (taken|refused)", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    said = {name.replace("`", ""): verdict for name, verdict in rows}
    assert said == {name: "refused" if kind.refused else "taken" for name, kind in KINDS.items()}
