"""Tables as people have them: each gives the right τ, or one line that says what to do."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.stats import kendalltau

from gm_probe.analysis.correlation import correlate
from gm_probe.errors import DataError, ProbeError, StorageError, UsageError
from gm_probe.tables.runs import load_table

rng = np.random.default_rng(3)
GAP = rng.uniform(0.01, 0.3, 12).round(4).tolist()
SHARP = (10 * np.array(GAP) + rng.normal(0, 0.6, 12)).round(3).tolist()
TAU = kendalltau(SHARP, GAP).statistic
ROWS = [
    {"name": f"run-{i}", "lr": [0.01, 0.1][i // 3 % 2], "wd": [0.0, 0.0005][i // 6], "seed": i % 3,
     "error_gap": GAP[i], "sharpness": SHARP[i]}
    for i in range(12)
]  # fmt: skip


def text(
    separator: str = ",", end: str = "\n", renamed: dict[str, str] | None = None, **more: list[Any]
) -> str:
    """The twelve runs, with ``more`` columns, some of them ``renamed``; a column of another's name replaces it."""
    rows = [{**row, **{name: cells[i] for name, cells in more.items()}} for i, row in enumerate(ROWS)]
    header = [(renamed or {}).get(name, name) for name in rows[0]]
    return (
        end.join(separator.join(map(str, line)) for line in [header, *(row.values() for row in rows)]) + end
    )


def comma(cells: list[float]) -> list[str]:
    return [str(cell).replace(".", ",") for cell in cells]


STATUS = ["crashed" if i % 4 == 0 else "finished" for i in range(12)]
DONE = [i for i in range(12) if i % 4]
ALL = list(range(12))

COLUMNS = {name: [row[name] for row in ROWS] for name in ROWS[0]}
LONG = "name,lr,seed,error_gap,metric,value\n" + "".join(
    f"{row['name']},{row['lr']},{row['seed']},{row['error_gap']},{metric},{value}\n"
    for row in ROWS
    for metric, value in (("sharpness", row["sharpness"]), ("wd", row["wd"]))
)

