"""Processes that share every batch train what one process trains, and resume as one does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from test_training_loop import BASE, rows
from train_together import train_all

from gm_probe.runs.records import CHECKPOINT, STATE, read_run
from gm_probe.training.methods import METHODS

# 203 examples in batches of 64: the last batch is one of 11, which two processes share unequally
SHARED = {**BASE, "num_train": 203, "epochs": 1, "lr": 0.05, "eval_every": 1, "track_every": 1}
FEW = {**SHARED, "num_train": 80, "labels": 20, "batch_size": 10, "mu": 3}
VIEWS = {
    **SHARED,
    "objective": "simclr",
    "num_train": 90,
    "batch_size": 16,
    "probe_every": 1,
    "eval_every": 0,
}
RUNS: dict[str, dict[str, Any]] = {
    **{method: {**SHARED, "method": method} for method in METHODS},
    "iam-s loss": {**SHARED, "method": "iam-s", "sign": "loss", "m": 16, "num_train": 204},
    "all at once": {
        **SHARED,
        "method": "iam-d",
        "model": "6cnn",
        "epochs": 2,
        "augment": True,
        "label_smoothing": 0.1,
        "clip_norm": 0.5,
        "ema_decay": 0.5,
        "k_steps": 2,
        "num_train": 80,
        "batch_size": 40,
    },
    **{f"joint {method}": {**FEW, "objective": "joint", "method": method} for method in ("sam", "iam-d")},
    **{
        f"fixmatch {method}": {**FEW, "objective": "fixmatch", "method": method, "threshold": 0.18}
        for method in ("sam", "iam-d")
    },
    "fixmatch mask": {**FEW, "objective": "fixmatch", "threshold": 0.18, "unlabeled_mean": "mask"},
    "simclr sgd": VIEWS,
    "simclr iam-d": {**VIEWS, "method": "iam-d", "k_steps": 2},
    "simclr sam": {**VIEWS, "method": "sam", "clip_norm": 0.5},
    "batch norm": {**SHARED, "model": "wrn-10-1", "num_train": 32, "batch_size": 16, "epochs": 1},
}
DROPPING: dict[str, Any] = {
    "data": "digits",
    "method": "iam-d-onepass",
    "num_train": 200,
    "num_unlabeled": 60,
    "num_test": 80,
    "epochs": 2,
    "batch_size": 20,
    "device": "cpu",
}
"""A run of a network with dropout and BatchNorm, which two processes train differently from one."""
REFUSED = {
    "too few": {**SHARED, "num_train": 1},
    "odd batch": {**FEW, "objective": "fixmatch", "batch_size": 5},
    "odd m": {**SHARED, "m": 5},
    "odd views": {**VIEWS, "batch_size": 15},
    "one batch to track": {**VIEWS, "num_unlabeled": 20},
    "a part left over": {**SHARED, "num_train": 65, "batch_size": 65, "m": 32},
}


def environment() -> dict[str, str]:
    root = str(Path(__file__).parents[1])
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": root}


TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


NETWORK = """
import os, signal
from torch import nn

class Deadly(nn.Module):
    calls = 0

    def forward(self, x):
        Deadly.calls += 1
        if Deadly.calls == int(os.environ.get("KILL_AT", -1)):
            os.kill(os.getpid(), signal.SIGKILL)
        return x

def model():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.BatchNorm1d(16), nn.ReLU(),
        nn.Dropout(0.3), Deadly(), nn.Linear(16, 10))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every run by this process and by two."""
    path = tmp_path_factory.mktemp("together")
    (path / "net.py").write_text(NETWORK)
    straight = {**DROPPING, "model": f"{path / 'net.py'}:model"}
    (path / "runs.json").write_text(json.dumps(RUNS | REFUSED | {"straight": straight}))
    train_all(path)
    command = [*TORCHRUN, str(Path(__file__).parent / "train_together.py"), str(path)]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return path


@pytest.mark.parametrize("name", [name for name in RUNS if name != "batch norm"])
def test_two_processes_train_what_one_trains(name: str, folder: Path) -> None:
    one, two = (folder / f"{name}-{count}" for count in (1, 2))
    assert read_run(two).config["environment"]["processes"] == 2
    weights = load_file(one / CHECKPOINT)
    for key, value in load_file(two / CHECKPOINT).items():
        torch.testing.assert_close(value, weights[key], rtol=1e-4, atol=1e-5)
    for ours, theirs in zip(rows(two), rows(one), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-3, abs=1e-5)
    summaries = [{**read_run(run).summary, "train_seconds": 0} for run in (one, two)]
    assert [(s.pop("status"), s.pop("met_stop_ce", None)) for s in summaries] == [("finished", None)] * 2
    assert summaries[1] == pytest.approx(summaries[0], rel=1e-3, abs=1e-5)


def test_batch_norm_averages_the_statistics_of_both(folder: Path) -> None:
    """Each normalises by its own half, so the runs differ, but the first layer's mean over a batch is the same."""
    one, two = (load_file(folder / f"batch norm-{count}" / CHECKPOINT) for count in (1, 2))
    name = "blocks.0.bn1.running_mean"
    torch.testing.assert_close(two[name], one[name], rtol=0.05, atol=0.01)
    assert not torch.equal(two["head.weight"], one["head.weight"])


@pytest.mark.parametrize("method", METHODS)
def test_rules_under_ddp_give_the_gradient_of_all_examples(method: str, folder: Path) -> None:
    [alone] = json.loads((folder / "gradients-1.json").read_text())
    both = json.loads((folder / "gradients-2.json").read_text())
    assert both[0] == both[1]
    assert both[0][method] == pytest.approx(alone[method], rel=1e-9, abs=1e-12)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("too few", "too few for 2 processes"),
        ("odd batch", "cannot be shared equally by 2"),
        ("odd m", "m = 5"),
        ("odd views", "15 images cannot be shared equally by 2"),
        ("one batch to track", "1 batches of 16, fewer than 2 processes"),
        ("a part left over", "without its part"),
    ],
)
def test_what_cannot_be_shared_is_refused_by_every_process(name: str, reason: str, folder: Path) -> None:
    for rank in (0, 1):
        assert reason in (folder / f"{name}-2-{rank}.txt").read_text()
    assert read_run(folder / f"{name}-1").status == "finished"


def test_killed_and_resumed_by_two_processes(folder: Path) -> None:
    """BatchNorm, dropout, noise and a carried δ: each process has a state of its own to go back to."""
    options = [f"--{name.replace('_', '-')}={value}" for name, value in DROPPING.items()]
    options += ["--model", f"{folder / 'net.py'}:model", "--checkpoint-every", "3", "--resume", "--json"]

    def start(**more: str) -> subprocess.CompletedProcess[str]:
        command = [*TORCHRUN, "-m", "gm_probe", "train", *options, "--out", "killed"]
        return subprocess.run(
            command, env=environment() | more, cwd=folder, capture_output=True, text=True, timeout=200
        )

    # one pass for the memory format, two to try the model, and two a step: in the 16th, of the second epoch
    assert start(KILL_AT="34").returncode != 0
    assert torch.load(folder / "killed" / STATE, weights_only=True)["step"] == 5
    done = start()
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["status"] == "finished"  # printed once
    assert "no run to resume" not in done.stderr
    one, other = ((folder / name / CHECKPOINT).read_bytes() for name in ("killed", "straight-2"))
    assert one == other
    assert rows(folder / "killed") == rows(folder / "straight-2")
