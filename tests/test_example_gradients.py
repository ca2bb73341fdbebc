"""Squared norms of examples' own gradients against reverse mode, one example and one cotangent at a time."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from conftest import Tied, relu_mlp
from torch import Tensor, nn
from torch.nn import functional

from gm_probe.curvature import example_gradients
from gm_probe.curvature.example_gradients import ExampleGradients, IrregularLayerError
from gm_probe.data.batches import Batches
from gm_probe.measures.measure import measure
from gm_probe.measures.settings import Settings
from gm_probe.models.parameters import Parameters

N = 6


class Residual(nn.Module):
    """Writes in place to layers' outputs: ReLU, and a sum with the shortcut."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.conv = nn.Conv2d(2, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1, bias=False)
        self.norm, self.shortcut, self.head = nn.BatchNorm2d(4), nn.Conv2d(2, 4, 1), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        out = self.norm(self.conv(torch.relu_(self.stem(x))))
        out += self.shortcut(x)
        return self.head(out.relu_().mean((2, 3)))


class ClassToken(nn.Module):
    """Raw parameters beside layers that have a rule."""

    def __init__(self) -> None:
        super().__init__()
        self.token, self.position = nn.Parameter(torch.randn(1, 1, 4)), nn.Parameter(torch.randn(1, 4, 4))
        self.embed, self.mix, self.head = nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        tokens = torch.cat([self.token.expand(len(x), -1, -1), self.embed(x)], 1) + self.position
        return self.head((tokens + torch.tanh(self.mix(tokens)).mean(1, keepdim=True))[:, 0])


class Halves(nn.Module):
    """Writes in place to a view of a layer's output."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(3, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        out = self.first(self.first.bias.new_ones(1) * x)
        out[:, :3].relu_()
        return self.last(out)


class Idle(nn.Module):
    """Layers that no output depends on: one is not called, of one the result is dropped, of one it is detached."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.uncalled, self.dropped, self.cut = (nn.Linear(3, 3) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        self.dropped(x)
        return self.used(x) + self.cut(x).detach()


class Positions(nn.Module):
    """As many positions as the examples that it is tried on, without a batch axis; a layer called by keyword."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.position = nn.Embedding(5, 3), nn.Embedding(4, 3)
        self.mix, self.head = nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.embed(x) + self.position(torch.arange(4))
        return self.head(torch.tanh(self.mix(input=tokens)).mean(1))


def flat(*layers: nn.Module, out: int) -> Callable[[], nn.Module]:
    return lambda: nn.Sequential(*layers, nn.Flatten(), nn.Linear(out, 3))


class Net(NamedTuple):
    build: Callable[[], nn.Module]
    x: tuple[int, ...] | Tensor


class SingleIds(nn.Module):
    """Tabular data: a table a column."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.other, self.head = nn.Embedding(5, 2), nn.Embedding(5, 2), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(torch.cat([self.one(x[:, 0]), self.other(x[:, 1])], 1)))


