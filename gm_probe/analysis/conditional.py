"""Conditional mutual information between the order of the measure and the order of the gap, as it was published.

For a pair of runs V_μ = sign(μ − μ') and V_g = sign(g − g'). K(S) = I(V_μ; V_g | U_S) / H(V_g | U_S), where U_S are
the values of the hyperparameters S that both runs share. A pair counts in both orders, so that signs are balanced: a
cell with a part c of its pairs concordant has 1 − h(c) bits, and H is 1 bit.

Source: Jiang et al. 2020; the PGDL competition (Jiang et al. 2021) takes the minimum over |S| ≤ 2.
"""

import math
from collections.abc import Mapping, Sequence
from itertools import combinations

import numpy as np
from scipy import special

from gm_probe.analysis.run_pairs import Floats, Integers, dense_ranks, pair_sums

MOST_IN_PAIRS = 30
"""Up to this number of hyperparameters also sets of two are given; their number grows with the square."""
PERMUTATIONS = 100


def conditional_information(
    x: Floats, y: Floats, values: Mapping[str, Integers]
) -> dict[tuple[str, ...], float | None]:
    """Return K(S) by the names of S, for every S of at most two (of many: one) of the hyperparameters ``values`` (n,).

    It is None where no pair of runs that agree in S is untied in measure and gap.
    """
    most = 2 if len(values) <= MOST_IN_PAIRS else 1
    return {
        given: _information(x, y, _cell_of([values[name] for name in given], len(x)))
        for size in range(most + 1)
        for given in combinations(values, size)
    }


def chance_of(
    found: float, x: Floats, y: Floats, given: Sequence[Integers], rows: Integers
) -> tuple[float, float]:
    """Return the mean of K(S), ``given`` S, over permutations ``rows`` (B, n) of ``y``, and the p of ``found`` in them.

    Few runs a cell give K(S) far above 0 without any association.
    """
    cell = _cell_of(given, len(x))
    drawn = np.array([_information(x, y[some], cell) or 0.0 for some in rows[:PERMUTATIONS]])
    return float(drawn.mean()), float((1 + (drawn >= found - 1e-12).sum()) / (1 + len(drawn)))


def _cell_of(values: Sequence[Integers], n: int) -> Integers:
    cell = np.zeros(n, np.int64)
    for numbers in values:
        cell = dense_ranks(cell * (numbers.max(initial=0) + 1) + numbers)
    return cell


def _information(x: Floats, y: Floats, cell: Integers) -> float | None:
    num = int(cell.max()) + 1
    ranks_x, ranks_y = dense_ranks(x), dense_ranks(y)
    score = np.bincount(cell, pair_sums(x, y, cell)[0], num) / 2
    of_either = _pairs(cell, ranks_x, num) + _pairs(cell, ranks_y, num)
    untied = _pairs(cell, 0 * cell, num) - of_either + _pairs(cell, ranks_x * len(x) + ranks_y, num)
    used = untied > 0
    if not used.any():
        return None
    concordant = (1 + score[used] / untied[used]) / 2
    bits = 1 - (special.entr(concordant) + special.entr(1 - concordant)) / math.log(2)
    return float(untied[used] @ bits / untied[used].sum())


def _pairs(cell: Integers, values: Integers, num: int) -> Floats:
    """Return the number of pairs of each cell (num,) that agree in ``values`` (n,)."""
    keys, count = np.unique(cell * (values.max() + 1) + values, return_counts=True)
    return np.bincount(keys // (values.max() + 1), count * (count - 1) / 2, num).astype(float)
