"""Anybody's table of runs: which columns are taken, what is missing, and one line for what cannot be read."""

from __future__ import annotations

import gzip
import json
import os
import time
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy.stats import kendalltau

from gm_probe.analysis.correlation import correlate
from gm_probe.analysis.design import group_rows
from gm_probe.errors import DataError, ProbeError, StorageError, UsageError
from gm_probe.tables.runs import load_table


def make_csv(folder: Path, text: str) -> Path:
    path = folder / "table.csv"
    path.write_text(text, encoding="utf-8")
    return path


def test_csv_takes_known_measures_and_says_so(tmp_path: Path) -> None:
    path = make_csv(tmp_path, "error_gap,fisher_trace,extra,lr\n0.1,1,5,0.1\n0.2,2,6,0.1\n")
    table = load_table(path)
    assert (table.gaps, table.hyperparameters) == (("error_gap",), ("lr",))
    assert table.measures == ("fisher_trace", "extra"), "a column of one's own is not dropped for a known one"
    assert table.notes == ("measures: fisher_trace, extra",)
    assert table.frame["run"].to_list() == ["row 1", "row 2"]


def test_csv_without_a_known_measure_takes_the_numeric_columns(tmp_path: Path) -> None:
    path = make_csv(
        tmp_path, "run,seed,ce_gap,mine,comment,lr,test_error\na,0,1,3,good,.1,.2\nb,1,2,,bad,.1,.3\n"
    )
    table = load_table(path)
    assert table.measures == ("mine",)
    assert table.notes == ("measures: mine; seeds: seed; left out: comment",)
    assert table.left_out == ("comment",)
    assert table.missing["mine"] == {1: "no value"}
    assert table.frame["run"].to_list() == ["a", "b"]


def test_csv_choice_of_columns(tmp_path: Path) -> None:
    path = make_csv(tmp_path, "error_gap,fisher_trace,lr,kind\n1,1,1,x\n2,2,2,y\n")
    assert load_table(path, measures=["lr"]).measures == ("lr",)
    table = load_table(path, hyperparameters=["kind"])
    assert (table.measures, table.hyperparameters) == (("fisher_trace",), ("kind",))
    assert load_table(path, hyperparameters=["fisher_trace"], measures=["lr"]).measures == ("lr",)
    assert load_table(path, group_by=["kind"]).hyperparameters == ("lr", "kind")


def test_numbers_are_what_spreadsheets_write_and_rounded_correctly(tmp_path: Path) -> None:
    cells = ["0.14285714285714285", "1e-5", "-3", "+.5", "8.988465674311579e107", " 2 "]
    path = make_csv(tmp_path, "error_gap,m\n" + "".join(f"{i},{cell}\n" for i, cell in enumerate(cells)))
    assert load_table(path).frame["m"].to_list() == [1 / 7, 1e-5, -3.0, 0.5, 8.988465674311579e107, 2.0]
    for cell in ("1_000", "0x10", "\u0661", "1,5,0", "1e", "True"):
        path = make_csv(tmp_path, f'error_gap,m\n1,1\n2,"{cell}"\n')
        with pytest.raises(DataError, match=r"column 'm' row 2 holds .*, which is not a number"):
            load_table(path, measures=["m"])


def test_csv_hyperparameters_keep_numbers_text_and_gaps(tmp_path: Path) -> None:
    path = make_csv(tmp_path, "error_gap,m,wd,kind,rho\n1,1,0.10,a,inf\n2,2,0.1,,1\n3,3,,b,1\n4,4,10,b,1\n")
    table = load_table(path, hyperparameters=["wd", "kind", "rho"])
    assert table.frame["wd"].to_list() == [0.1, 0.1, None, 10.0]
    assert table.frame["kind"].to_list() == ["a", None, "b", "b"]
    assert table.frame["rho"].to_list() == ["inf", "1", "1", "1"]
    rows = group_rows(table, ["wd"])
    assert {label: list(map(int, of)) for label, of in rows.items()} == {
        "wd=0.1": [0, 1],
        "wd=10": [3],
        "wd=unset": [2],
    }
    assert list(rows) == ["wd=0.1", "wd=10", "wd=unset"]


