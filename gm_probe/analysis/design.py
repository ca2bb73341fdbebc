"""What the hyperparameters say of each run: its setting, its cell when one of them changes alone, its strata."""

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from gm_probe.analysis.rank import Floats, Integers
from gm_probe.tables.table import BOOKKEEPING, SEED, RunTable, show

Cells = tuple[Integers, Integers]
"""(n,) which cell each run of the table is in, and (n,) which value of the hyperparameter it has."""
CONTROLS = ("train_ce", "hessian_lambda_max", "parameter_norm")
"""What τ is also taken given, where the table has it, besides each hyperparameter."""


@dataclass(frozen=True, slots=True)
class Design:
    """What the hyperparameters say of each run of the table (n,): its setting, cells, values and strata.

    ``seed`` numbers the seeds, −1 where unknown; None where the table has none, or takes them for a measure.
    """

    setting: Integers
    seed: Integers | None
    cells: Mapping[str, Cells]
    strata: Mapping[str, Integers]
    controls: Mapping[str, Floats | str]  # a str says why there are no numbers


def design_of(table: RunTable, group_by: Sequence[str], controls: Sequence[str]) -> Design:
    values = {name: group_numbers(table, [name]) for name in setting_names(table)}
    values = {name: numbers for name, numbers in values.items() if numbers.max() > 0}
    cells = {
        name: (group_numbers(table, [other for other in values if other != name]), numbers)
        for name, numbers in values.items()
    }
    setting = setting_numbers(table)
    strata = dict(values)
    if group_by and ", ".join(group_by) not in strata:
        strata[", ".join(group_by)] = group_numbers(table, group_by)
    usual = [name for name in CONTROLS if name in table.frame] + list(values)
    known = {name: _control(table, name) for name in controls or usual}
    return Design(setting, seed_numbers(table), cells, strata, known)


def _control(table: RunTable, name: str) -> Floats | str:
    """A column as numbers; a text with two values as 0 and 1."""
    numbers = numbers_of(table, name)
    assert numbers is not None
    values = [value for value in table.frame[name] if value is not None]
    if not any(isinstance(value, str) for value in values):
        return numbers
    kinds = sorted(set(map(show, values)))
    if len(kinds) > 2:
        return f"text with {len(kinds)} values has no order. See τ within its strata"
    return np.array([math.nan if value is None else kinds.index(show(value)) for value in table.frame[name]])


def setting_numbers(table: RunTable) -> Integers:
    """(n,) equal where all hyperparameters are; all different where there is no hyperparameter.

    Seeds and other bookkeeping tell no settings apart.
    """
    names = setting_names(table)
    return group_numbers(table, names) if names else np.arange(table.num_runs)


def seed_numbers(table: RunTable) -> Integers | None:
    """(n,) equal where the seeds are, −1 where a run has none; None where the table has no seeds."""
    if SEED not in table.frame or SEED in table.measures:
        return None
    unknown = table.frame[SEED].isna().to_numpy()
    return np.where(unknown, -1, group_numbers(table, [SEED]))


def setting_names(table: RunTable) -> list[str]:
    """The hyperparameters that make a setting."""
    return [name for name in table.hyperparameters if name not in BOOKKEEPING]


def group_numbers(table: RunTable, names: Sequence[str]) -> Integers:
    """(n,) 0.. by first appearance, equal where the hyperparameters ``names`` are."""
    seen: dict[Hashable, int] = {}
    columns = [map(_hashable, table.frame[name]) for name in names]
    values = zip(*columns, strict=True) if names else [()] * table.num_runs
    return np.array([seen.setdefault(each, len(seen)) for each in values], np.int64)


def numbers_of(table: RunTable, name: str) -> Floats | None:
    """A column (n,) as floats, NaN where it has no number; None where the table has no such column."""
    if name not in table.frame:
        return None
    return pd.to_numeric(table.frame[name], errors="coerce").to_numpy(dtype=float, na_value=np.nan)


def _hashable(value: object) -> Hashable:
    return (isinstance(value, bool), value)  # True is not 1
