"""The Fisher matrix and the loss Hessian as symmetric operators on flat parameter vectors."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.func import grad, jvp
from torch.nn import functional

from gm_probe.core.batches import Batches, cut
from gm_probe.core.errors import UsageError, out_of_memory
from gm_probe.core.parameters import Parameters, differentiable_attention
from gm_probe.core.processes import gather_examples, sum_over_processes
from gm_probe.probe.speed import TRIAL, clearly_faster
from gm_probe.probe.work import (
    DOUBLE_BACKWARD,
    FORWARD_OVER_REVERSE,
    GRADIENT,
    JVP,
    NESTED_JVP,
    REVERSE_JVP,
    TRIPLE_BACKWARD,
    Work,
)

# the first jvp imports this module of torch's own, which warns of a deprecated call of its own (torch 2.14)
with warnings.catch_warnings(), contextlib.suppress(ImportError):
    warnings.simplefilter("ignore", FutureWarning)
    import torch._decomp.decompositions_for_jvp


@dataclass(frozen=True, slots=True)
class Operator:
    """A symmetric (P, P) matrix A = (1/N) Σ_x A_x, known by its products.

    Attributes:
        matvec: v (P,) ↦ A v (P,).
        terms: v (P,) ↦ (N,) values vᵀA_x v, whose mean is vᵀA v; of coupled examples (``Batches``) their batches'
            means.
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
        clean: (n, C) logits at θ in the order of ``batches``.

    Raises:
        UsageError: a part of the model is in train mode.
    """
    _require_eval(parameters)
    work = work or Work(batches.num_examples)
    probabilities = cut(functional.softmax(clean, dim=-1), batches)

    def pushed_forward(x: Tensor, v: Tensor) -> Tensor:
        with torch.no_grad():
            tangents = parameters.split(v)
            return jvp(lambda values: parameters.logits(x, values), (parameters.values(),), (tangents,))[1]

    def pushed_reverse(x: Tensor, v: Tensor) -> Tensor:
        """The slope by u of (Jᵀu)ᵀv."""
        with torch.enable_grad():
            values = {name: value.requires_grad_() for name, value in parameters.values().items()}
            logits = parameters.logits(x, values)
            u = torch.zeros_like(logits, requires_grad=True)
            slope = _along(_gradients(logits, values, u, create_graph=True), parameters.split(v), logits)
            [result] = _gradients(slope, {"": u})
            return torch.zeros_like(logits) if result is None else result

    has_forward: list[bool] = []  # whether the model has forward-mode derivatives, once that has been tried

    def pushed(x: Tensor, v: Tensor) -> Tensor:  # J v, (B, C)
        if not has_forward:
            try:
                pushed_forward(x[batches.few(TRIAL)], v)
                has_forward.append(True)
            except (
                NotImplementedError,
                RuntimeError,
            ) as error:  # an LSTM's in float32, a stranger's autograd.Function
                if out_of_memory(error):
                    raise
                has_forward.append(False)
        work.add(JVP if has_forward[0] else REVERSE_JVP, len(x))
        return (pushed_forward if has_forward[0] else pushed_reverse)(x, v)

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
            work.add(GRADIENT, len(p))
        return sum_over_processes(result) / batches.total

    @differentiable_attention()
    def terms(v: Tensor) -> Tensor:
        result = []
        for batch, p in zip(batches, probabilities, strict=True):
            direction = pushed(batch.x, v)
            centred = direction - (p * direction).sum(-1, keepdim=True)
            result.append((p * centred.square()).sum(-1))  # the variance under p of the logits' change
        return gather_examples(batches.independent(torch.cat(result)))

    return Operator(matvec, terms, parameters.size, parameters.dtype, parameters.device)


def hessian(parameters: Parameters, batches: Batches, labels: Tensor, work: Work | None = None) -> Operator:
    """H = ∇²_θ (1/N) Σ CE(z_θ(x), y) (paper §3.3, Lemma A.1), by exact differentiation.

    Args:
        labels: (n,) class indices, given or predicted, in the order of ``batches``.

    Raises:
        UsageError: a part of the model is in train mode.
    """

    def losses(logits: Tensor, y: Tensor) -> Tensor:  # (B,)
        return functional.cross_entropy(logits, y, reduction="none")

    return _curvature(parameters, batches, losses, labels, work)


def residual(
    parameters: Parameters, batches: Batches, clean: Tensor, labels: Tensor, work: Work | None = None
) -> Operator:
    """H − F = (1/N) Σ_x Σ_c (p_c − y_c) ∇²z_c (paper Lemma A.1), the part of H that depends on the labels.

    Args:
        clean: (n, C) logits at θ; ``labels``: (n,) class indices; both in the order of ``batches``.

    Raises:
        UsageError: a part of the model is in train mode.
    """
    slopes = functional.softmax(clean, dim=-1) - functional.one_hot(labels, clean.shape[1])

    def contracted(logits: Tensor, slope: Tensor) -> Tensor:  # (B,)
        return (logits * slope.to(logits.dtype)).sum(-1)

    return _curvature(parameters, batches, contracted, slopes, work)


def _curvature(
    parameters: Parameters,
    batches: Batches,
    scalars: Callable[[Tensor, Tensor], Tensor],
    data: Tensor,
    work: Work | None,
) -> Operator:
    """∇²_θ (1/N) Σ_x s(z_θ(x), d_x) for ``scalars`` s: logits (B, C), data (B, ...) ↦ (B,)."""
    _require_eval(parameters)
    work = work or Work(batches.num_examples)
    pieces = cut(data, batches)

    def values_of(values: dict[str, Tensor], x: Tensor, d: Tensor) -> Tensor:  # (B,)
        return scalars(parameters.logits(x, values), d)

    def reverse_product(v: Tensor, x: Tensor, d: Tensor) -> Tensor:
        """The gradient of a gradient's slope along v."""
        tangents = parameters.split(v)
        with torch.enable_grad():
            values = {name: value.requires_grad_() for name, value in parameters.values(v.dtype).items()}
            total = values_of(values, x, d).sum()
            slope = _along(_gradients(total, values, create_graph=True), tangents, total)
            return parameters.join(_gradients(slope, values))

    def forward_product(v: Tensor, x: Tensor, d: Tensor) -> Tensor:
        """The tangent of a gradient: less memory traffic than a second backward pass."""
        gradient = grad(lambda values: values_of(values, x, d).sum())
        tangent = jvp(gradient, (parameters.values(v.dtype),), (parameters.split(v),))[1]
        return parameters.join(tangent.values())

    def forward_terms(v: Tensor, x: Tensor, d: Tensor) -> Tensor:
        """d²/dt² of each example's scalar at θ + t·v by forward mode over forward mode."""
        tangents = parameters.split(v)

        def slope(values: dict[str, Tensor]) -> Tensor:
            return jvp(lambda inner: values_of(inner, x, d), (values,), (tangents,))[1]

        with torch.no_grad():
            return jvp(slope, (parameters.values(v.dtype),), (tangents,))[1]

    def reverse_terms(v: Tensor, x: Tensor, d: Tensor) -> Tensor:
        """The same by reverse mode alone: weights on the examples pull their terms out of one product."""
        tangents = parameters.split(v)
        with torch.enable_grad():
            values = {name: value.requires_grad_() for name, value in parameters.values(v.dtype).items()}
            each = values_of(values, x, d)
            weights = torch.ones_like(each, requires_grad=True)
            total = weights @ each
            slope = _along(_gradients(total, values, create_graph=True), tangents, total)
            curvature = _along(_gradients(slope, values, create_graph=True), tangents, total)
            [terms] = _gradients(curvature, {"": weights})
            return torch.zeros_like(each) if terms is None else terms

    trial = batches.few(TRIAL)
    in_float64 = partial(_few_in_float64, whole=batches.coupled)
    chosen: dict[str, bool] = {}  # whether forward mode serves this model best, once it has been tried

    def serves(kind: str, cheap: Way, reference: Way, v: Tensor, x: Tensor, d: Tensor) -> bool:
        if kind not in chosen:
            few = (v, x[trial], d[trial])
            chosen[kind] = _agree(cheap, reference, few, in_float64(v, x, d)) and not clearly_faster(
                lambda: reference(*few), lambda: cheap(*few), v.device
            )
        return chosen[kind]

    @differentiable_attention()
    def matvec(v: Tensor) -> Tensor:
        result = torch.zeros_like(v)
        for batch, d in zip(batches, pieces, strict=True):
            if "product" not in chosen:
                _require_symmetric(reverse_product, *in_float64(v, batch.x, d))
            forward = serves("product", forward_product, reverse_product, v, batch.x, d)
            result += (forward_product if forward else reverse_product)(v, batch.x, d)
            work.add(FORWARD_OVER_REVERSE if forward else DOUBLE_BACKWARD, len(d))
        return sum_over_processes(result) / batches.total

    @differentiable_attention()
    def terms(v: Tensor) -> Tensor:
        result = []
        for batch, d in zip(batches, pieces, strict=True):
            forward = serves("terms", forward_terms, reverse_terms, v, batch.x, d)
            result.append((forward_terms if forward else reverse_terms)(v, batch.x, d))
            work.add(NESTED_JVP if forward else TRIPLE_BACKWARD, len(d))
        return gather_examples(batches.independent(torch.cat(result)))

    return Operator(matvec, terms, parameters.size, parameters.dtype, parameters.device)


