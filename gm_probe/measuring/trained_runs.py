"""Find the trained runs of a folder. This file does not import torch, so that an empty folder is reported at once."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from gm_probe.errors import StorageError, UsageError
from gm_probe.runs.records import CHECKPOINT, CONFIG, SUMMARY, find_runs, read_run

BROKEN = "broken"


def trained_runs(folder: Path) -> list[Path]:
    """Return the finished runs below ``folder``, or ``folder`` itself where it is a run or holds none.

    A run with broken files is among them: measuring it says what is broken, and does not stop the others.

    Raises:
        UsageError: none of its runs has finished.
    """
    if (folder / CONFIG).exists() or not any(folder.rglob(CONFIG)):
        return [folder]
    runs = [run for run in find_runs(folder) if _status(run) in {"finished", BROKEN}]
    if not runs:
        raise UsageError(f"no run in {folder} has finished; see `gmprobe status {folder}`")
    return runs


def checkpoints_in(paths: Iterable[Path]) -> list[Path]:
    """Return ``paths`` with each folder of runs replaced by its finished runs.

    Raises:
        UsageError: a folder of runs has none that finished.
    """
    return [run for path in paths for run in (trained_runs(path) if path.is_dir() else [path])]


def last_finished(folder: Path) -> Path:
    """Return the run below ``folder`` that finished last.

    Raises:
        UsageError: no run has finished.
    """
    whole = [run for run in trained_runs(folder) if _status(run) == "finished"]
    if not whole:
        raise UsageError(f"no run in {folder} has finished; see `gmprobe status {folder}`")
    return max(whole, key=lambda run: (run / SUMMARY).stat().st_mtime)


def _status(run: Path) -> str | None:
    """Return the status of a run with a checkpoint, ``BROKEN`` for broken files, and None for other folders."""
    try:
        status = read_run(run).status
        if (run / CHECKPOINT).exists():
            return status
        return BROKEN if status == "finished" else None  # its weights are gone
    except StorageError:
        return BROKEN
    except OSError:  # another user's folder, without permission to read
        return None
