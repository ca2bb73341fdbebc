"""Eigenvalues and traces of the Fisher matrix and of the loss Hessian."""

from __future__ import annotations

import math
from typing import Any

from gm_probe.linalg.lanczos import Eigenpair, eigenpairs, random_start
from gm_probe.linalg.operator import Operator
from gm_probe.linalg.trace import Hutchinson, Trace
from gm_probe.measures.context import Figure, Probe, example_error
from gm_probe.runtime.processes import everywhere

REFINEMENTS = 3
"""Of tr F, where tr H turns out much smaller: each time more of tr H's own size is known."""


def _eigenvalue(operator: Operator, pair: Eigenpair, **details: Any) -> Figure:
    details = {**details, "iterations": pair.iterations, "error_kind": "residual bound"}
    # the per-example Rayleigh terms of the eigenvector have the eigenvalue as their mean
    return pair.value, pair.residual, example_error(operator.terms(pair.vector)), pair.converged, details


def fisher_lambda_max(probe: Probe) -> Figure:
    return _listed(*_fisher_largest(probe))


def hessian_lambda_max(probe: Probe) -> Figure:
    return _listed(*_largest(probe, probe.hessian, "hessian", labels=probe.label_kind))


def _listed(figure: Figure, rows: list[dict[str, Any]]) -> Figure:
    """With all of ``rows``, which must have converged."""
    value, error, examples, converged, details = figure
    if rows:
        details = {**details, "eigenvalues": rows}
    return value, error, examples, converged and all(row["converged"] for row in rows), details


def _fisher_largest(probe: Probe) -> tuple[Figure, list[dict[str, Any]]]:
    return probe.once("largest of F", lambda: _largest(probe, probe.fisher, "fisher"))


def _largest(
    probe: Probe, operator: Operator, name: str, **details: Any
) -> tuple[Figure, list[dict[str, Any]]]:
    """The largest eigenvalue by itself, and a row of each where ``top_eigenvalues`` asks for more than one."""
    wanted = probe.settings.top_eigenvalues
    if wanted == 1:
        return _eigenvalue(operator, getattr(probe, f"{name}_top"), **details), []
    pairs, _ = eigenpairs(
        operator,
        random_start(operator, probe.generator(f"{name} top")),
        top=wanted,
        tolerance=probe.settings.eigen_tolerance,
        max_iterations=probe.settings.max_iterations,
        expect=probe.work.expect,
    )
    rows: list[dict[str, Any]] = [
        {"value": p.value, "residual": p.residual, "converged": p.converged} for p in pairs
    ]
    if (
        pairs[0].iterations >= probe.settings.max_iterations
    ):  # else there are no more: all others are 0, or repeated
        missing = min(wanted, operator.size) - len(rows)
        rows += missing * [{"value": None, "residual": None, "converged": False}]
    return _eigenvalue(operator, pairs[0], **details), rows


def hessian_lambda_min(probe: Probe) -> Figure:
    """H is indefinite; its most negative eigenvalue says how far from a minimum the model is."""
    _, [pair] = eigenpairs(
        probe.hessian,
        random_start(probe.hessian, probe.generator("hessian bottom")),
        top=0,
        bottom=1,
        tolerance=probe.settings.eigen_tolerance,
        max_iterations=probe.settings.max_iterations,
        expect=probe.work.expect,
    )
    return _eigenvalue(probe.hessian, pair, labels=probe.label_kind)


def _hutchinson(probe: Probe, operator: Operator, name: str) -> Hutchinson:
    settings = probe.settings
    return Hutchinson(
        operator,
        generator=probe.generator(name),
        tolerance=settings.trace_tolerance,
        min_probes=settings.min_probes,
        max_probes=settings.max_probes,
        expect=probe.work.expect,
    )


def _row(found: Trace, method: str, **details: Any) -> Figure:
    details = {**details, "method": method, "num_probes": found.num_probes}
    return found.value, found.stderr, found.stderr_examples, found.converged, details


def _estimator(found: Trace) -> str:
    return "Hutch++" if found.sketched else "Hutchinson"


EXAMPLES = "per-example gradients"


def fisher_trace(probe: Probe) -> Figure:
    """By examples' own gradients, or where the model has none, by Hutchinson's estimator."""
    return probe.once("tr F", lambda: _fisher_trace(probe))


def _fisher_trace(probe: Probe) -> Figure:
    found = probe.example_fisher_trace
    if found is not None:
        return _row(
            found, f"{EXAMPLES}, {'exact' if found.stderr is None else 'random signs on the outputs'}"
        )
    found = _hutchinson(probe, probe.fisher, "fisher trace").estimate()
    return _row(found, _estimator(found))


def hessian_trace(probe: Probe) -> Figure:
    """Return tr F where every parameter enters affinely, else tr F + tr(H − F)."""
    if everywhere(probe.not_affine is None, probe.clean.device):
        value, error, examples, converged, details = fisher_trace(probe)
        method = f"tr F, because every parameter enters affinely: {details['method']}"
        return value, error, examples, converged, {**details, "method": method, "labels": "none needed"}
    fisher = probe.example_fisher_trace
    if fisher is None:
        found = _hutchinson(probe, probe.hessian, "hessian trace").estimate()
        details = {"labels": probe.label_kind, "not_affine": probe.not_affine}
        return _row(found, _estimator(found), **details)
    rest = _hutchinson(probe, probe.residual, "hessian trace")  # its probes serve all refinements of tr F
    found = rest.estimate(fisher.terms, fisher.stderr or 0.0)
    for _ in range(REFINEMENTS):
        allowed = probe.settings.trace_tolerance * abs(found.value)
        if found.converged or not fisher.stderr or fisher.stderr <= allowed / 2:
            break
        # tr F was taken to its own size, which tr(H − F) may all but cancel; now it takes a half of what is allowed
        finer = probe.fisher_trace_to(allowed / 2 / fisher.value)
        if finer is None or (finer.stderr or 0.0) >= fisher.stderr:
            break
        fisher, found = finer, rest.estimate(finer.terms, finer.stderr or 0.0)
    details = {"labels": probe.label_kind, "not_affine": probe.not_affine}
    return _row(found, f"tr F + tr(H − F), the latter by {_estimator(found)}", **details)


def effective_rank(probe: Probe) -> Figure:
    """tr F / λ_max(F): over how many directions the curvature is spread."""
    (top, top_error, top_examples, top_converged, top_details), _ = _fisher_largest(probe)
    total, error, examples, converged, details = fisher_trace(probe)
    assert top is not None
    assert total is not None
    if not top > 0:
        return None, None, None, False, {"reason": "λ_max(F) is not positive"}
    ratio = total / top
    estimator = ratio * math.hypot((error or 0.0) / total, (top_error or 0.0) / top)
    # of the part that limits it
    if not top_converged or (converged and (top_error or 0.0) / top > (error or 0.0) / total):
        details = top_details
    # numerator and denominator share the examples; taken as independent, which errs high
    both = (
        None if examples is None or top_examples is None else math.hypot(examples / total, top_examples / top)
    )
    return ratio, estimator, None if both is None else ratio * both, converged and top_converged, details
