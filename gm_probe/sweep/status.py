"""How far a sweep has come, from what lies on disk. Imports no torch, so that the answer comes at once."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from gm_probe.core.errors import StorageError, UsageError
from gm_probe.core.files import Word, read_json, told
from gm_probe.core.records import MEASURES, METRICS, SUMMARY, SWEEP, failure, find_runs, read_run, run_state

STATES = ("finished", "trained", "running", "stale", "pending", "diverged", "failed")
ENDED = frozenset({"finished", "diverged", "failed"})


@dataclass(frozen=True, slots=True)
class RunStatus:
    """One run of a sweep.

    Attributes:
        state: as ``run_state`` says it; ``trained`` = finished, but not measured as the sweep asks for.
        epochs: done so far; ``max_epochs`` at most, None where its settings cannot be read.
        reason: the last line of what a failed run left, or why training diverged.
        ended: when (seconds since 1970) it came to its end.
        word: what its holder last told, while it is running.
    """

    run: str
    state: str
    epochs: int
    max_epochs: int | None
    reason: str | None = None
    ended: float | None = None
    word: Word | None = None


@dataclass(frozen=True, slots=True)
class SweepStatus:
    """Every run that was asked for or lies there.

    Attributes:
        eta: seconds until the last one ends at the rate of those that ended since the sweep was last started; None
            while nothing runs or none has.
    """

    runs: tuple[RunStatus, ...]
    eta: float | None

    @property
    def counts(self) -> dict[str, int]:
        found = Counter(run.state for run in self.runs)
        return {state: found[state] for state in STATES if found[state]}

    def as_dict(self) -> dict[str, Any]:
        runs = [asdict(run) for run in self.runs]
        for run in runs:
            del run["ended"]
        return {"counts": self.counts, "eta_seconds": self.eta, "runs": runs}


def sweep_status(root: Path) -> SweepStatus:
    """Look at every run at or below ``root``, and at those that its sweep.json asks for.

    Raises:
        UsageError: ``root`` holds neither.
        StorageError: sweep.json is broken.
    """
    asked = read_json(root / SWEEP) if (root / SWEEP).exists() else {}
    planned = asked.get("runs", {})
    try:
        found = find_runs(root)
    except UsageError:
        if not planned:
            raise
        found = []
    paths = dict.fromkeys([*(root / name for name in planned), *found])
    runs = tuple(run_status(path, _name(path, root), asked) for path in paths)
    began = (root / SWEEP).stat().st_mtime if planned else None
    return SweepStatus(runs, _eta(runs, began))


def run_status(path: Path, name: str, asked: dict[str, Any]) -> RunStatus:
    """Of the run folder ``path``; ``asked`` is the content of sweep.json, or empty."""
    planned = asked.get("runs", {}).get(name)
    try:
        state, reason = run_state(path), failure(path)
        if state == "finished" and planned is not None:
            coupled = asked.get("coupled", {}) if planned.get("objective") == "simclr" else {}
            measured = read_run(path).measured(asked["measures"], {**asked["settings"], **coupled})
            state = state if measured else "trained"
    except StorageError as error:
        state, reason = "failed", str(error)
    most = planned["epochs"] if planned is not None else _max_epochs(path)
    ended = _ended(path) if state in ENDED else None
    word = told(path) if state == "running" else None
    return RunStatus(name, state, _epochs(path), most, reason, ended, word)


def _name(path: Path, root: Path) -> str:
    return path.relative_to(root).as_posix() if path != root else root.resolve().name


def _epochs(path: Path) -> int:
    try:
        return (path / METRICS).read_bytes().count(b"\n")
    except OSError:
        return 0


def _max_epochs(path: Path) -> int | None:
    try:
        epochs = read_run(path).config.get("epochs")
    except StorageError:
        return None
    return epochs if isinstance(epochs, int) else None


def _ended(path: Path) -> float | None:
    times = [(path / name).stat().st_mtime for name in (SUMMARY, MEASURES) if (path / name).exists()]
    return max(times, default=None)


def _eta(runs: Sequence[RunStatus], began: float | None) -> float | None:
    if began is None or not any(run.state == "running" for run in runs):
        return None
    recent = sum(run.ended is not None and run.ended >= began for run in runs)
    left = sum(run.state not in ENDED for run in runs)
    return (time.time() - began) / recent * left if recent else None
