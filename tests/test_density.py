"""Stochastic Lanczos quadrature on spectra that numpy knows, and the picture made of it."""

from __future__ import annotations

import json
import math
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import seeded
from test_operators import to_matrix
from test_spectrum import SPECTRA as OTHERS

from gm_probe.analysis.density_plot import density_panels
from gm_probe.analysis.plots import write_figure
from gm_probe.errors import DivergedError, UsageError
from gm_probe.linalg.density import Density, density
from gm_probe.linalg.operator import Operator


@lru_cache
def basis(size: int) -> np.ndarray:
    return np.linalg.qr(np.random.default_rng(1).normal(size=(size, size)))[0]


def rotated(values: np.ndarray, dtype: torch.dtype = torch.float64) -> Operator:
    """Q diag(values) Qᵀ for a random orthogonal Q."""
    q = basis(len(values))
    matrix = torch.from_numpy((q * values) @ q.T).to(dtype)
    return Operator(lambda v: matrix @ v, lambda v: (v @ matrix @ v)[None], len(values), dtype, matrix.device)


SPECTRA = {
    **{
        name: values
        for name, values in OTHERS.items()
        if "pair" not in name and "larger" not in name and name != "P = 2"
    },
    "indefinite": np.r_[-3.0, np.linspace(-0.1, 0.1, 40), 0.4],
}


def network_like() -> np.ndarray:
    """A null space, a bulk over three decades, negative values too, and five outliers."""
    rng = np.random.default_rng(0)
    bulk = np.concatenate([10 ** rng.uniform(-4, -1, 200), -(10 ** rng.uniform(-4, -2, 80))])
    return np.concatenate([np.zeros(520), bulk, [2.0, 3.0, 5.0, 8.0, 20.0], [-1.0]])


@pytest.mark.parametrize("name", SPECTRA)
def test_moments_within_four_standard_errors(name: str) -> None:
    values = SPECTRA[name]
    found = density(rotated(values), generator=seeded(), num_probes=20, num_steps=12)
    for order, moment in enumerate((found.moment(0), found.trace, found.frobenius)):
        truth = (values**order).sum()
        scale = len(values) * np.abs(values).max() ** order
        assert moment.stderr is not None
        assert abs(moment.value - truth) <= 4 * moment.stderr + 1e-12 * scale
    assert found.largest <= values.max() + 1e-10 * np.abs(values).max()
    assert found.smallest >= values.min() - 1e-10 * np.abs(values).max()


