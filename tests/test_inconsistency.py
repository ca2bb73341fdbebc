"""Local inconsistency and its variants against loops over their definitions."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from conftest import BY_NAME, Case
from torch import Tensor

from gm_probe.linalg.work import Work
from gm_probe.measures.context import MeasurementContext
from gm_probe.measures.estimates import Estimate
from gm_probe.measures.measure import measure
from gm_probe.measures.settings import Settings
from gm_probe.models.parameters import Parameters

TANH = BY_NAME["tanh-mlp"]


def row(case: Case, name: str, settings: Settings, batch_size: int = 3) -> Estimate:
    return measure(case.model, case.batches(batch_size), [name], settings).rows[name]


def starts(case: Case, settings: Settings) -> list[Tensor]:
    return list(MeasurementContext(case.model, case.batches(), settings, Work(7)).starts())


def divergence(case: Case, delta: Tensor, rows: slice = slice(None)) -> Tensor:
    """(n,) KL from its definition, differentiable."""
    log_p = case.logits_at(case.theta)[rows].log_softmax(1).detach()
    log_q = case.logits_at(case.theta + delta)[rows].log_softmax(1)
    return (log_p.exp() * (log_p - log_q)).sum(1)


def slope(function: Callable[[Tensor], Tensor], at: Tensor) -> Tensor:
    (g,) = torch.autograd.grad(function(moved := at.clone().requires_grad_()), moved)
    return g


def by_hand(case: Case, start: Tensor, radius: float, steps: int, rows: slice = slice(None)) -> Tensor:
    """Algorithm 1's terms (n,)."""
    delta = start
    for _ in range(steps):
        g = slope(lambda d: divergence(case, d, rows).mean(), delta)
        delta = radius * g / g.norm()
    return divergence(case, delta, rows)


def check(found: Estimate, terms: list[Tensor]) -> None:
    """``terms``: of each start, the examples' divergences."""
    values = np.array([float(each.mean()) for each in terms])
    assert len({round(value, 12) for value in values}) == len(
        values
    )  # else which start is whose would not show
    assert found.details["starts"] == pytest.approx(values, rel=1e-8)
    assert found.value == pytest.approx(values.mean(), rel=1e-8)
    assert found.details["sd_starts"] == pytest.approx(values.std(ddof=1), rel=1e-6)
    assert found.stderr == pytest.approx(values.std(ddof=1) / math.sqrt(len(values)), rel=1e-6)
    each = torch.stack(terms).mean(0)
    assert found.stderr_examples == pytest.approx(float(each.std()) / math.sqrt(len(each)), rel=1e-7)


# the paper's protocol


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_paper_by_hand(steps: int) -> None:
    settings = Settings(rho=0.4, k_steps=steps, num_starts=3, noise_scale=0.2)
    terms = [by_hand(TANH, start, 0.4, steps) for start in starts(TANH, settings)]
    check(row(TANH, "local_inconsistency", settings), terms)


@pytest.mark.parametrize(
    ("rho", "k"), [(0.1, 1), (0.3, 2), (0.7, 3)], ids=["first cell", "middle", "last cell"]
)
@pytest.mark.parametrize("name", ["tanh-mlp", "max-pool-cnn"])
def test_every_cell_of_the_grid_is_a_measurement_of_its_own(name: str, rho: float, k: int) -> None:
    case, more = BY_NAME[name], {"num_starts": 3, "noise_scale": 0.2}
    radii, steps = (0.7, 0.1, 0.3), (2, 1, 3)
    found = row(
        case, "local_inconsistency", Settings(rho=rho, k_steps=k, rho_grid=radii, k_grid=steps, **more)
    )
    cells = {(cell["rho"], cell["k_steps"]): cell for cell in found.details["grid"]}
    assert set(cells) == {(r, s) for r in radii for s in steps}
    for (r, s), cell in cells.items():
        alone = row(case, "local_inconsistency", Settings(rho=r, k_steps=s, **more))
        assert cell["value"] == pytest.approx(alone.value, rel=1e-9)
        assert cell["starts"] == pytest.approx(alone.details["starts"], rel=1e-9)
        if (r, s) == (rho, k):
            assert found.value == pytest.approx(alone.value, rel=1e-9)
            assert found.stderr == pytest.approx(alone.stderr, rel=1e-6)
            assert found.stderr_examples == pytest.approx(alone.stderr_examples, rel=1e-6)


def test_own_settings_join_the_grid() -> None:
    found = row(TANH, "local_inconsistency", Settings(rho=0.2, k_steps=2, rho_grid=(0.5,), num_starts=2))
    assert [(cell["rho"], cell["k_steps"]) for cell in found.details["grid"]] == [(0.2, 2), (0.5, 2)]
    assert found.details["grid"][0]["value"] == pytest.approx(found.value)
    assert "grid" not in row(TANH, "local_inconsistency", Settings(num_starts=2)).details


