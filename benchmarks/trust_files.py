"""Folders that are not as they seem: code and settings where a command is called, links, pipes, records that ask."""

from __future__ import annotations

import fcntl
import json
import os
import random
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import tomli_w
from trust_run import Ran, Row, gmprobe, warm

from gm_probe.errors import BusyError
from gm_probe.files import locks
from gm_probe.files.atomic import read_toml

ROOT = Path(__file__).parents[1]
SMALL = "--data digits --model mlp-8 --num-train 60 --num-unlabeled 20 --num-test 20 --device cpu -q"
MIB = 2**20
MORE = 64 * MIB
"""Bytes that a command may take beyond what it takes of a sound folder."""
Make = Callable[[Path], object]


class Bench:
    """Two finished runs, and one that was interrupted, in a folder with a sweep.json; copied for each case."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.whole = folder, folder / "whole"
        for name, epochs in (("a", 1), ("b", 1), ("c", 2)):
            _call(
                "train", *SMALL.split(), "--seed", ord(name), "--epochs", epochs, "--out", self.whole / name
            )
        _call("measure", self.whole / "a", "--measures", "mean_entropy", "--save", "-q")
        self._interrupt(self.whole / "c")
        runs = {name: _settings(self.whole / name) for name in "abc"}
        plan = {"measures": ["mean_entropy"], "settings": _asked(self.whole / "a"), "coupled": {}}
        (self.whole / "sweep.json").write_text(
            json.dumps({"runs": runs, **plan, "batch_size": None, "group_by": []})
        )

    def _interrupt(self, run: Path) -> None:
        from gm_probe.training.config import TrainConfig
        from gm_probe.training.loop import train

        config = TrainConfig.from_record(read_toml(run / "config.toml"))
        shutil.rmtree(run)

        def stop(_: object) -> None:
            if (run / "state.pt").exists():
                raise InterruptedError

        with suppress(InterruptedError):
            train(config, run, notify=stop)

    def fresh(self) -> Path:
        """A copy of the folder, with nothing beside it."""
        case = self.folder / "case"
        shutil.rmtree(case, ignore_errors=True)
        shutil.copytree(self.whole, case / "runs")
        return case / "runs"


def _call(*arguments: object) -> None:
    from gm_probe.cli import main

    with open(os.devnull, "w") as nowhere:  # noqa: PTH123
        before, sys.stdout = sys.stdout, nowhere
        try:
            main([*map(str, arguments)])
        except SystemExit as stop:
            if stop.code:
                raise RuntimeError(arguments) from stop
        finally:
            sys.stdout = before


def _settings(run: Path) -> dict[str, Any]:
    return {key: value for key, value in read_toml(run / "config.toml").items() if key != "environment"}


def _asked(run: Path) -> dict[str, Any]:
    from gm_probe.measures.context import Settings

    recorded = json.loads((run / "measures.json").read_text())["settings"]
    return {key: recorded[key] for key in [*Settings().as_dict(), "part", "max_examples"]}


COMMANDS: dict[str, Callable[[Path], list[object]]] = {
    "status": lambda runs: ["status", runs],
    "collect": lambda runs: ["collect", runs, "--out", runs.parent / "table.csv", "-q"],
    "correlate": lambda runs: ["correlate", runs, "--no-figure", "-q"],
    "report": lambda runs: ["report", runs, "--out", runs.parent / "page.html", "-q"],
    "measure": lambda runs: ["measure", runs / "a", "--measures", "mean_entropy", "-q"],
    "measure all --save": lambda runs: ["measure", runs, "--measures", "parameter_norm", "--save", "-q"],
    "pairs": lambda runs: ["pairs", runs / "a", runs / "b", "-q"],
    "train --resume": lambda runs: ["train", "--out", runs / "c", "--resume", "-q"],
    "run-one": lambda runs: ["run-one", runs, "c"],
}


def ended_well(ran: Ran, most: int) -> str | None:
    """What is wrong with how a command ended, whatever its answer is; ``most`` bytes at its peak."""
    if ran.code is None:
        return f"hung for {ran.seconds:.0f} s"
    if ran.code not in {0, 1, 2, 3, 4, 7} or "internal error" in ran.err or "Traceback" in ran.err:
        return f"exit {ran.code}: {ran.err[-300:]}"
    if ran.peak > most:
        return f"{ran.peak / MIB:,.0f} MiB at its peak"
    return None


# ---- code and settings in the current folder

_MODULES = (
    "pickle torch json numpy decimal timm torchvision sklearn pandas matplotlib ray selectors tempfile "
    "platform statistics pkgutil click multiprocessing logging sitecustomize gm_probe_user_net "
)
MODULES = tuple(_MODULES.split())
CANARY = "import pathlib\npathlib.Path({canary!r}).touch()\nraise SystemExit('taken from here')\n"
NET = (
    "import decimal, statistics, helper, torch\n"
    "def build():\n    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10))\n"
)


def _started(arguments: list[object], folder: Path, within: float = 300.0) -> Ran:
    """The command in a process of its own, called in ``folder``."""
    script = Path(sys.executable).parent / "gmprobe"
    start = [str(script)] if script.exists() else [sys.executable, "-P", "-m", "gm_probe"]
    if arguments[0] == "-m":
        start, arguments = [sys.executable, "-m", "gm_probe"], arguments[1:]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    began = time.perf_counter()
    try:
        done = subprocess.run(
            [*start, *map(str, arguments)],
            cwd=folder, env=environment, capture_output=True, text=True, timeout=within, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return Ran(None, "", "", 0, within)
    return Ran(done.returncode, done.stdout, done.stderr, 0, time.perf_counter() - began)


def code_here(bench: Bench, small: bool) -> Row:
    row = Row(
        "modules by the names of Python's own and of installed ones in the current folder: none is imported, by a "
        "command, its processes or code that --model names"
    )
    runs = bench.fresh()
    here, canaries = runs.parent / "here", runs.parent / "canaries"
    here.mkdir()
    canaries.mkdir()
    for name in MODULES:
        (here / f"{name}.py").write_text(CANARY.format(canary=str(canaries / name)))
    (here / "net.py").write_text(NET)
    (here / "helper.py").write_text("")
    measured = ["--measures", "mean_entropy", "--device", "cpu", "-q"]
    code = ["train", *SMALL.replace("mlp-8", "{}").split(), "--epochs", "1", "--out"]
    commands: dict[str, list[object]] = {
        "-m": ["-m", "status", runs],
        "measure --jobs": ["measure", runs / "a", runs / "b", "--jobs", "2", *measured],
        "train --model file": [*(str(part).format("net.py:build") for part in code), runs / "d"],
        "train --model module": [*(str(part).format("net:build") for part in code), runs / "e"],
        "-m measure --jobs": ["-m", "measure", runs / "a", runs / "b", "--jobs", "2", *measured],
        "measure --executor ray": ["measure", runs / "a", "--executor", "ray", *measured],
        "correlate": ["correlate", runs, "--figure", here / "f.svg", "-q"],
        "report": ["report", runs, "--out", here / "p.html", "-q"],
    }
    for command in list(commands)[: 2 if small else None]:
        ran = _started(commands[command], here)
        taken = {path.name for path in canaries.iterdir()}
        failed = None if ran.code in {0, 4} else f"exit {ran.code}: {ran.err[-300:]}"
        for name in MODULES:
            row.add(f"{name}.py at {command}", "was imported" if name in taken else failed)
        for path in canaries.iterdir():
            path.unlink()
    return row


def _settings_files() -> dict[str, Make]:
    """Ways to put a matplotlibrc into a folder."""
    texts: dict[str, bytes] = {
        "of another style": b"font.size: 30\naxes.facecolor: red\nlines.linewidth: 9\n",
        "of another font": b"font.family: cursive\nsvg.fonttype: path\n",
        "with TeX": b"text.usetex: True\n",
        "of no backend": b"backend: nowhere\n",
        "of somebody's backend": b"backend: module://evil\n",
        "not UTF-8": b"\xff\xfe\x00",
        "of unknown keys": b"a: b\n" * 1000,
        "of broken values": b"font.size: nine\n",
        "of 64 MB": b"#" * 64_000_000,
        "with a null": b"font.size: \0\n",
    }
    kinds: dict[str, Make] = {name: partial(Path.write_bytes, data=text) for name, text in texts.items()}
    return kinds | {
        "a pipe": os.mkfifo,
        "a folder": Path.mkdir,
        "a link to itself": lambda path: path.symlink_to(path),
        "a link to a device": lambda path: path.symlink_to("/dev/zero"),
    }


def settings_here(bench: Bench, small: bool) -> Row:
    row = Row("a matplotlibrc in the current folder: the same figure, byte for byte, and no word of it")
    table = bench.folder / "table.csv"
    lines = "".join(f"{i % 7 / 10},{i % 5 / 10},{i % 3}\n" for i in range(30))
    table.write_text(f"error_gap,fisher_trace,lr\n{lines}")

    def drawn(folder: Path) -> tuple[Ran, bytes]:
        ran = _started(["correlate", table, "--figure", folder / "f.svg", "-q"], folder, within=120)
        figure = folder / "f.svg"
        return ran, figure.read_bytes() if figure.exists() else b""

    with tempfile.TemporaryDirectory(dir=bench.folder) as clean:
        expected = drawn(Path(clean))
    for name, make in list(_settings_files().items())[: 2 if small else None]:
        with tempfile.TemporaryDirectory(dir=bench.folder) as folder:
            make(Path(folder) / "matplotlibrc")
            ran, figure = drawn(Path(folder))
            problem = ended_well(ran, MORE) or ("said more" if ran.err != expected[0].err else None)
            row.add(name, problem or (None if figure == expected[1] and figure else "another figure"))
    return row


# ---- links

_WRITTEN = (
    ".lock .lock.new metrics.jsonl config.toml split.json summary.json measures.json "
    "checkpoint.safetensors state.pt error.txt curves.png best.safetensors tensorboard .summary.json.lock "
)
WRITTEN = tuple(_WRITTEN.split())
WRITERS: dict[str, Callable[[Path], list[object]]] = {
    name: COMMANDS[name] for name in ("measure all --save", "train --resume", "run-one")
} | {
    "train": lambda runs: ["train", *SMALL.split(), "--epochs", "1", "--out", runs / "c", "--tensorboard"],
    "train --resume --eval-every": lambda runs: [
        "train",
        "--out",
        runs / "c",
        "--resume",
        "--tensorboard",
        "-q",
    ],
}


def links(bench: Bench, small: bool) -> Row:
    row = Row(
        "links and second names of a file in place of what is written: what they lead to stays as it is"
    )
    mine = "mine, all mine\n" * 10
    for name in WRITTEN:
        for kind in ("link", "dangling", "second name", "link to a folder"):
            for command in random.Random(f"{name}{kind}").sample(list(WRITERS), 1 if small else 3):
                runs = bench.fresh()
                target, absent, folder = (runs.parent / part for part in ("mine", "absent", "folder"))
                target.write_text(mine)
                folder.mkdir()
                if command == "train":
                    shutil.rmtree(runs / "c")
                    (runs / "c").mkdir()
                for run in "abc":
                    _plant(runs / run / name, kind, target, absent, folder)
                ran = gmprobe(*WRITERS[command](runs), within=60)
                problem = ended_well(ran, 2**40)
                if target.read_text() != mine:
                    problem = "wrote to what it leads to"
                elif os.path.lexists(absent) or list(folder.iterdir()):
                    problem = "made something where it leads to"
                row.add(f"{kind} as {name} at {command}", problem)
    return row


def _plant(path: Path, kind: str, target: Path, absent: Path, folder: Path) -> None:
    path.unlink(missing_ok=True)
    if kind == "second name":
        path.hardlink_to(target)
    else:
        path.symlink_to({"link": target, "dangling": absent, "link to a folder": folder}[kind])


def outputs(bench: Bench) -> Row:
    """Tables, pages and figures that are asked for by a name that is a link."""
    row = Row(
        "a table, page or figure whose name is a link: the link is replaced, what it led to stays as it is"
    )
    commands: dict[str, Callable[[Path, Path], list[object]]] = {
        "t.csv": lambda runs, out: ["collect", runs, "--out", out, "-q"],
        "p.html": lambda runs, out: ["report", runs, "--out", out, "-q"],
        "f.svg": lambda runs, out: ["correlate", bench.folder / "table.csv", "--figure", out, "-q"],
        "w.pt": lambda runs, out: [
            "train",
            *SMALL.split(),
            "--epochs",
            "1",
            "--out",
            runs / "d",
            "--save",
            out,
        ],
    }
    for name, arguments in commands.items():
        for kind in ("link", "dangling", "second name", "lock"):
            runs = bench.fresh()
            for run in "ab":
                _call("measure", runs / run, "--measures", "mean_entropy", "--save", "-q")
            target, absent = runs.parent / "mine", runs.parent / "absent"
            target.write_text("mine")
            place = runs.parent / (f".{name}.lock" if kind == "lock" else name)
            _plant(place, "dangling" if kind == "lock" else kind, target, absent, runs)
            ran = gmprobe(*arguments(runs, runs.parent / name), within=60)
            kept = target.read_text() == "mine" and not os.path.lexists(absent)
            row.add(f"{kind} at {name}", ended_well(ran, 2**40) or (None if kept else "wrote through it"))
    return row


# ---- what a record asks for


def _watch_network(canary: Path) -> None:
    """Let every way out of this machine leave a mark, and lead nowhere."""

    def out(*_: object, **__: object) -> None:
        canary.touch()
        raise OSError("no way out")

    socket.getaddrinfo = out  # type: ignore[assignment]
    socket.socket.connect = out  # type: ignore[assignment,method-assign]


def requests(bench: Bench, small: bool) -> Row:
    row = Row(
        "a run folder or sweep.json that asks for a download, a data root, code, a device: no request, no folder made, "
        "no code run; one line says what to add"
    )
    elsewhere = "{elsewhere}"
    asked: dict[str, dict[str, Any]] = {
        f"download of {data}": {"data": data, "download": True, "data_root": elsewhere}
        for data in ("cifar10", "cifar100", "fashionmnist", "svhn")
    }
    asked |= {
        f"download of {data}, no root": {"data": data, "download": True} for data in ("cifar10", "svhn")
    }
    asked |= {"root": {"data": "cifar10", "data_root": elsewhere}}
    asked |= {f"model {name}": {"model": name} for name in ("evil:build", "evil.py:build", "os:getcwd")}
    asked |= {f"device {name}": {"device": name} for name in ("cuda", "cuda:7", "mps", "meta", "xla:0")}
    asked |= {f"{count:,} threads": {"threads": count} for count in (1000, 10**6, 10**18, 0, -1)}
    asked |= {"init elsewhere": {"init": elsewhere}}
    for name, changes in list(asked.items())[:: 6 if small else 1]:
        for command in random.Random(name).sample(list(COMMANDS), 3) if small else COMMANDS:
            runs = bench.fresh()
            place, canary = runs.parent / "elsewhere", runs.parent / "canary"
            (runs.parent / "evil.py").write_text(CANARY.format(canary=str(canary)))
            changes = {key: str(place) if value == elsewhere else value for key, value in changes.items()}
            for run in "abc":
                (runs / run / "config.toml").write_text(tomli_w.dumps({**_settings(runs / run), **changes}))
            sweep = json.loads((runs / "sweep.json").read_text())
            sweep["runs"] = {run: {**settings, **changes} for run, settings in sweep["runs"].items()}
            (runs / "sweep.json").write_text(json.dumps(sweep))

            def before(runs: Path = runs, canary: Path = canary) -> None:
                os.chdir(runs.parent)
                os.environ["HOME"] = str(runs.parent / "home")
                _watch_network(canary)

            ran = gmprobe(*COMMANDS[command](runs), before=before, within=60)
            problem = ended_well(ran, 2**40)
            if canary.exists():
                problem = "went out, or ran code"
            elif place.exists() or (runs.parent / "home" / ".cache" / "gm_probe").exists():
                problem = "made a folder"
            row.add(f"{name} at {command}", problem)
    return row


# ---- what is not the tool's own


def others_files(bench: Bench, small: bool) -> Row:
    row = Row("files of somebody's own in a run folder, by names like those of temporary files: all stay")
    draw = random.Random(0)
    names = [".notes.tmp", ".draft.docx.tmp", ".state.pt.x.tmp", ".tmp", "..tmp", ".a.tmp~", "state.pt.tmp"]
    names += [
        f".{_word(draw)}.{_word(draw)}.{draw.randrange(10**5)}.{draw.randrange(2**32):08x}.tmp"
        for _ in range(20)
    ]
    names += [f".{_word(draw)}.tmp" for _ in range(20)]
    for command in ("train --resume", "measure all --save", "run-one"):
        runs = bench.fresh()
        for name in names:
            (runs / "c" / name).write_text(name)
        ran = gmprobe(*COMMANDS[command](runs), within=60)
        failed = ended_well(ran, 2**40)
        for name in names:
            path = runs / "c" / name
            row.add(
                f"{name} at {command}",
                failed or (None if path.exists() and path.read_text() == name else "is gone"),
            )
        if small:
            break
    return row


def _word(draw: random.Random) -> str:
    return "".join(draw.choice("abcdefgh0123456789-_. ") for _ in range(draw.randrange(1, 12)))


# ---- clocks

OFFSETS = (-(10**9), -(10**6), -3600, -120, -61, -59, -1, 0, 1, 59, 61, 120, 3600, 10**6, 2 * 10**9)
"""Seconds by which another machine's clock differs: the last says 2090."""


