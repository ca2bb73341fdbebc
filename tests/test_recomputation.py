"""Activation checkpointing: values, gradients and S_ρ are those of the same network without it."""

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.utils.checkpoint
from networks import Recomputes
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

import gm_probe
from gm_probe.models.recomputation import activations_kept
from gm_probe.training.methods import METHODS

RULES = [name for name in METHODS if name != "sgd"]
MEASURES = ["local_inconsistency", "fisher_lambda_max", "fisher_trace", "hessian_lambda_max", "hessian_trace"]


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=seeded())


class Net(nn.Module):
    """Three blocks; ``wrap`` runs each."""

    def __init__(self, wrap: Callable[[nn.Module, Tensor], Tensor] = lambda block, h: block(h)) -> None:
        super().__init__()
        self.stem, self.head, self.wrap = nn.Linear(6, 8), nn.Linear(8, 4), wrap
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.stem(x))
        for block in self.blocks:
            h = self.wrap(block, h)
        return self.head(h)


def own(use_reentrant: bool | None) -> nn.Module:
    return Net() if use_reentrant is None else Net(lambda b, h: checkpoint(b, h, use_reentrant=use_reentrant))


def bound_generator(on: bool) -> nn.Module:
    """torch.distributed's own binding of what is inside ``checkpoint``."""
    from torch.distributed._composable import checkpoint as composable

    net = Net()
    for block in net.blocks if on else ():
        composable(block)
    return net


def timm_vit(on: bool) -> nn.Module:
    pytest.importorskip("timm")
    from timm.models.vision_transformer import VisionTransformer

    net = VisionTransformer(img_size=8, patch_size=4, num_classes=4, embed_dim=8, depth=2, num_heads=2)
    net.set_grad_checkpointing(on)
    return net


class HuggingFace(nn.Module):
    def __init__(self, on: bool, use_reentrant: bool) -> None:
        super().__init__()
        pytest.importorskip("transformers")
        from transformers import ViTConfig, ViTForImageClassification

        self.inner = ViTForImageClassification(
            ViTConfig(
                hidden_size=8,
                num_hidden_layers=2,
                num_attention_heads=2,
                intermediate_size=16,
                image_size=8,
                patch_size=4,
                num_labels=4,
            )
        )
        if on:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)  # of the name, in transformers 5
                self.inner.gradient_checkpointing_enable({"use_reentrant": use_reentrant})

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x).logits


def densenet(on: bool) -> nn.Module:
    from torchvision.models import DenseNet

    return DenseNet(4, (2, 2), 4, bn_size=2, num_classes=4, memory_efficient=on)


NETS: dict[str, tuple[Callable[[bool], nn.Module], tuple[int, ...]]] = {
    "own": (lambda on: own(False if on else None), (6,)),
    "reentrant": (lambda on: own(True if on else None), (6,)),
    "bound generator": (bound_generator, (6,)),
    "timm": (timm_vit, (3, 8, 8)),
    "hugging face": (lambda on: HuggingFace(on, False), (3, 8, 8)),
    "hugging face, reentrant": (lambda on: HuggingFace(on, True), (3, 8, 8)),
    "densenet": (densenet, (3, 16, 16)),
}


def pair(name: str) -> tuple[nn.Module, nn.Module, Tensor, Tensor]:
    """The network without and with checkpointing, inputs and labels."""
    build, shape = NETS[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        plain, other = build(False), build(True)
    other.load_state_dict(plain.state_dict())
    return plain, other, normal(12, *shape), torch.arange(12) % 4


def gradient(model: nn.Module) -> Tensor:
    return torch.cat([p.grad.reshape(-1) for p in model.parameters() if p.grad is not None])


@pytest.mark.parametrize("name", NETS)
def test_the_networks_do_run_again_in_backward(name: str) -> None:
    _, model, x, _ = pair(name)
    calls = []
    outputs = model.train()(x.requires_grad_())
    for module in model.modules():
        module.register_forward_hook(lambda *_: calls.append(1))
    outputs.sum().backward()
    assert calls


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", NETS)
def test_rules_take_the_plain_networks_gradient(name: str, rule: str) -> None:
    plain, other, x, y = pair(name)
    found = []
    for model in (plain, other):
        model.train()
        built = METHODS[rule](model, rho=1.0, generator=seeded())
        built.backward(x, y)
        found.append(gradient(model))
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-6)


def test_sam_is_that_by_hand() -> None:
    _, model, x, y = pair("reentrant")
    hand = copy.deepcopy(model)
    functional.cross_entropy(hand(x), y).backward()
    slopes = gradient(hand)
    with torch.no_grad():
        for p in hand.parameters():
            p.add_(0.5 * p.grad / slopes.norm())
    hand.zero_grad()
    functional.cross_entropy(hand(x), y).backward()
    gm_probe.SAM(model, rho=0.5).backward(x, y)
    torch.testing.assert_close(gradient(model), gradient(hand), rtol=1e-5, atol=1e-6)


