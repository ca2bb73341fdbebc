"""Which devices are taken, where a model and its data must be, and what this process does with its memory.

What runs on a second device is seen in test_simulated_device.py.
"""

import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from gm_probe.curvature.operators import fisher
from gm_probe.data.batches import Batches
from gm_probe.errors import DeviceError, ProbeError, ResourceError, UsageError
from gm_probe.files.atomic import read_toml
from gm_probe.measures.measure import measure
from gm_probe.measures.settings import Settings
from gm_probe.models.parameters import Parameters
from gm_probe.runs.records import CONFIG
from gm_probe.runtime.devices import (
    deterministic,
    generator_state,
    named_device,
    pick_device,
    set_generator_state,
)
from gm_probe.runtime.machine import environment
from gm_probe.training.config import TrainConfig
from gm_probe.training.loop import train
from gm_probe.training.methods import METHODS
from gm_probe.training.rule import Rule
from gm_probe.training.state import random_state, set_random_state

FAULTS = """
import resource, torch
from gm_probe.runtime.machine import keep_freed_memory

def faults():
    for _ in range(20):  # until the allocator has settled
        torch.ones(2**24)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(5):
        torch.ones(2**24)  # 64 MiB, 16,384 pages
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

print(faults(), keep_freed_memory(), faults())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's allocator only")
def test_freed_memory_is_kept() -> None:
    """The kernel counts the pages that it had to hand out again."""
    done = subprocess.run([sys.executable, "-c", FAULTS], capture_output=True, text=True, check=True)
    default, set_, kept = done.stdout.split()
    assert set_ == "True"
    assert int(default) > 1000  # else there is nothing to keep, and the function can go
    assert int(kept) < 100


# ---- which devices


@pytest.mark.parametrize(
    ("name", "kind", "words"),
    [
        ("mps", UsageError, ["mps", "float64", "--device cpu"]),
        ("meta", UsageError, ["meta", "no values"]),
        ("xpu", ResourceError, ["xpu", "--device cpu"]),
        ("hpu", ResourceError, ["hpu", "--device cpu"]),
        ("xla", ResourceError, ["xla", "--device cpu"]),
        ("cuda:99", ResourceError, ["cuda:99", "--device cpu"]),
        ("cdua", UsageError, ["'cuda'"]),
        ("gpu", UsageError, ["no device 'gpu'"]),
        ("accelerator", UsageError, ["accelerator", "another that torch knows"]),
    ],
)
def test_what_cannot_be_computed_on_is_refused_in_one_line(
    name: str, kind: type[ProbeError], words: list[str]
) -> None:
    with pytest.raises(kind) as raised:
        pick_device(name)
    text = str(raised.value)
    assert all(word in text for word in words)
    assert "\n" not in text
    assert len(text) < 250


def test_any_device_of_torchs_has_a_name() -> None:
    assert [named_device(name).type for name in ("cpu", "cuda:1", "xpu", "mtia")] == [
        "cpu",
        "cuda",
        "xpu",
        "mtia",
    ]
    assert pick_device("cpu") == pick_device("auto") or torch.cuda.is_available()


def test_training_refuses_a_device_by_name(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="device mps lacks float64"):
        train(TrainConfig(model="mlp-4", num_train=20, device="mps"), tmp_path / "run")


def test_the_cpu_has_no_generator_beside_torchs_own() -> None:
    cpu = torch.device("cpu")
    assert generator_state(cpu) is None
    set_generator_state(None, cpu)
    state = random_state(cpu)
    expected = torch.rand(3)
    set_random_state(state, cpu)
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("recorded", [{}, {"xpu": torch.zeros(16, dtype=torch.uint8)}])
def test_a_state_of_another_device_sets_what_it_can(recorded: dict[str, Tensor]) -> None:
    cpu = torch.device("cpu")
    state = random_state(cpu) | recorded
    expected = torch.rand(3)
    set_random_state(state, cpu)
    assert torch.equal(torch.rand(3), expected)


def test_the_precision_is_recorded(tmp_path: Path) -> None:
    assert environment(torch.device("cpu"))["tf32"] is False
    settings = {"model": "mlp-4", "num_train": 20, "num_test": 10, "num_unlabeled": 10, "epochs": 1}
    for tf32 in (False, True):
        config = TrainConfig.from_dict({**settings, "tf32": tf32, "device": "cpu"})
        train(config, tmp_path / str(tf32))
        record = read_toml(tmp_path / str(tf32) / CONFIG)
        assert record["tf32"] is record["environment"]["tf32"] is tf32
    assert "tf32" not in TrainConfig().identity()  # runs of before are the same runs


class Watchful(nn.Module):
    """It notes in which precision its convolutions would be on a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.seen = nn.Linear(64, 10), set[str]()

    def forward(self, x: Tensor) -> Tensor:
        self.seen.add(torch.backends.cudnn.conv.fp32_precision)
        return self.layer(x.flatten(1))