def test_grid_costs_less_than_its_cells() -> None:
    """A gradient of the start for every ρ; then of each ρ one a step, and the last step's value."""
    grid = Settings(rho_grid=(0.1, 0.2, 0.3), k_grid=(1, 2, 3), num_starts=2)
    found = row(TANH, "local_inconsistency", grid)
    once = 1 + 3 * (2 + 1 / 3) + 1 / 3  # the primary cell's examples take a pass of their own
    assert found.num_evals == pytest.approx(2 * once, abs=2e-3)


def test_one_start_has_no_spread() -> None:
    found = row(TANH, "local_inconsistency", Settings(num_starts=1))
    assert (found.stderr, found.details["sd_starts"]) == (None, None)
    assert found.details["reason_stderr"] == "one start has no spread"


# its relatives


def test_relative_by_hand() -> None:
    settings = Settings(rho=0.1, k_steps=2, num_starts=3, noise_scale=0.2)
    radius = 0.1 * float(TANH.theta.norm())
    found = row(TANH, "local_inconsistency_relative", settings)
    assert found.details["radius"] == pytest.approx(radius, rel=1e-12)
    check(found, [by_hand(TANH, start, radius, 2) for start in starts(TANH, settings)])


def test_adaptive_by_hand() -> None:
    settings = Settings(rho=0.3, k_steps=3, num_starts=3, noise_scale=0.2, eta=0.05)
    scale, terms = TANH.theta.abs() + 0.05, []
    for u in starts(TANH, settings):
        for _ in range(3):
            g = slope(lambda u: divergence(TANH, scale * u).mean(), u)
            u = 0.3 * g / g.norm()
        terms.append(divergence(TANH, scale * u))
    check(row(TANH, "local_inconsistency_adaptive", settings), terms)


def test_adaptive_is_invariant_to_rescaling() -> None:
    """Of a ReLU network's layers, one times 8 and the next over 8 are the same function; η aside."""
    model = BY_NAME["relu-mlp"].model
    settings = Settings(rho=0.3, k_steps=15, num_starts=3, eta=1e-9)
    names = ["local_inconsistency_adaptive", "local_inconsistency"]
    batches = BY_NAME["relu-mlp"].batches()
    before = measure(model, batches, names, settings).rows
    with torch.no_grad():
        model[0].weight *= 8
        model[0].bias *= 8
        model[2].weight /= 8
    after = measure(model, batches, names, settings).rows
    assert after[names[0]].value == pytest.approx(before[names[0]].value, rel=1e-6)
    assert after[names[1]].value != pytest.approx(before[names[1]].value, rel=0.1)


@pytest.mark.parametrize("m", [2, 3])
def test_batchwise_by_hand(m: int) -> None:
    settings = Settings(rho=0.4, k_steps=2, num_starts=3, noise_scale=0.2, sub_batch=m)
    pieces = [slice(i, i + m) for i in range(0, 7, m)]
    terms = [
        torch.cat([by_hand(TANH, start, 0.4, 2, piece) for piece in pieces])
        for start in starts(TANH, settings)
    ]
    for batch_size in (1, 3, 7):  # the batches of the data do not matter
        check(row(TANH, "local_inconsistency_batchwise", settings, batch_size), terms)


def test_one_batch_is_the_plain_measure(case: Case) -> None:
    settings = Settings(rho=0.3, k_steps=2, num_starts=2, sub_batch=8)
    plain = row(case, "local_inconsistency", settings)
    batchwise = row(case, "local_inconsistency_batchwise", settings)
    assert batchwise.details["starts"] == pytest.approx(plain.details["starts"], rel=1e-9)
    assert batchwise.stderr_examples == pytest.approx(plain.stderr_examples, rel=1e-7)


def test_average_by_hand() -> None:
    settings = Settings(rho=0.5, num_starts=4, seed=3)
    context = MeasurementContext(TANH.model, TANH.batches(), settings, Work(7))
    generator = context.generator("average")
    draws = [Parameters(TANH.model).random(0.5, generator) for _ in range(4)]
    check(row(TANH, "average_inconsistency", settings), [divergence(TANH, draw) for draw in draws])


@pytest.mark.parametrize("rho", [1e-4, 1e-3])
def test_average_at_a_small_radius_is_the_trace(case: Case, rho: float) -> None:
    """E εᵀF ε/2 = ρ² tr F/(2P)."""
    found = row(case, "average_inconsistency", Settings(rho=rho, num_starts=400), 7)
    expected = rho**2 * float(case.fisher_terms.mean(0).trace()) / (2 * len(case.theta))
    assert found.stderr is not None
    assert abs(found.value - expected) < 4 * found.stderr
    assert found.stderr < 0.1 * expected