READ: dict[str, tuple[str, bytes, list[int], str]] = {
    # name: (suffix, content, rows that enter, a note that tells)
    "as it is": (".csv", text().encode(), ALL, "measures: sharpness; hyperparameters: lr, wd; seeds: seed"),
    "Windows line ends": (".csv", text(end="\r\n").encode(), ALL, ""),
    "old Macintosh line ends": (".csv", text(end="\r").encode(), ALL, ""),
    "no last line end": (".csv", text().strip().encode(), ALL, ""),
    "blank lines": (".csv", text(end="\n\n").encode(), ALL, ""),
    "trailing separators": (".csv", text(end=",,\n").encode(), ALL, ""),
    "a byte order mark": (".csv", text().encode("utf-8-sig"), ALL, ""),
    "tabs in a .csv": (".csv", text("\t").encode(), ALL, "separated by tabs"),
    "tabs": (".tsv", text("\t").encode(), ALL, "separated by tabs"),
    "bars": (".csv", text("|").encode(), ALL, "separated by bars"),
    "spaces after commas": (".csv", text(", ").encode(), ALL, ""),
    "UTF-16": (".csv", text("\t").encode("utf-16"), ALL, "as UTF-16"),
    "UTF-32": (".csv", text().encode("utf-32"), ALL, "as UTF-32"),
    "Windows-1252": (".csv", text(größe=["ä"] * 12).encode("cp1252"), ALL, "as Windows-1252"),
    "German Excel": (
        ".csv",
        text(";", "\r\n", error_gap=comma(GAP), sharpness=comma(SHARP)).encode("utf-8-sig"),
        ALL,
        "with decimal commas in error_gap, sharpness",
    ),
    "a sep= line": (".csv", b"sep=;\r\n" + text(";").encode(), ALL, ""),
    "thousands": (".csv", text(sharpness=[f'"{1e6 * s:,.0f}"' for s in SHARP]).encode(), ALL, ""),
    "Swiss thousands": (".csv", text(sharpness=[f"{1e6 * s:,.0f}".replace(",", "'") for s in SHARP]).encode(), ALL, ""),
    "percent": (".csv", text(error_gap=[f"{100 * gap:.2f} %" for gap in GAP]).encode(), ALL, ""),
    "powers of ten": (".csv", text(sharpness=[f"{s:.6E}" for s in SHARP]).encode(), ALL, ""),
    "saved twice by pandas": (".csv", text(**{"Unnamed: 0": ALL}).encode(), ALL, "left out: Unnamed: 0"),
    "capital letters": (".csv", text(renamed={"lr": "LR", "seed": "Seed"}).encode(), ALL, "seeds: seed"),
    "crashed runs": (".csv", text(State=STATUS).encode(), DONE, ""),
    "statuses of MLflow": (".csv", text(status=[s.upper() for s in STATUS]).encode(), DONE, ""),
    "two errors": (
        ".csv",
        text(renamed={"error_gap": "Test Err"}, train_err=[0] * 12).encode(),
        ALL,
        "error_gap is test_error − train_error",
    ),
    "two accuracies of a validation": (
        ".csv",
        text(renamed={"error_gap": "val/acc"}, error_gap=[0.9 - gap for gap in GAP], train_acc=[0.9] * 12).encode(),
        ALL,
        "error_gap is train_accuracy − val_accuracy",
    ),
    "two losses": (
        ".csv",
        text(renamed={"error_gap": "val_loss"}, train_loss=[0] * 12).encode(),
        ALL,
        "gap: val_loss - train_loss",
    ),
    "two accuracies in percent": (
        ".csv",
        text(renamed={"error_gap": "test acc"}, error_gap=[90 - 100 * g for g in GAP], train_acc=[90] * 12).encode(),
        ALL,
        "taken as percentages, because some are above 1: test_accuracy, train_accuracy",
    ),
    "a row for each measure": (".csv", LONG.encode(), ALL, "the 24 rows were read as 12 runs, with a column for each"),
    "lists of cells": (".json", json.dumps(COLUMNS).encode(), ALL, ""),
    "rows by their numbers": (
        ".json", json.dumps({name: dict(enumerate(cells)) for name, cells in COLUMNS.items()}).encode(), ALL, "",
    ),
    "a list of objects": (".json", json.dumps(ROWS).encode(), ALL, ""),
    "JSON lines": (".jsonl", "\n".join(map(json.dumps, ROWS)).encode(), ALL, ""),
    "summary rows below": (
        ".csv",
        (text() + "Mean,,,,0.9,99\nStandard deviation,,,,0.8,-9\nMin,,,,0.7,-99\n").encode(),
        ALL,
        "",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("suffix", "content", "rows", "note"), READ.values(), ids=READ)
def test_the_same_runs_have_the_same_tau(
    tmp_path: Path, suffix: str, content: bytes, rows: list[int], note: str
) -> None:
    path = tmp_path / f"t{suffix}"
    path.write_bytes(content)
    table = load_table(path)
    sharp = [SHARP[i] for i in rows]
    expected = kendalltau(sharp, [GAP[i] for i in rows]).statistic
    assert table.measures == ("sharpness",)
    assert correlate(table, details=False).get("sharpness", table.gaps[0]).value == pytest.approx(expected)
    assert table.frame["run"].tolist() == [f"run-{i}" for i in rows]
    assert any(note in each for each in table.notes)
    assert not any("\n" in each for each in table.notes)


@pytest.mark.parametrize(
    ("train", "test", "error", "gap"),
    [
        ([0.1, 0.5], [20, 30], [0.2, 0.3], [0.199, 0.295]),  # in percent, as the test error shows
        ([0.1, 0.5], [0.2, 0.7], [0.2, 0.7], [0.1, 0.2]),
        (["10%", "50%"], ["20%", "70%"], [0.2, 0.7], [0.1, 0.2]),
        (["10%", "50%"], [20, 70], [0.2, 0.7], [0.1, 0.2]),
        ([1, 2], [200, 300], [200, 300], [199, 298]),  # another kind of error
    ],
)
def test_error_rates_are_fractions_of_examples(
    tmp_path: Path, train: list[Any], test: list[Any], error: list[float], gap: list[float]
) -> None:
    rows = zip(train, test, strict=True)
    (tmp_path / "t.csv").write_text(
        "train_err,test_err,m\n" + "".join(f"{one},{two},{i}\n" for i, (one, two) in enumerate(rows))
    )
    frame = load_table(tmp_path / "t.csv").frame
    assert frame["test_error"].tolist() == pytest.approx(error)
    assert frame["error_gap"].tolist() == pytest.approx(gap)


def test_picks_cost_test_error_where_the_table_has_accuracies(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("train_acc,test_acc,m\n99,81,1\n100,84,2\n98,86,3\n97,80,4\n96,90,5\n")
    table = load_table(tmp_path / "t.csv")
    assert table.frame["test_error"].tolist() == pytest.approx([0.19, 0.16, 0.14, 0.2, 0.1])
    assert correlate(table, details=False).get(
        "m", "test_error", "regret", "smallest"
    ).value == pytest.approx(0.09)


def test_minus_signs_of_their_own(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("error_gap,m\n0.1,−2.5\n0.2,-1\n0.3,−3e−2\n", encoding="utf-8")
    assert load_table(tmp_path / "t.csv").frame["m"].tolist() == [-2.5, -1.0, -0.03]


def test_rows_that_sum_up_others_are_named(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text(text() + "Mean,,,,0.9,99\nStd Dev,,,,0.8,-9\n")
    assert [(gone.run, gone.reason) for gone in load_table(tmp_path / "t.csv").excluded] == [
        ("Mean", "sums up other rows"),
        ("Std Dev", "sums up other rows"),
    ]


REFUSED: dict[str, tuple[str, bytes, dict[str, Any], type[ProbeError], str]] = {
    # name: (file, content, what is asked, the error, its message)
    "nothing": ("t.csv", b"", {}, DataError, "is empty"),
    "a header alone": ("t.csv", b"error_gap,m\n", {}, DataError, "no run below it"),
    "an archive": ("t.csv", gzip.compress(text().encode()), {}, DataError, "not a readable CSV"),
    "a photograph": ("t.csv", b"\x89PNG\r\n\x1a\n\0\0\0", {}, DataError, "not a readable CSV"),
    "a compressed table": ("t.csv.gz", gzip.compress(text().encode()), {}, UsageError, "neither a folder of runs"),
    "a workbook": ("t.xlsx", b"PK", {}, UsageError, "neither a folder of runs"),
    "HTML": ("t.csv", b"<html><body>Sign in</body></html>", {}, DataError, "has a header but no run"),
    "a column twice": ("t.csv", b"error_gap,m,m\n1,2,3\n", {}, DataError, "'m' more than once"),
    "two columns without a name": ("t.csv", b"error_gap,,\n1,2,3\n", {}, DataError, "'' more than once"),
    "units": ("t.csv", b"error_gap,m\n0.1,12 s\n0.2,9 s\n", {}, DataError, "no numeric column to use as a measure"),
    "a unit in a column that was asked for": (
        "t.csv", b"error_gap,m\n0.1,12 s\n", {"measures": ["m"]}, DataError, "row 1 holds '12 s', which is no",
    ),
    "a value with its error": ("t.csv", "error_gap,m\n0.1±0.02,1\n".encode(), {}, DataError, "'0.1±0.02'"),
    "a gap in words": ("t.csv", b"error_gap,m\nlow,1\n", {}, DataError, "'error_gap' row 1 holds 'low'"),
    "no gap": ("t.csv", b"acc,m\n0.9,1\n", {}, DataError, "--gap 'A - B' makes one. It has: acc, m"),
    "a wrong gap": ("t.csv", b"val_err,m\n1,2\n", {"gap": "val_er"}, UsageError, "did you mean 'val_err'"),
    "a gap that is no arithmetic": ("t.csv", b"a,m\n1,2\n", {"gap": "a ** 2"}, UsageError, "no arithmetic on columns"),
    "a gap of words": ("t.csv", b"a,m\nx,2\n", {"gap": "a"}, DataError, "column 'a' row 1 holds 'x'"),
    "a gap among the measures": (
        "t.csv", b"a,m\n1,2\n", {"gap": "a", "measures": ["a"]}, UsageError, "'a' is a gap and cannot be a measure",
    ),
    "a wrong seed column": ("t.csv", text().encode(), {"seed_column": "sed"}, UsageError, "did you mean 'seed'"),
    "a seed for a setting": (
        "t.csv", text(trial=ALL).encode(), {"seed_column": "trial", "hyperparameters": ["seed"]}, UsageError, "--seed-",
    ),
    "no run that finished": ("t.csv", b"error_gap,m,state\n1,2,failed\n", {}, DataError, "no run .* usable: failed"),
    "commas in every number": ("t.csv", b'error_gap,m\n"1,234",1\n', {}, DataError, "comma may mark decimals"),
    "percent beside a fraction": (
        "t.csv", b"train_acc,test_acc,m\n0.99,81,1\n0.98,82,2\n", {}, DataError, "up to 82.*up to 0.99.*in one unit",
    ),
    "rows of measures without a run": (
        "t.csv", b"measure,value\na,1\nb,2\na,3\nb,4\n", {}, DataError, "and does not tell which rows",
    ),
    "a measure of a run twice": (
        "t.csv", b"run,error_gap,measure,value\nr,1,a,1\nr,1,a,2\n", {}, DataError, "and does not tell which rows",
    ),
    "a bare carriage of quotes": ("t.csv", b'error_gap,m\n"0.1,2\n', {}, DataError, "not a readable CSV"),
    "a torn object": ("t.jsonl", b'{"error_gap": 1, "m": 2}\n{"err', {}, DataError, "line 2 is not valid JSON"),
    "not Parquet": ("t.parquet", b"PAR1PAR1", {}, DataError, "not a readable Parquet file"),
    "not SQLite": ("t.db", b"hello", {}, DataError, "not a readable MLflow database"),
}  # fmt: skip


@pytest.mark.parametrize(("name", "content", "asked", "error", "message"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_read_is_one_line(
    tmp_path: Path, name: str, content: bytes, asked: dict[str, Any], error: type[ProbeError], message: str
) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(error, match=message) as caught:
        load_table(path, **asked)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    import os

    os.mkfifo(tmp_path / "t.csv")
    with pytest.raises(StorageError, match="not a regular file"):
        load_table(tmp_path / "t.csv")


# ---- what is dropped is told


def test_a_column_that_is_left_out_for_a_few_cells_is_told(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("error_gap,m,k,note\n1,1,5,x\n2,2,12 s,y\n3,3,7,z\n4,4,8,w\n")
    table = load_table(tmp_path / "t.csv")
    assert table.measures == ("m",)
    assert table.left_out == ("k", "note")
    assert (
        "left out because some cells are no numbers: k (1 such cells, the first '12 s' in row 2)"
        in table.notes
    )


def test_values_that_are_none_are_counted_with_their_reason(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("error_gap,m\n1,1\n2,inf\nnan,3\n4,-\n5,1e400\n6,1e200\n7,NULL\n8,2\n")
    table = load_table(tmp_path / "t.csv")
    assert table.missing["m"] == {
        1: "not finite", 3: "no value", 4: "not finite", 5: "beyond 1e150 in size", 6: "no value",
    }  # fmt: skip
    assert table.missing["error_gap"] == {2: "no value"}


def test_ones_own_measures_stay_beside_a_known_one(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("error_gap,mine,fisher_trace,theirs,val_loss\n1,1,2,3,4\n2,2,3,1,5\n")
    assert load_table(tmp_path / "t.csv").measures == ("fisher_trace", "mine", "theirs")


def test_a_seed_column_of_another_name(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text(text(trial=[7 + i // 4 for i in range(12)]))
    table = load_table(tmp_path / "t.csv", seed_column="trial")
    assert table.frame["seed"].tolist() == [7.0] * 4 + [8.0] * 4 + [9.0] * 4
    assert table.measures == ("sharpness",)
