"""The table of measures, and the one function that takes them of a model."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any, TypeVar

import torch
from torch import nn

from gm_probe.checks import instance, optional, real
from gm_probe.curvature.speed import within
from gm_probe.data.batches import Batches
from gm_probe.data.collecting import Data, as_batches
from gm_probe.data.memory import within_memory
from gm_probe.errors import (
    DataError,
    DerivativeError,
    DivergedError,
    PrecisionError,
    ProbeError,
    UsageError,
    one_device,
)
from gm_probe.linalg.work import Work
from gm_probe.measures import estimators, outputs, weights
from gm_probe.measures import sharpness as inconsistency
from gm_probe.measures import spectra as curvature
from gm_probe.measures.catalogue import check_names, default_measures, expanded, takes_derivatives
from gm_probe.measures.context import Estimate, Measured, MeasurementContext, Settings
from gm_probe.models.door import Outputs, unwrapped
from gm_probe.models.layout import in_layout_taken
from gm_probe.models.parameters import Parameters, as_measured
from gm_probe.runs.catalogue import CATALOGUE, Listed
from gm_probe.runtime.devices import require_float64
from gm_probe.runtime.processes import count
from gm_probe.runtime.randomness import generators_kept


@dataclass(frozen=True, slots=True)
class Measure(Listed):
    """One row of ``MEASURES``: ``compute`` takes the shared context."""

    compute: Callable[[MeasurementContext], Measured]


_COMPUTED_BY: dict[str, Callable[[MeasurementContext], Measured]] = {
    "local_inconsistency": inconsistency.local_inconsistency,
    "local_inconsistency_converged": inconsistency.converged,
    "fisher_lambda_max": curvature.fisher_lambda_max,
    "fisher_trace": curvature.fisher_trace,
    "hessian_lambda_max": curvature.hessian_lambda_max,
    "hessian_trace": curvature.hessian_trace,
    "error": outputs.error,
    "cross_entropy": outputs.cross_entropy,
    "hessian_lambda_min": curvature.hessian_lambda_min,
    "effective_rank": curvature.effective_rank,
    "local_inconsistency_adaptive": inconsistency.adaptive,
    "local_inconsistency_relative": inconsistency.relative,
    "local_inconsistency_batchwise": inconsistency.batchwise,
    "average_inconsistency": inconsistency.average,
    "mean_entropy": outputs.mean_entropy,
    "mean_confidence": outputs.mean_confidence,
    "input_jacobian_norm": outputs.input_jacobian_norm,
    "flip_rate": outputs.flip_rate,
    "crop_rate": outputs.crop_rate,
    "energy": estimators.energy,
    "margin": estimators.margin,
    "nuclear_norm": estimators.nuclear_norm,
    "mano": estimators.mano,
    "effective_invariance": estimators.effective_invariance,
    "dispersion": estimators.dispersion,
    "last_layer_gradient_norm": estimators.last_layer_gradient_norm,
    "atc": estimators.atc,
    "doc": estimators.doc,
    "cot": estimators.cot,
    "distance_from_initialization": weights.distance_from_initialization,
    "parameter_norm": weights.parameter_norm,
    "fisher_rao": weights.fisher_rao,
    "stable_rank": weights.stable_rank,
    "power_law_alpha": weights.power_law_alpha,
    "log_spectral_norm": weights.log_spectral_norm,
    "path_norm": weights.path_norm,
}
MEASURES: dict[str, Measure] = {
    name: Measure(**asdict(listed), compute=_COMPUTED_BY[name]) for name, listed in CATALOGUE.items()
}
"""All measures by their names, in the order of a table."""

UNDEFINING = (DerivativeError, DivergedError, PrecisionError)
"""Errors that leave one measure undefined, and the others as they are."""


@dataclass(frozen=True, slots=True)
class Report:
    """What ``measure`` found: ``rows`` maps a measure's name to its estimate.

    ``batch_size`` is what it ended with: that of the batches, or what memory holds. ``outputs`` says how what the
    model returns was read.
    """

    num_parameters: int
    num_examples: int
    settings: Settings
    rows: dict[str, Estimate]
    batch_size: int
    outputs: Outputs = field(default_factory=Outputs)

    def as_dict(self, *, checkpoint: str, model: str, **more: Any) -> dict[str, Any]:
        """The JSON object of ``gmprobe measure --json`` and of a run's measures.json."""
        return {
            "checkpoint": checkpoint,
            "model": model,
            "num_parameters": self.num_parameters,
            "num_examples": self.num_examples,
            "settings": {
                **self.settings.as_dict(),
                "batchnorm": "eval (running statistics)",
                **{key: value for key, value in self.outputs.settings().items() if value is not None},
                **more,
            },
            "measures": {name: row.as_dict() for name, row in self.rows.items()},
        }


