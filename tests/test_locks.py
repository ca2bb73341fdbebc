"""Locks: signs of life say who holds a folder, and no date does; what is no file of gmprobe is never written."""

from __future__ import annotations

import fcntl
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from gm_probe.errors import BusyError, StorageError
from gm_probe.files import locks
from gm_probe.files.locks import LOCK, TAKING, exclusive, held, locked

OFFSETS = (-(10**8), -61, 0, 61, 10**8)
"""Seconds by which the clock of another machine differs; the last are more than three years."""


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Locks that exclude nobody, as between machines, and a second in place of a minute."""
    monkeypatch.setattr(fcntl, "flock", lambda *_: None)
    monkeypatch.setattr(locks, "STALE", 1.0)  # ten beats: a busy machine may miss some


@contextmanager
def another_machine(folder: Path, offset: float, word: str = "") -> Iterator[Path]:
    """One that holds ``folder``, whose lock it dates by a clock that is ``offset`` seconds ahead."""
    lock, ended = folder / LOCK, threading.Event()

    def work() -> None:
        beats = 0
        while not ended.wait(0.1):
            beats += 1
            _write(lock, offset, f"elsewhere 1\n{word}\n{beats}\n")

    _write(lock, offset, f"elsewhere 1\n{word}\n0\n")
    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield lock
    finally:
        ended.set()
        thread.join()


def _write(lock: Path, offset: float, content: str) -> None:
    lock.write_text(content)
    os.utime(lock, (time.time() + offset,) * 2)


@pytest.mark.parametrize("offset", OFFSETS)
def test_a_live_holder_is_left_alone_whatever_its_clock_says(tmp_path: Path, offset: float) -> None:
    with another_machine(tmp_path, offset) as lock:
        with pytest.raises(BusyError, match="elsewhere is working on"), exclusive(tmp_path):
            pass
        assert lock.read_text().startswith("elsewhere 1\n")
        end = time.monotonic() + 10
        while not held(tmp_path):  # after its first sign of life
            assert time.monotonic() < end
            time.sleep(0.02)


@pytest.mark.parametrize("offset", OFFSETS)
def test_a_dead_holder_is_got_over_whatever_its_clock_said(tmp_path: Path, offset: float) -> None:
    _write(tmp_path / LOCK, offset, "elsewhere 1\n")
    began = time.monotonic()
    with exclusive(tmp_path):
        assert locks.STALE <= time.monotonic() - began < 10
        assert (tmp_path / LOCK).read_text().startswith(f"{socket.gethostname()} {os.getpid()}\n")


def test_a_holder_that_lets_go_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locks, "STALE", 60.0)
    (tmp_path / LOCK).write_text("elsewhere 1\n")
    threading.Timer(0.2, os.truncate, (tmp_path / LOCK, 0)).start()
    began = time.monotonic()
    with exclusive(tmp_path):
        assert time.monotonic() - began < 20


def test_a_holder_is_watched_once(tmp_path: Path) -> None:
    """What this process has seen of a lock counts: a sweep that goes on waits a minute, not a minute a run."""
    for name in ("a", "b", "c"):
        (tmp_path / name).mkdir()
        (tmp_path / name / LOCK).write_text("elsewhere 1\n")
        assert held(tmp_path / name)
    began = time.monotonic()
    for name in ("a", "b", "c"):
        with exclusive(tmp_path / name):
            pass
    assert time.monotonic() - began < 1.2


def test_who_is_waited_for_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / LOCK).write_text("else\x1b[31mwhere 1\n")
    with exclusive(tmp_path):
        pass
    [message] = caplog.messages
    assert message.isprintable()
    assert "was locked by else" in message


def test_onlookers_see_a_holder_go_silent(tmp_path: Path) -> None:
    _write(tmp_path / LOCK, 0, "elsewhere 1\n")
    assert held(tmp_path)
    end = time.monotonic() + 10
    while held(tmp_path):
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.mark.parametrize("name", [LOCK, TAKING])
@pytest.mark.parametrize("kind", ["link", "dangling", "second name", "pipe", "folder", "content"])
def test_nothing_but_its_own_file_is_written(tmp_path: Path, name: str, kind: str) -> None:
    run, mine = tmp_path / "run", tmp_path / "mine"
    run.mkdir()
    mine.write_text("mine, all mine")
    make = {
        "link": lambda path: path.symlink_to(mine),
        "dangling": lambda path: path.symlink_to(tmp_path / "absent"),
        "second name": lambda path: path.hardlink_to(mine),
        "pipe": os.mkfifo,
        "folder": Path.mkdir,
        "content": lambda path: path.write_text("another tool's"),
    }
    make[kind](run / name)
    with pytest.raises(StorageError, match=name.replace(".", r"\.")), exclusive(run):
        pass
    assert mine.read_text() == "mine, all mine"
    assert not (tmp_path / "absent").exists()
    assert os.path.lexists(run / name)
    if kind == "content":
        assert (run / name).read_text() == "another tool's"


def test_a_table_is_locked_through_no_link(tmp_path: Path) -> None:
    (tmp_path / ".t.csv.lock").symlink_to(tmp_path / "absent")
    with pytest.raises(StorageError, match="is a link"), locked(tmp_path / "t.csv"):
        pass
    assert not (tmp_path / "absent").exists()


def test_nobody_waits_for_ever_to_write_a_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def taken(*_: object) -> None:
        raise BlockingIOError

    monkeypatch.setattr(fcntl, "flock", taken)
    with pytest.raises(BusyError), locked(tmp_path / "t.csv"):
        pass
