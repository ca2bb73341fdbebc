"""Training settings that are compared: their runs as tables, and whether one does better, paired by seed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from gm_probe.analysis.intervals import mean_interval
from gm_probe.reproduce.claims import bonferroni
from gm_probe.runs.records import RunRecord, read_metrics, read_run
from gm_probe.training.config import TrainConfig

RISE = "error_rise"
"""Column of the rise of the error from its least over epochs to its end."""
SHOWN = ("method", "lr", "rho", "beta", "k_steps", "m", "seed", "epochs")


@dataclass(frozen=True)
class Arm:
    """One variant on one data set: its configuration, and its runs, a seed each; ``published``: the paper's number."""

    data: str
    label: str
    config: TrainConfig
    runs: tuple[Path, ...]
    published: str = ""

    @property
    def error(self) -> str:
        """Return the summary's key of the test error; for a SimCLR encoder, its linear probe's."""
        return "probe_test_error" if self.config.trains_encoder else "test_error"

    @cached_property
    def records(self) -> list[RunRecord]:
        return [read_run(path) for path in self.runs]

    @cached_property
    def metrics(self) -> list[list[dict[str, Any]]]:
        """Return the epochs of every run."""
        return [list(read_metrics(path)) for path in self.runs]

    @cached_property
    def epochs(self) -> pd.DataFrame:
        """Return one row per epoch of every run that finished."""
        return self._table(
            {"run": number, **row}
            for number, rows in enumerate(self.metrics)
            if self.records[number].status == "finished"
            for row in rows
        )

    @cached_property
    def cells(self) -> pd.DataFrame:
        """Return S_ρ of every run at its end, one row per K that it was measured with; empty without a grid."""
        grids = (record.measures.get("local_inconsistency", {}).get("grid", ()) for record in self.records)
        return self._table(cell for grid in grids for cell in grid)

    @cached_property
    def table(self) -> pd.DataFrame:
        """Return one row per run: its settings, its status and its results, NaN where it did not finish."""
        rows = []
        for number, record in enumerate(self.records):
            found: dict[str, Any] = {"status": record.status}
            if record.status == "finished":
                found = record.summary | {name: row["value"] for name, row in record.measures.items()}
                tracked = {row["epoch"]: row.get("local_inconsistency") for row in self.metrics[number]}
                found.setdefault("local_inconsistency", tracked.get(self.config.epochs))
            rows.append({"run": number, **{key: record.config.get(key) for key in SHOWN}, **found})
        table = self._table(rows)
        for key in (self.error, f"{self.error}_min"):
            table[key] = table.get(key, pd.Series(dtype=float)).astype(float)
        side = ", one-sided" if self.config.kl_grad == "perturbed" else ""
        table["line"] = f"{self.config.method.upper()}{side}"
        table["share"] = table.m.fillna(self.config.batch_size)
        return table.assign(error=table[self.error], **{RISE: table[self.error] - table[f"{self.error}_min"]})

    def _table(self, rows: Any) -> pd.DataFrame:
        return pd.DataFrame(rows).assign(data=self.data, variant=self.label)

    def values(self, key: str) -> np.ndarray:
        """Return ``key`` of every run (n,), NaN without a result."""
        return self.table.get(key, pd.Series(np.nan, self.table.index)).to_numpy(float)

    def means_along(self, key: str) -> np.ndarray:
        """Return every run's mean of ``key`` (n,) from its first epoch to its last: the area by its width.

        NaN of a run that did not finish, or has no two.
        """
        found = np.full(len(self.runs), np.nan)
        if key in self.epochs:
            for _, track in self.epochs.dropna(subset=[key]).groupby("run"):
                if len(track) > 1:
                    found[track.run.iloc[0]] = np.trapezoid(track[key], track.epoch) / np.ptp(track.epoch)
        return found

    @property
    def epoch_seconds(self) -> float:
        """Return the fastest epoch's seconds over all runs, which other load on the machine does not change."""
        seconds = (row["seconds"] for rows in self.metrics for row in rows if "seconds" in row)
        return float(min(seconds, default=np.nan))


@dataclass(frozen=True, slots=True)
class Comparison:
    """Every arm that was trained, in the order of the recipe."""

    arms: tuple[Arm, ...]

    def arm(self, data: str, label: str) -> Arm:
        return next(arm for arm in self.arms if (arm.data, arm.label) == (data, label))

    @property
    def data(self) -> list[str]:
        return list(dict.fromkeys(arm.data for arm in self.arms))

    def tables(self) -> dict[str, pd.DataFrame]:
        """Return all runs, their epochs and what was measured by K, for pictures."""
        kinds = ("table", "epochs", "cells")
        return {kind: pd.concat([getattr(arm, kind) for arm in self.arms]) for kind in kinds}


