"""Training settings that are compared, and what lies on disk of their runs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from gm_probe.runs.records import RunRecord, read_metrics, read_run
from gm_probe.training.config import TrainConfig

RISE = "error_rise"


@dataclass(frozen=True, slots=True)
class Arm:
    """One variant on one data set: its configuration, and its runs, a seed each.

    Attributes:
        published: what the paper has in this cell.
    """

    data: str
    label: str
    config: TrainConfig
    runs: tuple[Path, ...]
    published: str

    @property
    def error(self) -> str:
        """The summary's key of the error on the test part: of a SimCLR encoder, its linear probe's."""
        return "probe_test_error" if self.config.trains_encoder else "test_error"

    @property
    def records(self) -> list[RunRecord]:
        return [read_run(path) for path in self.runs]

    def figures(self, key: str) -> list[float | None]:
        """``key`` of every run's summary, or the measure of that name; None of a run that diverged.

        ``RISE`` is how far the error has come up again from its least over epochs.
        """
        if key == RISE:
            ends, least = self.errors, self.figures(f"{self.error}_min")
            return [None if a is None or b is None else a - b for a, b in zip(ends, least, strict=True)]
        found = [r.summary | {name: row["value"] for name, row in r.measures.items()} for r in self.records]
        return [values.get(key) if values.get("status") == "finished" else None for values in found]

    @property
    def errors(self) -> list[float | None]:
        """Of every run, at its end; None of one that diverged."""
        return self.figures(self.error)

    @property
    def s_rho(self) -> list[float | None]:
        """Of every run at its end: as it was measured, or else where it was tracked to the last epoch."""
        measured = [r.measures.get("local_inconsistency", {}).get("value") for r in self.records]
        tracked = [_track(path, "local_inconsistency").get(self.config.epochs) for path in self.runs]
        return [one if one is not None else other for one, other in zip(measured, tracked, strict=True)]

    @property
    def measured_by_k(self) -> dict[int, list[float]]:
        """S_ρ of every run at its end, by the K that it was measured with; empty where there was no such grid."""
        found: dict[int, list[float]] = {}
        for record in self.records:
            for cell in record.measures.get("local_inconsistency", {}).get("grid", ()):
                found.setdefault(cell["k_steps"], []).append(cell["value"])
        return found

    @property
    def epoch_seconds(self) -> list[float]:
        """The fastest epoch's of every run that has any: what slows a machine down now and then is not in it."""
        tracks = [_track(path, "seconds") for path in self.runs]
        return [min(track.values()) for track in tracks if track]

    def along(self, key: str) -> dict[int, list[float]]:
        """``key`` of the runs' metrics by epoch; of those that ended, lest means jump where one stops."""
        found: dict[int, list[float]] = {}
        for track in filter(None, self._tracks(key)):
            for epoch, value in track.items():
                found.setdefault(epoch, []).append(value)
        return found

    def means_along(self, key: str) -> list[float | None]:
        """Every run's mean of ``key`` over the epochs from its first value to its last.

        That is the area under straight lines between them by its width; None of a run that diverged, or has no two.
        """
        return [_mean_height(t) if t is not None and len(t) > 1 else None for t in self._tracks(key)]

    def _tracks(self, key: str) -> list[dict[int, float] | None]:
        """``key`` of every run's metrics by epoch; None of a run that diverged."""
        ended = [record.status == "finished" for record in self.records]
        return [_track(path, key) if ok else None for path, ok in zip(self.runs, ended, strict=True)]


def _track(path: Path, key: str) -> dict[int, float]:
    return {row["epoch"]: row[key] for row in read_metrics(path) if key in row}


def _mean_height(track: Mapping[int, float]) -> float:
    epochs, values = list(track), list(track.values())
    return float(np.trapezoid(values, epochs)) / (epochs[-1] - epochs[0])


def plain(label: str) -> str:
    """``label`` as a part of a file's name."""
    return "".join(c for c in label.lower() if c.isalnum() or c == "-")


@dataclass(frozen=True, slots=True)
class Comparison:
    """Every arm that was trained, in the order of the recipe."""

    arms: tuple[Arm, ...]

    def arm(self, data: str, label: str) -> Arm:
        return next(arm for arm in self.of(data) if arm.label == label)

    def of(self, data: str) -> list[Arm]:
        """Those on one data set."""
        return [arm for arm in self.arms if arm.data == data]

    @property
    def data(self) -> list[str]:
        return list(dict.fromkeys(arm.data for arm in self.arms))

    @property
    def labels(self) -> list[str]:
        return list(dict.fromkeys(arm.label for arm in self.arms))
