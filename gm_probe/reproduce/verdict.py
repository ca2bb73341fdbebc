"""Whether a claim that one training setting does better than another shows: differences paired by seed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from gm_probe.analysis.intervals import mean_interval
from gm_probe.reproduce.comparison import RISE, Comparison
from gm_probe.reproduce.finding import Outcome, bonferroni, claim_outcome

COMPARED = {"local_inconsistency": "S_ρ", "running_nt_xent": "NT-Xent of training"}
"""Words for what is no error."""


@dataclass(frozen=True)
class Test:
    """Whether one variant does better than another on one data set: paired by seed.

    Attributes:
        family: comparisons that the claim is made of, this one among them.
    """

    found: Comparison
    data: str
    test: Mapping[str, Any]
    family: int = 1

    @cached_property
    def pairs(self) -> list[tuple[float | None, float | None]]:
        """What the better and the worse variant came to, a pair a seed; None without a result: mostly it diverged.

        ``beyond`` names two more variants, whose difference is taken off.
        """
        pairs = self._pairs_of(self.test)
        if "beyond" not in self.test:
            return pairs
        others = self._pairs_of(self.test["beyond"])
        return [
            (_difference(better, a), _difference(worse, b))
            for (better, worse), (a, b) in zip(pairs, others, strict=True)
        ]

    def _pairs_of(self, names: Mapping[str, Any]) -> list[tuple[float | None, float | None]]:
        arms = [self.found.arm(self.data, names[key]) for key in ("better", "worse")]
        better, worse = (
            arm.means_along(self.key) if "along" in self.test else arm.figures(self.key) for arm in arms
        )
        return list(zip(better, worse, strict=True))

    @cached_property
    def differences(self) -> np.ndarray:
        """worse − better of every seed where both ended, so that > 0 is what the claim says."""
        return np.array([b - a for a, b in self.pairs if a is not None and b is not None])

    @property
    def lost(self) -> dict[str, int]:
        """Seeds in which the ``better`` variant alone has no result, and those in which the ``worse`` one has none."""
        return {
            "better": sum(a is None and b is not None for a, b in self.pairs),
            "worse": sum(a is not None and b is None for a, b in self.pairs),
        }

    @property
    def key(self) -> str:
        final = self.found.arm(self.data, self.test["better"]).error
        return str(self.test.get("along", self.test.get("key", final)))

    @property
    def compared(self) -> str:
        """What, in words."""
        probe, least = self.key.startswith("probe_"), self.key.endswith("_min")
        held_out = self.found.arm(self.data, self.test["better"]).config.validation is not None
        training = self.key == "train_error"
        part = "training" if training else "probe" if probe else "validation" if held_out else "test"
        name = f"{part} error" if self._is_error else COMPARED.get(self.key, self.key)
        if self.key == RISE:
            return f"rise of the {part} error from its least over epochs to its end"
        if "along" in self.test:
            return f"mean {name} over training"
        if not self._is_error:
            return name
        return f"least {name} over epochs" if least else f"final {name}"

    @property
    def _is_error(self) -> bool:
        return self.key in {RISE, "train_error"} or self.key.removesuffix("_min").endswith("test_error")

    @property
    def interval(self) -> tuple[float, float, float] | None:
        """None where the seeds are too few, or all alike, to tell an error."""
        spread = len(self.differences) > 1 and float(np.ptp(self.differences)) > 0
        return mean_interval(self.differences, 0.95) if spread else None

    @property
    def sign(self) -> int:
        """1 where it goes as the claim says, −1 where the other way, 0 where neither can be told.

        The interval of 1 − 5 % / ``family`` decides in both directions (Bonferroni). A seed in which one variant alone
        has no result is in no interval, and speaks against that variant: no sign favours it.
        """
        if self.interval is None:
            return 0
        _, low, high = mean_interval(self.differences, 1 - 0.05 / self.family)
        if low > 0:
            return 0 if self.lost["better"] else 1
        return -1 if high < 0 and not self.lost["worse"] else 0

    def __str__(self) -> str:
        scale, unit = (-100, " points") if self._is_error else (-1, "")
        names = f"{self.test['better']} against {self.test['worse']}"
        if beyond := self.test.get("beyond"):
            names += f", beyond what {beyond['better']} has against {beyond['worse']}"
        where = f" on {self.data}" if len(self.found.data) > 1 else ""
        lost = [
            f"{self.test[key]} alone without a result in {count}" for key, count in self.lost.items() if count
        ]
        seeds = ", ".join([f"n = {len(self.differences)}", *lost])
        if not len(self.differences):
            return f"{names}{where}: no seed in which both ended ({seeds})"
        text = f"{names}{where}: {_signed(scale * float(self.differences.mean()))}{unit}"
        if self.interval is None:
            return f"{text} ({seeds})"
        _, low, high = (scale * value for value in self.interval)
        return f"{text} ({_signed(high)} to {_signed(low)}; {seeds})"


def _difference(one: float | None, other: float | None) -> float | None:
    return None if one is None or other is None else one - other


def _signed(value: float) -> str:
    """Three digits with the sign that print has, none before 0."""
    text = f"{value:+.3g}".replace("-", "−")
    return text if value else "0"


def outcome(results: Sequence[Test]) -> Outcome:
    """Return the outcome of the whole claim, by the signs of its comparisons."""
    return claim_outcome([result.sign for result in results])


def text_of(results: Sequence[Test], others: Sequence[Test], untested: str, split_by_seed: bool) -> str:
    """The test, every difference by what is compared, how many go which way, and what is left."""
    shared = (
        "same start and order of batches, same split and labels, which each seed draws anew"
        if split_by_seed
        else "same data, start and order of batches"
    )
    text = (
        f"The test, on {' and '.join(dict.fromkeys(r.data for r in results))}: the difference in what is "
        f"named, paired by seed ({shared}), with a 95 % Student interval over the n seeds in which "
        f"both ended. {_told(results)} {bonferroni(len(results))} {sum(r.sign == 1 for r in results)} of "
        f"{len(results)} comparisons go as claimed, {sum(r.sign == -1 for r in results)} the opposite way."
    )
    if any(count for r in results for count in r.lost.values()):
        text += (
            " A variant that has no result in a seed, for example because it diverged, wins no comparison."
        )
    given = f"These are not part of the claim. {_told(others)}" if others else ""
    left = f"Not tested: {untested}." if untested else ""
    return " ".join(filter(None, (text, given, left)))


def _told(results: Sequence[Test]) -> str:
    by_what: dict[str, list[str]] = {}
    for result in results:
        by_what.setdefault(result.compared, []).append(str(result))
    told = (f"{what}: {'; '.join(said)}." for what, said in by_what.items())
    return " ".join(f"{each[0].upper()}{each[1:]}" for each in told)
