"""Checkpoints: every usual shape of file is read, every broken or hostile one is refused in one line."""

import argparse
import ast
import copy
import io
import json
import math
import os
import sys
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

import gm_probe
from gm_probe.data.normalization import Normalization
from gm_probe.errors import CheckpointError, UsageError
from gm_probe.models.checkpoints import HEADER, read_checkpoint, save_checkpoint
from gm_probe.models.fitting import load_weights
from gm_probe.models.parameters import Parameters
from gm_probe.models.zoo import ModelSpec, build_model

SHARED = Path(os.environ.get("GM_PROBE_SHARED", Path(__file__).parents[2] / "shared"))
SPEC = ModelSpec("my.package:build", (3, 8, 8), 3)
NORMALIZATION = Normalization((0.1 + 0.2, 1 / 3, 0.5), (0.25, 1 / 7, 1e-3))


class Net(nn.Module):
    """Convolution, BatchNorm and two layers that share a matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, bias=False)
        self.bn = nn.BatchNorm2d(4)
        self.first, self.second, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.bn(self.conv(x))).mean((2, 3))
        return self.head(self.second(torch.relu(self.first(x))))


def net(seed: int) -> Net:
    """A net with weights and BatchNorm statistics of its own."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Net()
        model.train()
        model(torch.randn(5, 3, 8, 8))
    return model.eval()


@pytest.fixture
def trained() -> Net:
    return net(1)


def same(one: nn.Module, other: nn.Module) -> bool:
    pairs = zip(one.state_dict().items(), other.state_dict().items(), strict=True)
    return all(a == b and torch.equal(x, y) for (a, x), (b, y) in pairs)


def reloaded(path: Path) -> Net:
    fresh = net(2)
    load_weights(fresh, read_checkpoint(path))
    return fresh


def refused(path: Path, *, model: nn.Module | None = None) -> str:
    """The message of the CheckpointError that reading (and loading) ``path`` raises: one printable line."""
    if model is None:
        with pytest.raises(CheckpointError) as caught:
            read_checkpoint(path)
    else:
        checkpoint = read_checkpoint(path)
        with pytest.raises(CheckpointError) as caught:
            load_weights(model, checkpoint)
    message = str(caught.value)
    assert caught.value.exit_code == 3
    assert str(path) in message
    assert message.isprintable()
    return message


# ---- round trips


@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".pth", ".th", ".ckpt"])
def test_round_trip_is_bit_identical(tmp_path: Path, trained: Net, suffix: str) -> None:
    path = tmp_path / "a b" / f"ü{suffix}"
    trained.to(memory_format=torch.channels_last)
    save_checkpoint(path, trained, SPEC, NORMALIZATION, ("ant", "bee", "ü"))
    checkpoint = read_checkpoint(path)
    assert checkpoint.model == SPEC
    assert checkpoint.normalization == NORMALIZATION  # floats survive to the last bit
    assert checkpoint.classes == ("ant", "bee", "ü")
    fresh = reloaded(path)
    assert same(fresh, trained)
    assert fresh.second.weight is fresh.first.weight
    assert int(fresh.bn.num_batches_tracked) == 1
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


def test_a_run_folder_is_its_checkpoint(tmp_path: Path, trained: Net) -> None:
    assert "holds no checkpoint.safetensors" in refused(tmp_path)
    save_checkpoint(tmp_path / "checkpoint.safetensors", trained, SPEC, NORMALIZATION)
    assert read_checkpoint(tmp_path).path == tmp_path / "checkpoint.safetensors"
    assert same(reloaded(tmp_path), trained)


def test_reading_never_imports_the_recorded_model(tmp_path: Path, trained: Net, monkeypatch: Any) -> None:
    (tmp_path / "hostile_model.py").write_text(f"open({str(tmp_path / 'canary')!r}, 'w')\n")
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("hostile_model:build", f"{tmp_path / 'hostile_model.py'}:build"):
        for suffix in (".safetensors", ".pt"):
            save_checkpoint(tmp_path / f"a{suffix}", trained, ModelSpec(name, (3, 8, 8), 3), NORMALIZATION)
            checkpoint = read_checkpoint(tmp_path / f"a{suffix}")
            load_weights(net(2), checkpoint)
            assert checkpoint.model.is_user_code
    assert "hostile_model" not in sys.modules
    assert not (tmp_path / "canary").exists()


