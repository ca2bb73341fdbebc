"""The parts of a claim, each an expression of a table's columns with the test that decides it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pandas as pd

from gm_probe.analysis.coefficients import kendall
from gm_probe.analysis.intervals import Quantity, mean_interval
from gm_probe.analysis.typeset import two_decimals

ClaimOutcome = Literal["shows", "shows in part", "shows the opposite", "does not show", "cannot be told"]
LEAST = 3
"""Least number of points for a slope."""


@dataclass(frozen=True, slots=True)
class Part:
    """A part of a claim with its numbers; ``sign`` is 1 where it shows, −1 where its opposite does, else 0."""

    text: str
    sign: int


def parts_of(table: pd.DataFrame, test: Mapping[str, Any]) -> Iterator[Part]:
    """Test one part of a claim, for each value of a column ``by``, of the rows ``where``. ``says`` is it in words, and

    - ``value``, ``unit``: a mean over units (a row's mean where it has several rows) lies ``above`` (0) or ``below`` a
      bound, by its 99 % interval;
    - ``slope`` = [y, x], ``unit``: the mean slope of log y by log x is positive, likewise; a slope per unit;
    - ``tau`` = [y, x]: Kendall's τ is positive, by its 95 % interval;
    - ``value``, ``within`` = [low, high]: every row's value, or its ``median``, lies there.
    """
    for label, mine in groups_of(table, test):
        if "tau" in test:
            y, x = (mine[key].to_numpy(float) for key in test["tau"])
            tau = kendall(x, y)
            sign, found = sign_of(tau), shown_tau(tau)
        elif "within" in test:
            values, (low, high) = column(mine, test["value"]), test["within"]
            ends = [values.median()] if test.get("median") else [values.min(), values.max()]
            sign, found = 1 if all(low <= value <= high for value in ends) else -1, spread(values)
        else:
            sign, found = _by_unit(mine, test)
        yield Part(f"{label}{found}", sign)


def _by_unit(mine: pd.DataFrame, test: Mapping[str, Any]) -> tuple[int, str]:
    if "slope" in test:
        units = [rows for _, rows in mine.groupby(test["unit"])]
        if min(map(len, units), default=0) < LEAST:
            return 0, "too few points for a slope"
        logs = [np.log(rows[test["slope"]].to_numpy(float)) for rows in units]
        values = np.array([np.polyfit(points[:, 1], points[:, 0], 1)[0] for points in logs])
    else:
        values = column(mine, test["value"]).groupby(mine[test["unit"]]).mean().to_numpy()
    if len(values) < 2:
        return 0, f"too few {test['unit']}s for an interval"
    mean, low, high = mean_interval(values)
    bound = test.get("below", test.get("above", 0))
    sign = int(low > bound) - int(high < bound)
    return -sign if "below" in test else sign, f"{mean:.3g} (99 % CI {low:.3g} to {high:.3g})".replace(
        "-", "−"
    )


def column(table: pd.DataFrame, expression: str) -> pd.Series:
    """Return ``expression`` of the columns of ``table``, a value per row."""
    found: Any = table.eval(expression)
    return pd.Series(found)


def groups_of(table: pd.DataFrame, test: Mapping[str, Any]) -> Iterator[tuple[str, pd.DataFrame]]:
    """Yield the words for each group of rows that ``test`` is about, and the group, which may be empty."""
    by = test.get("by")
    for label, mine in table.groupby(by, sort=False) if by else [("", table)]:
        name = {"rho": "ρ", "arm": "start", "case": "data"}.get(by or "", by)
        yield (
            test["says"] + (f", {name} = {label}: " if by else ": "),
            mine.query(test["where"]) if "where" in test else mine,
        )


def spread(values: pd.Series) -> str:
    """Return the median of ``values`` and their range, in words."""
    return f"{values.median():.3g} in the median ({values.min():.3g} to {values.max():.3g})".replace("-", "−")


def outcome_of_parts(signs: Sequence[int]) -> ClaimOutcome:
    """Return the outcome of a claim whose parts hold (1), do not hold (−1) or cannot be told (0), each by itself."""
    if signs and all(sign == 1 for sign in signs):
        return "shows"
    if 1 in signs:
        return "shows in part"
    return "does not show" if -1 in signs else "cannot be told"


def outcome_of_tests(signs: Sequence[int]) -> ClaimOutcome:
    """Return the outcome of a claim from the signs of its tests: 1 as claimed, −1 the opposite, 0 cannot be told.

    Each is in both directions at 5 % over their number, so that one chance in twenty is that any is wrong.
    """
    if signs and all(sign == 1 for sign in signs):
        return "shows"
    if -1 in signs:
        return "shows in part" if 1 in signs else "shows the opposite"
    return "cannot be told"


def bonferroni(parts: int) -> str:
    """Return how a claim of so many parts is decided, in words."""
    if parts < 2:
        return "The interval decides, in either direction."
    level = f"{100 * (1 - 0.05 / parts):.4g}"
    return f"The claim has {parts} parts; each is decided, in either direction, by its {level} % interval (Bonferroni)."


def sign_of(found: Quantity, parts: int = 1) -> int:
    """Return the sign of a statistic whose interval at 1 − 5 % / ``parts`` excludes 0 (Bonferroni); else 0."""
    if found.p is None or found.p >= 0.05 / parts:
        return 0
    return 1 if (found.value or 0) > 0 else -1


def shown_tau(tau: Quantity) -> str:
    """Return a τ and its interval, as papers print them."""
    if tau.value is None:
        return "undefined"
    if tau.low is None or tau.high is None:
        return two_decimals(tau.value)
    return f"{two_decimals(tau.value)} ({two_decimals(tau.low)} to {two_decimals(tau.high)})"