TOKENS = torch.tensor([[0, 1, 1, 2], [3, 3, 3, 3], [4, 0, 0, 1], [2, 2, 1, 0], [0, 0, 0, 0], [4, 3, 2, 1]])
IMAGE = (2, 7, 6)
NETS = {
    "linear": Net(lambda: nn.Linear(3, 4), (3,)),
    "linear on tokens, more tokens than features": Net(flat(nn.Linear(3, 2), nn.Tanh(), out=14), (7, 3)),
    "linear on tokens, fewer": Net(flat(nn.Linear(9, 8), nn.Tanh(), out=16), (2, 9)),
    "linear on a grid of tokens": Net(flat(nn.Linear(3, 2), out=12), (2, 3, 3)),
    "mlp": Net(relu_mlp, (3,)),
    "conv": Net(flat(nn.Conv2d(2, 3, 3), nn.Tanh(), out=60), IMAGE),
    "conv, stride": Net(flat(nn.Conv2d(2, 3, 3, stride=2), nn.Tanh(), out=18), IMAGE),
    "conv, padding": Net(flat(nn.Conv2d(2, 3, 3, padding=1), nn.Tanh(), out=126), IMAGE),
    "conv, 1x1": Net(flat(nn.Conv2d(2, 3, 1), nn.Tanh(), out=126), IMAGE),
    "conv, whole image": Net(flat(nn.Conv2d(2, 5, (7, 6)), nn.Tanh(), out=5), IMAGE),
    "conv, all at once": Net(
        flat(
            nn.Conv2d(2, 4, (3, 2), stride=(2, 1), padding=(2, 1), dilation=(2, 3), groups=2, bias=False),
            nn.Tanh(),
            out=80,
        ),
        IMAGE,
    ),
    "convs": Net(
        lambda: nn.Sequential(
            nn.Conv2d(2, 8, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 3, 2), nn.Flatten()
        ),
        (2, 7, 7),
    ),
    "conv without a rule": Net(flat(nn.Conv2d(2, 3, 3, padding=1, padding_mode="reflect"), out=126), IMAGE),
    "conv with padding by name": Net(flat(nn.Conv2d(2, 3, 3, padding="same"), out=126), IMAGE),
    "batch norm 1d": Net(lambda: nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 3)), (3,)),
    "batch norm 1d on sequences": Net(flat(nn.BatchNorm1d(3), nn.Tanh(), out=15), (3, 5)),
    "batch norm 2d": Net(flat(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), out=60), IMAGE),
    "layer norm": Net(flat(nn.Linear(3, 4), nn.LayerNorm(4), nn.Tanh(), out=20), (5, 3)),
    "layer norm over two axes": Net(flat(nn.LayerNorm([5, 3]), nn.Tanh(), out=30), (2, 5, 3)),
    "group norm": Net(flat(nn.Conv2d(2, 4, 3), nn.GroupNorm(2, 4), nn.ReLU(), out=80), IMAGE),
    "group norm without an affine map": Net(flat(nn.GroupNorm(1, 2, affine=False), out=84), IMAGE),
    "embedding, repeated tokens": Net(flat(nn.Embedding(5, 3), nn.Tanh(), out=12), TOKENS),
    "embedding of single ids": Net(SingleIds, TOKENS),
    "embedding, padding": Net(flat(nn.Embedding(5, 3, padding_idx=0), nn.Tanh(), out=12), TOKENS),
    "in place": Net(Residual, IMAGE),
    "raw parameters": Net(ClassToken, (3, 3)),
    "tied weights": Net(Tied, (3,)),
    "idle": Net(Idle, (3,)),
    "positions": Net(Positions, TOKENS),
    "weight norm": Net(
        lambda: nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(3, 4)), nn.Linear(4, 3)), (3,)
    ),
    "conv 1d": Net(flat(nn.Conv1d(2, 3, 3), nn.Tanh(), out=9), (2, 5)),
}


def prepared(net: Net, seed: int = 0) -> tuple[nn.Module, Tensor]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = copy.deepcopy(net.build()).double().eval()
        for module in model.modules():
            if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d) and module.running_mean is not None:
                nn.init.normal_(module.running_mean)
                nn.init.uniform_(module.running_var, 0.5, 2)
        for p in model.parameters():  # all anew: the ones and zeros of norm layers would hide a factor
            nn.init.normal_(p, std=0.5)
        x = net.x if isinstance(net.x, Tensor) else torch.randn(N, *net.x, dtype=torch.float64)
    return model, x


def brute_force(model: nn.Module, x: Tensor, cotangents: Tensor, names: list[str] | None = None) -> Tensor:
    """(K, B), each example alone in its batch."""
    named = {n: p for n, p in model.named_parameters() if p.requires_grad and (names is None or n in names)}
    norms = torch.zeros(cotangents.shape[:2], dtype=cotangents.dtype)
    for k, cotangent in enumerate(cotangents):
        for n in range(len(x)):
            output = model(x[n : n + 1])[0] @ cotangent[n]
            grads = torch.autograd.grad(output, list(named.values()), allow_unused=True)
            norms[k, n] = sum(float(g.square().sum()) for g in grads if g is not None)
    return norms