NESTS: dict[str, Callable[[dict[str, Tensor]], Any]] = {
    "plain": lambda state: state,
    "ordered": OrderedDict,
    "state_dict": lambda state: {"state_dict": state, "epoch": 3, "arch": "resnet"},
    "model": lambda state: {"model": state, "optimizer": {"state": {}, "param_groups": [{"lr": 0.1}]}},
    "model_state_dict": lambda state: {"model_state_dict": state, "loss": 0.5},
    "model_state": lambda state: {"model_state": state},
    "model, state_dict": lambda state: {"model": {"state_dict": state, "step": 1}},
    "parameters": lambda state: {name: nn.Parameter(v, v.is_floating_point()) for name, v in state.items()},
    "lightning": lambda state: {
        "epoch": 9,
        "global_step": 100,
        "pytorch-lightning_version": "2.5.0",
        "hyper_parameters": {"lr": 0.1, "sizes": [1, 2]},
        "optimizer_states": [{"state": {0: {"momentum_buffer": torch.ones(2)}}}],
        "callbacks": {"ModelCheckpoint{'mode': 'min'}": {"best": None}},
        "state_dict": {f"model.{name}": value for name, value in state.items()},
    },
}


@pytest.mark.parametrize("nest", NESTS)
@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_every_usual_nest(tmp_path: Path, trained: Net, nest: str, legacy: bool) -> None:
    path = tmp_path / "a.ckpt"
    torch.save(NESTS[nest](trained.state_dict()), path, _use_new_zipfile_serialization=not legacy)
    checkpoint = read_checkpoint(path)
    assert (checkpoint.model, checkpoint.normalization, checkpoint.classes) == (None, None, ())
    assert same(reloaded(path), trained)


PREFIXES = ["", "module.", "_orig_mod.", "module._orig_mod.", "model.module._orig_mod.", "model.model."]
PREFIXES += ["net.", "module.encoder.", "a.b.c.d.", "model.net._orig_mod."]


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_any_prefix_is_taken_off(tmp_path: Path, trained: Net, prefix: str, suffix: str) -> None:
    path = tmp_path / f"a{suffix}"
    state = {prefix + name: value.clone() for name, value in trained.state_dict().items()}
    if suffix == ".pt":
        torch.save(state, path)
    else:
        safetensors.torch.save_file(state, path)
    assert same(reloaded(path), trained)


