"""The runs that have both a measure and a gap, by setting, and the seeded draws that all statistics share."""

from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field, replace
from typing import TypeVar

import numpy as np

from gm_probe.analysis.intervals import Interval, jackknife_interval, seeds_share
from gm_probe.analysis.pair_sums import PairSums, pair_sums, tau_of
from gm_probe.analysis.permutation import Permutations, permute_blocks, permute_within
from gm_probe.analysis.rank import Floats, Integers, dense_ranks

MOST_DRAWS = 2 * 10**6
"""A table of resamples holds at most so many numbers: the more runs, the fewer resamples."""
LEAST_RESAMPLES = 200
MOST_KEPT = 2**28  # bytes of draws and sums kept for the next measure
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Sample:
    """``x`` (measure) and ``y`` (gap) of n runs, their ``rows`` in the table, and who is independent.

    ``setting`` (n,) numbers the independent units 0..S-1: the settings, or where all runs are of
    ``one_setting`` the runs, which are independent draws from it. ``seed`` (n,) numbers from 0 the seeds that several
    settings share, −1 where none has it but the run's own; None where there are no two such seeds.
    """

    x: Floats
    y: Floats
    rows: Integers
    setting: Integers
    num_settings: int
    one_setting: bool
    seed: Integers | None = None

    @property
    def n(self) -> int:
        return len(self.x)

    @property
    def num_seeds(self) -> int:
        """That settings share."""
        return 0 if self.seed is None else int(self.seed.max()) + 1

    def means(self, values: Floats) -> Floats:
        """(S,) mean of ``values`` (n,) by setting over the largest, rounded: means of equal values stay equal."""
        means = np.bincount(self.setting, values, self.num_settings) / np.bincount(self.setting)
        scale = np.abs(means).max(initial=0.0)
        return np.round(means / scale, 12) if scale else means

    def only(self, keep: np.ndarray) -> "Sample":
        """The runs where ``keep`` (n,) is True; settings are numbered anew."""
        seed = None if self.seed is None else self.seed[keep]
        part = sample_of(self.x[keep], self.y[keep], self.rows[keep], self.setting[keep], seed)
        return replace(part, one_setting=part.one_setting or self.one_setting)


def tau_interval(value: float, sums: PairSums, sample: Sample) -> Interval:
    """Of τ = ``value`` over the pairs of ``sample`` in ``sums``: by leaving out settings, and seeds that they share."""
    share = seeds_share(value, tau_of(sums.leave_one_run_out()), sample.setting, sample.seed)
    unit = "runs" if sample.one_setting else "settings"
    return jackknife_interval(value, tau_of(sums.leave_one_out()), unit, share)


def sample_of(
    x: np.ndarray, y: np.ndarray, rows: np.ndarray, setting: np.ndarray, seed: np.ndarray | None = None
) -> Sample:
    """A sample of runs that all have finite values; equal numbers in ``setting`` (n,) are one setting.

    So are those in ``seed`` (n,) one seed; negative ones are unknown, and shared with no other run.
    """
    numbers = dense_ranks(setting)
    one_setting = len(numbers) > 1 and numbers.max() == 0
    shared = None if seed is None or one_setting else _shared(numbers, seed)
    if one_setting:
        numbers = np.arange(len(numbers))
    return Sample(x, y, rows, numbers, int(numbers.max(initial=-1)) + 1, one_setting, shared)


def shared_seeds(setting: Integers, seed: Integers) -> Integers:
    """Those in ``seed`` (n,; negative: unknown) that several in ``setting`` (n,) have, ascending."""
    seeds, settings = np.unique(np.unique(np.stack([seed, setting]), axis=1)[0], return_counts=True)
    return seeds[(settings > 1) & (seeds >= 0)]


def _shared(setting: Integers, seed: np.ndarray) -> Integers | None:
    """Numbers from 0 of the seeds that several settings have, −1 of the others; None where there are no two."""
    shared = shared_seeds(setting, seed)
    if len(shared) < 2:
        return None
    places = np.searchsorted(shared, seed)
    found = np.isin(seed, shared)
    return np.where(found, np.where(found, places, 0), -1).astype(np.int64)


@dataclass(slots=True)
class Draws:
    """Random draws of one ``seed``. Samples of the same settings share them, whatever their measure.

    ``notes`` collects where fewer than ``resamples`` were drawn.
    """

    seed: int
    resamples: int
    notes: dict[str, None] = field(default_factory=dict)
    _kept: OrderedDict[tuple[Hashable, ...], object] = field(default_factory=OrderedDict)

    def counts(self, num_settings: int) -> Floats:
        """(B, S) how often each of S settings is drawn in a bootstrap resample."""

        def draw() -> Floats:
            num = self._num("bootstrap resamples", num_settings, "settings")
            chances = np.full(num_settings, 1 / num_settings)
            return self.rng("counts").multinomial(num_settings, chances, size=num).astype(float)

        return self.once(("counts", num_settings), draw)

    def blocks(
        self, setting: Integers, stratum: Integers | None = None, seed: Integers | None = None
    ) -> Permutations:
        """Permutations of whole settings; see ``permute_blocks``."""

        def draw() -> Permutations:
            num = self._num("permutations", len(setting), "values")
            return permute_blocks(setting, num, self.rng("blocks"), stratum, seed)

        return self.once(("blocks", *map(_bytes, (setting, stratum, seed))), draw)

    def sums(self, x: Floats, y: Floats, sample: Sample) -> PairSums:
        """Sums of two columns of the runs of ``sample``; see ``pair_sums``."""
        key = ("sums", x.tobytes(), y.tobytes(), sample.setting.tobytes())
        return self.once(key, lambda: pair_sums(x, y, sample.setting, sample.num_settings))

    def within(self, stratum: Integers, seed: Integers | None = None) -> np.ndarray:
        """(B, n) permutations of single runs, or of seeds; see ``permute_within``."""

        def draw() -> np.ndarray:
            num = self._num("permutations", len(stratum), "values")
            return permute_within(stratum, num, self.rng("within"), seed)

        return self.once(("within", *map(_bytes, (stratum, seed))), draw)

    def rng(self, purpose: str) -> np.random.Generator:
        """A generator of its own for each ``purpose``."""
        return np.random.default_rng([self.seed, *purpose.encode()])

    def once(self, key: tuple[Hashable, ...], draw: Callable[[], T]) -> T:
        """``draw()``, or what it gave the last time for this ``key``."""
        if key not in self._kept:
            self._kept[key] = draw()
        self._kept.move_to_end(key)
        while sum(map(_size, self._kept.values())) > MOST_KEPT and len(self._kept) > 1:
            self._kept.popitem(last=False)
        return self._kept[key]  # type: ignore[return-value]

    def _num(self, what: str, length: int, unit: str) -> int:
        most = max(LEAST_RESAMPLES, MOST_DRAWS // max(length, 1))
        if self.resamples > most:
            self.notes[f"{most:,} {what} instead of {self.resamples:,} for {length:,} {unit}"] = None
        return min(self.resamples, most)


def _bytes(numbers: Integers | None) -> bytes:
    return b"" if numbers is None else numbers.tobytes()


def _size(value: object) -> int:
    """Bytes, about."""
    if isinstance(value, Permutations):
        return value.rows.nbytes
    return value.nbytes if isinstance(value, np.ndarray) else 2**16
