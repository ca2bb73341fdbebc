"""The table of measures, and the one function that takes them of a model."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from gm_probe.core.batches import Batches
from gm_probe.core.errors import DataError, UsageError, did_you_mean
from gm_probe.core.parameters import differentiable_attention, evaluating
from gm_probe.probe.ascent import Maximum, ascend, maximize
from gm_probe.probe.operators import Operator
from gm_probe.probe.probe import Estimate, Probe, Settings
from gm_probe.probe.spectrum import Eigenpair, trace
from gm_probe.probe.work import Work


def _example_error(terms: Tensor) -> float | None:
    """Standard error of the mean of (N,) per-example values; None of a single one."""
    return float(terms.double().std()) / math.sqrt(len(terms)) if len(terms) > 1 else None


Figure = tuple[float, float | None, float | None, bool, dict[str, Any]]
"""value, estimator's error, error from the examples being a sample, converged, details"""


def _local_inconsistency_paper(probe: Probe) -> Figure:
    settings = probe.settings
    all_terms = [
        probe.divergence.terms(ascend(probe.divergence.gradient, start, settings.rho, settings.k_steps))
        for start in probe.starts()
    ]
    values = torch.stack([terms.double().mean() for terms in all_terms])
    spread = float(values.std()) if len(values) > 1 else None
    error = None if spread is None else spread / math.sqrt(len(values))
    details = {
        "protocol": "paper",
        "sd_starts": spread,
        "num_starts": len(values),
        "starts": values.tolist(),
    }
    if spread is None:
        details["reason_stderr"] = "one start has no spread"
    # K steps are the protocol's definition: there is nothing to converge
    return float(values.mean()), error, _example_error(torch.stack(all_terms).mean(0)), True, details


def _local_inconsistency_converged(probe: Probe) -> Figure:
    settings = probe.settings
    top = probe.fisher_top
    # the two signs of v₁ end 12-43 % apart beyond the quadratic regime; noise guards against a poor v₁
    starts = {"+v1": top.vector, "-v1": -top.vector}
    starts |= {f"noise {i}": start for i, start in enumerate(probe.starts()[:2])}
    ends: dict[str, Maximum] = {}
    for name, start in starts.items():
        if name.startswith("noise"):  # a raw noise direction is flat: one step of Algorithm 1 first
            start = ascend(probe.divergence.gradient, start, settings.rho, 1)
        ends[name] = maximize(
            probe.divergence.value_and_gradient,
            start,
            settings.rho,
            tolerance=settings.ascent_tolerance,
            max_steps=settings.max_iterations,
        )
    best = max(ends.values(), key=lambda end: end.value)
    quadratic = settings.rho**2 / 2 * top.value
    details = {
        "protocol": "converged",
        "starts": {name: end.value for name, end in ends.items()},
        "alignment": best.alignment,
        "gains": list(best.gains),
        "quadratic_ratio": best.value / quadratic if quadratic > 0 else None,
    }
    return best.value, None, _example_error(probe.divergence.terms(best.delta)), best.converged, details


def _local_inconsistency(probe: Probe) -> Figure:
    if probe.settings.protocol == "converged":
        return _local_inconsistency_converged(probe)
    return _local_inconsistency_paper(probe)


def _eigenvalue(operator: Operator, top: Eigenpair, details: dict[str, Any]) -> Figure:
    details = {**details, "iterations": top.iterations, "error_kind": "residual bound"}
    # the per-example Rayleigh terms of the top eigenvector have λ_max as their mean
    return top.value, top.residual, _example_error(operator.terms(top.vector)), top.converged, details


def _fisher_lambda_max(probe: Probe) -> Figure:
    return _eigenvalue(probe.fisher, probe.fisher_top, {})


def _hessian_lambda_max(probe: Probe) -> Figure:
    # from a cold start: F's top vector would save products, but could hide an eigenvector that F does not have
    top = probe.top(probe.hessian, "hessian")
    return _eigenvalue(probe.hessian, top, {"labels": probe.label_kind})


def _trace(probe: Probe, operator: Operator, name: str, details: dict[str, Any]) -> Figure:
    settings = probe.settings
    result = trace(
        operator,
        generator=probe.generator(name),
        tolerance=settings.trace_tolerance,
        min_probes=settings.min_probes,
        max_probes=settings.max_probes,
    )
    details = {**details, "num_probes": result.num_probes}
    return result.value, result.stderr, result.stderr_examples, result.converged, details


def _fisher_trace(probe: Probe) -> Figure:
    return _trace(probe, probe.fisher, "fisher trace", {})


def _hessian_trace(probe: Probe) -> Figure:
    return _trace(probe, probe.hessian, "hessian trace", {"labels": probe.label_kind})


def _error(probe: Probe) -> Figure:
    assert probe.labels is not None
    wrong = (probe.clean.argmax(1) != probe.labels).double()
    return float(wrong.mean()), None, _example_error(wrong), True, {}


