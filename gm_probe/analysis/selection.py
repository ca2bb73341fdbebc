"""What choosing a run by a measure costs: its test error, or accuracy, against that of the best run."""

from dataclasses import dataclass

import numpy as np

from gm_probe.analysis.pairs import Floats

ENDS = {"worse": ("smallest",), "better": ("largest",)}
"""The end of a measure that is chosen, by what a larger value goes with; both where that is unknown."""


@dataclass(frozen=True, slots=True)
class Choice:
    """The regret of picking the run at one ``end`` of a measure, and of a ``random`` run, over ``n`` runs."""

    end: str
    regret: float
    random: float
    n: int


def choices(measure: Floats, cost: Floats, direction: str | None) -> list[Choice]:
    """Return the regret in ``cost`` (n,) at the end of ``measure`` (n,) that ``direction`` calls good.

    The best run and the random one are of all runs with a cost, so that measures of other runs can be compared. Runs
    that share the end count their mean. An unknown direction gives both ends.
    """
    known = np.isfinite(measure) & np.isfinite(cost)
    if not known.any():
        return []
    all_costs = cost[np.isfinite(cost)]
    best, random = float(all_costs.min()), float(all_costs.mean() - all_costs.min())
    x, cost = measure[known], cost[known]
    found = []
    for end in ENDS.get(direction or "", ("smallest", "largest")):
        picked = x == (x.min() if end == "smallest" else x.max())
        found.append(Choice(end, float(cost[picked].mean() - best), random, len(x)))
    return found