def cotangents_for(model: nn.Module, x: Tensor, count: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(7)
    shape = model(x).shape
    return torch.randn(count, *shape, generator=generator, dtype=torch.float64)


def check(model: nn.Module, x: Tensor, pattern: str = "", count: int = 2) -> ExampleGradients:
    parameters, cotangents = Parameters(model, pattern), cotangents_for(model, x, count)
    examples = ExampleGradients(parameters, x)
    assert examples.supported
    expected = brute_force(model, x, cotangents, list(parameters.named))
    torch.testing.assert_close(examples.squared_norms(x, cotangents), expected, rtol=1e-10, atol=1e-13)
    return examples


@pytest.mark.parametrize("name", NETS)
def test_against_one_example_at_a_time(name: str) -> None:
    model, x = prepared(NETS[name])
    examples = check(model, x)
    if x.dim() == 4:
        x = x.contiguous(memory_format=torch.channels_last)
        cotangents = cotangents_for(model, x)
        torch.testing.assert_close(
            examples.squared_norms(x, cotangents), brute_force(model, x, cotangents), rtol=1e-10, atol=1e-13
        )


# the others' closed form must be used: differentiating example by example takes N times the memory
RULELESS = "conv without a rule", "conv with padding by name", "conv 1d", "weight norm"
RULED = {
    n: net for n, net in NETS.items() if n not in (*RULELESS, "raw parameters", "tied weights", "positions")
}


@pytest.mark.parametrize("name", RULED)
def test_closed_forms_need_no_differentiation_example_by_example(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> Tensor:
        raise AssertionError("vmap")

    monkeypatch.setattr(example_gradients, "vmap", refuse)
    check(*prepared(RULED[name]))


@pytest.mark.parametrize("chunk", [1, 200, 500])
def test_convolutions_in_pieces(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(example_gradients, "chunk", lambda _: chunk)
    check(*prepared(NETS["convs"]))


@pytest.mark.parametrize("count", [1, 5])
def test_any_number_of_cotangents(count: int) -> None:
    check(*prepared(NETS["in place"]), count=count)
    check(*prepared(NETS["raw parameters"]), count=count)


def test_one_example() -> None:
    for name in ("mlp", "in place", "raw parameters", "embedding, repeated tokens"):
        model, x = prepared(NETS[name])
        check(model, x[:1])


@pytest.mark.parametrize("name", ["mlp", "in place", "raw parameters", "layer norm"])
def test_frozen_parameters_do_not_count(name: str) -> None:
    model, x = prepared(NETS[name])
    whole = check(model, x).squared_norms(x, cotangents_for(model, x))
    for number, p in enumerate(model.parameters()):
        p.requires_grad_(number % 3 == 1)
    part = check(model, x).squared_norms(x, cotangents_for(model, x))
    assert bool((part < whole).all())


@pytest.mark.parametrize(
    ("name", "pattern"),
    [
        ("mlp", "weight"),
        ("mlp", r"^2\."),
        ("in place", "norm|shortcut"),
        ("in place", "head.bias"),
        ("raw parameters", "token"),
        ("raw parameters", "token|mix.weight"),
        ("tied weights", r"first"),
    ],
)
def test_subset_of_the_parameters(name: str, pattern: str) -> None:
    check(*prepared(NETS[name]), pattern=pattern)


def test_float32() -> None:
    for name in ("convs", "in place", "raw parameters", "layer norm"):
        model, x = prepared(NETS[name])
        cotangents = cotangents_for(model, x)
        expected = brute_force(model, x, cotangents)
        examples = ExampleGradients(Parameters(copy.deepcopy(model).float()), x.float())
        assert examples.supported
        found = examples.squared_norms(x.float(), cotangents.float())
        torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-5)


# what is refused


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.layer(torch.tanh(self.layer(x)))))


