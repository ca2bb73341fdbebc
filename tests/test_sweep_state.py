"""What lies on disk says all: states and heartbeat, status, collect, retries, and sweeps that are killed."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from command_line import run
from pandas.testing import assert_frame_equal
from safetensors.torch import load_file

from gm_probe.data.datasets import open_source
from gm_probe.errors import BusyError, StorageError, UsageError
from gm_probe.files import locks
from gm_probe.files.atomic import write_json, write_toml
from gm_probe.files.locks import LOCK, StageProgress, exclusive, held, progress_of
from gm_probe.measures.costs import expected_cost
from gm_probe.measures.settings import Settings
from gm_probe.runs.records import failure, run_state
from gm_probe.sweep import cost
from gm_probe.sweep.cost import run_costs
from gm_probe.sweep.manifest import named_as_found, only, read_sweep, write_sweep
from gm_probe.sweep.recipe import Recipe, load_recipe, parse_recipe
from gm_probe.sweep.runner import run_recipe
from gm_probe.sweep.status import sweep_status
from gm_probe.tables.collect import collect
from gm_probe.tables.runs import load_table
from gm_probe.training.config import TrainConfig

BASE = {
    "data": "digits",
    "model": "mlp-8",
    "num_train": 60,
    "num_unlabeled": 40,
    "num_test": 50,
    "epochs": 3,
    "batch_size": 20,
    "device": "cpu",
}
PLAN = {"measures": ["local_inconsistency", "mean_entropy"], "num_starts": 2}
TIMINGS = ["train_seconds"]


def parse(**tables: Any) -> Recipe:
    return parse_recipe(
        {"base": BASE, "grid": {"lr": [0.02, 0.1], "seed": [0, 1]}, "measure": PLAN, **tables}
    )


def command(capsys: pytest.CaptureFixture[str], *args: object) -> tuple[int, str, str]:
    return run(args, capsys)


def states(root: Path) -> dict[str, str]:
    return {run.run: run.state for run in sweep_status(root).runs}


# ---- claim and heartbeat


def test_a_held_folder_names_its_holder_until_it_is_let_go(tmp_path: Path) -> None:
    assert not held(tmp_path / "none")
    with exclusive(tmp_path):
        assert (tmp_path / LOCK).read_text().split()[:2] == [socket.gethostname(), str(os.getpid())]
        assert held(tmp_path)
        assert run_state(tmp_path) == "running"
        with pytest.raises(BusyError), exclusive(tmp_path):
            pass
        assert held(tmp_path)  # the other's try has wiped nothing
    assert not held(tmp_path)


def test_the_heart_beats(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locks, "BEAT", 0.01)
    with exclusive(tmp_path) as lock:
        lock.report_progress("training", 1, 2)
        before, end = (tmp_path / LOCK).read_text(), time.monotonic() + 20
        while (tmp_path / LOCK).read_text() == before:
            assert time.monotonic() < end
            time.sleep(0.01)
        assert progress_of(tmp_path) == StageProgress("training", 1, 2, None, {})


def test_a_dead_holder_and_a_silent_one_hold_nothing(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", ""]) as gone:
        pass
    for name in ("dead", "live", "silent"):
        (tmp_path / name).mkdir()
        holder = f"{socket.gethostname()} {gone.pid}\n" if name == "dead" else "elsewhere 1\n"
        (tmp_path / name / LOCK).write_text(holder)
    old = time.time() - locks.STALE - 1
    os.utime(tmp_path / "silent" / LOCK, (old, old))
    assert [held(tmp_path / name) for name in ("dead", "live", "silent")] == [False, True, False]


# ---- states


def test_every_state(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = parse(grid={"seed": list(range(7))})
    write_sweep(recipe, tmp_path)
    finished, trained, running, stale, _, diverged, failed = recipe.runs
    run_recipe(only(recipe, finished), tmp_path)
    write_toml(tmp_path / trained / "config.toml", {"epochs": 3})
    write_json(tmp_path / trained / "summary.json", {"status": "finished"})
    write_toml(tmp_path / stale / "config.toml", {"epochs": 3})
    (tmp_path / stale / "metrics.jsonl").write_text("{}\n{}\n")
    write_toml(tmp_path / diverged / "config.toml", {"epochs": 3})
    write_json(tmp_path / diverged / "summary.json", {"status": "diverged", "reason": "loss not finite"})
    write_json(tmp_path / failed / "summary.json", {"status": "failed"})
    (tmp_path / failed / "error.txt").write_text("Traceback\n  x\nValueError: no\n\n")
    with exclusive(tmp_path / running):
        found = sweep_status(tmp_path)
        code, out, _ = command(capsys, "status", tmp_path)
        assert code == 0
        assert found.eta > 0
        _, printed, _ = command(capsys, "status", tmp_path, "--json")
    wanted = ["finished", "trained", "running", "stale", "pending", "diverged", "failed"]
    assert [run.state for run in found.runs] == wanted
    assert [(run.epochs, run.max_epochs) for run in found.runs][3] == (2, 3)
    assert [run.reason for run in found.runs][5:] == ["loss not finite", "ValueError: no"]
    assert (
        "3 of 7 runs ended: 1 finished, 1 trained, 1 running, 1 stale, 1 pending, 1 diverged, 1 failed" in out
    )
    assert f"  failed: {failed}: ValueError: no\n" in out
    assert json.loads(printed)["counts"] == dict.fromkeys(wanted, 1)
    assert states(tmp_path)[running] == "pending"
    assert sweep_status(tmp_path).eta is None  # nothing runs


def test_status_of_a_folder_of_sweeps(tmp_path: Path) -> None:
    recipe = parse()
    for name in ("one", "two"):
        write_sweep(recipe, tmp_path / name)
    run_recipe(only(recipe, next(iter(recipe.runs))), tmp_path / "one")
    found = states(tmp_path)
    assert set(found) == {f"{folder}/{name}" for folder in ("one", "two") for name in recipe.runs}
    assert sorted(found.values()) == ["finished"] + ["pending"] * 7
    os.utime(tmp_path / "one" / "sweep.json", (time.time() - 100,) * 2)
    at_work = tmp_path / "one" / list(recipe.runs)[1]
    with exclusive(at_work) as lock:
        write_toml(at_work / "config.toml", {"epochs": 4})
        lock.report_progress("measuring", 1, 2)  # its second stage of two: three quarters
        before = time.time()
        eta = sweep_status(tmp_path).eta
        after = time.time()
    began = (tmp_path / "one" / next(iter(recipe.runs)) / "config.toml").stat().st_mtime
    assert before - began <= eta / 2.25 * 1.75 <= after - began


def test_runs_keep_their_folders_where_the_recipe_orders_settings_otherwise(tmp_path: Path) -> None:
    recipe = parse()
    run_recipe(recipe, tmp_path)
    turned = parse(grid={"seed": [0, 1], "lr": [0.02, 0.1]})
    assert set(turned.runs) != set(recipe.runs)
    again = named_as_found(turned, tmp_path)
    assert again.runs == recipe.runs
    assert {outcome.status for outcome in run_recipe(again, tmp_path)} == {"skipped"}
    assert named_as_found(turned, tmp_path / "elsewhere") == turned
    alike = parse(grid={"threads": [1, 2], "seed": [0], "lr": [0.02]})  # two runs of one hash
    assert named_as_found(alike, tmp_path) == alike


def test_status_of_what_is_no_sweep(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command(capsys, "status", tmp_path / "gone")[0] == 2
    assert command(capsys, "status", tmp_path)[0] == 2
    (tmp_path / "sweep.json").write_text("{")
    code, _, err = command(capsys, "status", tmp_path)
    assert code == 7
    assert "sweep.json" in err


def test_a_sweep_is_read_back_as_it_was_written(tmp_path: Path) -> None:
    for recipe in (parse(), load_recipe("quickstart"), parse(measure={**PLAN, "max_examples": 9})):
        write_sweep(recipe, tmp_path)
        assert read_sweep(tmp_path) == recipe
    (tmp_path / "sweep.json").write_text('{"runs": {}}')
    with pytest.raises(StorageError, match=r"sweep\.json: measures is missing"):
        read_sweep(tmp_path)
    with pytest.raises(UsageError, match="holds no sweep"):
        read_sweep(tmp_path / "gone")
    with pytest.raises(UsageError, match="no run 'nobody'"):
        only(recipe, "nobody")


def test_run_one_does_what_is_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = parse()
    write_sweep(recipe, tmp_path)
    name = list(recipe.runs)[1]
    assert command(capsys, "run-one", tmp_path, name)[:2] == (0, f"{name} finished\n")
    assert command(capsys, "run-one", tmp_path, name)[:2] == (0, f"{name} skipped\n")
    assert list(states(tmp_path).values()).count("finished") == 1
    with exclusive(tmp_path / next(iter(recipe.runs))):
        assert command(capsys, "run-one", tmp_path, next(iter(recipe.runs)))[0] == 7
    code, _, err = command(capsys, "run-one", tmp_path, "nobody")
    assert code == 2
    assert "nobody" in err


def test_failed_runs_wait_for_retry(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data, out = tmp_path / "late.npz", tmp_path / "runs"
    lines = "\n".join(f"{key} = {json.dumps(value)}" for key, value in BASE.items() if key != "data")
    recipe = tmp_path / "r.toml"
    recipe.write_text(f'[base]\ndata = "{data}"\n{lines}\n[grid]\nseed = [0, 1]\n[measure]\nmeasures = []\n')
    data.touch()
    code, printed, err = command(capsys, "sweep", recipe, "--out", out)
    assert code == 1
    assert printed.count("late.npz") == 2
    assert "--retry-failed" in err

    pool = open_source("digits", labeled=True).pool
    np.savez(data, x=pool.x.numpy(), y=pool.y.numpy())
    names = list(load_recipe(str(recipe)).runs)
    before = failure(out / names[0])
    assert command(capsys, "sweep", recipe, "--out", out)[0] == 1
    assert [failure(out / name) for name in names] == [before] * 2
    assert "late.npz" in str(before)
    assert command(capsys, "sweep", recipe, "--out", out, "--retry-failed")[0] == 0
    assert set(states(out).values()) == {"finished"}


# ---- collect


def number(cell: str) -> float:
    """Exact, which pandas 2 is not of itself."""
    return float(cell or "nan")


def test_the_table_says_what_the_folder_says(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = parse()
    out = tmp_path / "runs"
    run_recipe(recipe, out)
    (out / "broken").mkdir()
    (out / "broken" / "config.toml").write_text("[")
    code, printed, _ = command(capsys, "collect", out, "--out", tmp_path / "t.csv")
    assert (code, "5 runs" in printed) == (0, True)
    exact = dict.fromkeys(["lr", "test_ce", "local_inconsistency", "local_inconsistency_stderr"], number)
    frame = pd.read_csv(tmp_path / "t.csv", converters=exact).set_index("run")
    assert frame.status.to_dict() == {**dict.fromkeys(recipe.runs, "finished"), "broken": "failed"}
    assert "config.toml is not valid TOML" in frame.reason["broken"]
    for name, config in recipe.runs.items():
        summary = json.loads((out / name / "summary.json").read_text())
        rows = json.loads((out / name / "measures.json").read_text())["measures"]
        row = frame.loc[name]
        assert (row.lr, row.seed, row.model) == (config.lr, config.seed, "mlp-8")
        assert row.test_ce == summary["test_ce"]  # to the last bit
        assert row.local_inconsistency == rows["local_inconsistency"]["value"]
        assert row.local_inconsistency_stderr == rows["local_inconsistency"]["stderr"]
        assert row["probe.num_starts"] == 2
    table, folder = load_table(tmp_path / "t.csv"), load_table(out)
    assert set(table.measures) == set(folder.measures)
    known = table.frame.dropna(subset="error_gap").reset_index(drop=True)
    same = ["run", "error_gap", "ce_gap", *folder.measures]
    assert_frame_equal(known[same], folder.frame.sort_values("run").reset_index(drop=True)[same])


def test_collect_names_its_mistakes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command(capsys, "collect", tmp_path, "--out", tmp_path / "t.csv")[0] == 2
    code, _, err = command(capsys, "collect", tmp_path, "--out", tmp_path / "t.xlsx")
    assert code == 2
    assert ".csv or .parquet" in err


# ---- killed


GRID = {"lr": [0.02, 0.1], "seed": [0, 1]}
SWEEP = f"""
import sys
from pathlib import Path
import torch
from test_sweep_state import parse, run_recipe
torch.set_num_threads(int(sys.argv[2]))
run_recipe(parse(grid={GRID}), Path(sys.argv[1]))
"""


def _sweep_apart(out: Path) -> subprocess.Popen[bytes]:
    """In a process of its own; a fork of this one could hang, for it has threads."""
    here = Path(__file__).parent
    paths = os.pathsep.join([str(here), str(here.parent)])
    command = [sys.executable, "-c", SWEEP, str(out), str(torch.get_num_threads())]
    return subprocess.Popen(command, env={**os.environ, "PYTHONPATH": paths})


def test_a_sweep_that_was_killed_gives_the_same_table(tmp_path: Path) -> None:
    recipe = parse(grid=GRID)
    run_recipe(recipe, tmp_path / "whole")
    child, lines, end = _sweep_apart(tmp_path / "cut"), 0, time.monotonic() + 60
    while lines < 5 and time.monotonic() < end:  # within the second run
        lines = sum(path.read_bytes().count(b"\n") for path in tmp_path.glob("cut/*/metrics.jsonl"))
    child.kill()
    child.wait()
    assert lines >= 5
    assert "running" not in states(tmp_path / "cut").values()
    assert [outcome.status for outcome in run_recipe(recipe, tmp_path / "cut")].count("finished") >= 1
    whole, cut = (collect(tmp_path / name).drop(columns=TIMINGS) for name in ("whole", "cut"))
    assert_frame_equal(cut, whole)
    assert (cut.status == "finished").all()


# ---- before it runs


def test_a_dry_run_says_what_a_run_will_leave_and_runs_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = "\n".join(f"{key} = {json.dumps(value)}" for key, value in {**BASE, "model": "mlp-256"}.items())
    recipe = tmp_path / "r.toml"
    recipe.write_text(f"[base]\n{lines}\n[grid]\nseed = [0, 1]\n[measure]\nmeasures = ['mean_entropy']\n")
    out = tmp_path / "runs"
    code, printed, _ = command(capsys, "sweep", recipe, "--out", out, "--dry-run", "--json")
    assert code == 0
    assert not out.exists()
    told = json.loads(printed)
    assert all(run["to_do"] and run["seconds"] > 0 for run in told["runs"])
    assert told["seconds"] == pytest.approx(sum(run["seconds"] for run in told["runs"]))
    run_recipe(load_recipe(str(recipe)), out)
    found = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    passing = 2 * 4 * (64 * 256 + 256 + 256 * 10 + 10)  # weights and momentum of one run
    assert told["bytes"] == pytest.approx(found + passing, rel=0.1)
    _, printed, _ = command(capsys, "sweep", recipe, "--out", out, "--dry-run")
    assert printed.count("complete") == 2
    assert "0 of 2 runs to do" in printed


def test_estimates_scale_with_the_work() -> None:
    plan = parse().plan
    configs = [TrainConfig.from_dict({**BASE, "epochs": epochs}) for epochs in (10, 20, 30)]
    first, second, third = (cost.seconds for cost in run_costs(configs, plan))
    assert third - second == pytest.approx(second - first)  # one timing for all three: nothing is random
    assert second > first > 0


def test_measuring_is_estimated_without_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    timed = cost._timed

    def fixed(config: TrainConfig) -> tuple[float, Any]:
        return (1.0 if config.amp == "bf16" else 3.0), timed(config)[1]

    monkeypatch.setattr(cost, "_timed", fixed)
    configs = [TrainConfig.from_dict({**BASE, "amp": amp}) for amp in ("none", "bf16")]
    plain, cast = (cost.seconds for cost in run_costs(configs, parse().plan))
    assert plain - cast == pytest.approx((3.0 - 1.0) * 3 * 3)  # of 3 epochs of 3 steps, and nothing else


def test_estimates_count_what_looks_and_unlabeled_images_cost(monkeypatch: pytest.MonkeyPatch) -> None:
    timed = cost._timed
    monkeypatch.setattr(cost, "_timed", lambda config: (1.0, timed(config)[1]))
    few = {**BASE, "model": "6cnn", "labels": 20, "objective": "fixmatch", "mu": 2, "batch_size": 5}
    variants = [BASE, {**BASE, "eval_every": 1}, {**BASE, "track_every": 1}, few]
    configs = [TrainConfig.from_dict({"epochs": 3, **each}) for each in variants]
    plan = replace(parse().plan, measures=())
    base, looking, tracking, unlabeled = (cost.seconds for cost in run_costs(configs, plan))
    evaluation = 1 / 20  # a step of 20 examples is as many gradient evaluations
    assert base == pytest.approx(3 * 3 + (60 + 50) / 3 * evaluation)
    assert looking - base == pytest.approx(3 * (60 + 50) / 3 * evaluation)
    assert tracking - base == pytest.approx(
        3 * 40 * expected_cost(["local_inconsistency"], Settings()) * evaluation
    )
    # 40 unlabeled ones, 10 a step, each in two views beside the labeled one
    assert unlabeled == pytest.approx(3 * 4 + (20 + 50) / 3 / (5 * (1 + 2 * 2)))


# ---- measured again


def test_a_folder_of_runs_is_measured_without_training(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = parse(grid={"seed": [0, 1]}, measure={**PLAN, "min_probes": 3})
    run_recipe(recipe, tmp_path)
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun" / "config.toml").write_text("epochs = 3\n")
    for name in recipe.runs:  # elsewhere: no reason to throw anything away
        saved = json.loads((tmp_path / name / "measures.json").read_text())
        saved["settings"] |= {"threads": 9, "torch": "2.0", "device_name": "another"}
        write_json(tmp_path / name / "measures.json", saved)
    weights = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*/checkpoint.safetensors")}
    options = ["--measures", "parameter_norm", "--save", "--json", "--device", "cpu"]
    code, printed, _ = command(capsys, "measure", tmp_path, *options)
    assert code == 0
    found = {Path(result["checkpoint"]).name: result for result in json.loads(printed)}
    assert set(found) == set(recipe.runs)
    for name in recipe.runs:
        tensors = load_file(tmp_path / name / "checkpoint.safetensors")
        norm = sum(float(tensor.double().square().sum()) for tensor in tensors.values()) ** 0.5
        kept = json.loads((tmp_path / name / "measures.json").read_text())["measures"]
        assert found[name]["measures"]["parameter_norm"]["value"] == pytest.approx(norm, rel=1e-5)
        # the sweep's own stay beside it, for the new one is taken as they were: 2 starts, 3 random vectors at least
        assert set(kept) == {"local_inconsistency", "mean_entropy", "parameter_norm"}
        assert found[name]["as_before"] == {"num_starts": 2, "min_probes": 3}
    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*/*") if path.name != LOCK}
    code, again, _ = command(capsys, "measure", tmp_path, *options)
    assert {Path(r["checkpoint"]).name for r in json.loads(again)} == set(recipe.runs)
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert {path: before[path] for path in weights} == weights


def test_a_broken_run_does_not_stop_the_others(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, two = run_recipe(parse(grid={"seed": [0, 1]}, measure={"measures": []}), tmp_path)
    (tmp_path / one.name / "summary.json").write_text("{")
    code, printed, told = command(
        capsys, "measure", tmp_path, "--measures", "parameter_norm", "--save", "--json"
    )
    assert code == 7
    broken, whole = json.loads(printed)
    assert [Path(entry["checkpoint"]).name for entry in (broken, whole)] == [one.name, two.name]
    assert (broken["exit_code"], whole["measures"]["parameter_norm"]["value"] > 0) == (7, True)
    assert f"{one.name}/summary.json is not valid JSON" in told


MEASURE = "--measures fisher_trace,input_jacobian_norm --save -q --trace-tolerance 1e-9 --max-probes 300 --device cpu"
INTERRUPTED = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where the tests run in background
from gm_probe.cli import main
main(["measure", *sys.argv[1:], "--jobs", "2"])
"""


