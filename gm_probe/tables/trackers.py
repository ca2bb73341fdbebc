"""Read what trackers leave on disk, one row per run: MLflow, Lightning, Hugging Face. Imports no pandas.

A row has the columns ``run``, ``status`` where the tracker keeps one, ``params.NAME``, ``metrics.NAME`` (the last
value) and ``tags.NAME``. Files are read as data: nothing in them is run, and nothing beside them is written.
"""

from __future__ import annotations

import json
import math
import os
import re
import sqlite3
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from itertools import islice
from pathlib import Path
from typing import Any

from gm_probe.errors import DataError, StorageError, printable
from gm_probe.files.regular import open_to_read, read_record
from gm_probe.files.schema import Unfit, bounded
from gm_probe.runs.records import CONFIG, SUMMARY
from gm_probe.tables.delimited import MOST_CELLS, read_delimited

Row = dict[str, Any]
Rows = tuple[list[Row], list[str]]
"""The runs, and what a reader should know of how they were read."""
DATABASES = (".db", ".sqlite", ".sqlite3")
UNREADABLE = "unreadable"
"""The status of a run whose files cannot be read."""


def tracker(folder: Path) -> Callable[[Path], Rows] | None:
    """Return the reader for the runs in ``folder``; None where they are gmprobe's, or where there are none."""
    seen: set[str] = set()
    for _, _, files in os.walk(folder):
        seen.update(files)
    if {CONFIG, SUMMARY} & seen:
        return None
    return next((read for mark, read in FOLDERS.items() if mark in seen), None)


def _each(folder: Path, paths: Iterable[Path], read: Callable[[Path], Row], tool: str) -> Rows:
    """Return ``read`` of each of ``paths`` below ``folder``; an unreadable one does not stop the others."""
    rows, wrong = [], []
    for path in paths:
        run = path.relative_to(folder).as_posix() if path != folder else folder.resolve().name
        try:
            rows.append({"run": run} | read(path))
        except (DataError, StorageError) as error:
            rows.append({"run": run, "status": UNREADABLE})
            wrong.append(str(error))
    note = [f"{len(wrong)} runs cannot be read; the first: {wrong[0]}"] if wrong else []
    return rows, [f"{len(rows)} runs of {tool}", *note]


def _folders(root: Path, mark: str) -> list[Path]:
    return sorted(Path(folder) for folder, _, files in os.walk(root) if mark in files)


# ---- MLflow

_STATES = {"1": "RUNNING", "2": "SCHEDULED", "3": "FINISHED", "4": "FAILED", "5": "KILLED"}
_DELETED = "deleted"


def mlflow_folder(root: Path) -> Rows:
    """Read the runs of a ``mlruns`` folder, or of an experiment in it."""
    found = [
        run for run in _folders(root, "meta.yaml") if (run / "params").is_dir() or (run / "metrics").is_dir()
    ]
    return _each(root, found, _mlflow_run, "MLflow")


def _mlflow_run(run: Path) -> Row:
    meta = read_yaml(run / "meta.yaml")[0]
    above = run.parent / "meta.yaml"
    status = _STATES.get(str(meta.get("status")), str(meta.get("status")))
    row = {
        "run": meta.get("run_name") or run.name,
        "status": _DELETED if meta.get("lifecycle_stage") == _DELETED else status,
        "tags.experiment": read_yaml(above)[0].get("name") if above.exists() else None,
    }
    row |= {f"params.{name}": text.strip() for name, text in _values(run / "params")}
    row |= {f"metrics.{name}": _last(text) for name, text in _values(run / "metrics")}
    return row


def _values(folder: Path) -> Iterator[tuple[str, str]]:
    for place, _, files in os.walk(folder):
        for name in sorted(files):
            path = Path(place) / name
            yield path.relative_to(folder).as_posix(), read_record(path).decode(errors="replace")


_POINT = re.compile(r"(\d{1,18}) (\S+)(?: (-?\d{1,18})(?: .*)?)?", re.ASCII)


def _last(text: str) -> str | None:
    """Return the value of the last step, from lines ``timestamp value step``; a torn line does not count."""
    points = [match for line in text.splitlines() if (match := _POINT.fullmatch(line))]
    return max(points, key=lambda point: (int(point[3] or 0), int(point[1])))[2] if points else None