@dataclass(frozen=True)
class Difference:
    """Whether one variant does better than another on one data set: paired by seed.

    Attributes:
        test: ``better`` and ``worse``, and what is compared: a ``key`` of a run's results (by default the final error),
            or the mean over training of what its metrics have ``along`` it; ``beyond`` names two more variants, whose
            difference is taken off.
        family: comparisons that the claim is made of, this one among them.
    """

    found: Comparison
    data: str
    test: Mapping[str, Any]
    family: int = 1

    @property
    def key(self) -> str:
        return str(
            self.test.get("along", self.test.get("key", self.found.arm(self.data, self.test["better"]).error))
        )

    @cached_property
    def pairs(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the results of the better and the worse variant by seed (n,); NaN without a result."""
        better, worse = self._values(self.test)
        if "beyond" in self.test:
            a, b = self._values(self.test["beyond"])
            return better - a, worse - b
        return better, worse

    def _values(self, names: Mapping[str, Any]) -> list[np.ndarray]:
        arms = [self.found.arm(self.data, names[key]) for key in ("better", "worse")]
        return [arm.means_along(self.key) if "along" in self.test else arm.values(self.key) for arm in arms]

    @property
    def differences(self) -> np.ndarray:
        """Return worse − better of every seed where both finished; above 0 is what the claim says."""
        found = self.pairs[1] - self.pairs[0]
        return found[np.isfinite(found)]

    @property
    def lost(self) -> dict[str, int]:
        """Count the seeds in which only the ``better`` or only the ``worse`` variant has no result."""
        better, worse = map(np.isnan, self.pairs)
        return {"better": int((better & ~worse).sum()), "worse": int((worse & ~better).sum())}

    def interval(self, level: float = 0.95) -> tuple[float, float] | None:
        """Return the interval of the mean difference; None where the seeds are too few or all alike."""
        if len(self.differences) < 2 or np.ptp(self.differences) == 0:
            return None
        _, low, high = mean_interval(self.differences, level)
        return low, high

    @property
    def sign(self) -> int:
        """Return 1 where the difference is as the claim says, −1 where it is the opposite, 0 where neither is clear.

        The interval of 1 − 5 % / ``family`` decides in both directions (Bonferroni). A seed in which one variant alone
        has no result is in no interval, and speaks against that variant: no sign favours it.
        """
        low, high = self.interval(1 - 0.05 / self.family) or (0.0, 0.0)
        if low > 0:
            return 0 if self.lost["better"] else 1
        return -1 if high < 0 and not self.lost["worse"] else 0

    @property
    def compared(self) -> str:
        """Return in words what is compared."""
        held_out = self.found.arm(self.data, self.test["better"]).config.validation is not None
        own = "validation" if held_out else "test"
        part = {"train": "training", "probe": "probe"}.get(self.key.partition("_")[0], own)
        known = {"local_inconsistency": "S_ρ", "running_nt_xent": "NT-Xent of training"}
        name = known.get(self.key, f"{part} error")
        if self.key == RISE:
            return f"rise of the {name} from its least over epochs to its end"
        if "along" in self.test:
            return f"mean {name} over training"
        if self.key in known:
            return name
        return f"least {name} over epochs" if self.key.endswith("_min") else f"final {name}"

    def __str__(self) -> str:
        scale, unit = (-100, " points") if "error" in self.key else (-1, "")
        names = f"{self.test['better']} against {self.test['worse']}"
        if beyond := self.test.get("beyond"):
            names += f", beyond what {beyond['better']} has against {beyond['worse']}"
        where = f" on {self.data}" if len(self.found.data) > 1 else ""
        lost = [f"{self.test[key]} alone without a result in {n}" for key, n in self.lost.items() if n]
        seeds = ", ".join([f"n = {len(self.differences)}", *lost])
        if not len(self.differences):
            return f"{names}{where}: no seed in which both ended ({seeds})"
        text = f"{names}{where}: {_signed(scale * float(self.differences.mean()))}{unit}"
        if (ends := self.interval()) is None:
            return f"{text} ({seeds})"
        return f"{text} ({_signed(scale * ends[1])} to {_signed(scale * ends[0])}; {seeds})"


def _signed(value: float) -> str:
    """Return three digits with a typographic sign, none before 0."""
    return f"{value:+.3g}".replace("-", "−") if value else "0"


def text_of(
    results: Sequence[Difference], others: Sequence[Difference], untested: str, split_by_seed: bool
) -> str:
    """Describe the test, every difference by what is compared, how many go which way, and what is not tested."""
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


def _told(results: Sequence[Difference]) -> str:
    by_what: dict[str, list[str]] = {}
    for result in results:
        by_what.setdefault(result.compared, []).append(str(result))
    told = (f"{what}: {'; '.join(said)}." for what, said in by_what.items())
    return " ".join(f"{each[0].upper()}{each[1:]}" for each in told)
