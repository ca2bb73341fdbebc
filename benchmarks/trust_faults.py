"""Killed, failed by the disk or signalled, at every write and at random moments; then the same command again."""

from __future__ import annotations

import errno
import io
import json
import os
import random
import re
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
from trust_run import Ran, Row, gmprobe, one_line, warm

RECIPE = """
[base]
data = "digits"
model = "mlp-8"
num_train = 60
num_unlabeled = 20
num_test = 40
batch_size = 30
epochs = 2
device = "cpu"
[grid]
lr = [0.01, 0.03, 0.1, 0.3]
[measure]
measures = ["mean_entropy"]
"""
TRAIN = (
    "train --data digits --model mlp-8 --num-train 60 --num-unlabeled 20 --num-test 40 --batch-size 30 --epochs 2 "
    "--checkpoint-every 1 --device cpu --out run --resume -q"
)
TIMED = {"seconds", "examples_per_second", "train_seconds"}
CODES = (errno.ENOSPC, errno.EIO, errno.EROFS)
RANDOM = 20
"""Random moments of a command."""


@dataclass(frozen=True)
class Command:
    """What is called in a folder, ``bare`` or with four finished runs in ``runs``."""

    arguments: str
    bare: bool = False

    def __call__(self, folder: Path, injure: Callable[[], Any] | None = None, **more: Any) -> Ran:
        def before() -> None:
            os.chdir(folder)
            if injure is not None:
                injure()

        return gmprobe(*self.arguments.split(), before=before, **more)


COMMANDS = {
    "measure": Command("measure runs/RUN --measures flip_rate,mean_entropy --save --json -q --device cpu"),
    "sweep": Command("sweep recipe.toml --out new --retry-failed -q", bare=True),
    "collect": Command("collect runs --out table.csv"),
    "correlate": Command("correlate runs --figure plot --json -q"),
    "report": Command("report runs --out page.html --markdown page.md --latex page.tex -q"),
    "train": Command(TRAIN, bare=True),
    "reproduce": Command("reproduce fig6 --scale smoke --out fig6 -q", bare=True),
}


# ---- injuries


