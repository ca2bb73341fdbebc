"""Tables with a row for each epoch are refused; tables of runs that happen to have such a column are read."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from gm_probe.errors import DataError
from gm_probe.tables.runs import load_table

RNG = np.random.default_rng(0)


def table(epochs: list[int], name: str = "epoch", **columns: list[object]) -> pd.DataFrame:
    values = RNG.uniform(0, 1, (2, len(epochs)))
    return pd.DataFrame({name: epochs, **columns, "sharpness": values[0], "error_gap": values[1]})


HISTORIES = {
    "one run": table([0, 1, 2, 3, 4]),
    "a learning rate that changes": table([0, 1, 2, 3], lr=[0.4, 0.3, 0.2, 0.1]),
    "steps": table([50, 100, 150], "trainer/global_step"),
    "two lines for each epoch": table([0, 0, 1, 1, 2, 2]),
    "two runs, one below the other": table([1, 2, 3, 1, 2, 3, 4]),
    "named runs": table([10, 20, 10, 20], "step", run=["a", "a", "b", "b"]),
    "named runs by epoch": table([1, 1, 1, 2, 2, 3], name_=[0] * 6, run=list("abcaba")),
    "settings and seeds": table([5, 9, 5, 9, 5, 9], lr=[1, 1, 2, 2, 1, 1], seed=[0, 0, 0, 0, 1, 1]),
    "a tracker's settings": table([5, 9, 5, 9], "_step", **{"params.x": [1, 1, 2, 2]}),
}
RUNS = {
    "the last epoch": table([99] * 6, lr=[1, 1, 1, 2, 2, 2]),
    "the best epoch": table([31, 57, 40, 88, 12, 63], lr=[1, 1, 1, 2, 2, 2], seed=[0, 1, 2, 0, 1, 2]),
    "early stopping": table([98, 100, 97, 100], model=list("aabb")),
    "two runs": table([1, 2]),
    "numbers of epochs": table([1, 2, 3, 4], "epochs"),
    "some without a value": table([1, 2, 3, None], "epoch"),  # type: ignore[list-item]
}


@pytest.mark.parametrize("frame", HISTORIES.values(), ids=HISTORIES)
def test_rows_of_epochs_are_no_runs(frame: pd.DataFrame) -> None:
    with pytest.raises(DataError, match=r"has a row for each '.*(epoch|step)', but each row must be one run"):
        load_table(frame)
    name = next(name for name in frame if "epoch" in name or "step" in name)
    assert load_table(frame, hyperparameters=[name]).num_runs == len(frame), (
        "each row is a run, says the user"
    )


@pytest.mark.parametrize("frame", RUNS.values(), ids=RUNS)
def test_runs_may_say_at_which_epoch_they_ended(frame: pd.DataFrame) -> None:
    assert load_table(frame).measures == ("sharpness",)
