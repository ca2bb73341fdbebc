"""Scores of outputs against their definitions by other libraries, by hand, and in float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment, linprog
from torch import Tensor, nn
from torch.nn import functional

from gm_probe.accuracy.predictions import Predictions, predict
from gm_probe.accuracy.scores import scores_of
from gm_probe.data.batches import Batches
from gm_probe.measures.last_layer import POWER
from gm_probe.measures.scores import (
    Reference,
    atc_threshold,
    effective_invariance,
    fitted_temperature,
    mano,
    negative_entropy,
    nuclear_norm,
)
from gm_probe.measures.transport import transport


def outputs(rows: int, classes: int, scale: float, seed: int = 0) -> Tensor:
    return (scale * torch.randn(rows, classes, generator=torch.Generator().manual_seed(seed))).softmax(1)


@pytest.mark.parametrize(("rows", "classes", "scale"), [(30, 3, 1.0), (60, 5, 3.0), (200, 10, 8.0)])
def test_transport_is_the_best_assignment(rows: int, classes: int, scale: float) -> None:
    p = outputs(rows, classes, scale)
    columns = np.repeat(np.arange(classes), rows // classes)
    profit = p.double().numpy()[:, columns]
    best = profit[linear_sum_assignment(profit, maximize=True)].mean()
    assert transport(p, torch.full((classes,), 1 / classes)) == pytest.approx(best, abs=1e-5)


def test_transport_solves_the_linear_program_of_any_shares_and_weights() -> None:
    rows, classes = 40, 4
    p, shares = outputs(rows, classes, 2.0), torch.tensor([0.55, 0.25, 0.17, 0.03], dtype=torch.float64)
    weights = torch.rand(rows, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    mass = (weights / weights.sum()).numpy()
    of_rows = np.kron(np.eye(rows), np.ones(classes))
    of_classes = np.kron(np.ones(rows), np.eye(classes))
    solved = linprog(
        -p.double().numpy().ravel(),
        A_eq=np.vstack([of_rows, of_classes]),
        b_eq=np.concatenate([mass, shares.numpy()]),
    )
    assert transport(p, shares, weights) == pytest.approx(-solved.fun, abs=1e-5)


def test_transport_of_certain_outputs_counts_those_in_their_place() -> None:
    p = functional.one_hot(torch.tensor([0] * 8 + [1] * 2), 2).float()
    assert transport(p, torch.tensor([0.5, 0.5])) == pytest.approx(0.7, abs=1e-4)


def test_nuclear_norm_by_singular_values() -> None:
    for rows, columns in ((50, 7), (5, 9)):
        p = outputs(rows, columns, 3.0)
        expected = np.linalg.norm(p.double().numpy(), "nuc") / math.sqrt(min(rows, columns) * rows)
        assert nuclear_norm(p) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("scale", [0.5, 40.0])
def test_mano_by_its_formula(scale: float) -> None:
    z = scale * torch.randn(30, 6, generator=torch.Generator().manual_seed(0))
    x = z.double().numpy()
    p = np.exp(x - x.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    spread = -np.log(p).mean()
    assert (spread > 5) == (scale > 1)  # both branches are taken
    q = p if spread > 5 else 1 + x + x**2 / 2
    q = q / q.sum(1, keepdims=True)
    assert mano(z) == pytest.approx((q**4).mean() ** 0.25, rel=1e-9)


def test_atc_by_hand() -> None:
    scores = torch.tensor([0.9, 0.3, 0.7, 0.5, 0.6])
    right = torch.tensor([True, False, True, False, True])
    threshold = atc_threshold(scores, right)
    assert threshold == pytest.approx(0.6)  # two of five lie below, as two are wrong
    assert float((scores >= threshold).double().mean()) == pytest.approx(0.6)
    assert atc_threshold(scores, torch.zeros(5, dtype=torch.bool)) == math.inf


def test_effective_invariance_by_hand() -> None:
    p = torch.tensor([[0.9, 0.1], [0.2, 0.8], [0.6, 0.4]])
    mirrored = torch.tensor([[0.4, 0.6], [0.5, 0.5 + 1e-9], [0.7, 0.3]])
    found = float(effective_invariance(p, mirrored).mean())
    tie = math.sqrt(0.8 * 0.5) if int(mirrored[1].argmax()) == 1 else 0.0
    assert found == pytest.approx((tie + math.sqrt(0.6 * 0.7)) / 3, rel=1e-6)


def test_temperature_is_that_of_the_labels() -> None:
    generator = torch.Generator().manual_seed(0)
    z = 2 * torch.randn(20000, 4, generator=generator)
    labels = torch.multinomial((z / 3).softmax(1), 1, generator=generator)[:, 0]
    assert fitted_temperature(z, labels) == pytest.approx(3, rel=0.08)


def test_scores_of_the_validation_set_itself_are_its_accuracy() -> None:
    generator = torch.Generator().manual_seed(0)
    z = 2 * torch.randn(400, 5, generator=generator)
    labels = torch.multinomial(z.softmax(1), 1, generator=generator)[:, 0]
    reference = Reference.of(z, labels)
    accuracy = float((z.argmax(1) == labels).double().mean())
    p = (z / reference.temperature).softmax(1)
    found = scores_of(_predictions(z), reference, None, 0.5)
    assert found["doc"] == pytest.approx(accuracy)
    assert found["atc"] == pytest.approx(accuracy)
    assert found["atc_entropy"] == pytest.approx(accuracy)
    assert found["average_confidence"] == pytest.approx(float(p.amax(1).double().mean()))
    assert found["agreement"] == 0.5
    assert "cot" not in found
    entropy = -(p.double() * p.double().log()).sum(1)
    assert torch.allclose(-negative_entropy(p).double(), entropy, atol=1e-5)


def test_scores_that_depend_on_the_size_are_means_over_parts_of_it() -> None:
    z = torch.randn(25, 3, generator=torch.Generator().manual_seed(0))
    shares = torch.full((3,), 1 / 3)
    order = torch.randperm(25, generator=torch.Generator().manual_seed(7))
    order = torch.cat([order, order[:5]])
    parts = [scores_of(Predictions(z[order[i : i + 10]]), None, shares) for i in (0, 10, 20)]
    whole = scores_of(Predictions(z), None, shares)
    found = scores_of(Predictions(z), None, shares, size=10, seed=7)
    for name in ("cot", "nuclear_norm"):
        assert found[name] == pytest.approx(sum(part[name] for part in parts) / 3)
    assert {name for name in whole if whole[name] != found[name]} == {"cot", "nuclear_norm"}


def test_without_labels_there_is_what_needs_none() -> None:
    found = scores_of(_predictions(torch.randn(30, 3)), None, None)
    assert set(found) == {"average_confidence", "nuclear_norm", "mano"}


def _predictions(z: Tensor) -> object:
    class Constant(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(()))

        def forward(self, x: Tensor) -> Tensor:
            return x * self.scale

    return predict(Constant(), Batches.from_tensors(z, batch_size=17))


def test_sums_over_the_last_layer_by_autograd() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))
    x = torch.randn(50, 4)
    found = predict(model, Batches.from_tensors(x, batch_size=16))
    assert torch.equal(found.logits, model(x).detach())
    classes = found.classes
    functional.cross_entropy(model(x), classes).backward()
    gradient = model[2].weight.grad.abs().double()
    assert found.gradient_norm == pytest.approx(float(gradient.pow(POWER).mean() ** (1 / POWER)), rel=1e-4)
    features = model[1](model[0](x)).detach().double()
    spread = sum(
        float(
            (classes == c).double().mean()
            * (features[classes == c].mean(0) - features.mean(0)).square().sum()
        )
        for c in classes.unique()
    )
    assert found.dispersion == pytest.approx(math.log(spread), rel=1e-4)
    some = torch.arange(50) % 3 == 0
    alone = predict(model, Batches.from_tensors(x[some]))
    among = predict(model, Batches.from_tensors(x, batch_size=16), summed=some)
    assert len(among.logits) == 50
    assert among.gradient_norm == pytest.approx(alone.gradient_norm)
    assert among.dispersion == pytest.approx(alone.dispersion)


def test_a_network_without_a_last_linear_layer_has_no_sums() -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.LogSigmoid())
    found = predict(model, Batches.from_tensors(torch.randn(9, 4)))
    assert found.gradient_norm is None
    assert found.dispersion is None


def test_the_mirror_images_are_run_on_demand() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(8, 3))
    x = torch.rand(10, 1, 2, 4)
    found = predict(model, Batches.from_tensors(x, batch_size=4), mirror=True)
    assert torch.allclose(found.mirrored, model(x.flip(-1)).detach(), atol=1e-6)
    assert predict(model, Batches.from_tensors(x)).mirrored is None
