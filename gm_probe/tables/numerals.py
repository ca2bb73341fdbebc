"""Read the cells of a table as numbers, in the notation that its columns are written in."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from gm_probe.tables.table import LARGEST, TOO_LARGE

# fmt: off
NO_VALUE = frozenset((
    "", "-", "na", "n/a", "nan", "nat", "null", "none", "<na>",
    "#n/a", "#na", "#nv", "#div/0!", "#value!", "#num!", "#ref!",  # what Excel shows in place of a number
))
# fmt: on
NOTHING = "no value"
POINT, COMMA = ".", ","
_SPACES = " \N{NO-BREAK SPACE}\N{NARROW NO-BREAK SPACE}\N{THIN SPACE}'\N{RIGHT SINGLE QUOTATION MARK}"
_GROUPED = {
    mark: re.compile(
        rf"[+-]?[1-9]\d{{0,2}}(?:([{re.escape(groups)}])\d{{3}}(?:\1\d{{3}})*)(?:{re.escape(mark)}\d*)?(?:[eE][+-]?\d+)?",
        re.ASCII,
    )
    for mark, groups in ((POINT, COMMA + _SPACES), (COMMA, POINT + _SPACES))
}
"""Numbers whose thousands are set apart, by the decimal mark."""


@dataclass(frozen=True, slots=True)
class Numbers:
    """A column as numbers.

    Attributes:
        values: (n,) finite floats, or NaN.
        text: the rows whose cell is no number, with the cell.
        missing: the rows without a finite value, with the reason; those of ``text`` are not among them.
        decimal: the decimal mark.
    """

    values: pd.Series
    text: dict[int, str]
    missing: dict[int, str]
    decimal: str = POINT


def number(cell: str, decimal: str = POINT) -> float:
    """Return ``cell`` as a float, rounded correctly; NaN where it is no number.

    ``9.5%`` is 0.095; thousands may be set apart by spaces, apostrophes, or the mark that is not the decimal one.
    """
    text = cell.strip().replace("\N{MINUS SIGN}", "-")
    if text.endswith("%"):
        return number(text[:-1], decimal) / 100
    if _GROUPED[decimal].fullmatch(text):
        groups = (POINT if decimal == COMMA else COMMA) + _SPACES
        text = "".join(letter for letter in text if letter not in groups)
    if decimal == COMMA:
        if POINT in text:
            return math.nan
        text = text.replace(COMMA, POINT)
    try:
        # Python's own grammar takes more than tables mean
        return float(text) if text.isascii() and "_" not in text else math.nan
    except ValueError:
        return math.nan


def read_numbers(columns: Mapping[str, Sequence[object]]) -> dict[str, Numbers]:
    """Read each of ``columns`` (n,) as numbers with a decimal point or a decimal comma, whichever its cells show.

    A cell like ``1.234`` or ``1,234`` may be read either way. Such a column follows the others; where they do not tell,
    ``1.234`` has a decimal point, and ``1,234`` is no number.
    """
    cells = {name: [str(cell).strip() for cell in column] for name, column in columns.items()}
    shown = {name: _shown(column) for name, column in cells.items()}
    for name, column in columns.items():
        if any(isinstance(cell, float) and math.isfinite(cell) for cell in column):
            shown[name].add(POINT)  # numbers of JSON, Parquet or a DataFrame are not read again
    certain = set().union(*shown.values()) - {""}
    common = certain.pop() if len(certain) == 1 else ""
    return {name: _read(column, _decimal(shown[name], common)) for name, column in cells.items()}


def _shown(cells: Sequence[str]) -> set[str]:
    """Return the decimal marks that ``cells`` show beyond doubt, and "" where a cell may be read in two ways."""
    found: set[str] = set()
    for cell in set(cells):
        if POINT not in cell and COMMA not in cell:
            continue
        point, comma = number(cell, POINT), number(cell, COMMA)
        if math.isnan(point) != math.isnan(comma):
            found.add(COMMA if math.isnan(point) else POINT)
        elif point != comma and not math.isnan(point):
            found.add("")
    return found


def _decimal(shown: set[str], common: str) -> str:
    """Return the mark that a column has ``shown``; "" where it is open and ``common`` is no help."""
    certain = shown - {""}
    if len(certain) == 1:
        return next(iter(certain))
    return POINT if certain or not shown else common


def _read(cells: Sequence[str], decimal: str) -> Numbers:
    text: dict[int, str] = {}
    values = [math.nan] * len(cells)
    for row, cell in enumerate(cells):
        if cell.lower() not in NO_VALUE:
            values[row] = _either(cell, decimal)
            if math.isnan(values[row]):
                text[row] = cell
    found = finite(values)
    missing = {row: reason for row, reason in found.missing.items() if row not in text}
    return Numbers(found.values, text, missing, decimal or POINT)


def finite(values: Sequence[float] | pd.Series) -> Numbers:
    """Return ``values`` (n,) that have a finite square; the others are missing, with the reason."""
    array = np.array(values, dtype=float)
    wrong = ~(np.abs(array) <= LARGEST)
    missing = {
        int(row): NOTHING if np.isnan(array[row]) else "not finite" if np.isinf(array[row]) else TOO_LARGE
        for row in np.flatnonzero(wrong)
    }
    return Numbers(pd.Series(np.where(wrong, math.nan, array)), {}, missing)


def _either(cell: str, decimal: str) -> float:
    """Return ``cell`` by its decimal mark; without one, 1.234 has a decimal point, and 1,234 is ambiguous."""
    if decimal:
        return number(cell, decimal)
    point, comma = number(cell, POINT), number(cell, COMMA)
    return point if point == comma or COMMA not in cell else math.nan


def ambiguous(cell: str) -> bool:
    """Whether ``cell`` is one number with a decimal point, and another with a decimal comma."""
    point, comma = number(cell, POINT), number(cell, COMMA)
    return not (math.isnan(point) or math.isnan(comma)) and point != comma
