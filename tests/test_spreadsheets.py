"""Anybody's CSV or Parquet as a run table: which columns are taken, what is missing, what is refused."""

import time
import tracemalloc
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy.stats import kendalltau

from gm_probe.analysis.correlation import correlate
from gm_probe.analysis.design import group_rows
from gm_probe.errors import DataError, UsageError
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


def test_csv_values_that_are_not_finite_are_missing(tmp_path: Path) -> None:
    path = make_csv(tmp_path, "error_gap,m\n1,inf\nnan,2\n-inf,1e999\n3,NA\n4,4\n5, 5 \n")
    table = load_table(path)
    assert table.missing["m"] == {0: "not finite", 2: "not finite", 3: "no value"}
    assert table.missing["error_gap"] == {1: "no value", 2: "not finite"}
    result = correlate(table).get(table.measures[0], "error_gap")
    assert (result.value, result.n) == (pytest.approx(1.0), 2)


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
    ("text", "message"),
    [
        ("", "is empty"),
        ("\n\n", "is empty"),
        ("error_gap,m\n", "no run below"),
        ("gap,m\n1,2\n", "no column error_gap .* It has: gap, m"),
        ("error_gap:m\n1:2\n", "It has: error_gap:m"),
        ("error_gap,m,m\n1,2,3\n", "'m' more than once"),
        ("error_gap,fisher_trace\n1,2\n3,high\n", "'fisher_trace' row 2 holds 'high', which is not a number"),
        ("error_gap,m\n=1+1,2\n3,4\n", "'error_gap' row 1 holds '=1\\+1'"),
        ("error_gap,kind\n1,a\n2,b\n", "no numeric column"),
        ("error_gap,m\x1b[31m\n1,2\n", r"m\\x1b\[31m', with unprintable characters"),
        ("error_gap,m\n1,2\n3,4,5\n", "not a readable CSV"),
    ],
)
def test_broken_csv_is_one_data_error(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        load_table(make_csv(tmp_path, text))
    assert "\n" not in str(caught.value)


def test_csv_that_is_no_text(tmp_path: Path) -> None:
    path = tmp_path / "photo.csv"
    path.write_bytes(b"\x89PNG\xff\xfe\x00,\n")
    with pytest.raises(DataError, match="not a readable CSV"):
        load_table(path)


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


def test_unreadable_parquet(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    (tmp_path / "t.parquet").write_bytes(b"PAR1")
    with pytest.raises(DataError, match="is not a readable Parquet file"):
        load_table(tmp_path / "t.parquet")


# ---- one table, as trackers and spreadsheets write it

RUNS = [
    {"name": f"run-{i}", "wd": wd, "lr": lr, "seed": seed, "error_gap": gap, "sharpness": 3 * gap + noise}
    for i, (wd, lr, seed, gap, noise) in enumerate(
        zip(
            *([0.0, 0.0005] * 6, [0.01, 0.01, 0.1, 0.1] * 3, [0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2]),
            np.random.default_rng(0).uniform(0.01, 0.3, 12).round(4).tolist(),
            np.random.default_rng(1).normal(0, 0.3, 12).round(3).tolist(),
            strict=True,
        )
    )
]
NAMES = list(RUNS[0])


def lines(names: Sequence[str] = NAMES, separator: str = ",", show: Callable[[Any], str] = str) -> str:
    rows = [names, *([show(row[name]) for name in NAMES] for row in RUNS)]
    return "\n".join(separator.join(row) for row in rows) + "\n"


def german(value: Any) -> str:
    return str(value).replace(".", ",") if isinstance(value, float) else str(value)


WRITTEN = {
    "plain": lines().encode(),
    "semicolons and decimal commas": lines(separator=";", show=german).encode("utf-8-sig"),
    "Excel's Unicode text": lines(separator="\t", show=german).encode("utf-16"),
    "a sep= line": b"sep=;\r\n" + lines(separator=";").encode(),
    "capitals": lines(["Name", "WD", "LR", "Seed", "Error_Gap", "sharpness"]).encode(),
    "MLflow": lines(
        [
            "tags.mlflow.runName",
            "params.wd",
            "params.lr",
            "params.seed",
            "metrics.error_gap",
            "metrics.sharpness",
        ]
    ).encode(),
    "percent": lines(
        show=lambda v: (
            f"{100 * v!r}%" if isinstance(v, float) and v in {r["error_gap"] for r in RUNS} else str(v)
        )
    ).encode(),
}


@pytest.mark.parametrize("data", WRITTEN.values(), ids=WRITTEN.keys())
def test_a_table_means_the_same_however_it_is_written(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "t.csv"
    path.write_bytes(data)
    table = load_table(path)
    assert (table.gaps, table.measures) == (("error_gap",), ("sharpness",))
    assert sorted(table.hyperparameters) == ["lr", "wd"]
    assert table.frame["run"].to_list() == [row["name"] for row in RUNS]
    assert table.frame["error_gap"].to_list() == pytest.approx([row["error_gap"] for row in RUNS], rel=1e-14)
    assert table.frame["sharpness"].to_list() == [row["sharpness"] for row in RUNS]
    assert table.frame["seed"].to_list() == [row["seed"] for row in RUNS]
    expected = kendalltau([row["sharpness"] for row in RUNS], [row["error_gap"] for row in RUNS]).statistic
    assert correlate(table).get(table.measures[0], "error_gap").value == pytest.approx(expected)


@pytest.mark.parametrize(
    ("column", "bad", "good"),
    [
        ("State", ("crashed", "failed", "killed"), "finished"),
        ("status", ("FAILED", "KILLED", "RUNNING"), "FINISHED"),
        ("tags.status", ("Preempting", "SCHEDULED", "pending"), "Finished"),
    ],
)
def test_runs_that_did_not_finish_are_left_out_and_named(
    tmp_path: Path, column: str, bad: tuple[str, ...], good: str
) -> None:
    header = ",".join(["Name", column, "_step", "_runtime", "error_gap", "sharpness"])
    rows = [
        f"{row['name']},{bad[i % 3] if i % 4 == 0 else good},{i},{i}.5,{row['error_gap']},{row['sharpness']}"
        for i, row in enumerate(RUNS)
    ]
    table = load_table(make_csv(tmp_path, "\n".join([header, *rows, ""])))
    assert table.measures == ("sharpness",)
    assert [(gone.run, gone.reason) for gone in table.excluded] == [
        (f"run-{i}", bad[i % 3]) for i in range(0, 12, 4)
    ]
    assert table.frame["run"].to_list() == [f"run-{i}" for i in range(12) if i % 4]


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
    began = time.perf_counter()
    with pytest.raises(DataError, match=r"more than 100 columns to use as measures.*--measures"):
        load_table(path)
    assert load_table(path, measures=["c1", "c2"]).measures == ("c1", "c2")
    assert time.perf_counter() - began < 20


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
