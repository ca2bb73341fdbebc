"""Sums over pairs of runs, by setting: what τ, its jackknife and its cluster bootstrap are made of."""

from dataclasses import dataclass

import numpy as np

from gm_probe.analysis.rank import Bits, Floats, Integers, run_scores, sign_blocks

EXACT_SETTINGS = 500
"""Up to so many settings a resample's τ is exact; beyond, its first-order term, off by O(1/settings)."""


@dataclass(frozen=True, slots=True)
class PairSums:
    """Sums over pairs of runs of: the score, 1 where x is untied, 1 where y is untied.

    ``own`` (3, S) over the pairs inside each setting; ``others`` (3, S) over the pairs of its runs with other
    settings' (each pair counts for both); ``of_run`` (3, n) over the pairs of each run, and ``of_run_inside`` over
    those inside its setting; ``between`` (3, S, S) as ``others`` by pair of settings, zero on the diagonal, or None
    where resampled totals take their first-order term.
    """

    own: Floats
    others: Floats
    of_run: Floats
    of_run_inside: Floats
    between: Floats | None = None

    @property
    def total(self) -> Floats:
        """(3,)"""
        return self.own.sum(axis=1) + self.others.sum(axis=1) / 2

    def leave_one_out(self) -> Floats:
        """(3, S) totals without each setting."""
        return self.total[:, None] - self.own - self.others

    def leave_one_run_out(self) -> Floats:
        """(3, n) totals without each run."""
        return self.total[:, None] - self.of_run

    def inside(self) -> "PairSums":
        """Over the pairs inside settings alone."""
        return PairSums(self.own, np.zeros_like(self.others), self.of_run_inside, self.of_run_inside)

    def resampled(self, counts: Floats) -> Floats:
        """(3, B) totals where setting s is drawn counts[b, s] times; ``counts`` (B, S).

        A run drawn twice forms no pair with itself, nor does a setting with its own copy.
        """
        if self.between is None:
            return self.total[:, None] + (self.own + self.others) @ (counts - 1).T
        across = [((counts @ sums) * counts).sum(axis=1) / 2 for sums in self.between]
        return self.own @ counts.T + np.stack(across)


def pair_sums(
    x: np.ndarray,
    y: np.ndarray,
    setting: Integers,
    num_settings: int,
    clear: Bits | None = None,
    *,
    between: bool = False,
) -> PairSums:
    """Sums of ``x`` and ``y`` (n,) by ``setting`` (n,) in 0..S-1, of which some may have no run.

    With ``clear`` (n, ⌈n/64⌉), only over the pairs in these sets. ``between`` keeps the sums by pair of
    settings too, up to ``EXACT_SETTINGS``.
    """
    if between and num_settings <= EXACT_SETTINGS and clear is None:
        return _sums_between(x, y, setting, num_settings)
    of_run = run_scores(x, y, clear).astype(float)
    inside = _sums_inside(x, y, setting, clear)
    whole, own = (
        np.stack([np.bincount(setting, terms, num_settings).astype(float) for terms in sums])
        for sums in (of_run, inside)
    )
    return PairSums(own / 2, whole - own, of_run, inside)


def tau_of(sums: np.ndarray) -> Floats:
    """τ-b of (3, ...) sums; NaN where x or y is constant."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return sums[0] / np.sqrt(sums[1] * sums[2])


def _sums_between(x: np.ndarray, y: np.ndarray, setting: Integers, num_settings: int) -> PairSums:
    order = np.argsort(setting, kind="stable")
    present, starts = np.unique(setting[order], return_index=True)
    between = np.zeros((3, num_settings, num_settings))
    by_run = np.zeros((3, len(x), len(present)))
    for (rows, sign_x), (_, sign_y) in zip(sign_blocks(x[order]), sign_blocks(y[order]), strict=True):
        for index, terms in enumerate((sign_x * sign_y, np.abs(sign_x), np.abs(sign_y))):
            by_run[index, rows] = np.add.reduceat(terms, starts, axis=1, dtype=np.int32)
    of_run, inside = np.zeros((3, len(x))), np.zeros((3, len(x)))
    if len(x):
        between[:, present[:, None], present] = np.add.reduceat(by_run, starts, axis=1)
        of_run[:, order] = by_run.sum(axis=2)
        inside[:, order] = by_run[:, np.arange(len(x)), np.searchsorted(present, setting[order])]
    diagonal = np.arange(num_settings)
    own = between[:, diagonal, diagonal] / 2
    between[:, diagonal, diagonal] = 0
    return PairSums(own, between.sum(axis=2), of_run, inside, between)


def _sums_inside(x: np.ndarray, y: np.ndarray, setting: Integers, clear: Bits | None) -> Floats:
    """(3, n) over the pairs of each run inside its setting: one distance in their order at a time."""
    order = np.argsort(setting, kind="stable")
    inside = np.zeros((3, len(x)))
    for lag in range(1, int(np.bincount(setting).max(initial=0))):
        first, second = order[:-lag], order[lag:]
        same = setting[first] == setting[second]
        first, second = first[same], second[same]
        if clear is not None:
            bits = clear[first, second >> 6] >> (second & 63).astype(np.uint64)
            chosen = (bits & np.uint64(1)).astype(bool)
            first, second = first[chosen], second[chosen]
        sign_x, sign_y = np.sign(x[first] - x[second]), np.sign(y[first] - y[second])
        for index, terms in enumerate((sign_x * sign_y, np.abs(sign_x), np.abs(sign_y))):
            inside[index, first] += terms  # a distance has no run twice on a side
            inside[index, second] += terms
    return inside
