"""One forward pass of a model over a set: its logits, and two sums over the inputs of its last layer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gm_probe.data.batches import Batches
from gm_probe.data.memory import within_memory
from gm_probe.errors import DataError, DivergedError, UsageError, foreign_or
from gm_probe.linalg.work import Work
from gm_probe.measures.context import MeasurementContext
from gm_probe.measures.settings import Settings
from gm_probe.models.door import Outputs
from gm_probe.models.parameters import Parameters, evaluating
from gm_probe.runtime.precision import float32_products
from gm_probe.runtime.randomness import generators_kept

CHECKED = 64
"""Examples on which the model is looked at before the pass: its outputs are finite, repeatable and independent."""
POWER = 0.3
"""The power p of the gradient's length; small ones tell best (Xie et al. 2024, GdScore)."""


@dataclass(frozen=True, slots=True)
class Predictions:
    """What a model says of N examples.

    Attributes:
        logits: (N, K), float32 on the CPU.
        mirrored: (N, K) logits of the mirror images; None = not taken.
        dispersion: log of the mean squared distance of the predicted classes' mean features from the overall mean, a
            feature being an input of the last layer; None where the last layer is no nn.Linear.
        gradient_norm: (mean |g|^p)^(1/p) over the entries g of the gradient of the cross-entropy with predicted labels
            by the last layer's weights; likewise.
    """

    logits: Tensor
    mirrored: Tensor | None = None
    dispersion: float | None = None
    gradient_norm: float | None = None

    @property
    def classes(self) -> Tensor:
        """(N,) predicted classes."""
        return self.logits.argmax(1)


def require_fit(model: nn.Module, batches: Batches, outputs: Outputs | None) -> Outputs:
    """Look at the model on a few examples, and return how its outputs are read.

    Raises:
        UsageError: not one row of logits for each example, independent of the other examples.
        CheckpointError, DataError, DivergedError: as ``MeasurementContext.logits`` raises them.
    """
    if outputs is not None and outputs.head != "classifier":
        raise UsageError(f"accuracy can be estimated for exclusive classes only, not for head {outputs.head}")
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
    notify: Callable[[int], None] | None = None,
) -> Predictions:
    """Run ``model`` over ``batches`` once in eval mode; twice with ``mirror``.

    Args:
        notify: called with the number of examples of each batch that is done.

    Raises:
        DataError: the model fails on some examples.
        DivergedError: an output is not finite.
    """

    def run(batches: Batches) -> Predictions:
        return _one_pass(model, batches, outputs, mirror, notify or (lambda _: None))

    with evaluating(model), float32_products(), generators_kept(batches.device, model), torch.no_grad():
        return within_memory(batches, run)[0]


def _one_pass(
    model: nn.Module, batches: Batches, outputs: Outputs | None, mirror: bool, notify: Callable[[int], None]
) -> Predictions:
    parameters = Parameters(model, outputs=outputs)
    rows: list[Tensor] = []
    mirrored: list[Tensor] = []
    sums = LastLayer()
    start = 0
    for batch in batches:
        some = f"examples {start} to {start + len(batch.x) - 1} of {batches.examples.source}"

        def fails(cause: str, some: str = some) -> DataError:
            return DataError(
                f"the model failed on {some}: {cause}. Check the input's shape, dtype and device"
            )

        with foreign_or(fails), _linear_inputs(parameters.model) as seen:
            logits = parameters.logits(batch.x)
            sums.add(logits, seen)
            rows.append(logits.float().cpu())
            if mirror:
                mirrored.append(parameters.logits(batch.x.flip(-1)).float().cpu())
        if not bool(torch.isfinite(rows[-1]).all()):
            row = start + int((~torch.isfinite(rows[-1])).any(1).nonzero()[0])
            raise DivergedError(
                f"the model's output on example {row} of {batches.examples.source} is not finite. Check "
                "the weights and the normalisation"
            )
        start += len(batch.x)
        notify(len(batch.x))
    return Predictions(
        torch.cat(rows), torch.cat(mirrored) if mirror else None, sums.dispersion(), sums.gradient_norm()
    )


@contextmanager
def _linear_inputs(model: nn.Module) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Collect inputs and outputs of every nn.Linear that runs within, in their order."""
    seen: list[tuple[Tensor, Tensor]] = []

    def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        if args and args[0].dim() == 2:
            seen[:] = [(args[0], output)]  # only the last one is needed

    handles = [
        module.register_forward_hook(hook) for module in model.modules() if isinstance(module, nn.Linear)
    ]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


class LastLayer:
    """Sums over examples of what the last layer's inputs h (B, D) and outputs z (B, K) tell."""

    def __init__(self) -> None:
        self.known, self.count = True, 0
        self.gradient: Tensor | None = None  # (K, D) sum of (p − onehot) hᵀ
        self.sums: Tensor | None = None  # (K, D) sum of h by predicted class
        self.counts: Tensor | None = None  # (K,) predicted classes

    def add(self, logits: Tensor, seen: list[tuple[Tensor, Tensor]]) -> None:
        """Add a batch; ``seen`` holds the last linear layer's input and output."""
        if not (
            self.known and seen and seen[-1][1].shape == logits.shape and torch.equal(seen[-1][1], logits)
        ):
            self.known = False
            return
        features = seen[-1][0].double()
        classes = nn.functional.one_hot(logits.argmax(1), logits.shape[1]).double()
        gradient = (logits.double().softmax(1) - classes).T @ features
        sums, counts = classes.T @ features, classes.sum(0)
        self.gradient = gradient if self.gradient is None else self.gradient + gradient
        self.sums = sums if self.sums is None else self.sums + sums
        self.counts = counts if self.counts is None else self.counts + counts
        self.count += len(logits)

    def gradient_norm(self) -> float | None:
        """Return the p-mean of the gradient's entries."""
        if not self.known or self.gradient is None:
            return None
        return float((self.gradient / self.count).abs().pow(POWER).mean().pow(1 / POWER))

    def dispersion(self) -> float | None:
        """Return log of Σ_k (n_k / N) ‖μ_k − μ‖²; None where there is no spread, as of a single class."""
        if not self.known or self.sums is None or self.counts is None:
            return None
        held = self.counts > 0
        means = self.sums[held] / self.counts[held, None]
        away = (means - self.sums.sum(0) / self.count).square().sum(1)
        spread = float((self.counts[held] / self.count * away).sum())
        return torch.tensor(spread).log().item() if spread > 0 else None