@pytest.mark.parametrize(("tf32", "seen"), [(False, {"ieee"}), (True, {"ieee", "tf32"})])
def test_a_run_trains_in_the_precision_that_it_names_and_measures_in_float32(
    tf32: bool, seen: set[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Watchful()
    monkeypatch.setattr("gm_probe.training.run.initial_model", lambda spec, seed: model)
    settings = {"num_train": 20, "num_test": 10, "num_unlabeled": 10, "epochs": 1, "device": "cpu"}
    train(
        TrainConfig.from_dict({**settings, "method": "iam-d", "tf32": tf32, "track_every": 1}),
        tmp_path / "run",
    )
    assert model.seen == seen


@pytest.mark.parametrize(("tf32", "seen"), [(False, "ieee"), (True, "tf32")])
def test_a_measurement_is_taken_in_the_precision_that_it_names(tf32: bool, seen: str) -> None:
    model = Watchful()
    report = measure(model, torch.randn(4, 64), ["mean_entropy", "fisher_trace"], Settings(tf32=tf32))
    # looking at the layout and at the derivatives stays in float32
    assert seen in model.seen
    assert model.seen <= {"ieee", seen}
    assert report.as_dict(checkpoint="", model="")["settings"]["tf32"] is tf32


# ---- model and data in one place


def test_batches_go_where_the_model_is() -> None:
    x = torch.randn(4, 3)
    batches = Batches.from_tensors(x)
    there = batches.on(torch.device("meta"))
    assert next(iter(there)).x.is_meta
    assert torch.equal(next(iter(batches)).x, x)
    assert batches.on(torch.device("cpu")) is batches
    away = Batches.from_tensors(x).on(torch.device("meta"))
    model = nn.Linear(3, 2)
    assert measure(model, away, ["mean_entropy"]) == measure(model, batches, ["mean_entropy"])
    parameters = Parameters(model)
    logits = model(x).detach()
    v = torch.ones(parameters.size)
    model.eval()
    assert torch.equal(
        fisher(parameters, away, logits).matvec(v), fisher(parameters, batches, logits).matvec(v)
    )


def test_a_model_on_two_devices_is_refused_by_name() -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2, device="meta"))
    with pytest.raises(UsageError, match=r"parameter '1.weight' is on meta and '0.weight' on cpu"):
        measure(model, Batches.from_tensors(torch.randn(4, 3)))


def test_a_model_without_values_is_refused() -> None:
    with pytest.raises(UsageError, match="device meta holds no values"):
        measure(nn.Linear(3, 2, device="meta"), Batches.from_tensors(torch.randn(4, 3)))


class Elsewhere(nn.Module):
    """Its forward, or what differentiates it, meets a tensor of another device."""

    def __init__(self, when: str) -> None:
        super().__init__()
        self.layer, self.when = nn.Linear(3, 4), when

    def forward(self, x: Tensor) -> Tensor:
        z = self.layer(x)
        if self.when == "forward" or (self.when == "gradient" and torch.is_grad_enabled()):
            return z + torch.ones(4, device="meta")
        return z


@pytest.mark.parametrize("when", ["forward", "gradient"])
@pytest.mark.parametrize(
    "name", ["fisher_lambda_max", "fisher_trace", "hessian_trace", "local_inconsistency"]
)
def test_no_layer_and_no_example_is_blamed_for_a_device(when: str, name: str) -> None:
    batches = Batches.from_tensors(torch.randn(9, 3))
    with pytest.raises(DeviceError, match="tensors are on two devices") as raised:
        measure(Elsewhere(when), batches, [name])
    assert not any(word in str(raised.value) for word in ("replace that layer", "leave out"))


@pytest.mark.parametrize("method", METHODS)
def test_a_rule_says_where_its_batch_and_its_model_are(method: str) -> None:
    x, y = torch.randn(6, 3), torch.randint(0, 4, (6,))
    with pytest.raises(
        DeviceError, match=r"x is on cpu, y is on cpu, the model is on cpu\. .* the criterion's tensors"
    ):
        METHODS[method](Elsewhere("gradient")).backward(x, y)


# ---- recurrent layers


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.RNNBase] | None) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 4) if kind is None else kind(3, 4, batch_first=True)
        self.head, self.seen = nn.Linear(4, 3), set[bool]()

    def forward(self, x: Tensor) -> Tensor:
        self.seen.add(torch.backends.cudnn.enabled)
        hidden = self.layer(x)
        return self.head((hidden[0] if isinstance(hidden, tuple) else hidden)[:, -1])


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize(
    ("kind", "seen"), [(nn.LSTM, {False}), (nn.GRU, {False}), (nn.RNN, {False}), (None, {True})]
)
def test_recurrent_layers_run_without_cudnn(kind: type[nn.RNNBase] | None, seen: set[bool]) -> None:
    """It differentiates none in eval mode; other networks keep it, and the caller's setting stands after."""
    model = Recurrent(kind)
    x, y = torch.randn(6, 5, 3), torch.randint(0, 3, (6,))
    names = [
        "fisher_lambda_max",
        "fisher_trace",
        "hessian_lambda_max",
        "hessian_trace",
        "local_inconsistency",
    ]
    report = measure(model, Batches.from_tensors(x, y), names, Settings(num_starts=2, max_probes=4))
    assert all(row.value is not None for row in report.rows.values())
    assert model.seen == seen
    for method in METHODS.values():
        rule: Rule = method(model)
        rule.backward(x, y)
    assert model.seen == seen
    assert torch.backends.cudnn.enabled


def test_cudnn_is_on_again_where_a_recurrent_network_fails() -> None:
    model = Recurrent(nn.GRU)
    with pytest.raises(RuntimeError):
        Parameters(model).logits(torch.randn(6, 5, 2))
    assert torch.backends.cudnn.enabled


@pytest.mark.parametrize(("strict", "warn"), [(False, False), (True, False), (True, True)])
@pytest.mark.parametrize("enabled", [False, True])
def test_determinism_is_left_as_the_caller_has_it(strict: bool, warn: bool, enabled: bool) -> None:
    """Also where the caller asked for warnings instead of errors."""
    before = torch.get_deterministic_debug_mode()
    try:
        torch.use_deterministic_algorithms(strict, warn_only=warn)
        callers = torch.get_deterministic_debug_mode()
        with deterministic(enabled):
            assert torch.get_deterministic_debug_mode() == (2 if enabled else callers)
        assert torch.get_deterministic_debug_mode() == callers
    finally:
        torch.set_deterministic_debug_mode(before)