def test_epochs_of_a_file_are_a_setting_only_when_asked_for(tmp_path: Path) -> None:
    path = make_csv(tmp_path, "error_gap,m,lr,epochs\n.1,1,1,10\n.2,2,1,11\n")
    assert (load_table(path).hyperparameters, load_table(path).measures) == (("lr",), ("m",))
    assert load_table(path, hyperparameters=["lr", "epochs"]).hyperparameters == ("lr", "epochs")


def test_csv_outcomes_are_no_measures(tmp_path: Path) -> None:
    path = make_csv(tmp_path, "error_gap,m,num_test,num_train,test_error\n.1,1,10,20,x\n.2,2,,20,.3\n")
    table = load_table(path, hyperparameters=["num_train"])
    assert (table.measures, table.hyperparameters) == (("m",), ("num_train",))
    assert table.outcomes == ("test_error", "num_test")
    assert table.frame["num_test"].fillna(-1).to_list() == [10, -1]
    assert table.frame["test_error"].fillna(-1).to_list() == [-1, 0.3]
    assert table.notes[1:] == (
        "test_error is not a number in 1 of 2 runs",
        "num_test is not a number in 1 of 2 runs",
    )
    assert load_table(path, measures=["num_test"]).outcomes == ("test_error", "num_train")


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ({"measures": ["fisher_trase"]}, "did you mean 'fisher_trace'"),
        ({"hyperparameters": ["zzz"]}, "available: error_gap, fisher_trace, lr"),
        ({"group_by": ["lrr"]}, "did you mean 'lr'"),
        ({"measures": ["error_gap"]}, "'error_gap' is a gap and cannot be a measure too"),
        ({"measures": ["lr"], "group_by": ["lr"]}, "'lr' is a measure and cannot be a hyperparameter too"),
    ],
)
def test_unknown_or_doubled_columns_are_usage_errors(
    tmp_path: Path, choice: dict[str, list[str]], message: str
) -> None:
    path = make_csv(tmp_path, "error_gap,fisher_trace,lr\n1,2,3\n4,5,6\n")
    with pytest.raises(UsageError, match=message):
        load_table(path, **choice)


def test_sources_that_are_neither(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="does not exist"):
        load_table(tmp_path / "nowhere")
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(UsageError, match=r"neither a folder of runs .* nor a \.csv, \.tsv, "):
        load_table(tmp_path / "notes.txt")
    with pytest.raises(UsageError, match="holds no run"):
        load_table(tmp_path)


def test_parquet_reads_like_csv_or_names_the_extra(tmp_path: Path) -> None:
    path = tmp_path / "table.parquet"
    frame = pd.DataFrame({"error_gap": [0.1, 0.2], "fisher_trace": [1, 2], "flag": [True, False]})
    try:
        frame.to_parquet(path)
    except ImportError:
        path.write_bytes(b"PAR1")
        with pytest.raises(UsageError, match=r"pip install 'gm_probe\[parquet\]'"):
            load_table(path)
    else:
        table = load_table(path, hyperparameters=["flag"])
        assert table.measures == ("fisher_trace",)
        assert table.frame["fisher_trace"].to_list() == [1.0, 2.0]


def test_a_data_frame_is_a_table() -> None:
    frame = pd.DataFrame({"error_gap": [0.1, np.nan], "m": [1, 2], "flag": [True, False], "wd": [0, 1]})
    table = load_table(frame, hyperparameters=["wd"])
    assert table.measures == ("m",)
    assert table.missing["error_gap"] == {1: "no value"}
    assert table.frame["wd"].to_list() == [0.0, 1.0]


