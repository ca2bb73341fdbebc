"""The Fisher matrix and the loss Hessian as symmetric operators on flat parameter vectors."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import jvp
from torch.nn import functional

from gm_probe.curvature.batch_norm import batch_norm
from gm_probe.curvature.derivatives import (
    TRIAL,
    Arguments,
    JacobianProduct,
    Product,
    agree,
    along,
    first_adjoint,
    gradients,
    require_terms,
)
from gm_probe.curvature.replacements import NESTABLE, Substituting
from gm_probe.curvature.second_derivatives import require_second_derivative
from gm_probe.data.batches import Batches, cut
from gm_probe.data.fields import Inputs, ordinary
from gm_probe.errors import UsageError
from gm_probe.inconsistency.kl import sum_over_labels
from gm_probe.linalg.operator import Operator
from gm_probe.linalg.work import (
    GRADIENT,
    HESSIAN_PRODUCT,
    JVP,
    NESTED_JVP,
    REVERSE_JVP,
    TRIPLE_BACKWARD,
    Work,
)
from gm_probe.models.parameters import Parameters, Values, differentiable_attention
from gm_probe.runtime.processes import gather_examples, sum_over_processes

# the first jvp imports this module of torch, which makes a deprecated call and warns of it (torch 2.14)
with warnings.catch_warnings(), contextlib.suppress(ImportError):
    warnings.simplefilter("ignore", FutureWarning)
    import torch._decomp.decompositions_for_jvp


WHOLE = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
"""The dtypes of class indices."""

Scalars = Callable[[Tensor, Tensor], Tensor]
"""logits (B, ..., C), data (B, ...) ↦ the (B,) scalars that are differentiated twice"""


def fisher(parameters: Parameters, batches: Batches, logits: Tensor, work: Work | None = None) -> Operator:
    """Return F = (1/N) Σ_x J_xᵀ (diag p − p pᵀ) J_x with J = ∂z/∂θ (paper Eq. 1, §3.3), the true Fisher matrix.

    It needs no labels, and equals the Gauss-Newton matrix of softmax cross-entropy.

    Args:
        logits: (n, C) logits at θ in the order of ``batches``, or (n, L, 2) of yes-or-no labels.

    Raises:
        UsageError: a part of the model is in train mode.
    """
    _require_eval(parameters)
    jacobian = _Jacobian(parameters, work or Work(batches.num_examples), batches.trial_slice(TRIAL))
    probabilities = functional.softmax(logits.to(parameters.device), dim=-1)
    return _operator(parameters, batches, probabilities, jacobian.fisher_product, jacobian.fisher_terms)


def _operator(
    parameters: Parameters, batches: Batches, data: Tensor, product: Product, terms: Product
) -> Operator:
    """Return the operator that is made of the products and terms of single batches.

    Args:
        data: (n, ...) what ``product`` and ``terms`` need of each example, besides the input.
    """
    batches = batches.on(parameters.device)
    pieces = cut(data.to(parameters.device), batches)

    @differentiable_attention()
    def matvec(v: Tensor) -> Tensor:
        result = torch.zeros_like(v)
        with parameters.one_pass():
            for batch, d in zip(batches, pieces, strict=True):
                result += product(v, batch.x, d)
        return sum_over_processes(result) / batches.total

    @differentiable_attention()
    def all_terms(v: Tensor) -> Tensor:
        with parameters.one_pass():
            result = [terms(v, batch.x, d) for batch, d in zip(batches, pieces, strict=True)]
        return gather_examples(batches.independent(torch.cat(result)))

    return Operator(matvec, all_terms, parameters.size, parameters.dtype, parameters.device)


class _Jacobian:
    """The products of J = ∂z/∂θ with vectors, and those of F that are made of them, batch by batch.

    Args:
        trial: the examples of a batch on which the ways to compute J v are tried.
    """

    def __init__(self, parameters: Parameters, work: Work, trial: slice) -> None:
        self.parameters, self.work, self.trial = parameters, work, trial
        self._jvp: JacobianProduct | None = None

    def fisher_product(self, v: Tensor, x: Inputs, p: Tensor) -> Tensor:
        """Return Σ_x F_x v (P,) for probabilities ``p`` (B, ..., C)."""
        return self.vjp(x, p * _centred(self.jvp(x, v), p))

    def fisher_terms(self, v: Tensor, x: Inputs, p: Tensor) -> Tensor:
        """Return (B,) vᵀF_x v, the variance under ``p`` (B, ..., C) of the change of the logits."""
        return sum_over_labels((p * _centred(self.jvp(x, v), p).square()).sum(-1))

    def jvp(self, x: Inputs, v: Tensor) -> Tensor:
        """Return J v (B, ..., C) for ``v`` (P,), by forward mode wherever the model has it."""
        if self._jvp is None:
            noise = self.parameters.random(1.0, torch.Generator().manual_seed(0))
            candidates = (self._by_forward_mode, self._by_reverse_mode)
            self._jvp = first_adjoint(candidates, self.vjp, x[self.trial], noise)
        return self._jvp(x, v)

    def vjp(self, x: Inputs, u: Tensor) -> Tensor:
        """Return Jᵀu (P,) for ``u`` (B, ..., C)."""
        with torch.enable_grad():
            theta = self.parameters.vector().requires_grad_()
            [result] = gradients(self.parameters.logits(x, theta), {"": theta}, u)
        self.work.add(GRADIENT, len(x))
        return torch.zeros_like(theta) if result is None else result

    def _by_forward_mode(self, x: Inputs, v: Tensor) -> Tensor:
        with torch.no_grad(), _forward_mode():
            logits = self.parameters.logits(x, forward_ad.make_dual(self.parameters.vector(), ordinary(v)))
            result = _tangent(logits)
        self.work.add(JVP, len(x))
        return result

    def _by_reverse_mode(self, x: Inputs, v: Tensor) -> Tensor:
        """Return J v as the derivative of (Jᵀu)ᵀv by u."""
        with torch.enable_grad():
            theta = self.parameters.vector().requires_grad_()
            logits = self.parameters.logits(x, theta)
            u = torch.zeros_like(logits, requires_grad=True)
            slope = along(gradients(logits, {"": theta}, u, create_graph=True), {"": v}, logits)
            [result] = gradients(slope, {"": u})
        self.work.add(REVERSE_JVP, len(x))
        return torch.zeros_like(logits) if result is None else result


@contextlib.contextmanager
def _forward_mode() -> Iterator[None]:
    """Open a level of forward mode that takes few kernels."""
    with forward_ad.dual_level(), Substituting({functional.batch_norm: batch_norm}):
        yield


def _tangent(dual: Tensor) -> Tensor:
    """Return the derivative that came with ``dual``, or zeros where nothing that it depends on has one."""
    found: Tensor | None = forward_ad.unpack_dual(dual).tangent
    return torch.zeros_like(dual).detach() if found is None else found.detach()


def _centred(values: Tensor, p: Tensor) -> Tensor:
    """Return ``values`` (B, ..., C) minus their mean under ``p`` (B, ..., C) over the last dimension.

    The value of the likeliest class is subtracted first. Where its p is nearly 1, the rest would be lost to rounding.
    """
    values = values - values.gather(-1, p.argmax(-1, keepdim=True))
    return values - (p * values).sum(-1, keepdim=True)


def hessian(parameters: Parameters, batches: Batches, labels: Tensor, work: Work | None = None) -> Operator:
    """Return H = ∇²_θ (1/N) Σ CE(z_θ(x), y) (paper §3.3, Lemma A.1), by exact differentiation.

    Args:
        labels: (n,) class indices, given or predicted, in the order of ``batches``; (n, L) for yes-or-no labels.

    Raises:
        UsageError: a part of the model is in train mode, or the labels are not class indices of these examples.
    """
    _require_labels(parameters, batches, labels)
    return _curvature(parameters, batches, _cross_entropy, labels.long(), work)


def _require_labels(parameters: Parameters, batches: Batches, labels: Tensor) -> None:
    """Raise UsageError unless ``labels`` are class indices of the model, (n,) or (n, L)."""
    with torch.no_grad():
        x = next(iter(batches.on(parameters.device))).x
        *each, classes = parameters.logits(x[batches.trial_slice(1)]).shape[1:]
    shape = (batches.num_examples, *each)
    if not isinstance(labels, Tensor) or labels.shape != shape or labels.dtype not in WHOLE:
        found = f"{labels.dtype} {tuple(labels.shape)}" if isinstance(labels, Tensor) else repr(labels)
        raise UsageError(f"labels are {found}. Give class indices: a tensor {shape} of whole numbers")
    least, most = (int(value) for value in labels.aminmax())
    if least < 0 or most >= classes:
        raise UsageError(
            f"labels range from {least} to {most}, but the model has the classes 0 to {classes - 1}"
        )


def _cross_entropy(logits: Tensor, y: Tensor) -> Tensor:
    """Return (B,) cross-entropies of logits (B, ..., C) and labels (B, ...), summed over an example's labels.

    The likeliest class's logit is subtracted from the others, so that 1 − p never comes from a p that rounds to 1. So
    derivatives keep their digits where one class has nearly all the probability.
    """
    likeliest = logits.argmax(-1, keepdim=True)
    highest = logits.gather(-1, likeliest)
    others = logits.gather(-1, _all_but(likeliest, logits.shape[-1]))
    each = (highest - logits.gather(-1, y[..., None]))[..., 0] + (others - highest).exp().sum(-1).log1p()
    return sum_over_labels(each)


def _all_but(classes: Tensor, count: int) -> Tensor:
    """Return (B, ..., C − 1) the class indices other than each of ``classes`` (B, ..., 1)."""
    places = torch.arange(count - 1, device=classes.device)
    return places + (places >= classes).long()


def residual(
    parameters: Parameters, batches: Batches, logits: Tensor, labels: Tensor, work: Work | None = None
) -> Operator:
    """Return H − F = (1/N) Σ_x Σ_c (p_c − y_c) ∇²z_c (paper Lemma A.1), the part of H that depends on the labels.

    Args:
        logits, labels: (n, C) and (n,), or (n, L, 2) and (n, L), at θ and in the order of ``batches``.

    Raises:
        UsageError: a part of the model is in train mode.
    """
    labels = labels.to(logits.device)
    slopes = functional.softmax(logits.double(), dim=-1)
    # p − 1 of the label is minus the sum of the others; where p is nearly 1, the difference would be rounding alone
    rest = slopes.gather(-1, _all_but(labels[..., None], logits.shape[-1])).sum(-1, keepdim=True)
    slopes = slopes.scatter(-1, labels[..., None], -rest)

    def contracted(z: Tensor, slope: Tensor) -> Tensor:  # (B,)
        return sum_over_labels((z * slope.to(z.dtype)).sum(-1))

    return _curvature(parameters, batches, contracted, slopes, work)


def _curvature(
    parameters: Parameters, batches: Batches, scalars: Scalars, data: Tensor, work: Work | None
) -> Operator:
    """Return ∇²_θ (1/N) Σ_x s(z_θ(x), d_x) for ``scalars`` s and ``data`` (N, ...) d."""
    _require_eval(parameters)
    curvature = _Curvature(parameters, scalars, work or Work(batches.num_examples), batches)
    return _operator(parameters, batches, data, curvature.product, curvature.terms)


class _Curvature:
    """∇²_θ Σ_x s(z_θ(x), d_x) over one batch at a time: its product with v, and vᵀ∇²s_x v of each example.

    Both use forward mode where the model has it and it agrees with reverse mode on a few examples. On convolutional
    networks a product is then up to a quarter faster, and the terms take a half to a third of the time.
    """

    def __init__(self, parameters: Parameters, scalars: Scalars, work: Work, batches: Batches) -> None:
        self.parameters, self.scalars, self.work = parameters, scalars, work
        self._trial, self._batch_dependent = batches.trial_slice(TRIAL), batches.batch_dependent
        self._checked = False
        self._product: Product | None = None
        self._terms: Product | None = None

    def product(self, v: Tensor, x: Inputs, d: Tensor) -> Tensor:
        """Return the product (P,) with ``v`` (P,) over a batch ``x`` (B, ...) with its data ``d`` (B, ...)."""
        if self._product is None:
            few, in_float64 = self._tried(v, x, d)
            forward = agree(self._forward_product, self._reverse_product, few, in_float64)
            self._product = self._forward_product if forward else self._reverse_product
        return self._product(v, x, d)

    def terms(self, v: Tensor, x: Inputs, d: Tensor) -> Tensor:
        """Return the (B,) quadratic forms vᵀ∇²s_x v."""
        if self._terms is None:
            few, in_float64 = self._tried(v, x, d)
            require_terms(self._reverse_terms, self._reverse_product, in_float64)
            forward = agree(self._forward_terms, self._reverse_terms, few, in_float64)
            self._terms = self._forward_terms if forward else self._reverse_terms
        return self._terms(v, x, d)

    def _tried(self, v: Tensor, x: Inputs, d: Tensor) -> tuple[Arguments, Arguments]:
        """Return a few examples in the model's own dtype and in float64, after second derivatives are checked."""
        few = v, x[self._trial], d[self._trial]
        in_float64 = _few_in_float64(v, x, d, whole=self._batch_dependent)
        if not self._checked:
            require_second_derivative(self.parameters, self._sum, self._reverse_product, few, in_float64)
            self._checked = True
        return few, in_float64

    def _each(self, values: Values, x: Inputs, d: Tensor) -> Tensor:
        """Return (B,) scalars at the parameter ``values``."""
        return self.scalars(self.parameters.logits(x, values), d)

    def _sum(self, values: Values, x: Inputs, d: Tensor) -> Tensor:
        return self._each(values, x, d).sum()

    def _reverse_product(self, v: Tensor, x: Inputs, d: Tensor) -> Tensor:
        """Return the gradient of a gradient's slope along v."""
        with torch.enable_grad():
            theta = self.parameters.vector(v.dtype).requires_grad_()
            total = self._sum(theta, x, d)
            slope = along(gradients(total, {"": theta}, create_graph=True), {"": v}, total)
            [result] = gradients(slope, {"": theta})
        self.work.add(HESSIAN_PRODUCT, len(d))
        return torch.zeros_like(v) if result is None else result

    def _forward_product(self, v: Tensor, x: Inputs, d: Tensor) -> Tensor:
        """Return the tangent of a gradient."""
        with torch.enable_grad(), _forward_mode():
            theta = forward_ad.make_dual(self.parameters.vector(v.dtype).requires_grad_(), ordinary(v))
            [gradient] = gradients(self._sum(theta, x, d), {"": theta})
            result = torch.zeros_like(v) if gradient is None else _tangent(gradient)
        self.work.add(HESSIAN_PRODUCT, len(d))
        return result

    def _forward_terms(self, v: Tensor, x: Inputs, d: Tensor) -> Tensor:
        """Return d²/dt² of each example's scalar at θ + t·v, by forward mode over forward mode."""
        theta = self.parameters.vector(v.dtype)

        def slope(theta: Tensor) -> Tensor:
            return jvp(lambda inner: self._each(inner, x, d), (theta,), (v,))[1]

        # torch's SiLU and Mish have no jvp of a jvp without autograd; values without gradients make no graph
        with torch.enable_grad(), Substituting(NESTABLE):
            result = jvp(slope, (theta,), (v,))[1]
        self.work.add(NESTED_JVP, len(d))
        return result

    def _reverse_terms(self, v: Tensor, x: Inputs, d: Tensor) -> Tensor:
        """Return the same by reverse mode alone, as derivatives of one product by weights on the examples."""
        with torch.enable_grad():
            theta = self.parameters.vector(v.dtype).requires_grad_()
            each = self._each(theta, x, d)
            weights = torch.ones_like(each, requires_grad=True)
            total = weights @ each
            slope = along(gradients(total, {"": theta}, create_graph=True), {"": v}, total)
            curvature = along(gradients(slope, {"": theta}, create_graph=True), {"": v}, total)
            [terms] = gradients(curvature, {"": weights})
        self.work.add(TRIPLE_BACKWARD, len(d))
        return torch.zeros_like(each) if terms is None else terms


def _require_eval(parameters: Parameters) -> None:
    if any(module.training for module in parameters.model.modules()):
        raise UsageError(
            "the model is in train mode, and curvature needs a fixed function. Call model.eval() first"
        )


def _few_in_float64(v: Tensor, x: Inputs, d: Tensor, *, whole: bool) -> Arguments:
    """Return ``TRIAL`` examples spread over the batch, or the whole batch where they depend on each other."""
    if not whole:
        spread = torch.linspace(0, len(d) - 1, min(TRIAL, len(d)), device=x.device).long()
        x, d = x[spread], d[spread]
    return v.double(), x.double() if x.is_floating_point() else x, d
