"""One cell, run in a process of its own: what it measures is all that the process does."""

from __future__ import annotations

import json
import time
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from peers.adapters import default_quantity, run_peer
from peers.meter import Memory, gradient_seconds
from peers.paper import run_paper
from peers.plan import Cell, Setting, quantity_of
from peers.reference import reference
from peers.subject import Subject, network, subset


def _peer(subject: Subject, cell: Cell, truth: dict[str, float], limit: float, seed: int) -> dict[str, Any]:
    outcome = asdict(run_peer(subject, cell, truth, limit, seed))
    quantity = default_quantity(cell) if cell.task == "defaults" else quantity_of(cell.task)
    return {**outcome, "figures": {quantity: {"value": outcome.pop("value")}}}


def run_cell(request: str) -> None:
    """Print the result of a request (both JSON)."""
    asked = json.loads(request)
    warnings.simplefilter("ignore")  # PyHessian's backward(create_graph=True) warns at every product
    setting = Setting(*asked["setting"])
    torch.set_num_threads(setting.threads)
    examples = subset(asked["data"], setting, Path(asked["cache"]))
    model, normalization = network(asked["model"], Path(asked["checkpoint"]))
    subject = Subject.load(model, examples, normalization, setting.batch_size)
    if asked["cell"] is None:
        print(json.dumps(reference(subject)))
        return
    cell, limit = Cell(*asked["cell"]), asked["max_seconds"]
    memory = Memory()
    unit = gradient_seconds(subject)
    wall, cpu = time.perf_counter(), time.process_time()
    match cell.tool:
        case "ours":
            from peers.ours import run_ours  # here, so that no peer's cell depends on our measures

            result = run_ours(subject, cell, setting.seed)
        case "paper":
            result = run_paper(subject, float(cell.method.split("=")[1]), limit, setting.seed)
        case _:
            result = _peer(subject, cell, asked["truth"], limit, setting.seed)
    result |= {
        "gradient_cpu_seconds": unit,
        # CPU time a second of the cell: below the number of threads where others took the machine
        "busy": (time.process_time() - cpu) / (time.perf_counter() - wall),
        "peak_mebibytes": memory.peak_mebibytes(),
    }
    print(json.dumps(result))
