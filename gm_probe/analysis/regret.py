"""What choosing a run by a measure costs: its test error, or accuracy, against that of the best run."""

from dataclasses import dataclass

import numpy as np

from gm_probe.analysis.run_pairs import Floats

ENDS = {"worse": ("smallest",), "better": ("largest",)}
"""The end of a measure that is chosen, by what a larger value goes with; both where that is unknown."""


@dataclass(frozen=True, slots=True)
class Pick:
    """The regret of picking the run at one ``end`` of a measure, and of a ``random`` run, over ``n`` runs."""

    end: str
    regret: float
    random: float
    n: int


def picks(measure: Floats, outcome: Floats, direction: str | None, *, larger_is_better: bool) -> list[Pick]:
    """Return the regret in ``outcome`` (n,) at the end of ``measure`` (n,) that ``direction`` calls good.

    NaN in either leaves a run out; runs that share the end count their mean. An unknown direction gives both ends.
    """
    known = np.isfinite(measure) & np.isfinite(outcome)
    x, cost = measure[known], outcome[known] * (-1 if larger_is_better else 1)
    if not len(x):
        return []
    random = float(cost.mean() - cost.min())
    found = []
    for end in ENDS.get(direction or "", ("smallest", "largest")):
        picked = x == (x.min() if end == "smallest" else x.max())
        found.append(Pick(end, float(cost[picked].mean() - cost.min()), random, len(x)))
    return found
