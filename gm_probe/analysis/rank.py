"""Kendall's score Σ sign(xᵢ − xⱼ) sign(yᵢ − yⱼ) over pairs: blockwise by run, and fast under permutations."""

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]

BLOCK = 2**20  # numbers that a temporary may hold: about the size of a core's cache


def tied_pairs(values: np.ndarray) -> int:
    """Number of pairs i < j with values[i] == values[j], for an array (n,)."""
    counts = np.unique(values, return_counts=True)[1].astype(np.int64)
    return int((counts * (counts - 1) // 2).sum())


def dense_ranks(values: np.ndarray) -> Integers:
    """Rank from 0 of each of ``values`` (n,); equal values share one, and no rank is left out."""
    return np.unique(values, return_inverse=True)[1].astype(np.int64)


def sign_blocks(values: np.ndarray) -> Iterator[tuple[slice, NDArray[np.int8]]]:
    """sign(values[i] − values[j]) for blocks of rows i against all j, as int8 (rows, n)."""
    n = len(values)
    step = max(1, BLOCK // max(n, 1))
    for start in range(0, n, step):
        rows = slice(start, min(start + step, n))
        column = values[rows, None]
        yield rows, (column > values).astype(np.int8) - (column < values).astype(np.int8)


def permuted_scores(x: np.ndarray, y: np.ndarray, rows: np.ndarray) -> tuple[Integers, Integers]:
    """Score of ``x`` (n,) with ``y[rows[b]]`` for each b, and the number of pairs untied in both; (B,), (B,).

    ``rows`` (B, n) are places in ``y`` (N,), none twice in a row. With runs in the order of x, each run's later
    partners are a set of bits, and so are the y below its own: O(B n N/64) words.
    """
    n, num = len(x), len(rows)
    order = np.argsort(x, kind="stable")
    beyond = np.searchsorted(x[order], x[order], side="right")  # the first place of a larger x
    below, above = order_bits(y)
    has_ties = tied_pairs(y) > 0
    concordant, discordant = np.zeros(num, np.int64), np.zeros(num, np.int64)
    step = max(1, BLOCK // (8 * max(n * below.shape[1], 1)))
    for start in range(0, num, step):
        chunk = slice(start, start + step)
        placed = rows[chunk][:, order].T  # (n, b)
        later = np.zeros((n + 1, placed.shape[1], below.shape[1]), np.uint64)
        place, column = np.indices(placed.shape)
        later[place, column, placed >> 6] = np.uint64(1) << (placed & 63).astype(np.uint64)
        np.bitwise_or.accumulate(later[::-1], axis=0, out=later[::-1])
        partners = later[beyond]
        discordant[chunk] = _num_bits(partners & below[placed])
        if has_ties:
            concordant[chunk] = _num_bits(partners & above[placed])
    if not has_ties:
        concordant = n * (n - 1) // 2 - tied_pairs(x) - discordant
    return concordant - discordant, concordant + discordant


def order_bits(values: np.ndarray) -> tuple[NDArray[np.uint64], NDArray[np.uint64]]:
    """For each of ``values`` (N,), the set of those below and of those above it, as bits (N, ⌈N/64⌉)."""
    n = len(values)
    below, above = np.zeros((2, n, 8 * -(-n // 64)), np.uint8)
    for rows, signs in sign_blocks(values):
        for sets, members in ((below, signs > 0), (above, signs < 0)):
            bits = np.packbits(members, axis=1, bitorder="little")
            sets[rows, : bits.shape[1]] = bits
    return below.view("<u8").astype(np.uint64), above.view("<u8").astype(np.uint64)


def _num_bits(sets: NDArray[np.uint64]) -> Integers:
    """Number of bits set for each b in (n, b, words)."""
    return np.bitwise_count(sets).sum(axis=(0, 2), dtype=np.int64)
