"""Kendall's score Σ sign(xᵢ − xⱼ) sign(yᵢ − yⱼ) over pairs, with sets of runs as bits: 64 pairs a word."""

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]
Bits = NDArray[np.uint64]

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


def order_bits(values: np.ndarray) -> tuple[Bits, Bits]:
    """For each of ``values`` (n,): the set of those below it, and of those above, (n, ⌈n/64⌉) each."""
    n = len(values)
    order = np.argsort(values, kind="stable")
    ascending = values[order]
    least = np.zeros((n + 1, -(-n // 64)), np.uint64)  # least[k]: the set of the k smallest
    least[np.arange(1, n + 1), order >> 6] = _bit(order)
    np.bitwise_or.accumulate(least, axis=0, out=least)
    below, above = np.empty_like(least[1:]), np.empty_like(least[1:])
    below[order] = least[np.searchsorted(ascending, ascending, side="left")]
    above[order] = least[n] ^ least[np.searchsorted(ascending, ascending, side="right")]
    return below, above


def mask_bits(mask: np.ndarray) -> Bits:
    """Boolean rows (m, n) as sets of bits (m, ⌈n/64⌉)."""
    words = np.zeros((len(mask), 8 * -(-mask.shape[1] // 64)), np.uint8)
    packed = np.packbits(mask, axis=1, bitorder="little")
    words[:, : packed.shape[1]] = packed
    return words.view("<u8").astype(np.uint64)


def run_scores(x: np.ndarray, y: np.ndarray, pairs: Bits | None = None) -> Integers:
    """(3, n): each run's score with all others, those untied with it in x, and in y; ``x``, ``y`` (n,).

    With ``pairs`` (n, ⌈n/64⌉), only with the others in its set.
    """
    (below_x, above_x), (below_y, above_y) = order_bits(x), order_bits(y)
    if pairs is not None:
        below_y, above_y = below_y & pairs, above_y & pairs
    agree = _num_bits(below_x & below_y) + _num_bits(above_x & above_y)
    differ = _num_bits(below_x & above_y) + _num_bits(above_x & below_y)
    free_x = below_x | above_x
    return np.stack([
        agree - differ,
        _num_bits(free_x if pairs is None else free_x & pairs),
        _num_bits(below_y) + _num_bits(above_y),
    ])  # fmt: skip


def permuted_scores(x: np.ndarray, y: np.ndarray, rows: np.ndarray) -> tuple[Integers, Integers]:
    """Score of ``x`` (n,) with ``y[rows[b]]`` for each b, and the number of pairs untied in both; (B,), (B,).

    ``rows`` (B, n) are places in ``y`` (N,), none twice in a row.
    """
    n = len(x)
    tied_x, has_ties = tied_pairs(x), tied_pairs(y) > 0
    order = np.argsort(x, kind="stable")
    x_ranks, y_ranks = dense_ranks(x)[order], dense_ranks(y)
    scores, both = np.empty(len(rows), np.int64), np.empty(len(rows), np.int64)
    step = max(1, BLOCK // max(n * -(-n // 64), 1))
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


def inversions(ranks: Integers) -> Integers:
    """For each row of ``ranks`` (B, n), a permutation of 0..n-1: the number of i < j with rank i > rank j; (B,)."""
    num, n = ranks.shape
    below = order_bits(np.arange(n))[0]
    placed = ranks.T
    later = np.zeros((n + 1, num, below.shape[1]), np.uint64)  # later[i]: the ranks from place i on
    later[np.arange(n)[:, None], np.arange(num), placed >> 6] = _bit(placed)
    np.bitwise_or.accumulate(later[::-1], axis=0, out=later[::-1])
    return _num_bits(later[1:] & below[placed]).sum(axis=0)


def _bit(number: np.ndarray) -> NDArray[np.uint64]:
    return np.uint64(1) << (number & 63).astype(np.uint64)


def _num_bits(sets: NDArray[np.uint64]) -> Integers:
    """Size of each set (..., words)."""
    return np.bitwise_count(sets).sum(axis=-1, dtype=np.int64)


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