@pytest.mark.parametrize("seed", range(5))
def test_each_probe_is_the_quadrature_of_its_own_measure(seed: int) -> None:
    """m nodes give vᵀA^k v exactly for k ≤ 2m − 1."""
    operator = rotated(SPECTRA["indefinite"])
    matrix, size, steps = to_matrix(operator), operator.size, 5
    found = density(operator, generator=seeded(seed), num_probes=2, num_steps=steps)
    generator = seeded(seed)
    for nodes, weights in zip(found.nodes, found.weights, strict=True):
        v = torch.randint(0, 2, (size,), generator=generator, dtype=torch.int8).double() * 2 - 1
        for k in range(2 * steps):
            truth = float(v @ torch.linalg.matrix_power(matrix, k) @ v) / size
            assert weights @ nodes**k == pytest.approx(truth, rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("name", ["spread", "one outlier", "indefinite"])
def test_all_steps_give_the_spectral_measure_itself(name: str) -> None:
    values = np.sort(SPECTRA[name])
    operator = rotated(values)
    found = density(operator, generator=seeded(3), num_probes=3, num_steps=1000)
    truth, vectors = np.linalg.eigh(to_matrix(operator).numpy())
    generator = seeded(3)
    assert found.num_products == 3 * len(values)
    for nodes, weights in zip(found.nodes, found.weights, strict=True):
        signs = torch.randint(0, 2, (len(values),), generator=generator, dtype=torch.int8).numpy() * 2.0 - 1
        shares = (vectors.T @ signs) ** 2 / len(values)
        assert nodes == pytest.approx(truth, abs=1e-9 * np.abs(values).max())
        assert weights == pytest.approx(shares, abs=1e-8)


@pytest.mark.parametrize("name", ["repeated top", "low rank"])
def test_a_repeated_eigenvalue_is_one_outlier_of_as_many(name: str) -> None:
    """Though rounding lets Lanczos go on past the invariant subspace, into copies."""
    found = density(rotated(SPECTRA[name]), generator=seeded(), num_probes=100, num_steps=99)
    top = found.outliers()[0]
    many = np.sum(SPECTRA[name] == SPECTRA[name].max())
    assert top.value == pytest.approx(SPECTRA[name].max())
    assert top.count.value == pytest.approx(many, abs=4 * (top.count.stderr or 0))
    found_at = [outlier.value for outlier in found.outliers()]
    assert found_at == pytest.approx(np.unique(SPECTRA[name])[::-1][: len(found_at)])


@pytest.mark.parametrize(
    ("values", "place"), [(np.zeros(12), 0.0), (np.ones(15), 1.0), (np.full(9, -2.0), -2.0)]
)
def test_multiples_of_the_identity(values: np.ndarray, place: float) -> None:
    found = density(rotated(values), generator=seeded())
    assert found.largest == found.smallest or found.largest - found.smallest < 1e-12
    assert found.largest == pytest.approx(place, abs=1e-12)
    assert found.trace.value == pytest.approx(values.sum(), abs=1e-12)
    assert found.mass(place - 1e-9, place + 1e-9).value == pytest.approx(1)
    assert found.outliers() == ()
    curve = json.loads(json.dumps(found.as_dict(), allow_nan=False))["curve"]
    places = np.arcsinh(np.array(curve["x"]) / curve["linear_width"])
    assert np.trapezoid(curve["y"], places) == pytest.approx(len(values), rel=1e-3)


def test_a_diagonal_matrix_has_no_variance() -> None:
    values = torch.linspace(-1, 3, 30, dtype=torch.float64)
    operator = Operator(
        lambda v: values * v, lambda v: (values * v * v).sum()[None], 30, values.dtype, values.device
    )
    found = density(operator, generator=seeded(), num_steps=30)
    assert found.trace.stderr == pytest.approx(0, abs=1e-10)
    assert np.array(found.weights) == pytest.approx(np.full((4, 30), 1 / 30))


def test_cumulative_mass_follows_the_eigenvalues() -> None:
    values = network_like()
    found = density(rotated(values), generator=seeded(), num_probes=8, num_steps=60)
    for low, high in [(-9, -1e-2), (-9, 1e-2), (-1e-2, 1e-2), (1e-2, 9), (1, 99), (0.05, 0.2)]:
        mass = found.mass(low, high)
        assert mass.stderr is not None
        edges = 0.0  # a node next to an end stands for eigenvalues on both sides of it
        for edge in (low, high):
            if found.smallest < edge < found.largest:
                next_to = [
                    weights[np.abs(nodes - edge).argmin()]
                    for nodes, weights in zip(found.nodes, found.weights, strict=True)
                ]
                edges += float(np.mean(next_to))
        assert abs(mass.value - np.mean((values >= low) & (values <= high))) <= 4 * mass.stderr + edges


def test_the_curve_shows_no_waves_and_keeps_outliers_sharp() -> None:
    values = np.r_[10 ** np.random.default_rng(0).uniform(-2, 0, 800), 30.0]
    found = density(rotated(values), generator=seeded(), num_steps=20)
    grid = 0.01 * np.sinh(np.linspace(math.asinh(5), math.asinh(4000), 2000))
    curve, error = found.curve(grid)
    bulk = (grid > 0.1) & (grid < 0.4)
    assert np.log(curve[bulk]).std() < 0.2
    assert curve[bulk].mean() == pytest.approx(800 / math.log(100), rel=0.15)
    assert error is not None
    assert (error >= 0).all()
    beyond = grid > 10
    assert grid[beyond][curve[beyond].argmax()] == pytest.approx(30, rel=0.01)
    assert np.trapezoid(curve[beyond], np.arcsinh(grid[beyond] / 0.01)) == pytest.approx(1, rel=0.5)
    assert density(rotated(values), generator=seeded(), num_probes=1).curve(grid)[1] is None


def test_outliers_stand_at_their_values_with_their_weight() -> None:
    values = network_like()
    found = density(rotated(values), generator=seeded(), num_probes=40, num_steps=40)
    outliers = found.outliers()
    known = [outlier for outlier in outliers if abs(outlier.value) > 0.5]
    assert [outlier.value for outlier in known] == pytest.approx([20, 8, 5, 3, 2, -1], rel=1e-6)
    for outlier in outliers:  # be they the bulk's own edge
        assert np.abs(values - outlier.value).min() <= outlier.residual + 1e-9
    for outlier in known:
        assert outlier.count.stderr is not None
        assert outlier.count.value == pytest.approx(1, abs=4 * outlier.count.stderr)
    total = np.mean([outlier.count.value for outlier in known])
    assert total == pytest.approx(1, abs=4 * math.sqrt(2 / (40 * 6)))
    assert found.largest == pytest.approx(20)
    assert found.smallest == pytest.approx(-1)


def test_equal_outliers_count_as_many_and_no_outliers_as_none() -> None:
    same = density(
        rotated(np.r_[np.linspace(0, 1, 300), 9.0, 9.0, 9.0]), generator=seeded(), num_probes=60, num_steps=15
    )
    [triple] = [outlier for outlier in same.outliers() if outlier.value > 2]
    assert triple.value == pytest.approx(9)
    assert triple.count.value == pytest.approx(3, abs=4 * (triple.count.stderr or 0))
    assert (triple.count.stderr or 9) < 0.5
    bulk = density(rotated(np.random.default_rng(0).normal(size=600)), generator=seeded(), num_steps=10)
    assert bulk.outliers() == ()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_spectrum_that_is_resolved_as_a_whole_is_listed_once(dtype: torch.dtype) -> None:
    found = density(rotated(np.array([5, 3, 2, 1, -0.5, -2.0]), dtype), generator=seeded())
    assert [outlier.value for outlier in found.outliers()] == pytest.approx([5, 3, 2, 1, -0.5, -2], rel=1e-5)


def test_float32_finds_the_same(generator: torch.Generator) -> None:
    values = np.r_[np.zeros(150), np.linspace(0, 0.1, 40), 2.0, 9.0]
    found = density(rotated(values, torch.float32), generator=generator)
    assert [outlier.value for outlier in found.outliers()][:2] == pytest.approx([9, 2], rel=1e-5)
    assert found.smallest > -1e-5
    assert abs(found.trace.value - values.sum()) < 4 * (found.trace.stderr or 0)


def test_the_seed_decides() -> None:
    operator = rotated(network_like())
    one, two, other = (density(operator, generator=seeded(seed), num_steps=8) for seed in (4, 4, 5))
    assert one.as_dict() == two.as_dict()
    assert one.trace != other.trace


def test_refusals() -> None:
    with pytest.raises(DivergedError, match="finite"):
        density(rotated(np.full(3, math.nan)), generator=seeded())
    for wrong in ({"num_probes": 0}, {"num_steps": 0}):
        with pytest.raises(UsageError, match="one probe and one step"):
            density(rotated(network_like()), generator=seeded(), **wrong)


def test_json_carries_the_rules_and_what_they_say() -> None:
    found = density(rotated(network_like()), generator=seeded())
    one = json.loads(json.dumps(found.as_dict(points=100), allow_nan=False))
    assert (one["num_parameters"], one["num_probes"], one["num_steps"]) == (len(network_like()), 4, 40)
    assert one["trace"] == {"value": found.trace.value, "stderr": found.trace.stderr}
    assert one["largest"] == found.largest
    assert one["outliers"][0]["value"] == found.largest
    again = Density(
        one["num_parameters"],
        *(tuple(map(np.array, one[key])) for key in ("nodes", "weights", "residuals")),
        one["num_products"],
    )
    assert again.trace == found.trace
    curve = one["curve"]
    assert curve["linear_width"] == 0.01
    places = np.arcsinh(np.array(curve["x"]) / curve["linear_width"])
    assert np.trapezoid(curve["y"], places) == pytest.approx(len(network_like()), rel=0.02)


# ---- the picture


def drawn(**options: Any) -> dict[str, dict[str, Any]]:
    whole = network_like()
    return {
        "fisher": density(rotated(np.maximum(whole, 0)), generator=seeded(), **options).as_dict(),
        "hessian": density(rotated(whole), generator=seeded(), **options).as_dict(),
    }


def test_the_picture_is_written_and_says_what_it_shows(tmp_path: Path) -> None:
    shown = drawn()
    figure = density_panels(shown, checkpoint="run $1_a$", num_examples=2500)
    paths = [tmp_path / "density.png", tmp_path / "density.svg"]
    write_figure(figure, paths)
    assert paths[0].read_bytes().startswith(b"\x89PNG")
    text = paths[1].read_text(encoding="utf-8")
    for label in (
        "run $1_a$, N = 2,500, P = 806, 4 × 40 (probes × steps)",
        "Fisher matrix F: trace ",
        f"{len(shown['fisher']['outliers'])} isolated eigenvalues (ticks)",
        "loss Hessian H: trace ",
        f"{len(shown['hessian']['outliers'])} isolated eigenvalues (ticks)",
        "within ±0.01",
        "largest",
        "20",
        "smallest",
        "−1",
        "eigenvalues per decade",
    ):
        assert label in text, label
    assert len(figure.axes) == 2
    for axes in figure.axes:
        assert (axes.get_xscale(), axes.get_yscale()) == ("asinh", "log")
        assert axes.get_xlim()[0] < -1
        assert axes.get_xlim()[1] > 20


@pytest.mark.parametrize(
    "values", [np.zeros(8), np.ones(8), np.array([-2.0]), 1e-12 * np.arange(9.0), 1e12 * np.arange(9.0)]
)
def test_odd_spectra_are_drawn_too(values: np.ndarray, tmp_path: Path) -> None:
    one = density(rotated(values), generator=seeded(), num_probes=1).as_dict(points=100)
    figure = density_panels({"my $matrix": one}, checkpoint="odd", num_examples=1)
    write_figure(figure, [tmp_path / "odd.svg"])
    assert "my $matrix: trace" in (tmp_path / "odd.svg").read_text(encoding="utf-8")


def test_the_picture_says_whose_labels() -> None:
    one = density(rotated(network_like()), generator=seeded(), num_probes=2, num_steps=10).as_dict()
    figure = density_panels(
        {"fisher": one, "hessian": {**one, "labels": "predicted"}}, checkpoint="c", num_examples=3
    )
    titles = [axes.get_title(loc="left") for axes in figure.axes]
    assert "labels" not in titles[0]
    assert titles[1].startswith("loss Hessian H (predicted labels)")