def _require_eval(parameters: Parameters) -> None:
    if any(module.training for module in parameters.model.modules()):
        raise UsageError("curvature is that of a fixed function; call model.eval() first")


Way = Callable[[Tensor, Tensor, Tensor], Tensor]
"""direction (P,), input (B, ...), data (B, ...) ↦ a product or the examples' terms"""


Arguments = tuple[Tensor, Tensor, Tensor]


def _agree(cheap: Way, sound: Way, few: Arguments, in_float64: Arguments) -> bool:
    """Whether the cheap way gives what the sound one does.

    Forward over forward is silently wrong through LayerNorm and absent for SiLU (pytorch#196700, #196699). Asked
    of 16 examples in float64: on confident ones the terms are so small that float32 rounds them apart. In the model's
    own dtype it must exist, too: an LSTM's kernel for float32 has no forward mode.
    """
    try:
        cheap(*few)
        first, second = cheap(*in_float64), sound(*in_float64)
    except (NotImplementedError, RuntimeError) as error:
        # no such derivative, or a layer that insists on its dtype
        if out_of_memory(error):
            raise
        return False
    return bool((first - second).norm() <= 1e-8 * second.norm())


def _require_symmetric(product: Way, v: Tensor, x: Tensor, d: Tensor) -> None:
    """Raise UsageError where uᵀH v is not vᵀH u: a layer states a wrong second derivative, as torch's weight_norm does.

    (Its double backward takes the norms for constants, torch 2.14.)
    """
    u = v.flip(0)
    try:
        one, other = product(v, x, d).double(), product(u, x, d).double()
    except RuntimeError as error:  # a layer that insists on its dtype
        if out_of_memory(error):
            raise
        return
    if float((u @ one - v @ other).abs()) > 1e-6 * float(v.norm() * (one.norm() + other.norm())):
        raise UsageError(
            "the Hessian's products are not symmetric: a layer's second derivative is wrong, as that of torch's "
            "weight_norm is; fold it into its weight by torch.nn.utils.parametrize.remove_parametrizations, or leave "
            "the Hessian's measures out by --measures"
        )


def _few_in_float64(v: Tensor, x: Tensor, d: Tensor, *, whole: bool) -> Arguments:
    """16 examples, or all of the batch where they hang together."""
    if not whole:
        spread = torch.linspace(0, len(d) - 1, min(16, len(d)), device=x.device).long()
        x, d = x[spread], d[spread]
    return v.double(), x.double() if x.is_floating_point() else x, d


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
