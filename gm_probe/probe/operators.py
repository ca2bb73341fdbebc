"""The Fisher matrix and the loss Hessian as symmetric operators on flat parameter vectors."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.func import grad, jvp
from torch.nn import functional

from gm_probe.core.batches import Batches, cut
from gm_probe.core.errors import UsageError, of_machine
from gm_probe.core.parameters import Parameters, differentiable_attention
from gm_probe.core.processes import gather_examples, sum_over_processes
from gm_probe.probe.derivatives import (
    Arguments,
    Push,
    Way,
    agree,
    along,
    first_adjoint,
    gradients,
    require_terms,
)
from gm_probe.probe.kl import over_rows
from gm_probe.probe.nestable import Nestable
from gm_probe.probe.second_derivatives import require_second_derivative
from gm_probe.probe.speed import TRIAL, clearly_faster
from gm_probe.probe.tapes import Tape, Tapes
from gm_probe.probe.work import (
    FORWARD_OVER_REVERSE,
    GRADIENT,
    JVP,
    NESTED_JVP,
    REVERSE_JVP,
    THROUGH_GRADIENT,
    TRIPLE_BACKWARD,
    Work,
)

# the first jvp imports this module of torch's own, which warns of a deprecated call of its own (torch 2.14)
with warnings.catch_warnings(), contextlib.suppress(ImportError):
    warnings.simplefilter("ignore", FutureWarning)
    import torch._decomp.decompositions_for_jvp


WHOLE = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
"""The dtypes of class indices."""


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
        clean: (n, C) logits at θ in the order of ``batches``, or (n, L, 2) of yes-or-no labels.

    Raises:
        UsageError: a part of the model is in train mode.
    """
    _require_eval(parameters)
    batches = batches.on(parameters.device)
    work = work or Work(batches.num_examples)
    probabilities = cut(functional.softmax(clean.to(parameters.device), dim=-1), batches)

    def pushed_forward(x: Tensor, v: Tensor) -> Tensor:
        with torch.no_grad():
            tangents = parameters.split(v)
            result = jvp(lambda values: parameters.logits(x, values), (parameters.values(),), (tangents,))[1]
        work.add(JVP, len(x))
        return result

    def pushed_reverse(x: Tensor, v: Tensor) -> Tensor:
        """The slope by u of (Jᵀu)ᵀv."""
        with torch.enable_grad():
            values = parameters.leaves()
            logits = parameters.logits(x, values)
            u = torch.zeros_like(logits, requires_grad=True)
            slope = along(gradients(logits, values, u, create_graph=True), parameters.split(v), logits)
            [result] = gradients(slope, {"": u})
        work.add(REVERSE_JVP, len(x))
        return torch.zeros_like(logits) if result is None else result

    def pulled(x: Tensor, u: Tensor) -> Tensor:  # Jᵀu, (P,)
        with torch.enable_grad():
            values = parameters.leaves()
            result = parameters.join(gradients(parameters.logits(x, values), values, u))
        work.add(GRADIENT, len(x))
        return result

    chosen: list[Push] = []  # once it has been tried

    def pushed(x: Tensor, v: Tensor) -> Tensor:  # J v, (B, ..., C)
        if not chosen:
            noise = parameters.random(1.0, torch.Generator().manual_seed(0))
            ways = (pushed_forward, pushed_reverse)
            chosen.append(first_adjoint(ways, pulled, x[batches.few(TRIAL)], noise))
        return chosen[0](x, v)

    @differentiable_attention()
    def matvec(v: Tensor) -> Tensor:
        result = torch.zeros_like(v)
        for batch, p in zip(batches, probabilities, strict=True):
            result += pulled(batch.x, p * _centred(pushed(batch.x, v), p))
        return sum_over_processes(result) / batches.total

    @differentiable_attention()
    def terms(v: Tensor) -> Tensor:
        result = []
        for batch, p in zip(batches, probabilities, strict=True):
            # the variance under p of the logits' change
            result.append(over_rows((p * _centred(pushed(batch.x, v), p).square()).sum(-1)))
        return gather_examples(batches.independent(torch.cat(result)))

    return Operator(matvec, terms, parameters.size, parameters.dtype, parameters.device)


def _centred(values: Tensor, p: Tensor) -> Tensor:
    """``values`` (B, ..., C) less their mean under ``p`` (B, ..., C) over the last dimension.

    The likeliest class is taken for the origin first: where p is nearly 1 there, all else would be lost to rounding.
    """
    values = values - values.gather(-1, p.argmax(-1, keepdim=True))
    return values - (p * values).sum(-1, keepdim=True)


def hessian(
    parameters: Parameters, batches: Batches, labels: Tensor, work: Work | None = None, memory: float = 0.0
) -> Operator:
    """H = ∇²_θ (1/N) Σ CE(z_θ(x), y) (paper §3.3, Lemma A.1), by exact differentiation.

    Args:
        labels: (n,) class indices, given or predicted, in the order of ``batches``; (n, L) of yes-or-no labels.
        memory: bytes that may be kept from one product to the next.

    Raises:
        UsageError: a part of the model is in train mode, or the labels are no class indices of these examples.
    """
    _require_labels(parameters, batches, labels)
    return _curvature(parameters, batches, _cross_entropy, labels.long(), work, memory)