def test_a_wrapper_of_that_name_keeps_its_prefix(tmp_path: Path, trained: Net) -> None:
    class Wrapper(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.model = inner

    torch.save(
        {f"module.model.{name}": value for name, value in trained.state_dict().items()}, tmp_path / "a.pt"
    )
    wrapper = Wrapper(net(2))
    load_weights(wrapper, read_checkpoint(tmp_path / "a.pt"))
    assert same(wrapper.model, trained)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions_are_cast(tmp_path: Path, trained: Net, dtype: torch.dtype) -> None:
    state = {name: v.to(dtype) if v.is_floating_point() else v for name, v in trained.state_dict().items()}
    torch.save(state, tmp_path / "a.pt")
    fresh = reloaded(tmp_path / "a.pt")
    for name, value in fresh.state_dict().items():
        assert value.dtype == trained.state_dict()[name].dtype
        assert torch.equal(value, state[name].to(value.dtype))


def test_num_batches_tracked_may_be_absent(tmp_path: Path, trained: Net) -> None:
    state = trained.state_dict()
    del state["bn.num_batches_tracked"]
    torch.save(state, tmp_path / "a.pt")
    fresh = reloaded(tmp_path / "a.pt")
    assert torch.equal(fresh.bn.running_mean, trained.bn.running_mean)


# ---- weights under other keys and prefixes, and more than once


def below(prefix: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + name: value for name, value in state.items()}


@pytest.mark.parametrize("key", ["net", "network", "weights", "params", "module", "ema_state_dict", "x.y"])
def test_weights_are_found_under_any_key(tmp_path: Path, trained: Net, key: str) -> None:
    optimizer = torch.optim.Adam(trained.parameters())
    trained(torch.ones(2, 3, 8, 8)).sum().backward()
    optimizer.step()
    beside = {
        "epoch": 3,
        "args": argparse.Namespace(lr=0.1, out=Path("x")),
        "best": np.float64(93.2),
        "generator": np.random.default_rng(0).random(3),
        "optimizer": optimizer.state_dict(),
        "rng": torch.get_rng_state(),
        "callbacks": {"best_k_models": {"a.ckpt": torch.tensor(0.5)}},
        key: trained.state_dict(),
    }
    for content in (beside, [beside], (beside, 3), {"all": [1, beside]}):
        torch.save(content, tmp_path / "a.pt")
        checkpoint = read_checkpoint(tmp_path / "a.pt")
        assert checkpoint.key.endswith(key)
        assert checkpoint.alternatives == ()
        fresh = net(2)
        assert load_weights(fresh, checkpoint).notes(tmp_path) == []
        assert same(fresh, trained)


COPIES: dict[str, tuple[Callable[[dict[str, Tensor], dict[str, Tensor]], Any], str, str]] = {
    "timm": (lambda raw, ema: {"state_dict_ema": ema, "state_dict": raw}, "state_dict", "state_dict_ema"),
    "torchvision": (lambda raw, ema: {"model": raw, "model_ema": ema}, "model", "model_ema"),
    "FixMatch": (lambda raw, ema: {"ema_state_dict": ema, "state_dict": raw}, "state_dict", "ema_state_dict"),
    "DINO": (lambda raw, ema: {"teacher": ema, "student": below("module.", raw)}, "student", "teacher"),
    "nested": (lambda raw, ema: {"net": {"ema": ema, "raw": raw}}, "net.raw", "net.ema"),
    "at the top": (lambda raw, ema: {**raw, "ema": ema}, "", "ema"),
    "Lightning": (
        lambda raw, ema: {"state_dict": {**below("ema_model.", ema), **below("model.", raw)}},
        "state_dict.model",
        "state_dict.ema_model",
    ),
    "MoCo": (
        lambda raw, ema: {**below("module.encoder_k.", ema), **below("module.encoder_q.", raw)},
        "encoder_q",
        "encoder_k",
    ),
    "plain beside wrapped": (lambda raw, ema: {**below("ema.", ema), **raw}, "", "ema"),
}


@pytest.mark.parametrize("kind", COPIES)
def test_weights_that_are_there_twice_are_named_and_chosen(tmp_path: Path, trained: Net, kind: str) -> None:
    make, first, other = COPIES[kind]
    average, path = net(3), tmp_path / "a.pt"
    torch.save(make(trained.state_dict(), average.state_dict()), path)
    fresh = net(2)
    fit = load_weights(fresh, read_checkpoint(path))
    assert same(fresh, trained)
    assert (fit.key, fit.alternatives) == (first, (other,))
    [note] = fit.notes(path)
    assert f"and {other} is not. Choose with --key" in note
    fit = load_weights(fresh, read_checkpoint(path, key=other))
    assert same(fresh, average)
    assert (fit.key, fit.notes(path)) == (other, [])
    if first:
        load_weights(fresh, read_checkpoint(path, key=first))
        assert same(fresh, trained)


def test_a_key_that_is_not_there_is_a_usage_error(tmp_path: Path, trained: Net) -> None:
    torch.save({"model": trained.state_dict(), "epoch": 3}, tmp_path / "a.pt")
    for key in ("ema", "epoch", "model.conv.weight", "", "mode"):
        with pytest.raises(UsageError, match=r"no tensors under --key .*There are tensors under model"):
            read_checkpoint(tmp_path / "a.pt", key=key)
    with pytest.raises(UsageError, match=r"begins with --strip net; the names are conv\.weight"):
        read_checkpoint(tmp_path / "a.pt", strip="net")


@pytest.mark.parametrize("wrap", ["parallel", "compiled", "averaged", "inner"])
def test_a_wrapped_model_takes_plain_and_wrapped_weights(tmp_path: Path, trained: Net, wrap: str) -> None:
    def wrapped(model: nn.Module) -> nn.Module:
        if wrap == "inner":
            model.head = nn.DataParallel(model.head)
            return model
        if wrap == "averaged":
            return torch.optim.swa_utils.AveragedModel(model)
        return nn.DataParallel(model) if wrap == "parallel" else torch.compile(model, backend="eager")

    torch.save(wrapped(copy.deepcopy(trained)).state_dict(), tmp_path / "wrapped.pt")
    assert same(reloaded(tmp_path / "wrapped.pt"), trained)
    torch.save(trained.state_dict(), tmp_path / "plain.pt")
    for name in ("plain.pt", "wrapped.pt"):
        model = wrapped(net(2))
        load_weights(model, read_checkpoint(tmp_path / name))
        values = [v for n, v in model.state_dict().items() if n != "n_averaged"]
        assert all(map(torch.equal, values, trained.state_dict().values()))


def test_what_is_no_part_of_the_network_is_left_out_and_said(tmp_path: Path, trained: Net) -> None:
    state = trained.state_dict()
    counters = {
        "total_ops": torch.zeros(1),
        "conv.total_params": torch.zeros(1),
        "n_averaged": torch.tensor(5),
    }
    cases = {
        "counters": {**state, **counters},
        "loss": {**below("model.", state), "loss_fn.weight": torch.ones(3)},
        "loss beside": {**state, "criterion.weight": torch.ones(3)},
        "projector": {
            **below("encoder.", state),
            **below("head.", {"0.w": torch.ones(3, 3), "1.b": torch.ones(2)}),
        },
        "auxiliary head": {**state, "aux1.conv.weight": torch.ones(2)},
    }
    for case, content in cases.items():
        torch.save(content, tmp_path / "a.pt")
        fresh = net(2)
        fit = load_weights(fresh, read_checkpoint(tmp_path / "a.pt"))
        assert same(fresh, trained), case
        assert len(fit.left_out) == len(content) - len(state), case
        assert (
            f"{len(fit.left_out)} tensor(s) are left out, because the network does not have them"
            in fit.notes(tmp_path)[0]
        )


def test_one_layer_of_a_network_is_not_taken_for_a_whole_one(tmp_path: Path, trained: Net) -> None:
    """Its names alone would fit any linear layer; it must be asked for."""
    torch.save(trained.state_dict(), tmp_path / "a.pt")
    message = refused(tmp_path / "a.pt", model=nn.Linear(4, 3))
    assert "unexpected" in message
    assert "--strip head. uses only these tensors" in message
    layer = nn.Linear(4, 3)
    load_weights(layer, read_checkpoint(tmp_path / "a.pt", strip="head"))
    assert torch.equal(layer.weight, trained.head.weight)


def test_a_misfit_names_the_other_tensors_of_the_file(tmp_path: Path, trained: Net) -> None:
    torch.save({"model": nn.Linear(2, 2).state_dict(), "critic": trained.state_dict()}, tmp_path / "a.pt")
    load_weights(net(2), read_checkpoint(tmp_path / "a.pt"))  # the larger
    torch.save(
        {
            "model": {f"a.{n}": v for n, v in below("b", trained.state_dict()).items()},
            "net": trained.state_dict(),
        },
        tmp_path / "b.pt",
    )
    assert "--key (net)" in refused(tmp_path / "b.pt", model=net(2))


# ---- what does not fit


def test_mismatches_name_the_tensors(tmp_path: Path, trained: Net) -> None:
    state = trained.state_dict()
    del state["bn.running_mean"], state["head.bias"]
    state["extra.weight"] = torch.ones(2)
    state["conv.weight"] = torch.ones(4, 1, 3, 3)
    torch.save({f"module.{name}": value for name, value in state.items()}, tmp_path / "a.pt")
    fresh = net(2)
    message = refused(tmp_path / "a.pt", model=fresh)
    assert "2 missing (bn.running_mean, head.bias)" in message
    assert "1 unexpected (module.extra.weight)" in message
    assert "1 of a different shape (conv.weight (4, 1, 3, 3) ≠ (4, 3, 3, 3) in the model)" in message
    assert "--model" in message
    assert same(fresh, net(2))  # nothing was copied


def test_another_number_of_classes_is_told_as_such(tmp_path: Path, trained: Net) -> None:
    state = trained.state_dict()
    state |= {f"head.{name}": torch.cat([state[f"head.{name}"]] * 2) for name in ("weight", "bias")}
    torch.save(state, tmp_path / "a.pt")
    assert "pass --num-classes 6" in refused(tmp_path / "a.pt", model=net(2))
    state["conv.weight"] = torch.ones(4, 1, 3, 3)
    torch.save(state, tmp_path / "a.pt")
    assert "--num-classes" not in refused(tmp_path / "a.pt", model=net(2))


def test_many_mismatches_are_cut_short(tmp_path: Path) -> None:
    torch.save({f"w{i}": torch.ones(1) for i in range(500)}, tmp_path / "a.pt")
    message = refused(tmp_path / "a.pt", model=net(2))
    assert "500 unexpected (w0, w1, w2, …)" in message
    assert len(message) < 1000


@pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.bool, torch.uint16])
def test_integer_weights_do_not_load(tmp_path: Path, trained: Net, dtype: torch.dtype) -> None:
    state = {**trained.state_dict(), "head.weight": torch.ones(3, 4).to(dtype)}
    torch.save(state, tmp_path / "a.pt")
    message = refused(tmp_path / "a.pt", model=net(2))
    assert f"'head.weight' is {dtype}, not floating point" in message


