"""Tests by permuting the gap: whole settings change places, or single runs within a stratum."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import permutations, product

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from gm_probe.analysis.rank import Floats, Integers, permuted_scores, tied_pairs

EXACT_RUNS = 500
"""Up to so many runs permutations take τ; beyond, Spearman's ρ, with which the test is just as exact."""


FEW_ARRANGEMENTS = 100


@dataclass(frozen=True, slots=True)
class Permutations:
    """``rows`` (B, n): where each run's gap comes from. ``limit`` says why p is coarse, or why there is none.

    ``rows`` is empty exactly when no two blocks can change places.
    """

    rows: NDArray[np.int32]
    limit: str | None


def permute_blocks(
    setting: Integers,
    num: int,
    rng: np.random.Generator,
    stratum: Integers | None = None,
    seed: Integers | None = None,
) -> Permutations:
    """``num`` permutations that let whole settings of equal size (and ``stratum``) change places.

    Where there are fewer than ``FEW_ARRANGEMENTS``, each other one once, so that p is exact.
    ``setting`` and ``stratum`` (n,); a setting lies in one stratum. Runs keep their order within a setting; with
    ``seed`` (n,), the numbers of seeds that settings share (−1: shared with none), that of their seeds, and only
    settings with the same seeds change places. Settings that no other is like stay in place; ``limit`` says so.
    """
    blocks: dict[tuple[int, ...], list[Integers]] = {}
    order = np.argsort(setting, kind="stable") if seed is None else np.lexsort((seed, setting))
    starts = np.flatnonzero(np.diff(setting[order])) + 1
    for members in np.split(order, starts) if len(order) else []:
        of = 0 if stratum is None else int(stratum[members[0]])
        seeds = () if seed is None else tuple(map(int, seed[members]))
        blocks.setdefault((len(members), of, *seeds), []).append(members)
    movable = [same for same in blocks.values() if len(same) > 1]
    of_runs = "number of runs" if seed is None else "seeds"
    what = of_runs if stratum is None else f"{of_runs} and stratum"
    if not movable:
        return Permutations(np.empty((0, len(setting)), np.int32), f"no two settings share their {what}")
    arrangements = math.prod(math.factorial(min(len(same), 20)) for same in movable)
    few = arrangements < FEW_ARRANGEMENTS
    orders: list[np.ndarray] = (
        _every_order(movable, rng) if few else [rng.random((num, len(same))) for same in movable]
    )
    rows = np.tile(np.arange(len(setting), dtype=np.int32), (len(orders[0]), 1))
    for same, moved in zip(movable, orders, strict=True):
        places = np.stack(same)
        rows[:, places.ravel()] = places[np.argsort(moved, axis=1)].reshape(len(rows), -1)
    limits = []
    num_blocks, fixed = sum(map(len, blocks.values())), len(blocks) - len(movable)
    if stratum is None and len(blocks) > 1:
        sizes = ", ".join(f"{len(blocks[each])} with {each[0]} runs" for each in sorted(blocks))
        alike = "as many runs" if seed is None else "the same seeds"
        limits.append(f"the permutation test exchanges only settings with {alike} ({sizes})")
    elif fixed:
        limits.append(
            f"{fixed} of {num_blocks} settings are not permuted, because no other setting shares their {what}"
        )
    if few:  # two-sided: twice the tail that holds the arrangement as it is
        limits.append(f"{arrangements} arrangements of settings, so p is at least {2 / arrangements:.2g}")
    return Permutations(rows, "; ".join(limits) or None)


def _every_order(movable: Sequence[Sequence[Integers]], rng: np.random.Generator) -> list[np.ndarray]:
    """For each group of blocks (A − 1, blocks): its order in every joint arrangement but the one it has."""
    every = list(product(*(permutations(range(len(same))) for same in movable)))[1:]
    shuffled = [every[i] for i in rng.permutation(len(every))]  # so that any first part is a fair sample
    return [np.array(orders) for orders in zip(*shuffled, strict=True)]


def permute_within(
    stratum: Integers, num: int, rng: np.random.Generator, seed: Integers | None = None
) -> NDArray[np.int32]:
    """(num, n) permutations of single runs that leave each in its ``stratum`` (n,).

    With ``seed`` (n,), the numbers of seeds that strata share (−1: shared with none), the seeds change places, alike in
    every stratum that has them all, elsewhere by the order that they come into: where there are no more than ``num``
    such ways, each other one once.
    """
    if seed is None:
        order, keys = np.argsort(stratum, kind="stable"), rng.random((num, len(stratum)))
    else:
        # a seed of its own for every run whose seed nobody shares
        seed = np.where(seed < 0, seed.max() + 1 + np.arange(len(seed)), seed)
        seed = np.unique(seed, return_inverse=True)[1]
        order, keys = np.lexsort((seed, stratum)), _seed_keys(int(seed.max()) + 1, num, rng)[:, seed]
    rows = np.empty((len(keys), len(stratum)), np.int32)
    rows[:, order] = np.argsort(stratum + keys, axis=1, kind="stable")
    return rows


def _seed_keys(num_seeds: int, num: int, rng: np.random.Generator) -> Floats:
    """Keys in [0, 1) that order the seeds (B, num_seeds)."""
    if math.factorial(min(num_seeds, 20)) - 1 > num:
        return rng.random((num, num_seeds))
    return np.array(list(permutations(range(num_seeds)))[1:], float) / num_seeds


def permuted_coefficients(x: np.ndarray, y: np.ndarray, rows: np.ndarray) -> Floats:
    """(B + 1,) the coefficient of ``x`` with ``y``, then with each ``y[rows[b]]``.

    τ-b up to ``EXACT_RUNS`` runs, else Spearman's ρ. Neither x nor y is constant.
    """
    n = len(x)
    rows = np.concatenate([np.arange(n)[None, :], rows])
    if n <= EXACT_RUNS:
        pairs = n * (n - 1) // 2
        most = math.sqrt((pairs - tied_pairs(x)) * (pairs - tied_pairs(y)))
        return permuted_scores(x, y, rows)[0] / most
    ranks_x, ranks_y = _standard_ranks(x), _standard_ranks(y)
    step = max(1, 2**20 // n)
    return np.concatenate([ranks_y[rows[i : i + step]] @ ranks_x for i in range(0, len(rows), step)])


def permutation_p(coefficients: np.ndarray) -> float:
    """Two-sided p of coefficients[0] among all (B + 1,) of them: twice the smaller tail, itself included.

    Where only some settings can change places, permuted coefficients do not centre on 0: hence tails.
    """
    above = (coefficients >= coefficients[0] - 1e-12).mean()
    below = (coefficients <= coefficients[0] + 1e-12).mean()
    return min(1.0, 2 * float(min(above, below)))


def _standard_ranks(values: np.ndarray) -> Floats:
    ranks = stats.rankdata(values)
    centred = ranks - ranks.mean()
    return centred / math.sqrt(float(centred @ centred))
