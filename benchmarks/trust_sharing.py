"""Sixteen processes begin one sweep in one folder at once: with locks, without, and with locks that exclude nobody."""

from __future__ import annotations

import errno
import fcntl
import os
import re
import socket
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from trust_faults import COMMANDS, Bench, benches, content
from trust_run import Row, _code

PROCESSES = 16
RUNS = 4
"""Of the recipe."""


def sound(_: int) -> None:
    """Locks as they should be."""


def refused(_: int) -> None:
    """A network's file system without a lock server."""

    def flock(*_: object) -> NoReturn:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    fcntl.flock = flock


def ignored(number: int) -> None:
    """One that keeps locks to each of the machines that share it."""
    fcntl.flock = lambda *_: None
    socket.gethostname = lambda: f"node{number}"


def together(out: Path, injure: Callable[[int], None]) -> list[tuple[int, str]]:
    """Exit code and output of each process; all begin when the pipe is closed."""
    wait, go = os.pipe()
    children = []
    for number in range(PROCESSES):
        child = os.fork()
        if not child:
            os.close(go)
            printed = os.open(out / f"printed{number}", os.O_CREAT | os.O_WRONLY)
            for stream in (1, 2):
                os.dup2(printed, stream)
            os.chdir(out)
            injure(number)
            os.read(wait, 1)
            os._exit(_code(_sweep))
        children.append(child)
    os.close(wait)
    os.close(go)
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    files = [out / f"printed{number}" for number in range(PROCESSES)]
    texts = [file.read_text() for file in files]
    for file in files:
        file.unlink()
    return list(zip(codes, texts, strict=True))


def _sweep() -> None:
    from gm_probe.cli import main

    main(COMMANDS["sweep"].arguments.split())


def _shared(bench: Bench, injure: Callable[[int], None]) -> str | None:
    out = bench.fresh()
    ended = together(out, injure)
    strange = [text for code, text in ended if code != 0]
    if strange:
        return f"{len(strange)} processes failed, one of them: {strange[0][-300:]}"
    done = sum(int(count) for _, text in ended for count in re.findall(r"(\d+) finished", text))
    if done != RUNS:
        return f"{done} runs were done, of {RUNS}"
    found = content(out)
    wrong = sorted(n for n in {*found, *bench.expected} if found.get(n) != bench.expected.get(n))
    return f"{wrong[0]} differs" if wrong else bench.after(out, temporary=False)


def _refused(bench: Bench) -> str | None:
    out = bench.fresh()
    ended = together(out, refused)
    silent = [text for code, text in ended if code != 1 or "file system without locks" not in text]
    if silent:
        return f"not refused: {silent[0][-300:]}"
    trained = [path.name for path in out.rglob("*") if path.name in {"config.toml", "checkpoint.safetensors"}]
    return f"wrote {trained[0]}" if trained else bench.after(out, temporary=False)


def run(small: bool) -> tuple[list[Row], list[str]]:
    many = f"{PROCESSES} processes on one sweep folder"
    rows = [
        Row(f"{many}: every run done once; the same files as of one process"),
        Row(f"{many}, with locks local to each of {PROCESSES} machines: the same result"),
        Row(
            f"{many}, locks refused (ENOLCK): exit 1, each run's reason; nothing trained; with locks again, all"
        ),
    ]
    with tempfile.TemporaryDirectory() as name:
        [bench] = benches(["sweep"], Path(name))
        for number in range(1 if small else 10):
            rows[0].add(f"{number}", _shared(bench, sound))
            rows[1].add(f"{number}", _shared(bench, ignored))
            rows[2].add(f"{number}", _refused(bench))
    return rows, []