class TokensFirst(nn.Module):
    """Its layer sees (tokens, examples, features), here with as many tokens as examples on trial."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.Linear(3, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.layer(x.transpose(0, 1))).mean(0))


class TokensAsExamples(TokensFirst):
    """Its layer sees (examples · tokens, features)."""

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.layer(x.flatten(0, 1))).view(*x.shape[:2], 4).mean(1))


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell, self.head = nn.GRU(3, 4, batch_first=True), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.cell(x)[0][:, -1])


class Branching(nn.Module):
    """A choice by the data, which vmap cannot follow; the scale has no rule."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.head = nn.Parameter(torch.ones(3)), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(x * self.scale) if float(x.sum()) > 1e9 else x * self.scale)


class Backdoor(nn.Module):
    """A layer's weight used once more behind the layer's back."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + functional.linear(torch.tanh(x), self.layer.weight)


class Batchwide(nn.Module):
    """Examples see each other."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.norm = nn.Linear(3, 3), nn.BatchNorm1d(3, track_running_stats=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.layer(x))


class Positions(nn.Module):
    """An embedding that sees one row for all examples."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.places, self.head = nn.Embedding(5, 3), nn.Embedding(4, 3), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        places = self.places(torch.arange(x.shape[1], device=x.device)[None])
        return self.head(torch.tanh(self.words(x) + places).flatten(1))


SPREAD = {
    "a layer used twice": Net(Twice, (3,)),
    "tokens as examples": Net(TokensAsExamples, (4, 3)),
    "a position embedding": Net(Positions, TOKENS),
    "a weight used beside its layer": Net(Backdoor, (3,)),
}


@pytest.mark.parametrize("name", SPREAD)
def test_layers_without_a_row_an_example_are_differentiated_example_by_example(name: str) -> None:
    model, x = prepared(SPREAD[name])
    examples, cotangents = ExampleGradients(Parameters(model), x), cotangents_for(model, x)
    assert examples.supported
    expected = brute_force(model, x, cotangents)
    torch.testing.assert_close(examples.squared_norms(x, cotangents), expected, rtol=1e-10, atol=1e-13)


def test_gradients_of_their_own_are_taken_some_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = prepared(SPREAD["a layer used twice"])
    cotangents = cotangents_for(model, x)
    expected = ExampleGradients(Parameters(model), x).squared_norms(x, cotangents)
    sizes = []
    original = example_gradients.vmap

    def spy(function: object, *options: object) -> object:
        mapped = original(function, *options)

        def run(rest: object, some: Tensor, slopes: Tensor) -> object:
            sizes.append(len(slopes))
            return mapped(rest, some, slopes)

        return run

    monkeypatch.setattr(example_gradients, "vmap", spy)
    layer = sum(p.numel() for p in model.layer.parameters())
    monkeypatch.setattr(example_gradients, "chunk", lambda _: 2 * layer)
    examples = ExampleGradients(Parameters(model), x)
    torch.testing.assert_close(examples.squared_norms(x, cotangents), expected, rtol=1e-12, atol=1e-14)
    assert max(sizes) == 2


UNSUPPORTED = {
    "a choice by the data": Net(Branching, (3,)),
    "batch statistics": Net(Batchwide, (3,)),
}


def test_as_many_tokens_as_trial_examples_and_before_them() -> None:
    check(*prepared(Net(TokensFirst, (4, 3))))


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_what_it_cannot_do_it_says(name: str) -> None:
    model, x = prepared(UNSUPPORTED[name])
    assert not ExampleGradients(Parameters(model), x).supported
    assert not any(module._forward_hooks for module in model.modules())


def test_a_layer_used_twice_on_some_batches_only_is_refused_there() -> None:
    class Moody(Twice):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) if len(x) > 4 else self.head(self.layer(x))

    model, x = prepared(Net(Moody, (3,)))
    examples, cotangents = ExampleGradients(Parameters(model), x), cotangents_for(model, x)
    assert examples.supported
    with pytest.raises(IrregularLayerError):
        examples.squared_norms(x, cotangents)


def test_a_layer_of_some_examples_only_is_refused_there() -> None:
    """A single row's norm would be added to every example's."""

    class Branch(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.all, self.some = nn.Linear(3, 3), nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            hard = (x[:, 0] > 9).nonzero()[:, 0]
            z = self.all(x)
            return z.index_add(0, hard, self.some(x[hard])) if len(hard) else z

    model, x = prepared(Net(Branch, (3,)))
    examples, cotangents = ExampleGradients(Parameters(model), x), cotangents_for(model, x)
    assert examples.supported
    x[1, 0] = 10.0
    with pytest.raises(IrregularLayerError):
        examples.squared_norms(x, cotangents)
    report = measure(model, Batches.from_tensors(x), ["fisher_trace"], Settings(trace_tolerance=0.0))
    assert report.rows["fisher_trace"].details["method"] == "Hutchinson"


EITHER = {
    "in place on a view": Net(Halves, (3,)),
    "recurrent": Net(Recurrent, (4, 3)),
    "embedding, max norm": Net(flat(nn.Embedding(5, 3, max_norm=0.5), out=12), TOKENS),
    "embedding, by frequency": Net(flat(nn.Embedding(5, 3, scale_grad_by_freq=True), out=12), TOKENS),
    "a slope a channel": Net(lambda: nn.Sequential(nn.PReLU(3), nn.Linear(3, 3)), (3,)),
}


@pytest.mark.parametrize("name", EITHER)
def test_never_wrong_where_it_says_supported(name: str) -> None:
    model, x = prepared(EITHER[name])
    examples, cotangents = ExampleGradients(Parameters(model), x), cotangents_for(model, x)
    if examples.supported:
        expected = brute_force(model, x, cotangents)
        torch.testing.assert_close(examples.squared_norms(x, cotangents), expected, rtol=1e-10, atol=1e-13)


# the model is left as it was


class Fragile(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.layer, self.error = inner, nn.Linear(3, 3), None

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer(self.inner(x))
        if self.error is not None:
            raise self.error
        return x


@pytest.mark.parametrize("error", [RuntimeError("boom"), KeyboardInterrupt()], ids=["exception", "interrupt"])
def test_hooks_go_also_after_an_error(error: BaseException) -> None:
    model, x = prepared(Net(lambda: Fragile(nn.Linear(3, 3)), (3,)))
    cotangents = cotangents_for(model, x)
    examples = ExampleGradients(Parameters(model), x)
    expected = examples.squared_norms(x, cotangents)
    model.error = error
    with pytest.raises(type(error)):
        examples.squared_norms(x, cotangents)
    assert not any(module._forward_hooks for module in model.modules())
    model.error = None
    assert torch.equal(examples.squared_norms(x, cotangents), expected)


def test_an_interrupted_trial_is_not_swallowed() -> None:
    model, x = prepared(Net(lambda: Fragile(nn.Linear(3, 3)), (3,)))
    model.error = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        ExampleGradients(Parameters(model), x)
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("name", ["in place", "raw parameters", "embedding, padding", "tied weights"])
def test_model_and_inputs_are_untouched(name: str) -> None:
    model, x = prepared(NETS[name])
    model.register_forward_hook(own := lambda *_: None)
    for number, p in enumerate(model.parameters()):
        p.grad = torch.full_like(p, float(number)) if number % 2 else None
    tensors, before = copy.deepcopy(model.state_dict()), x.clone()
    grads = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    examples, cotangents = ExampleGradients(Parameters(model), x), cotangents_for(model, x)
    kept = cotangents.clone()
    with torch.no_grad():
        examples.squared_norms(x, cotangents)
        assert not torch.is_grad_enabled()
    assert torch.equal(x, before)
    assert not x.requires_grad
    assert torch.equal(cotangents, kept)
    assert all(torch.equal(value, tensors[key]) for key, value in model.state_dict().items())
    assert [hook for module in model.modules() for hook in module._forward_hooks.values()] == [own]
    assert all(p.is_leaf and p.requires_grad for p in model.parameters())
    for p, grad in zip(model.parameters(), grads, strict=True):
        assert (p.grad is None) == (grad is None)
        assert grad is None or torch.equal(p.grad, grad)
