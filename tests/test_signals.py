"""Signals that come twice, at once or in storms: one line, the right code, no traceback, no deadlock."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from gm_probe.runtime.signals import INTERRUPTED, TERMINATED, Terminated, ending_in_order, sigterm_noted

WAITING = """
import signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where the tests run in background
from gm_probe.cli import listings, main
def callback(**_):
    try:
        print("ready", flush=True)
        while True:
            time.sleep(0.001)
    finally:
        time.sleep({cleanup})
        print("cleaned up", flush=True)
listings.measures.callback = callback
sys.argv = ["gmprobe", "measures"]
main()
"""
TRAINING = """
import sys
from gm_probe.training.updates import Updates
from gm_probe.cli import main
step = Updates.step
def told(*args):
    print("ready", flush=True)
    return step(*args)
Updates.step = told
sys.argv = ["gmprobe", *sys.argv[1:]]
main()
"""
LINES = {
    signal.SIGINT: (INTERRUPTED, "gmprobe: interrupted; finished results are kept\n"),
    signal.SIGTERM: (TERMINATED, "gmprobe: terminated; finished results are kept\n"),
}


def started(code: str, *args: str) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", code, *args], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "ready\n"
    return process


@pytest.mark.parametrize("number", LINES)
def test_the_first_ends_in_order(number: signal.Signals) -> None:
    process = started(WAITING.format(cleanup=0.01))
    process.send_signal(number)
    out, err = process.communicate(timeout=30)
    assert (process.returncode, err, out) == (*LINES[number], "cleaned up\n")


@pytest.mark.parametrize("number", LINES)
@pytest.mark.parametrize("pause", [0.0, 0.02, 0.2])
def test_the_second_ends_at_once(number: signal.Signals, pause: float) -> None:
    process = started(WAITING.format(cleanup=60))
    process.send_signal(number)
    time.sleep(pause)
    for _ in range(3):  # two that come before the first was seen are one
        process.send_signal(number)
        time.sleep(0.02)
    out, err = process.communicate(timeout=30)
    assert (process.returncode, err, out) == (*LINES[number], "")


@pytest.mark.parametrize("number", LINES)
def test_a_storm_is_one_line(number: signal.Signals) -> None:
    process = started(WAITING.format(cleanup=0.05))
    while process.poll() is None:
        process.send_signal(number)
    _, err = process.communicate(timeout=30)
    assert (process.returncode, err) == LINES[number]


def test_a_storm_of_sigterm_in_training_is_one_line(tmp_path: Path) -> None:
    size = ("--num-train", "100", "--num-unlabeled", "20", "--num-test", "20", "--batch-size", "10")
    process = started(
        TRAINING, "train", "--model", "mlp-8", *size, "--epochs", "10000", "--out", str(tmp_path / "run")
    )
    drain = threading.Thread(target=process.stdout.read)
    drain.start()
    while process.poll() is None:
        process.send_signal(signal.SIGTERM)
        time.sleep(0.0005)
    drain.join()
    process.stdout.close()
    assert process.stderr is not None
    with process.stderr as err:
        *notes, last = err.read().splitlines()
    assert process.returncode == TERMINATED
    assert last.startswith("gmprobe: terminated"), last
    assert not any(note.startswith("gmprobe: ") for note in notes), notes


def test_a_second_sigterm_soon_after_counts_as_the_first() -> None:
    """A launcher passes on what the whole process group was sent."""
    with sigterm_noted() as came:
        assert not came()
        for _ in range(3):
            os.kill(os.getpid(), signal.SIGTERM)
        assert came()


def test_a_later_sigterm_ends_what_only_notes_it() -> None:
    code = (
        "import os, signal, time\n"
        "from gm_probe.runtime.signals import SAME, sigterm_noted\n"
        "with sigterm_noted():\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "    time.sleep(SAME + 0.1)\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "    time.sleep(60)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=30, check=False
    )
    assert (done.returncode, done.stderr) == LINES[signal.SIGTERM]


def test_the_callers_handlers_come_back() -> None:
    before = [signal.getsignal(number) for number in LINES]
    for _ in range(2):  # nothing of the first is left
        with pytest.raises(Terminated), ending_in_order():
            signal.raise_signal(signal.SIGTERM)
        assert [signal.getsignal(number) for number in LINES] == before


def test_another_thread_changes_no_handler() -> None:
    before = [signal.getsignal(number) for number in LINES]
    seen: list[object] = []

    def look() -> None:
        with ending_in_order(), sigterm_noted() as came:
            seen.extend([*map(signal.getsignal, LINES), came()])

    thread = threading.Thread(target=look)
    thread.start()
    thread.join()
    assert seen == [*before, False]


def test_a_sigint_that_is_ignored_stays_ignored() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with ending_in_order():
            assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)
