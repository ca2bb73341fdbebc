"""Measures of the outputs and weights alone, by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from conftest import ATTENTION, CASES, Case
from torch import Tensor, nn

from gm_probe.data.batches import Batches
from gm_probe.linalg.work import Work
from gm_probe.measures.context import MeasurementContext
from gm_probe.measures.estimates import Estimate
from gm_probe.measures.measure import measure
from gm_probe.measures.outputs import SHIFT
from gm_probe.measures.settings import Settings

OUTPUTS = [
    "mean_entropy",
    "mean_confidence",
    "input_jacobian_norm",
    "flip_rate",
    "crop_rate",
    "parameter_norm",
]


def take(model: nn.Module, x: Tensor, name: str, batch_size: int = 3, seed: int = 0) -> Estimate:
    batches = Batches.from_tensors(x, batch_size=batch_size)
    return measure(model, batches, [name], Settings(seed=seed)).rows[name]


def check_mean(found: Estimate, each: np.ndarray) -> None:
    """Exact: no estimator's error, the examples' one from their spread."""
    assert found.value == pytest.approx(each.mean(), rel=1e-12, abs=1e-15)
    assert found.stderr is None
    assert found.converged
    assert found.stderr_examples == pytest.approx(each.std(ddof=1) / math.sqrt(len(each)), rel=1e-9)


def test_entropy_and_confidence(case: Case) -> None:
    model, x, _ = case.data
    z = model(x).detach().numpy()
    p = np.exp(z) / np.exp(z).sum(1, keepdims=True)
    check_mean(take(model, x, "mean_entropy"), -(p * np.log(p)).sum(1))
    check_mean(take(model, x, "mean_confidence"), p.max(1))


def test_entropy_of_certainty_is_zero() -> None:
    model = nn.Linear(2, 2, bias=False)
    with torch.no_grad():
        model.weight.copy_(1e4 * torch.eye(2))
    assert take(model, torch.eye(2), "mean_entropy").value == 0
    assert take(model, torch.eye(2), "mean_confidence").value == 1


@pytest.mark.parametrize("case", [*CASES, ATTENTION], ids=lambda case: case.name)
def test_jacobian_norm(case: Case) -> None:
    model, x, _ = case.data
    squares = []
    for one in x:
        jacobian = torch.autograd.functional.jacobian(lambda v: model(v[None])[0].softmax(0), one)
        squares.append(float(jacobian.square().sum()))
    found = take(case.model, x, "input_jacobian_norm")
    value = math.sqrt(np.mean(squares))
    assert found.value == pytest.approx(value, rel=1e-9)
    assert found.stderr is None
    # of the root of a mean, to first order
    expected = np.std(squares, ddof=1) / math.sqrt(7) / (2 * value)
    assert found.stderr_examples == pytest.approx(expected, rel=1e-9)


def test_jacobian_of_a_constant_is_zero() -> None:
    model = nn.Linear(3, 2)
    nn.init.zeros_(model.weight)
    found = take(model, torch.eye(3), "input_jacobian_norm")
    assert (found.value, found.stderr_examples) == (0, None)


def images(height: int, width: int, count: int = 40) -> tuple[nn.Module, Tensor]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(height)
        x = torch.randn(count, 2, height, width, dtype=torch.float64)
        model = nn.Sequential(nn.Flatten(), nn.Linear(2 * height * width, 4)).double().eval()
        nn.init.normal_(model[1].weight)
    return model, x


def prediction(model: nn.Module, image: np.ndarray) -> int:
    return int(model(torch.from_numpy(image.copy())[None]).argmax())


def test_flip_rate() -> None:
    model, x = images(5, 6)
    each = np.array([prediction(model, one) != prediction(model, one[:, :, ::-1]) for one in x.numpy()])
    assert 0 < each.mean() < 1
    check_mean(take(model, x, "flip_rate"), each)


def test_flip_of_symmetric_images_changes_nothing() -> None:
    model, x = images(5, 6)
    assert take(model, x + x.flip(-1), "flip_rate").value == 0


def mirrored(index: int, size: int) -> int:
    """The pixel that stands for ``index`` beyond the border, the border pixel not repeated."""
    return -index if index < 0 else 2 * (size - 1) - index if index >= size else index


@pytest.mark.parametrize(("height", "width"), [(9, 7), (5, 8), (3, 4), (2, 6)])
def test_crop_rate(height: int, width: int) -> None:
    model, x = images(height, width)
    context = MeasurementContext(model, Batches.from_tensors(x), Settings(), Work(len(x)))
    numbers = torch.rand(len(x), 2, generator=context.generator("crop")).numpy()
    pad, each, moves = min(SHIFT, height - 1, width - 1), [], set()
    for one, (u, v) in zip(x.numpy(), numbers, strict=True):
        down, right = (int(np.float32(r) * (2 * pad + 1)) - pad for r in (u, v))
        moves.add((down, right))
        moved = np.empty_like(one)
        for i in range(height):
            for j in range(width):
                moved[:, i, j] = one[:, mirrored(i + down, height), mirrored(j + right, width)]
        each.append(prediction(model, one) != prediction(model, moved))
    assert {abs(d) for move in moves for d in move} == set(range(pad + 1))
    assert 0 < np.mean(each) < 1
    check_mean(take(model, x, "crop_rate"), np.array(each))


def test_crop_of_even_images_changes_nothing() -> None:
    model, _ = images(9, 7)
    x = torch.linspace(-1, 1, 80, dtype=torch.float64).view(40, 2, 1, 1).expand(-1, -1, 9, 7)
    assert take(model, x, "crop_rate").value == 0


def test_crops_hang_on_the_seed_alone() -> None:
    model, x = images(9, 7, count=400)
    one, other, again = (take(model, x, "crop_rate", seed=seed).value for seed in (0, 1, 0))
    assert one == again
    assert one != other


@pytest.mark.parametrize("name", OUTPUTS)
def test_batch_size_does_not_matter(name: str) -> None:
    model, x = images(9, 7)
    one, *others = (take(model, x, name, batch_size=size) for size in (40, 1, 7, 64))
    for other in others:
        assert other.value == pytest.approx(one.value, rel=1e-12)
        if name != "parameter_norm":
            assert other.stderr_examples == pytest.approx(one.stderr_examples, rel=1e-9)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("input_jacobian_norm", "the inputs are integers, so they have no derivative"),
        ("flip_rate", "the inputs are not images"),
        ("crop_rate", "the inputs are not images"),
    ],
)
def test_integer_inputs_have_none_and_a_reason(name: str, reason: str) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Embedding(5, 3), nn.Flatten(), nn.Linear(12, 3)).eval()
        tokens = torch.randint(0, 5, (9, 4))
    found = take(model, tokens, name)
    assert (found.value, found.converged, found.details["reason"]) == (None, False, reason)
    assert take(model, tokens, "mean_entropy").value > 0
    assert take(model, tokens, "fisher_trace").value > 0


@pytest.mark.parametrize("name", ["flip_rate", "crop_rate"])
def test_inputs_that_are_no_images(name: str) -> None:
    case = CASES[0]
    found = take(case.model, case.data[1], name)
    assert (found.value, found.details["reason"]) == (None, "the inputs are not images")