@contextmanager
def _machines() -> Iterator[None]:
    """Locks that exclude nobody, as between machines, and a second in place of the minute."""
    before = fcntl.flock, locks.STALE
    fcntl.flock, locks.STALE = (lambda *_: None), 1.0
    try:
        yield
    finally:
        fcntl.flock, locks.STALE = before


def clocks(small: bool) -> list[Row]:
    alive = Row("a lock of another machine at work, whose clock is up to 63 years off: the run is left alone")
    gone = Row(
        "a lock of another machine that is gone, of any date: the run is taken when a minute has passed"
    )
    for offset in OFFSETS[:: 5 if small else 1]:
        for row in (alive, gone):
            with tempfile.TemporaryDirectory() as folder, _machines():
                row.add(f"{offset:+,} s", _taken(Path(folder), offset, lives=row is alive))
    return [alive, gone]


def _taken(folder: Path, offset: float, *, lives: bool) -> str | None:
    """What is wrong with who gets the folder."""
    ended, lock = threading.Event(), folder / locks.LOCK

    def beat() -> None:
        beats = 0
        while True:
            lock.write_text(f"elsewhere 1\n\n{beats}\n")
            os.utime(lock, (time.time() + offset,) * 2)
            beats += 1
            if not lives or ended.wait(0.2):
                return

    thread = threading.Thread(target=beat)
    thread.start()
    time.sleep(0.1)
    began = time.monotonic()
    try:
        with locks.exclusive(folder):
            waited = time.monotonic() - began
            return (
                "taken from a living holder"
                if lives
                else None
                if 1 <= waited < 5
                else f"after {waited:.1f} s"
            )
    except BusyError:
        return None if lives else "blocked by a dead holder"
    finally:
        ended.set()
        thread.join()


