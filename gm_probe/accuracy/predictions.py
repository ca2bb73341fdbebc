"""One forward pass of a model over a set: its logits, and two sums over the inputs of its last layer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gm_probe.data.batches import Batches
from gm_probe.data.memory import within_memory
from gm_probe.errors import DivergedError, UsageError
from gm_probe.linalg.work import Work
from gm_probe.measures.context import MeasurementContext
from gm_probe.measures.last_layer import LastLayer
from gm_probe.measures.scores import by_class
from gm_probe.measures.settings import Settings
from gm_probe.models.door import Outputs
from gm_probe.models.parameters import Parameters, evaluating
from gm_probe.runtime.precision import float32_products
from gm_probe.runtime.randomness import generators_kept

CHECKED = 64
"""Before the pass, so many examples check that the outputs are finite, repeatable and independent."""


@dataclass(frozen=True, slots=True)
class Predictions:
    """The outputs of a model for N examples.

    Attributes:
        logits: (N, K), float32 on the CPU.
        mirrored: (N, K) logits of the mirror images; None = not taken.
        dispersion, gradient_norm: as ``LastLayer`` gives them, of all examples or of some.
    """

    logits: Tensor
    mirrored: Tensor | None = None
    dispersion: float | None = None
    gradient_norm: float | None = None

    @property
    def classes(self) -> Tensor:
        """Return the predicted classes (N,)."""
        return self.logits.argmax(1)


def require_predictable(model: nn.Module, batches: Batches, outputs: Outputs | None) -> Outputs:
    """Look at the model on a few examples, and return how its outputs are read.

    Raises:
        UsageError: not one row of logits for each example, independent of the other examples.
        CheckpointError, DataError, DivergedError: as ``MeasurementContext.logits`` raises them.
    """
    if outputs is not None and outputs.head == "multilabel":
        raise UsageError("accuracy is estimated for exclusive classes, and head multilabel has none")
    few = batches.examples.select(torch.arange(min(CHECKED, batches.num_examples)))
    with evaluating(model), float32_products():
        context = MeasurementContext(model, batches.over(few), Settings(), Work(len(few)), outputs=outputs)
        context.parameters.check_finite()
        _ = context.logits
    return context.parameters.outputs


def predict(
    model: nn.Module,
    batches: Batches,
    outputs: Outputs | None = None,
    *,
    mirror: bool = False,
    summed: Tensor | None = None,
    notify: Callable[[int], None] | None = None,
) -> Predictions:
    """Run ``model`` over ``batches`` once in eval mode; twice with ``mirror``.

    Args:
        summed: (N,) which examples enter the sums over the last layer's inputs; None = all.
        notify: called with the number of examples of each batch that is done.

    Raises:
        DataError: the model fails on some examples.
        DivergedError: an output is not finite.
    """

    def run(batches: Batches) -> Predictions:
        return _one_pass(model, batches, outputs, mirror, summed, notify or (lambda _: None))

    with evaluating(model), float32_products(), generators_kept(batches.device, model), torch.no_grad():
        return within_memory(batches, run)[0]


def _one_pass(
    model: nn.Module,
    batches: Batches,
    outputs: Outputs | None,
    mirror: bool,
    summed: Tensor | None,
    notify: Callable[[int], None],
) -> Predictions:
    parameters = Parameters(model, outputs=outputs, or_frozen=True)
    rows: list[Tensor] = []
    mirrored: list[Tensor] = []
    last = LastLayer()
    start = 0
    for batch in batches:
        with batches.naming(start, len(batch.x)):
            with last.watching(parameters.model):
                logits = by_class(parameters.logits(batch.x))
            kept = None if summed is None else summed[start : start + len(logits)].to(logits.device)
            last.add(logits, kept)
            rows.append(logits.float().cpu())
            if mirror:
                mirrored.append(by_class(parameters.logits(batch.x.flip(-1))).float().cpu())
        if not bool(torch.isfinite(rows[-1]).all()):
            row = start + int((~torch.isfinite(rows[-1])).any(1).nonzero()[0])
            raise DivergedError(
                f"the model's output on example {row} of {batches.examples.source} is not finite. Check "
                "the weights and the normalisation"
            )
        start += len(batch.x)
        notify(len(batch.x))
    return Predictions(torch.cat(rows), torch.cat(mirrored) if mirror else None, *last.scores(batches.device))
