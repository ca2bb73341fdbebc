"""The Fisher matrix and the loss Hessian as symmetric operators on flat parameter vectors."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.func import jvp
from torch.nn import functional

from gm_probe.core.batches import Batches, cut
from gm_probe.core.errors import UsageError
from gm_probe.core.parameters import Parameters, differentiable_attention
from gm_probe.probe.work import DOUBLE_BACKWARD, GRADIENT, JVP, NESTED_JVP, TRIPLE_BACKWARD, Work

# the first jvp imports this module of torch's own, which warns of a deprecated call of its own (torch 2.14)
with warnings.catch_warnings(), contextlib.suppress(ImportError):
    warnings.simplefilter("ignore", FutureWarning)
    import torch._decomp.decompositions_for_jvp


@dataclass(frozen=True, slots=True)
class Operator:
    """A symmetric (P, P) matrix A = (1/N) Σ_x A_x, known by its products.

    Attributes:
        matvec: v (P,) ↦ A v (P,).
        terms: v (P,) ↦ (N,) values vᵀA_x v, whose mean is vᵀA v.
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

    Raises:
        UsageError: a part of the model is in train mode.
    """
    _require_eval(parameters)
    work = work or Work(batches.num_examples)
    probabilities = cut(functional.softmax(clean, dim=-1), batches)

    def pushed(x: Tensor, v: Tensor) -> Tensor:  # J v, (B, C)
        with torch.no_grad():
            tangents = parameters.split(v)
            return jvp(lambda values: parameters.logits(x, values), (parameters.values(),), (tangents,))[1]

    @differentiable_attention()
    def matvec(v: Tensor) -> Tensor:
        result = torch.zeros_like(v)
        for batch, p in zip(batches, probabilities, strict=True):
            direction = pushed(batch.x, v)
            cotangent = p * (direction - (p * direction).sum(-1, keepdim=True))
            with torch.enable_grad():
                values = {name: value.requires_grad_() for name, value in parameters.values().items()}
                logits = parameters.logits(batch.x, values)
                result += parameters.join(_gradients(logits, values, cotangent))
            work.add(JVP + GRADIENT, len(p))
        return result / batches.num_examples

    @differentiable_attention()
    def terms(v: Tensor) -> Tensor:
        result = []
        for batch, p in zip(batches, probabilities, strict=True):
            direction = pushed(batch.x, v)
            centred = direction - (p * direction).sum(-1, keepdim=True)
            result.append((p * centred.square()).sum(-1))  # the variance under p of the logits' change
            work.add(JVP, len(p))
        return torch.cat(result)

    return Operator(matvec, terms, parameters.size, parameters.dtype, parameters.device)


def hessian(parameters: Parameters, batches: Batches, labels: Tensor, work: Work | None = None) -> Operator:
    """H = ∇²_θ (1/N) Σ CE(z_θ(x), y) (paper §3.3, Lemma A.1), by exact differentiation.

    Args:
        labels: (N,) class indices, given or predicted, in the order of ``batches``.

    Raises:
        UsageError: a part of the model is in train mode.
    """
    _require_eval(parameters)
    work = work or Work(batches.num_examples)
    targets = cut(labels, batches)

    def losses(values: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:  # (B,)
        return functional.cross_entropy(parameters.logits(x, values), y, reduction="none")

    @differentiable_attention()
    def matvec(v: Tensor) -> Tensor:
        result = torch.zeros_like(v)
        tangents = parameters.split(v)
        for batch, y in zip(batches, targets, strict=True):
            with torch.enable_grad():
                values = {name: value.requires_grad_() for name, value in parameters.values().items()}
                total = losses(values, batch.x, y).sum()
                slope = _along(_gradients(total, values, create_graph=True), tangents, total)
                result += parameters.join(_gradients(slope, values))
            work.add(DOUBLE_BACKWARD, len(y))
        return result / batches.num_examples

    def forward_terms(v: Tensor, x: Tensor, y: Tensor) -> Tensor:
        """d²/dt² of each example's loss at θ + t·v by forward mode over forward mode."""
        tangents = parameters.split(v)

        def slope(values: dict[str, Tensor]) -> Tensor:
            return jvp(lambda inner: losses(inner, x, y), (values,), (tangents,))[1]

        with torch.no_grad():
            return jvp(slope, (parameters.values(v.dtype),), (tangents,))[1]

    def reverse_terms(v: Tensor, x: Tensor, y: Tensor) -> Tensor:
        """The same by reverse mode alone: weights on the examples pull their terms out of one product."""
        tangents = parameters.split(v)
        with torch.enable_grad():
            values = {name: value.requires_grad_() for name, value in parameters.values(v.dtype).items()}
            each = losses(values, x, y)
            weights = torch.ones_like(each, requires_grad=True)
            total = weights @ each
            slope = _along(_gradients(total, values, create_graph=True), tangents, total)
            curvature = _along(_gradients(slope, values, create_graph=True), tangents, total)
            [terms] = _gradients(curvature, {"": weights})
            return torch.zeros_like(each) if terms is None else terms

    trusted: list[bool] = []  # whether forward over forward holds on this model, once it has been tried

    @differentiable_attention()
    def terms(v: Tensor) -> Tensor:
        result = []
        for batch, y in zip(batches, targets, strict=True):
            if not trusted:
                trusted.append(_agree(forward_terms, reverse_terms, v, batch.x, y))
            result.append((forward_terms if trusted[0] else reverse_terms)(v, batch.x, y))
            work.add(NESTED_JVP if trusted[0] else TRIPLE_BACKWARD, len(y))
        return torch.cat(result)

    return Operator(matvec, terms, parameters.size, parameters.dtype, parameters.device)


def _require_eval(parameters: Parameters) -> None:
    if any(module.training for module in parameters.model.modules()):
        raise UsageError("curvature is that of a fixed function; call model.eval() first")


Terms = Callable[[Tensor, Tensor, Tensor], Tensor]


def _agree(cheap: Terms, sound: Terms, v: Tensor, x: Tensor, y: Tensor) -> bool:
    """Whether the cheap way gives what the sound one does.

    Forward over forward is silently wrong through LayerNorm and absent for SiLU (pytorch#196700, #196699). Asked
    of 16 examples in float64: on confident ones the terms are so small that float32 rounds them apart.
    """
    spread = torch.linspace(0, len(y) - 1, min(16, len(y)), device=x.device).long()
    x, y, v = x[spread], y[spread], v.double()
    x = x.double() if x.is_floating_point() else x
    try:
        first, second = cheap(v, x, y), sound(v, x, y)
    except (NotImplementedError, RuntimeError):  # no such derivative, or a layer that insists on its dtype
        return False
    return bool((first - second).norm() <= 1e-8 * second.norm())


def _gradients(
    output: Tensor,
    inputs: dict[str, Tensor],
    cotangent: Tensor | None = None,
    create_graph: bool = False,
) -> tuple[Tensor | None, ...]:
    """autograd.grad; None for what ``output`` does not depend on, be it all of them."""
    if not output.requires_grad:
        return (None,) * len(inputs)
    return torch.autograd.grad(
        output, list(inputs.values()), cotangent, create_graph=create_graph, allow_unused=True
    )


def _along(gradients: tuple[Tensor | None, ...], tangents: dict[str, Tensor], like: Tensor) -> Tensor:
    """Σ g·v over the parameters that have a gradient, as a 0-dim tensor."""
    parts = [(g * t).sum() for g, t in zip(gradients, tangents.values(), strict=True) if g is not None]
    return torch.stack(parts).sum() if parts else like.new_zeros(())