# ---- what would wait for ever

_PLACES = (
    "config.toml split.json metrics.jsonl summary.json measures.json error.txt state.pt "
    "checkpoint.safetensors .lock .lock.new ../sweep.json "
)
PLACES = tuple(_PLACES.split())


def _obstacles() -> dict[str, Make]:
    def bound(path: Path) -> None:
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(str(path))

    def holes(path: Path) -> None:
        with path.open("wb") as file:
            file.truncate(2**40)

    def brackets(path: Path) -> None:
        with path.open("wb") as file:
            for _ in range(64):  # in pieces: forks would inherit the memory
                file.write(b"[" * 1_000_000)

    return {
        "a pipe": os.mkfifo,
        "a socket": bound,
        "a folder": Path.mkdir,
        "/dev/zero": lambda path: path.symlink_to("/dev/zero"),
        "/dev/random": lambda path: path.symlink_to("/dev/random"),
        "/dev/tty": lambda path: path.symlink_to("/dev/tty"),
        "/dev/stdin": lambda path: path.symlink_to("/dev/stdin"),
        "a link to itself": lambda path: path.symlink_to(path),
        "a link to nothing": lambda path: path.symlink_to("nothing"),
        "1 TB of holes": holes,
        "64 MB of brackets": brackets,
    }


