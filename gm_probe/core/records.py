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

from gm_probe.core.errors import StorageError, UsageError
from gm_probe.core.files import read_json, read_toml
from gm_probe.core.locks import held
from gm_probe.core.regular import read_record

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

    def measured(self, names: Iterable[str], asked: Mapping[str, Any]) -> bool:
        """Whether it has the measures ``names``, taken with the settings ``asked``."""
        names = set(names)
        same = all(self.settings.get(key) == value for key, value in asked.items())
        return not names or (same and names <= set(self.measures))


def read_run(path: Path) -> RunRecord:
    """Read the run folder ``path``.

    Raises:
        StorageError: a file of it is missing or broken.
    """
    summary = _read_table(path / SUMMARY)
    # a run that failed before it could begin has no configuration
    began = (path / CONFIG).exists() or summary.get("status") != "failed"
    config = read_toml(path / CONFIG) if began else {}
    try:
        measured = _read_table(path / MEASURES)
    except StorageError as error:
        raise StorageError(f"{error}; remove it and measure again") from error
    measures, settings = measured.get("measures", {}), measured.get("settings", {})
    if not isinstance(measures, dict) or not isinstance(settings, dict):
        raise StorageError(f"{path / MEASURES} holds no table of measures; remove it and measure again")
    return RunRecord(path, config, summary, measures, settings, measured.get("density"))


def _read_table(path: Path) -> dict[str, Any]:
    """The JSON object in ``path``; empty where there is no such file."""
    value = read_json(path) if path.exists() else {}
    if not isinstance(value, dict):
        raise StorageError(f"{path} holds a {type(value).__name__}, not an object")
    return value


def run_state(run: Path) -> str:
    """``running`` (someone is at work on it), ``failed``, ``finished``, ``diverged``, ``stale`` or ``pending``.

    A stale run was begun and left: killed, or its machine is gone. A pending one has not begun.

    Raises:
        StorageError: its summary is broken.
    """
    return "running" if held(run) else state_at_rest(run)


def state_at_rest(run: Path) -> str:
    """``run_state`` of a run that nobody holds."""
    if (run / ERROR).exists():
        return "failed"
    status = _read_table(run / SUMMARY).get("status")
    if status is not None:
        return str(status)
    return "stale" if (run / CONFIG).exists() else "pending"


def failure(run: Path) -> str | None:
    """The last line of what a failed run left, or why training diverged; None of others."""
    error = run / ERROR
    if error.exists():
        lines = read_record(error).decode(errors="replace").split("\n")
        return next((line for line in reversed(lines) if line.strip()), "no reason recorded")
    reason = _read_table(run / SUMMARY).get("reason")
    return None if reason is None else str(reason)


def find_runs(root: Path) -> list[Path]:
    """Run folders at or below ``root``, sorted by path.

    Raises:
        UsageError: ``root`` does not exist or holds no run.
        StorageError: it cannot be read.
    """
    if not root.is_dir():
        raise UsageError(f"{root} is not a folder; give the folder that `gmprobe sweep --out` wrote")
    try:
        os.scandir(root).close()  # walking passes over what it cannot read
    except OSError as error:
        raise StorageError(f"cannot read {root}: {error.strerror or error}") from error
    runs = sorted(Path(folder) for folder, _, files in os.walk(root) if {CONFIG, SUMMARY} & set(files))
    if not runs:
        raise UsageError(f"{root} holds no run (no {CONFIG} below it); train one with `gmprobe train --out`")
    return runs


def read_metrics(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the epoch rows of a run folder. A torn last line (the run was killed there) ends the rows."""
    lines = read_record(path / METRICS).splitlines()
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
        except ValueError as error:
            if number == len(lines):
                return
            raise StorageError(f"{path / METRICS} line {number} is not valid JSON: {error}") from error
        if not isinstance(row, dict):
            raise StorageError(f"{path / METRICS} line {number} is no object")
        yield row
