"""Processes that share out a machine: GPUs and CPU threads."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
import torch

from gm_probe.executors.local import Job, Processes, visible_gpus


def tell(out: Path, threads: int | None) -> tuple[str, tuple[str | None, int, int | None]]:
    """The GPU that this process was dealt, which process it is, and its threads."""
    (out / str(os.getpid())).touch()
    began = time.monotonic()
    while len(list(out.iterdir())) < 4 and time.monotonic() - began < 60:  # until all have a job
        time.sleep(0.01)
    return "finished", (os.environ.get("CUDA_VISIBLE_DEVICES"), os.getpid(), threads)


@pytest.mark.parametrize("gpus", [["0", "GPU-5ab"], []])
def test_several_processes_share_a_gpu(
    gpus: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 9)
    jobs = [Job(str(number), tmp_path, tell) for number in range(4)]
    dealt = [outcome.result for outcome in Processes(4, gpus)(jobs)]
    assert len({process for _, process, _ in dealt}) == 4
    assert sorted(str(gpu) for gpu, _, _ in dealt) == sorted(2 * gpus or 4 * ["None"])
    assert [threads for _, _, threads in dealt] == [2] * 4
    assert "CUDA_VISIBLE_DEVICES" not in os.environ


@pytest.mark.parametrize(
    ("environment", "expected"), [(None, ["0", "1"]), ("3,GPU-5ab", ["3", "GPU-5ab"]), ("4,5,6", ["4", "5"])]
)
def test_gpus_are_those_that_this_process_sees(
    environment: str | None, expected: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    if environment is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", environment)
    assert visible_gpus() == expected


def linger(out: Path, threads: int | None) -> tuple[str, None]:
    """Work that goes on until it is ended, and then tidies up."""
    mine = out / str(os.getpid())
    mine.touch()
    try:
        while True:
            time.sleep(0.01)
    finally:
        mine.unlink()


def test_closing_ends_all_processes_at_once_and_without_a_word(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    ended = Processes(3)([Job("quick", tmp_path, leave), *(Job(str(n), tmp_path, linger) for n in range(2))])
    assert next(ended).name == "quick"
    began = time.monotonic()
    while len(list(tmp_path.iterdir())) < 2 and time.monotonic() - began < 60:
        time.sleep(0.01)
    pids = [int(path.name) for path in tmp_path.iterdir()]
    assert len(pids) == 2
    ended.close()
    assert list(tmp_path.iterdir()) == []  # by way of `finally`
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
    assert capfd.readouterr().err == ""


def leave(out: Path, threads: int | None) -> tuple[str, None]:
    return "finished", None


def test_no_process_imports_from_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("pickle", "torch", "json", "selectors", "tempfile", "logging"):
        (tmp_path / f"{name}.py").write_text(f"open({str(tmp_path / 'canary')!r}, 'w')\nraise SystemExit")
    monkeypatch.chdir(tmp_path)
    before = dict(os.environ)
    (tmp_path / "out").mkdir()
    for number in range(3):  # so that nobody is waited for
        (tmp_path / "out" / str(number)).touch()
    [outcome] = Processes(1)([Job("a", tmp_path / "out", tell)])
    assert outcome.status == "finished"
    assert not (tmp_path / "canary").exists()
    assert dict(os.environ) == before