UNUSABLE: dict[str, tuple[Callable[[], Tensor], str]] = {
    "nan": (lambda: torch.tensor([1.0, float("nan"), float("inf")]), "has 2 NaN or infinite value(s)"),
    "half inf": (lambda: torch.tensor([1.0, 1.0, 70000.0]).half(), "has 1 NaN or infinite value(s)"),
    "fp8 nan": (lambda: torch.tensor([1.0, 1.0, float("nan")]).to(torch.float8_e4m3fn), "has 1 NaN"),
    "fp4": (lambda: torch.zeros(4, dtype=torch.uint8).view(torch.float4_e2m1fn_x2), "float4_e2m1fn_x2"),
    "complex": (lambda: torch.ones(2, dtype=torch.complex64), "is complex"),
    "meta": (lambda: torch.ones(2, device="meta"), "has no data"),
    "sparse": (lambda: torch.eye(3).to_sparse(), "is nested, sparse or quantized"),
    "expanded": (lambda: torch.ones(1).expand(10**9), "claims 1,000,000,000 values but the file holds fewer"),
}


@pytest.mark.parametrize("kind", UNUSABLE)
def test_unusable_tensors_are_named(tmp_path: Path, kind: str) -> None:
    make, reason = UNUSABLE[kind]
    torch.save({**net(1).state_dict(), "head.bias": make()}, tmp_path / "a.pt")
    with pytest.raises(CheckpointError) as caught:
        load_weights(net(2), read_checkpoint(tmp_path / "a.pt"))
    assert f"{tmp_path / 'a.pt'}: tensor 'head.bias'" in str(caught.value)
    assert reason in str(caught.value)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = nn.Linear(2, 2), nn.Linear(2, 2)
        self.other.weight = self.one.weight


