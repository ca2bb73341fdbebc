"""Batch sizes within a memory budget; the same bits whatever else the machine does."""

from __future__ import annotations

import itertools
import time
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook

from gm_probe.curvature import batch_size
from gm_probe.curvature.batch_size import batches_within, bytes_an_example
from gm_probe.data.batches import BATCH_SIZE, Batches
from gm_probe.data.examples import Examples
from gm_probe.data.normalization import Normalization
from gm_probe.errors import UsageError
from gm_probe.measures.measure import measure
from gm_probe.measures.settings import Settings
from gm_probe.measuring.checkpoint import measure_checkpoint
from gm_probe.models.networks import cnn6


def small_cnn() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(8 * 36, 5)
        ).eval()


def images(count: int) -> torch.Tensor:
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def test_bytes_an_example_by_hand() -> None:
    """Of Linear → ReLU → Linear: the input, the hidden layer (ReLU and weight share it), logits, log-probabilities."""
    model = nn.Sequential(nn.Linear(10, 20), nn.ReLU(), nn.Linear(20, 3)).eval()
    x = torch.randn(6, 10)
    assert bytes_an_example(model, x) == 4 * (10 + 20 + 3 + 3)
    assert bytes_an_example(model, x[:2]) == bytes_an_example(model, x)
    assert bytes_an_example(model.double(), x.double()) == 8 * (10 + 20 + 3 + 3)


def test_weights_are_no_share_of_an_example() -> None:
    """Frozen ones neither: of Linear → ReLU → frozen Linear → Linear the input, both hidden layers, logits, log p."""
    model = nn.Sequential(nn.Linear(10, 20), nn.ReLU(), nn.Linear(20, 30), nn.Linear(30, 3)).eval()
    model[2].requires_grad_(False)
    assert bytes_an_example(model, torch.randn(6, 10)) == 4 * (10 + 20 + 30 + 3 + 3)


def test_a_model_that_keeps_nothing_takes_any_batch() -> None:
    model = nn.Linear(10, 3).requires_grad_(False)
    model.unused = nn.Linear(2, 2)
    batches = Batches.from_tensors(torch.randn(6, 10))
    assert batches_within(1000, model, batches).batch_size == BATCH_SIZE


def test_batch_size_follows_the_memory() -> None:
    model, x = small_cnn(), images(4)
    batches = Batches.from_tensors(x)
    one = bytes_an_example(model, next(iter(batches)).x)
    assert batches.batch_size == batches_within(1e12, model, batches).batch_size == BATCH_SIZE
    assert batches_within(batch_size.PRODUCT * one * 37.5, model, batches).batch_size == 37
    assert batches_within(10, model, batches).batch_size == 1


def test_measuring_takes_no_more_than_the_memory_unless_a_size_is_given() -> None:
    model, x = small_cnn(), images(8)
    laid_out = next(iter(Batches.from_tensors(x))).x
    memory = batch_size.PRODUCT * bytes_an_example(model, laid_out) * 3.5

    def size(names: list[str], **options: int) -> int:
        report = measure(model, Batches.from_tensors(x, **options), names, memory=memory)
        return report.batch_size

    assert size(["fisher_lambda_max"]) == 3
    assert size(["fisher_lambda_max"], batch_size=5) == 5
    assert size(["mean_entropy"]) == BATCH_SIZE  # a forward pass keeps nothing


def test_batches_whose_size_belongs_to_the_measure_are_left() -> None:
    batches = Batches(Examples(images(BATCH_SIZE), None, (), "x"), batch_dependent=True)
    assert measure(small_cnn(), batches, ["fisher_lambda_max"], memory=1).batch_size == BATCH_SIZE


def test_a_busy_machine_changes_no_bit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Neither clocks that jump nor layers that are slow in one memory format choose what is computed."""
    checkpoint = tmp_path / "6cnn.pt"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        torch.save(cnn6(3, 16, 16, 4).state_dict(), checkpoint)
        x = torch.randint(0, 256, (6, 3, 16, 16), dtype=torch.uint8)
    examples = Examples(x, torch.arange(6) % 4, tuple("abcd"), "x")

    def measured() -> dict[str, Any]:
        return measure_checkpoint(
            checkpoint,
            examples,
            ["hessian_lambda_max", "hessian_trace", "fisher_lambda_max", "local_inconsistency"],
            Settings(num_starts=2, max_iterations=6),
            model_name="6cnn",
            normalization=Normalization((0.5,) * 3, (0.25,) * 3),
        )

    def slow(module: nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        if isinstance(module, nn.Conv2d) and not args[0].is_contiguous():
            time.sleep(0.02)

    idle = measured()
    jumps = itertools.accumulate(itertools.cycle([0.001, 5.0, 0.3]))
    for clock in ("perf_counter", "process_time", "monotonic"):
        monkeypatch.setattr(time, clock, lambda: next(jumps))
    handle = register_module_forward_hook(slow)
    try:
        busy = measured()
    finally:
        handle.remove()
    assert busy == idle
    assert idle["measures"]["hessian_lambda_max"]["num_evals"] > 6 * 3


def test_no_memory_for_the_trial(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        batch_size, "bytes_an_example", Mock(side_effect=torch.OutOfMemoryError("out of memory"))
    )
    assert batches_within(1e9, small_cnn(), Batches.from_tensors(images(8))).batch_size == 1


def test_a_model_without_gradients_is_told_by_what_needs_them() -> None:
    class Hidden(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = small_cnn()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.from_numpy(self.inner(x).numpy())

    batches = Batches.from_tensors(images(8))
    assert batches_within(1, Hidden(), batches).batch_size == BATCH_SIZE
    with pytest.raises(UsageError, match="cannot be differentiated with respect to its parameters"):
        measure(Hidden(), batches, ["fisher_lambda_max"])
