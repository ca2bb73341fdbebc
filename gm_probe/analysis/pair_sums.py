"""Sums over pairs of runs, by setting: what τ, its jackknife and its cluster bootstrap are made of."""

from dataclasses import dataclass

import numpy as np

from gm_probe.analysis.rank import Floats, Integers, sign_blocks

EXACT_SETTINGS = 500
"""Up to so many settings a resample's τ is exact; beyond, its first-order term, off by O(1/settings)."""


@dataclass(frozen=True, slots=True)
class PairSums:
    """Sums over pairs of runs of: the score, 1 where x is untied, 1 where y is untied.

    ``own`` (3, S) over the pairs inside each setting; ``others`` (3, S) over the pairs of its runs with other
    settings' (each pair counts for both); ``between`` (3, S, S) the same by pair of settings, zero on the
    diagonal, or None where resampled totals take their first-order term.
    """

    own: Floats
    others: Floats
    between: Floats | None = None

    @property
    def total(self) -> Floats:
        """(3,)"""
        return self.own.sum(axis=1) + self.others.sum(axis=1) / 2

    def leave_one_out(self) -> Floats:
        """(3, S) totals without each setting."""
        return self.total[:, None] - self.own - self.others

    def resampled(self, counts: Floats) -> Floats:
        """(3, B) totals where setting s is drawn counts[b, s] times; ``counts`` (B, S).

        A run drawn twice forms no pair with itself, nor does a setting with its own copy.
        """
        if self.between is None:
            return self.total[:, None] + (self.own + self.others) @ (counts - 1).T
        across = [((counts @ sums) * counts).sum(axis=1) / 2 for sums in self.between]
        return self.own @ counts.T + np.stack(across)


def pair_sums(
    x: np.ndarray, y: np.ndarray, setting: Integers, num_settings: int, error: np.ndarray | None = None
) -> PairSums:
    """Sums of ``x`` and ``y`` (n,) by ``setting`` (n,) in 0..S-1, of which some may have no run.

    With ``error`` (n,), the standard error of each y, only pairs whose y differ by more than 1.96 of the
    difference's standard error enter.
    """
    n, exact = len(x), num_settings <= EXACT_SETTINGS
    order = np.argsort(setting, kind="stable")
    x, y, setting = x[order], y[order], setting[order]
    error = None if error is None else error[order]
    present, starts = np.unique(setting, return_index=True)
    own, others = np.zeros((3, num_settings)), np.zeros((3, num_settings))
    between = np.zeros((3, num_settings, num_settings)) if exact else None
    if n == 0:
        return PairSums(own, others, between)
    by_run = np.zeros((3, n, len(present) if exact else 1))
    for (rows, sign_x), (_, sign_y) in zip(sign_blocks(x), sign_blocks(y), strict=True):
        if error is not None:
            clear = clear_pairs(y[rows, None] - y, error[rows, None], error)
            sign_x, sign_y = sign_x * clear, sign_y * clear
        for index, terms in enumerate((sign_x * sign_y, np.abs(sign_x), np.abs(sign_y))):
            if exact:
                by_run[index, rows] = np.add.reduceat(terms, starts, axis=1, dtype=np.int32)
            else:
                by_run[index, rows, 0] = terms.sum(axis=1, dtype=np.int32)
    by_setting = np.add.reduceat(by_run, starts, axis=1)
    if between is None:
        own = _own_sums(x, y, setting, num_settings, error)
        others[:, present] = by_setting[:, :, 0]
        return PairSums(own, others - 2 * own)
    diagonal = np.arange(num_settings)
    between[:, present[:, None], present] = by_setting
    own = between[:, diagonal, diagonal] / 2
    between[:, diagonal, diagonal] = 0
    return PairSums(own, between.sum(axis=2), between)


def clear_pairs(difference: np.ndarray, error: np.ndarray, other_error: np.ndarray) -> np.ndarray:
    """Whether each ``difference`` exceeds 1.96 of its standard error, the two errors being independent."""
    return np.abs(difference) > 1.96 * np.hypot(error, other_error)


def tau_of(sums: np.ndarray) -> Floats:
    """τ-b of (3, ...) sums; NaN where x or y is constant."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return sums[0] / np.sqrt(sums[1] * sums[2])


def _own_sums(
    x: np.ndarray, y: np.ndarray, setting: Integers, num_settings: int, error: np.ndarray | None
) -> Floats:
    """(3, S) over the pairs inside each setting, ``setting`` (n,) being sorted: one distance at a time."""
    own = np.zeros((3, num_settings))
    for lag in range(1, int(np.bincount(setting).max())):
        first = np.flatnonzero(setting[lag:] == setting[:-lag])
        second = first + lag
        sign_x, sign_y = np.sign(x[first] - x[second]), np.sign(y[first] - y[second])
        if error is not None:
            clear = clear_pairs(y[first] - y[second], error[first], error[second])
            sign_x, sign_y = sign_x * clear, sign_y * clear
        for index, terms in enumerate((sign_x * sign_y, np.abs(sign_x), np.abs(sign_y))):
            own[index] += np.bincount(setting[first], terms, num_settings)
    return own
