"""Recognize a table with a row for each epoch or step, whose rows would all count as runs."""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import pandas as pd

from gm_probe.errors import DataError
from gm_probe.tables.columns import NAMES, is_given, is_setting, key
from gm_probe.tables.numerals import Numbers
from gm_probe.tables.table import SEED

PROGRESS = frozenset(
    (
        "epoch",
        "step",
        "_step",
        "global_step",
        "trainer_global_step",
        "iteration",
        "training_iteration",
        "iter",
    )
)


def require_one_row_a_run(
    source: Path,
    raw: pd.DataFrame,
    columns: Mapping[str, Numbers],
    written: Mapping[str, str],
    asked: Sequence[str],
) -> None:
    """Raise DataError where a column that nobody ``asked`` for counts the epochs of each run up."""
    names = {name: written.get(name, name) for name in columns}
    labels = [[name] for name in names if key(name) in NAMES]
    settings = [name for name, old in names.items() if is_setting(old) or is_given(old) or key(old) == SEED]
    for name in names:
        steps = columns[name].values
        if key(name) not in PROGRESS or name in asked or steps.isna().any():
            continue
        others = [some for some in (*labels, [each for each in settings if each != name]) if some]
        groups = (raw[some].map(str).groupby(some, sort=False).ngroup() for some in others)
        if _restarts(steps.to_numpy()) or any(_repeats(steps, group) for group in groups):
            raise DataError(
                f"{source} has a row for each {names[name]!r}, but each row must be one run. Keep one row for each "
                f"run, such as its last. If each row is a run, remove that column or pass --hyper {names[name]!r}"
            )


def _restarts(steps: np.ndarray) -> bool:
    """Whether ``steps`` (n,) are evenly spaced from about 0, once or again and again."""
    pieces = [np.unique(piece) for piece in np.split(steps, np.flatnonzero(np.diff(steps) < 0) + 1)]
    if min(map(len, pieces)) < 3:
        return False
    gap = pieces[0][1] - pieces[0][0]
    return all(piece[0] == pieces[0][0] <= gap and (np.diff(piece) == gap).all() for piece in pieces)


def _repeats(steps: pd.Series, group: pd.Series) -> bool:
    """Whether most of several groups of rows have several ``steps``, and all the same as far as they go."""
    found = sorted((sorted(some) for _, some in steps.groupby(group)), key=len)
    several = sum(len(some) > 1 for some in found)
    distinct = all(a < b for some in found for a, b in pairwise(some))
    return 2 * several > len(found) > 1 and distinct and all(some == found[-1][: len(some)] for some in found)
