"""The table of measures, and the one function that takes them of a model."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from gm_probe.core.batches import Batches
from gm_probe.core.collecting import Data, as_batches
from gm_probe.core.devices import require_float64
from gm_probe.core.door import Outputs
from gm_probe.core.errors import (
    DataError,
    DerivativeError,
    DivergedError,
    PrecisionError,
    ProbeError,
    UsageError,
    did_you_mean,
    one_device,
)
from gm_probe.core.layout import in_layout_taken
from gm_probe.core.memory import within_memory
from gm_probe.core.parameters import Parameters, as_measured
from gm_probe.core.processes import count
from gm_probe.core.randomness import generators_kept
from gm_probe.probe import curvature, inconsistency, outputs
from gm_probe.probe.probe import Estimate, Figure, Probe, Settings
from gm_probe.probe.speed import MEMORY, within
from gm_probe.probe.work import Work


@dataclass(frozen=True, slots=True)
class Measure:
    """One row of ``MEASURES``.

    Attributes:
        compute: takes the shared probe, returns the figure.
        needs_labels: undefined on unlabeled data.
        cost: typical gradient evaluations at the default settings, for time estimates.
        symbol: short name for tables and axes.
    """

    compute: Callable[[Probe], Figure]
    needs_labels: bool
    cost: float
    symbol: str
    description: str


MEASURES: dict[str, Measure] = {
    "local_inconsistency": Measure(
        inconsistency.local_inconsistency,
        False,
        13.3,
        "S_ρ",
        "KL between the outputs of the model and of its copy moved by ρ, by Algorithm 1: mean over random starts",
    ),
    "local_inconsistency_converged": Measure(
        inconsistency.converged,
        False,
        35.0,
        "max S_ρ",
        "the worst such KL within the ball: ascent from ± the top Fisher eigenvector and noise, until it gains no more",
    ),
    "fisher_lambda_max": Measure(
        curvature.fisher_lambda_max,
        False,
        10.0,
        "λ_max(F)",
        "largest eigenvalue of the Fisher matrix, by Lanczos",
    ),
    "fisher_trace": Measure(
        curvature.fisher_trace, False, 2.7, "tr F", "trace of the Fisher matrix, by examples' own gradients"
    ),
    "hessian_lambda_max": Measure(
        curvature.hessian_lambda_max,
        False,
        24.0,
        "λ_max(H)",
        "largest eigenvalue of the loss Hessian (labels given, or else predicted), by Lanczos",
    ),
    "hessian_trace": Measure(
        curvature.hessian_trace,
        False,
        2.7,
        "tr H",
        "trace of the loss Hessian: tr F where every parameter enters affinely; else with labels given or predicted, "
        "at three gradients a probe",
    ),
    "error": Measure(outputs.error, True, 0.0, "error", "fraction of examples classified wrongly"),
    "cross_entropy": Measure(outputs.cross_entropy, True, 0.0, "CE", "mean cross-entropy in nats"),
    "hessian_lambda_min": Measure(
        curvature.hessian_lambda_min,
        False,
        90.0,
        "λ_min(H)",
        "smallest (most negative) eigenvalue of the loss Hessian, by Lanczos",
    ),
    "effective_rank": Measure(
        curvature.effective_rank,
        False,
        13.0,
        "tr F/λ_max",
        "over how many directions the curvature is spread",
    ),
    "local_inconsistency_adaptive": Measure(
        inconsistency.adaptive,
        False,
        13.3,
        "S_ρ adapt.",
        "S_ρ in the ball ‖δ/(|θ|+η)‖ ≤ ρ, invariant to rescaling",
    ),
    "local_inconsistency_relative": Measure(
        inconsistency.relative, False, 13.3, "S_ρ rel.", "S_ρ at radius ρ‖θ‖"
    ),
    "local_inconsistency_batchwise": Measure(
        inconsistency.batchwise, False, 13.3, "S_ρ batch", "mean over batches of m of each batch's own S_ρ"
    ),
    "average_inconsistency": Measure(
        inconsistency.average, False, 3.3, "A_ρ", "KL on average over random perturbations of length about ρ"
    ),
    "mean_entropy": Measure(
        outputs.mean_entropy, False, 0.0, "entropy", "mean entropy of the outputs in nats"
    ),
    "mean_confidence": Measure(
        outputs.mean_confidence, False, 0.0, "confidence", "mean probability of the predicted class"
    ),
    "input_jacobian_norm": Measure(
        outputs.input_jacobian_norm,
        False,
        7.0,
        "‖∂f/∂x‖",
        "root mean square norm of the output probabilities' derivative by the normalised input; a pass a class",
    ),
    "flip_rate": Measure(
        outputs.flip_rate, False, 0.33, "flips", "predictions that change in the mirror image"
    ),
    "crop_rate": Measure(
        outputs.crop_rate,
        False,
        0.33,
        "crops",
        "predictions that change where the image moves by up to 4 pixels",
    ),
    "distance_from_initialization": Measure(
        outputs.distance_from_initialization,
        False,
        0.0,
        "‖θ − θ₀‖",
        "length of the way from the initial parameters; known of run folders",
    ),
    "parameter_norm": Measure(outputs.parameter_norm, False, 0.0, "‖θ‖", "length of the parameter vector"),
}
"""All measures by their names, in the order of a table."""

DEFAULT_MEASURES = (
    "local_inconsistency",
    "fisher_lambda_max",
    "fisher_trace",
    "hessian_lambda_max",
    "hessian_trace",
    "error",
    "cross_entropy",
)


UNDEFINING = (DerivativeError, DivergedError, PrecisionError)
"""Errors that leave one measure undefined, and the others as they are."""

SEPARATE = {
    "error": "counts classes",
    "input_jacobian_norm": "differentiates an output by its own input",
    "flip_rate": "counts classes",
    "crop_rate": "counts classes",
    "local_inconsistency_batchwise": "cuts the batch",
}
"""Why some are undefined where the outputs of a batch hang together (``Batches.coupled``)."""


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


def check_names(names: Sequence[str], *, labeled: bool, coupled: bool = False) -> None:
    """Raise UsageError for an unknown measure, one that several processes cannot share, or of ``coupled`` examples an
    undefined one.

    Raises:
        DataError: one needs labels that are not there.
    """
    for name in names:
        if name not in MEASURES:
            raise UsageError(f"no measure {name!r}; {did_you_mean(name, MEASURES)}")
        if coupled and name in SEPARATE:
            raise UsageError(f"{name} {SEPARATE[name]}: of NT-Xent logits it is undefined; leave it out")
        if name == "local_inconsistency_batchwise" and count() > 1:
            raise UsageError(f"{name} cuts the examples into batches; take it in one process")
        if MEASURES[name].needs_labels and not labeled:
            raise DataError(f"{name} needs labels; give class folders with --labeled")


def takes_derivatives(names: Sequence[str]) -> bool:
    """Whether one does by more than a forward pass, so that the batch must leave memory for it."""
    return any(MEASURES[name].cost >= 1 for name in names)


def default_measures(*, labeled: bool, coupled: bool = False) -> list[str]:
    """``DEFAULT_MEASURES`` that can be taken; NT-Xent of ``coupled`` examples needs no labels."""
    return [
        name
        for name in DEFAULT_MEASURES
        if (labeled or coupled or not MEASURES[name].needs_labels) and not (coupled and name in SEPARATE)
    ]


@one_device()
@torch.inference_mode(False)
def measure(
    model: nn.Module,
    data: Data,
    names: Sequence[str] | None = None,
    settings: Settings | None = None,
    *,
    initial: nn.Module | None = None,
    memory: float = MEMORY,
    notify: Callable[[str, float], None] | None = None,
    outputs: Outputs | None = None,
) -> Report:
    """Measure ``model`` over ``data`` in eval mode; the model is left bit-identical.

    Batches are taken to the model's device. Products of float32 are taken in float32, not in TF32.

    Args:
        data: ``Batches``, or what they are made of: x, (x, y), a list of batches, a data set, a loader that does not
            shuffle. Inputs of floating-point numbers are taken in the dtype of the model's weights.
        outputs: how what the model returns is read (core.door). Default: a tensor of logits, or what is named so.
        names: of ``MEASURES``; default ``DEFAULT_MEASURES``, those that need labels only where there are some.
        initial: the model before training, for its distance.
        memory: bytes that a product may take, where the data has no batch size of its own, and a quarter more that
            the Hessian's products may keep from one to the next.
        notify: called with the measure at work and the gradient evaluations done so far.

    Raises:
        UsageError: an unknown measure, data or outputs that cannot be read, a model without trainable parameters, or
            whose gradients fail or are hidden.
        DerivativeError: the model lacks the derivative of every measure, or in several processes of one; else that
            one is undefined.
        CheckpointError: weights that are not finite.
        DataError: labels that do not fit, a measure that needs absent labels, data that changes between passes.
        DivergedError: outputs that are not finite; derivatives, as DerivativeError.
        PrecisionError: perturbations lost to rounding, as DerivativeError.
        ResourceError: no memory for a single example; before, batches are halved where it runs out.
    """
    settings = settings or Settings()
    batches = _in_dtype_of(model, as_batches(data))
    if names is None:
        names = default_measures(labeled=batches.labeled, coupled=batches.coupled)
    check_names(names, labeled=batches.labeled, coupled=batches.coupled)
    if batches.num_examples == 0:
        raise DataError("the probe set is empty")
    device = Parameters(model, settings.params).device
    require_float64(device)
    batches = batches.on(device)
    current = names[0] if names else ""

    def tick(evaluations: float) -> None:
        if notify is not None:
            notify(current, evaluations)

    work = Work(batches.num_examples, tick)
    rows: dict[str, Estimate] = {}
    refusals: list[ProbeError] = []
    # a model may draw at random though its outputs stay the same
    batches = in_layout_taken(model, batches)
    with generators_kept(batches.device, model), as_measured(model):
        probe = Probe(model, batches, settings, work, initial, memory, outputs)
        _require_full(probe.parameters.dtype)

        def probed(batches: Batches) -> Probe:
            nonlocal probe
            if probe.batches is not batches:  # what is shared was made on the others
                probe = Probe(model, batches, settings, work, initial, memory, outputs)
            return probe

        probe.parameters.check_finite()
        if batches.free and takes_derivatives(names):
            batches = within(memory, model, batches, outputs)
        # its cost is the report's, not the first measure's
        _, batches = within_memory(batches, lambda batches: probed(batches).clean)
        for name in names:
            current = name
            before = work.evaluations
            compute = MEASURES[name].compute
            try:
                figure, batches = within_memory(batches, lambda batches: compute(probed(batches)))  # noqa: B023  called at once
            except (UsageError, *UNDEFINING) as error:
                told = type(error)(f"{name}: {error}")
                # of several processes one alone may have seen it, for which the others would wait
                if not isinstance(told, UNDEFINING) or count() > 1:
                    raise told from error
                refusals.append(told)
                figure = None, None, None, False, {"reason": str(error)}
            rows[name] = _estimate(figure, batches, settings.target_error, work.evaluations - before)
    if refusals and all(row.value is None for row in rows.values()):
        raise refusals[0]
    how = outputs or Outputs()
    return Report(probe.parameters.size, batches.total, settings, rows, batches.batch_size, how)


def _in_dtype_of(model: nn.Module, batches: Batches) -> Batches:
    """``batches`` in the dtype of the model's weights, where these have a single one."""
    dtypes = {p.dtype for p in model.parameters() if p.is_floating_point()}
    return batches.of_dtype(dtypes.pop()) if len(dtypes) == 1 else batches


