"""What choosing a run by a measure costs: its test error, or accuracy, against that of the best run."""

import numpy as np

from gm_probe.analysis.intervals import Quantity
from gm_probe.analysis.run_pairs import Floats

ENDS = {"worse": ("smallest",), "better": ("largest",)}
"""The end of a measure that is chosen, by what a larger value goes with; both where that is unknown."""


def regrets(measure: Floats, cost: Floats, direction: str | None) -> dict[tuple[str, str], Quantity]:
    """Return the regret in ``cost`` (n,) at the end of ``measure`` (n,) that ``direction`` calls good, and at random.

    The best run and the random one are of all runs with a cost, so that measures of other runs can be compared. Runs
    that share the end count their mean. An unknown direction gives both ends.
    """
    known = np.isfinite(measure) & np.isfinite(cost)
    if not known.any():
        return {}
    all_costs = cost[np.isfinite(cost)]
    best, random = float(all_costs.min()), float(all_costs.mean() - all_costs.min())
    note = f"a random run costs {random:.4g}; of one choice no interval can be given"
    x, cost = measure[known], cost[known]
    found = {}
    for end in ENDS.get(direction or "", ("smallest", "largest")):
        picked = x == (x.min() if end == "smallest" else x.max())
        found["regret", end] = Quantity(float(cost[picked].mean() - best), n=len(x), note=note)
        found["regret_random", ""] = Quantity(random, n=len(x))
    return found
