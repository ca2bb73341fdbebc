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

    ``rows`` (B, n) are places in ``y`` (N,), none twice in a row. O(B n log n).
    """
    n = len(x)
    tied_x, has_ties = tied_pairs(x), tied_pairs(y) > 0
    order = np.argsort(x, kind="stable")
    x_ranks, y_ranks = dense_ranks(x)[order], dense_ranks(y)
    scores, both = np.empty(len(rows), np.int64), np.empty(len(rows), np.int64)
    step = max(1, BLOCK // (4 * max(n, 1)))
    for start in range(0, len(rows), step):
        chunk = slice(start, start + step)
        permuted = y_ranks[rows[chunk][:, order]]
        untied = np.full(len(permuted), n * (n - 1) // 2 - tied_x)
        if tied_x:  # within equal x, y must ascend, so that no such pair counts as an inversion
            keys = np.sort(x_ranks * len(y) + permuted, axis=1)
            untied += _equal_pairs(keys) if has_ties else 0
            permuted = keys % len(y)
        if has_ties:
            untied -= _equal_pairs(np.sort(permuted, axis=1))
        if has_ties or n < len(y):
            permuted = _ranks_in_order(permuted)
        both[chunk] = untied
        scores[chunk] = untied - 2 * inversions(permuted)
    return scores, both


def inversions(ranks: np.ndarray) -> Integers:
    """For each row of ``ranks`` (B, n), a permutation of 0..n-1: the number of i < j with rank i > rank j; (B,).

    Bit by bit from the highest: among ranks that agree in the higher bits, every 1 before a 0 is an inversion.
    Padded to a power of two, exactly half of each group has the bit set, so that groups stay rows of an array.
    """
    num, n = ranks.shape
    bits = max(n - 1, 0).bit_length()
    kind = np.int16 if bits < 15 else np.int32  # a padded rank and a count within a group both fit
    padded = np.empty((num, 1 << bits), kind)
    padded[:, :n] = ranks
    padded[:, n:] = np.arange(n, 1 << bits)
    total = np.zeros(num, np.int64)
    for bit in range(bits - 1, -1, -1):
        groups = padded.reshape(num, -1, 2 << bit)
        ones = (groups >> bit & 1).astype(bool)
        ones_before = np.cumsum(ones, axis=2, dtype=kind)
        total += np.where(ones, 0, ones_before).reshape(num, -1).sum(axis=1, dtype=np.int64)
        half = (num, -1, 1 << bit)
        padded = np.concatenate([groups[~ones].reshape(half), groups[ones].reshape(half)], axis=2)
    return total


def _ranks_in_order(values: Integers) -> Integers:
    """Ranks 0..n-1 of each row of ``values`` (B, n); equal values take theirs in order, and are no inversion."""
    order = np.argsort(values, axis=1, kind="stable")
    ranks = np.empty_like(order)
    np.put_along_axis(ranks, order, np.arange(values.shape[1])[None, :], axis=1)
    return ranks


def _equal_pairs(keys: Integers) -> Integers:
    """Number of equal pairs in each sorted row of ``keys`` (B, n)."""
    place = np.arange(keys.shape[1])
    first = np.ones(keys.shape, bool)
    first[:, 1:] = keys[:, 1:] != keys[:, :-1]
    start = np.maximum.accumulate(np.where(first, place, 0), axis=1)
    return (place - start).sum(axis=1)
