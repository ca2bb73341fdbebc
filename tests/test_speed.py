"""Choices by trial: they change time and memory, never a figure."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from unittest.mock import Mock

import pytest
import torch
from torch import nn

from gm_probe.core.batches import BATCH_SIZE, Batches
from gm_probe.core.datasets import Examples
from gm_probe.core.errors import UsageError
from gm_probe.core.parameters import Parameters
from gm_probe.probe import operators, speed
from gm_probe.probe.measures import measure
from gm_probe.probe.speed import bytes_an_example, clearly_faster, fastest_layout, within


def small_cnn() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(8 * 36, 5)
        ).eval()


def images(count: int) -> torch.Tensor:
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def busy(seconds: float, calls: list[float]) -> Callable[[], None]:
    def way() -> None:
        calls.append(seconds)
        end = time.process_time() + seconds
        while time.process_time() < end:
            pass

    return way


def test_only_a_clear_win_counts() -> None:
    device = torch.device("cpu")
    slow, quick, brief = 0.2, 0.05, 0.001
    assert clearly_faster(busy(quick, []), busy(slow, []), device)
    assert not clearly_faster(busy(slow, []), busy(slow, []), device)
    assert not clearly_faster(busy(slow, []), busy(quick, []), device)
    calls: list[float] = []
    assert not clearly_faster(busy(0, calls), busy(brief, []), device)
    assert not calls  # what is brief anyway is not worth a trial


@pytest.mark.parametrize("win", [True, False])
def test_layout_is_the_faster_one_and_the_model_computes_the_same(
    monkeypatch: pytest.MonkeyPatch, win: bool
) -> None:
    monkeypatch.setattr(speed, "clearly_faster", lambda other, usual, device: bool(other() or usual() or win))
    model, x = small_cnn(), images(4)
    before = copy.deepcopy(model)
    found = fastest_layout(model, x)
    assert found == (torch.contiguous_format if win else torch.channels_last)
    weight = model[0].weight  # type: ignore[index]
    assert weight.is_contiguous(memory_format=found)
    assert not model.training
    for (name, a), b in zip(model.state_dict().items(), before.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    assert torch.allclose(model(x), before(x), atol=1e-5)


def test_bytes_an_example_by_hand() -> None:
    """Of Linear → ReLU → Linear: the input, the hidden layer (ReLU and weight share it), the log-probabilities."""
    model = nn.Sequential(nn.Linear(10, 20), nn.ReLU(), nn.Linear(20, 3)).eval()
    x = torch.randn(6, 10)
    assert bytes_an_example(model, x) == 4 * (10 + 20 + 3)
    assert bytes_an_example(model, x[:2]) == bytes_an_example(model, x)
    assert bytes_an_example(model.double(), x.double()) == 8 * (10 + 20 + 3)


def test_weights_are_no_share_of_an_example() -> None:
    """Frozen ones neither: of Linear → ReLU → frozen Linear → Linear the input, both hidden layers, log p."""
    model = nn.Sequential(nn.Linear(10, 20), nn.ReLU(), nn.Linear(20, 30), nn.Linear(30, 3)).eval()
    model[2].requires_grad_(False)
    assert bytes_an_example(model, torch.randn(6, 10)) == 4 * (10 + 20 + 30 + 3)


def test_a_model_that_keeps_nothing_takes_any_batch() -> None:
    model = nn.Linear(10, 3).requires_grad_(False)
    model.unused = nn.Linear(2, 2)
    batches = Batches.from_tensors(torch.randn(6, 10))
    assert within(1000, model, batches).batch_size == BATCH_SIZE


def test_batch_size_follows_the_memory() -> None:
    model, x = small_cnn(), images(4)
    batches = Batches.from_tensors(x)
    one = bytes_an_example(model, next(iter(batches)).x)
    assert batches.batch_size == within(1e12, model, batches).batch_size == BATCH_SIZE
    assert within(speed.TAPES * one * 37.5, model, batches).batch_size == 37
    assert within(10, model, batches).batch_size == 1


def test_measuring_takes_no_more_than_the_memory_unless_a_size_is_given() -> None:
    model, x = small_cnn(), images(8)
    laid_out = next(iter(Batches.from_tensors(x))).x
    memory = speed.TAPES * bytes_an_example(model, laid_out) * 3.5

    def size(names: list[str], **options: int) -> int:
        report = measure(model, Batches.from_tensors(x, **options), names, memory=memory)
        return report.batch_size

    assert size(["fisher_lambda_max"]) == 3
    assert size(["fisher_lambda_max"], batch_size=5) == 5
    assert size(["mean_entropy"]) == BATCH_SIZE  # a forward pass keeps nothing


def test_batches_whose_size_belongs_to_the_measure_are_left() -> None:
    batches = Batches(Examples(images(BATCH_SIZE), None, (), "x"), coupled=True)
    assert measure(small_cnn(), batches, ["fisher_lambda_max"], memory=1).batch_size == BATCH_SIZE


def test_no_memory_for_the_trial(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed, "bytes_an_example", Mock(side_effect=torch.OutOfMemoryError("out of memory")))
    assert within(1e9, small_cnn(), Batches.from_tensors(images(8))).batch_size == 1


def test_a_model_without_gradients_is_told_by_what_needs_them() -> None:
    class Hidden(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = small_cnn()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.from_numpy(self.inner(x).numpy())

    batches = Batches.from_tensors(images(8))
    assert within(1, Hidden(), batches).batch_size == BATCH_SIZE
    with pytest.raises(UsageError, match="cannot be differentiated by its parameters"):
        measure(Hidden(), batches, ["fisher_lambda_max"])


def test_the_slower_product_gives_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever way is taken, the product and the terms are the same."""
    model, x = small_cnn().double(), images(6).double()
    y = torch.arange(6) % 5
    batches = Batches(Examples(x, y, (), "t"), batch_size=4, dtype=torch.float64)
    parameters = Parameters(model)
    v = torch.randn(parameters.size, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    results = []
    for win in (True, False):
        trial = Mock(return_value=win)
        monkeypatch.setattr(operators, "clearly_faster", trial)
        operator = operators.hessian(parameters, batches, y)
        results.append((operator.matvec(v), operator.terms(v)))
        operator.matvec(v)
        assert trial.call_count == 2  # once for the product, once for the terms
    for a, b in zip(*results, strict=True):
        assert torch.allclose(a, b, rtol=1e-9)
        assert not torch.equal(a, b)  # the two ways round differently: the choice was followed
