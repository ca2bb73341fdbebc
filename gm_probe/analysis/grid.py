"""τ of S_ρ against ρ and K, from the grids that ``gmprobe measure --rho R,R --k-steps K,K`` records."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from gm_probe.analysis.correlation import kendall
from gm_probe.analysis.design import seed_numbers, setting_numbers
from gm_probe.analysis.pair_sums import pair_sums
from gm_probe.analysis.results import Quantity
from gm_probe.analysis.sample import sample_of, tau_interval
from gm_probe.runs.records import RunRecord
from gm_probe.tables.table import LARGEST, RunTable

CELL = ("rho", "k_steps", "value")


def grid_taus(
    table: RunTable, records: Mapping[str, RunRecord], gap: str
) -> dict[int, dict[float, Quantity]]:
    """``[k_steps][rho]``: τ-b with ``gap`` over the ``n`` runs that have both, its interval by leaving out
    whole settings, and seeds that they share; empty where no run has a grid."""
    cells: dict[tuple[int, float], np.ndarray] = {}
    for row, run in enumerate(table.frame["run"]):
        for cell in grid_of(records[run]):
            place = (cell["k_steps"], cell["rho"])
            cells.setdefault(place, np.full(table.num_runs, np.nan))[row] = cell["value"]
    lines: dict[int, dict[float, Quantity]] = {}
    for (k_steps, rho), values in sorted(cells.items()):
        lines.setdefault(k_steps, {})[rho] = _tau(values, table.frame[gap].to_numpy(), table)
    return lines


def _tau(x: np.ndarray, y: np.ndarray, table: RunTable) -> Quantity:
    both = np.flatnonzero(np.isfinite(x) & np.isfinite(y))
    seed = seed_numbers(table)
    sample = sample_of(
        x[both], y[both], both, setting_numbers(table)[both], None if seed is None else seed[both]
    )
    found = kendall(sample.x, sample.y)
    if found.tau is None:
        return Quantity(None, n=found.n, reason=found.reason)
    sums = pair_sums(sample.x, sample.y, sample.setting, sample.num_settings)
    low, high, why = tau_interval(found.tau, sums, sample)
    return Quantity(found.tau, low, high, n=found.n, interval_reason=why)


def grid_of(record: RunRecord) -> list[dict[str, Any]]:
    """The usable cells of a run's grid: those with a finite ``rho``, ``k_steps`` and ``value``."""
    row = record.measures.get("local_inconsistency")
    grid = row.get("grid", []) if isinstance(row, dict) else []
    return [cell for cell in grid if isinstance(cell, dict) and all(map(_finite, map(cell.get, CELL)))]


def _finite(value: object) -> bool:
    return isinstance(value, int | float) and abs(value) <= LARGEST
