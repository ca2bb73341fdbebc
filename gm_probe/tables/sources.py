"""What a table of runs may be read from. Imports no pandas, so that a wrong request is told at once."""

from __future__ import annotations

from pathlib import Path

from gm_probe.errors import UsageError
from gm_probe.runs.records import find_runs

SUFFIXES = (".csv", ".tsv", ".parquet")
"""Of the files that are read (spreadsheets.READERS)."""


def require_source(source: Path) -> None:
    """Raise UsageError unless ``source`` is a folder that holds a run, or a file that may be a table."""
    if source.is_dir():
        find_runs(source)
    elif not source.exists():
        raise UsageError(f"{source} does not exist; give a folder of runs, a .csv, .tsv or .parquet file")
    elif source.suffix.lower() not in SUFFIXES:
        raise UsageError(f"{source} is neither a folder of runs nor a .csv, .tsv or .parquet file")