T = TypeVar("T")


@one_device()
@torch.inference_mode(False)
def measure(
    model: nn.Module,
    data: Data,
    names: Sequence[str] | None = None,
    settings: Settings | None = None,
    *,
    initial: nn.Module | None = None,
    validation: Data | None = None,
    memory: float | None = None,
    notify: Callable[[str, float], None] | None = None,
    outputs: Outputs | None = None,
) -> Report:
    """Measure ``model`` over ``data`` in eval mode; the model is left bit-identical.

    Batches are taken to the model's device. Products of float32 are taken in float32, or in TF32
    where ``settings`` allow it.

    Args:
        data: ``Batches``, or what they are made of: x, (x, y), a list of batches, a data set, a loader that does not
            shuffle. Inputs of floating-point numbers are taken in the dtype of the model's weights.
        outputs: how what the model returns is read (models.door). Default: a tensor of logits, or what is named so.
        names: of ``MEASURES`` or of their groups; default ``DEFAULT_MEASURES``, those that need labels only where
            there are some.
        initial: the model before training, for its distance.
        validation: labeled data of the training distribution, for atc, doc and cot.
        memory: bytes that a product may take, where the data has no batch size of its own; None = 4 GB, or half of
            a GPU's free memory.
        notify: called with the measure at work and the gradient evaluations done so far.

    Raises:
        UsageError: an unknown measure, data or outputs that cannot be read, a model without trainable parameters where
            a measure differentiates by them, or whose gradients fail or are hidden.
        DerivativeError: the model lacks the derivative of every measure, or in several processes of one; else that
            one is undefined.
        CheckpointError: weights that are not finite.
        DataError: labels that do not fit, a measure that needs absent labels, data that changes between passes.
        DivergedError: outputs that are not finite; derivatives, as DerivativeError.
        PrecisionError: perturbations lost to rounding, as DerivativeError.
        ResourceError: no memory for a single example; before, batches are halved where it runs out.
    """
    _require_kinds(names, settings, outputs, initial, memory)
    settings = settings or Settings()
    unwrapped(model)
    batches = _in_dtype_of(model, as_batches(data))
    names = _chosen(names, batches, validated=validation is not None)
    device = Parameters(model, settings.params, or_frozen=True).device
    require_float64(device)
    batches = batches.on(device)
    reference = None if validation is None else _in_dtype_of(model, as_batches(validation)).on(device)
    current = names[0] if names else ""

    def tick(evaluations: float) -> None:
        if notify is not None:
            notify(current, evaluations)

    work = Work(batches.num_examples, tick)
    rows: dict[str, Estimate] = {}
    refusals: list[ProbeError] = []
    # a model may draw at random though its outputs stay the same
    batches, _ = within_memory(batches, partial(in_layout_taken, model))
    with generators_kept(batches.device, model), as_measured(model, tf32=settings.tf32):
        running = _Running(
            lambda batches: MeasurementContext(model, batches, settings, work, initial, outputs, reference),
            batches,
        )
        _require_full(running.context.parameters.dtype)
        running.context.parameters.check_finite()
        if batches.auto_batch_size and takes_derivatives(names):
            running.batches = within(memory, model, batches, outputs)
        # its cost is the report's, not the first measure's
        _require_full(running.result_of(lambda context: context.logits).dtype, "outputs")
        for name in names:
            current = name
            work.begin()
            before = work.evaluations
            measured = _measured(name, running, refusals)
            cost = work.evaluations - before
            rows[name] = _estimate(measured, running.batches, settings.target_error, cost)
    if refusals and all(row.value is None for row in rows.values()):
        raise refusals[0]
    size, total = running.context.parameters.size, running.batches.total
    return Report(size, total, settings, rows, running.batches.batch_size, outputs or Outputs())


