"""What choosing a run by a measure costs: its test error, or accuracy, against that of the best run."""

import numpy as np

from gm_probe.analysis.intervals import Quantity
from gm_probe.analysis.run_pairs import Floats

ENDS = {"worse": ("smallest",), "better": ("largest",)}
"""The end of a measure that is chosen, by what a larger value goes with; both where that is unknown."""


def regrets(
    measure: Floats, outcome: Floats, direction: str | None, *, larger_is_better: bool
) -> dict[tuple[str, str], Quantity]:
    """Return the regret in ``outcome`` (n,) at the end of ``measure`` (n,) that ``direction`` calls good, or at random.

    NaN in either leaves a run out; runs that share the end count their mean. An unknown direction gives both ends.
    """
    known = np.isfinite(measure) & np.isfinite(outcome)
    x, cost = measure[known], outcome[known] * (-1 if larger_is_better else 1)
    if not len(x):
        return {}
    random = float(cost.mean() - cost.min())
    note = f"a random run costs {random:.4g}; of one choice no interval can be given"
    found = {}
    for end in ENDS.get(direction or "", ("smallest", "largest")):
        picked = x == (x.min() if end == "smallest" else x.max())
        found["regret", end] = Quantity(float(cost[picked].mean() - cost.min()), n=len(x), note=note)
        found["regret_random", ""] = Quantity(random, n=len(x))
    return found
