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
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gm_probe.core.errors import StorageError, UsageError
from gm_probe.core.files import read_json, read_toml

CONFIG = "config.toml"
SPLIT = "split.json"
METRICS = "metrics.jsonl"
CHECKPOINT = "checkpoint.safetensors"
BEST = "best.safetensors"
STATE = "state.pt"
SUMMARY = "summary.json"
MEASURES = "measures.json"


@dataclass(frozen=True, slots=True)
class RunRecord:
    """One run as found on disk.

    ``summary`` has ``status`` (finished, diverged, failed) and, for a finished run, ``train_error``,
    ``test_error``, ``train_ce``, ``test_ce``, ``error_gap``, ``ce_gap``; empty while the run is under way.
    ``measures`` maps a measure's name to its row (``value``, ``stderr``, ...); empty when not measured.
    ``settings`` is how these were taken.
    """

    path: Path
    config: dict[str, Any]
    summary: dict[str, Any]
    measures: dict[str, dict[str, Any]]
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def status(self) -> str:
        return str(self.summary.get("status", "unfinished"))


def read_run(path: Path) -> RunRecord:
    """Read the run folder ``path``.

    Raises:
        StorageError: a file of it is missing or broken.
    """
    summary = _read_table(path / SUMMARY)
    # a run that failed before it could begin has no configuration
    began = (path / CONFIG).exists() or summary.get("status") != "failed"
    config = read_toml(path / CONFIG) if began else {}
    measured = _read_table(path / MEASURES)
    measures, settings = measured.get("measures", {}), measured.get("settings", {})
    if not isinstance(measures, dict) or not isinstance(settings, dict):
        raise StorageError(f"{path / MEASURES} holds no table of measures; remove it and measure again")
    return RunRecord(path, config, summary, measures, settings)


def _read_table(path: Path) -> dict[str, Any]:
    """The JSON object in ``path``; empty where there is no such file."""
    value = read_json(path) if path.exists() else {}
    if not isinstance(value, dict):
        raise StorageError(f"{path} holds a {type(value).__name__}, not an object; remove it")
    return value


def find_runs(root: Path) -> list[Path]:
    """Run folders at or below ``root``, sorted by path.

    Raises:
        UsageError: ``root`` does not exist or holds no run.
    """
    if not root.is_dir():
        raise UsageError(f"{root} is not a folder; give the folder that `gmprobe sweep --out` wrote")
    runs = sorted({file.parent for name in (CONFIG, SUMMARY) for file in root.rglob(name)})
    if not runs:
        raise UsageError(f"{root} holds no run (no {CONFIG} below it); train one with `gmprobe train --out`")
    return runs


def read_metrics(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the epoch rows of a run folder. A torn last line (the run was killed there) ends the rows."""
    try:
        lines = (path / METRICS).read_bytes().splitlines()
    except OSError as error:
        raise StorageError(f"cannot read {path / METRICS}: {error.strerror or error}") from error
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
