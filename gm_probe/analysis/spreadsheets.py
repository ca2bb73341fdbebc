"""A table of anybody's own runs, one a row, from CSV or Parquet."""

import csv
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path

import pandas as pd

from gm_probe.analysis.table import (
    BOOKKEEPING,
    GAPS,
    KNOWN_MEASURES,
    LARGEST,
    MISSED_STOP,
    MOST_MEASURES,
    MOST_SETTINGS,
    OUTCOMES,
    SEED,
    TOO_LARGE,
    Exclusion,
    RunTable,
    missed_stop_note,
    require_distinct,
    require_few,
    require_known,
    unique,
)
from gm_probe.core.errors import DataError, StorageError, UsageError, printable
from gm_probe.core.schema import LONGEST_TEXT

# Usual names of training choices: never taken for a measure unless asked for.
# fmt: off
SETTINGS = frozenset((
    "method", "model", "data", "dataset", "optimizer", "lr", "learning_rate", "batch_size", "weight_decay",
    "momentum", "schedule", "augment", "augmentation", "label_smoothing", "rho", "beta",
    "ascent_steps", "noise_scale", "num_parameters", "num_examples",
))
# fmt: on
# Neither: epochs and steps are outcomes where training stops early, and would then tell seeds apart as settings.
LEFT_OUT = frozenset(("train_accuracy", "test_accuracy", "epochs", "steps", "", *OUTCOMES))
MET_STOP = "met_stop_ce"
NO = ("false", "0", "0.0")
ROW = "\0row"
"""Name of the column that numbers the rows: no file has it."""
MOST_COLUMNS, MOST_CELLS, MOST_BYTES = 5000, 10**7, 2**30
"""Of a file; thirty thousand runs with three hundred columns are fewer."""
NO_VALUE = ("", "-", "na", "n/a", "nan", "nat", "null", "none", "<na>")


def table_from_file(
    source: Path,
    measures: Sequence[str],
    hyperparameters: Sequence[str],
    group_by: Sequence[str],
    converged_only: bool,
) -> RunTable:
    """Read ``source``, whose suffix is in ``READERS``; see ``runs.load_table`` for the choice of columns and runs.

    Raises:
        UsageError: a column that was asked for is not there or has another role; ``converged_only``, and nothing says
            which runs converged; or pyarrow is missing.
        DataError: no gap, no measure, no row, a duplicated column, or text where a number belongs.
        StorageError: the file cannot be read.
    """
    raw = READERS[source.suffix.lower()](source)
    names = list(raw.columns)
    repeated = [name for name, times in Counter(names).items() if times > 1]
    if repeated:
        raise DataError(f"{source} has the column {repeated[0]!r} more than once; rename or remove one")
    odd = [name for name in names if not name.isprintable()]
    if odd:
        raise DataError(
            f"{source} has the column {odd[0]!r}, with characters that cannot be shown; rename it"
        )
    gaps = [gap for gap in GAPS if gap in names]
    if not gaps:
        raise DataError(
            f"{source} has no column error_gap (test error − train error) or ce_gap; "
            f"it has: {', '.join(names)}"
        )
    if raw.empty:
        raise DataError(f"{source} has a header but no run below it")
    require_known([*measures, *hyperparameters, *group_by], names, f"column in {source} named")
    raw, excluded, notes = _finished(raw, source, converged_only)

    columns = _Columns(raw)
    by_name = [name for name in names if name in SETTINGS and name not in measures]
    hypers = unique([*(hyperparameters or by_name), *group_by])
    free = [name for name in names if name not in {*gaps, *hypers, "run"}]
    candidates = [name for name in free if name not in BOOKKEEPING | SETTINGS | LEFT_OUT]
    chosen = (
        unique(measures)
        or [name for name in KNOWN_MEASURES if name in candidates]
        or list(islice((name for name in candidates if not columns[name].text), MOST_MEASURES + 1))
    )
    require_few(chosen, MOST_MEASURES, source, "columns to take as measures", "--measures")
    require_few(hypers, MOST_SETTINGS, source, "hyperparameters", "--hyper")
    if not chosen:
        raise DataError(f"{source} has no numeric column to take as a measure; it has: {', '.join(names)}")
    require_distinct(gaps, chosen, hypers)
    outcomes = [name for name in OUTCOMES if name in names and name not in (*gaps, *chosen, *hypers)]
    for name in [*gaps, *chosen]:
        for row, cell in columns[name].text.items():
            place = int(raw[ROW].iloc[row])
            raise DataError(f"{source} column {name!r} row {place} holds {cell!r}, which is not a number")

    left_out = [name or "a column without a name" for name in free if name not in chosen]
    note = f"measures taken: {', '.join(chosen)}" + (f"; left out: {', '.join(left_out)}" if left_out else "")
    gone = {name: int(columns[name].values.isna().sum()) for name in outcomes}
    lacking = [f"{name} is no number in {num} of {len(raw)} runs" for name, num in gone.items() if num]
    frame = {"run": _names(raw)}
    frame |= {name: columns[name].values for name in [*gaps, *chosen]}
    seeds = [SEED] if SEED in names and SEED not in chosen else []
    frame |= {name: _settings(columns[name], raw[name]) for name in unique([*hypers, *seeds])}
    frame |= {name: columns[name].values for name in outcomes}
    return RunTable(
        source=source,
        frame=pd.DataFrame(frame),
        gaps=tuple(gaps),
        measures=tuple(chosen),
        hyperparameters=tuple(hypers),
        missing={name: columns[name].missing for name in [*gaps, *chosen]},
        excluded=excluded,
        notes=(*(() if measures else (note,)), *lacking, *notes),
        outcomes=tuple(outcomes),
    )


