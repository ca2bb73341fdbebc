"""Recipes and their runs: parsed, named, trained, measured, resumed; in this process and in others."""

import dataclasses
import errno
import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pytest
import torch

from gm_probe.data.datasets import open_source
from gm_probe.errors import DivergedError, StorageError, UsageError
from gm_probe.executors.local import Outcome
from gm_probe.files import atomic
from gm_probe.files.atomic import read_json, read_toml, write_json
from gm_probe.files.locks import LOCK, exclusive
from gm_probe.measuring import many as measuring
from gm_probe.runs.records import failure, find_runs, read_run, run_state
from gm_probe.sweep import runner
from gm_probe.sweep.recipe import Recipe, builtin_recipes, load_recipe, parse_recipe, run_name
from gm_probe.sweep.runner import is_complete, run_recipe, train_and_measure
from gm_probe.training.config import TrainConfig

BASE = {
    "data": "digits",
    "model": "mlp-8",
    "num_train": 60,
    "num_unlabeled": 40,
    "num_test": 50,
    "epochs": 2,
    "batch_size": 30,
    "device": "cpu",
}
PLAN = {
    "measures": ["local_inconsistency", "fisher_trace"],
    "num_starts": 2,
    "min_probes": 2,
    "max_probes": 2,
}
CONTENT = {"base": BASE, "grid": {"lr": [0.02, 0.1], "seed": [0, 1]}, "measure": PLAN}


def parse(**tables: Any) -> Recipe:
    return parse_recipe({**CONTENT, **tables})


@pytest.fixture
def recipe() -> Recipe:
    """Four runs of a moment each."""
    return parse()


def records(recipe: Recipe, out: Path) -> dict[str, Any]:
    return {name: read_run(out / name) for name in recipe.runs}


def stamps(out: Path) -> dict[str, int]:
    found = (path for path in out.rglob("*") if path.is_file() and path.name != LOCK)
    return {str(path.relative_to(out)): path.stat().st_mtime_ns for path in found}


def statuses(recipe: Recipe, outcomes: list[Outcome]) -> list[str]:
    """In the recipe's order."""
    found = {outcome.name: outcome.status for outcome in outcomes}
    assert len(found) == len(outcomes)
    return [found[name] for name in recipe.runs]


def run(recipe: Recipe, out: Path, **options: Any) -> list[str]:
    return statuses(recipe, run_recipe(recipe, out, **options))


def values(out: Path) -> dict[str, Any]:
    """What every run computed, to the last bit: measures and errors."""
    found = {}
    for folder in find_runs(out):
        record = read_run(folder)
        if record.status != "finished":  # one that failed computed nothing
            continue
        found[folder.name] = record.measures, record.summary["train_ce"], record.summary["test_error"]
    return found


# ---- parsing


def test_grid_is_expanded_over_base(recipe: Recipe) -> None:
    assert len(recipe.runs) == 4
    assert {(config.lr, config.seed) for config in recipe.runs.values()} == {
        (0.02, 0),
        (0.02, 1),
        (0.1, 0),
        (0.1, 1),
    }
    assert all(config.model == "mlp-8" and config.epochs == 2 for config in recipe.runs.values())
    assert recipe.plan.measures == ("local_inconsistency", "fisher_trace")
    assert recipe.plan.settings.num_starts == 2
    assert (recipe.plan.max_examples, recipe.plan.batch_size) == (None, None)


def test_empty_recipe_is_one_default_run() -> None:
    recipe = parse_recipe({})
    assert list(recipe.runs.values()) == [TrainConfig()]
    assert "fisher_trace" in recipe.plan.measures
    assert "error" not in recipe.plan.measures  # needs labels


def test_overrides_replace_base(recipe: Recipe) -> None:
    changed = parse_recipe(CONTENT, {"epochs": 5, "data": "cifar10"})
    assert all(config.epochs == 5 and config.data == "cifar10" for config in changed.runs.values())


