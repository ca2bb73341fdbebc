"""Arithmetic on columns, such as ``val_err - train_err``: parsed and checked, never run as code."""

from __future__ import annotations

import ast
import difflib
import math
import operator
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from gm_probe.errors import UsageError
from gm_probe.tables.columns import direction, is_of_training
from gm_probe.tables.numerals import Numbers, finite
from gm_probe.tables.table import ACCURACIES

OPPOSITE = {"worse": "better", "better": "worse"}
LONGEST = 300
"""Most characters of an expression, because it is evaluated by recursion."""
_QUOTED = re.compile(r"`([^`]+)`|\[([^\]]+)\]")
_PART = re.compile(r"(?:`[^`]*`|\[[^\]]*\]|[^,])+")
_NUMBER = r"(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?(?!\w)"
_WORD = re.compile(r"[^\W\d][\w.]*")
_SIGNS: dict[type[ast.AST], Callable[..., Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.USub: operator.neg,
    ast.UAdd: operator.pos,
}


@dataclass(frozen=True, slots=True)
class Expression:
    """``text`` as a ``tree`` whose name ``c0`` is the column ``columns[0]``, and so on."""

    text: str
    columns: tuple[str, ...]
    tree: ast.expr

    def of(self, columns: Mapping[str, Numbers]) -> Numbers:
        """Return the value in each row; a row that lacks a column's value is missing for that column's reason."""
        values = {f"c{place}": columns[name].values for place, name in enumerate(self.columns)}
        with np.errstate(all="ignore"):
            found = finite(pd.Series(_value(self.tree, values), dtype=float))
        missing = {row: why for name in self.columns for row, why in columns[name].missing.items()}
        return Numbers(found.values, {}, found.missing | missing)

    @property
    def direction(self) -> str | None:
        """What a larger value is: ``worse`` or ``better``; None where the columns do not say it, or disagree.

        What was reached on training data does not count beside other columns.
        """
        point = {f"c{place}": 0.5 + place / 64 for place in range(len(self.columns))}
        outcomes = {place: said for place, name in enumerate(self.columns) if (said := direction(name))}
        held_out = {place for place in outcomes if not is_of_training(self.columns[place])}
        found = set()
        with np.errstate(all="ignore"):
            start = _value(self.tree, point)
            for place in held_out or outcomes:
                rises = _value(self.tree, {**point, f"c{place}": point[f"c{place}"] + 1 / 1024}) > start
                found.add(outcomes[place] if rises else OPPOSITE[outcomes[place]])
        return found.pop() if len(found) == 1 else None


def split_expressions(text: str, known: Collection[str]) -> list[str]:
    """Return the expressions of a comma-separated list; commas in a ``known`` or quoted name separate nothing."""
    parts = [text] if text.strip() in known else _PART.findall(text)
    return [part.strip() for part in parts if part.strip()]


def parse(text: str, known: Collection[str]) -> Expression:
    """Read ``text``: names of ``known`` columns, numbers, ``+ - * /`` and parentheses.

    A column's name may stand bare, however odd it is, and in backticks or brackets where it begins with a digit.
    ``test_accuracy`` is 1 − ``test_error`` where there is no such column.

    Raises:
        UsageError: it names no column, or one that is not known, or it is no arithmetic.
    """
    text = text.strip()
    if text in known:
        return Expression(text, (text,), ast.Name("c0"))
    if (error := ACCURACIES.get(text)) in known:
        return Expression(text, (str(error),), ast.parse("1 - c0", mode="eval").body)
    if len(text) > LONGEST:
        raise UsageError(
            f"--gap has {len(text):,} characters, more than {LONGEST}; add the result as a column"
        )
    pieces, columns, place = [], [], 0
    pattern = _pattern(known)
    while place < len(text):
        found = pattern.match(text, place)
        if found is None:
            raise _unknown(text, place, known)
        if name := found["quoted"] or found["bracketed"] or found["bare"]:
            columns.append(name)
            pieces.append(f"c{len(columns) - 1}")
        else:
            pieces.append(found[0])
        place = found.end()
    try:
        tree = ast.parse(" ".join(pieces), mode="eval").body
    except (SyntaxError, MemoryError, RecursionError):
        columns = []
    if not columns or not all(isinstance(node, ast.BinOp | ast.UnaryOp | ast.operator | ast.unaryop | ast.Name
                                         | ast.Constant | ast.expr_context) for node in ast.walk(tree)):  # fmt: skip
        raise UsageError(
            f"--gap {text!r} is no arithmetic on columns. Write column names, numbers, + - * / and parentheses, "
            "such as 'val_err - train_err'"
        )
    return Expression(text, tuple(columns), tree)


def _pattern(known: Collection[str]) -> re.Pattern[str]:
    """Return the pattern of one piece: space, a number, a sign or a column, of several the longest."""
    name = "|".join(map(re.escape, sorted(filter(None, known), key=len, reverse=True))) or "(?!)"
    whole = r"(?!(?<=\w)\w)"  # not followed by the rest of a longer word
    columns = rf"`(?P<quoted>{name})`|\[(?P<bracketed>{name})\]|(?P<bare>{name}){whole}"
    return re.compile(rf"\s+|{_NUMBER}|[-+*/()]|{columns}")


def _unknown(text: str, place: int, known: Collection[str]) -> UsageError:
    quoted = _QUOTED.match(text, place)
    word = quoted or _WORD.match(text, place)
    asked = (word[1] or word[2] if quoted else word[0]) if word else text[place]
    (nearest,) = difflib.get_close_matches(asked, known, 1, cutoff=0) or ["none"]
    return UsageError(f"--gap {text!r}: no column {asked!r}; did you mean {nearest!r}?")


def _value(tree: ast.AST, values: Mapping[str, Any]) -> Any:
    if isinstance(tree, ast.Name):
        return values[tree.id]
    if isinstance(tree, ast.Constant):
        return float(tree.value)  # type: ignore[arg-type]  # digits alone were let pass
    if isinstance(tree, ast.UnaryOp):
        return _SIGNS[type(tree.op)](_value(tree.operand, values))
    assert isinstance(tree, ast.BinOp)
    left, right = _value(tree.left, values), _value(tree.right, values)
    if isinstance(tree.op, ast.Div) and not isinstance(right, pd.Series):
        right = np.float64(right)  # x / 0 is not finite, as within a column
    result = _SIGNS[type(tree.op)](left, right)
    return _steady(result, left, right) if isinstance(tree.op, ast.Add | ast.Sub) else result


def _steady(result: Any, *terms: Any) -> Any:
    """Return the ``result`` of a sum, rounded to 12 digits of its largest term, so that ties stay ties."""
    sizes = [np.abs(np.asarray(term, dtype=float)) for term in terms]
    largest = max((float(size[np.isfinite(size)].max(initial=0.0)) for size in sizes), default=0.0)
    digits = 12 - math.ceil(math.log10(largest)) if largest else 12
    return np.round(result, digits) if abs(digits) < 300 else result
