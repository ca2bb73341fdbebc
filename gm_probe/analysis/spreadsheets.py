"""A table of anybody's own runs, one a row, from CSV or Parquet."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from gm_probe.analysis.columns import (
    MET_STOP,
    NAMES,
    called,
    is_setting,
    is_status,
    key,
    may_be_measure,
    unfinished,
)
from gm_probe.analysis.delimited import MOST_BYTES, read_delimited, require_fit
from gm_probe.analysis.numerals import COMMA, NO_VALUE, Numbers, ambiguous, read_numbers
from gm_probe.analysis.table import (
    GAPS,
    KNOWN_MEASURES,
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
from gm_probe.errors import DataError, StorageError, UsageError, printable
from gm_probe.files.schema import LONGEST_TEXT

NO = ("false", "0", "0.0")
ROW = "\0row"
"""Name of the column that numbers the rows: no file has it."""
DIFFERENCES = (
    ("error_gap", "test_error", "train_error"),
    ("error_gap", "train_accuracy", "test_accuracy"),
    ("ce_gap", "test_ce", "train_ce"),
)
"""The gap that a table without one is given: the second column less the third."""


@dataclass(frozen=True, slots=True)
class _Sheet:
    """A table as it was read: its cells, what its columns are called in the file, and remarks on how it is written."""

    source: Path
    cells: pd.DataFrame
    aliases: Mapping[str, str]
    written: tuple[str, ...] = ()


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
    sheet = _sheet(source)
    raw, excluded, notes = _finished(sheet.cells, source, converged_only)
    columns = read_numbers({str(name): raw[name].to_list() for name in raw if name != ROW})
    gaps, taken_from = _gaps(columns, source)
    names = [*columns]
    measures, hyperparameters, group_by = (
        [sheet.aliases.get(name, name) for name in asked] for asked in (measures, hyperparameters, group_by)
    )
    require_known([*measures, *hyperparameters, *group_by], names, f"column in {source} named")
    by_name = [name for name in names if is_setting(name) and name not in measures]
    hypers = unique([*(hyperparameters or by_name), *group_by])
    free = [name for name in names if name not in {*gaps, *hypers, "run"}]
    chosen = unique(measures) or _measures(free, columns)
    require_few(chosen, MOST_MEASURES, source, "columns to use as measures", "--measures")
    require_few(hypers, MOST_SETTINGS, source, "hyperparameters", "--hyper")
    if not chosen:
        raise DataError(f"{source} has no numeric column to use as a measure; it has: {', '.join(names)}")
    require_distinct(gaps, chosen, hypers)
    _require_numbers([*gaps, *taken_from, *chosen], columns, raw[ROW], source)

    left_out = [name or "a column without a name" for name in free if name not in chosen]
    note = f"measures used: {', '.join(chosen)}" + (f"; left out: {', '.join(left_out)}" if left_out else "")
    outcomes = [name for name in OUTCOMES if name in names and name not in (*gaps, *chosen, *hypers)]
    gone = {name: int(columns[name].values.isna().sum()) for name in outcomes}
    lacking = [f"{name} is not a number in {num} of {len(raw)} runs" for name, num in gone.items() if num]
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
        notes=(
            *_said(sheet, columns, [*gaps, *taken_from, *chosen, *hypers]),
            *((f"{gaps[0]} is {' − '.join(taken_from)}",) if taken_from else ()),
            *(() if measures else (note,)),
            *lacking,
            *notes,
        ),
        outcomes=tuple(outcomes),
        aliases=sheet.aliases,
    )


def _sheet(source: Path) -> _Sheet:
    """The cells of ``source``, its columns by the names that the rest of the code knows."""
    raw, written = READERS[source.suffix.lower()](source)
    empty = [bool(name == "" and (raw.iloc[:, place] == "").all()) for place, name in enumerate(raw.columns)]
    raw = raw.loc[:, [not gone for gone in empty]]
    names = list(raw.columns)
    repeated = [name for name, times in Counter(names).items() if times > 1]
    if repeated:
        raise DataError(f"{source} has the column {repeated[0]!r} more than once; rename or remove one")
    odd = [name for name in names if not name.isprintable()]
    if odd:
        raise DataError(f"{source} has the column {odd[0]!r}, with unprintable characters; rename it")
    if raw.empty:
        raise DataError(f"{source} has a header but no run below it")
    new = called(names)
    return _Sheet(
        source, raw.rename(columns=new), {old: name for old, name in new.items() if old != name}, written
    )


def _gaps(columns: dict[str, Numbers], source: Path) -> tuple[list[str], list[str]]:
    """The gaps among ``columns``, or one that is added as a difference, and the two columns that it is taken from."""
    gaps = [gap for gap in GAPS if gap in columns]
    if gaps:
        return gaps, []
    for gap, first, second in DIFFERENCES:
        if first in columns and second in columns:
            columns[gap] = _difference(columns[first], columns[second])
            return [gap], [first, second]
    raise DataError(
        f"{source} has no column error_gap (test error − train error) or ce_gap; it has: {', '.join(columns)}"
    )


def _difference(first: Numbers, second: Numbers) -> Numbers:
    """Rounded to 12 digits after the point, so that differences of equal sizes stay equal."""
    return Numbers((first.values - second.values).round(12), {}, {**second.missing, **first.missing})


def _measures(free: Sequence[str], columns: Mapping[str, Numbers]) -> list[str]:
    """The columns taken unasked: those that bear a measure's name, or else all that may be one and hold numbers."""
    known = [name for name in KNOWN_MEASURES if name in free]
    if not any("_" in name for name in known):  # a plain word, such as energy, may mean something else
        known = []
    return known or [name for name in free if may_be_measure(name) and not columns[name].text]


