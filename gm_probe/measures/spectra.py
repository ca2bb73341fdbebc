"""Eigenvalues and traces of the Fisher matrix and of the loss Hessian."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from gm_probe.linalg.lanczos import Eigenpair, eigenpairs
from gm_probe.linalg.operator import Operator, random_start
from gm_probe.linalg.trace import Hutchinson, Trace
from gm_probe.measures.context import MeasurementContext
from gm_probe.measures.estimates import Estimate, example_error
from gm_probe.runtime.processes import everywhere

REFINEMENTS = 3
"""How often tr F is refined where tr H turns out much smaller; each time the size of tr H is known better."""


def _eigenvalue(operator: Operator, pair: Eigenpair, **details: Any) -> Estimate:
    details = {**details, "iterations": pair.iterations, "error_kind": "residual bound"}
    # the per-example Rayleigh terms of the eigenvector have the eigenvalue as their mean
    return Estimate(
        pair.value,
        stderr=pair.residual,
        stderr_examples=example_error(operator.terms(pair.vector)),
        converged=pair.converged,
        details=details,
    )


def fisher_lambda_max(context: MeasurementContext) -> Estimate:
    return _listed(*_fisher_largest(context))


def hessian_lambda_max(context: MeasurementContext) -> Estimate:
    return _listed(
        *_largest(context, context.hessian, "hessian", lambda: context.hessian_top, labels=context.label_kind)
    )


def _listed(largest: Estimate, rows: list[dict[str, Any]]) -> Estimate:
    """Add the ``rows`` of all eigenvalues, which must have converged."""
    if not rows:
        return largest
    return replace(
        largest,
        converged=largest.converged and all(row["converged"] for row in rows),
        details={**largest.details, "eigenvalues": rows},
    )


def _fisher_largest(context: MeasurementContext) -> tuple[Estimate, list[dict[str, Any]]]:
    return context.once(
        "largest of F", lambda: _largest(context, context.fisher, "fisher", lambda: context.fisher_top)
    )


def _largest(
    context: MeasurementContext, operator: Operator, name: str, top: Callable[[], Eigenpair], **details: Any
) -> tuple[Estimate, list[dict[str, Any]]]:
    """Return the largest eigenvalue, from ``top`` if it is the only one asked for, or with a row for each."""
    wanted = context.settings.top_eigenvalues
    if wanted == 1:
        return _eigenvalue(operator, top(), **details), []
    pairs, _ = eigenpairs(
        operator,
        random_start(operator, context.generator(f"{name} top")),
        top=wanted,
        tolerance=context.settings.eigen_tolerance,
        max_iterations=context.settings.max_iterations,
        expect=context.work.expect,
    )
    rows: list[dict[str, Any]] = [
        {"value": p.value, "residual": p.residual, "converged": p.converged} for p in pairs
    ]
    # with fewer iterations there are no more eigenvalues: all others are 0 or repeated
    if pairs[0].iterations >= context.settings.max_iterations:
        missing = min(wanted, operator.size) - len(rows)
        rows += missing * [{"value": None, "residual": None, "converged": False}]
    return _eigenvalue(operator, pairs[0], **details), rows


def hessian_lambda_min(context: MeasurementContext) -> Estimate:
    """Return the smallest eigenvalue: H is indefinite, and this one shows how far from a minimum the model is."""
    _, [pair] = eigenpairs(
        context.hessian,
        random_start(context.hessian, context.generator("hessian bottom")),
        top=0,
        bottom=1,
        tolerance=context.settings.eigen_tolerance,
        max_iterations=context.settings.max_iterations,
        expect=context.work.expect,
    )
    return _eigenvalue(context.hessian, pair, labels=context.label_kind)


def _hutchinson(context: MeasurementContext, operator: Operator, name: str) -> Hutchinson:
    settings = context.settings
    return Hutchinson(
        operator,
        generator=context.generator(name),
        tolerance=settings.trace_tolerance,
        min_probes=settings.min_probes,
        max_probes=settings.max_probes,
        expect=context.work.expect,
    )


def _row(found: Trace, method: str, **details: Any) -> Estimate:
    details = {**details, "method": method, "num_probes": found.num_probes}
    return Estimate(
        found.value,
        stderr=found.stderr,
        stderr_examples=found.stderr_examples,
        converged=found.converged,
        details=details,
    )


def _estimator(found: Trace) -> str:
    return "Hutch++" if found.sketched else "Hutchinson"


EXAMPLES = "per-example gradients"


def fisher_trace(context: MeasurementContext) -> Estimate:
    """Compute tr F from per-example gradients or, where the model has none, by Hutchinson's estimator."""
    return context.once("tr F", lambda: _fisher_trace(context))


def _fisher_trace(context: MeasurementContext) -> Estimate:
    found = context.example_fisher_trace
    if found is not None:
        return _row(
            found, f"{EXAMPLES}, {'exact' if found.stderr is None else 'random signs on the outputs'}"
        )
    found = _hutchinson(context, context.fisher, "fisher trace").estimate()
    return _row(found, _estimator(found))


def hessian_trace(context: MeasurementContext) -> Estimate:
    """Return tr F where every parameter enters affinely, else tr F + tr(H − F)."""
    if everywhere(context.not_affine is None, context.logits.device):
        same = fisher_trace(context)
        method = f"tr F, because every parameter enters affinely: {same.details['method']}"
        return replace(same, details={**same.details, "method": method, "labels": "none needed"})
    fisher = context.example_fisher_trace
    if fisher is None:
        found = _hutchinson(context, context.hessian, "hessian trace").estimate()
        details = {"labels": context.label_kind, "not_affine": context.not_affine}
        return _row(found, _estimator(found), **details)
    rest = _hutchinson(context, context.residual, "hessian trace")  # its vectors serve all refinements
    found = rest.estimate(fisher.terms, fisher.stderr or 0.0)
    for _ in range(REFINEMENTS):
        allowed = context.settings.trace_tolerance * abs(found.value)
        if found.converged or not fisher.stderr or fisher.stderr <= allowed / 2:
            break
        # The tolerance for tr F was relative to tr F, which tr(H − F) may almost cancel. Now tr F gets half of tr H's.
        finer = context.fisher_trace_to(allowed / 2 / fisher.value)
        if finer is None or (finer.stderr or 0.0) >= fisher.stderr:
            break
        fisher, found = finer, rest.estimate(finer.terms, finer.stderr or 0.0)
    details = {"labels": context.label_kind, "not_affine": context.not_affine}
    return _row(found, f"tr F + tr(H − F), the latter by {_estimator(found)}", **details)


def effective_rank(context: MeasurementContext) -> Estimate:
    """Return tr F / λ_max(F), the number of directions over which the curvature is spread."""
    (top, _), total = _fisher_largest(context), fisher_trace(context)
    assert top.value is not None
    assert total.value is not None
    if not top.value > 0:
        return Estimate.undefined("λ_max(F) is not positive")
    ratio = total.value / top.value
    top_error, total_error = (top.stderr or 0.0) / top.value, (total.stderr or 0.0) / total.value
    top_limits = not top.converged or (total.converged and top_error > total_error)
    both = None
    if total.stderr_examples is not None and top.stderr_examples is not None:
        # numerator and denominator share the examples; as if independent, their errors give too much
        both = math.hypot(total.stderr_examples / total.value, top.stderr_examples / top.value)
    return Estimate(
        ratio,
        stderr=ratio * math.hypot(total_error, top_error),
        stderr_examples=None if both is None else ratio * both,
        converged=total.converged and top.converged,
        details=(top if top_limits else total).details,
    )