def _finished(
    raw: pd.DataFrame, source: Path, converged_only: bool
) -> tuple[pd.DataFrame, tuple[Exclusion, ...], list[str]]:
    """The rows that may enter, with their number in ``ROW``; the others; and a note on those that missed their stop.

    Only a table that says of some run that it is finished says of the others that they are not.
    """
    raw = raw.assign(**{ROW: range(1, len(raw) + 1)})
    reasons: dict[int, str] = {}
    if "status" in raw and (raw["status"] == "finished").any():
        reasons = {row: str(status) for row, status in enumerate(raw["status"]) if status != "finished"}
    if converged_only and MET_STOP not in raw:
        raise UsageError(
            f"--converged-only: {source} has no column {MET_STOP}, so nothing says which runs converged; give run "
            "folders, or a table of `gmprobe collect`"
        )
    missed = []
    if MET_STOP in raw:
        missed = [
            row
            for row, met in enumerate(raw[MET_STOP])
            if str(met).strip().lower() in NO and row not in reasons
        ]
    if converged_only:
        reasons |= dict.fromkeys(missed, MISSED_STOP)
    kept = raw.drop(index=list(reasons)).reset_index(drop=True)
    if kept.empty:
        raise DataError(f"no run of {source} is usable: {', '.join(dict.fromkeys(reasons.values()))}")
    names = _names(raw)
    excluded = tuple(Exclusion(names[row], reason) for row, reason in reasons.items())
    return kept, excluded, [] if converged_only else missed_stop_note(len(missed), len(kept))


def _names(raw: pd.DataFrame) -> pd.Series:
    if "run" in raw:
        return raw["run"].map(str).map(printable)
    return raw[ROW].map(lambda row: f"row {row}")


@dataclass(frozen=True, slots=True)
class _Column:
    """Finite floats or NaN; the rows whose cell is text; the rows without a finite value and the reason."""

    values: pd.Series
    text: dict[int, str]
    missing: dict[int, str]


class _Columns(dict[str, _Column]):
    """The columns of ``raw`` by their names, each made when it is first asked for."""

    def __init__(self, raw: pd.DataFrame) -> None:
        super().__init__()
        self._raw = raw

    def __missing__(self, name: str) -> _Column:
        found = self[name] = _column(self._raw[name])
        return found


def _column(cells: pd.Series) -> _Column:
    text = cells.map(lambda cell: str(cell).strip())
    empty = text.str.lower().isin(NO_VALUE)
    values = text.mask(empty, "nan").map(_number).astype(float)
    wrong = values.isna() & ~empty
    infinite = values.isin([math.inf, -math.inf])
    large = (values.abs() > LARGEST) & ~infinite
    missing = dict.fromkeys(text.index[empty].tolist(), "no value")
    missing |= dict.fromkeys(text.index[infinite].tolist(), "not finite")
    missing |= dict.fromkeys(text.index[large].tolist(), TOO_LARGE)
    return _Column(
        values.mask(infinite | large),
        dict(zip(text.index[wrong].tolist(), text[wrong].tolist(), strict=True)),
        missing,
    )


def _number(cell: str) -> float:
    """``cell`` rounded correctly, which not every release of pandas does; NaN where it is none."""
    try:
        return (
            float(cell) if cell.isascii() and "_" not in cell else math.nan
        )  # Python's own grammar takes more
    except ValueError:
        return math.nan