MOST_WORK = 300
"""SQLite may take so many million steps: a view in somebody else's file could run for ever."""
_QUERIES = {
    "runs": "SELECT run_uuid, name, status, lifecycle_stage, experiment_id FROM runs",
    "experiments": "SELECT experiment_id, name FROM experiments",
    "tags": "SELECT run_uuid, key, value FROM tags WHERE key = 'mlflow.runName'",
    "params": "SELECT run_uuid, key, value FROM params",
    "latest_metrics": "SELECT run_uuid, key, value, is_nan FROM latest_metrics",
}


def mlflow_database(path: Path) -> Rows:
    """Read the runs of an ``mlflow.db``; nothing is written to it or beside it.

    Raises:
        DataError: it is no SQLite database, or damaged, or not MLflow's.
        StorageError: it cannot be read.
    """
    try:
        open_to_read(path, follow=True).close()
        found = _query(path)
    except OSError as error:
        raise StorageError(f"cannot read {path}: {error.strerror or error}") from error
    except sqlite3.Error as error:
        reason = str(error).replace("interrupted", "reading it takes too long")
        raise DataError(f"{path} is not a readable MLflow database: {printable(reason)}") from error
    named = {run: name for run, _, name in found["tags"]}
    experiments = dict(found["experiments"])
    rows: dict[str, Row] = {}
    for run, name, status, stage, experiment in found["runs"]:
        rows[run] = {
            "run": name or named.get(run) or run,
            "status": _DELETED if stage == _DELETED else status,
            "tags.experiment": experiments.get(experiment),
        }
    for run, key, value in found["params"]:
        rows.get(run, {})[f"params.{key}"] = value
    for run, key, value, is_nan in found["latest_metrics"]:
        rows.get(run, {})[f"metrics.{key}"] = math.nan if is_nan else value
    log = path.with_name(f"{path.name}-wal")
    note = [f"{log.name} holds changes that are not read"] if log.exists() and log.stat().st_size else []
    return list(rows.values()), [f"{len(rows)} runs of MLflow", *note]


def _query(path: Path) -> dict[str, list[tuple[Any, ...]]]:
    work = iter(range(MOST_WORK))
    with closing(sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro&immutable=1", uri=True)) as database:
        database.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, 2**20)
        database.execute("PRAGMA trusted_schema = OFF")
        database.text_factory = lambda raw: raw.decode(errors="replace")
        database.set_progress_handler(lambda: next(work, None) is None, 10**6)
        found = {
            name: list(islice(database.execute(query), MOST_CELLS + 1)) for name, query in _QUERIES.items()
        }
    if max(map(len, found.values())) > MOST_CELLS:
        raise DataError(f"{path} has more than {MOST_CELLS:,} values; export the runs that you need")
    return found


def _databases(root: Path) -> Rows:
    found = [mlflow_database(folder / "mlflow.db") for folder in _folders(root, "mlflow.db")]
    return [row for rows, _ in found for row in rows], [note for _, notes in found for note in notes]


# ---- Lightning


def lightning(root: Path) -> Rows:
    """Read runs of its CSVLogger: last values of ``metrics.csv``, and the scalars of ``hparams.yaml``."""
    lost: dict[str, None] = {}

    def read(run: Path) -> Row:
        table = read_delimited(run / "metrics.csv", follow=False)
        row = {f"metrics.{name}": cell for cells in table.rows for name, cell in zip(table.header, cells, strict=True)
               if cell}  # fmt: skip
        if (run / "hparams.yaml").exists():
            settings, others = read_yaml(run / "hparams.yaml")
            lost.update(dict.fromkeys(others))
            row |= {f"params.{name}": value for name, value in settings.items()}
        return row

    rows, notes = _each(root, _folders(root, "metrics.csv"), read, "Lightning")
    return rows, notes + (
        [f"lists and objects in hparams.yaml are not read: {', '.join(lost)}"] if lost else []
    )


