"""The spectral densities of F and H of a loaded checkpoint, and what they cost."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from gm_probe.data.batches import Batches
from gm_probe.errors import one_device
from gm_probe.linalg.density import density
from gm_probe.linalg.work import Work
from gm_probe.measures.context import MeasurementContext
from gm_probe.measures.measure import UNDEFINING
from gm_probe.measures.settings import Settings
from gm_probe.measuring.opening import LoadedCheckpoint
from gm_probe.models.parameters import as_measured
from gm_probe.runtime.processes import count
from gm_probe.runtime.randomness import generators_kept

DENSITY_OF = "density of the {}"
"""The name of the stage in which a density is computed, as ``notify`` gets it."""


def density_costs(quadrature: tuple[int, int] | None) -> dict[str, float]:
    """Return the approximate gradient evaluations of each density, by the name of its stage."""
    if not quadrature:
        return {}
    products = float(quadrature[0] * quadrature[1])
    return {DENSITY_OF.format("fisher"): 2 * products, DENSITY_OF.format("hessian"): 3 * products}


def densities(
    loaded: LoadedCheckpoint,
    settings: Settings,
    quadrature: tuple[int, int],
    notify: Callable[[str, float], None],
    part: Batches,
) -> dict[str, Any]:
    """Return the spectral densities of F and H as JSON objects by name, or the ``reason`` where there is none."""
    num_probes, num_steps = quadrature
    name, found = "fisher", {}
    work = Work(part.num_examples, lambda done: notify(DENSITY_OF.format(name), done))
    measured = as_measured(loaded.model, tf32=settings.tf32)
    with one_device(), generators_kept(part.device, loaded.model), measured:
        context = MeasurementContext(loaded.model, part, settings, work, outputs=loaded.outputs)
        for name, operator in (("fisher", context.fisher), ("hessian", context.hessian)):
            before = work.evaluations
            generator = context.generator(f"{name} density")
            try:
                result = density(operator, generator=generator, num_probes=num_probes, num_steps=num_steps)
                found[name] = result.as_dict()
            except UNDEFINING as error:  # the other density is still computed
                if count() > 1:
                    raise
                found[name] = {"reason": str(error)}
            found[name]["num_evals"] = round(work.evaluations - before, 3)
        found["hessian"]["labels"] = context.label_kind
    return found
