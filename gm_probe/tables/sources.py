"""What a table of runs may be read from. Imports no pandas, so that a wrong request is told at once."""

from __future__ import annotations

from pathlib import Path

from gm_probe.errors import UsageError
from gm_probe.runs.records import find_runs
from gm_probe.tables import trackers

SUFFIXES = (".csv", ".tsv", ".jsonl", ".ndjson", ".json", ".parquet", *trackers.DATABASES)
"""Suffixes of the files that are read (``readers.READERS``)."""
TAKEN = "a folder of runs (gmprobe, MLflow, Lightning, Hugging Face), or a .csv, .tsv, .jsonl, .parquet or .db file"


def holds_our_runs(source: Path) -> bool:
    """Return whether ``source`` is a folder that no other tracker wrote."""
    return source.is_dir() and trackers.tracker(source) is None


def beside(source: Path, name: str) -> Path:
    """Return where a result called ``name`` is written by default: in a folder of our runs, else beside ``source``."""
    if holds_our_runs(source):
        return source / name
    whole = source if source.name else source.resolve()
    return whole.with_name(f"{whole.stem}-{name}")


def require_source(source: Path) -> None:
    """Raise UsageError unless ``source`` is a folder that holds a run, or a file that may be a table."""
    if source.is_dir():
        if holds_our_runs(source):
            find_runs(source)
    elif not source.exists():
        raise UsageError(f"{source} does not exist; give {TAKEN}")
    elif source.suffix.lower() not in SUFFIXES:
        raise UsageError(f"{source} is neither {TAKEN.replace(', or', ' nor')}")