def test_an_interrupted_measurement_of_many_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = parse(grid={"seed": [0, 1, 2, 3]}, measure={"measures": []})
    run_recipe(recipe, tmp_path)
    weights = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*/checkpoint.safetensors")}
    paths = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    words = [str(tmp_path), *MEASURE.split()]
    first = subprocess.Popen(
        [sys.executable, "-c", INTERRUPTED, *words],
        env=paths,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )
    end = time.monotonic() + 120
    while not list(tmp_path.glob("*/measures.json")) and time.monotonic() < end and first.poll() is None:
        time.sleep(0.005)
    first.send_signal(signal.SIGINT)
    told = first.communicate(timeout=60)[1].decode()
    assert (first.returncode, "interrupted" in told) == (130, True), told
    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*/measures.json")}
    assert 1 <= len(before) < len(recipe.runs)
    assert set(states(tmp_path).values()) == {"finished"}  # nobody holds one any more
    code, printed, _ = command(capsys, "measure", *words, "--json")
    assert code == 0
    found = json.loads(printed)
    assert [Path(result["checkpoint"]).name for result in found] == sorted(recipe.runs)
    assert {path: path.stat().st_mtime_ns for path in before} == before  # those were not measured twice
    assert len(list(tmp_path.glob("*/measures.json"))) == len(recipe.runs)
    assert {path: path.stat().st_mtime_ns for path in weights} == weights


