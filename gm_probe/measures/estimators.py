"""Measures of the outputs that estimate accuracy on unlabeled data; the formulas are those of `gmprobe estimate`."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps

from torch import Tensor

from gm_probe.inconsistency.kl import sum_over_labels
from gm_probe.measures import scores
from gm_probe.measures.context import MeasurementContext
from gm_probe.measures.estimates import Estimate, mean_over_labels
from gm_probe.measures.outputs import mirrored_logits
from gm_probe.measures.transport import transport
from gm_probe.runtime.processes import gather_examples

NO_MEAN = "it is not a mean over examples"
NO_LAST_LAYER = "the logits are not the outputs of an nn.Linear"
NO_LOGITS = "it needs logits, and the outputs are probabilities"
NO_VALIDATION = "it needs a labeled validation set"

Compute = Callable[[MeasurementContext], Estimate]


def energy(context: MeasurementContext) -> Estimate:
    """Return the mean over examples; the energies of independent labels add."""
    if context.normalised:
        return Estimate.undefined(NO_LOGITS)
    return context.mean(sum_over_labels(scores.energy(context.logits)))


def margin(context: MeasurementContext) -> Estimate:
    """Return the mean over examples and their labels."""
    return context.mean(mean_over_labels(scores.margin(context.logits)))


def _of_classes(compute: Callable[[MeasurementContext, Tensor], Estimate]) -> Compute:
    """Compute from this process's logits (n, K); undefined where examples have several labels."""

    @wraps(compute)
    def checked(context: MeasurementContext) -> Estimate:
        if context.logits.dim() == 3 and context.logits.shape[1] > 1:
            return Estimate.undefined(
                "it is defined for exclusive classes, not for several labels per example"
            )
        return compute(context, scores.by_class(context.logits))

    return checked


def _of_all(value: float) -> Estimate:
    return Estimate(value, details={"reason_stderr_examples": NO_MEAN})


@_of_classes
def nuclear_norm(context: MeasurementContext, logits: Tensor) -> Estimate:
    return _of_all(scores.nuclear_norm(gather_examples(scores.probabilities(logits))))


@_of_classes
def mano(context: MeasurementContext, logits: Tensor) -> Estimate:
    if context.normalised:  # its polynomial changes when a constant is added to the logits
        return Estimate.undefined(NO_LOGITS)
    return _of_all(scores.mano(gather_examples(logits)))


@_of_classes
def effective_invariance(context: MeasurementContext, logits: Tensor) -> Estimate:
    mirrored = mirrored_logits(context)
    if mirrored is None:
        return Estimate.undefined("the inputs are not images")
    pairs = (scores.probabilities(z) for z in (logits, scores.by_class(mirrored)))
    return context.mean(scores.effective_invariance(*pairs))


@_of_classes
def dispersion(context: MeasurementContext, logits: Tensor) -> Estimate:
    found, norm = context.last_layer_scores
    if norm is None:
        return Estimate.undefined(NO_LAST_LAYER)
    return _of_all(found) if found is not None else Estimate.undefined("all predictions are of one class")


@_of_classes
def last_layer_gradient_norm(context: MeasurementContext, logits: Tensor) -> Estimate:
    _, norm = context.last_layer_scores
    return Estimate.undefined(NO_LAST_LAYER) if norm is None else _of_all(norm)


# ---- by a labeled validation set


@_of_classes
def atc(context: MeasurementContext, logits: Tensor) -> Estimate:
    known = context.reference
    if known is None:
        return Estimate.undefined(NO_VALIDATION)
    p = scores.probabilities(logits, known[0].temperature)
    return context.mean(known[0].above_threshold(p))


@_of_classes
def doc(context: MeasurementContext, logits: Tensor) -> Estimate:
    known = context.reference
    if known is None:
        return Estimate.undefined(NO_VALIDATION)
    confidence = context.mean(scores.probabilities(logits, known[0].temperature).amax(1))
    assert confidence.value is not None
    return Estimate(
        known[0].difference_of_confidences(confidence.value), stderr_examples=confidence.stderr_examples
    )


@_of_classes
def cot(context: MeasurementContext, logits: Tensor) -> Estimate:
    known = context.reference
    if known is None:
        return Estimate.undefined(NO_VALIDATION)
    reference, shares = known
    return _of_all(transport(gather_examples(scores.probabilities(logits, reference.temperature)), shares))
