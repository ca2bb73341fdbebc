"""What a run leaves on disk, and how it is read back. Imports no torch, so that analysis starts at once.

A run is a folder::

    config.toml              every setting it was trained with, and the machine it ran on
    split.json               indices of its train, unlabeled and test examples
    metrics.jsonl            one line an epoch
    checkpoint.safetensors   the final weights with model, classes and normalisation in the header
    best.safetensors         likewise, the weights of the lowest test error so far (with eval_every)
    state.pt                 the last good epoch or step, to resume from (removed once the run has finished)
    summary.json             status and final errors, written last
    measures.json            what `gmprobe measure` said of it
    error.txt                why training or measuring failed last, the reason in the last line
    .lock                    names who is at work on it, touched while it lives

A sweep is a folder of runs and, of what was asked for::

    sweep.json               every run's settings by its name, and what to measure of each
"""

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gm_probe.errors import StorageError, UsageError
from gm_probe.files.atomic import read_json, read_toml
from gm_probe.files.locks import held
from gm_probe.files.regular import read_record
from gm_probe.files.schema import LONGEST_TEXT, Check, Unfit, bounded
from gm_probe.runs.record_kinds import (
    CONFIG_KIND,
    GROUPS_KIND,
    MEASURES_KIND,
    METRICS_KIND,
    RESULT_KIND,
    SPLIT_KIND,
    SUMMARY_KIND,
    SWEEP_KIND,
)

CONFIG = "config.toml"
SPLIT = "split.json"
METRICS = "metrics.jsonl"
CHECKPOINT = "checkpoint.safetensors"
RUNS = Path("runs")
"""Where runs are written, and looked for, unless a command is told otherwise."""
BEST = "best.safetensors"
RAW = "raw.safetensors"
STATE = "state.pt"
SUMMARY = "summary.json"
MEASURES = "measures.json"
ERROR = "error.txt"
SWEEP = "sweep.json"


@dataclass(frozen=True, slots=True)
class RunRecord:
    """One run as found on disk.

    ``summary`` has ``status`` (finished, diverged, failed) and, for a finished run, ``train_error``,
    ``test_error``, ``train_ce``, ``test_ce``, ``error_gap``, ``ce_gap``; empty while the run is under way.
    A SimCLR encoder has none of these but ``nt_xent``, and ``probe_train_error`` and the like of its linear probe.
    ``measures`` maps a measure's name to its row (``value``, ``stderr``, ...); empty when not measured.
    ``settings`` is how these, and the spectral ``density`` if there is one, were taken.
    """

    path: Path
    config: dict[str, Any]
    summary: dict[str, Any]
    measures: dict[str, dict[str, Any]]
    settings: dict[str, Any] = field(default_factory=dict)
    density: dict[str, Any] | None = None

    @property
    def status(self) -> str:
        return str(self.summary.get("status", "unfinished"))

    @property
    def missed_stop(self) -> bool:
        """Whether training ended before it reached its ``stop_ce``; False where none was set."""
        return self.summary.get("met_stop_ce") is False

    def result(self, key: str) -> Any:
        """Return what the summary of a finished run says under ``key``.

        Raises:
            StorageError: nothing.
        """
        if self.summary.get(key) is None:
            raise StorageError(f"{self.path / SUMMARY}: {key} is missing. Train into a new folder")
        return self.summary[key]

    def measured(self, names: Iterable[str], asked: Mapping[str, Any]) -> bool:
        """Return whether it has the measures ``names``, taken with the settings ``asked``."""
        names = set(names)
        settings = {**UNNAMED, **self.settings}
        same = all(settings.get(key) == value for key, value in asked.items())
        return not names or (same and names <= set(self.measures))


def run_of(path: Path) -> Path:
    """Return the run folder that ``path`` is, or that a checkpoint file would lie in."""
    return path if path.is_dir() else path.parent


UNNAMED: Mapping[str, Any] = {"tf32": False, "noise_device": "device"}
"""The values of settings that an earlier version did not name."""


def read_run(path: Path) -> RunRecord:
    """Read the run folder ``path``.

    Raises:
        StorageError: a file of it is missing or broken, or holds what it may not (runs.record_kinds).
    """
    try:
        summary = _read_summary(path)
        # a run that failed before it could begin has no configuration
        began = (path / CONFIG).exists() or summary.get("status") != "failed"
        config = _checked(path / CONFIG, read_toml(path / CONFIG), CONFIG_KIND) if began else {}
        measured = _measured(path, MEASURES_KIND) if (path / MEASURES).exists() else {}
    except OSError as error:  # another user's folder
        raise StorageError(f"cannot read {path}: {error.strerror or error}") from error
    measures, settings = measured.get("measures", {}), measured.get("settings", {})
    return RunRecord(path, config, summary, measures, settings, measured.get("density"))


def read_result(path: Path) -> dict[str, Any]:
    """Return the whole measures.json of the run folder ``path``, with all that is shown of a measurement.

    Raises:
        StorageError: it is missing or broken, or lacks a key.
    """
    return _measured(path, RESULT_KIND, nan=False)


