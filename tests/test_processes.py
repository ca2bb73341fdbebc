"""Several processes that share the examples give what one gives."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command_line import run

from gm_probe.data.batches import Batches
from gm_probe.data.examples import Examples
from gm_probe.data.normalization import Normalization
from gm_probe.errors import DataError
from gm_probe.measures.catalogue import MEASURES
from gm_probe.models.checkpoints import save_checkpoint
from gm_probe.models.zoo import ModelSpec, build_model
from gm_probe.runtime import processes
from gm_probe.training.config import TrainConfig
from gm_probe.training.loop import train

ALONE = {"local_inconsistency_batchwise"}  # cuts the examples itself
CURVED = "hessian_trace,hessian_lambda_max,fisher_trace"
"""Of these a network that is not affine in each parameter takes other ways."""
FEW = "--dtype float64 --batch-size 5 --starts 2 --max-iterations 15 --no-normalize"
SIMCLR = "local_inconsistency,fisher_lambda_max,hessian_lambda_max,fisher_trace,cross_entropy"
COMMANDS = {
    "6cnn": f"6cnn.safetensors {FEW} --measures {','.join(name for name in MEASURES if name not in ALONE)}",
    "mixer": f"mixer-micro-4.safetensors {FEW} --measures {CURVED}",
    "simclr": f"encoder --head simclr --batch-size 8 --dtype float64 --measures {SIMCLR}",  # shares of one and two
    "runs": "runs --measures fisher_trace --dtype float64",
}
ALL = """
import contextlib, io, json, os, sys
import torch
from gm_probe.cli import main
from gm_probe.runtime import processes

with processes.joined(torch.device("cpu")):  # torch does not join twice under one launch
    for name, words in json.loads(sys.argv[1]).items():
        out, err, code = io.StringIO(), io.StringIO(), 0
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                main(words.split())
            except SystemExit as stop:
                code = stop.code
        with open(f"{name}-{os.environ['RANK']}.json", "w") as file:
            json.dump([code or 0, out.getvalue(), err.getvalue()], file)
"""
RUNS = {"model": "mlp-4", "num_train": 40, "num_unlabeled": 23, "num_test": 20, "epochs": 1}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the commands measure, and what each gave in two processes: one launch does all of them."""
    path = tmp_path_factory.mktemp("together")
    write_checkpoint(path, "6cnn")
    if find_spec("timm"):
        write_checkpoint(path, "mixer-micro-4")
    views = {"model": "mlp-4", "objective": "simclr", "num_train": 40, "num_unlabeled": 26, "num_test": 20}
    train(TrainConfig(**views, batch_size=10, epochs=1), path / "encoder")
    for seed in range(3):
        train(TrainConfig(**RUNS, seed=seed), path / "runs" / str(seed))
    (path / "runs" / "1" / "checkpoint.safetensors").write_bytes(b"no weights")
    (path / "all.py").write_text(ALL)
    commands = {name: words_of(name, path) for name in COMMANDS if name != "mixer" or find_spec("timm")}
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [sys.executable, *torchrun, "all.py", json.dumps(commands)],
        cwd=path,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1])},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return path


def words_of(name: str, folder: Path) -> str:
    """The whole path of the data: a process reads a file of one name once."""
    labeled = f" --labeled {folder / 'data.npz'}" if "safetensors" in COMMANDS[name] else ""
    return f"measure {COMMANDS[name]}{labeled} --json -q"


def write_checkpoint(folder: Path, network: str) -> None:
    """A checkpoint and 23 labeled examples: shares of 11 and 12, batches of 5."""
    spec = ModelSpec(network, (1, 8, 8), 3)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model = build_model(spec)
        x, y = torch.randn(23, 1, 8, 8, dtype=torch.float64), torch.randint(0, 3, (23,))
    save_checkpoint(folder / f"{network}.safetensors", model, spec, Normalization())
    np.savez(folder / "data.npz", x=x.numpy(), y=y.numpy())


