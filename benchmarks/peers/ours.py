"""gm_probe's own cells, as ``gmprobe measure`` takes them: with freed memory kept, in channels-last format."""

from __future__ import annotations

import time
from typing import Any

from gm_probe.data.batches import Batches
from gm_probe.measures.context import Settings
from gm_probe.measures.measure import Report, measure
from gm_probe.models.layout import settle_layout
from gm_probe.runtime.machine import keep_freed_memory
from peers.plan import Cell, quantity_of
from peers.subject import Subject

NAMES = {
    "lambda_F": "fisher_lambda_max",
    "trace_F": "fisher_trace",
    "lambda_H": "hessian_lambda_max",
    "trace_H": "hessian_trace",
}
"""The reference's names and ours."""


def run_ours(subject: Subject, cell: Cell, seed: int) -> dict[str, Any]:
    keep_freed_memory()

    def timed(names: list[str], settings: Settings) -> tuple[Report, float]:
        start = time.perf_counter()
        batches = Batches(
            subject.examples,
            subject.normalization,
            batch_size=subject.batch_size,
            channels_last=settle_layout(subject.model, subject.batches[0][0][:2]),
        )
        report = measure(subject.model, batches, names, settings)
        return report, time.perf_counter() - start

    if cell.task == "S":
        return _inconsistency(timed, float(cell.method.split("=")[1]), seed)
    percent = (cell.method if cell.task == "joint" else cell.task).rpartition("_")[2]
    settings = Settings(eigen_tolerance=0.01, trace_tolerance=0.05 if percent == "5" else 0.01, seed=seed)
    if cell.task != "joint":
        quantities = [quantity_of(cell.task)]
    else:
        quantities = [name for name in NAMES if cell.method.startswith("all") or name.endswith("H")]
    report, seconds = timed([NAMES[name] for name in quantities], settings)
    figures = {}
    for quantity in quantities:
        row = report.rows[NAMES[quantity]]
        figures[quantity] = {
            "value": row.value,
            "stderr": row.stderr,
            "converged": row.converged,
            "num_evals": row.num_evals,
        }
    return {
        "status": "ran",
        "seconds": seconds,
        "evaluations": sum(figure["num_evals"] for figure in figures.values()),
        "figures": figures,
    }


def _inconsistency(timed: Any, rho: float, seed: int) -> dict[str, Any]:
    """The converged S_ρ alone, and after λ_max(F) in the same call (whose time is then taken off)."""
    name, top = "local_inconsistency_converged", "fisher_lambda_max"
    settings = Settings(rho=rho, eigen_tolerance=0.01, seed=seed)
    alone, seconds = timed([name], settings)
    _, seconds_top = timed([top], settings)
    both, seconds_both = timed([top, name], settings)
    row, after = alone.rows[name], both.rows[name]
    return {
        "status": "ran",
        "seconds": seconds,
        "evaluations": row.num_evals,
        "seconds_after": max(0.0, seconds_both - seconds_top),
        "evaluations_after": after.num_evals,
        "evaluations_top": both.rows[top].num_evals,
        "figures": {"S": {"value": row.value, "converged": row.converged, "num_evals": row.num_evals}},
        "value_after": after.value,
    }