def test_plain_backpropagation_still_saves_memory() -> None:
    _, model, x, y = pair("reentrant")
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        gm_probe.Rule(model).backward(x, y)
    few = sum(kept)
    kept.clear()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        gm_probe.Rule(pair("own")[0]).backward(x, y)
    assert few < sum(kept)


@pytest.mark.parametrize("name", [name for name in NETS if "hugging" not in name])
def test_measures_are_the_plain_networks(name: str) -> None:
    plain, other, x, y = pair(name)
    names = MEASURES if len(x[0]) == 6 else MEASURES[:2]
    settings = gm_probe.Settings(rho=0.5, k_steps=3, max_probes=20)
    found = [
        gm_probe.measure(model.eval(), gm_probe.Batches.from_tensors(x, y), names, settings)
        for model in (plain, other)
    ]
    for measure in names:
        assert found[1].rows[measure].value == pytest.approx(found[0].rows[measure].value, rel=1e-4), measure


def test_input_jacobian_beside_other_measures() -> None:
    plain, other, x, y = pair("own")
    names = ["mean_entropy", "input_jacobian_norm"]
    found = [
        gm_probe.measure(model, gm_probe.Batches.from_tensors(x, y), names).rows["input_jacobian_norm"].value
        for model in (plain, other)
    ]
    assert found[1] == pytest.approx(found[0], rel=1e-5)


def test_torch_is_as_it_was_after_a_failure() -> None:
    before = dict(vars(torch.utils.checkpoint))

    def fail() -> None:
        with activations_kept():
            assert vars(torch.utils.checkpoint) != before
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert vars(torch.utils.checkpoint) == before


class Accumulates(torch.autograd.Function):
    """A checkpoint of one's own, whose backward pass accumulates in the parameters."""

    @staticmethod
    def forward(ctx: Any, block: nn.Module, x: Tensor) -> Tensor:
        ctx.block, ctx.x = block, x
        with torch.no_grad():
            return block(x)

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> Any:
        x = ctx.x.detach().requires_grad_()
        with torch.enable_grad():
            output = ctx.block(x)
        torch.autograd.backward(output, slopes)
        return None, x.grad


class Slopes(torch.autograd.Function):
    """A layer whose backward pass multiplies by the weight that its module has by then."""

    @staticmethod
    def forward(ctx: Any, block: nn.Module, x: Tensor) -> Tensor:
        ctx.block = block
        with torch.no_grad():
            return x @ block[0].weight.T

    @staticmethod
    def backward(ctx: Any, slopes: Tensor) -> Any:
        return None, slopes @ ctx.block[0].weight


OWN: dict[str, Callable[[nn.Module, Tensor], Tensor]] = {
    "Recomputes": lambda block, h: Recomputes.apply(block, h, *block.parameters()),
    "Accumulates": lambda block, h: Accumulates.apply(block, h),
    "Slopes": lambda block, h: block(h) + Slopes.apply(block, h),
}


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", OWN)
def test_rules_refuse_a_checkpoint_of_ones_own(name: str, rule: str) -> None:
    model = Net(OWN[name])
    with pytest.raises(gm_probe.UsageError, match=f"reruns a part of itself .*{name} in "):
        METHODS[rule](model, rho=0.5).backward(normal(8, 6), torch.arange(8) % 4)
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("name", OWN)
def test_measures_refuse_a_checkpoint_of_ones_own(name: str) -> None:
    model = Net(OWN[name])
    batches = gm_probe.Batches.from_tensors(normal(8, 6), torch.arange(8) % 4)
    with pytest.raises(gm_probe.UsageError, match=f"reruns a part of itself .*{name} in "):
        gm_probe.measure(model, batches, ["local_inconsistency"])
    assert all(p.grad is None for p in model.parameters())


def test_a_function_that_keeps_what_it_needs_is_taken() -> None:
    class Doubled(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return 2 * x

        @staticmethod
        def backward(ctx: Any, slopes: Tensor) -> Tensor:
            return 2 * slopes

    x, y = normal(8, 6), torch.arange(8) % 4
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        plain, other = Net(lambda b, h: 2 * b(h)), Net(lambda b, h: Doubled.apply(b(h)))
    other.load_state_dict(plain.state_dict())
    for model in (plain, other):
        gm_probe.SAM(model, rho=0.5).backward(x, y)
    torch.testing.assert_close(gradient(other), gradient(plain))
