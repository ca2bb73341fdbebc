"""Take measures of a model: the one function that does, with the cost of each and the reasons for what is missing."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

import torch
from torch import nn

from gm_probe.checks import instance, optional, real
from gm_probe.curvature.batch_size import batches_within
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
from gm_probe.measures.catalogue import MEASURES
from gm_probe.measures.context import MeasurementContext
from gm_probe.measures.costs import takes_derivatives
from gm_probe.measures.estimates import Estimate
from gm_probe.measures.names import check_names, default_measures, expanded
from gm_probe.measures.settings import Settings
from gm_probe.models.door import Outputs, unwrapped
from gm_probe.models.layout import in_layout_taken
from gm_probe.models.parameters import Parameters, as_measured
from gm_probe.runtime.devices import require_float64
from gm_probe.runtime.processes import count
from gm_probe.runtime.randomness import generators_kept

UNDEFINING = (DerivativeError, DivergedError, PrecisionError)
"""Errors that leave one measure undefined, and the others as they are."""


@dataclass(frozen=True, slots=True)
class Report:
    """What ``measure`` found: ``rows`` maps the name of a measure to its estimate.

    ``batch_size`` is the last one used: that of the batches, or what memory holds. ``outputs`` says how the model's
    outputs were read.
    """

    num_parameters: int
    num_examples: int
    settings: Settings
    rows: dict[str, Estimate]
    batch_size: int
    outputs: Outputs = field(default_factory=Outputs)

    def as_dict(self, *, checkpoint: str, model: str, **more: Any) -> dict[str, Any]:
        """Return the JSON object of ``gmprobe measure --json`` and of a run's measures.json."""
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

    Batches are moved to the model's device. Products of float32 are computed in float32, or in TF32 where ``settings``
    allow it.

    Args:
        data: ``Batches``, or what they are made of: x, (x, y), a list of batches, a data set, or a loader that does not
            shuffle. Floating-point inputs are converted to the dtype of the model's weights.
        names: names of ``MEASURES`` or of their groups; default ``DEFAULT_MEASURES``, as far as there are labels.
        initial: the model before training, for the distance from it.
        validation: labeled data of the training distribution, for atc, doc and cot.
        memory: bytes that a product may take, where the data has no batch size of its own; None = 4 GB, or half of a
            GPU's free memory.
        notify: called with the name of the measure at work and the gradient evaluations done so far.
        outputs: how the model's outputs are read (models.door). By default they are a tensor of logits, or named so.

    Raises:
        UsageError: a measure is unknown, data or outputs cannot be read, or a measure differentiates and the parameters
            are frozen, or their gradients fail or are hidden.
        CheckpointError: weights are not finite.
        DataError: labels do not fit or are missing, or the data changes between passes.
        DerivativeError, DivergedError, PrecisionError: derivatives are missing, values are not finite, or perturbations
            are lost to rounding. If this affects only some measures, they are undefined (but several processes raise).
        ResourceError: there is no memory for a single example. Before that, batches are halved.
    """
    _require_kinds(model, names, settings, outputs, initial, memory)
    settings = settings or Settings()
    batches = _in_dtype_of(model, as_batches(data))
    names = _chosen(names, batches, validated=validation is not None)
    device = Parameters(model, settings.params, or_frozen=True).device
    require_float64(device)
    reference = None if validation is None else _in_dtype_of(model, as_batches(validation)).on(device)
    batches, _ = within_memory(batches.on(device), partial(in_layout_taken, model))
    over = partial(
        MeasurementContext, model, settings=settings, initial=initial, outputs=outputs, validation=reference
    )
    # a model may draw at random though its outputs stay the same
    with generators_kept(batches.device, model), as_measured(model, tf32=settings.tf32):
        running = _Running(over, batches, notify, names[0] if names else "")
        if batches.auto_batch_size and takes_derivatives(names):
            running.batches = batches_within(memory, model, batches, outputs)
        # the cost of the logits belongs to the report, not to the first measure
        _require_full(running.result_of(lambda context: context.logits).dtype, "outputs")
        rows = {name: running.estimate(name) for name in names}
    if running.refusals and all(row.value is None for row in rows.values()):
        raise running.refusals[0]
    size, batches = running.context.parameters.size, running.batches
    return Report(size, batches.total, settings, rows, batches.batch_size, outputs or Outputs())


class _Running:
    """A measurement at work: its context over batches, which stay small once memory ran out, and its cost.

    Attributes:
        refusals: the errors of measures that are undefined.
    """

    def __init__(
        self,
        over: Callable[..., MeasurementContext],
        batches: Batches,
        notify: Callable[[str, float], None] | None,
        stage: str,
    ) -> None:
        self._over, self.batches, self._notify, self._stage = over, batches, notify, stage
        self._work = Work(batches.num_examples, self._tick)
        self.context = over(batches, work=self._work)
        _require_full(self.context.parameters.dtype)
        self.context.parameters.check_finite()
        self.refusals: list[ProbeError] = []

    def _tick(self, evaluations: float) -> None:
        if self._notify is not None:
            self._notify(self._stage, evaluations)

    def result_of(self, compute: Callable[[MeasurementContext], T]) -> T:
        """Return ``compute`` of the context, over smaller batches where memory runs out."""
        found, self.batches = within_memory(self.batches, lambda batches: compute(self._on(batches)))
        return found

    def _on(self, batches: Batches) -> MeasurementContext:
        if self.context.batches is not batches:  # cached results belong to the old batches
            self.context = self._over(batches, work=self._work)
        return self.context

    def estimate(self, name: str) -> Estimate:
        """Take one measure, with its cost."""
        self._stage = name
        self._work.begin()
        before = self._work.evaluations
        found = self._computed(name)
        cost = self._work.evaluations - before
        return _completed(found, self.batches, self.context.settings.target_error, cost)

    def _computed(self, name: str) -> Estimate:
        """Take one measure. If it cannot be computed, it is undefined, and its error is added to ``refusals``."""
        try:
            return self.result_of(MEASURES[name].compute)
        except (UsageError, *UNDEFINING) as error:
            told = type(error)(f"{name}: {error}")
            # only this process may have failed; continuing would deadlock the others
            if not isinstance(told, UNDEFINING) or count() > 1:
                raise told from error
            self.refusals.append(told)
            return Estimate.undefined(str(error))


def _require_kinds(model: Any, names: Any, settings: Any, outputs: Any, initial: Any, memory: Any) -> None:
    """Raise UsageError for an argument of another type, or a model that cannot be measured."""
    for name, given, kind in (("settings", settings, Settings), ("outputs", outputs, Outputs)):
        optional(instance, name, given, kind)
    optional(instance, "initial", initial, nn.Module)
    optional(instance, "names", names, Sequence)
    optional(real, "memory", memory, above=0)
    if isinstance(names, str):
        raise UsageError(f"names = {names!r} must be a list of measures, such as [{names!r}]")
    unwrapped(model)


def _chosen(names: Sequence[str] | None, batches: Batches, *, validated: bool) -> list[str]:
    """Return the measures that ``names`` stand for.

    Raises:
        UsageError, DataError: they do not fit the data.
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
    """Return ``batches`` in the dtype of the model's weights, where they have a single one."""
    dtypes = {p.dtype for p in model.parameters() if p.is_floating_point()}
    return batches.of_dtype(dtypes.pop()) if len(dtypes) == 1 else batches


