"""Tuning: what cells are trained and judged on, their statistics, resuming, Optuna, the map and the command."""

from __future__ import annotations

import csv
import io
import json
import re
import shlex
import sys
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch
from command_line import run
from matplotlib.figure import Figure
from PIL import Image

from gm_probe.analysis.heat_map import heat_map, trial_map
from gm_probe.analysis.plots import render
from gm_probe.cli.tune import OWN, _doubts, tune
from gm_probe.data import images
from gm_probe.errors import DataError, DivergedError, ProbeError, UsageError
from gm_probe.executors.local import Outcome
from gm_probe.models.checkpoints import read_checkpoint
from gm_probe.models.loading import load_model
from gm_probe.runs.records import find_runs
from gm_probe.sweep.recipe import Recipe
from gm_probe.sweep.runner import run_recipe
from gm_probe.sweep.tuning import VALIDATION, Cell, Point, Tuner, best_of, check_tunable, rivals_of
from gm_probe.training.config import SETTINGS, TrainConfig
from gm_probe.training.run_splits import _open, load_splits

NEEDS_OPTUNA = pytest.mark.skipif(find_spec("optuna") is None, reason="optuna is an extra")


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def config(tmp_path: Path) -> TrainConfig:
    """A run of a moment over 100 images that carry their own number in the first two pixels."""
    rng = np.random.default_rng(0)
    y = rng.integers(0, 3, 100)
    x = (rng.integers(0, 100, (100, 1, 4, 4)) + 50 * y[:, None, None, None]).astype(np.uint8)
    x[:, 0, 0, 0] = np.arange(100)
    np.savez(tmp_path / "data.npz", x=x, y=y)
    return TrainConfig.from_dict(
        {
            "data": str(tmp_path / "data.npz"),
            "num_unlabeled": 15,
            "num_test": 25,
            "model": "mlp-5",
            "method": "iam-d",
            "epochs": 2,
            "batch_size": 16,
            "device": "cpu",
        }
    )


def tuner_of(config: TrainConfig, out: Path, seeds: int = 2) -> tuple[Tuner, list[Outcome]]:
    """And the outcomes of whatever it runs."""
    outcomes: list[Outcome] = []
    return Tuner(config.replace(validation=VALIDATION), seeds, out, partial(_run, out, outcomes)), outcomes


def _run(out: Path, outcomes: list[Outcome], recipe: Recipe) -> list[Outcome]:
    found = run_recipe(recipe, out)
    outcomes += found
    return found


def numbers(x: torch.Tensor) -> set[int]:
    """The examples' own numbers."""
    return set(x[:, 0, 0, 0].tolist())


# ---- what a cell sees


@pytest.mark.parametrize("split_seed", [0, 3])
def test_cells_see_the_training_part_alone(config: TrainConfig, split_seed: int) -> None:
    config = config.replace(split_seed=split_seed)
    whole, cell = load_splits(config), load_splits(config.replace(validation=0.1))
    train, held_out = numbers(cell.train.x), numbers(cell.test.x)
    assert (len(train), len(held_out)) == (54, 6)
    assert train | held_out == numbers(whole.train.x)
    assert torch.equal(cell.unlabeled.x, whole.unlabeled.x)
    for part in ("train", "test"):
        examples = getattr(cell, part)
        assert cell.indices[part] == examples.x[:, 0, 0, 0].tolist()  # their numbers are their positions
        labels = dict(zip(whole.train.x[:, 0, 0, 0].tolist(), whole.train.y.tolist(), strict=True))  # type: ignore[union-attr]
        assert [labels[number] for number in cell.indices[part]] == examples.y.tolist()


def test_of_few_labels_as_many_of_each_class_are_held_out(config: TrainConfig) -> None:
    few = config.replace(data="digits", objective="joint", labels=50, num_train=500, num_unlabeled=50)
    for seed in (0, 1):
        whole, cell = (load_splits(few.replace(split_seed=seed, validation=v)) for v in (None, 0.2))
        for part, count in (("train", 4), ("test", 1)):
            assert getattr(cell, part).y.bincount().tolist() == [count] * 10
        assert sorted(cell.indices["train"] + cell.indices["test"]) == whole.indices["train"]
        assert (
            len(cell.inputs) == len(whole.inputs) - 10
        )  # the held-out images are not trained on, unlabeled either
    with pytest.raises(DataError, match="1 training examples of a class"):
        load_splits(few.replace(labels=10, validation=0.2))


