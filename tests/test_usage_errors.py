"""A usage error is told before anything slow is imported, in one line, with its exit code."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

CODE = """
import contextlib, io, json, sys
from gm_probe.cli import main
for args in json.load(sys.stdin):
    code, err = 0, io.StringIO()
    try:
        with contextlib.redirect_stderr(err):
            main(args)
    except SystemExit as stop:
        code = stop.code
    slow = [name for name in ("torch", "scipy.stats", "matplotlib.pyplot", "sklearn", "optuna") if name in sys.modules]
    print(json.dumps([code, err.getvalue(), slow]))
"""
MEASURE, DATA = ("measure", "ckpt.pt"), ("--unlabeled", "digits")
ERRORS = {
    "a missing checkpoint": (3, "measure", "no.pt", *DATA),
    "no checkpoint at all": (2, "measure"),
    "no data": (2, *MEASURE),
    "unknown data": (2, *MEASURE, "--unlabeled", "digitz"),
    "a missing folder": (2, *MEASURE, "--unlabeled", "no/such/folder"),
    "an unknown measure": (2, *MEASURE, *DATA, "--measures", "fisher_tracee"),
    "a measure that needs labels": (4, *MEASURE, *DATA, "--measures", "error"),
    "an unknown option": (2, *MEASURE, "--rhoo", "1"),
    "a value that is no choice": (2, *MEASURE, *DATA, "--protocol", "papr"),
    "a value that is no number": (2, *MEASURE, *DATA, "--max-probes", "ten"),
    "a radius in words": (2, *MEASURE, *DATA, "--rho", "big"),
    "a radius of 0": (2, *MEASURE, *DATA, "--rho", "0"),
    "K of one and a half": (2, *MEASURE, *DATA, "--k-steps", "1.5"),
    "no probes": (2, *MEASURE, *DATA, "--max-probes", "0"),
    "no starts": (2, *MEASURE, *DATA, "--starts", "0"),
    "an unknown model": (2, *MEASURE, *DATA, "--model", "resnet999"),
    "an unknown model of torchvision": (2, *MEASURE, *DATA, "--model", "torchvision:resnet19"),
    "training an unknown model": (2, "train", "--model", "6cn"),
    "an unknown device": (2, *MEASURE, *DATA, "--device", "gpu"),
    "a size in words": (2, *MEASURE, *DATA, "--memory", "much"),
    "a mean without a std": (2, *MEASURE, *DATA, "--mean", "0.5"),
    "a mean in words": (2, *MEASURE, *DATA, "--mean", "half", "--std", "1"),
    "a crop beyond the size": (2, *MEASURE, *DATA, "--resize", "8", "--crop", "9"),
    "two kinds of data": (2, *MEASURE, *DATA, "--labeled", "digits"),
    "a grid that nothing takes": (2, *MEASURE, *DATA, "--measures", "fisher_trace", "--rho", "0.1,0.2"),
    "saving into a file": (2, *MEASURE, *DATA, "--save"),
    "a figure of another format": (2, *MEASURE, *DATA, "--density", "d.bmp"),
    "pairs of nothing": (2, "pairs"),
    "pairs of a missing file": (3, "pairs", "no.pt", "ckpt.pt"),
    "no table": (2, "correlate", "no.csv"),
    "no table of a known kind": (2, "correlate", "notes.txt"),
    "a folder without runs": (2, "correlate", "empty"),
    "an unknown column": (2, "correlate", "t.csv", "--measures", "n"),
    "a table without a gap": (4, "correlate", "odd.csv"),
    "a report of no table": (2, "report", "no.csv"),
    "a report that is no page": (2, "report", "t.csv", "--out", "report.pdf"),
    "an unknown method": (2, "train", "--method", "foo"),
    "a negative radius": (2, "train", "--rho", "-1"),
    "no epochs": (2, "train", "--epochs", "0"),
    "milestones in words": (2, "train", "--milestones", "a,b"),
    "training data that is not there": (2, "train", "--data", "no/such/folder"),
    "training on an unknown device": (2, "train", "--device", "gpu"),
    "tuning an unknown method": (2, "tune", "--method", "foo"),
    "an unknown recipe": (2, "sweep", "nosuch"),
    "a missing recipe": (7, "sweep", "no.toml"),
    "a recipe with an unknown setting": (2, "sweep", "setting.toml"),
    "a recipe with an unknown measure": (2, "sweep", "measure.toml"),
    "a recipe with an impossible value": (2, "sweep", "value.toml"),
    "a run of no sweep": (2, "run-one", "empty", "a"),
    "the state of no sweep": (2, "status", "empty"),
    "an unknown command": (2, "measur"),
    "a recipe of the paper that there is not": (2, "reproduce", "fig99"),
}


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[int, str, list[str]]]:
    """Exit code, stderr and the slow modules that have been imported, of one process that makes every error in turn."""
    path = tmp_path_factory.mktemp("usage")
    (path / "empty").mkdir()
    (path / "ckpt.pt").write_bytes(b"")
    (path / "notes.txt").write_text("hello")
    (path / "t.csv").write_text("error_gap,m\n1,2\n2,3\n")
    (path / "odd.csv").write_text("a,b\n1,2\n2,3\n")
    (path / "setting.toml").write_text("[base]\nepochz = 3\n")
    (path / "measure.toml").write_text("[measure]\nmeasures = ['fisher']\n")
    (path / "value.toml").write_text("[measure]\nk_steps = 0\n")
    done = subprocess.run(
        [sys.executable, "-c", CODE],
        input=json.dumps([args for _, *args in ERRORS.values()]),
        cwd=path,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    return dict(zip(ERRORS, map(json.loads, done.stdout.splitlines()), strict=True))


@pytest.mark.parametrize("name", ERRORS)
def test_a_usage_error_waits_for_nothing_slow(told: dict[str, tuple[int, str, list[str]]], name: str) -> None:
    code, err, slow = told[name]
    assert (code, slow) == (ERRORS[name][0], []), err
    assert err.startswith("gmprobe: ")
    assert err.count("\n") == 1