def _require_full(dtype: torch.dtype) -> None:
    if dtype not in (torch.float32, torch.float64):
        raise UsageError(
            f"the weights are {dtype}, in which no residual below a few percent can be told; measure model.float()"
        )


def _estimate(figure: Figure, batches: Batches, target_error: float, cost: float) -> Estimate:
    """With reasons for what is missing or not finite, and how many examples ``target_error`` takes."""
    value, stderr, example_error, converged, details = figure
    details = dict(details)
    if example_error is None and value is not None:
        one = "batch" if batches.coupled else "example"
        details.setdefault("reason_stderr_examples", f"one {one}, or lost in the probes' noise")
    found = {"value": value, "stderr": stderr, "stderr_examples": example_error}
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
        images = 2 if batches.coupled else 1  # two views of an image
        if ratio > 0:  # without a spread nothing can be told
            details["examples_needed"] = math.ceil(batches.total / images * ratio**2)
    return Estimate(
        **found, converged=converged and value is not None, num_evals=round(cost, 3), details=details
    )


def by_protocol(name: str, settings: Settings) -> str:
    """``name``, or of ``local_inconsistency`` under the converged protocol the maximum's own."""
    if name == "local_inconsistency" and settings.protocol == "converged":
        return "local_inconsistency_converged"
    return name


def expected_cost(names: Sequence[str], settings: Settings) -> float:
    """Gradient evaluations that ``measure`` will take, roughly: for progress bars and estimates."""
    total = 2 / 3  # the two clean passes
    for name in names:
        name = by_protocol(name, settings)
        cost = MEASURES[name].cost
        if name == "local_inconsistency":
            cost = _cost_of_starts(settings)
        if name == "local_inconsistency_converged":
            cost *= len({settings.rho, *settings.rho_grid})
        if name == "hessian_trace" and "fisher_trace" in names:
            cost = 0.0  # of networks that are affine in each parameter, it is the same
        total += cost
    return total


def _cost_of_starts(settings: Settings) -> float:
    """Gradient evaluations of the paper's protocol: the first gradient serves every ρ of a grid."""
    radii = len({settings.rho, *settings.rho_grid})
    most = max((settings.k_steps, *settings.k_grid))
    along = 1 / 3 if settings.k_steps < most else 0  # the examples' terms, in passing
    return settings.num_starts * (1 + radii * (most - 1 + 1 / 3) + along)
