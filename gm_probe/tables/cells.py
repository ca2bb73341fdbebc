"""Cells of a CSV that somebody may open in a spreadsheet program. Imports no torch."""

from typing import Any

from gm_probe.errors import printable

FORMULA = ("=", "+", "-", "@", "＝", "＋", "－", "＠")
"""What a text begins with that spreadsheet programs run, in ASCII and full width."""


def cell(value: Any) -> Any:
    """Return ``value`` as a CSV may hold it: a text on one line, with an apostrophe where it would run as a formula."""
    if not isinstance(value, str):
        return value
    text = printable(value)
    return f"'{text}" if text.lstrip().startswith(FORMULA) else text