def test_few_held_out_examples_are_a_doubt() -> None:
    cells = [Cell(Point(0.1), (0.3,)), Cell(Point(0.2), (0.4,))]
    [doubt] = _doubts(cells, cells[0], {}, 100)
    assert "100 held-out examples has a standard error of up to 5 points" in doubt
    assert not list(_doubts(cells, cells[0], {}, 500))


def test_what_is_held_out_is_drawn_by_the_split_seed_alone(config: TrainConfig) -> None:
    config = config.replace(validation=0.2)
    held_out = [
        load_splits(config.replace(**c)).indices["test"] for c in ({}, {"seed": 1}, {"split_seed": 1})
    ]
    assert held_out[0] == held_out[1] != held_out[2]
    assert len(held_out[0]) == 12


@pytest.mark.parametrize("in_memory", [True, False])
def test_a_test_part_of_its_own_is_not_touched(
    in_memory: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for part, level in (("train", 10), ("test", 200)):
        for name in ("a", "b"):
            (tmp_path / "images" / part / name).mkdir(parents=True)
            for index in range(20):
                image = Image.fromarray(np.full((4, 4), level + index + 20 * (name == "b"), np.uint8))
                image.save(tmp_path / "images" / part / name / f"{index}.png")
    _open.cache_clear()
    if not in_memory:
        monkeypatch.setattr(images, "IN_MEMORY", 100)
    config = TrainConfig.from_dict({"data": "images", "num_unlabeled": 4, "validation": 0.1, "method": "sam"})
    cell = load_splits(config)
    _open.cache_clear()
    assert [len(part) for part in (cell.train, cell.unlabeled, cell.test)] == [32, 4, 4]
    levels = [set(part.x[:][:, 0, 0, 0].tolist()) for part in (cell.train, cell.unlabeled, cell.test)]
    assert set.union(*levels) == set(range(10, 50))  # of 40 images all are there, and disjoint


def test_nothing_but_runs_and_figures_is_written(
    config: TrainConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    options = "--data data.npz --num-unlabeled 15 --num-test 25 --model mlp-5 --epochs 1 --seeds 1 -q"
    code, _, err = run(f"gmprobe tune --method sam --rho 0.1 {options} --out o --dry-run", capsys)
    assert code == 0, err
    assert not Path("o").exists()
    assert run(f"gmprobe tune --method sam --rho 0.1 {options} --out o", capsys)[0] == 0
    [name] = (path.name for path in Path("o").iterdir() if path.is_dir())
    assert sorted(path.name for path in Path("o").iterdir()) == [name, "tune.png", "tune.svg"]
    Path("o").rename("moved")
    code, out, _ = run(f"gmprobe tune --method sam --rho 0.1 {options} --out moved --dry-run", capsys)
    assert "0 of 1 runs to do" in out


def test_too_few_examples(config: TrainConfig) -> None:
    with pytest.raises(DataError, match="1 training examples are too few to hold out 1"):
        load_splits(config.replace(num_train=1, validation=0.1))


@pytest.mark.parametrize(
    ("method", "beta", "reason"), [("sgd", False, "neither"), ("sam", True, "sam has no β")]
)
def test_methods_that_have_nothing_to_tune(method: str, beta: bool, reason: str) -> None:
    with pytest.raises(UsageError, match=reason):
        check_tunable(TrainConfig(method=method), beta=beta)


def test_a_cells_errors_are_its_models_on_the_held_out_examples(config: TrainConfig, tmp_path: Path) -> None:
    out = tmp_path / "out"
    tuner, _ = tuner_of(config, out)
    points = [Point(0.01, 1.0), Point(0.5, 0.0)]
    cells = tuner.grid(points)
    held_out = load_splits(tuner.base).test
    runs = iter(tuner.recipe(points).runs)
    for cell, point in zip(cells, points, strict=True):
        assert cell.point == point
        for error in cell.errors:
            checkpoint = read_checkpoint(out / next(runs))
            model = load_model(checkpoint).eval()
            mean, std = checkpoint.normalization.mean, checkpoint.normalization.std
            x = (held_out.x.float() / 255 - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[
                :, None, None
            ]
            with torch.no_grad():
                wrong = (model(x).argmax(1) != held_out.y).float().mean()
            assert error == pytest.approx(wrong.item())


def test_runs_differ_in_what_is_tuned_alone(config: TrainConfig, tmp_path: Path) -> None:
    tuner, _ = tuner_of(config, tmp_path / "out", seeds=3)
    runs = tuner.recipe([Point(0.1, 0.5), Point(0.2, 0.5)]).runs
    assert {(c.rho, c.beta, c.seed) for c in runs.values()} == {
        (rho, 0.5, seed) for rho in (0.1, 0.2) for seed in (0, 1, 2)
    }
    assert {c.replace(rho=None, beta=1.0, seed=0) for c in runs.values()} == {tuner.base}
    assert all(name.startswith(("rho0.1-beta0.5-s", "rho0.2-beta0.5-s")) for name in runs)


# ---- statistics


def test_mean_and_standard_error() -> None:
    errors = (0.1, 0.13, 0.08, 0.2)
    cell = Cell(Point(0.1), errors)
    assert cell.mean == pytest.approx(np.mean(errors))
    assert cell.stderr == pytest.approx(scipy.stats.sem(errors))
    assert Cell(Point(0.1), (0.3,)).stderr is None
    lost = Cell(Point(0.1), (0.1, None))
    assert (lost.mean, lost.stderr, lost.as_dict()["diverged"]) == (None, None, 1)


def test_the_best_and_its_rivals() -> None:
    far, best, near, lost = (
        Cell(Point(0.1), (0.30, 0.32)),  # ± 0.01
        Cell(Point(0.2), (0.20, 0.22)),  # ± 0.01
        Cell(Point(0.3), (0.19, 0.25)),  # 0.01 away, ± 0.03
        Cell(Point(0.4), (0.0, None)),
    )
    cells = [far, best, near, lost]
    assert best_of(cells) is best
    assert rivals_of(best, cells) == [near]
    twin = Cell(Point(0.5), best.errors)
    assert best_of([best, twin]) is best
    assert best_of([twin, best]) is twin
    single, equal = Cell(Point(0.1), (0.2,)), Cell(Point(0.2), (0.2,))  # one seed knows no error
    assert rivals_of(single, [single, equal, Cell(Point(0.3), (0.201,)), lost]) == [equal]
    with pytest.raises(DivergedError, match="diverged in every cell"):
        best_of([lost])


# ---- going on


def test_complete_runs_are_not_trained_again(config: TrainConfig, tmp_path: Path) -> None:
    tuner, outcomes = tuner_of(config, tmp_path / "out")
    first = tuner.grid([Point(0.05), Point(0.1)])
    again = tuner.grid([Point(0.05), Point(0.1), Point(0.2)])
    assert again[:2] == first
    assert [outcome.status for outcome in outcomes] == ["finished"] * 4 + ["skipped"] * 4 + ["finished"] * 2


def test_a_failed_run_ends_it_with_its_reason(config: TrainConfig, tmp_path: Path) -> None:
    outcomes = [Outcome("one", "finished"), Outcome("two", "failed", "a bug")]
    tuner = Tuner(config, 1, tmp_path, lambda _: outcomes)
    with pytest.raises(
        ProbeError, match=r"1 of 2 runs failed, the first \(two\): a bug; run the same command"
    ):
        tuner.grid([Point(0.1)])


def test_a_diverged_cell_has_no_error_but_hides_no_other(config: TrainConfig, tmp_path: Path) -> None:
    tuner, _ = tuner_of(config.replace(method="sam"), tmp_path / "out", seeds=1)
    good, lost = tuner.grid([Point(0.05), Point(1e38)])
    assert lost.mean is None
    assert best_of([lost, good]) is good
    figure = heat_map([good.as_dict(), lost.as_dict()], good.as_dict(), "t")
    assert "diverged" in [text.get_text() for text in figure.axes[0].texts]


# ---- Optuna


@NEEDS_OPTUNA
def test_trials_lie_within_bounds_and_go_on_where_they_ended(config: TrainConfig, tmp_path: Path) -> None:
    bounds = {"rho": (0.01, 0.9), "beta": (0.5, 4.0)}
    seen: list[tuple[int, Cell]] = []
    tuner, outcomes = tuner_of(config, tmp_path / "out", seeds=1)
    few = tuner.trials(3, bounds, lambda *trial: seen.append(trial))
    assert [number for number, _ in seen] == [1, 2, 3]
    assert [cell for _, cell in seen] == few
    assert [outcome.status for outcome in outcomes] == ["finished"] * 3
    for cell in few:
        assert 0.01 <= cell.point.rho <= 0.9
        assert 0.5 <= cell.point.beta <= 4.0
    more = tuner.trials(13, bounds, lambda *_: None)  # beyond the 10 that TPE draws at random
    assert more[:3] == few
    assert [outcome.status for outcome in outcomes[3:6]] == ["skipped"] * 3
    fresh, _ = tuner_of(config, tmp_path / "fresh", seeds=1)
    assert [cell.point for cell in fresh.trials(13, bounds, lambda *_: None)] == [cell.point for cell in more]


def test_without_optuna_one_line_says_so(
    config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(UsageError) as caught:
        Tuner(config, 1, tmp_path, lambda _: []).trials(1, {"rho": (0.1, 1)}, lambda *_: None)
    assert str(caught.value) == "--trials needs optuna, which is not installed; pip install 'gm_probe[tune]'"


# ---- the map


def grid_of(errors: Callable[[float, float], float | None]) -> list[dict[str, Any]]:
    return [
        {"rho": rho, "beta": beta, "error": errors(rho, beta), "stderr": 0.012}
        for beta in (2.0, 0.5)
        for rho in (0.1, 0.05, 0.2)
    ]


def test_every_cell_stands_at_its_place_with_its_figures() -> None:
    cells = grid_of(lambda rho, beta: rho + beta / 10)
    best = min(cells, key=lambda cell: cell["error"])
    axes = heat_map(cells, best, "iam-d").axes[0]
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["0.05", "0.1", "0.2"]
    assert [tick.get_text() for tick in axes.get_yticklabels()] == ["0.5", "2"]
    drawn = axes.images[0].get_array()
    for text in axes.texts:
        column, row = text.get_position()
        wanted = 100 * ((0.05, 0.1, 0.2)[column] + (0.5, 2.0)[row] / 10)
        assert text.get_text() == f"{wanted:.2f}\n± 1.20"
        assert drawn[row, column] == pytest.approx(wanted)
    [frame] = axes.patches
    assert (frame.get_x(), frame.get_y()) == (-0.5, -0.5)  # ρ = 0.05, β = 0.5


@pytest.mark.parametrize("draw", [heat_map, trial_map])
@pytest.mark.parametrize("beta", [None, 1.0])
def test_equal_or_lost_errors_are_drawn(draw: Callable[..., Figure], beta: float | None) -> None:
    cells = [{"rho": rho, "beta": beta, "error": 0.25, "stderr": None} for rho in (0.1, 0.2)]
    cells.append({"rho": 0.4, "beta": beta, "error": None, "stderr": None})
    assert render(draw(cells, cells[0], "a $title$"), "png").startswith(b"\x89PNG")
    svg = render(draw(cells, cells[0], "a $title$"), "svg").decode()
    assert "validation error (%)" in svg
    assert svg == render(draw(cells, cells[0], "a $title$"), "svg").decode()


def test_trials_are_drawn_where_they_lie() -> None:
    cells = grid_of(lambda rho, beta: rho + beta / 10)
    axes = trial_map(cells, cells[0], "t").axes[0]
    offsets = {tuple(map(float, place)) for place in axes.collections[0].get_offsets()}
    assert offsets == {(cell["rho"], cell["beta"]) for cell in cells}
    [ring] = axes.lines
    assert (ring.get_xdata()[0], ring.get_ydata()[0]) == (0.1, 2.0)


# ---- the command


def test_the_helps_example_and_the_command_it_ends_in(capsys: pytest.CaptureFixture[str]) -> None:
    example = tune.epilog.removeprefix("Example:").strip() + " --epochs 5"
    code, out, err = run(example, capsys)
    assert code == 0, err
    assert "handwritten digits" in err
    assert out.count(" best ") == 1
    command = re.search(r"train with it:  (gmprobe train .*)", out)
    for name in ("tune.png", "tune.svg"):
        assert (Path("tune") / name).stat().st_size > 5_000

    code, out, err = run(f"{example} --json -q", capsys)
    result = json.loads(out)
    assert result["command"] == command[1]
    assert len(find_runs(Path("tune"))) == 2 * 3 == sum(len(c["errors"]) for c in result["cells"])
    assert result["best"]["error"] == min(cell["error"] for cell in result["cells"])

    code, out, err = run(f"{command[1]} --out chosen --json -q", capsys)
    assert code == 0, err
    trained = (Path("chosen") / "config.toml").read_text()
    assert f"rho = {result['best']['rho']}\n" in trained
    assert 'model = "mlp"\n' in trained
    # on the whole training part: what was held out is back
    assert json.loads(out)["num_train"] == result["num_train"] + result["num_validation"]


def test_other_forms(config: TrainConfig, capsys: pytest.CaptureFixture[str]) -> None:
    options = "--data data.npz --num-unlabeled 15 --num-test 25 --model mlp-5 --epochs 1 --seeds 2 --out o"
    code, out, err = run(f"gmprobe tune --method asam --rho 0.1,0.2,0.4 {options} --csv", capsys)
    assert code == 0, err
    rows = list(csv.DictReader(io.StringIO(out)))
    assert [row["rho"] for row in rows] == ["0.1", "0.2", "0.4"]
    assert {row["beta"] for row in rows} == {""}
    assert "o/tune.svg" in err

    dry = f"gmprobe tune --method asam --rho 0.1,0.3 {options} --dry-run"
    code, out, _ = run(dry, capsys)
    assert code == 0
    assert "2 of 4 runs to do" in out
    assert run(dry, capsys)[1] == out

    code, out, err = run(f"gmprobe tune --method iam-d --rho 0.1,0.2 --beta 1,0 {options} --json -q", capsys)
    assert code == 0, err
    result = json.loads(out)
    pairs = {(cell["rho"], cell["beta"]) for cell in result["cells"]}
    assert pairs == {(0.1, 1.0), (0.2, 1.0), (0.1, 0.0), (0.2, 0.0)}
    assert result["command"].endswith(f"--rho={result['best']['rho']:g} --beta={result['best']['beta']:g}")

    code, out, err = run(
        f"gmprobe tune --method sam --rho 0.1 --augment --schedule multi-step --milestones 1,2 {options}",
        capsys,
    )
    assert code == 0, err
    words = shlex.split(out.partition("train with it:")[2])
    assert {"--milestones=1,2", "--rho=0.1", "--method=sam", "--augment"} <= set(words)


@NEEDS_OPTUNA
def test_trials_by_command(config: TrainConfig, capsys: pytest.CaptureFixture[str]) -> None:
    options = "--data data.npz --num-unlabeled 15 --num-test 25 --model mlp-5 --epochs 1 --seeds 1 --out o"
    code, out, err = run(f"gmprobe tune --method iam-d --rho 0.01,1 --trials 2 {options} --json", capsys)
    assert code == 0, err
    assert len(json.loads(out)["cells"]) == 2
    assert "trial 2/2: ρ = " in err


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        ("--rho 0.1", 2, ["sgd has neither ρ nor β", "--method"]),
        ("--method sam --rho 0.1 --beta 1", 2, ["sam has no β"]),
        ("--method sam --rho 0.1,x", 2, ["--rho '0.1,x'", "numbers"]),
        ("--method sam --rho 0.1,0.10", 2, ["twice"]),
        ("--method sam --rho -0.1", 2, ["rho = -0.1"]),
        ("--method sam --rho 0.1 --trials 2", 2, ["--rho takes two bounds LOW,HIGH"]),
        ("--method sam --rho 0.1,inf --trials 2", 2, ["--rho takes two bounds LOW,HIGH"]),
        ("--method iam-d --rho 0.1,1 --beta 2,1 --trials 2", 2, ["--beta takes two bounds"]),
        ("--method sam --rho 0.1,1 --trials 2 --dry-run", 2, ["--dry-run", "--trials"]),
        ("--method sam --rho 0.1 --model mlp-4 --lr 1e30 --epochs 3 --seeds 1", 5, ["every cell", "--lr"]),
        ("--method sam --rho 0.1 --model mpl --epochs 1 --seeds 1", 2, ["no model 'mpl'", "'mlp'"]),
        ("--method sam --rho 0.1 --init gone.pt --epochs 1 --seeds 1", 1, ["1 of 1 runs failed", "gone.pt"]),
    ],
)
def test_one_line_that_names_offender_and_remedy(
    options: str, code: int, words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    found, _, err = run(f"gmprobe tune {options} --out o -q", capsys)
    assert found == code, err
    [line] = err.strip().splitlines()
    assert line.startswith("gmprobe: ")
    for word in words:
        assert word in line


def test_every_option_taken_from_train_is_a_setting() -> None:
    own = {"rho_text", "beta_text", "trials", "seeds", "out", "jobs", "dry_run", "output", "quiet"}
    names = [str(option.name) for option in tune.params]
    assert {name for name in names if name not in own} == set(SETTINGS) - set(OWN)
    assert {"model", "lr", "epochs", "data", "k_steps"} <= set(names)
    assert max(names.count(name) for name in set(names)) <= 2  # --json and --csv share one name