def obstacles(bench: Bench, small: bool) -> Row:
    row = Row(
        f"pipes, sockets, devices, holes in place of a file of a run or sweep: no wait, {MORE // MIB} MiB more"
    )
    sound = {name: gmprobe(*arguments(bench.fresh()), within=60).peak for name, arguments in COMMANDS.items()}
    for kind, make in _obstacles().items():
        for place in PLACES:
            for command in random.Random(f"{kind}{place}").sample(list(COMMANDS), 1 if small else 4):
                runs = bench.fresh()
                for run in ("a", "c") if not place.startswith("..") else ("a",):
                    path = (runs / run).parent / place[3:] if place.startswith("..") else runs / run / place
                    path.unlink(missing_ok=True)
                    make(path)
                ran = gmprobe(*COMMANDS[command](runs), within=20)
                more = 4 * MORE if kind == "64 MB of brackets" else MORE
                row.add(f"{kind} as {place} at {command}", ended_well(ran, sound[command] + more))
    return row


def run(small: bool) -> tuple[list[Row], list[str]]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        warm(folder)
        bench = Bench(folder)
        rows = [code_here(bench, small), settings_here(bench, small), links(bench, small)]
        rows += [] if small else [outputs(bench)]
        rows += [requests(bench, small), others_files(bench, small), *clocks(small), obstacles(bench, small)]
    return rows, []
