"""Runs as trackers leave them on disk: the right rows, nothing run, nothing written, one line where it is broken."""

from __future__ import annotations

import json
import math
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest
import yaml
from scipy.stats import kendalltau

from gm_probe.analysis.correlation import correlate
from gm_probe.errors import DataError, StorageError, UsageError
from gm_probe.tables.runs import load_table
from gm_probe.tables.sources import beside
from gm_probe.tables.table import RunTable
from gm_probe.tables.trackers import MOST_WORK, read_yaml

GAPS = [0.11, 0.05, 0.31, 0.27, 0.16, 0.22]
SHARP = [3.0, 1.0, 9.0, 6.0, 7.0, 2.0]
RATES = ["0.1", "0.1", "0.01", "0.01", "0.001", "0.001"]


def check(table: RunTable) -> None:
    """Six runs of three learning rates and two seeds; the failed one is named."""
    assert table.gaps == ("error_gap",)
    assert table.measures == ("sharpness",)
    assert table.hyperparameters == ("lr", "opt/name")
    assert table.frame["error_gap"].tolist() == GAPS
    assert table.frame["sharpness"].tolist() == SHARP
    assert table.frame["lr"].tolist() == [float(rate) for rate in RATES]
    assert table.frame["seed"].tolist() == [0, 1] * 3
    assert [(gone.run, gone.reason) for gone in table.excluded] == [("run-6", "FAILED"), ("run-7", "deleted")]
    assert correlate(table).get(table.measures[0], "error_gap").value == pytest.approx(
        kendalltau(SHARP, GAPS).statistic
    )


# ---- MLflow

TABLES = """
CREATE TABLE experiments (experiment_id INTEGER, name TEXT);
CREATE TABLE runs (run_uuid TEXT, name TEXT, status TEXT, lifecycle_stage TEXT, experiment_id INTEGER);
CREATE TABLE params (key TEXT, value TEXT, run_uuid TEXT);
CREATE TABLE tags (key TEXT, value TEXT, run_uuid TEXT);
CREATE TABLE latest_metrics (key TEXT, value REAL, timestamp INTEGER, step INTEGER, is_nan INTEGER, run_uuid TEXT);
"""


def mlflow_database(path: Path) -> Path:
    with closing(sqlite3.connect(path)) as database:
        database.executescript(TABLES)
        database.execute("INSERT INTO experiments VALUES (1, 'one')")
        for run in range(8):
            stage, status = "deleted" if run == 7 else "active", "FAILED" if run == 6 else "FINISHED"
            database.execute(
                "INSERT INTO runs VALUES (?, ?, ?, ?, 1)", (f"u{run}", f"run-{run}", status, stage)
            )
            for key, value in (("lr", RATES[run % 6]), ("seed", str(run % 2)), ("opt/name", "ab"[run % 2])):
                database.execute("INSERT INTO params VALUES (?, ?, ?)", (key, value, f"u{run}"))
            values = {
                "val/err": 0.1 + GAPS[run % 6],
                "train/err": 0.1,
                "sharpness": SHARP[run % 6],
                "empty": 0.0,
            }
            for key, number in values.items():
                row = (key, number, 0, 3, key == "empty", f"u{run}")
                database.execute("INSERT INTO latest_metrics VALUES (?, ?, ?, ?, ?, ?)", row)
        database.commit()
    return path


def test_mlflow_database(tmp_path: Path) -> None:
    path = mlflow_database(tmp_path / "mlflow.db")
    before = path.read_bytes()
    path.chmod(0o400)
    tmp_path.chmod(0o500)
    check(load_table(path))
    check(load_table(tmp_path))
    tmp_path.chmod(0o700)
    assert [each.name for each in tmp_path.iterdir()] == ["mlflow.db"]
    assert path.read_bytes() == before
    table = load_table(path)
    assert "8 runs of MLflow" in table.notes
    assert "error_gap is val_error − train_error" in table.notes
    assert table.left_out == ("status", "experiment", "empty")


def test_changes_that_a_server_has_not_yet_written_are_told(tmp_path: Path) -> None:
    path = mlflow_database(tmp_path / "mlflow.db")
    (tmp_path / "mlflow.db-wal").write_bytes(b"x")
    assert "mlflow.db-wal holds changes that are not read" in load_table(path).notes


def torn(path: Path) -> None:
    mlflow_database(path)
    path.write_bytes(path.read_bytes()[:9000])