@pytest.mark.parametrize(
    ("tables", "reason"),
    [
        ({"bases": {}}, "unknown table [bases]; there are [base], [grid], [list]"),
        ({"base": 3}, "base = 3 must be a table"),
        ({"grid": [1]}, "grid = [1] must be a table"),
        ({"grid": {"lr": 0.1}}, "grid.lr must be a list of values"),
        ({"grid": {"lr": []}}, "grid.lr must be a list of values"),
        ({"grid": {"learning_rate": [0.1]}}, "no setting 'learning_rate'"),
        ({"grid": {"weight_deca": [0.1]}}, "did you mean 'weight_decay'?"),
        ({"base": {"epoch": 3}}, "no setting 'epoch'; did you mean 'epochs'?"),
        ({"base": {"epochs": "3"}}, "epochs = '3' must be a whole number ≥ 1"),
        ({"base": {"method": "iam"}}, "method = 'iam'; did you mean"),
        ({"base": {**BASE, "lr": 0.5}}, "lr is both in [base] (or an option) and in the design"),
        ({"grid": {"seed": [0, 1, 0]}}, "the design names the same run twice (s0-"),
        ({"grid": {"lr": [1, 1.0]}}, "the design names the same run twice (lr1-"),
        ({"grid": {"weight_decay": [0.0, -0.0]}}, "the design names the same run twice (wd0-"),
        (
            {"grid": {}, "list": [{"lr": 0.3}, {"lr": 0.3, "momentum": 0.9}]},
            "the design names the same run twice (lr0.3-",
        ),
        (
            {"measure": {"measures": ["fisher_trac"]}},
            "no measure 'fisher_trac'; did you mean 'fisher_trace'?",
        ),
        ({"measure": {"measures": ["error"]}}, "error needs labels"),
        (
            {"measure": {"measures": "fisher_trace"}},
            "measure.measures = 'fisher_trace' must be a list of names",
        ),
        ({"measure": {"measures": [3]}}, "must be a list of names"),
        ({"measure": {"radius": 0.1}}, "no setting measure.radius; available: measures, max_examples"),
        ({"measure": {"rho": "big"}}, "measure.rho = 'big' must be a finite number above 0"),
        ({"measure": {"rho": True}}, "measure.rho = True must be a finite number above 0"),
        ({"measure": {"rho": -1}}, "measure.rho = -1 must be a finite number above 0"),
        ({"measure": {"num_starts": 2.5}}, "measure.num_starts = 2.5 must be a whole number ≥ 1"),
        ({"measure": {"protocol": "papr"}}, "measure.protocol = 'papr'"),
        ({"measure": {"max_examples": 0}}, "measure.max_examples = 0 must be a whole number ≥ 1"),
        ({"measure": {"batch_size": "all"}}, "measure.batch_size = 'all' must be a whole number ≥ 1"),
        ({"correlate": {"group": ["lr"]}}, "no setting correlate.group"),
        ({"correlate": {"group_by": "lr"}}, "correlate.group_by = 'lr' must be a list of names"),
        ({"correlate": {"group_by": ["wd"]}}, "correlate.group_by: no setting 'wd'"),
    ],
)
def test_mistakes_are_named(tables: dict[str, Any], reason: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse(**tables)
    assert reason in str(caught.value)
    assert "\n" not in str(caught.value)


def test_recipes_from_files(tmp_path: Path) -> None:
    path = tmp_path / "my recipe.toml"
    path.write_text("[base]\nepochs = 3\n[grid]\nseed = [4, 5]\n[correlate]\ngroup_by = ['seed']\n")
    recipe = load_recipe(str(path))
    assert [config.seed for config in recipe.runs.values()] == [4, 5]
    assert recipe.group_by == ("seed",)
    path.write_text("[base\n")
    with pytest.raises(StorageError, match=r"my recipe\.toml is not valid TOML"):
        load_recipe(str(path))
    with pytest.raises(StorageError, match=r"gone\.toml"):
        load_recipe(str(tmp_path / "gone.toml"))
    with pytest.raises(UsageError, match=r"no recipe 'quickstat'.*quickstart"):
        load_recipe("quickstat")


@pytest.mark.parametrize("name", builtin_recipes())
def test_builtin_recipes_parse(name: str) -> None:
    assert builtin_recipes()[name]
    assert load_recipe(name).runs


# ---- names


def test_names_say_what_varies(recipe: Recipe) -> None:
    assert next(iter(recipe.runs)).startswith("lr0.02-s0-")
    assert re.fullmatch(r"[0-9a-f]{8}", run_name(TrainConfig(), {}))
    assert list(parse_recipe(CONTENT).runs) == list(recipe.runs)
    turned = {**CONTENT, "base": dict(reversed(BASE.items()))}
    assert list(parse_recipe(turned).runs) == list(recipe.runs)


def test_names_are_independent_of_the_place(recipe: Recipe) -> None:
    for place in ({"device": "cuda:1"}, {"threads": 7}, {"data_root": "/x"}, {"download": True}):
        assert list(parse(base={**BASE, **place}).runs) == list(recipe.runs)
    for what in ({"epochs": 3}, {"split_seed": 1}, {"amp": "bf16"}, {"model": "mlp-9"}):
        assert not set(parse(base={**BASE, **what}).runs) & set(recipe.runs)


def test_names_are_unique_and_fit_any_file_system() -> None:
    grid = {
        "model": [
            "6cnn",
            "/home/me/../x y.py:build",
            ".hidden:f",
            "C:\\a\\b.py:f",
            "模型:é",
            "a" * 300,
            "CON",
        ],
        "milestones": [[], [1, 2], [1, 2, 3]],
        "lr": [1e-8, 0.1, 0.1000000001],
        "augment": [True, False],
    }
    names = list(parse_recipe({"grid": grid}).runs)
    assert len({name.lower() for name in names}) == 7 * 3 * 3 * 2
    for name in names:
        assert re.fullmatch(r"[A-Za-z0-9_+-][A-Za-z0-9._+-]*", name)
        assert len(name) < 150


# ---- runs in this process


def test_run_and_skip(tmp_path: Path, recipe: Recipe) -> None:
    seen: list[Outcome] = []
    threads = torch.get_num_threads()
    outcomes = run_recipe(recipe, tmp_path, notify=seen.append)
    assert [(o.name, o.status, o.reason) for o in outcomes] == [(n, "finished", None) for n in recipe.runs]
    assert seen == outcomes
    assert torch.get_num_threads() == threads
    assert sorted(folder.name for folder in find_runs(tmp_path)) == sorted(recipe.runs)
    for name, record in records(recipe, tmp_path).items():
        assert record.status == "finished"
        assert set(record.measures) == set(recipe.plan.measures)
        assert record.config["seed"] == recipe.runs[name].seed
        assert all(row["value"] > 0 for row in record.measures.values())
    assert len({json.dumps(v) for v in values(tmp_path).values()}) == 4
    before = stamps(tmp_path)
    assert run(recipe, tmp_path) == ["skipped"] * 4
    assert stamps(tmp_path) == before
    longer = parse(grid={"lr": [0.02, 0.1], "seed": [0, 1, 2]})
    assert run(longer, tmp_path) == ["skipped", "skipped", "finished"] * 2
    assert before.items() <= stamps(tmp_path).items()


def test_another_plan_measures_again_and_trains_nothing(tmp_path: Path) -> None:
    grid = {"seed": [0]}
    run_recipe(parse(grid=grid), tmp_path)
    (folder,) = find_runs(tmp_path)
    before, first = stamps(folder), read_run(folder)
    fewer = {**PLAN, "measures": ["fisher_trace"]}
    assert run(parse(grid=grid, measure=fewer), tmp_path) == ["skipped"]
    for change in ({"rho": 0.2}, {"max_examples": 10}, {"measures": ["fisher_lambda_max"]}):
        changed = parse(grid=grid, measure={**PLAN, **change})
        assert run(changed, tmp_path) == ["finished"]
        after = stamps(folder)
        assert {name for name in after if after[name] != before[name]} == {"measures.json"}
        assert read_run(folder).measures != first.measures
        assert run(changed, tmp_path) == ["skipped"]
    run_recipe(parse(grid=grid), tmp_path)
    assert read_run(folder).measures == {**first.measures, **read_run(folder).measures}
    assert set(read_run(folder).measures) == {
        *first.measures,
        "fisher_lambda_max",
    }  # taken likewise: it stays


def test_finished_but_unmeasured_is_measured_wherever_it_is(tmp_path: Path, recipe: Recipe) -> None:
    run_recipe(recipe, tmp_path)
    wanted = values(tmp_path)
    name = next(iter(recipe.runs))
    (tmp_path / name / "measures.json").unlink()
    before = stamps(tmp_path)
    moved = parse(
        base={**BASE, "data_root": "/elsewhere", "device": "auto" if not torch.cuda.is_available() else "cpu"}
    )
    assert run(moved, tmp_path) == ["finished", "skipped", "skipped", "skipped"]
    assert before.items() <= stamps(tmp_path).items()
    assert values(tmp_path) == wanted


def test_without_measures_a_run_is_complete_once_trained(tmp_path: Path) -> None:
    recipe = parse(grid={"seed": [0]}, measure={"measures": []})
    assert run(recipe, tmp_path) == ["finished"]
    assert run(recipe, tmp_path) == ["skipped"]
    assert not list(tmp_path.rglob("measures.json"))


def test_failed_runs_stop_nothing_and_are_tried_again(tmp_path: Path, recipe: Recipe) -> None:
    names = list(recipe.runs)
    data = tmp_path / "digits.npz"
    missing = recipe.runs[names[1]].replace(data=str(data))
    broken = dataclasses.replace(recipe, runs={**recipe.runs, names[1]: missing})
    out = tmp_path / "runs"
    outcomes = run_recipe(broken, out)
    assert statuses(broken, outcomes) == ["finished", "failed", "finished", "finished"]
    assert str(data) in (outcomes[1].reason or "")
    assert read_json(out / names[1] / "summary.json")["status"] == "failed"
    assert not is_complete(out / names[1], recipe.plan)
    assert run(broken, out) == ["skipped", "failed", "skipped", "skipped"]
    assert run(recipe, out) == ["skipped", "finished", "skipped", "skipped"]
    assert read_run(out / names[1]).status == "finished"


def test_a_surprise_before_the_folder_exists(
    tmp_path: Path, recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = runner.train

    def train(config: TrainConfig, out: Path, **options: Any) -> Any:
        if config.seed == 1:
            raise RuntimeError("a bug\nin two lines")
        return real(config, out, **options)

    monkeypatch.setattr(runner, "train", train)
    outcomes = run_recipe(recipe, tmp_path)
    assert statuses(recipe, outcomes) == ["finished", "failed"] * 2
    assert outcomes[1].reason.startswith("RuntimeError: a bug")
    assert "Traceback" in (tmp_path / outcomes[1].name / "error.txt").read_text()
    monkeypatch.undo()
    assert run(recipe, tmp_path) == ["skipped", "finished"] * 2
    assert not list(tmp_path.rglob("error.txt"))


def test_a_failed_measurement_keeps_the_training(
    tmp_path: Path, recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    def diverge(*_: object, **__: object) -> NoReturn:
        raise DivergedError("not finite")

    monkeypatch.setattr(measuring, "measure_checkpoint", diverge)
    outcomes = run_recipe(recipe, tmp_path)
    assert {(o.status, o.reason) for o in outcomes} == {("failed", "not finite")}
    assert {record.status for record in records(recipe, tmp_path).values()} == {"finished"}
    assert {failure(tmp_path / name) for name in recipe.runs} == {"not finite"}
    before = {name: time for name, time in stamps(tmp_path).items() if not name.endswith("error.txt")}
    monkeypatch.undo()
    assert run(recipe, tmp_path) == ["finished"] * 4
    assert before.items() <= stamps(tmp_path).items()


def test_a_run_whose_last_sync_failed_is_complete_and_no_failure(
    tmp_path: Path, recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = atomic._sync_folder

    def failing(folder: Path) -> None:
        original(folder)
        if (folder / "measures.json").exists() and not (folder / "error.txt").exists():
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(atomic, "_sync_folder", failing)
    assert run(recipe, tmp_path) == ["failed"] * 4
    monkeypatch.undo()
    before = {name: time for name, time in stamps(tmp_path).items() if not name.endswith("error.txt")}
    assert run(recipe, tmp_path) == ["skipped"] * 4
    assert {run_state(tmp_path / name) for name in recipe.runs} == {"finished"}
    assert stamps(tmp_path) == before


def test_a_full_disk_is_reported_for_every_run(
    tmp_path: Path, recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: int) -> NoReturn:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    outcomes = run_recipe(recipe, tmp_path)
    assert statuses(recipe, outcomes) == ["failed"] * 4
    assert all("No space left" in (outcome.reason or "") for outcome in outcomes)
    monkeypatch.undo()
    assert not list(tmp_path.rglob("*.tmp"))
    assert run(recipe, tmp_path) == ["finished"] * 4


@pytest.mark.parametrize("name", ["config.toml", "summary.json", "measures.json"])
def test_a_torn_file_costs_its_own_run_only(tmp_path: Path, recipe: Recipe, name: str) -> None:
    run_recipe(recipe, tmp_path)
    victim = list(recipe.runs)[2]
    (tmp_path / victim / name).write_bytes(b'{"a": [')
    outcomes = run_recipe(recipe, tmp_path)
    assert statuses(recipe, outcomes) == ["skipped", "skipped", "failed", "skipped"]
    assert str(tmp_path / victim / name) in (outcomes[-1].reason or "")


def test_diverged_runs_are_recorded_and_not_repeated(tmp_path: Path) -> None:
    recipe = parse(grid={"lr": [1e30, 0.02]})
    names = list(recipe.runs)
    assert run(recipe, tmp_path) == ["diverged", "finished"]
    record = read_run(tmp_path / names[0])
    assert record.status == "diverged"
    assert "not finite" in record.summary["reason"]
    before = stamps(tmp_path)
    assert run(recipe, tmp_path) == ["skipped", "skipped"]
    assert stamps(tmp_path) == before


def test_interrupted_within_a_run_it_resumes_with_its_threads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = parse(base={**BASE, "threads": 1}, grid={"seed": [0]})
    ((name, config),) = recipe.runs.items()
    run_recipe(recipe, tmp_path / "whole")
    real = runner.train

    def train(config: TrainConfig, out: Path, **options: Any) -> Any:
        def stop(_: object) -> NoReturn:
            raise KeyboardInterrupt

        return real(config, out, **options, notify=stop)

    monkeypatch.setattr(runner, "train", train)
    with pytest.raises(KeyboardInterrupt):
        run_recipe(recipe, tmp_path / "cut")
    monkeypatch.undo()
    assert read_run(tmp_path / "cut" / name).status == "unfinished"
    assert train_and_measure(config.replace(threads=None), recipe.plan, tmp_path / "cut" / name) == "finished"
    assert values(tmp_path / "cut") == values(tmp_path / "whole")


# ---- runs in other processes

DYING = """
import os, torch

def build():
    if os.environ.get("GM_PROBE_TEST_DIE"):
        os._exit(9)
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10))
"""


@pytest.fixture
def base(tmp_path: Path) -> dict[str, Any]:
    """``BASE`` over a small file: scikit-learn's digits take every process a second to import."""
    pool = open_source("digits", labeled=True).pool.select(torch.arange(200))
    np.savez(tmp_path / "digits.npz", x=pool.x.numpy(), y=pool.y.numpy())
    return {**BASE, "data": str(tmp_path / "digits.npz")}


def test_processes_compute_the_same_and_a_dying_one_costs_its_run_only(
    tmp_path: Path, base: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "dying.py").write_text(DYING)
    monkeypatch.setenv("GM_PROBE_TEST_DIE", "1")
    recipe = parse(base=base)
    dying = TrainConfig.from_dict({**base, "model": f"{tmp_path / 'dying.py'}:build"})
    mixed = dataclasses.replace(recipe, runs={"dying": dying, **recipe.runs})
    outcomes = {outcome.name: outcome for outcome in run_recipe(mixed, tmp_path / "two", jobs=2)}
    assert outcomes.pop("dying") == Outcome(
        "dying", "failed", "its process died (exit code 9: out of memory, or killed)"
    )
    assert set(outcomes) == set(recipe.runs)
    assert {outcome.status for outcome in outcomes.values()} == {"finished"}
    assert read_json(tmp_path / "two" / "dying" / "summary.json")["status"] == "failed"
    assert not multiprocessing.active_children()

    run_recipe(parse(base={**base, "threads": 1}), tmp_path / "one")
    assert values(tmp_path / "two") == values(tmp_path / "one")
    config = read_toml(tmp_path / "two" / next(iter(recipe.runs)) / "config.toml")
    assert config["environment"]["threads"] == 1
    assert "threads" not in config  # how a run was scheduled is none of its settings

    monkeypatch.delenv("GM_PROBE_TEST_DIE")
    assert run(mixed, tmp_path / "two") == ["finished"] + ["skipped"] * 4


def test_whatever_ends_a_sweep_ends_its_processes(tmp_path: Path, base: dict[str, Any]) -> None:
    endless = TrainConfig.from_dict({**base, "epochs": 100_000})
    broken = TrainConfig.from_dict({**base, "data": str(tmp_path / "gone.npz")})
    recipe = dataclasses.replace(parse(), runs={"endless": endless, "broken": broken})

    def interrupt(_: Outcome) -> NoReturn:
        _await(lambda: (tmp_path / "runs" / "endless" / "state.pt").exists(), 60)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_recipe(recipe, tmp_path / "runs", jobs=2, notify=interrupt)
    assert not multiprocessing.active_children()
    before = stamps(tmp_path)
    time.sleep(0.3)
    assert stamps(tmp_path) == before
    assert not list(tmp_path.rglob("*.tmp"))


SCRIPT = """
import sys
from pathlib import Path
from gm_probe.sweep.recipe import load_recipe
from gm_probe.sweep.runner import run_recipe

if __name__ == "__main__":
    run_recipe(load_recipe(sys.argv[1]), Path(sys.argv[2]), jobs=2)
"""


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="lists child processes by Linux's /proc")
def test_a_killed_sweep_leaves_no_worker_behind(tmp_path: Path, base: dict[str, Any]) -> None:
    (tmp_path / "script.py").write_text(SCRIPT)
    lines = [f"{key} = {json.dumps(value)}" for key, value in {**base, "epochs": 100_000}.items()]
    (tmp_path / "r.toml").write_text("\n".join(["[base]", *lines]))
    command = [sys.executable, "script.py", "r.toml", "runs"]
    environment = {**os.environ, "PYTHONPATH": str(Path(runner.__file__).parents[2])}
    with subprocess.Popen(command, cwd=tmp_path, env=environment, stderr=subprocess.DEVNULL) as sweep:
        try:
            _await(lambda: len(list((tmp_path / "runs").rglob("state.pt"))) == 1, 60)
            children = Path(f"/proc/{sweep.pid}/task/{sweep.pid}/children").read_text().split()
        finally:
            sweep.send_signal(signal.SIGKILL)
    assert children
    _await(lambda: not any(_alive(child) for child in children), 20)
    before = stamps(tmp_path)
    time.sleep(0.3)
    assert stamps(tmp_path) == before


def _await(condition: Any, seconds: float) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)


def _alive(pid: str) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_status_of_a_complete_run_is_read_without_the_model(tmp_path: Path, recipe: Recipe) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.toml").write_text('model = "gone.py:build"\n')
    write_json(run / "summary.json", {"status": "finished"})
    assert not is_complete(run, recipe.plan)
    rows = {name: {"value": 1.0} for name in recipe.plan.measures}
    write_json(run / "measures.json", {"measures": rows})
    assert not is_complete(run, recipe.plan)  # nobody knows how these were taken
    settings = {**dataclasses.asdict(recipe.plan.settings), "part": "own unlabeled", "max_examples": None}
    write_json(run / "measures.json", {"measures": rows, "settings": settings})
    assert is_complete(run, recipe.plan)


def test_two_sweeps_on_one_folder_do_not_train_a_run_twice(recipe: Recipe, tmp_path: Path) -> None:
    first = next(iter(recipe.runs))
    with exclusive(tmp_path / first):
        outcomes = {outcome.name: outcome for outcome in run_recipe(recipe, tmp_path)}
    assert outcomes[first].status == "busy"
    assert "another gmprobe" in str(outcomes[first].reason)
    assert not (tmp_path / first / "summary.json").exists()  # it is not the second sweep's to judge
    assert [outcomes[name].status for name in recipe.runs if name != first] == ["finished"] * 3
    assert run(recipe, tmp_path) == ["finished"] + ["skipped"] * 3


def test_what_another_measured_meanwhile_is_not_measured_again(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, measured = runner.train, measuring.measure_checkpoint
    taken = []

    def train(config: TrainConfig, out: Path, **options: Any) -> Any:
        summary = real(config, out, **options)
        monkeypatch.setattr(runner, "train", real)
        assert (
            train_and_measure(config, recipe.plan, out) == "finished"
        )  # the other, between this one's two holds
        monkeypatch.setattr(runner, "train", train)
        return summary

    def measure(*args: Any, **options: Any) -> Any:
        taken.append(args[0])
        return measured(*args, **options)

    monkeypatch.setattr(runner, "train", train)
    monkeypatch.setattr(measuring, "measure_checkpoint", measure)
    assert run(recipe, tmp_path) == ["skipped"] * 4
    assert len(taken) == 4


def test_a_measurement_over_other_data_does_not_count(recipe: Recipe, tmp_path: Path) -> None:
    run_recipe(recipe, tmp_path)
    name = next(iter(recipe.runs))
    path = tmp_path / name / "measures.json"
    measured = read_json(path)
    for key, value in (("part", "test"), ("max_examples", 9)):
        write_json(path, {**measured, "settings": {**measured["settings"], key: value}})
        assert not is_complete(tmp_path / name, recipe.plan)
    write_json(path, measured)
    assert is_complete(tmp_path / name, recipe.plan)
