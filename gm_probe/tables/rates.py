"""Error rates and accuracies of a table: fractions of examples, whether it writes them as fractions or in percent."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pandas as pd

from gm_probe.errors import DataError
from gm_probe.tables.columns import RATES, in_percent, key
from gm_probe.tables.numerals import Numbers
from gm_probe.tables.table import ACCURACIES, few

GAP = "error_gap"
DIFFERENCES = (
    ("error_gap", ("test_error", "train_error")),
    ("ce_gap", ("test_ce", "train_ce")),
    ("ce_gap", ("test_loss", "train_loss")),
)


def is_rate(name: str) -> bool:
    """Return whether a column ``name`` is an error rate, an accuracy, or their gap, or a difference of such columns."""
    return all(key(part) in {*RATES, GAP} for part in name.split(" - "))


def as_fractions(
    columns: Mapping[str, Numbers], raw: pd.DataFrame, source: Path, written: Mapping[str, str]
) -> tuple[dict[str, Numbers], list[str]]:
    """Return ``columns`` with each rate as a fraction, and what was done in words.

    A table has one unit: where one rate is beyond 1, all are percentages, but those that say so by a ``%`` in their
    cells. What is no percentage either stays as it is. ``written`` are the columns' names in the file, which may say
    that a column is in percent.

    Raises:
        DataError: one rate is a percentage, and another is a fraction.
    """
    rates = {
        name: column for name, column in columns.items() if is_rate(name) and column.values.notna().any()
    }
    largest = {name: float(column.values.abs().max()) for name, column in rates.items()}
    beyond = [name for name in rates if largest[name] > 1]
    odd = [
        name for name in beyond if largest[name] > 100 or (key(name) != GAP and rates[name].values.min() < 0)
    ]
    if odd:
        return dict(columns), [
            f"values that are neither fractions nor percentages were left as they are: {few(odd)}"
        ]
    marked = {name for name in rates if raw[name].map(lambda cell: str(cell).strip().endswith("%")).any()}
    unmarked = [name for name in rates if name not in marked]
    percent = [name for name in unmarked if in_percent(written.get(name, name))]
    if beyond := [name for name in beyond if name in unmarked and name not in percent]:
        percent, others = unmarked, [name for name in unmarked if name not in beyond]
        gap_alone = beyond == [GAP]
        fractions = [name for name in others if gap_alone or key(name).endswith("accuracy")]
        if fractions:
            raise DataError(
                f"{source} has {beyond[0]!r} in percent (up to {largest[beyond[0]]:g}) and {fractions[0]!r} as a "
                f"fraction (up to {largest[fractions[0]]:g}). Write both in one unit"
            )
    found = {name: replace(rates[name], values=rates[name].values / 100) for name in percent}
    note = f"values were read as percentages{', because some are above 1' * bool(beyond)}: {few(percent)}"
    return {**columns, **found}, [note] if percent else []


def require_differences(source: Path, columns: Mapping[str, Numbers]) -> None:
    """Raise DataError where a gap is that of two other columns in another unit, or with the sign turned.

    Other differences from them may be right: a training error can be taken with augmentation or during the training.
    """
    for gap, parts in DIFFERENCES:
        if not {gap, *parts} <= columns.keys():
            continue
        found, test, train = (columns[name].values for name in (gap, *parts))
        true = test - train
        typical = true.abs().median()
        for factor in (-1, 100, -100, 0.01, -0.01):
            if (found - factor * true).abs().median() <= 0.02 * abs(factor) * typical > 0:
                raise DataError(
                    f"{source} column {gap!r} is {factor:g} times {' − '.join(parts)}. Remove it, or write it as that "
                    "difference"
                )


def errors_of_accuracies(columns: Mapping[str, Numbers]) -> dict[str, Numbers]:
    """Return the error rates that ``columns`` lack and have accuracies for."""
    return {
        error: replace(columns[accuracy], values=(1 - columns[accuracy].values).round(12))
        for accuracy, error in ACCURACIES.items()
        if accuracy in columns and error not in columns
    }
