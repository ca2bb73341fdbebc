"""Commands in forks of this process, and rows of the table: what every part of trust.py shares."""

from __future__ import annotations

import os
import resource
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

torch.set_num_threads(1)
NOISE = 8 * 2**20
"""Bytes by which the peak of the same command differs from time to time (allocator, imports)."""


@dataclass
class Row:
    """One line of the table."""

    what: str
    tried: int = 0
    held: int = 0
    exceptions: list[str] = field(default_factory=list)

    def add(self, name: str, problem: str | None) -> None:
        """Count a case; ``problem`` None = it held."""
        self.tried += 1
        self.held += problem is None
        if problem is not None:
            self.exceptions.append(f"{name}: {problem}")


@dataclass(frozen=True)
class Ran:
    """How a command ended: exit code (negative = a signal; None = it hung), what it printed, its peak in bytes."""

    code: int | None
    out: str
    err: str
    peak: int
    seconds: float


def fork(function: Callable[[], Any], within: float = 120.0) -> Ran:
    """Call ``function`` in a fork of this process; SystemExit gives its code, any other exception is printed, 99."""
    began = time.perf_counter()
    with tempfile.TemporaryFile("w+b") as out, tempfile.TemporaryFile("w+b") as err:
        sys.stdout.flush()
        sys.stderr.flush()
        child = os.fork()
        if not child:
            os.dup2(out.fileno(), 1)
            os.dup2(err.fileno(), 2)
            os._exit(_code(function))
        status, usage = None, None
        while time.perf_counter() - began < within:
            done, status, usage = os.wait4(child, os.WNOHANG)
            if done:
                break
            time.sleep(0.002)
        else:
            os.kill(child, signal.SIGKILL)
            _, _, usage = os.wait4(child, 0)
            status = None
        texts = []
        for file in (out, err):
            file.seek(0)
            texts.append(file.read().decode(errors="replace"))
    assert usage is not None
    code = None if status is None else os.waitstatus_to_exitcode(status)
    return Ran(code, texts[0], texts[1], usage.ru_maxrss * 1024, time.perf_counter() - began)


def _code(function: Callable[[], Any]) -> int:
    try:
        function()
        code = 0
    except SystemExit as stop:
        code = int(stop.code or 0)
    except BaseException:  # noqa: BLE001  whatever a part runs into is its finding
        traceback.print_exc()
        code = 99
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            code = code or 98
    return code


def gmprobe(
    *arguments: object,
    before: Callable[[], Any] | None = None,
    signalled: tuple[int, float] | None = None,
    then: Sequence[tuple[int, float]] = (),
    within: float = 120.0,
) -> Ran:
    """`gmprobe ARGUMENTS` in a fork; ``before`` is called there first, to injure it.

    ``signalled``: a signal, and after how many seconds of the command it comes; ``then``: further ones, and how many
    seconds after the one before.
    """

    def strike() -> None:
        assert signalled is not None
        while (
            signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
        ):  # before that a signal is the shell's affair
            time.sleep(0.001)
        os.kill(os.getpid(), signalled[0])
        for number, pause in then:
            time.sleep(pause)
            os.kill(os.getpid(), number)

    def command() -> None:
        from gm_probe.cli import main

        if before is not None:
            before()
        if signalled is not None:
            signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in a shell's background
            timer = threading.Timer(signalled[1], strike)
            timer.daemon = True
            timer.start()
        try:
            main([str(argument) for argument in arguments])
        finally:
            if signalled is not None:
                timer.cancel()

    return fork(command, within)


def one_line(ran: Ran, code: int, *names: object) -> str | None:
    """What is wrong with a refusal: another exit code, more than one line, or a name that is not in it."""
    lines = ran.err.splitlines()
    said = lines[-1][:300] if lines else "nothing"
    if ran.code is None:
        return f"hung for {ran.seconds:.0f} s"
    if ran.code != code:
        return f"exit {ran.code}, not {code}: {said}"
    if len(lines) != 1:
        return f"{len(lines)} lines on stderr: {said}"
    missing = [str(name) for name in names if str(name) not in lines[0]]
    return f"does not name {missing[0]}: {said}" if missing else None


def limit_file_size(size: int) -> None:
    """Let no file of this process grow beyond ``size`` bytes (as a full disk: EFBIG)."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def digits(folder: Path, count: int = 60, labels: bool = True) -> Path:
    """An array file of a few handwritten digits."""
    import numpy as np

    from gm_probe.data.datasets import open_source

    pool = open_source("digits", labeled=True).pool
    assert isinstance(pool.x, torch.Tensor)
    assert pool.y is not None
    path = folder / "digits.npz"
    arrays = {"x": pool.x[:count].numpy()} | ({"y": pool.y[:count].numpy()} if labels else {})
    np.savez(path, **arrays)
    return path


def warm(folder: Path) -> None:
    """Load what forks would otherwise each load: torch's lazy parts, by a small training, measurement and report."""
    from contextlib import redirect_stderr, redirect_stdout
    from io import StringIO

    import torchvision  # noqa: F401

    from gm_probe.cli import main

    run = folder / "warm"
    train = f"train --data digits --model mlp-8 --num-train 60 --num-unlabeled 20 --num-test 20 --epochs 1 --out {run}"
    measure = f"measure {run} --starts 1 --device cpu --json"
    with redirect_stdout(StringIO()), redirect_stderr(StringIO()):
        for command in (train, measure):
            try:
                main([*command.split()])
            except SystemExit as stop:
                if stop.code:
                    raise RuntimeError(command) from stop
