"""What is printed of names and reasons that files choose: nothing that steers a terminal or a spreadsheet."""

from __future__ import annotations

import ast
import csv
import io
import json
import math
import os
import pty
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

import gm_probe.cli
from gm_probe.cli import main, output
from gm_probe.cli.measure_output import measure_labels
from gm_probe.errors import printable
from gm_probe.files.atomic import write_json, write_toml
from gm_probe.tables.cells import FORMULA, cell
from gm_probe.tables.collect import write_table

STEERING = "\x1b[2J\x1b]0;title\x07\x9b31m\u202egnp\u2066x\r\x00\x7f\u2028y\u061c"
"""Escape sequences, C1, overrides of the writing direction, a separator of lines."""
FORBIDDEN = re.compile(
    r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028\u2029\u202a-\u202e\u2066-\u2069]"
)


@pytest.mark.parametrize(
    ("paths", "short"),
    [
        (["a.pt"], ["a.pt"]),
        (["a.pt", "b/c.pt"], ["a.pt", "b/c.pt"]),
        (["runs/a", "runs/ab"], ["a", "ab"]),
        (["/x/runs/a/1", "/x/runs/b"], ["a/1", "b"]),
        (["/x/a", "b"], ["/x/a", "b"]),
        (["../a/x", "../b/x"], ["a/x", "b/x"]),
    ],
)
def test_a_shared_folder_is_not_repeated_in_a_table(paths: list[str], short: list[str]) -> None:
    assert output.short_names(paths) == short


@pytest.mark.parametrize(
    ("value", "digits", "text"),
    [
        (None, 4, "—"),
        (540.4, 2, "540"),
        (12345.6, 4, "12350"),
        (-12345.6, 4, "-12350"),
        (0.0000123, 2, "1.2e-05"),
        (1.5e9, 2, "1.5e+09"),
        (999_999.0, 2, "1000000"),
        (math.inf, 4, "inf"),
        (math.nan, 4, "nan"),
    ],
)
def test_numbers_below_a_million_have_no_exponent(value: float | None, digits: int, text: str) -> None:
    assert output.number(value, digits) == text


@pytest.mark.parametrize(
    ("room", "labels"),
    [
        (23, ["fisher_trace (tr F)", "energy"]),
        (19, ["fisher_trace (tr F)", "energy"]),
        (18, ["fisher_trace", "energy"]),
        (11, ["tr F", "energy"]),
    ],
)
def test_a_measure_is_called_by_what_the_table_has_room_for(room: int, labels: list[str]) -> None:
    assert measure_labels(["fisher_trace", "energy"], room) == labels


def test_printable_escapes_what_steers_and_keeps_every_script() -> None:
    assert FORBIDDEN.search(printable(STEERING + "\n")) is None
    assert "\n" not in printable("a\nb")
    for kept in ("naïve 测度 👩‍👧", "ρ = 0.1", "می‌خواهم", "a\u00a0b\u3000c"):
        assert printable(kept) == kept
    assert printable("\udcff") == r"\udcff"


@pytest.mark.parametrize("show", ["table", "title", "column", "note", "say", "markup", "csv", "echo"])
def test_no_way_of_printing_lets_a_control_character_through(
    show: str, capsys: pytest.CaptureFixture[str]
) -> None:
    console = output.results_console()
    text = f"[bold]{STEERING}[/nonsense]"
    {
        "table": lambda: console.print(output.table(None, ["a"], [[text]])),
        "title": lambda: console.print(output.table(text, ["a"], [["b"]])),
        "column": lambda: console.print(output.table(None, [text], [["b"]])),
        "note": lambda: output.note(console, text),
        "say": lambda: output.say(console, text),
        "markup": lambda: console.print(text, markup=False),
        "csv": lambda: output.print_csv([{text: text}]),
        "echo": lambda: output.echo(text),
    }[show]()
    printed = capsys.readouterr().out
    assert FORBIDDEN.search(printed) is None
    assert r"\x1b[2J" in printed
    assert "[bold]" in printed


