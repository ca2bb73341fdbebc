"""Read one file of many runs into cells: text tables, JSON, Parquet, and the dicts that trackers write into cells."""

from __future__ import annotations

import ast
import json
import math
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd

from gm_probe.errors import DataError, foreign_or, needs, printable
from gm_probe.files.regular import read_at_most
from gm_probe.files.schema import LONGEST_TEXT, Unfit, bounded
from gm_probe.tables import trackers
from gm_probe.tables.columns import key
from gm_probe.tables.delimited import MOST_BYTES, decoded, read_delimited, require_size
from gm_probe.tables.numerals import NO_VALUE

MOST_JSON = 2**28
"""Most bytes of a JSON file; its objects take about ten times as many."""
LONG = ("measure", "metric", "variable")
"""Names of the column of a long table that names the measure whose ``value`` is in the row."""
LONGEST_DICT = 100_000
"""Most characters of a dict in a cell, which holds the settings of one run."""


@dataclass(frozen=True, slots=True)
class RawTable:
    """A table as it was read: its cells by the names of its columns, and in words how it is written."""

    cells: pd.DataFrame
    written: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def read_raw_table(source: Path) -> RawTable:
    """Read ``source``: a file whose suffix is in ``READERS``, or a folder of a tracker.

    Raises:
        UsageError: pyarrow is missing.
        DataError: it is empty, or no such file, or too large, or two columns have the same name.
        StorageError: it cannot be read.
    """
    tracker = trackers.tracker(source) if source.is_dir() else None
    raw_table = of_rows(source, *tracker(source)) if tracker else READERS[source.suffix.lower()](source)
    return tidied(source, raw_table)


def tidied(source: Path, raw_table: RawTable) -> RawTable:
    """Return ``raw_table`` with its dicts as columns of their own, without columns that have neither name nor cells.

    Raises:
        DataError: it has no row, or two columns of one name, or a name with unprintable characters.
    """
    raw = raw_table.cells
    raw.columns = pd.Index([str(name).strip() for name in raw.columns])
    bare = [bool(name == "" and (raw.iloc[:, place] == "").all()) for place, name in enumerate(raw.columns)]
    raw = raw.loc[:, [not gone for gone in bare]]
    names = list(raw.columns)
    repeated = [name for name, times in Counter(names).items() if times > 1]
    if repeated:
        raise DataError(f"{source} has the column {repeated[0]!r} more than once; rename or remove one")
    odd = [name for name in names if not name.isprintable()]
    if odd:
        raise DataError(f"{source} has the column {odd[0]!r}, with unprintable characters; rename it")
    if raw.empty:
        raise DataError(f"{source} has a header but no run below it")
    dicts = [name for name in names if _holds_dicts(raw[name])]
    if not dicts:
        return _one_row_a_run(source, replace(raw_table, cells=raw.reset_index(drop=True)))
    rows: list[dict[str, Any]] = []
    unread = 0
    for record in raw.to_dict("records"):
        read = {name: _literal(str(record[name])) for name in dicts}
        unread += sum(value is None and _filled(record[name]) for name, value in read.items())
        rows.append({str(name): value for name, value in record.items() if name not in dicts} | read)
    told = f"{unread} cells of {', '.join(dicts)} hold no readable dict; they count as empty"
    found = of_rows(source, rows, (*raw_table.notes, *([told] if unread else [])))
    return tidied(source, replace(found, written=raw_table.written))


def _one_row_a_run(source: Path, raw_table: RawTable) -> RawTable:
    """Return ``raw_table``; of a long table, with a row for each run and measure, one row for each run."""
    raw = raw_table.cells
    names = {key(str(name)): str(name) for name in raw}
    measure, value = next((names[word] for word in LONG if word in names), None), names.get("value")
    if measure is None or value is None or raw[measure].is_unique:
        return raw_table
    others = [name for name in raw if name not in {measure, value}]
    of = raw[measure].map(lambda cell: str(cell).strip()).rename(measure)
    runs = raw.groupby([raw[name].map(str) for name in others] or of, sort=False).ngroup().rename("run")
    if not others or pd.concat([runs, of], axis=1).duplicated().any():
        raise DataError(
            f"{source} has a row for each {measure!r}, and does not tell which rows are one run. Write one row for "
            f"each run, with a column for each {measure}"
        )
    require_size(source, runs.nunique(), len(others) + of.nunique())
    wide = raw[value].groupby([runs, of], sort=False).first().unstack(fill_value="")
    wide = raw[others].groupby(runs, sort=False).nth(0).reset_index(drop=True).join(wide)
    note = f"the {len(raw)} rows were read as {len(wide)} runs, with a column for each {measure}"
    return tidied(source, replace(raw_table, cells=wide, notes=(*raw_table.notes, note)))


def of_rows(source: Path, rows: Sequence[Mapping[str, Any]], notes: Iterable[str]) -> RawTable:
    """Return one row per mapping. A nested mapping becomes columns NAME.KEY; lists are left out and counted."""
    if not rows:
        raise DataError(f"{source} holds no run")
    lists: dict[str, None] = {}
    flat = [dict(_flat(row, "", lists)) for row in rows]
    names = list(dict.fromkeys(name for row in flat for name in row))
    require_size(source, len(flat), len(names))
    note = [f"{len(lists)} columns hold lists and are left out"] if lists else []
    return RawTable(pd.DataFrame(flat, columns=names, dtype=object), (), (*notes, *note))


def _flat(row: Mapping[str, Any], prefix: str, lists: dict[str, None]) -> Iterator[tuple[str, Any]]:
    for inner, value in row.items():
        name = f"{prefix}{inner}"
        if isinstance(value, Mapping):
            yield from _flat(value, f"{name}.", lists)
        elif isinstance(value, list | tuple):
            lists[name] = None
        else:
            yield name, value


