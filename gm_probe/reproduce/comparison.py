"""Training settings that are compared, and what lies on disk of their runs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from gm_probe.core.records import RunRecord, read_metrics, read_run
from gm_probe.training.config import TrainConfig


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
    def records(self) -> list[RunRecord]:
        return [read_run(path) for path in self.runs]

    def figures(self, key: str) -> list[float | None]:
        """``key`` of every run's summary, or the measure of that name; None of a run that diverged."""
        found = [r.summary | {name: row["value"] for name, row in r.measures.items()} for r in self.records]
        return [values.get(key) if values.get("status") == "finished" else None for values in found]

    def along(self, key: str) -> dict[int, list[float]]:
        """``key`` of the runs' metrics by epoch."""
        found: dict[int, list[float]] = {}
        for path in self.runs:
            for row in read_metrics(path):
                if key in row:
                    found.setdefault(row["epoch"], []).append(row[key])
        return found


@dataclass(frozen=True, slots=True)
class Comparison:
    """Every arm that was trained, in the order of the recipe."""

    arms: tuple[Arm, ...]

    def arm(self, data: str, label: str) -> Arm:
        return next(arm for arm in self.arms if (arm.data, arm.label) == (data, label))

    @property
    def data(self) -> list[str]:
        return list(dict.fromkeys(arm.data for arm in self.arms))

    @property
    def labels(self) -> list[str]:
        return list(dict.fromkeys(arm.label for arm in self.arms))