def test_only_the_one_module_prints() -> None:
    """``click.echo`` has texts of the tool's own alone: a shell's script, a help text."""
    allowed = {
        ("sweep", "click.echo"),
        ("__init__", "click.echo"),
        ("__init__", "print"),
    }
    for path in Path(gm_probe.cli.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and (name := ast.unparse(node.func)) in {
                "click.echo",
                "print",
                "Console",
            }:
                assert path.stem == "output" or (path.stem, name) in allowed, f"{path.name}:{node.lineno}"


# ---- commands


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """Six runs whose texts steer; names of folders do not."""
    for i in range(6):
        folder = tmp_path / "runs" / f"run{i}"
        write_toml(folder / "config.toml", {"optimizer": f"a{STEERING}{i % 2}", "lr": 0.1 * i})
        write_json(folder / "summary.json", {"status": "finished", "error_gap": 0.1 * i, "reason": STEERING})
        row: dict[str, Any] = (
            {"value": None, "reason": f"no {STEERING}"} if i == 5 else {"value": 1.0 * (i % 4)}
        )
        settings = {"data": f"d{STEERING}{i % 2}"}
        write_json(folder / "measures.json", {"measures": {"fisher_trace": row}, "settings": settings})
    (tmp_path / "runs" / "run4" / "error.txt").write_text(f"lost {STEERING}", encoding="utf-8")
    return tmp_path / "runs"


COMMANDS = {
    "status": ("status",),
    "status --csv": ("status", "--csv"),
    "status --json": ("status", "--json"),
    "correlate --details": ("correlate", "--details", "--no-figure", "--group-by", "optimizer"),
    "correlate --csv": ("correlate", "--csv", "--group-by", "optimizer"),
    "correlate --json": ("correlate", "--json", "--group-by", "optimizer"),
    "collect": ("collect", "--out", "c.csv"),
    "report": ("report", "--out", "r.html", "--markdown", "r.md", "--group-by", "optimizer"),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_commands_print_no_control_character_of_a_record(
    name: str, runs: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(runs.parent)
    command, *options = COMMANDS[name]
    main([command, "runs", *options])
    out, err = capsys.readouterr()
    assert FORBIDDEN.search(out + err) is None
    if "--json" in options:
        json.loads(out)
    if name == "report":
        assert FORBIDDEN.search((runs.parent / "r.html").read_text(encoding="utf-8")) is None


def test_a_terminal_gets_no_sequence_but_the_tools_own(runs: Path) -> None:
    master, slave = pty.openpty()
    command = [sys.executable, "-m", "gm_probe", "correlate", str(runs), "--details", "--no-figure"]
    process = subprocess.Popen(
        command, stdout=slave, stderr=slave, stdin=slave, env={**os.environ, "TERM": "xterm"}
    )
    os.close(slave)
    chunks = []
    while True:
        try:
            chunk = os.read(master, 65536)
        except OSError:  # its end is closed
            break
        if not chunk:
            break
        chunks.append(chunk)
    assert process.wait() == 0
    os.close(master)
    printed = re.sub(r"\x1b\[[0-9;]*m", "", b"".join(chunks).decode()).replace("\r\n", "\n")
    assert FORBIDDEN.search(printed) is None
    assert "fisher_trace" in printed


# ---- spreadsheets


@pytest.mark.parametrize("start", FORMULA)
def test_texts_that_a_spreadsheet_would_run_get_an_apostrophe(start: str) -> None:
    assert cell(f"{start}1+1") == f"'{start}1+1"
    assert cell(f" {start}1") == f"' {start}1"
    assert cell(f"\r\n\t{start}1") == rf"\r\n\t{start}1"
    for value in (-1.5, 3, None, True, "a=b", "", "1e-3"):
        assert cell(value) is value


def test_a_collected_table_runs_no_formula_and_its_numbers_stay_numbers(tmp_path: Path) -> None:
    formulas = ["=1+1", "+1", "-1+cmd|' /C calc'!A0", "@SUM(A1)", "\tx", "\rx", '="a,b"']
    for i, text in enumerate(formulas):
        folder = tmp_path / "runs" / f"={i}"
        write_toml(folder / "config.toml", {"model": text, "lr": -0.5, f"={i}": text})
        write_json(folder / "summary.json", {"status": "finished", "error_gap": -0.25 * i})
        write_json(
            folder / "measures.json", {"measures": {"m": {"value": -1e-3}}, "settings": {"data": text}}
        )
    write_table(tmp_path / "runs", tmp_path / "c.csv")
    rows = list(csv.reader(io.StringIO((tmp_path / "c.csv").read_text(encoding="utf-8"), newline="")))
    for text in (text for row in rows for text in row):
        if text.startswith(("=", "+", "-", "@", "\t", "\r")):
            float(text)
    frame = pd.read_csv(tmp_path / "c.csv")
    assert frame["model"].tolist() == [cell(text) for text in formulas]
    assert frame["lr"].tolist() == [-0.5] * len(formulas)
    assert frame["error_gap"].tolist() == [-0.25 * i for i in range(len(formulas))]
