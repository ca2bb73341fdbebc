"""All runs of a folder as one flat table, whatever their state: what `gmprobe collect` writes."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pandas as pd

from gm_probe.errors import StorageError, UsageError
from gm_probe.files.atomic import write_atomic
from gm_probe.files.locks import held, locked
from gm_probe.runs.records import failure, find_runs, read_run, state_at_rest
from gm_probe.tables.cells import cell

PARTS = {
    "value": "",
    "stderr": "_stderr",
    "stderr_examples": "_stderr_examples",
    "converged": "_has_converged",
}
"""What of a measure's row is kept, and what its column adds to the measure's name."""


def collect(root: Path) -> pd.DataFrame:
    """Return one row per run at or below ``root``, sorted by ``run``: state, settings, errors and gaps, measures.

    A run's every setting is a column of its name; of a measure NAME the columns NAME, NAME_stderr,
    NAME_stderr_examples and NAME_has_converged; ``probe.KEY`` is a setting of the measurement. What a run does not have
    is empty. A run whose files are broken is a row whose ``reason`` says so.

    Raises:
        UsageError: ``root`` holds no run.
    """
    rows = []
    for path in find_runs(root):
        run = path.relative_to(root).as_posix() if path != root else root.resolve().name
        try:
            row = _row(path)
            now = {"status": "running"} if held(path) else {}
            rows.append({"run": _cell(run), **row, **now})
        except StorageError as error:
            rows.append({"run": _cell(run), "status": "failed", "reason": _cell(str(error))})
    rows.sort(key=lambda row: row["run"])
    return pd.DataFrame(rows, columns=_columns(rows))


def _row(path: Path) -> dict[str, Any]:
    record = read_run(path)
    row = {"status": state_at_rest(path), "reason": _cell(failure(path))}
    row |= {key: _cell(value) for key, value in record.config.items() if key != "environment"}
    row |= {key: _cell(value) for key, value in record.summary.items() if key not in {"status", "reason"}}
    row |= {f"probe.{key}": _cell(value) for key, value in record.settings.items()}
    for name, measure in record.measures.items():
        row |= {name + ending: measure.get(part) for part, ending in PARTS.items()}
    return {_cell(name): value for name, value in row.items()}


def _cell(value: Any) -> Any:
    """Return numbers, text and truth values as they are, and lists and tables as text."""
    if value is None or isinstance(value, bool | int | float):
        return value
    return str(value).encode(errors="backslashreplace").decode()


def _columns(rows: list[dict[str, Any]]) -> list[str]:
    """Return every key once; each measure's columns stay together."""
    found = dict.fromkeys(key for row in rows for key in row)
    measures = dict.fromkeys(key.removesuffix("_stderr") for key in found if key.endswith("_stderr"))
    ours = [name + ending for name in measures for ending in PARTS.values()]
    return [key for key in found if key not in set(ours)] + [key for key in ours if key in found]


def write_table(root: Path, out: Path) -> pd.DataFrame:
    """Write ``collect`` into the .csv or .parquet file ``out``; readers see the old or the new file, never a part.

    Of several at once each waits for the others, so that no table is replaced by an older one.

    Raises:
        UsageError: ``root`` holds no run, or ``out`` has another ending, or pyarrow is missing.
        StorageError: ``out`` cannot be written.
    """
    if out.suffix.lower() not in {".csv", ".parquet"}:
        raise UsageError(f"--out {out} must end in .csv or .parquet")
    with locked(out):
        frame = collect(root)
        write_atomic(out, _bytes(frame, out.suffix.lower()))
    return frame


def _bytes(frame: pd.DataFrame, suffix: str) -> bytes:
    if suffix == ".csv":
        return frame.map(cell).rename(columns=cell).to_csv(index=False).encode()
    buffer = io.BytesIO()
    for name in frame.columns:  # in Parquet a column has one type
        if frame[name].dtype.kind == "O" and frame[name].dropna().map(type).nunique() > 1:
            frame = frame.assign(**{name: frame[name].map(str, na_action="ignore")})
    try:
        frame.to_parquet(buffer, index=False)
    except ImportError as error:
        raise UsageError(
            "--out FILE.parquet needs pyarrow, which is not installed; "
            "pip install 'gm_probe[parquet]', or write a .csv"
        ) from error
    return buffer.getvalue()