def test_a_gap_that_is_not_there_is_taken_from_the_two_errors(tmp_path: Path) -> None:
    rows = "".join(f"{0.01 * (i % 2)},{0.01 * (i % 2) + 0.1 * (i // 2)},{i}\n" for i in range(6))
    table = load_table(make_csv(tmp_path, "train_error,Test_Error,m\n" + rows))
    assert table.frame["error_gap"].to_list() == [0.0, 0.0, 0.1, 0.1, 0.2, 0.2], "ties stay ties"
    assert "error_gap is test_error − train_error" in table.notes
    table = load_table(make_csv(tmp_path, "train_acc,test_acc,m\n99%,90%,1\n98%,80%,2\n"))
    assert table.frame["error_gap"].to_list() == [0.09, 0.18]
    with pytest.raises(DataError, match="'test_error' row 1 holds 'x'"):
        load_table(make_csv(tmp_path, "train_error,test_error,m\n0.1,x,1\n0.1,0.2,2\n"))


def test_columns_may_be_asked_for_as_the_file_calls_them(tmp_path: Path) -> None:
    path = make_csv(tmp_path, "metrics.error_gap,metrics.a,params.LR,params.x\n1,1,1,7\n2,2,1,8\n")
    table = load_table(path, measures=["metrics.a"], hyperparameters=["params.LR"], group_by=["x"])
    assert (table.measures, table.hyperparameters) == (("a",), ("lr", "x"))
    assert table.named(["params.LR", "metrics.a", "lr"]) == ["lr", "a", "lr"]


# ---- tables that are no tables of runs


def test_thousands_of_columns_are_refused_at_once_unless_some_are_chosen(tmp_path: Path) -> None:
    names = [f"c{number}" for number in range(3000)]
    rows = [",".join(str((7 * row + number) % 11) for number in range(3001)) for row in range(12)]
    path = make_csv(tmp_path, "\n".join([",".join(["error_gap", *names]), *rows]))
    began = time.process_time()
    with pytest.raises(DataError, match=r"more than 100 columns to use as measures.*--measures"):
        load_table(path)
    assert load_table(path, measures=["c1", "c2"]).measures == ("c1", "c2")
    assert time.process_time() - began < 20


@pytest.mark.parametrize(
    ("header", "rows"), [(4001, 5000), (6000, 1), (2, 6_000_000)], ids=["padded", "wide", "long"]
)
def test_a_csv_of_too_many_cells_is_refused_before_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, header: int, rows: int
) -> None:
    monkeypatch.setattr(pd, "read_csv", lambda *_, **__: pytest.fail("read"))
    path = make_csv(tmp_path, ",".join(f"c{i}" for i in range(header)) + "\n" + "1\n" * rows)
    with pytest.raises(DataError, match="keep one row per run"):
        load_table(path)


def test_a_csv_beyond_all_bounds_is_refused_by_its_size(tmp_path: Path) -> None:
    path = tmp_path / "holes.csv"
    with path.open("wb") as file:
        file.truncate(2**40)  # a file of holes, which takes no room on the disk
    tracemalloc.start()
    with pytest.raises(DataError, match="more than 1,073,741,824 bytes"):
        load_table(path)
    assert tracemalloc.get_traced_memory()[1] < 2**20
    tracemalloc.stop()


def test_parquet_bombs_are_refused(tmp_path: Path) -> None:
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    zeros = np.zeros(6_000_000, np.int8)
    some = {"error_gap": [0.1, 0.2], "m": [1.0, 2.0]}
    long = arrow.DictionaryArray.from_arrays(arrow.array([0, 0], arrow.int32()), arrow.array(["a" * 20_000]))
    bombs = {
        "rows": ({"error_gap": zeros, "m": zeros}, "keep one row per run"),
        "a list in a cell": ({**some, "x": [zeros, zeros]}, "keep one row per run"),
        "a text in many rows": ({**some, "x": long}, "a cell of 20,000 characters"),
        "columns": ({f"c{i}": [1] for i in range(5001)}, "5,001 columns"),
    }
    for name, (columns, message) in bombs.items():
        path = tmp_path / f"{name}.parquet"
        parquet.write_table(arrow.table(columns), path)
        with pytest.raises(DataError, match=message):
            load_table(path)