def test_of_a_tied_tensor_one_name_is_enough_and_two_must_agree(tmp_path: Path) -> None:
    """safetensors' own writer, as transformers uses it, keeps one name."""
    whole = Tied()
    safetensors.torch.save_model(whole, str(tmp_path / "a.safetensors"))
    assert len(safetensors.torch.load_file(tmp_path / "a.safetensors")) == len(whole.state_dict()) - 1
    model = Tied()
    load_weights(model, read_checkpoint(tmp_path / "a.safetensors"))
    assert torch.equal(model.one.weight, whole.one.weight)
    assert model.one.weight is model.other.weight
    torch.save({**whole.state_dict(), "other.weight": whole.one.weight.detach() + 1}, tmp_path / "b.pt")
    assert "'one.weight' and 'other.weight' differ" in refused(tmp_path / "b.pt", model=Tied())


def test_a_mask_may_hold_minus_infinity_and_weights_may_not(tmp_path: Path) -> None:
    class Masked(nn.Linear):
        def __init__(self) -> None:
            super().__init__(2, 2)
            self.register_buffer("mask", torch.tensor([0.0, -math.inf]))

    model = Masked()
    torch.save(model.state_dict(), tmp_path / "a.pt")
    load_weights(Masked(), read_checkpoint(tmp_path / "a.pt"))
    Parameters(model).check_finite()
    torch.save({**model.state_dict(), "weight": torch.full((2, 2), -math.inf)}, tmp_path / "b.pt")
    assert "tensor 'weight' has 4 NaN or infinite value(s)" in refused(tmp_path / "b.pt", model=Masked())
    model.mask.fill_(math.inf)
    with pytest.raises(CheckpointError, match="tensor 'mask' of the model holds NaN or infinite"):
        Parameters(model).check_finite()


