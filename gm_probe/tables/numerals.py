"""Read the cells of a table as numbers, in the notation that its columns are written in."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import pandas as pd

from gm_probe.tables.table import LARGEST, TOO_LARGE

# fmt: off
NO_VALUE = frozenset((
    "", "-", "na", "n/a", "nan", "nat", "null", "none", "<na>",
    "#n/a", "#na", "#nv", "#div/0!", "#value!", "#num!", "#ref!",  # what Excel shows in place of a number
))
# fmt: on
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
    """``cell`` as a float, rounded correctly; NaN where it is no number.

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
    cells = {name: pd.Series([str(cell).strip() for cell in column], dtype=object)
             for name, column in columns.items()}  # fmt: skip
    shown = {name: _shown(column) for name, column in cells.items()}
    certain = set().union(*shown.values()) - {""}
    common = certain.pop() if len(certain) == 1 else ""
    return {name: _read(column, _decimal(shown[name], common)) for name, column in cells.items()}


def _shown(cells: pd.Series) -> set[str]:
    """The decimal marks that ``cells`` show beyond doubt, and "" where a cell may be read in two ways."""
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
    """The mark that a column has ``shown``; "" where its cells may be read in two ways and ``common`` is no help."""
    certain = shown - {""}
    if len(certain) == 1:
        return next(iter(certain))
    return POINT if certain or not shown else common


def _read(cells: pd.Series, decimal: str) -> Numbers:
    empty = cells.str.lower().isin(NO_VALUE)
    read = [math.nan if gone else _either(cell, decimal) for cell, gone in zip(cells, empty, strict=True)]
    values = pd.Series(read, dtype=float)
    wrong = values.isna() & ~empty
    infinite = values.isin([math.inf, -math.inf])
    large = (values.abs() > LARGEST) & ~infinite
    missing = dict.fromkeys(cells.index[empty].tolist(), "no value")
    missing |= dict.fromkeys(cells.index[infinite].tolist(), "not finite")
    missing |= dict.fromkeys(cells.index[large].tolist(), TOO_LARGE)
    text = dict(zip(cells.index[wrong].tolist(), cells[wrong].tolist(), strict=True))
    return Numbers(values.mask(infinite | large), text, missing, decimal or POINT)


def _either(cell: str, decimal: str) -> float:
    """``cell`` by its decimal mark; without one, 1.234 has a decimal point, and 1,234 is ambiguous."""
    if decimal:
        return number(cell, decimal)
    point, comma = number(cell, POINT), number(cell, COMMA)
    return point if point == comma or COMMA not in cell else math.nan


def ambiguous(cell: str) -> bool:
    """Whether ``cell`` is one number with a decimal point, and another with a decimal comma."""
    point, comma = number(cell, POINT), number(cell, COMMA)
    return not (math.isnan(point) or math.isnan(comma)) and point != comma