def of_another_kind(path: Path) -> None:
    with closing(sqlite3.connect(path)) as database:
        database.executescript("CREATE TABLE trials (number INTEGER)")


def endless(path: Path) -> None:
    with closing(sqlite3.connect(path)) as database:
        database.executescript(
            TABLES.replace("CREATE TABLE runs", "CREATE TABLE others")
            + "CREATE VIEW runs AS WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) "
            "SELECT i AS run_uuid, i AS name, i AS status, i AS lifecycle_stage, i AS experiment_id FROM n WHERE i < 0;"
        )


def swollen(path: Path) -> None:
    mlflow_database(path)
    with closing(sqlite3.connect(path)) as database:
        database.execute("INSERT INTO params VALUES ('note', ?, 'u0')", ("x" * 2**21,))
        database.commit()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (torn, "malformed"),
        (of_another_kind, "no such table: runs"),
        (endless, "reading it takes too long"),
        (swollen, "too big"),
        (lambda path: path.write_bytes(b"SQLite format 3\0" + bytes(200)), "not a database"),
        (lambda path: path.write_text("a,b\n"), "not a database"),
    ],
)
def test_a_database_that_is_broken_or_hostile_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make: Callable[[Path], None], message: str
) -> None:
    assert MOST_WORK > 10
    monkeypatch.setattr("gm_probe.tables.trackers.MOST_WORK", 10)
    make(tmp_path / "mlflow.db")
    with pytest.raises(DataError, match=f"mlflow.db is not a readable MLflow database: .*{message}"):
        load_table(tmp_path / "mlflow.db")


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


@pytest.fixture
def mlruns(tmp_path: Path) -> Path:
    write(tmp_path / "mlruns" / "1" / "meta.yaml", "experiment_id: '1'\nname: one\n")
    for run in range(8):
        folder = tmp_path / "mlruns" / "1" / f"u{run}"
        stage, status = "deleted" if run == 7 else "active", 4 if run == 6 else 3
        meta = f"run_id: u{run}\nrun_name: run-{run}\nstatus: {status}\nlifecycle_stage: {stage}\ntags: []\n"
        write(folder / "meta.yaml", meta)
        for key, value in (("lr", RATES[run % 6]), ("seed", str(run % 2)), ("opt/name", "ab"[run % 2])):
            write(folder / "params" / key, value)
        for key, number in (
            ("val/err", 0.1 + GAPS[run % 6]),
            ("train/err", 0.1),
            ("sharpness", SHARP[run % 6]),
        ):
            write(folder / "metrics" / key, f"17 {number} 3\n15 0.9 1\n16 0.8 2\n18 0.")
    return tmp_path / "mlruns"


def test_mlruns_folder(mlruns: Path) -> None:
    check(load_table(mlruns))
    check(load_table(mlruns / "1"))


def test_one_run_that_cannot_be_read_hides_no_other(mlruns: Path) -> None:
    (mlruns / "1" / "u6" / "params" / "lr").unlink()
    (mlruns / "1" / "u6" / "params" / "lr").symlink_to("/etc/hostname")
    table = load_table(mlruns)
    assert table.num_runs == 6
    assert [(gone.run, gone.reason) for gone in table.excluded] == [
        ("1/u6", "unreadable"),
        ("run-7", "deleted"),
    ]
    assert any(
        "1 runs cannot be read; the first: " in note and "u6/params/lr" in note for note in table.notes
    )


# ---- Lightning

HPARAMS = """\
lr: {lr}
seed: {seed}
opt:
  name: {name}
  betas:
  - 0.9
  - 0.99
  nesterov: true
run: !!python/object/apply:os.system
- touch {trap}
shape: &x [1, 2]
note: 'it''s: "odd" # no comment'
text: |
  a: 1
long: some words that
  go on
none: null
tiny: 1.0e-05   # a comment
'quoted key': "two words"
d: {{}}
"""


@pytest.fixture
def logs(tmp_path: Path) -> Path:
    for run in range(6):
        folder = tmp_path / "logs" / f"version_{run}"
        last = f"1,7,,{0.1 + GAPS[run]!r},{SHARP[run]}\n"
        write(
            folder / "metrics.csv",
            f"epoch,step,train_err,val_err,sharpness\n0,3,0.5,,\n0,4,0.1,0.9,9\n{last}",
        )
        text = HPARAMS.format(lr=RATES[run], seed=run % 2, name="ab"[run % 2], trap=tmp_path / "trap")
        write(folder / "hparams.yaml", text)
    return tmp_path / "logs"