def test_names_cannot_forge_a_terminal(tmp_path: Path) -> None:
    name = "w\x1b[2J\nall is well"
    torch.save({name: torch.tensor([float("nan")])}, tmp_path / "a.pt")
    refused(tmp_path / "a.pt", model=net(2))
    torch.save({name: torch.ones(1), "x" * 10**6: torch.ones(1)}, tmp_path / "b.pt")
    assert len(refused(tmp_path / "b.pt", model=net(2))) < 1500
    torch.save({name: 3}, tmp_path / "c.pt")
    refused(tmp_path / "c.pt")


# ---- broken files (many more are in test_trust.py)


def _torch_bytes(value: Any, *, legacy: bool = False) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer, _use_new_zipfile_serialization=not legacy)
    return buffer.getvalue()


STATE = {"w": torch.arange(100.0)}


def test_missing_file(tmp_path: Path) -> None:
    assert "no such checkpoint" in refused(tmp_path / "gone.pt")


RECORD = {"model": SPEC.as_dict(), "mean": [0.5], "std": [0.2], "classes": ["a"]}
BROKEN_HEADERS: list[Any] = [
    "[" * 100_000,
    "null",
    "{}",
    3,
    json.dumps({**RECORD, "model": "6cnn"}),
    json.dumps({**RECORD, "model": {**SPEC.as_dict(), "input_shape": [float("inf")]}}),
    json.dumps({**RECORD, "mean": 0.5}),
    json.dumps({**RECORD, "mean": ["a"]}),
    json.dumps({**RECORD, "mean": [0.5, 0.5]}),
    json.dumps({**RECORD, "std": [float("nan")]}),
    json.dumps({**RECORD, "classes": 3}),
]


@pytest.mark.parametrize("header", BROKEN_HEADERS)
def test_broken_records_are_refused(tmp_path: Path, header: Any) -> None:
    """Broken specs of the network are in test_models.py."""
    torch.save({"state_dict": STATE, HEADER: header}, tmp_path / "a.pt")
    assert "its gm_probe header is broken" in refused(tmp_path / "a.pt")
    if isinstance(header, str):
        safetensors.torch.save_file(STATE, tmp_path / "a.safetensors", {HEADER: header})
        assert "its gm_probe header is broken" in refused(tmp_path / "a.safetensors")


# ---- files that would run code (many more are in test_trust.py)


