"""What the shell says around a command: variables of torchrun, limits of memory, numbers beyond all bounds."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from gm_probe.cli import limits, main
from gm_probe.errors import ResourceError, UsageError, out_of_memory
from gm_probe.measures.settings import Settings
from gm_probe.runtime import processes
from gm_probe.training.config import TrainConfig

MEETING = {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*MEETING, "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(
            ("WORLD_SIZE", value)
            for value in ("abc", "", "-1", "0", "1.5", "9" * 30, "9" * 5000, "２x", " 2")
        ),
        *(("RANK", value) for value in ("x", "2", "-1", "", None)),
        *(("MASTER_PORT", value) for value in ("abc", "0", "99999999", "", None)),
        *(("MASTER_ADDR", value) for value in ("", None)),
    ],
)
def test_variables_of_torchrun_are_named_where_they_are_wrong(
    name: str, value: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for other, sound in MEETING.items():
        monkeypatch.setenv(other, sound)
    assert processes.launched() == 2
    if value is None:
        monkeypatch.delenv(name)
    else:
        monkeypatch.setenv(name, value)
    with pytest.raises(UsageError, match=rf"^{name} is .*torchrun, or unset") as refused:
        processes.launched()
    assert len(str(refused.value)) < 300


def test_without_torchrun_nothing_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    assert processes.launched() == 1
    monkeypatch.setenv("WORLD_SIZE", "1")  # of a job of one
    assert processes.launched() == 1


@pytest.mark.parametrize("value", ["x", "-1", "4", "0" * 20 + "9" * 5000, ""])
def test_a_local_rank_is_a_gpu_that_there_is(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setenv("LOCAL_RANK", value)
    assert processes.own_device(torch.device("cpu")) == torch.device("cpu")
    with pytest.raises(UsageError, match="LOCAL_RANK is"):
        processes.own_device(torch.device("cuda"))


def test_processes_that_do_not_meet_are_a_lack_of_resources(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in MEETING.items():
        monkeypatch.setenv(name, value)

    def fails(backend: str) -> None:
        raise RuntimeError("connection refused\nmore")

    monkeypatch.setattr(processes.distributed, "init_process_group", fails)
    with (
        pytest.raises(ResourceError, match=r"cannot connect at localhost:29500: connection refused\. Start"),
        processes.joined(torch.device("cpu")),
    ):
        pass


def test_measure_and_train_say_it_in_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "abc")
    small = ["--model", "mlp-8", "--num-train", "60", "--epochs", "1", "--out", str(tmp_path / "run")]
    for command in (
        ["measure", str(tmp_path), "--unlabeled", "digits"],
        ["train", "--data", "digits", *small],
    ):
        with pytest.raises(SystemExit) as stop:
            main([*command, "--device", "cpu"])
        err = capsys.readouterr().err
        assert (stop.value.code, err.count("\n")) == (2, 1), err
        assert "WORLD_SIZE is 'abc'" in err


@pytest.mark.parametrize(
    "values",
    [
        *(
            {name: 10**22}
            for name in ("seed", "split_seed", "epochs", "batch_size", "num_train", "threads", "mu")
        ),
        {"split_seed": -1},
        {"threads": 1025},
        {"image_size": 2**31},
    ],
)
def test_integers_of_a_run_have_bounds(values: dict[str, int]) -> None:
    (name,) = values
    with pytest.raises(UsageError, match=rf"^{name} = "):
        TrainConfig(**values)


@pytest.mark.parametrize("name", ["seed", "num_starts", "k_steps", "max_probes", "max_iterations", "k_grid"])
def test_integers_of_a_measurement_have_bounds(name: str) -> None:
    value: Any = (10**22,) if name == "k_grid" else 10**22
    with pytest.raises(UsageError, match=r"must be a whole number ≥ \d and ≤ 4,294,967,295"):
        Settings(**{name: value})


def test_a_library_that_does_not_fit_is_a_lack_of_memory() -> None:
    assert out_of_memory(ImportError("libtorch_cpu.so: failed to map segment from shared object"))
    assert not out_of_memory(ImportError("No module named 'x'"))


def test_a_limit_that_torch_does_not_fit_into_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("resource")
    tried: list[list[str]] = []

    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[bytes]:
        tried.append(command)
        return subprocess.CompletedProcess(command, code)

    class Limits:
        RLIMIT_AS = 9
        RLIM_INFINITY = -1
        left = -1

        def getrlimit(self, _: int) -> tuple[int, int]:
            return self.left, self.left

    monkeypatch.setattr(limits, "resource", found := Limits())
    monkeypatch.setattr(limits.subprocess, "run", run)
    monkeypatch.delitem(sys.modules, "torch")
    code = -6  # aborted
    limits.require_room_for_torch()
    assert tried == []
    found.left = 2**31
    with pytest.raises(ResourceError, match="torch cannot be loaded within 2,048 MiB"):
        limits.require_room_for_torch()
    code = 0
    limits.require_room_for_torch()
    assert [command[0] for command in tried] == [sys.executable] * 2


def test_commands_that_need_no_torch_work_within_little_memory(tmp_path: Path) -> None:
    pytest.importorskip("resource")
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "config.toml").write_text("epochs = 1\n")
    command = f"ulimit -v 400000; exec {sys.executable} -m gm_probe"
    for arguments, code in ((f"status {tmp_path}", 0), (f"measure {tmp_path}", 6)):
        done = subprocess.run(
            ["bash", "-c", f"{command} {arguments}"], capture_output=True, text=True, check=False
        )
        assert (done.returncode, done.stderr.count("\n")) == (code, code // 6), done.stderr
