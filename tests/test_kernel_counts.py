"""Passes launch few kernels, copy weights once a pass rather than once a batch, and never wait for the device."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from gm_probe.errors import UsageError
from gm_probe.models.parameters import Parameters, as_measured

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
from kernel_counts import Operations, counted, passes

N = 8


def network() -> nn.Module:
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for width in (3, 4, 4, 4):
        layers += [nn.Conv2d(width, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.ReLU()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(4 * 36, 5)).eval()


def counts(batch_size: int) -> dict[str, Operations]:
    model, x, y = network(), torch.randn(N, 3, 6, 6), torch.arange(N) % 5
    with as_measured(model):
        return {name: counted(run) for name, run in passes(model, x, y, batch_size).items()}


@pytest.fixture(scope="module")
def whole() -> dict[str, Operations]:
    return counts(N)


@pytest.fixture(scope="module")
def cut() -> dict[str, Operations]:
    return counts(N // 4)


@pytest.mark.parametrize(("name", "extra"), [("KL gradient", 135), ("KL", 45), ("F v", 20), ("H v", 120)])
def test_a_pass_adds_a_constant_number_of_kernels(
    whole: dict[str, Operations], name: str, extra: int
) -> None:
    """The divergence itself takes some; no kernel may be added for each parameter tensor."""
    layers = {"KL gradient": 1.0, "KL": 1.0, "F v": 3.0, "H v": 4.5}[name]
    assert whole[name].kernels <= layers * whole["plain"].kernels + extra


@pytest.mark.parametrize("name", ["KL gradient", "KL", "F v", "H v"])
def test_the_host_never_waits(cut: dict[str, Operations], name: str) -> None:
    assert cut[name].reads == 0


@pytest.mark.parametrize("name", ["KL gradient", "KL", "F v"])
def test_weights_and_buffers_are_copied_once_a_pass(
    whole: dict[str, Operations], cut: dict[str, Operations], name: str
) -> None:
    """Four batches copy their inputs and join their gradients; they do not copy 15 tensors and 12 buffers each."""
    more = cut[name].copies - whole[name].copies
    assert more <= 3 * 12


def test_a_training_step_waits_for_nothing() -> None:
    """Noise that is drawn on the CPU is one wait: torch has no generator for the simulated device."""
    script = Path(__file__).parents[1] / "benchmarks" / "kernel_counts.py"
    command = [sys.executable, str(script), "--steps", "mlp-8"]
    printed = subprocess.run(command, check=True, capture_output=True, text=True, timeout=300).stdout
    table = [[cell.strip() for cell in line.split("|")[1:-1]] for line in printed.splitlines()[2:]]
    found = {name: (float(uploads), float(waits)) for name, _, uploads, waits in table}
    assert found == {
        "sgd": (1, 0),
        "sam": (1, 0),
        "iam-d": (1, 1),
        "fixmatch": (3, 0),
        "fixmatch, iam-d": (3, 1),
        "simclr": (4, 0),
    }


def test_a_buffer_that_forward_writes_to_starts_afresh_in_every_batch() -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(2, 2)
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.calls += 1
            return self.layer(x) * self.calls

    parameters, x = Parameters(Counting().eval()), torch.ones(1, 2)
    theta = parameters.vector()
    with torch.no_grad(), parameters.one_pass():
        first, *others = (parameters.logits(x, theta) for _ in range(3))
    assert all(torch.equal(first, other) for other in others)
    assert float(parameters.model.calls) == 0


def test_a_parameter_that_forward_writes_to_is_copied_for_every_batch() -> None:
    model = nn.Sequential(nn.Embedding(3, 4, max_norm=0.5), nn.Flatten(), nn.Linear(8, 2)).eval()
    parameters, x = Parameters(model), torch.tensor([[0, 1]])
    before = parameters.vector()
    parameters.logits(x)
    theta = parameters.vector()
    parameters.logits(x, theta)
    assert torch.equal(theta, before)
    assert torch.equal(parameters.vector(), before)


def test_a_model_that_writes_to_its_parameters_on_some_inputs_is_refused() -> None:
    class Sometimes(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if float(x.sum()) > 0:
                with torch.no_grad():
                    self.weight.mul_(0.5)
            return super().forward(x)

    parameters, x = Parameters(Sometimes(2, 2).eval()), torch.ones(1, 2)
    theta = parameters.vector()
    parameters.logits(-x)
    with (
        torch.no_grad(),
        pytest.raises(UsageError, match="writes to the model's parameters on some inputs only"),
    ):
        parameters.logits(x, theta)
    assert not torch.equal(parameters.vector(), theta), "the copy was written to, not the model"
    assert torch.equal(parameters.logits(x), parameters.logits(x))