def _settings(column: _Column, cells: pd.Series) -> pd.Series:
    """A hyperparameter's cells: numbers where all of them are, else text; None where there is no value."""
    numeric = not column.text and not {"not finite", TOO_LARGE} & set(column.missing.values())
    values = column.values.tolist() if numeric else [str(cell).strip() for cell in cells]
    unset = {row for row, reason in column.missing.items() if reason == "no value"}
    return pd.Series([None if row in unset else value for row, value in enumerate(values)], dtype=object)


def _require_fit(path: Path, num_rows: int, num_columns: int) -> None:
    """Raise DataError where a table is larger than any table of runs, before it is read."""
    if num_columns > MOST_COLUMNS or num_rows * num_columns > MOST_CELLS:
        raise DataError(
            f"{path} has {num_rows:,} rows and {num_columns:,} columns; a table of runs may have {MOST_COLUMNS:,} "
            f"columns and {MOST_CELLS:,} cells; keep one row a run, and the columns that you need"
        )


def _size_of_csv(path: Path) -> tuple[int, int]:
    """Rows at most, and columns: pandas pads every row to the length of the first."""
    with path.open(encoding="utf-8-sig", errors="replace", newline="") as file:
        first = next(csv.reader(file), [])
    with path.open("rb") as binary:
        rows = sum(
            block.count(b"\n") + block.count(b"\r") for block in iter(partial(binary.read, 2**20), b"")
        )
    return rows + 1, len(first)


def _read_csv(path: Path) -> pd.DataFrame:
    """All cells as text, so that what is a number and what is missing is decided above and not guessed."""
    try:
        _require_fit(path, *_size_of_csv(path))
        raw = pd.read_csv(path, header=None, dtype=str, keep_default_na=False, encoding="utf-8-sig")
    except OSError as error:
        raise StorageError(f"cannot read {path}: {error.strerror or error}") from error
    except pd.errors.EmptyDataError as error:
        raise DataError(f"{path} is empty; it needs a header line and one line a run") from error
    except (ValueError, csv.Error) as error:  # pandas' ParserError and UnicodeDecodeError are ValueErrors
        raise DataError(f"{path} is not a readable CSV: {str(error).strip()}") from error
    table = raw.iloc[1:].reset_index(drop=True)
    table.columns = pd.Index([str(name).strip() for name in raw.iloc[0]])
    return table


def _read_parquet(path: Path) -> pd.DataFrame:
    try:
        table = _parquet_frame(path)
    except ImportError as error:
        raise UsageError(f"reading {path} needs pyarrow; pip install 'gm_probe[parquet]'") from error
    except OSError as error:
        raise StorageError(f"cannot read {path}: {error.strerror or error}") from error
    except ValueError as error:  # pyarrow's ArrowInvalid is a ValueError
        raise DataError(f"{path} is not a readable Parquet file: {str(error).strip()}") from error
    table.columns = pd.Index([str(name).strip() for name in table.columns])
    return table.reset_index(drop=True)


def _parquet_frame(path: Path) -> pd.DataFrame:
    """What ``path`` holds, its texts by way of a dictionary: a file may name one long text in a million rows."""
    from pyarrow import parquet, types  # an extra

    with parquet.ParquetFile(path) as file:
        meta = file.metadata
        groups = [meta.row_group(index) for index in range(meta.num_row_groups)]
        chunks = [group.column(index) for group in groups for index in range(group.num_columns)]
        cells = max(
            meta.num_rows * meta.num_columns, sum(chunk.num_values for chunk in chunks)
        )  # of nested ones more
        _require_fit(path, -(-cells // max(meta.num_columns, 1)), meta.num_columns)
        unpacked = sum(chunk.total_uncompressed_size for chunk in chunks)
        if unpacked > MOST_BYTES:
            raise DataError(
                f"{path} would unpack to {unpacked:,} bytes, more than {MOST_BYTES:,}; keep fewer columns"
            )
        texts = [field.name for field in file.schema_arrow if not types.is_primitive(field.type)]
    table = parquet.read_table(path, read_dictionary=texts)
    for column in table.columns:
        for chunk in column.chunks if types.is_dictionary(column.type) else ():
            longest = max(map(len, map(str, chunk.dictionary.to_pylist())), default=0)
            if longest > LONGEST_TEXT:
                raise DataError(f"{path} has a cell of {longest:,} characters, more than {LONGEST_TEXT:,}")
    frame = table.to_pandas()
    categories = [name for name, kind in frame.dtypes.items() if isinstance(kind, pd.CategoricalDtype)]
    return frame.astype(dict.fromkeys(categories, object))


READERS: dict[str, Callable[[Path], pd.DataFrame]] = {".csv": _read_csv, ".parquet": _read_parquet}