_KEY = re.compile(r"""('[^']*'|"[^"]*"|[^\s'"#!&*|>%@`\[\]{},-][^:]*?|-[^\s:][^:]*?)\s*:(?:\s+(.*))?""")
_PLAIN = {
    **dict.fromkeys(("null", "Null", "NULL", "~"), None),
    **{"true": True, "false": False, ".nan": "nan", ".inf": "inf", "-.inf": "-inf"},
}


def read_yaml(path: Path) -> tuple[Row, list[str]]:
    """Return the scalars in the block mappings of ``path``, ``a.b`` where they nest, and the names of everything else.

    Lists, tags, anchors and texts of several lines are not read: no object is made, and nothing grows.

    Raises:
        StorageError: it cannot be read.
    """
    found: Row = {}
    lost: dict[str, None] = {}
    above: list[tuple[int, str]] = []
    ended = math.inf  # the indent of the last line that has a value: what is deeper continues it
    for line in read_record(path).decode(errors="replace").splitlines():
        text = line.strip()
        indent = len(line) - len(line.lstrip(" "))
        if not text or text.startswith(("#", "---", "...")):
            continue
        match = _KEY.fullmatch(text)
        if indent > ended or match is None:
            name = ".".join(key for _, key in above) or text
            found.pop(name, None)
            lost[printable(name)] = None
            ended = min(ended, indent)
            continue
        while above and above[-1][0] >= indent:
            above.pop()
        above.append((indent, match[1].strip("'\"")))
        name = ".".join(key for _, key in above)
        value = match[2] or ""
        ended = indent if value and not value.startswith("#") else math.inf
        if value in ("{}", "[]") or ended == math.inf:
            continue
        if value[0] in "!&*|>[{%@`":
            lost[printable(name)] = None
        else:
            found[name] = _scalar(value)
    return found, list(lost)


def _scalar(text: str) -> Any:
    if text[0] == "'":
        return text[1:-1].replace("''", "'")
    if text[0] == '"':
        return text[1:-1]
    plain = re.split(r"\s#", text, maxsplit=1)[0].rstrip()
    return _PLAIN.get(plain, plain)


# ---- Hugging Face

_CHECKPOINT = re.compile(r"checkpoint-\d+")
_SAID = ("train_batch_size", "num_train_epochs", "max_steps")


def hugging_face(root: Path) -> Rows:
    """Read runs of its Trainer: the last values of the log in the last checkpoint's ``trainer_state.json``."""
    latest: dict[Path, tuple[int, Path]] = {}
    for folder in _folders(root, "trainer_state.json"):
        part = bool(_CHECKPOINT.fullmatch(folder.name)) and folder != root
        run, step = (folder.parent, int(folder.name[11:][:18])) if part else (folder, 10**18)
        latest[run] = max(latest.get(run, (-1, folder)), (step, folder))

    def read(run: Path) -> Row:
        state = _json_record(latest[run][1] / "trainer_state.json")
        log = state.get("log_history")
        row = {f"metrics.{key}": value for entry in log if isinstance(entry, dict) for key, value in entry.items()} \
            if isinstance(log, list) else {}  # fmt: skip
        trial = state.get("trial_params")
        given = {key: state[key] for key in _SAID if key in state} | (
            trial if isinstance(trial, dict) else {}
        )
        return row | {f"params.{key}": value for key, value in given.items()}

    rows, notes = _each(root, sorted(latest), read, "Hugging Face's Trainer")
    return rows, [*notes, "their other settings are in training_args.bin, a pickle, which is not read"]


def _json_record(path: Path) -> Row:
    try:
        value = json.loads(read_record(path))
        bounded(value)
    except (ValueError, RecursionError, Unfit) as error:
        raise StorageError(f"{path} is not a readable trainer_state.json: {printable(str(error))}") from error
    if not isinstance(value, dict):
        raise StorageError(f"{path} holds no JSON object")
    return value


FOLDERS: dict[str, Callable[[Path], Rows]] = {
    "mlflow.db": _databases,
    "meta.yaml": mlflow_folder,
    "trainer_state.json": hugging_face,
    "metrics.csv": lightning,
}
"""By a file that the tracker leaves there: how the runs below a folder are read; the first that is found is used."""
