"""Cells of a CSV that somebody may open in a spreadsheet program. Imports no torch."""

from typing import Any

FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n", "＝", "＋", "－", "＠")
"""What a text begins with that spreadsheet programs run, in ASCII and full width."""


def no_formula(value: Any) -> Any:
    """Return ``value``, with an apostrophe before a text that a spreadsheet program would run as a formula."""
    return f"'{value}" if isinstance(value, str) and value.startswith(FORMULA) else value