def _require_labels(parameters: Parameters, batches: Batches, labels: Tensor) -> None:
    """Raise UsageError unless ``labels`` are class indices of the model, (n,) or (n, L)."""
    with torch.no_grad():
        x = next(iter(batches.on(parameters.device))).x
        *each, classes = parameters.logits(x[batches.few(1)]).shape[1:]
    shape = (batches.num_examples, *each)
    if not isinstance(labels, Tensor) or labels.shape != shape or labels.dtype not in WHOLE:
        found = f"{labels.dtype} {tuple(labels.shape)}" if isinstance(labels, Tensor) else repr(labels)
        raise UsageError(f"labels are {found}; give class indices, a tensor {shape} of whole numbers")
    least, most = (int(value) for value in labels.aminmax())
    if least < 0 or most >= classes:
        raise UsageError(
            f"labels go from {least} to {most}, but the model has the classes 0 to {classes - 1}"
        )


def _cross_entropy(logits: Tensor, y: Tensor) -> Tensor:
    """Return (B,) cross-entropies of logits (B, ..., C) and labels (B, ...), summed over an example's labels.

    Their derivatives keep their digits where one class has all but all.

    The likeliest class's logit is taken off the others': 1 − p is then never taken of a p that rounds to 1.
    """
    likeliest = logits.argmax(-1, keepdim=True)
    highest = logits.gather(-1, likeliest)
    others = logits.gather(-1, _all_but(likeliest, logits.shape[-1]))
    each = (highest - logits.gather(-1, y[..., None]))[..., 0] + (others - highest).exp().sum(-1).log1p()
    return over_rows(each)


def _all_but(classes: Tensor, count: int) -> Tensor:
    """(B, ..., C − 1) the class indices other than each of ``classes`` (B, ..., 1)."""
    places = torch.arange(count - 1, device=classes.device)
    return places + (places >= classes).long()


def residual(
    parameters: Parameters, batches: Batches, clean: Tensor, labels: Tensor, work: Work | None = None
) -> Operator:
    """H − F = (1/N) Σ_x Σ_c (p_c − y_c) ∇²z_c (paper Lemma A.1), the part of H that depends on the labels.

    Args:
        clean: (n, C) or (n, L, 2) logits at θ; ``labels``: (n,) or (n, L); both in the order of ``batches``.

    Raises:
        UsageError: a part of the model is in train mode.
    """
    labels = labels.to(clean.device)
    slopes = functional.softmax(clean.double(), dim=-1)
    # p − 1 of the label as what the others have: where p is nearly 1, the difference would be rounding alone
    rest = slopes.gather(-1, _all_but(labels[..., None], clean.shape[-1])).sum(-1, keepdim=True)
    slopes = slopes.scatter(-1, labels[..., None], -rest)

    def contracted(logits: Tensor, slope: Tensor) -> Tensor:  # (B,)
        return over_rows((logits * slope.to(logits.dtype)).sum(-1))

    return _curvature(parameters, batches, contracted, slopes, work)