def _require_full(dtype: torch.dtype, what: str = "weights") -> None:
    if dtype not in (torch.float32, torch.float64):
        remedy = "model.float()" + ", with a forward that returns float32" * (what == "outputs")
        raise UsageError(
            f"the {what} are {dtype}, in which residuals below a few percent cannot be resolved. Measure {remedy}"
        )


def _completed(estimate: Estimate, batches: Batches, target_error: float, cost: float) -> Estimate:
    """Add reasons for what is missing or not finite, the cost, and how many examples ``target_error`` takes."""
    details = dict(estimate.details)
    if estimate.stderr_examples is None and estimate.value is not None:
        one = "batch" if batches.batch_dependent else "example"
        reason = f"there is one {one}, or the value is lost in the probes' noise"
        details.setdefault("reason_stderr_examples", reason)
    found = {name: getattr(estimate, name) for name in ("value", "stderr", "stderr_examples")}
    for label, number in found.items():
        if number is not None and not math.isfinite(number):
            found[label] = None
            remedy = "; try --dtype float64" if label == "value" else ""
            details["reason" if label == "value" else f"reason_{label}"] = f"not finite ({number}){remedy}"
    value = found["value"]
    if target_error and value:
        own = (found["stderr"] or 0.0) / abs(value)
        if own > target_error:  # more examples need not lower it
            details["estimator_above_target"] = own
        ratio = (found["stderr_examples"] or 0.0) / (target_error * abs(value))
        images = 2 if batches.batch_dependent else 1  # two views of an image
        if ratio > 0:  # without a spread the number is unknown
            details["examples_needed"] = math.ceil(batches.total / images * ratio**2)
    converged = estimate.converged and value is not None
    return Estimate(**found, converged=converged, num_evals=round(cost, 3), details=details)