def test_lightning_logs(logs: Path) -> None:
    table = load_table(logs, hyperparameters=["lr", "opt.name"])
    assert table.frame["run"].tolist() == [f"version_{run}" for run in range(6)]
    assert table.frame["error_gap"].tolist() == GAPS
    assert table.measures == ("sharpness",)
    assert table.frame["lr"].tolist() == [float(rate) for rate in RATES]
    assert load_table(logs).hyperparameters == ("lr", "opt.name")
    assert not (logs.parent / "trap").exists()
    assert "lists and objects in hparams.yaml are not read: opt.betas, run, shape, text, long" in table.notes


def test_yaml_is_what_pyyaml_reads(logs: Path) -> None:
    path = logs / "version_0" / "hparams.yaml"
    found, lost = read_yaml(path)
    plain = [line for line in path.read_text().splitlines() if "!!" not in line and "touch" not in line]
    safe = yaml.safe_load("\n".join(plain))
    expected = {key: value for key, value in safe.items() if key not in {*lost, "opt", "d"}}
    expected |= {f"opt.{key}": value for key, value in safe["opt"].items() if key != "betas"}
    assert {key: str(value) for key, value in found.items()} == {
        key: str(value) if key != "tiny" else "1.0e-05" for key, value in expected.items()
    }
    assert found["none"] is None
    assert found["opt.nesterov"] is True


def test_yaml_of_any_bytes_is_read_or_told(tmp_path: Path) -> None:
    path = tmp_path / "hparams.yaml"
    path.write_bytes(
        b"\xff\xfe: 1\n\tx: 2\n- - - a\n? b\n: c\n%TAG\n" + b" " * 5000 + b"deep: 1\na: &a [*a]\n"
    )
    found, lost = read_yaml(path)
    assert "a" in lost
    assert all(isinstance(value, str) for value in found.values())
    with pytest.raises(StorageError):
        read_yaml(tmp_path / "absent.yaml")


# ---- Hugging Face


def test_trainer_folders(tmp_path: Path) -> None:
    for run in range(6):
        log = [{"loss": 0.7, "step": 5}, {"eval_error": 0.9, "step": 5},
               {"eval_error": 0.1 + GAPS[run], "train_error": 0.1, "sharpness": SHARP[run], "step": 10}]  # fmt: skip
        state = {
            "log_history": log,
            "max_steps": 10,
            "trial_params": {"lr": float(RATES[run]), "seed": run % 2},
        }
        for step in (5, 10):
            part = {**state, "log_history": log[: 2 if step == 5 else 3]}
            write(tmp_path / f"run-{run}" / f"checkpoint-{step}" / "trainer_state.json", json.dumps(part))
    table = load_table(tmp_path)
    assert table.frame["run"].tolist() == [f"run-{run}" for run in range(6)]
    assert table.frame["error_gap"].tolist() == GAPS
    assert (table.measures, table.hyperparameters) == (("sharpness",), ("lr",))
    assert any("training_args.bin, a pickle, which is not read" in note for note in table.notes)
    write(tmp_path / "run-3" / "checkpoint-10" / "trainer_state.json", "[" * 10_000)
    table = load_table(tmp_path)
    assert [(gone.run, gone.reason) for gone in table.excluded] == [("run-3", "unreadable")]


# ---- folders and rows without a tracker


def test_a_folder_of_another_kind(tmp_path: Path) -> None:
    write(tmp_path / "photos" / "a.jpg", "x")
    with pytest.raises(UsageError, match="holds no run"):
        load_table(tmp_path)
    write(tmp_path / "x" / "meta.yaml", "name: an experiment without runs\n")
    with pytest.raises(DataError, match="holds no run"):
        load_table(tmp_path)


def test_wandb_dicts_in_cells(tmp_path: Path) -> None:
    rows = [",summary,config,name"]
    for run in range(6):
        summary = {
            "error_gap": GAPS[run],
            "sharpness": SHARP[run],
            "_runtime": 3,
            "h": [1, 2],
            "t": {"loss": math.nan},
        }
        config = {"lr": float(RATES[run]), "seed": run % 2, "nesterov": True, "text": "a ---- 'b' {c}"}
        write_as = repr if run % 2 else lambda value: json.dumps(value)
        cells = [str(run), write_as(summary), write_as(config), f"run-{run}"]
        rows.append(",".join('"' + cell.replace('"', '""') + '"' for cell in cells))
    path = tmp_path / "project.csv"
    write(path, "\n".join(rows))
    table = load_table(path)
    assert (table.measures, table.hyperparameters) == (("sharpness",), ("lr", "nesterov"))
    assert table.frame["error_gap"].tolist() == GAPS
    assert table.frame["lr"].tolist() == [float(rate) for rate in RATES]
    assert table.frame["run"].tolist() == [f"run-{run}" for run in range(6)]
    assert "1 columns hold lists and are left out" in table.notes