def read_split(path: Path) -> dict[str, Any]:
    """Return the split.json of the run folder ``path``: the indices of its parts, and a digest of its examples.

    Raises:
        StorageError: it is missing or broken.
    """
    return _checked(path / SPLIT, read_json(path / SPLIT), SPLIT_KIND, "train the run again")


def read_sweep_record(folder: Path) -> dict[str, Any]:
    """Return the sweep.json of ``folder``: the settings of every run by its name, and what to measure of each.

    Raises:
        StorageError: it is missing or broken.
    """
    return _checked(folder / SWEEP, read_json(folder / SWEEP), SWEEP_KIND, _again(folder))


def read_groups(folder: Path) -> list[str]:
    """Return the settings by which the recipe of the sweep ``folder`` groups, as its sweep.json says.

    Raises:
        StorageError: it is missing or broken.
    """
    content = _checked(folder / SWEEP, read_json(folder / SWEEP), GROUPS_KIND, _again(folder))
    names: list[str] = content.get("group_by", [])
    return names


def _again(folder: Path) -> str:
    return f"run `gmprobe sweep` into {folder} again"


def _read_summary(path: Path) -> dict[str, Any]:
    """Return the summary of the run ``path``; empty where there is none."""
    file = path / SUMMARY
    return _checked(file, read_json(file), SUMMARY_KIND) if file.exists() else {}


def _measured(path: Path, kind: Check, *, nan: bool = True) -> dict[str, Any]:
    advice = "remove it and measure again"
    try:
        value = read_json(path / MEASURES)
    except StorageError as error:
        raise StorageError(f"{error}; {advice}") from error
    return _checked(path / MEASURES, value, kind, advice, nan=nan)


def _checked(
    place: Path | str, value: Any, kind: Check, advice: str = "", *, nan: bool = True
) -> dict[str, Any]:
    """Return ``value``, as read from ``place``, where it is a table of this ``kind``.

    Raises:
        StorageError: it is not; the message names file and key.
    """
    try:
        bounded(value, nan=nan)
        kind(value, "")
    except Unfit as error:
        raise StorageError(f"{place}: {error}{advice and f'; {advice}'}") from error
    found: dict[str, Any] = value
    return found


def run_state(run: Path) -> str:
    """Return ``running`` (someone is at work on it), ``failed``, ``finished``, ``diverged``, ``stale`` or ``pending``.

    A stale run was begun and left: killed, or its machine is gone. A pending one has not begun.

    Raises:
        StorageError: its summary is broken.
    """
    return "running" if held(run) else state_at_rest(run)


def state_at_rest(run: Path) -> str:
    """Return ``run_state`` of a run that nobody holds."""
    if (run / ERROR).exists():
        return "failed"
    status = _read_summary(run).get("status")
    if status is not None:
        return str(status)
    return "stale" if (run / CONFIG).exists() else "pending"


def failure(run: Path) -> str | None:
    """Return the last line of what a failed run left, or why training diverged; None of others."""
    error = run / ERROR
    if error.exists():
        lines = read_record(error).decode(errors="replace").split("\n")
        return next((line for line in reversed(lines) if line.strip()), "no reason recorded")[:LONGEST_TEXT]
    reason = _read_summary(run).get("reason")
    return None if reason is None else str(reason)


def find_runs(root: Path) -> list[Path]:
    """Return the run folders at or below ``root``, sorted by path.

    Raises:
        UsageError: ``root`` does not exist or holds no run.
        StorageError: it cannot be read.
    """
    if not root.is_dir():
        raise UsageError(f"{root} is not a folder; give the folder that `gmprobe sweep --out` wrote")
    try:
        os.scandir(root).close()  # os.walk skips what it cannot read
    except OSError as error:
        raise StorageError(f"cannot read {root}: {error.strerror or error}") from error
    runs = sorted(Path(folder) for folder, _, files in os.walk(root) if {CONFIG, SUMMARY} & set(files))
    if not runs:
        raise UsageError(f"{root} holds no run (no {CONFIG} below it); train one with `gmprobe train --out`")
    return runs


def read_metrics(path: Path, required: Iterable[str] = ()) -> Iterator[dict[str, Any]]:
    """Yield the epoch rows of a run folder. A torn last line (the run was killed there) ends the rows.

    Args:
        required: keys that every row must have beside ``epoch``.

    Raises:
        StorageError: the file is missing, or a line of it is broken.
    """
    lines = read_record(path / METRICS).splitlines()
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            if number == len(lines):
                return
            raise StorageError(f"{path / METRICS} line {number} is not valid JSON: {error}") from error
        place = f"{path / METRICS} line {number}"
        row = _checked(place, row, METRICS_KIND)
        lacking = [key for key in required if key not in row]
        if lacking:
            raise StorageError(f"{place}: {lacking[0]} is missing. Train into a new folder")
        yield row
