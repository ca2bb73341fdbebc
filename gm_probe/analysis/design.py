"""What the hyperparameters say of each run: its setting, its cell when one of them changes alone, its strata."""

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from gm_probe.analysis.run_pairs import Floats, Integers
from gm_probe.tables.table import ACCURACIES, BOOKKEEPING, SEED, RunTable, require_known, show

Cells = tuple[Integers, Integers]
"""(n,) which cell each run of the table is in, and (n,) which value of the hyperparameter it has."""
CONTROLS = ("train_ce", "hessian_lambda_max", "parameter_norm")
"""The default controls of partial τ, where the table has them, besides each hyperparameter."""
SETTING = "setting"
"""Name of the group of runs that agree in all hyperparameters."""


@dataclass(frozen=True, slots=True)
class Design:
    """What the hyperparameters say of each run of the table (n,): its setting, cells and strata.

    ``seed`` numbers the seeds, −1 where unknown; None where the table has none, or takes them for a measure.
    """

    setting: Integers
    seed: Integers | None
    cells: Mapping[str, Cells]
    strata: Mapping[str, Integers]

    @property
    def values(self) -> dict[str, Integers]:
        """Return the value of each hyperparameter that varies, as numbers from 0 (n,)."""
        return {name: value for name, (_, value) in self.cells.items()}


def design_of(table: RunTable, group_by: Sequence[str] = ()) -> Design:
    """Return the design of ``table``; the hyperparameters of ``group_by`` together form strata, too."""
    values = {name: group_numbers(table, [name]) for name in setting_names(table)}
    values = {name: numbers for name, numbers in values.items() if numbers.max(initial=0) > 0}
    cells = {
        name: (group_numbers(table, [other for other in values if other != name]), numbers)
        for name, numbers in values.items()
    }
    strata = dict(values)
    if group_by and ", ".join(group_by) not in strata:
        strata[", ".join(group_by)] = group_numbers(table, group_by)
    setting = setting_numbers(table)
    return Design(setting, seed_numbers(table), cells, {**strata, SETTING: setting})


def control_columns(
    table: RunTable, controls: Sequence[str], usual: Sequence[str]
) -> dict[str, Floats | str]:
    """Return the columns that partial τ is taken given, as numbers, or why there are none.

    Empty ``controls`` takes ``CONTROLS`` where the table has them, and the hyperparameters ``usual``.
    """
    return {
        name: _control(table, name)
        for name in controls or [*(name for name in CONTROLS if name in table.frame), *usual]
    }


def _control(table: RunTable, name: str) -> Floats | str:
    """Return a column as numbers, a text with two values as 0 and 1; or why there are none."""
    numbers = numbers_of(table, name)
    assert numbers is not None
    values = [value for value in table.frame[name] if value is not None]
    if not any(isinstance(value, str) for value in values):
        return numbers
    kinds = sorted(set(map(show, values)))
    if len(kinds) > 2:
        return f"text with {len(kinds)} values has no order. See τ within its groups"
    return np.array([math.nan if value is None else kinds.index(show(value)) for value in table.frame[name]])


def target_column(table: RunTable, name: str) -> Floats:
    """Return a target (n,), NaN where unknown: a column of the table, or 1 − an error.

    Raises:
        UsageError: the table has no such column, or it is a measure or a setting.
    """
    known = [*table.gaps, *table.outcomes]
    known += [name for name, error in ACCURACIES.items() if error in known and name not in known]
    require_known([name], known, "target")
    column = numbers_of(table, name)
    return 1 - np.asarray(numbers_of(table, ACCURACIES[name])) if column is None else column


def group_rows(table: RunTable, group_by: Sequence[str]) -> dict[str, np.ndarray]:
    """Return the row numbers of each subgroup under its label, such as ``augment=true, weight_decay=0.0005``.

    Subgroups are in the order of their values, numbers as numbers; a setting that a run lacks reads ``unset``.

    Raises:
        UsageError: a name that is not a hyperparameter of the table.
    """
    require_known(group_by, table.hyperparameters, "hyperparameter to group by named")
    rows: dict[str, list[int]] = {}
    order: dict[str, list[tuple[int, float, str]]] = {}
    settings = [table.frame[name].to_list() for name in group_by]
    for row, values in enumerate(zip(*settings, strict=True)):
        shown = [show(value) for value in values]
        label = ", ".join(f"{name}={text}" for name, text in zip(group_by, shown, strict=True))
        rows.setdefault(label, []).append(row)
        order[label] = [_sort_key(value, text) for value, text in zip(values, shown, strict=True)]
    return {label: np.array(rows[label]) for label in sorted(rows, key=order.__getitem__)}


def _sort_key(value: object, text: str) -> tuple[int, float, str]:
    return (0, float(value), "") if isinstance(value, int | float) else (1, 0.0, text)


def setting_numbers(table: RunTable) -> Integers:
    """Return (n,) numbers, equal where all hyperparameters are; all different where there is no hyperparameter.

    Seeds and other bookkeeping tell no settings apart.
    """
    names = setting_names(table)
    return group_numbers(table, names) if names else np.arange(table.num_runs)


def seed_numbers(table: RunTable) -> Integers | None:
    """Return (n,) numbers, equal where the seeds are, −1 where a run has none; None where the table has no seeds."""
    if SEED not in table.frame or SEED in table.measures:
        return None
    unknown = table.frame[SEED].isna().to_numpy()
    return np.where(unknown, -1, group_numbers(table, [SEED]))


def setting_names(table: RunTable) -> list[str]:
    """Return the hyperparameters that make a setting."""
    return [name for name in table.hyperparameters if name not in BOOKKEEPING]


def group_numbers(table: RunTable, names: Sequence[str]) -> Integers:
    """Return (n,) numbers from 0 by first appearance, equal where the hyperparameters ``names`` are."""
    seen: dict[Hashable, int] = {}
    columns = [map(_hashable, table.frame[name]) for name in names]
    values = zip(*columns, strict=True) if names else [()] * table.num_runs
    return np.array([seen.setdefault(each, len(seen)) for each in values], np.int64)


def numbers_of(table: RunTable, name: str) -> Floats | None:
    """Return a column (n,) as floats, NaN where it has no number; None where the table has no such column."""
    if name not in table.frame:
        return None
    return pd.to_numeric(table.frame[name], errors="coerce").to_numpy(dtype=float, na_value=np.nan)


def _hashable(value: object) -> Hashable:
    return (isinstance(value, bool), value)  # True is not 1