def _curvature(
    parameters: Parameters,
    batches: Batches,
    scalars: Callable[[Tensor, Tensor], Tensor],
    data: Tensor,
    work: Work | None,
    memory: float = 0.0,
) -> Operator:
    """∇²_θ (1/N) Σ_x s(z_θ(x), d_x) for ``scalars`` s: logits (B, ..., C), data (B, ...) ↦ (B,)."""
    _require_eval(parameters)
    batches = batches.on(parameters.device)
    work = work or Work(batches.num_examples)
    pieces = cut(data.to(parameters.device), batches)

    def values_of(values: dict[str, Tensor], x: Tensor, d: Tensor) -> Tensor:  # (B,)
        return scalars(parameters.logits(x, values), d)

    def summed(values: dict[str, Tensor], x: Tensor, d: Tensor) -> Tensor:
        return values_of(values, x, d).sum()

    def recorded(dtype: torch.dtype, x: Tensor, d: Tensor) -> Tape:
        tape = Tape.record(lambda values: summed(values, x, d), parameters.leaves(dtype))
        work.add(GRADIENT, len(d))
        return tape

    def played(tape: Tape, v: Tensor, d: Tensor, *, keep: bool) -> Tensor:
        work.add(THROUGH_GRADIENT, len(d))
        return parameters.join(tape.play(parameters.split(v), keep=keep))

    def reverse_product(v: Tensor, x: Tensor, d: Tensor) -> Tensor:
        """The gradient of a gradient's slope along v."""
        return played(recorded(v.dtype, x, d), v, d, keep=False)

    def forward_product(v: Tensor, x: Tensor, d: Tensor) -> Tensor:
        """The tangent of a gradient: less memory traffic than a second backward pass."""
        gradient = grad(lambda values: summed(values, x, d))
        tangent = jvp(gradient, (parameters.values(v.dtype),), (parameters.split(v),))[1]
        work.add(FORWARD_OVER_REVERSE, len(d))
        return parameters.join(tangent.values())

    def forward_terms(v: Tensor, x: Tensor, d: Tensor) -> Tensor:
        """d²/dt² of each example's scalar at θ + t·v by forward mode over forward mode."""
        tangents = parameters.split(v)

        def slope(values: dict[str, Tensor]) -> Tensor:
            return jvp(lambda inner: values_of(inner, x, d), (values,), (tangents,))[1]

        # torch's SiLU and Mish have no jvp of a jvp without autograd; of values without gradients there is no graph
        with torch.enable_grad(), Nestable():
            result = jvp(slope, (parameters.values(v.dtype),), (tangents,))[1]
        work.add(NESTED_JVP, len(d))
        return result

    def reverse_terms(v: Tensor, x: Tensor, d: Tensor) -> Tensor:
        """The same by reverse mode alone: weights on the examples pull their terms out of one product."""
        tangents = parameters.split(v)
        with torch.enable_grad():
            values = parameters.leaves(v.dtype)
            each = values_of(values, x, d)
            weights = torch.ones_like(each, requires_grad=True)
            total = weights @ each
            slope = along(gradients(total, values, create_graph=True), tangents, total)
            curvature = along(gradients(slope, values, create_graph=True), tangents, total)
            [terms] = gradients(curvature, {"": weights})
        work.add(TRIPLE_BACKWARD, len(d))
        return torch.zeros_like(each) if terms is None else terms

    trial = batches.few(TRIAL)
    chosen: dict[Way, Way] = {}  # by the reference, what serves this model best, once it has been tried

    def best(cheap: Way, reference: Way, v: Tensor, x: Tensor, d: Tensor) -> Way:
        if reference not in chosen:
            few = (v, x[trial], d[trial])
            in_float64 = _few_in_float64(v, x, d, whole=batches.coupled)
            if not chosen:
                require_second_derivative(parameters, summed, reverse_product, few, in_float64)
            if reference is reverse_terms:
                require_terms(reverse_terms, reverse_product, in_float64)
            trusted = agree(cheap, reference, few, in_float64)
            slower = trusted and clearly_faster(lambda: reference(*few), lambda: cheap(*few), v.device)
            chosen[reference] = cheap if trusted and not slower else reference
        return chosen[reference]

    def plays_again(v: Tensor, x: Tensor, d: Tensor) -> bool:
        """Whether a tape's second product is a fresh one's."""
        tape, fresh = recorded(v.dtype, x, d), reverse_product(v, x, d)
        try:
            played(tape, v.flip(0), d, keep=True)
            return bool((played(tape, v, d, keep=True) - fresh).norm() <= 1e-3 * fresh.norm())
        except Exception as error:  # a stranger's layer that lets go of its tensors, or writes to them
            if of_machine(error):
                raise
            return False

    kept: list[Tapes] = []  # one, once it is known whether tapes can be trusted

    def product(index: int, v: Tensor, x: Tensor, d: Tensor) -> Tensor:
        way = best(forward_product, reverse_product, v, x, d)
        if not kept:
            kept.append(Tapes(memory if memory and plays_again(v, x[trial], d[trial]) else 0.0, v.device))
        return kept[0].product(
            index,
            len(d),
            record=lambda: recorded(v.dtype, x, d),
            play=lambda tape: played(tape, v, d, keep=True),
            usual=lambda: way(v, x, d),
        )

    @differentiable_attention()
    def matvec(v: Tensor) -> Tensor:
        result = torch.zeros_like(v)
        for index, (batch, d) in enumerate(zip(batches, pieces, strict=True)):
            result += product(index, v, batch.x, d)
        return sum_over_processes(result) / batches.total

    @differentiable_attention()
    def terms(v: Tensor) -> Tensor:
        for tapes in kept:  # the vector that they were kept for is found, and its terms take memory, too
            tapes.clear()
        result = []
        for batch, d in zip(batches, pieces, strict=True):
            result.append(best(forward_terms, reverse_terms, v, batch.x, d)(v, batch.x, d))
        return gather_examples(batches.independent(torch.cat(result)))

    return Operator(matvec, terms, parameters.size, parameters.dtype, parameters.device)


def _require_eval(parameters: Parameters) -> None:
    if any(module.training for module in parameters.model.modules()):
        raise UsageError("curvature is that of a fixed function; call model.eval() first")


def _few_in_float64(v: Tensor, x: Tensor, d: Tensor, *, whole: bool) -> Arguments:
    """16 examples, or all of the batch where they hang together."""
    if not whole:
        spread = torch.linspace(0, len(d) - 1, min(16, len(d)), device=x.device).long()
        x, d = x[spread], d[spread]
    return v.double(), x.double() if x.is_floating_point() else x, d
