"""Read a text table as spreadsheets, trackers and scripts write it: its encoding, its separator, its rows."""

from __future__ import annotations

import codecs
import csv
import io
import re
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from gm_probe.errors import DataError
from gm_probe.files.regular import read_at_most

SEPARATORS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "bars"}
BOMS = {  # UTF-32 first: its mark begins as that of UTF-16
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
WINDOWS = "cp1252"
_NAMED_SEPARATOR = re.compile(r'\s*"?sep=([^\r\n])"?[,;\t|]*[^\S\r\n]*(?:\r\n|\r|\n|$)', re.IGNORECASE)
"""The first line by which Excel is told the separator."""
_SAMPLE = 200  # rows that choose the separator
MOST_COLUMNS, MOST_CELLS, MOST_BYTES = 5000, 10**7, 2**30
"""Limits of a file; thirty thousand runs with three hundred columns are below them."""


def require_size(path: Path, num_rows: int, num_columns: int) -> None:
    """Raise DataError where a table is larger than any table of runs, before it is read."""
    if num_columns > MOST_COLUMNS or num_rows * num_columns > MOST_CELLS:
        raise DataError(
            f"{path} has {num_rows:,} rows and {num_columns:,} columns; a table of runs may have "
            f"{MOST_COLUMNS:,} columns and {MOST_CELLS:,} cells; keep one row per run, and only the "
            "columns that you need"
        )


@dataclass(frozen=True, slots=True)
class Delimited:
    """The header and the rows of a text table, and in words how it was written where that is not plain CSV."""

    header: list[str]
    rows: list[list[str]]
    written: tuple[str, ...]


def read_delimited(path: Path, *, follow: bool = True) -> Delimited:
    """Read ``path``: UTF-8, UTF-16 or UTF-32, else Windows-1252; separated by commas, semicolons, tabs or bars.

    A first line ``sep=;`` names the separator. Blank rows are passed over; a row shorter than the header is filled.

    Args:
        follow: also read what a link leads to, as for a file that the user names.

    Raises:
        StorageError: the file cannot be read.
        DataError: it is empty, no text, or its rows do not fit its header.
    """
    data = read_at_most(path, MOST_BYTES, follow=follow)
    if data is None:
        raise DataError(f"{path} has more than {MOST_BYTES:,} bytes; keep fewer rows or columns")
    text, encoding = decoded(data, path, "CSV")
    try:
        separator, text = _separator(text)
        header, rows = _rows(text, separator, path)
    except csv.Error as error:
        raise DataError(f"{path} is not a readable CSV: {error}") from error
    written = [] if encoding == "UTF-8" else [f"as {encoding}"]
    written += [] if separator == "," else [f"separated by {SEPARATORS.get(separator, repr(separator))}"]
    return Delimited(header, rows, tuple(written))


def decoded(data: bytes, path: Path, kind: str) -> tuple[str, str]:
    """Return the text of ``data``, and the name of its encoding."""
    try:
        for mark, codec in BOMS.items():
            if data.startswith(mark):
                return data.decode(codec), codec.upper().removesuffix("-SIG")
        few = data[:4096]
        for codec, nulls in (("utf-16-le", few[1::2]), ("utf-16-be", few[::2])):
            if nulls and 4 * nulls.count(0) > len(nulls):  # Latin letters have a zero byte each
                return data.decode(codec), "UTF-16"
        if b"\0" in data:
            raise DataError(f"{path} is not a readable {kind}: it contains bytes that are not text")
        try:
            return data.decode("utf-8"), "UTF-8"
        except UnicodeDecodeError:
            return data.decode(WINDOWS), "Windows-1252"
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not a readable {kind}: {error}; save it as UTF-8") from error


def _separator(text: str) -> tuple[str, str]:
    """Return the separator, and ``text`` without a first line that names it.

    It is the one by which most rows have as many cells as the header; of several the one of the most cells.
    """
    named = _NAMED_SEPARATOR.match(text)
    if named:
        return named[1], text[named.end() :]
    best, separator = (0.0, 1), ","
    for candidate in SEPARATORS:
        sample = [row for row in islice(_reader(text, candidate, strict=False), _SAMPLE) if any(row)]
        width = len(sample[0]) if sample else 0
        if width > 1:
            agreement = sum(len(row) == width for row in sample) / len(sample)
            if (agreement, width) > best:
                best, separator = (agreement, width), candidate
    return separator, text


def _reader(text: str, separator: str, *, strict: bool = True):  # type: ignore[no-untyped-def]  # csv names no type
    return csv.reader(
        io.StringIO(text, newline=""), delimiter=separator, skipinitialspace=True, strict=strict
    )


def _rows(text: str, separator: str, path: Path) -> tuple[list[str], list[list[str]]]:
    header: list[str] = []
    rows: list[list[str]] = []
    reader = _reader(text, separator)
    for cells in reader:
        row = [cell.strip() for cell in cells]
        if not any(row):
            continue
        if not header:
            header = row
            require_size(path, text.count("\n") + text.count("\r"), len(header))  # short rows are filled
            continue
        if any(row[len(header) :]):
            raise DataError(
                f"{path} is not a readable CSV: line {reader.line_num} has {len(row)} cells, but the header has "
                f"{len(header)}; quote cells that hold a {separator!r}"
            )
        rows.append([*row[: len(header)], *[""] * (len(header) - len(row))])
    if not header:
        raise DataError(f"{path} is empty; it needs a header line and one line per run")
    return header, rows
