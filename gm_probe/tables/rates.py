"""Error rates and accuracies of a table: fractions of examples, whether it writes them as fractions or in percent."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pandas as pd

from gm_probe.errors import DataError
from gm_probe.tables.columns import RATES, key
from gm_probe.tables.numerals import Numbers
from gm_probe.tables.table import ACCURACIES, few

GAP = "error_gap"


def is_rate(name: str) -> bool:
    """Return whether a column ``name`` is an error rate, an accuracy, or their gap, or a difference of such columns."""
    return all(key(part) in {*RATES, GAP} for part in name.split(" - "))


def as_fractions(
    columns: Mapping[str, Numbers], raw: pd.DataFrame, source: Path
) -> tuple[dict[str, Numbers], list[str]]:
    """Return ``columns`` with each rate as a fraction, and what was done in words.

    A table has one unit: where one error rate or accuracy is beyond 1, all are percentages, but those that say so by a
    ``%``. What is no percentage either stays as it is.

    Raises:
        DataError: one accuracy is a percentage, and another is a fraction.
    """
    rates = {
        name: column for name, column in columns.items() if is_rate(name) and column.values.notna().any()
    }
    largest = {name: float(column.values.max()) for name, column in rates.items()}
    beyond = [name for name in rates if largest[name] > 1 and key(name) != GAP]
    odd = [name for name in beyond if rates[name].values.min() < 0 or largest[name] > 100]
    if odd:
        return dict(columns), [
            f"values that are neither fractions nor percentages were left as they are: {few(odd)}"
        ]
    marked = {name for name in rates if raw[name].map(lambda cell: str(cell).strip().endswith("%")).any()}
    percent = [name for name in rates if name not in marked]
    if not set(beyond).intersection(percent):
        return dict(columns), []
    fractions = [name for name in percent if name not in beyond and key(name).endswith("accuracy")]
    if fractions:
        raise DataError(
            f"{source} has {beyond[0]!r} in percent (up to {largest[beyond[0]]:g}) and {fractions[0]!r} as a fraction "
            f"(up to {largest[fractions[0]]:g}). Write both in one unit"
        )
    found = {name: replace(rates[name], values=rates[name].values / 100) for name in percent}
    return {**columns, **found}, [
        f"values were read as percentages, because some are above 1: {few(percent)}"
    ]


def errors_of_accuracies(columns: Mapping[str, Numbers]) -> dict[str, Numbers]:
    """Return the error rates that ``columns`` lack and have accuracies for."""
    return {
        error: replace(columns[accuracy], values=(1 - columns[accuracy].values).round(12))
        for accuracy, error in ACCURACIES.items()
        if accuracy in columns and error not in columns
    }
