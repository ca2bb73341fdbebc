"""Permutations of the gaps of whole settings, for the tests that need no interval."""

import numpy as np

from gm_probe.analysis.intervals import Clusters
from gm_probe.analysis.run_pairs import Floats, Integers

PERMUTATIONS = 2000
MOST_DRAWS = 4 * 10**6
"""Most numbers in a table of permutations, so that more runs have fewer permutations."""


def permute_settings(clusters: Clusters, rng: np.random.Generator) -> Integers:
    """Return (B, n) permutations that let whole settings with as many runs, of the same seeds, change places.

    A setting that no other is like stays in its place; B is 0 where all of them do.
    """
    setting, seed = clusters.setting, clusters.seed
    order = np.argsort(setting, kind="stable") if seed is None else np.lexsort((seed, setting))
    blocks: dict[tuple[int, ...], list[Integers]] = {}
    for members in np.split(order, np.flatnonzero(np.diff(setting[order])) + 1):
        seeds = () if seed is None else tuple(map(int, seed[members]))
        blocks.setdefault((len(members), *seeds), []).append(members)
    movable = [np.stack(alike) for alike in blocks.values() if len(alike) > 1]
    num = max(100, min(PERMUTATIONS, MOST_DRAWS // len(setting))) if movable else 0
    rows = np.tile(np.arange(len(setting), dtype=np.int64), (num, 1))
    for places in movable:
        moved = np.argsort(rng.random((num, len(places))), axis=1)
        rows[:, places.ravel()] = places[moved].reshape(num, -1)
    return rows


def permutation_p(x: Floats, y: Floats, rows: Integers) -> float | None:
    """Return the two-sided p of x @ y among its values with ``y[rows[b]]``: twice the smaller tail, itself included.

    Where only some settings can change places, permuted values do not centre on 0: hence tails.
    """
    if not len(rows):
        return None
    drawn = y[rows] @ x
    slack = 1e-9 * float(np.sqrt((x @ x) * (y @ y)))
    own = float(x @ y)
    above, below = (drawn >= own - slack).sum(), (drawn <= own + slack).sum()
    return min(1.0, 2 * (1 + int(min(above, below))) / (1 + len(rows)))
