"""Several processes that share the examples give what one gives."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

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

Call = Callable[[str, int], tuple[int, str, str]]
ALONE = {"local_inconsistency_batchwise"}  # cuts the examples itself


@pytest.fixture
def call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Call:
    """Runs a command line in ``tmp_path``: here, or in two processes."""
    monkeypatch.chdir(tmp_path)
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "gm_probe"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200"}

    def run_in(words: str, processes: int) -> tuple[int, str, str]:
        if processes == 1:
            return run(words.split(), capsys)
        command = [sys.executable, *torchrun, *words.split()]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
        return done.returncode, done.stdout, done.stderr

    return run_in


def checkpoint_of(folder: Path, network: str) -> Path:
    """A checkpoint and 23 labeled examples: shares of 11 and 12, batches of 5."""
    import numpy as np

    spec = ModelSpec(network, (1, 8, 8), 3)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model = build_model(spec)
        x, y = torch.randn(23, 1, 8, 8, dtype=torch.float64), torch.randint(0, 3, (23,))
    save_checkpoint(folder / "c.safetensors", model, spec, Normalization())
    np.savez(folder / "data.npz", x=x.numpy(), y=y.numpy())
    return folder


CURVED = ("hessian_trace", "hessian_lambda_max", "fisher_trace")
"""Of these a network that is not affine in each parameter takes other ways."""


@pytest.mark.parametrize(
    ("network", "names"),
    [("6cnn", [name for name in MEASURES if name not in ALONE]), ("mixer-micro-4", CURVED)],
)
def test_two_processes_give_what_one_gives(
    network: str, names: Sequence[str], tmp_path: Path, call: Call
) -> None:
    if network != "6cnn":
        pytest.importorskip("timm")
    checkpoint_of(tmp_path, network)
    # the whole path: a process reads a file of one name once
    labeled = tmp_path / "data.npz"
    words = f"measure c.safetensors --labeled {labeled} --no-normalize --json -q --measures {','.join(names)}"
    rows = []
    for number in (1, 2):
        code, out, err = call(
            f"{words} --dtype float64 --batch-size 5 --starts 2 --max-iterations 15", number
        )
        assert code == 0, err
        [result] = json.loads(out)  # printed once
        assert result["settings"]["processes"] == number
        assert result["num_examples"] == 23
        rows.append(result["measures"])
    for name, one in rows[0].items():
        for figure in ("value", "stderr", "stderr_examples"):
            expected = None if one[figure] is None else pytest.approx(one[figure], rel=1e-6, abs=1e-9)
            assert rows[1][name][figure] == expected, (name, figure)


def test_two_processes_measure_a_simclr_encoder_as_one_does(tmp_path: Path, call: Call) -> None:
    settings = {"model": "mlp-4", "objective": "simclr", "num_train": 40, "num_unlabeled": 26, "num_test": 20}
    train(TrainConfig(**settings, batch_size=10, epochs=1), tmp_path / "run")
    names = "local_inconsistency,fisher_lambda_max,hessian_lambda_max,fisher_trace,cross_entropy"
    found = []
    for number in (1, 2):  # three batches: shares of one and two
        words = f"measure run --head simclr --batch-size 8 --measures {names} --dtype float64 --json -q"
        code, out, err = call(words, number)
        assert code == 0, err
        [result] = json.loads(out)
        assert (result["settings"]["processes"], result["settings"]["num_images"]) == (number, 24)
        found.append({name: (r["value"], r["stderr_examples"]) for name, r in result["measures"].items()})
    for name, one in found[0].items():
        assert found[1][name] == pytest.approx(one, rel=1e-6), name


def test_a_folder_of_runs_is_shared_checkpoint_by_checkpoint(tmp_path: Path, call: Call) -> None:
    settings = {"model": "mlp-4", "num_train": 40, "num_unlabeled": 23, "num_test": 20, "epochs": 1}
    for seed in range(3):
        train(TrainConfig(**settings, seed=seed), tmp_path / "runs" / str(seed))
    (tmp_path / "runs" / "1" / "checkpoint.safetensors").write_bytes(b"no weights")
    found = []
    for number in (1, 2):
        _, out, err = call("measure runs --measures fisher_trace --dtype float64 --json -q", number)
        assert "1 of 3 checkpoints could not be measured" in err
        found.append(json.loads(out))  # printed once
    for alone, shared in zip(*found, strict=True):
        if alone["checkpoint"] == "runs/1":
            assert (alone["exit_code"], shared["exit_code"]) == (3, 3)
            continue
        assert (alone["settings"]["processes"], shared["settings"]["processes"]) == (1, 2)
        values = [result["measures"]["fisher_trace"]["value"] for result in (alone, shared)]
        assert values[0] == pytest.approx(values[1], rel=1e-6)


def test_torchruns_processes_start_no_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = {"model": "mlp-4", "num_train": 40, "num_unlabeled": 23, "num_test": 20, "epochs": 1}
    train(TrainConfig(**settings), tmp_path / "run")
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
