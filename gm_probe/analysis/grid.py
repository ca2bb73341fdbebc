"""τ of S_ρ against ρ and K, from the grids that ``gmprobe measure --rho R,R --k-steps K,K`` records."""

import math
from collections.abc import Mapping

import numpy as np

from gm_probe.analysis.correlation import kendall
from gm_probe.analysis.results import Quantity
from gm_probe.analysis.table import RunTable
from gm_probe.core.records import RunRecord


def grid_taus(table: RunTable, records: Mapping[str, RunRecord], gap: str) -> dict[int, dict[float, Quantity]]:
    """``[k_steps][rho]``: τ-b with ``gap`` over the ``n`` runs that have both; empty where no run has a grid."""
    cells: dict[tuple[int, float], np.ndarray] = {}
    for row, run in enumerate(table.frame["run"]):
        for cell in grid_of(records[run]):
            place = (cell["k_steps"], cell["rho"])
            cells.setdefault(place, np.full(table.num_runs, np.nan))[row] = cell["value"]
    lines: dict[int, dict[float, Quantity]] = {}
    of_runs = table.frame[gap].to_numpy()
    for (k_steps, rho), values in sorted(cells.items()):
        both = np.isfinite(values) & np.isfinite(of_runs)
        found = kendall(values[both], of_runs[both])
        lines.setdefault(k_steps, {})[rho] = Quantity(found.tau, n=found.n, reason=found.reason)
    return lines


def grid_of(record: RunRecord) -> list[dict[str, float]]:
    """The usable cells of a run's grid: ``rho``, ``k_steps`` and a finite ``value``."""
    row = record.measures.get("local_inconsistency")
    grid = row.get("grid", []) if isinstance(row, dict) else []
    return [cell for cell in grid if cell["value"] is not None and math.isfinite(cell["value"])]
