"""Designs: points by hand, scipy's own Sobol points, and what the built-in recipes of Fig. 1 hold."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
from scipy.stats import qmc

from gm_probe.errors import UsageError
from gm_probe.sweep.design import points
from gm_probe.sweep.recipe import load_recipe, parse_recipe

SPACE = {
    "lr": {"low": 0.001, "high": 0.1, "log": True},
    "momentum": {"low": 0.0, "high": 0.9},
    "epochs": {"low": 3, "high": 5},
    "augment": [True, False],
}


def test_grid_and_list_multiply() -> None:
    listed = [{"epochs": 2, "schedule": "cosine"}, {"epochs": 3}]
    assert points({"list": listed, "grid": {"seed": [0, 1]}}) == [
        {"epochs": 2, "schedule": "cosine", "seed": 0},
        {"epochs": 2, "schedule": "cosine", "seed": 1},
        {"epochs": 3, "seed": 0},
        {"epochs": 3, "seed": 1},
    ]
    assert points({}) == [{}]
    assert points({"list": listed}) == listed


def test_sobol_points_are_balanced() -> None:
    found = points({"sobol": {"points": 64, "seed": 3, "space": SPACE}})
    units = qmc.Sobol(4, rng=np.random.default_rng(3)).random_base2(6)  # scipy's, used as they are
    assert [point["lr"] for point in found] == pytest.approx(0.001 * 100 ** units[:, 0], rel=6e-3)
    assert [point["momentum"] for point in found] == pytest.approx(0.9 * units[:, 1], abs=6e-4)
    # of 64 points exactly 8 fall into each eighth of an axis, and half on either side of a coin
    eighths = Counter(int(8 * np.log(point["lr"] / 0.001) / np.log(100) - 1e-3) for point in found)
    assert max(eighths.values()) <= 9
    assert Counter(point["augment"] for point in found) == {True: 32, False: 32}
    assert set(Counter(point["epochs"] for point in found)) == {3, 4, 5}
    assert all(type(point["epochs"]) is int for point in found)


def test_random_points_are_seeded_and_cover_the_space() -> None:
    def drawn(seed: int) -> list[dict[str, Any]]:
        return points({"random": {"points": 300, "seed": seed, "space": SPACE}})

    found = drawn(0)
    assert found == drawn(0)
    assert found != drawn(1)
    # half of the points lie below the geometric mean, a third on each whole number: within 4 standard errors
    assert abs(sum(point["lr"] < 0.01 for point in found) - 150) < 4 * 8.7
    for epochs in (3, 4, 5):
        assert abs(sum(point["epochs"] == epochs for point in found) - 100) < 4 * 8.2
    assert all(0.001 <= point["lr"] <= 0.1 for point in found)


@pytest.mark.parametrize(
    ("tables", "reason"),
    [
        ({"list": [{"lr": 1}], "sobol": {}}, "[list] and [sobol] exclude each other"),
        ({"list": {"lr": 1}}, "list must be tables, [[list]]"),
        ({"list": []}, "list must be tables, [[list]]"),
        ({"sobol": {"points": 6, "space": SPACE}}, "sobol.points = 6 must be a power of 2"),
        ({"random": {"points": 0, "space": SPACE}}, "random.points = 0 must be a whole number"),
        ({"random": {"points": 3, "seed": -1, "space": SPACE}}, "random.seed = -1"),
        ({"random": {"points": 3}}, "[random.space] must give"),
        ({"random": {"point": 3}}, "no setting random.point; did you mean 'points'?"),
        ({"random": 3}, "random = 3 must be a table"),
        ({"random": {"points": 1, "space": {"lr": 1}}}, "random.space.lr = 1 must be a list or"),
        ({"random": {"points": 1, "space": {"lr": {"low": 1}}}}, "must be a list or {low, high}"),
        ({"random": {"points": 1, "space": {"lr": {"low": 2, "high": 1}}}}, "finite low < high"),
        ({"random": {"points": 1, "space": {"lr": {"low": 0, "high": 1, "log": True}}}}, "low > 0"),
        ({"list": [{"lr": 1}], "grid": {"lr": [1]}}, "lr is both in [grid] and in [list]"),
        ({"list": [{"lr": 1}], "base": {"lr": 1}}, "lr is both in [base] (or an option) and in the design"),
        ({"list": [{"lrr": 1}]}, "no setting 'lrr'"),
    ],
)
def test_mistakes_are_named(tables: dict[str, Any], reason: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_recipe(tables)
    assert reason in str(caught.value)


def test_fig1_6cnn_is_the_papers() -> None:
    recipe = load_recipe("fig1-6cnn")
    configs = list(recipe.runs.values())
    assert len(configs) == 6 * 5 * 4 * 5
    assert {config.lr for config in configs} == {0.001, 0.002, 0.005, 0.01, 0.02, 0.05}
    assert {config.batch_size for config in configs} == {32, 64, 128, 256, 512}
    assert {config.weight_decay for config in configs} == {0.0, 1e-4, 5e-4, 1e-3}
    fixed = {
        (c.model, c.data, c.num_train, c.num_unlabeled, c.schedule, c.augment, c.stop_ce) for c in configs
    }
    assert fixed == {("6cnn", "cifar10", 45_000, 5_000, "constant", False, 0.01)}
    assert {config.seed for config in configs} == set(range(5))
    # both readings of the table's last row, 3: ρ and K
    assert 3.0 in recipe.plan.settings.rho_grid
    assert 3 in recipe.plan.settings.k_grid


def test_fig1_wrn_is_the_papers() -> None:
    recipe = load_recipe("fig1-wrn28-2")
    configs = list(recipe.runs.values())
    assert len({config.replace(seed=0).as_dict().__repr__() for config in configs}) == 3 * 5 * 3 * 2 * 2 * 3
    assert {config.lr for config in configs} == {0.1, 0.03, 0.01}
    assert {(config.schedule, config.epochs) for config in configs} == {
        (schedule, epochs) for schedule in ("cosine", "multi-step") for epochs in (150, 200, 300)
    }
    assert {c.milestones for c in configs if c.schedule == "multi-step" and c.epochs == 200} == {
        (60, 120, 160)
    }
    assert {config.augment for config in configs} == {True, False}
    assert recipe.group_by == ("weight_decay", "augment")
    assert recipe.plan.settings.k_steps == 1
    assert recipe.plan.settings.rho_grid == (1.0,)


def test_small_versions_are_large_enough_for_the_claims() -> None:
    cnn = load_recipe("fig1-6cnn-small").runs.values()
    assert len(cnn) >= 90
    assert len({(c.lr, c.batch_size, c.weight_decay) for c in cnn}) >= 18
    assert len({c.seed for c in cnn}) == 5
    wrn = load_recipe("fig1-wrn28-2-small").runs.values()
    assert len(wrn) >= 36
    assert len({(c.weight_decay, c.augment) for c in wrn}) == 6
