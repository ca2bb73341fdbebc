"""Sums over pairs of runs: what Kendall's coefficients and their standard errors are made of."""

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]

BLOCK = 2**20
"""Most numbers in a temporary array: about the size of a core's cache."""


def dense_ranks(values: np.ndarray) -> Integers:
    """Return the rank from 0 of each of ``values`` (n,); equal values share one, and no rank is left out."""
    return np.unique(values, return_inverse=True)[1].astype(np.int64)


def mid_ranks(values: np.ndarray) -> Floats:
    """Return the rank from 1 of each of ``values`` (n,); equal values share the mean of theirs."""
    places = dense_ranks(values)
    counts = np.bincount(places)
    return (np.cumsum(counts) - (counts - 1) / 2)[places]


def pair_sums(x: Floats, y: Floats, group: Integers) -> Floats:
    """Return each run's sums over its pairs with the others of its ``group`` (n,): (3, n).

    The rows are Kendall's score Σ sign(xᵢ − xⱼ) sign(yᵢ − yⱼ), and the number of pairs untied in ``x`` and in
    ``y``. Each pair counts for both of its runs.
    """
    sums = np.zeros((3, len(x)))
    ranks = dense_ranks(x).astype(np.int32), dense_ranks(y).astype(np.int32)
    order = np.argsort(group, kind="stable")
    starts = np.flatnonzero(np.diff(group[order], prepend=-1))
    sizes = np.diff(starts, append=len(x))
    for size in np.unique(sizes[sizes > 1]):
        members = order[starts[sizes == size][:, None] + np.arange(size)]  # (groups, size)
        step = max(1, BLOCK // size**2)
        for first in range(0, len(members), step):
            _add_groups(sums, ranks, members[first : first + step])
    return sums


def _add_groups(sums: Floats, ranks: tuple[np.ndarray, np.ndarray], members: Integers) -> None:
    """Add the pairs inside each row of ``members`` (groups, size) to ``sums`` (3, n)."""
    x, y = (values[members] for values in ranks)
    size = members.shape[1]
    step = max(1, BLOCK // size)
    for first in range(0, size, step):
        some = slice(first, first + step)
        sign_x, sign_y = (_signs(values[:, some, None], values[:, None, :]) for values in (x, y))
        for row, terms in enumerate((sign_x * sign_y, sign_x != 0, sign_y != 0)):
            sums[row, members[:, some]] = terms.sum(axis=2, dtype=np.int32)


def _signs(one: np.ndarray, other: np.ndarray) -> NDArray[np.int8]:
    return (one > other).view(np.int8) - (one < other).view(np.int8)
