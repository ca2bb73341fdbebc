"""What may be asked of a table of runs. Imports neither pandas nor scipy, so that a wrong request is told at once."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from gm_probe.analysis.table import require_known
from gm_probe.errors import UsageError
from gm_probe.runs.records import find_runs

SUFFIXES = (".csv", ".tsv", ".parquet")
"""Of the files that are read (spreadsheets.READERS)."""
PARTS = ("details", "conditional", "prediction", "comparisons")
"""What can be skipped; ``details`` holds all that goes beyond τ and comparisons."""
LEAST_RESAMPLES = 100


def require_source(source: Path) -> None:
    """Raise UsageError unless ``source`` is a folder that holds a run, or a file that may be a table."""
    if source.is_dir():
        find_runs(source)
    elif not source.exists():
        raise UsageError(f"{source} does not exist; give a folder of runs, a .csv, .tsv or .parquet file")
    elif source.suffix.lower() not in SUFFIXES:
        raise UsageError(f"{source} is neither a folder of runs nor a .csv, .tsv or .parquet file")


def require_statistics(skip: Collection[str], resamples: int) -> None:
    """Raise UsageError for an unknown part in ``skip``, or too few ``resamples``."""
    require_known(skip, PARTS, "part to skip named")
    if resamples < LEAST_RESAMPLES:
        raise UsageError(
            f"{resamples} resamples are too few for an interval or p. Give {LEAST_RESAMPLES} or more"
        )