def _require_numbers(
    names: Sequence[str], columns: Mapping[str, Numbers], places: pd.Series, source: Path
) -> None:
    for name in names:
        for row, cell in columns[name].text.items():
            remedy = "which is not a number"
            if ambiguous(cell):
                remedy = "whose comma may mark decimals or thousands. Write it with a decimal point"
            raise DataError(f"{source} column {name!r} row {int(places.iloc[row])} holds {cell!r}, {remedy}")


def _said(sheet: _Sheet, columns: Mapping[str, Numbers], used: Sequence[str]) -> list[str]:
    """How the table is written, in words; nothing of plain CSV."""
    commas = unique(name for name in used if columns[name].decimal == COMMA)
    written = [*sheet.written, *([f"with decimal commas in {', '.join(commas)}"] if commas else [])]
    return [f"the table was read {', '.join(written)}"] if written else []


def _finished(
    raw: pd.DataFrame, source: Path, converged_only: bool
) -> tuple[pd.DataFrame, tuple[Exclusion, ...], list[str]]:
    """The rows that may enter, with their number in ``ROW``; the others; and a note on those that missed their stop."""
    raw = raw.assign(**{ROW: range(1, len(raw) + 1)})
    reasons: dict[int, str] = {}
    for name in filter(is_status, raw.columns):
        reasons |= unfinished(raw[name].to_list())
    if converged_only and MET_STOP not in raw:
        raise UsageError(
            f"--converged-only: {source} has no column {MET_STOP}, so it does not say which runs "
            "converged. Give run folders, or a table that `gmprobe collect` wrote"
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
    """Names of the runs: of the column ``run``, or of another that names each run apart, or else row numbers."""
    for wanted in NAMES:
        for name in raw:
            if key(str(name)) == wanted:
                cells = raw[name].map(lambda cell: str(cell).strip())
                if name == "run" or (cells.is_unique and not cells.str.lower().isin(NO_VALUE).any()):
                    return cells.map(printable)
    return raw[ROW].map(lambda row: f"row {row}")


def _settings(column: Numbers, cells: pd.Series) -> pd.Series:
    """A hyperparameter's cells: numbers where all of them are, else text; None where there is no value."""
    numeric = not column.text and not {"not finite", TOO_LARGE} & set(column.missing.values())
    values = column.values.tolist() if numeric else [str(cell).strip() for cell in cells]
    unset = {row for row, reason in column.missing.items() if reason == "no value"}
    return pd.Series([None if row in unset else value for row, value in enumerate(values)], dtype=object)


def _read_csv(path: Path) -> tuple[pd.DataFrame, tuple[str, ...]]:
    """All cells as text, so that what is a number and what is missing is decided above and not guessed."""
    found = read_delimited(path)
    table = pd.DataFrame(found.rows, columns=range(len(found.header)), dtype=object)
    table.columns = pd.Index(found.header)
    return table, found.written


def _read_parquet(path: Path) -> tuple[pd.DataFrame, tuple[str, ...]]:
    try:
        table = _parquet_frame(path)
    except ImportError as error:
        raise UsageError(f"reading {path} needs pyarrow; pip install 'gm_probe[parquet]'") from error
    except OSError as error:
        raise StorageError(f"cannot read {path}: {error.strerror or error}") from error
    except ValueError as error:  # pyarrow's ArrowInvalid is a ValueError
        raise DataError(f"{path} is not a readable Parquet file: {str(error).strip()}") from error
    table.columns = pd.Index([str(name).strip() for name in table.columns])
    return table.reset_index(drop=True), ()


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
        require_fit(path, -(-cells // max(meta.num_columns, 1)), meta.num_columns)
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


READERS: dict[str, Callable[[Path], tuple[pd.DataFrame, tuple[str, ...]]]] = {
    ".csv": _read_csv,
    ".tsv": _read_csv,
    ".parquet": _read_parquet,
}
"""By the suffix of a file: its cells, and how they are written where that is not plain."""