class Call:
    """Unpickling it calls ``function`` with ``arguments``."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self.call


def _touch(canary: Path) -> Call:
    return Call(os.system, f"touch '{canary}'")


@pytest.mark.parametrize("legacy", [False, True])
def test_the_canary_sings_where_it_is_let(tmp_path: Path, legacy: bool) -> None:
    canary = tmp_path / "canary"
    content = _torch_bytes({"state_dict": {"x": _touch(canary)}}, legacy=legacy)
    torch.load(io.BytesIO(content), weights_only=False)
    assert canary.exists()


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning", "ignore:.torch.jit:FutureWarning")
def test_torchscript_is_refused(tmp_path: Path) -> None:
    torch.jit.script(nn.Linear(2, 2)).save(str(tmp_path / "a.pt"))
    assert "is a TorchScript program" in refused(tmp_path / "a.pt")


def test_the_refusal_names_what_it_refused_and_a_way_out(tmp_path: Path) -> None:
    torch.save({"state_dict": STATE, "args": Call(os.system, "true")}, tmp_path / "a.pt")
    message = refused(tmp_path / "a.pt")
    assert f"{os.system.__module__}.system" in message
    assert "torch.save(model.state_dict()" in message
    torch.save(net(1), tmp_path / "b.pt")
    assert f"a whole object of {Net.__module__}.Net" in refused(tmp_path / "b.pt")


def _calls(tree: ast.AST) -> list[tuple[str, ast.Call]]:
    return [(ast.unparse(node.func), node) for node in ast.walk(tree) if isinstance(node, ast.Call)]


def test_no_source_file_can_load_code() -> None:
    loads = 0
    for path in Path(gm_probe.__file__).parent.rglob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for name, call in _calls(tree):
            if name in {"torch.load", "load"} and name != "np.load":
                loads += 1
                only = {keyword.arg: keyword.value for keyword in call.keywords}.get("weights_only")
                assert isinstance(only, ast.Constant), f"{path}:{call.lineno}"
                assert only.value is True, f"{path}:{call.lineno}"
            if name == "np.load":
                allowed = {keyword.arg: keyword.value for keyword in call.keywords}.get("allow_pickle")
                assert isinstance(allowed, ast.Constant), f"{path}:{call.lineno}"
                assert allowed.value is False, f"{path}:{call.lineno}"
            banned = {
                "eval",
                "exec",
                "compile",
                "__import__",
                "yaml.load",
                "torch.jit.load",
                "torch.hub.load",
            }
            assert name not in banned, f"{path}:{call.lineno}: {name}"
        for node in ast.walk(tree):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            for name in names:
                assert name.split(".")[0] not in {"pickle", "dill", "cloudpickle", "joblib", "marshal"}, path
    assert loads == 1  # files.pickles, for checkpoints, array files and resume


# ---- a real public checkpoint


def _resnet20_file() -> Path:
    path = SHARED / "data" / "checkpoints" / "resnet20-12fca82f.th"
    if not path.exists():
        pytest.skip(f"{path} is not here; set GM_PROBE_SHARED to the folder that holds data/checkpoints")
    return path


def test_public_resnet20() -> None:
    checkpoint = read_checkpoint(_resnet20_file())
    assert all(name.startswith("module.") for name in checkpoint.state)
    buffers = ("running_mean", "running_var", "num_batches_tracked")
    weights = [value for name, value in checkpoint.state.items() if not name.endswith(buffers)]
    assert sum(value.numel() for value in weights) == 269_722
    assert checkpoint.model is None
    assert checkpoint.normalization is None
    with pytest.raises(CheckpointError, match=r"missing \(0\.weight.*unexpected \(module\.conv1\.weight"):
        load_weights(build_model(ModelSpec("6cnn", (3, 32, 32), 10)), checkpoint)


@pytest.mark.parametrize("protocol", [0, 1, 4, 5])
@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_a_pickle_of_another_protocol_names_the_way_out(tmp_path: Path, protocol: int, legacy: bool) -> None:
    path = tmp_path / "a.pt"
    torch.save(
        {"a": torch.ones(3), "b": torch.ones(3)},
        path,
        pickle_protocol=protocol,
        _use_new_zipfile_serialization=not legacy,
    )
    with pytest.raises(
        CheckpointError, match=r"Save it again with torch\.save's default pickle_protocol, which is 2"
    ):
        read_checkpoint(path)