# ---- dicts in cells, as str() or JSON writes them

_WORDS = {"nan": math.nan, "NaN": math.nan, "inf": math.inf, "Infinity": math.inf, "null": None, "true": True,
          "false": False}  # fmt: skip


def _filled(cell: object) -> bool:
    return str(cell).strip().lower() not in NO_VALUE


def _holds_dicts(cells: pd.Series) -> bool:
    """Whether some cells are dicts and the others are empty."""
    texts = [text for cell in cells if _filled(text := str(cell).strip())]
    return bool(texts) and all(text[0] == "{" and text[-1] == "}" for text in texts)


def _literal(text: str) -> dict[str, Any] | None:
    """Return the dict that ``text`` writes in Python or JSON; None where it writes none, or one beyond all bounds."""
    if len(text) > LONGEST_DICT:
        return None
    try:
        with warnings.catch_warnings(action="ignore"):  # of odd escapes
            value = ast.literal_eval(_Plain().visit(ast.parse(text.strip(), mode="eval")))
        bounded(value)
    except (SyntaxError, ValueError, TypeError, MemoryError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


class _Plain(ast.NodeTransformer):
    """Replace words such as nan by the constants that they stand for, and tuples and sets by lists."""

    def visit_Name(self, node: ast.Name) -> ast.AST:
        return ast.Constant(_WORDS[node.id]) if node.id in _WORDS else node

    def visit_Dict(self, node: ast.Dict) -> ast.AST:
        keys = [
            ast.Constant(str(name.value)) if isinstance(name, ast.Constant) else name for name in node.keys
        ]
        return self.generic_visit(ast.Dict(keys, node.values))

    def visit_Tuple(self, node: ast.Tuple | ast.Set) -> ast.AST:
        return ast.List([self.visit(each) for each in node.elts], ast.Load())

    visit_Set = visit_Tuple


# ---- files


def _delimited(path: Path) -> RawTable:
    """Read all cells as text, so that no reader guesses what is a number or missing."""
    found = read_delimited(path)
    table = pd.DataFrame(found.rows, columns=range(len(found.header)), dtype=object)
    table.columns = pd.Index(found.header)
    return RawTable(table, found.written)


def _json(path: Path) -> RawTable:
    """Read one object per line, or a list of objects."""
    data = read_at_most(path, MOST_JSON, follow=True)
    if data is None:
        raise DataError(f"{path} has more than {MOST_JSON:,} bytes; keep fewer runs or columns")
    text, encoding = decoded(data, path, "JSON file")
    listed = text.lstrip().startswith("[")
    lines = [text] if listed else text.split("\n")
    rows: list[Any] = []
    for num, line in enumerate(lines, 1):
        where = str(path) if listed else f"{path} line {num}"
        if not line.strip():
            continue
        try:
            value = json.loads(line)
            bounded(value)
            value = _by_rows(value)
        except Unfit as error:
            raise DataError(f"{where}: {error}") from error
        except (ValueError, RecursionError) as error:
            raise DataError(
                f"{where} is not valid JSON: {printable(str(error))}. Write one object per line, or a list of objects"
            ) from error
        rows += value if isinstance(value, list) else [value]
    wrong = next((place for place, row in enumerate(rows, 1) if not isinstance(row, dict)), None)
    if wrong or not rows:
        raise DataError(
            f"{path} {f'entry {wrong} is no object' if wrong else 'is empty'}; it needs one object per run"
        )
    return replace(of_rows(path, rows, []), written=() if encoding == "UTF-8" else (f"as {encoding}",))


def _by_rows(value: Any) -> Any:
    """Return ``value``; of columns (lists of one length, or pandas' mappings from row numbers) a list of rows."""
    if not isinstance(value, dict) or not value:
        return value
    columns = list(value.values())
    if all(
        isinstance(column, dict) and [*column] == list(map(str, range(len(column)))) for column in columns
    ):
        columns = [[*column.values()] for column in columns]
    lengths = {len(column) if isinstance(column, list) else 0 for column in columns}
    if len(lengths) > 1 or lengths == {0}:
        return value
    return [dict(zip(value, row, strict=True)) for row in zip(*columns, strict=True)]


def _parquet(path: Path) -> RawTable:
    with needs(f"reading {path}", "pyarrow", "parquet"):
        import pyarrow.parquet  # noqa: F401
    with foreign_or(lambda why: DataError(f"{path} is not a readable Parquet file: {printable(why)}")):
        return RawTable(_parquet_frame(path))


def _parquet_frame(path: Path) -> pd.DataFrame:
    """Read ``path`` with its texts as dictionaries: a file may name one long text in a million rows."""
    from pyarrow import parquet, types  # an extra

    with parquet.ParquetFile(path) as file:
        meta = file.metadata
        groups = [meta.row_group(index) for index in range(meta.num_row_groups)]
        chunks = [group.column(index) for group in groups for index in range(group.num_columns)]
        values = sum(chunk.num_values for chunk in chunks)  # a list in a cell counts as many
        num_rows = max(meta.num_rows, -(-values // max(meta.num_columns, 1)))
        require_size(path, num_rows, meta.num_columns)
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


def _database(path: Path) -> RawTable:
    return of_rows(path, *trackers.mlflow_database(path))


READERS: dict[str, Callable[[Path], RawTable]] = {
    **dict.fromkeys((".csv", ".tsv"), _delimited),
    **dict.fromkeys((".jsonl", ".ndjson", ".json"), _json),
    **dict.fromkeys(trackers.DATABASES, _database),
    ".parquet": _parquet,
}
"""How a file is read, by its suffix."""
