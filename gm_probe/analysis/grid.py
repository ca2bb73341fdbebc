"""τ of S_ρ against ρ and K, from the grids that ``gmprobe measure --rho R,R --k-steps K,K`` records."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from gm_probe.analysis.coefficients import kendall
from gm_probe.analysis.design import seed_numbers, setting_numbers, target_column
from gm_probe.analysis.intervals import Quantity
from gm_probe.runs.records import RunRecord
from gm_probe.tables.table import LARGEST, RunTable

CELL = ("rho", "k_steps", "value")


def grid_taus(
    table: RunTable, records: Mapping[str, RunRecord], gap: str
) -> dict[int, dict[float, Quantity]]:
    """Return τ-b with ``gap`` by steps and radius, over the ``n`` runs that have both; empty without a grid."""
    setting, seed, column = setting_numbers(table), seed_numbers(table), target_column(table, gap)
    cells: dict[tuple[int, float], np.ndarray] = {}
    for row, run in enumerate(table.frame["run"]):
        for cell in grid_of(records[run]):
            place = (cell["k_steps"], cell["rho"])
            cells.setdefault(place, np.full(table.num_runs, np.nan))[row] = cell["value"]
    lines: dict[int, dict[float, Quantity]] = {}
    for (k_steps, rho), values in sorted(cells.items()):
        lines.setdefault(k_steps, {})[rho] = kendall(values, column, setting, seed)
    return lines


def grid_of(record: RunRecord) -> list[dict[str, Any]]:
    """Return the usable cells of a run's grid: those with a finite ``rho``, ``k_steps`` and ``value``."""
    row = record.measures.get("local_inconsistency")
    grid = row.get("grid", []) if isinstance(row, dict) else []
    return [cell for cell in grid if isinstance(cell, dict) and all(map(_finite, map(cell.get, CELL)))]


def _finite(value: object) -> bool:
    return isinstance(value, int | float) and abs(value) <= LARGEST