def test_parquet_texts_are_what_they_are_in_csv(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    frame = pd.DataFrame({"error_gap": [0.1, 0.2, 0.3], "m": [1, 2, 3], "optimizer": ["sgd", None, "adam"]})
    frame.to_parquet(tmp_path / "t.parquet")
    frame.to_csv(tmp_path / "t.csv", index=False)
    one, other = (load_table(tmp_path / f"t{suffix}") for suffix in (".parquet", ".csv"))
    pd.testing.assert_frame_equal(one.frame, other.frame)


# ---- one table, however it is written

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
    "Excel's Unicode text": (
        ".csv", text("\t", error_gap=comma(GAP), sharpness=comma(SHARP)).encode("utf-16"), ALL, "as UTF-16",
    ),
    "the names of MLflow": (
        ".csv",
        text(renamed={"name": "tags.mlflow.runName", "lr": "params.lr", "wd": "params.wd", "seed": "params.seed",
                      "error_gap": "metrics.error_gap", "sharpness": "metrics.sharpness"}).encode(),
        ALL,
        "measures: sharpness; hyperparameters: lr, wd; seeds: seed",
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
        "values were read as percentages, because some are above 1: test_accuracy, train_accuracy",
    ),
    "a row for each measure": (".csv", LONG.encode(), ALL, "the 24 rows were read as 12 runs, with a column for each"),
    "percent in the header": (
        ".csv", text(renamed={"error_gap": "Error gap (%)"}, error_gap=[100 * g for g in GAP]).encode(), ALL, "",
    ),
    "a nested seed": (".csv", text(renamed={"seed": "params.train.seed"}).encode(), ALL, "seeds: seed"),
    "pandas' mean below": (
        ".csv",
        ("," + text().replace("\nrun", "\n0,run") + "mean,,0.5,0.1,1,0.9,99\n").encode(),
        ALL,
        "",
    ),
    "outcomes of other names": (
        ".csv",
        text(acc=GAP, **{"best val/acc@1": GAP, "test_top5": GAP, "gen_gap": GAP, "loss (nats)": GAP}).encode(),
        ALL,
        "left out: acc, best val/acc@1",
    ),
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


def test_words_for_means_may_be_settings(tmp_path: Path) -> None:
    for cells in (["mean", "max", "mean", "max"], ["32", "max", "64", "max"]):
        rows = "".join(f"{cell},{i},{i}\n" for i, cell in enumerate(cells))
        (tmp_path / "t.csv").write_text("pooling,error_gap,m\n" + rows)
        assert load_table(tmp_path / "t.csv", hyperparameters=["pooling"]).num_runs == 4
    (tmp_path / "t.csv").write_text("lr,error_gap,m\n0.1,1,1\n0.2,2,2\nAverage,1.5,1.5\nStd Dev,0.5,0.5\n")
    table = load_table(tmp_path / "t.csv")
    assert (table.num_runs, len(table.excluded)) == (2, 2)


def test_a_header_in_percent_is_one_even_below_1(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("train_err (%),test_err (%),m\n0.1,0.5,1\n0.2,0.9,2\n")
    assert load_table(tmp_path / "t.csv").frame["error_gap"].tolist() == pytest.approx([0.004, 0.007])


def test_a_gap_alone_may_be_in_percent(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("error_gap,m\n12,1\n-3,2\n")
    assert load_table(tmp_path / "t.csv").frame["error_gap"].tolist() == [0.12, -0.03]


def test_an_index_that_is_no_row_number_is_read() -> None:
    frame = pd.DataFrame({"lr": [0.1, 0.1, 0.2], "seed": [0, 1, 0], "name": ["a", "b", "c"], "m": [1, 2, 3],
                          "error_gap": [0.1, 0.3, 0.2]})  # fmt: skip
    expected = load_table(frame)
    for index in (["lr", "seed"], ["name"], ["lr", "seed", "name"]):
        pd.testing.assert_frame_equal(
            load_table(frame.set_index(index)).frame, expected.frame, check_like=True
        )
    assert load_table(frame[frame["m"] > 1]).measures == ("m",), "row numbers with holes"


def test_numbers_beside_words_are_the_same_setting_however_written(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("lr,error_gap,m\n1e-3,1,1\n0.001,2,2\nauto,3,3\n0.0010,4,5\n")
    lr = load_table(tmp_path / "t.csv").frame["lr"]
    assert lr[0] == lr[1] == lr[3] != lr[2]


def test_numbers_of_json_have_no_thousands_beside_decimal_commas(tmp_path: Path) -> None:
    (tmp_path / "t.jsonl").write_text(
        '{"error_gap": 1.234, "m": 1.5, "t": "0,5"}\n{"error_gap": 12, "m": 2, "t": "0,7"}\n'
    )
    frame = load_table(tmp_path / "t.jsonl", measures=["m", "t"]).frame
    assert frame["error_gap"].tolist() == pytest.approx([0.01234, 0.12])
    assert frame["t"].tolist() == [0.5, 0.7]


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
    "a gap in percent beside an error": (
        "t.csv", b"error_gap,test_error,m\n12,0.2,1\n15,0.3,2\n", {}, DataError, "up to 15.*up to 0.3.*in one unit",
    ),
    "a gap with the sign turned": (
        "t.csv", b"error_gap,test_acc,train_acc,m\n-0.1,0.8,0.9,1\n-0.2,0.7,0.9,2\n", {}, DataError,
        "'error_gap' is -1 times test_error − train_error",
    ),
    "a gap of losses in another unit": (
        "t.csv", b"ce_gap,test_loss,train_loss,m\n10,0.8,0.7,1\n20,0.7,0.5,2\n", {}, DataError, "is 100 times test",
    ),
    "rows of measures without a run": (
        "t.csv", b"measure,value\na,1\nb,2\na,3\nb,4\n", {}, DataError, "and does not tell which rows",
    ),
    "a measure of a run twice": (
        "t.csv", b"run,error_gap,measure,value\nr,1,a,1\nr,1,a,2\n", {}, DataError, "and does not tell which rows",
    ),
    "a bare carriage of quotes": ("t.csv", b'error_gap,m\n"0.1,2\n', {}, DataError, "not a readable CSV"),
    "blank lines only": ("t.csv", b"\n\n", {}, DataError, "is empty"),
    "colons": ("t.csv", b"error_gap:m\n1:2\n", {}, DataError, "It has: error_gap:m"),
    "a formula": ("t.csv", b"error_gap,m\n=1+1,2\n3,4\n", {}, DataError, "'error_gap' row 1 holds '=1\\+1'"),
    "text for a known measure": ("t.csv", b"error_gap,fisher_trace\n1,high\n", {}, DataError, "row 1 holds 'high'"),
    "a decimal comma beside a point": ("t.csv", b'error_gap,m\n"0,5",1\n0.2,3\n', {}, DataError, "holds '0,5'"),
    "an escape sequence in a name": ("t.csv", b"error_gap,m\x1b[31m\n1,2\n", {}, DataError, r"m\\x1b\[31m', with unpr"),
    "a longer row": ("t.csv", b"error_gap,m\n1,2\n3,4,5\n", {}, DataError, "not a readable CSV"),
    "a torn object": ("t.jsonl", b'{"error_gap": 1, "m": 2}\n{"err', {}, DataError, "line 2 is not valid JSON"),
    "not Parquet": ("t.parquet", b"PAR1PAR1", {}, DataError, "not a readable Parquet file"),
    "not SQLite": ("t.db", b"hello", {}, DataError, "not a readable MLflow database"),
}  # fmt: skip


@pytest.mark.parametrize(("name", "content", "asked", "error", "message"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_read_is_one_line(
    tmp_path: Path, name: str, content: bytes, asked: dict[str, Any], error: type[ProbeError], message: str
) -> None:
    if name.endswith(".parquet"):
        pytest.importorskip("pyarrow", reason="pyarrow is an extra")
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(error, match=message) as caught:
        load_table(path, **asked)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
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


def test_a_seed_column_of_another_name(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text(text(trial=[7 + i // 4 for i in range(12)]))
    table = load_table(tmp_path / "t.csv", seed_column="trial")
    assert table.frame["seed"].tolist() == [7.0] * 4 + [8.0] * 4 + [9.0] * 4
    assert table.measures == ("sharpness",)