def test_a_job_array_does_the_sweep(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = "\n".join(f"{key} = {json.dumps(value)}" for key, value in BASE.items())
    recipe, out = tmp_path / "r.toml", tmp_path / "my runs"
    recipe.write_text(f"[base]\n{lines}\n[grid]\nseed = [0, 1]\n[measure]\nmeasures = []\n")
    code, script, _ = command(capsys, "sweep", recipe, "--out", out, "--executor", "slurm")
    assert code == 0
    assert "#SBATCH --array=0-1\n" in script
    assert set(states(out).values()) == {"pending"}
    (tmp_path / "gmprobe").write_text(f'#!/bin/sh\nexec {sys.executable} -m gm_probe "$@"\n')
    (tmp_path / "gmprobe").chmod(0o755)
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    root = str(Path(locks.__file__).parents[2])
    environment = {**os.environ, "PATH": path, "PYTHONPATH": root, "SLURM_ARRAY_TASK_ID": "1"}
    subprocess.run(["bash", "-c", script], env=environment, check=True, capture_output=True)
    assert list(states(out).values()) == ["pending", "finished"]
    assert "#SBATCH --array=0-0\n" in command(capsys, "sweep", recipe, "--out", out, "--executor", "slurm")[1]


def test_what_simclr_encoders_cannot_be_measured_by_is_refused_before_they_are_trained() -> None:
    views = {**BASE, "objective": "simclr", "num_train": 300}
    with pytest.raises(UsageError, match="flip_rate counts classes"):
        parse(base=views, measure={"measures": ["flip_rate"], "batch_size": 20})
    with pytest.raises(UsageError, match=r"batches of 250 images, but there are 40\. Set"):
        parse(base=views)
    with pytest.raises(UsageError, match="there are 10"):
        parse(base=views, measure={**PLAN, "batch_size": 20, "max_examples": 10})
    assert parse(base=views, measure={**PLAN, "batch_size": 20}).runs
    assert parse(base=views, measure={"measures": []}).runs
