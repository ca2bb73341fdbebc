"""Folders that are not as they seem: a few of the cases that benchmarks/trust_files.py makes."""

import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
from command_line import exit_code

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
PLACES = (
    "config.toml",
    "split.json",
    "summary.json",
    "measures.json",
    "metrics.jsonl",
    "error.txt",
    ".lock",
    "sweep.json",
)


@pytest.fixture(scope="module")
def trust_files() -> Iterator[ModuleType]:
    """The harness's part."""
    sys.path.insert(0, str(BENCHMARKS))
    import trust_files

    yield trust_files
    sys.path.remove(str(BENCHMARKS))


@pytest.fixture
def alarm() -> Iterator[None]:
    """End a test that waits for ever."""
    before = signal.signal(signal.SIGALRM, signal.default_int_handler)
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def command(*args: object) -> int:
    return exit_code(args)


@pytest.mark.usefixtures("alarm")
@pytest.mark.parametrize("place", PLACES)
def test_nothing_in_a_runs_folder_is_waited_for(
    tmp_path: Path,
    trust_files: ModuleType,
    place: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    for number, (kind, make) in enumerate(trust_files._obstacles().items()):
        if "MB" in kind:
            continue
        for name, other in (("sound", "{}"), ("odd", "")):
            run = tmp_path / str(number) / name
            run.mkdir(parents=True)
            (run / "config.toml").write_text("epochs = 1")
            (run / "summary.json").write_text('{"status": "finished", "error_gap": 0.1}')
            (run / "measures.json").write_text('{"measures": {"fisher_trace": {"value": 1.0}}}')
            (run / "error.txt").write_text("failed once") if other else None
        path = (run.parent if place == "sweep.json" else run) / place
        path.unlink(missing_ok=True)
        monkeypatch.chdir(path.parent)  # a socket's name is short
        make(Path(path.name))
        monkeypatch.chdir(tmp_path)
        for args in (
            ("status", tmp_path / str(number)),
            ("collect", tmp_path / str(number), "--out", tmp_path / "table.csv"),
            ("correlate", tmp_path / str(number), "--no-figure"),
            ("measure", run, "--save", "--measures", "mean_entropy"),
            ("train", "--out", run, "--resume", "--epochs", 1, "--model", "mlp-8", "-q"),
        ):
            assert command(*args) in {0, 1, 2, 3, 4, 7}, (kind, args)
            printed = capsys.readouterr()
            assert "internal error" not in printed.err, (kind, args)


def test_settings_in_the_current_folder_steer_no_figure(tmp_path: Path, trust_files: ModuleType) -> None:
    lines = "".join(f"{i % 7 / 10},{i % 5 / 10},{i % 3}\n" for i in range(30))
    (tmp_path / "table.csv").write_text(f"error_gap,fisher_trace,lr\n{lines}")
    figures = []
    for name, make in (
        ("none", None),
        ("pipe", os.mkfifo),
        ("style", trust_files._settings_files()["of another style"]),
    ):
        folder = tmp_path / name
        folder.mkdir()
        if make is not None:
            make(folder / "matplotlibrc")
        ran = trust_files._started(
            ["correlate", tmp_path / "table.csv", "--figure", "f.svg", "-q"], folder, 100
        )
        assert ran.code == 0, ran.err
        figures.append((folder / "f.svg").read_bytes())
    assert figures[0] == figures[1] == figures[2]