@pytest.fixture
def both(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[[str], list[list[dict[str, Any]]]]:
    """What a command prints as JSON in this process and in two."""
    monkeypatch.chdir(folder)

    def measured(name: str) -> list[list[dict[str, Any]]]:
        alone = run(words_of(name, folder).split(), capsys)
        first, second = (json.loads((folder / f"{name}-{rank}.json").read_text()) for rank in (0, 1))
        assert second[:2] == [first[0], ""]  # printed once
        assert alone[0] == first[0]
        assert alone[2] == first[2]
        return [json.loads(alone[1]), json.loads(first[1])]

    return measured


@pytest.mark.parametrize("name", ["6cnn", "mixer"])
def test_two_processes_give_what_one_gives(name: str, both: Callable[..., Any]) -> None:
    if name == "mixer":
        pytest.importorskip("timm")
    [one], [two] = both(name)
    assert [result["settings"]["processes"] for result in (one, two)] == [1, 2]
    assert [result["num_examples"] for result in (one, two)] == [23, 23]
    for measure, row in one["measures"].items():
        for figure in ("value", "stderr", "stderr_examples"):
            expected = None if row[figure] is None else pytest.approx(row[figure], rel=1e-6, abs=1e-9)
            assert two["measures"][measure][figure] == expected, (measure, figure)


def test_two_processes_measure_a_simclr_encoder_as_one_does(both: Callable[..., Any]) -> None:
    [one], [two] = both("simclr")
    assert [result["settings"]["processes"] for result in (one, two)] == [1, 2]
    assert [result["settings"]["num_images"] for result in (one, two)] == [24, 24]
    for name, row in one["measures"].items():
        for figure in ("value", "stderr_examples"):
            assert two["measures"][name][figure] == pytest.approx(row[figure], rel=1e-6), (name, figure)


def test_a_folder_of_runs_is_shared_checkpoint_by_checkpoint(both: Callable[..., Any]) -> None:
    for alone, shared in zip(*both("runs"), strict=True):
        if alone["checkpoint"] == "runs/1":
            assert (alone["exit_code"], shared["exit_code"]) == (3, 3)
            continue
        assert (alone["settings"]["processes"], shared["settings"]["processes"]) == (1, 2)
        values = [result["measures"]["fisher_trace"]["value"] for result in (alone, shared)]
        assert values[0] == pytest.approx(values[1], rel=1e-6)


def test_torchruns_processes_start_no_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    train(TrainConfig(**RUNS), tmp_path / "run")
    told = {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}
    for name, value in told.items():
        monkeypatch.setenv(name, value)
    code, _, err = run(["measure", tmp_path / "run", "--jobs", 2, "-q"], capsys)
    assert (code, "under torchrun, checkpoints are measured one by one" in err) == (2, True)


def test_fewer_batches_than_processes_of_a_simclr_encoder() -> None:
    batches = Batches(Examples(torch.zeros(20, 3), None, (), "views"), batch_size=20, batch_dependent=True)
    with pytest.raises(DataError, match="1 batches are too few for 2 processes"):
        batches.shard(0, 2)


def test_fewer_examples_than_processes() -> None:
    batches = Batches(Examples(torch.zeros(2, 3), None, (), "two"))
    with pytest.raises(DataError, match="2 examples are too few for 3 processes"):
        batches.shard(0, 3)


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_shares_are_the_whole_in_order(count: int) -> None:
    x = torch.arange(7.0)[:, None]
    whole = Batches(Examples(x, None, (), "seven"), batch_size=2)
    parts = [whole.shard(rank, count) for rank in range(count)]
    assert torch.equal(torch.cat([part.examples.x for part in parts]), x)
    assert [part.first for part in parts] == [int(part.examples.x[0]) for part in parts]
    assert {part.total for part in parts} == {7}


def test_a_single_process_is_all_there_is() -> None:
    value = torch.tensor([1.0, 3.0])
    processes.average_over_processes([value])
    assert value.tolist() == [1.0, 3.0]
    assert processes.from_all({"a": 1}) == [{"a": 1}]
    processes.wait_for_all()


@pytest.mark.parametrize(
    ("name", "rank", "expected"),
    [("cuda", "1", "cuda:1"), ("cuda", None, "cuda"), ("cuda:2", "1", "cuda:2"), ("cpu", "1", "cpu")],
)
def test_every_process_has_a_gpu_of_its_own(
    name: str, rank: str | None, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    if rank is not None:
        monkeypatch.setenv("LOCAL_RANK", rank)
    assert processes.own_device(torch.device(name)) == torch.device(expected)
