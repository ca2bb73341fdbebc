"""The curvature of each layer alone: the diagonal blocks of F and H, with all other parameters held constant."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch import nn

from gm_probe.data.batches import Batches
from gm_probe.linalg.work import Tally
from gm_probe.measures.measure import UNDEFINING, measure
from gm_probe.measures.names import LAYER_MEASURES
from gm_probe.measures.settings import Settings
from gm_probe.models.door import Outputs
from gm_probe.models.parameters import Parameters
from gm_probe.runtime.processes import count


def by_layer(
    model: nn.Module,
    batches: Batches,
    settings: Settings,
    outputs: Outputs | None = None,
    notify: Callable[[str, float], None] | None = None,
) -> list[dict[str, Any]]:
    """Measure ``LAYER_MEASURES`` of each module's own parameters, in the order of the network.

    Returns:
        JSON objects with ``layer``, ``num_parameters`` and ``measures``; or ``reason`` where none is defined.
    """
    layers: dict[str, list[str]] = {}
    for name in Parameters(model, settings.params, outputs).named:
        layers.setdefault(name.rpartition(".")[0], []).append(name)
    rows: list[dict[str, Any]] = []
    tally = Tally(notify)
    for layer, names in layers.items():
        own = replace(settings, params=f"^(?:{'|'.join(map(re.escape, names))})$")
        try:
            report = measure(
                model, batches, LAYER_MEASURES, own, outputs=outputs, notify=tally.next(f"{layer} ")
            )
        except UNDEFINING as error:
            if count() > 1:  # only this process may have failed; continuing would deadlock the others
                raise
            rows.append({"layer": layer, "reason": str(error)})
            continue
        found = {name: row.as_dict() for name, row in report.rows.items()}
        rows.append({"layer": layer, "num_parameters": report.num_parameters, "measures": found})
    return rows