def _cross_entropy(probe: Probe) -> Figure:
    assert probe.labels is not None
    losses = functional.cross_entropy(probe.clean.double(), probe.labels, reduction="none")
    return float(losses.mean()), None, _example_error(losses), True, {}


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
        _local_inconsistency,
        False,
        13.3,
        "S_ρ",
        "KL between the outputs of the model and of its copy moved by ρ, by Algorithm 1: mean over random starts",
    ),
    "local_inconsistency_converged": Measure(
        _local_inconsistency_converged,
        False,
        27.0,
        "max S_ρ",
        "the worst such KL within the ball: ascent from ± the top Fisher eigenvector and noise, until it gains no more",
    ),
    "fisher_lambda_max": Measure(
        _fisher_lambda_max, False, 13.0, "λ_max(F)", "largest eigenvalue of the Fisher matrix, by Lanczos"
    ),
    "fisher_trace": Measure(
        _fisher_trace, False, 7.0, "tr F", "trace of the Fisher matrix, by Hutchinson's estimator"
    ),
    "hessian_lambda_max": Measure(
        _hessian_lambda_max,
        False,
        25.0,
        "λ_max(H)",
        "largest eigenvalue of the loss Hessian (labels given, or else predicted), by Lanczos",
    ),
    "hessian_trace": Measure(
        _hessian_trace,
        False,
        14.0,
        "tr H",
        "trace of the loss Hessian (labels given, or else predicted), by Hutchinson's estimator",
    ),
    "error": Measure(_error, True, 0.0, "error", "fraction of examples classified wrongly"),
    "cross_entropy": Measure(_cross_entropy, True, 0.0, "CE", "mean cross-entropy in nats"),
}

DEFAULT_MEASURES = tuple(name for name in MEASURES if name != "local_inconsistency_converged")


@dataclass(frozen=True, slots=True)
class Report:
    """What ``measure`` found: ``rows`` maps a measure's name to its estimate."""

    num_parameters: int
    num_examples: int
    settings: Settings
    rows: dict[str, Estimate]

    def as_dict(self, *, checkpoint: str, model: str, **more: Any) -> dict[str, Any]:
        """The JSON object of ``gmprobe measure --json`` and of a run's measures.json."""
        return {
            "checkpoint": checkpoint,
            "model": model,
            "num_parameters": self.num_parameters,
            "num_examples": self.num_examples,
            "settings": {**asdict(self.settings), "batchnorm": "eval (running statistics)", **more},
            "measures": {name: row.as_dict() for name, row in self.rows.items()},
        }


def check_names(names: Sequence[str], *, labeled: bool) -> None:
    """Raise UsageError for an unknown measure, DataError for one that needs labels that are not there."""
    for name in names:
        if name not in MEASURES:
            raise UsageError(f"no measure {name!r}; {did_you_mean(name, MEASURES)}")
        if MEASURES[name].needs_labels and not labeled:
            raise DataError(f"{name} needs labels; give class folders with --labeled")


def measure(
    model: nn.Module,
    batches: Batches,
    names: Sequence[str] | None = None,
    settings: Settings | None = None,
    *,
    notify: Callable[[str, float], None] | None = None,
) -> Report:
    """Measure ``model`` over ``batches`` in eval mode; the model is left bit-identical.

    Args:
        names: of ``MEASURES``; default ``DEFAULT_MEASURES``, those that need labels only where there are some.
        notify: called with the measure at work and the gradient evaluations done so far.

    Raises:
        UsageError: an unknown measure, or a model without trainable parameters.
        CheckpointError: weights that are not finite.
        DataError: labels that do not fit, a measure that needs absent labels, data that changes between passes.
        DivergedError: outputs or derivatives that are not finite.
    """
    settings = settings or Settings()
    if names is None:
        names = [name for name in DEFAULT_MEASURES if batches.labeled or not MEASURES[name].needs_labels]
    check_names(names, labeled=batches.labeled)
    if batches.num_examples == 0:
        raise DataError("the probe set is empty")
    current = names[0] if names else ""

    def tick(evaluations: float) -> None:
        if notify is not None:
            notify(current, evaluations)

    work = Work(batches.num_examples, tick)
    rows: dict[str, Estimate] = {}
    with evaluating(model), differentiable_attention():
        probe = Probe(model, batches, settings, work)
        probe.parameters.check_finite()
        _ = probe.clean  # its cost is the report's, not the first measure's
        for name in names:
            current = name
            before = work.evaluations
            value, stderr, example_error, converged, details = MEASURES[name].compute(probe)
            if example_error is None:
                details = {**details, "reason_stderr_examples": "one example, or lost in the probes' noise"}
            figures: dict[str, float | None] = {
                "value": value,
                "stderr": stderr,
                "stderr_examples": example_error,
            }
            for label, figure in figures.items():
                if figure is not None and not math.isfinite(figure):
                    figures[label] = None
                    reason = "reason" if label == "value" else f"reason_{label}"
                    details = {**details, reason: f"not finite ({figure})"}
            cost = round(work.evaluations - before, 3)
            rows[name] = Estimate(
                **figures,
                converged=converged and figures["value"] is not None,
                num_evals=cost,
                details=details,
            )
    return Report(probe.parameters.size, batches.num_examples, settings, rows)


def expected_cost(names: Sequence[str], settings: Settings) -> float:
    """Gradient evaluations that ``measure`` will take, roughly: for progress bars and estimates."""
    total = 2 / 3  # the two clean passes
    for name in names:
        cost = MEASURES[name].cost
        if name == "local_inconsistency":
            cost = (
                MEASURES["local_inconsistency_converged"].cost
                if settings.protocol == "converged"
                else settings.num_starts * (settings.k_steps + 1 / 3)
            )
        total += cost
    return total
