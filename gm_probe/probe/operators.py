"""The Fisher matrix and the loss Hessian as symmetric operators on flat parameter vectors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.func import jvp
from torch.nn import functional

from gm_probe.core.batches import Batches, cut
from gm_probe.core.parameters import Parameters
from gm_probe.probe.work import DOUBLE_BACKWARD, GRADIENT, JVP, NESTED_JVP, Work


@dataclass(frozen=True, slots=True)
class Operator:
    """A symmetric (P, P) matrix A = (1/N) Σ_x A_x, known by its products.

    Attributes:
        matvec: v (P,) ↦ A v (P,).
        terms: v (P,) ↦ (N,) values vᵀA_x v, whose mean is vᵀA v; cheaper than a product.
        size: P.
    """

    matvec: Callable[[Tensor], Tensor]
    terms: Callable[[Tensor], Tensor]
    size: int
    dtype: torch.dtype
    device: torch.device


def fisher(parameters: Parameters, batches: Batches, clean: Tensor, work: Work | None = None) -> Operator:
    """F = (1/N) Σ_x J_xᵀ (diag p − p pᵀ) J_x with J = ∂z/∂θ (paper Eq. 1, §3.3): the true Fisher, label-free.

    It equals the Gauss-Newton matrix of softmax cross-entropy.

    Args:
        clean: (N, C) logits at θ in the order of ``batches``.
    """
    work = work or Work(batches.num_examples)
    probabilities = cut(functional.softmax(clean, dim=-1), batches)

    def pushed(x: Tensor, v: Tensor) -> Tensor:  # J v, (B, C)
        with torch.no_grad():
            tangents = parameters.split(v)
            return jvp(lambda values: parameters.logits(x, values), (parameters.values(),), (tangents,))[1]

    def matvec(v: Tensor) -> Tensor:
        result = torch.zeros_like(v)
        for batch, p in zip(batches, probabilities, strict=True):
            direction = pushed(batch.x, v)
            cotangent = p * (direction - (p * direction).sum(-1, keepdim=True))
            with torch.enable_grad():
                values = {name: value.requires_grad_() for name, value in parameters.values().items()}
                logits = parameters.logits(batch.x, values)
                pulled = torch.autograd.grad(logits, list(values.values()), cotangent, allow_unused=True)
            result += parameters.join(pulled)
            work.add(JVP + GRADIENT, len(p))
        return result / batches.num_examples

    def terms(v: Tensor) -> Tensor:
        result = []
        for batch, p in zip(batches, probabilities, strict=True):
            direction = pushed(batch.x, v)
            centred = direction - (p * direction).sum(-1, keepdim=True)
            result.append((p * centred.square()).sum(-1))  # the variance of z-changes under p
            work.add(JVP, len(p))
        return torch.cat(result)

    return Operator(matvec, terms, parameters.size, parameters.dtype, parameters.device)


def hessian(parameters: Parameters, batches: Batches, labels: Tensor, work: Work | None = None) -> Operator:
    """H = ∇²_θ (1/N) Σ CE(z_θ(x), y) (paper §3.3, Lemma A.1), by exact differentiation.

    Args:
        labels: (N,) class indices, given or predicted, in the order of ``batches``.
    """
    work = work or Work(batches.num_examples)
    targets = cut(labels, batches)

    def matvec(v: Tensor) -> Tensor:
        result = torch.zeros_like(v)
        tangents = list(parameters.split(v).values())
        for batch, y in zip(batches, targets, strict=True):
            with torch.enable_grad():
                values = {name: value.requires_grad_() for name, value in parameters.values().items()}
                leaves = list(values.values())
                loss = functional.cross_entropy(parameters.logits(batch.x, values), y, reduction="sum")
                gradients = torch.autograd.grad(loss, leaves, create_graph=True, allow_unused=True)
                # a parameter that no logit uses has no gradient; one whose gradient is constant has no graph
                pairs = [
                    (g, t)
                    for g, t in zip(gradients, tangents, strict=True)
                    if g is not None and g.requires_grad
                ]
                along = torch.stack([(g * t).sum() for g, t in pairs]).sum()
                products = torch.autograd.grad(along, leaves, allow_unused=True)
            result += parameters.join(products)
            work.add(DOUBLE_BACKWARD, len(y))
        return result / batches.num_examples

    def terms(v: Tensor) -> Tensor:
        result = []
        tangents = parameters.split(v)
        for batch, y in zip(batches, targets, strict=True):
            x = batch.x

            def losses(values: dict[str, Tensor], x: Tensor = x, y: Tensor = y) -> Tensor:
                return functional.cross_entropy(parameters.logits(x, values), y, reduction="none")

            def slope(values: dict[str, Tensor], losses: Callable[..., Tensor] = losses) -> Tensor:
                return jvp(losses, (values,), (tangents,))[1]

            with torch.no_grad():  # d²/dt² of each example's loss along v, forward mode over forward mode
                result.append(jvp(slope, (parameters.values(),), (tangents,))[1])
            work.add(NESTED_JVP, len(y))
        return torch.cat(result)

    return Operator(matvec, terms, parameters.size, parameters.dtype, parameters.device)
