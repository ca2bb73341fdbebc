"""What a run recorded epoch by epoch, as arrays to draw."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from gm_probe.analysis.provenance import run_folder
from gm_probe.errors import StorageError
from gm_probe.runs.records import read_metrics
from gm_probe.tables.table import LARGEST, RunTable

CURVES = {
    "running_loss": "training loss (running)",
    "running_error": "training error (running)",
    "test_error": "test error",
    "local_inconsistency": r"$S_\rho$ along training",
}
Curve = tuple[np.ndarray, np.ndarray]


def read_curves(table: RunTable) -> tuple[dict[str, list[Curve]], dict[str, str]]:
    """Return every run's curve under each name of ``CURVES`` that is recorded, and unreadable runs with reasons."""
    found: dict[str, list[Curve]] = {name: [] for name in CURVES}
    unread: dict[str, str] = {}
    for run in table.frame["run"]:
        try:
            rows = list(read_metrics(run_folder(table, run)))
        except StorageError as error:
            rows, unread[run] = [], str(error)
        for name, curves in found.items():
            curves.append(curve(rows, name))
    return {name: curves for name, curves in found.items() if any(len(x) for x, _ in curves)}, unread


def curve(rows: Sequence[Mapping[str, Any]], name: str) -> Curve:
    """Return the (epochs, values) of ``name`` in the metrics ``rows``.

    Values that are not finite, or larger than any that a table takes, cannot be drawn and are left out.
    """
    pairs = [(row.get("epoch"), row.get(name)) for row in rows]
    points = [pair for pair in pairs if all(isinstance(value, int | float) for value in pair)]
    x, y = np.array(points, dtype=float).reshape(-1, 2).T
    drawn = np.abs(y) <= LARGEST  # NaN compares as False
    return x[drawn], y[drawn]