class _Running:
    """The context of a measurement over batches, which stay small for all that follows once memory ran out."""

    def __init__(self, over: Callable[[Batches], MeasurementContext], batches: Batches) -> None:
        self._over, self.batches = over, batches
        self.context = over(batches)

    def result_of(self, compute: Callable[[MeasurementContext], T]) -> T:
        """Return ``compute`` of the context, over smaller batches where memory runs out."""
        found, self.batches = within_memory(self.batches, lambda batches: compute(self._on(batches)))
        return found

    def _on(self, batches: Batches) -> MeasurementContext:
        if self.context.batches is not batches:  # cached results belong to the old batches
            self.context = self._over(batches)
        return self.context


def _measured(name: str, running: _Running, refusals: list[ProbeError]) -> Measured:
    """Take one measure; one that cannot be taken is undefined, and its error is added to ``refusals``."""
    try:
        return running.result_of(MEASURES[name].compute)
    except (UsageError, *UNDEFINING) as error:
        told = type(error)(f"{name}: {error}")
        # only this process may have failed; continuing would deadlock the others
        if not isinstance(told, UNDEFINING) or count() > 1:
            raise told from error
        refusals.append(told)
        return Measured.undefined(str(error))


def _require_kinds(names: Any, settings: Any, outputs: Any, initial: Any, memory: Any) -> None:
    """Raise UsageError for an argument of another type."""
    for name, given, kind in (("settings", settings, Settings), ("outputs", outputs, Outputs)):
        optional(instance, name, given, kind)
    optional(instance, "initial", initial, nn.Module)
    optional(instance, "names", names, Sequence)
    optional(real, "memory", memory, above=0)
    if isinstance(names, str):
        raise UsageError(f"names = {names!r} must be a list of measures, such as [{names!r}]")


def _chosen(names: Sequence[str] | None, batches: Batches, *, validated: bool) -> list[str]:
    """Return the measures that ``names`` stand for, once they are known to go with the data.

    Raises:
        UsageError, DataError: they do not.
    """
    labeled, batch_dependent = batches.labeled, batches.batch_dependent
    if names is None:
        names = default_measures(labeled=labeled, batch_dependent=batch_dependent)
    names = expanded(names, labeled=labeled, batch_dependent=batch_dependent, validation=validated)
    check_names(names, labeled=labeled, batch_dependent=batch_dependent, num_processes=count())
    if batches.num_examples == 0:
        raise DataError("there are no examples to measure on")
    return names


def _in_dtype_of(model: nn.Module, batches: Batches) -> Batches:
    """``batches`` in the dtype of the model's weights, where these have a single one."""
    dtypes = {p.dtype for p in model.parameters() if p.is_floating_point()}
    return batches.of_dtype(dtypes.pop()) if len(dtypes) == 1 else batches


def _require_full(dtype: torch.dtype, what: str = "weights") -> None:
    if dtype not in (torch.float32, torch.float64):
        raise UsageError(
            (
                f"the {what} are {dtype}, in which residuals below a few percent cannot be resolved. Measure "
                "model.float()"
            )
            + ", with a forward that returns float32" * (what == "outputs")
        )


def _estimate(measured: Measured, batches: Batches, target_error: float, cost: float) -> Estimate:
    """With reasons for what is missing or not finite, and how many examples ``target_error`` takes."""
    details = dict(measured.details)
    if measured.stderr_examples is None and measured.value is not None:
        one = "batch" if batches.batch_dependent else "example"
        details.setdefault(
            "reason_stderr_examples", f"there is one {one}, or the value is lost in the probes' noise"
        )
    found = {
        "value": measured.value,
        "stderr": measured.error,
        "stderr_examples": measured.stderr_examples,
    }
    for label, number in found.items():
        if number is not None and not math.isfinite(number):
            found[label] = None
            remedy = "; try --dtype float64" if label == "value" else ""
            details["reason" if label == "value" else f"reason_{label}"] = f"not finite ({number}){remedy}"
    value, example_error = found["value"], found["stderr_examples"]
    if target_error and value:
        estimator = (found["stderr"] or 0.0) / abs(value)
        if estimator > target_error:  # which more examples need not lower
            details["estimator_above_target"] = estimator
    if target_error and value and example_error is not None:
        ratio = example_error / (target_error * abs(value))
        images = 2 if batches.batch_dependent else 1  # two views of an image
        if ratio > 0:  # without a spread nothing can be told
            details["examples_needed"] = math.ceil(batches.total / images * ratio**2)
    return Estimate(
        **found,
        converged=measured.converged and value is not None,
        num_evals=round(cost, 3),
        details=details,
    )