HOSTILE = [
    "{'m': __import__('os').system('touch trap')}",
    "{'m': open('trap', 'w')}",
    "{" * 90_000 + "}",
    "{'m': " + "-" * 90_000 + "1}",
    "{'m': " + "1+" * 49_000 + "1}",
    "{'m': " * 3_000 + "1" + "}" * 3_000,
    "{'m': " + "9" * 5000 + "}",
    "{'m': '" + "x" * 50_000 + "'}",
    "{**{'m': 1}}",
    "{'m': 1 if True else 2}",
    "{'m' 1}",
]


@pytest.mark.parametrize("cell", HOSTILE, ids=range(len(HOSTILE)))
def test_a_cell_that_is_no_plain_dict_is_counted_and_never_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cell: str
) -> None:
    monkeypatch.chdir(tmp_path)
    rows = [f"{0.1 * run:.1f}\t{{'m': {run}}}" for run in range(4)]
    write(tmp_path / "t.tsv", "\n".join(["error_gap\tsummary", *rows, f"0.9\t{cell}"]))
    table = load_table(tmp_path / "t.tsv")
    assert table.measures == ("m",)
    assert table.missing["m"] == {4: "no value"}
    assert "1 cells of summary hold no readable dict; they count as empty" in table.notes
    assert not (tmp_path / "trap").exists()


# ---- JSON


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".ndjson"])
def test_json_of_runs(tmp_path: Path, suffix: str) -> None:
    rows = [
        {"name": f"run-{run}", "config": {"lr": float(RATES[run])}, "seed": run % 2, "error_gap": GAPS[run],
         "metrics": {"sharpness": SHARP[run] if run else None, "bad": math.nan}, "ok": True,
         "curve": [1, 2], "note": "a\u2028b"}
        for run in range(6)
    ]  # fmt: skip
    path = tmp_path / f"t{suffix}"
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    write(path, json.dumps(rows, indent=1) if suffix == ".json" else "\r\n".join([*lines, "", ""]))
    table = load_table(path)
    assert (table.measures, table.hyperparameters) == (("sharpness",), ("lr",))
    assert table.frame["error_gap"].tolist() == GAPS
    assert table.frame["sharpness"].tolist()[1:] == SHARP[1:]
    assert table.missing["sharpness"] == {0: "no value"}
    assert "1 columns hold lists and are left out" in table.notes


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"error_gap": 1}\n{"error_gap": ', "line 2 is not valid JSON"),
        ("", "is empty"),
        ("[]", "is empty"),
        ("[1, 2]", "entry 1 is no object"),
        ('{"a": 1}\n7', "entry 2 is no object"),
        ('{\n "a": 1\n}', "line 1 is not valid JSON: .* Write one object per line, or a list of objects"),
        ("[" * 10_000, "is not valid JSON"),
        ('{"a": ' * 40 + "1" + "}" * 40, "line 1: .* is nested in more than 16 levels"),
        ('{"a": 1' + "0" * 30 + "}", "line 1: a is an integer beyond 64 bits"),
        ('{"' + "k" * 300 + '": 1}', "line 1: .* of 300 characters"),
    ],
)
def test_json_that_is_broken_is_one_line(tmp_path: Path, text: str, message: str) -> None:
    write(tmp_path / "t.jsonl", text)
    with pytest.raises(DataError, match=message) as caught:
        load_table(tmp_path / "t.jsonl")
    assert "\n" not in str(caught.value)


def test_results_of_a_tracker_s_folder_are_written_beside_it(mlruns: Path, tmp_path: Path) -> None:
    assert beside(mlruns, "report.html") == tmp_path / "mlruns-report.html"
    assert beside(tmp_path / "t.csv", "correlate") == tmp_path / "t-correlate"
    write(tmp_path / "runs" / "a" / "config.toml", "")
    assert beside(tmp_path / "runs", "correlate") == tmp_path / "runs" / "correlate"