def at_writes(blow: Callable[[int], None]) -> None:
    """Call ``blow`` with 1, 2, ... whenever a temporary file is to be made, synced or renamed."""
    calls = 0

    def wrapped(owner: Any, name: str, counts: Callable[..., bool] = lambda *_: True) -> None:
        original = getattr(owner, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            if counts(*args):
                calls += 1
                blow(calls)
            return original(*args, **kwargs)

        setattr(owner, name, call)

    wrapped(Path, "open", lambda _, mode="r", *__: mode == "xb")
    wrapped(os, "fsync")
    wrapped(Path, "replace")


def strike(at: int, code: int | None, calls: int) -> None:
    """At the ``at``th call SIGKILL, or a disk that fails once with ``code``."""
    if calls == at and code is None:
        os.kill(os.getpid(), signal.SIGKILL)
    elif calls == at:
        assert code is not None
        raise OSError(code, os.strerror(code))


# ---- what is compared


def content(folder: Path) -> dict[str, Any]:
    """Every file by name, parsed, without what was timed; raises what a torn file raises."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if not path.is_file() or path.suffix in {".lock", ".tmp"} or path.name == ".lock":
            continue
        name = path.relative_to(folder).as_posix()
        data = path.read_bytes()
        if path.suffix == ".json":
            found[name] = _untimed(json.loads(data))
        elif path.suffix == ".jsonl":
            found[name] = [_untimed(json.loads(line)) for line in data.splitlines()]
        elif path.suffix == ".csv":
            frame = pd.read_csv(io.BytesIO(data))
            found[name] = frame.drop(columns=TIMED & set(frame.columns)).to_csv()
        elif path.suffix == ".md":
            found[name] = re.sub(rb"took [^ ]+ s", b"took", data)
        else:
            found[name] = data
    return found


def _untimed(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _untimed(item) for key, item in value.items() if key not in TIMED}
    return value


PASSING = ("state.pt", "error.txt", "metrics.jsonl")
"""What a command may remove or shorten on its way."""


def lost(before: dict[str, Any], now: dict[str, Any], expected: dict[str, Any]) -> str | None:
    """A file that was whole before and is neither as it was nor as the undisturbed command leaves it."""
    for name, value in before.items():
        if not name.endswith(PASSING) and now.get(name) not in (value, expected.get(name)):
            return name
    return None


# ---- the cases


class Bench:
    """A command's prepared folder, how it looks before and after, and how many writes there are."""

    def __init__(self, name: str, ready: Path, work: Path) -> None:
        self.name, self.command, self._ready, self._work = name, COMMANDS[name], ready, work
        out = self.fresh()
        self.before = content(out)
        with tempfile.TemporaryFile() as count:
            ran = self.command(out, partial(at_writes, lambda _: os.write(count.fileno(), b".")))
            assert ran.code == 0, ran
            self.points = os.fstat(count.fileno()).st_size
        self.seconds = ran.seconds
        self.expected = content(out)

    def fresh(self) -> Path:
        out = self._work / "now"
        shutil.rmtree(out, ignore_errors=True)
        if self.command.bare:
            out.mkdir()
            shutil.copy2(self._ready / "recipe.toml", out)
        else:
            shutil.copytree(self._ready, out)
        return out

    def after(self, out: Path, *, temporary: bool) -> str | None:
        """What is wrong with ``out`` once struck, and once the command was called again."""
        left = [path.name for path in out.rglob(".*.tmp")]
        if left and not temporary:
            return f"left {left[0]}"
        try:
            missing = lost(self.before, content(out), self.expected)
        except ValueError as error:
            return f"torn: {error}"
        if missing is not None:
            return f"lost {missing}"
        again = self.command(out)
        if again.code != 0:
            return f"called again: exit {again.code}: {again.err[-300:]}"
        found = content(out)
        wrong = sorted(n for n in {*found, *self.expected} if found.get(n) != self.expected.get(n))
        left = [path.name for path in out.rglob(".*.tmp")]
        return f"called again: {(wrong or left)[0]} differs" if wrong or left else None

    def kills(self, row: Row, step: int, moments: int, chance: random.Random) -> None:
        for at in range(1, self.points + 1, step):
            out = self.fresh()
            ran = self.command(out, partial(at_writes, partial(strike, at, None)))
            problem = None if ran.code == -signal.SIGKILL else f"exit {ran.code}: {ran.err[-300:]}"
            row.add(f"{self.name}, SIGKILL at {at}", problem or self.after(out, temporary=True))
        for signum, out, _ in self._random(moments, [signal.SIGKILL], chance):
            row.add(f"{self.name}, {signum.name} at random", self.after(out, temporary=True))

    def _random(
        self, moments: int, signals: Sequence[signal.Signals], chance: random.Random, then: Then = ()
    ) -> Any:
        """Strike at ``moments`` random moments; a command that was faster is called anew."""
        struck = 0
        while struck < moments:
            out, signum = self.fresh(), signals[struck % len(signals)]
            ran = self.command(out, signalled=(signum, 0.005 + chance.random() * self.seconds), then=then)
            if ran.code != 0:
                struck += 1
                yield signum, out, ran

    def faults(self, row: Row, noted: Row, step: int) -> None:
        for at in range(1, self.points + 1, step):
            # of many writes each meets one code; 4 points a write and 3 codes meet all ways
            for code in CODES if self.points < 24 else CODES[at % 3 :][:1]:
                out = self.fresh()
                ran = self.command(out, partial(at_writes, partial(strike, at, code)))
                case = f"{self.name}, {errno.errorcode[code]} at {at}"
                if ran.code == 0:  # a cache, which nothing needs
                    same = None if content(out) == self.expected else "exit 0, but not all is there"
                    noted.add(case, same or self.after(out, temporary=False))
                    continue
                if self.name == "sweep" and ran.code == 1:  # the other runs go on
                    said = None if os.strerror(code) in ran.out else f"does not say why: {ran.out[-300:]}"
                    noted.add(case, said or self.after(out, temporary=False))
                    continue
                row.add(case, one_line(ran, 7, os.strerror(code)) or self.after(out, temporary=False))

    def signals(self, row: Row, moments: int, chance: random.Random) -> None:
        for signum, out, ran in self._random(moments, SIGNALS, chance):
            said = one_line(ran, 128 + signum)
            row.add(
                f"{self.name}, {signum.name} at a random moment", said or self.after(out, temporary=False)
            )

    def storms(self, row: Row, step: int, chance: random.Random) -> None:
        for name, then in list(STORMS.items())[::step]:
            for signum, out, ran in self._random(2, SIGNALS, chance, then):
                codes = {128 + number for number in (signum, *(number for number, _ in then))}
                said = one_line(ran, ran.code if ran.code in codes else 128 + signum)
                case = f"{self.name}, {signum.name} and {name}"
                row.add(case, said or self.after(out, temporary=True))


def prepared(folder: Path) -> Path:
    """Four finished runs and their recipe."""
    ready = folder / "ready"
    ready.mkdir()
    (ready / "recipe.toml").write_text(RECIPE)
    command = Command("sweep recipe.toml --out runs -q")
    ran = command(ready)
    assert ran.code == 0, ran
    return ready


def benches(names: list[str], folder: Path) -> list[Bench]:
    warm(folder)
    ready = prepared(folder)
    run = min(path.parent.name for path in ready.glob("runs/*/config.toml"))
    COMMANDS["measure"] = Command(COMMANDS["measure"].arguments.replace("RUN", run))
    found = []
    for name in names:
        (folder / name).mkdir()
        found.append(Bench(name, ready, folder / name))
    return found


KILLED = ["train", "measure", "sweep", "collect", "correlate", "report"]
FAILED = ["train", "measure", "sweep", "collect", "correlate", "report", "reproduce"]
SIGNALLED = ["measure", "sweep", "train"]
SIGNALS = (signal.SIGINT, signal.SIGTERM)
Then = Sequence[tuple[signal.Signals, float]]
STORMS: dict[str, Then] = {
    f"{second.name} {pause * 1000:g} ms later": ((second, pause),)
    for second in SIGNALS
    for pause in (0.0, 0.002, 0.02, 0.1)
} | {f"30 of {second.name}": ((second, 0.001),) * 30 for second in SIGNALS}
"""What comes after a first signal."""


def kills(small: bool) -> tuple[list[Row], list[str]]:
    row = Row("SIGKILL at each write and at random: nothing finished is lost or torn; again, the same files")
    chance, points = random.Random(0), {}
    with tempfile.TemporaryDirectory() as name:
        for bench in benches(["collect", "measure"] if small else KILLED, Path(name)):
            bench.kills(row, 3 if small else 1, 2 if small else RANDOM, chance)
            points[bench.name] = bench.points
            _say(row, bench)
    counted = ", ".join(f"{name} {count}" for name, count in points.items())
    return [row], [
        f"points at writes (made, synced, renamed, folder synced): {counted}; {RANDOM} random each",
        "training by every rule, compared bit for bit: kill-resume.md; sweeps of more jobs: kill-sweep.md",
    ]


def faults(small: bool) -> tuple[list[Row], list[str]]:
    rows = [
        Row(
            "ENOSPC, EIO, EROFS at each write: exit 7, one line; nothing torn or left; again, the same files"
        ),
        Row(
            "the same, of a cache (exit 0, all else is there) or one of a sweep's runs (exit 1, named; others done)"
        ),
        Row("Ctrl-C, SIGTERM at random: one line, 130 or 143; nothing torn or left; again, the same files"),
        Row(
            "a second signal within 0.1 s, or 30 more: one line, 130 or 143; nothing torn; again, the same files"
        ),
    ]
    chance = random.Random(1)
    with tempfile.TemporaryDirectory() as name:
        for bench in benches(["collect", "measure"] if small else FAILED, Path(name)):
            bench.faults(rows[0], rows[1], 3 if small else 1)
            if bench.name in SIGNALLED:
                bench.signals(rows[2], 4 if small else 2 * RANDOM, chance)
                bench.storms(rows[3], 5 if small else 1, chance)
            _say(rows[0], bench)
    many = (
        "of the points at writes of train, sweep and reproduce each met one of the three; they come in turn"
    )
    return rows, [many]


def _say(row: Row, bench: Bench) -> None:
    print(
        f"{bench.name}: {bench.points} points, {bench.seconds:.2f} s; {row.held} of {row.tried}",
        file=sys.stderr,
    )
