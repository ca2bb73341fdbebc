"""What is true: λ_max and traces of F and H in float64, by code that shares nothing with gm_probe's own products."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from scipy.linalg import eigh_tridiagonal
from torch import Tensor
from torch.func import functional_call, jvp
from torch.nn import functional

from peers.subject import Subject

Product = Callable[[Tensor], Tensor]
NEGLIGIBLE = 1e-9  # a class of this probability adds next to nothing to tr F (the bound is recorded)


def _flat(tensors: tuple[Tensor, ...]) -> Tensor:
    return torch.cat([tensor.reshape(-1) for tensor in tensors])


def _like(subject: Subject, vector: Tensor) -> list[Tensor]:
    parameters = subject.parameters
    pieces = vector.split([p.numel() for p in parameters])
    return [piece.view(p.shape) for piece, p in zip(pieces, parameters, strict=True)]


def hessian_product(subject: Subject, v: Tensor) -> Tensor:
    """H v by double backward, H of the mean cross-entropy."""
    parameters, tangents = subject.parameters, _like(subject, v)
    total = torch.zeros_like(v)
    for x, y in subject.batches:
        loss = functional.cross_entropy(subject.model(x), y, reduction="sum")
        slopes = torch.autograd.grad(loss, parameters, create_graph=True)
        total += _flat(torch.autograd.grad(slopes, parameters, tangents))
    return total / subject.num_examples


def fisher_product(subject: Subject, v: Tensor) -> Tensor:
    """F v = Jᵀ(diag p − p pᵀ)J v by forward and reverse mode."""
    names = [name for name, _ in subject.model.named_parameters()]
    values = {name: p.detach() for name, p in subject.model.named_parameters()}
    tangents = dict(zip(names, _like(subject, v), strict=True))
    total = torch.zeros_like(v)
    for x, _ in subject.batches:
        with torch.no_grad():
            run = partial(functional_call, subject.model, args=(x,))
            outputs: Any = jvp(run, (values,), (tangents,))
        logits, moved = outputs
        p = functional.softmax(logits, dim=1)
        cotangents = p * (moved - (p * moved).sum(1, keepdim=True))
        total += _flat(torch.autograd.grad(subject.model(x), subject.parameters, cotangents))
    return total / subject.num_examples


@dataclass(frozen=True)
class _Pair:
    """Ritz pair: residual ‖Av − θv‖ and the gap to the next Ritz value."""

    theta: float
    vector: Tensor
    residual: float
    gap: float
    iterations: int


def _lanczos(product: Product, start: Tensor, done: Callable[[float, float, int], bool]) -> _Pair:
    """Lanczos with full reorthogonalisation in float64 until ``done(θ, residual, iterations)``."""
    basis: list[Tensor] = []
    diagonal: list[float] = []
    below: list[float] = []
    w, norm = start.double(), float(start.double().norm())
    while True:
        basis.append(w / norm)
        w = product(basis[-1])
        diagonal.append(float(basis[-1] @ w))
        for _ in range(2):
            for q in basis:
                w -= (q @ w) * q
        norm = float(w.norm())
        values, vectors = eigh_tridiagonal(np.array(diagonal), np.array(below))
        theta, ritz = float(values[-1]), vectors[:, -1]
        residual = norm * abs(float(ritz[-1]))
        if done(theta, residual, len(basis)):
            vector = torch.stack([float(c) * q for c, q in zip(ritz, basis, strict=True)]).sum(0)
            gap = theta - float(values[-2]) if len(values) > 1 else theta
            return _Pair(theta, vector, residual, gap, len(basis))
        below.append(norm)


def _top(name: str, single: Product, double: Product, size: int) -> dict[str, Any]:
    """λ_max in float64 until the bound of its error, residual²/gap, is below 1e-8 of it.

    Float32 products find the vector from a random start (30 iterations at least: a Ritz value may rest on a plateau);
    exact float64 products then carry on from it until the bound holds, and alone decide the value.
    """
    generator = torch.Generator().manual_seed(1)
    start = torch.randn(size, generator=generator, dtype=torch.float64)
    rough = _lanczos(
        lambda v: single(v.float()).double(), start, lambda t, r, n: (n >= 30 and r < 1e-4 * t) or n >= 150
    )
    fine = _lanczos(double, rough.vector, lambda t, r, n: n >= 2 and r**2 / rough.gap < 1e-8 * t)
    return {
        name: fine.theta,
        f"{name}_bound": fine.residual**2 / rough.gap / fine.theta,
        f"{name}_iterations": [rough.iterations, fine.iterations],
    }


def fisher_trace(subject: Subject) -> tuple[float, float]:
    """(1/N) Σ_x Σ_c p_c ‖∇_θ log p_c(x)‖², example by example and class by class; and the bound of what is left out."""
    total, left_out, largest = 0.0, 0.0, 0.0
    for x, _ in subject.batches:
        for one in x.split(1):
            scores = functional.log_softmax(subject.model(one), dim=1)[0]
            p = scores.detach().exp()
            kept = [c for c in range(len(p)) if p[c] > NEGLIGIBLE]
            left_out += float(p.sum() - p[kept].sum())
            for c in kept:
                gradients = torch.autograd.grad(
                    scores[c], subject.parameters, retain_graph=c != kept[-1], materialize_grads=True
                )
                square = sum(float(g.square().sum()) for g in gradients)
                largest = max(largest, square)
                total += float(p[c]) * square
    return total / subject.num_examples, left_out * largest / subject.num_examples


def diagonal_gap(subject: Subject, count: int = 40) -> float:
    """Largest |H_ii − F_ii| relative to the largest F_ii, over the strongest entry of each of ``count`` tensors.

    H_ii from the product with eᵢ, F_ii = mean Σ_c p_c (∂ᵢ log p_c)² from per-example gradients. Where every
    parameter enters the logits affinely the two are equal, and so are the traces.
    """
    parameters = subject.parameters
    squares = [torch.zeros_like(p) for p in parameters]
    for x, _ in subject.batches:
        for one in x.split(1):
            scores = functional.log_softmax(subject.model(one), dim=1)[0]
            for score in scores:
                gradients = torch.autograd.grad(score, parameters, retain_graph=True, materialize_grads=True)
                for square, g in zip(squares, gradients, strict=True):
                    square += score.detach().exp() * g.square()
    gaps, scale, offset = [], 0.0, 0
    size = sum(p.numel() for p in parameters)
    chosen = {round(i) for i in np.linspace(0, len(parameters) - 1, min(count, len(parameters)))}
    for index, square in enumerate(squares):
        if index in chosen:
            entry = int(square.reshape(-1).argmax())
            unit = torch.zeros(size, dtype=square.dtype)
            unit[offset + entry] = 1
            fisher = float(square.reshape(-1)[entry]) / subject.num_examples
            gaps.append(abs(float(hessian_product(subject, unit) @ unit) - fisher))
            scale = max(scale, fisher)
        offset += square.numel()
    return max(gaps) / scale


def reference(subject: Subject) -> dict[str, Any]:
    """All four figures. ``subject`` is float32 and is float64 after.

    Raises:
        RuntimeError: tr H ≠ tr F here, so that there is no exact tr H.
    """
    seconds = {}
    begin = time.perf_counter()

    def lap(name: str) -> None:
        nonlocal begin
        seconds[name] = round(time.perf_counter() - begin, 1)
        begin = time.perf_counter()

    single = replace(subject, model=copy.deepcopy(subject.model))
    double = subject.double()
    size = sum(p.numel() for p in double.parameters)
    truth: dict[str, Any] = {}
    for name, product in (("lambda_F", fisher_product), ("lambda_H", hessian_product)):
        truth |= _top(name, partial(product, single), partial(product, double), size)
        lap(name)
    gap = diagonal_gap(double.first(4))
    if gap > 1e-10:
        raise RuntimeError(f"diag H and diag F differ by {gap:.1e}: there is no exact tr H for this network")
    lap("check")
    trace, bound = fisher_trace(double)
    lap("trace")
    truth |= {"trace_F": trace, "trace_H": trace, "trace_bound": bound / trace, "diagonal_gap": gap}
    with torch.no_grad():
        logits = torch.cat([double.model(x) for x, _ in double.batches])
    labels = torch.cat([y for _, y in double.batches])
    truth["accuracy"] = float((logits.argmax(1) == labels).double().mean())
    truth["cross_entropy"] = float(functional.cross_entropy(logits, labels))
    return {"truth": truth, "num_parameters": size, "seconds": seconds}
