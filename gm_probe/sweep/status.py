"""How far a sweep has come, from what lies on disk. Imports no torch, so that the answer comes at once."""

from __future__ import annotations

import math
import os
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from gm_probe.errors import StorageError, UsageError
from gm_probe.files.locks import StageProgress, progress_of
from gm_probe.files.regular import read_record
from gm_probe.runs.records import (
    CONFIG,
    MEASURES,
    METRICS,
    SUMMARY,
    SWEEP,
    failure,
    find_runs,
    read_run,
    read_sweep_record,
    run_state,
)
from gm_probe.training.objectives import trains_encoder

STATES = ("finished", "trained", "running", "stale", "pending", "diverged", "failed")
ENDED = frozenset({"finished", "diverged", "failed"})


@dataclass(frozen=True, slots=True)
class RunStatus:
    """One run of a sweep.

    Attributes:
        state: as ``run_state`` says it; ``trained`` = finished, but not measured as the sweep asks for.
        epochs: done so far; ``max_epochs`` at most, None where its settings cannot be read.
        reason: the last line of what a failed run left, or why training diverged.
        began: when (seconds since 1970) it was begun first.
        ended: likewise, when it came to its end.
        progress: what its holder last reported, while it is running.
    """

    run: str
    state: str
    epochs: int
    max_epochs: int | None
    reason: str | None = None
    began: float | None = None
    ended: float | None = None
    progress: StageProgress | None = None


@dataclass(frozen=True, slots=True)
class SweepStatus:
    """Every run that was asked for or lies there.

    Attributes:
        eta: seconds until the last one ends, at the pace since the sweep was last started; None while nothing runs or
            nothing is done. Of several sweeps, until the last of them ends.
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
            del run["began"], run["ended"]
            progress = run["word"] = run.pop("progress")
            if progress is not None:  # a loss may be infinite, which JSON cannot say
                more = progress["more"]
                progress["more"] = {
                    key: None if isinstance(value, float) and not math.isfinite(value) else value
                    for key, value in more.items()
                }
        return {"counts": self.counts, "eta_seconds": self.eta, "runs": runs}


def sweep_status(root: Path) -> SweepStatus:
    """Look at every run at or below ``root``, and at those that a sweep.json there asks for.

    Raises:
        UsageError: ``root`` holds neither.
        StorageError: the sweep.json of ``root`` is broken. Below it, a broken one counts as a failed run.
    """
    sweeps, broken = _find_sweeps(root)
    asked = {sweep.folder / name: (sweep, name) for sweep in sweeps for name in sweep.runs}
    try:
        found = find_runs(root)
    except UsageError:
        if not asked and not broken:
            raise
        found = []
    runs = {
        path: run_status(path, _name(path, root), *asked.get(path, ()))
        for path in dict.fromkeys([*asked, *found])
    }
    etas = [_eta([runs[sweep.folder / name] for name in sweep.runs], sweep) for sweep in sweeps]
    return SweepStatus((*runs.values(), *broken), max((eta for eta in etas if eta is not None), default=None))


@dataclass(frozen=True, slots=True)
class _Sweep:
    """What the sweep.json in ``folder`` asks for, and when (seconds since 1970) it was started last."""

    folder: Path
    began: float
    content: dict[str, Any]

    @property
    def runs(self) -> dict[str, Any]:
        return self.content["runs"]

    @property
    def stages(self) -> tuple[str, ...]:
        return ("training", "measuring") if self.content["measures"] else ("training",)


def _find_sweeps(root: Path) -> tuple[list[_Sweep], list[RunStatus]]:
    """Return the sweeps at or below ``root``, and a failed row for each below it whose sweep.json is broken."""
    sweeps, broken = [], []
    for folder, _, files in os.walk(root):
        if SWEEP not in files:
            continue
        try:
            sweeps.append(_read_sweep(Path(folder)))
        except StorageError as error:  # one folder must not hide the others
            if Path(folder) == root:
                raise
            broken.append(RunStatus(_name(Path(folder) / SWEEP, root), "failed", 0, None, str(error)))
    return sweeps, broken


def _read_sweep(folder: Path) -> _Sweep:
    return _Sweep(folder, (folder / SWEEP).stat().st_mtime, read_sweep_record(folder))


def run_status(path: Path, name: str, sweep: _Sweep | None = None, planned_as: str = "") -> RunStatus:
    """Return the status of the run folder ``path``, which ``sweep`` asks for under the name ``planned_as``."""
    planned = None if sweep is None else sweep.runs[planned_as]
    try:
        state, reason = run_state(path), failure(path)
        if state == "finished" and sweep is not None and planned is not None:
            batch_dependent = (
                sweep.content.get("coupled", {}) if trains_encoder(planned.get("objective")) else {}
            )
            asked = {**sweep.content["settings"], **batch_dependent}
            state = state if read_run(path).measured(sweep.content["measures"], asked) else "trained"
    except StorageError as error:
        state, reason = "failed", str(error)
    except OSError as error:  # another user's folder
        state, reason = "failed", f"cannot read {path}: {error.strerror or error}"
    most = planned.get("epochs") if planned is not None else _max_epochs(path)
    ended = _latest(path, (SUMMARY, MEASURES)) if state in ENDED else None
    progress = progress_of(path) if state == "running" else None
    return RunStatus(name, state, _epochs(path), most, reason, _latest(path, (CONFIG,)), ended, progress)


def _name(path: Path, root: Path) -> str:
    return path.relative_to(root).as_posix() if path != root else root.resolve().name


def _epochs(path: Path) -> int:
    try:
        return read_record(path / METRICS).count(b"\n")
    except StorageError:
        return 0


def _max_epochs(path: Path) -> int | None:
    try:
        epochs = read_run(path).config.get("epochs")
    except (StorageError, OSError):
        return None
    return epochs


def _latest(path: Path, names: Sequence[str]) -> float | None:
    """Return when the last of the files ``names`` was written; None where there is none of them."""
    times = []
    for name in names:
        with suppress(OSError):
            times.append((path / name).stat().st_mtime)
    return max(times, default=None)


def _eta(runs: Sequence[RunStatus], sweep: _Sweep) -> float | None:
    """Return the seconds left at the pace since the sweep's start; earlier runs' work since then is unknown."""
    at_work = [run for run in runs if run.state == "running"]
    ended = [run for run in runs if run.ended is not None and run.ended >= sweep.began]
    shares = {run.run: run.progress.share(sweep.stages) for run in at_work if run.progress is not None}
    begun = [run.began for run in (*at_work, *ended) if run.began is not None]
    fresh = [run for run in at_work if run.began is not None and run.began >= sweep.began]
    done = len(ended) + sum(shares.get(run.run, 0.0) for run in fresh)
    if not at_work or not done:
        return None
    left = sum(run.state not in ENDED for run in runs) - sum(shares.values())
    since = max(sweep.began, min(begun, default=0.0))  # on a cluster it may have waited
    return (time.time() - since) / done * left
