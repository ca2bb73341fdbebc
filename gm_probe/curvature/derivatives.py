"""Whether a model's derivatives exist and are right, tried on a few examples, because layers may misstate them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from gm_probe.data.fields import Inputs
from gm_probe.errors import DerivativeError, UsageError, first_line, foreign_or, of_machine
from gm_probe.models.door import alike
from gm_probe.models.parameters import Parameters

JacobianProduct = Callable[[Inputs, Tensor], Tensor]
"""input (B, ...), direction v (P,) ↦ J v (B, ..., C); or input, cotangent u (B, ..., C) ↦ Jᵀu (P,)"""
Product = Callable[[Tensor, Inputs, Tensor], Tensor]
"""direction (P,), input (B, ...), data (B, ...) ↦ a product (P,) or the examples' terms (B,)"""
Arguments = tuple[Tensor, Inputs, Tensor]

TRIAL = 16
"""Number of examples on which a model's derivatives are tried."""
REMEDY = "replace that layer, or choose measures without it by --measures"


@contextmanager
def differentiable() -> Iterator[None]:
    """Raise UsageError where the model's own code fails in a first derivative."""

    def told(cause: str) -> UsageError:
        return UsageError(
            f"the model cannot be differentiated with respect to its parameters ({cause}); {REMEDY}"
        )

    with foreign_or(told):
        yield


@contextmanager
def refusals_noted() -> Iterator[list[Exception]]:
    """End the block where a model's layers raise, and append what they raise to the yielded list.

    Errors of the machine, such as a lack of memory, are passed on.
    """
    found: list[Exception] = []
    try:
        yield found
    except Exception as error:  # layers may raise anything
        if of_machine(error):
            raise
        found.append(error)


class _Dtypes(TorchDispatchMode):
    """Notes the floating-point types of the results of all operations that run meanwhile."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[torch.dtype] = set()

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        self.seen.update(
            leaf.dtype
            for leaf in tree_leaves(result)
            if isinstance(leaf, Tensor) and leaf.is_floating_point()
        )
        return result


def require_full_precision(parameters: Parameters, x: Inputs) -> None:
    """Raise UsageError where the forward pass of ``x`` (B, ...) rounds inside to half precision, as autocast does."""
    with torch.no_grad(), _Dtypes() as noted:
        parameters.taken(x)
    for dtype in (torch.bfloat16, torch.float16):
        if dtype in noted.seen:
            raise UsageError(
                f"the model computes in {dtype} inside, which rounds small moves of its weights away. Let its forward "
                "pass run without torch.autocast"
            )


def require_gradients(parameters: Parameters, x: Tensor, generator: torch.Generator) -> None:
    """Raise UsageError unless the logits of ``x`` (B, ...) have gradients by all parameters that they depend on.

    A layer's backward pass may raise. A forward pass under ``torch.no_grad`` or through NumPy hides parameters from
    autograd, so they would silently count as constants.
    """
    with differentiable(), torch.enable_grad():
        values = parameters.leaves()
        logits = parameters.logits(x, values)
        found = gradients(logits, values, torch.ones_like(logits))
    parameters.sparse_gradients = any(g is not None and g.layout != torch.strided for g in found)
    hidden = [name for name, g in zip(values, found, strict=True) if g is None]
    if not hidden:
        return
    with torch.no_grad():
        noise = parameters.split(parameters.random(0.1 * parameters.size**0.5, generator))
        moved = parameters.logits(x, {n: v + noise[n] if n in hidden else v for n, v in values.items()})
    if not alike(logits.detach(), moved, 1e-4):
        raise UsageError(
            f"{len(hidden)} of {len(values)} parameter tensors ({hidden[0]!r} first) change the outputs "
            "but have no gradient, because forward hides them (torch.no_grad, detach or numpy). Freeze "
            "them by requires_grad_(False), or choose the others by --params"
        )
    for name in hidden:
        path = name.rpartition(".")[0]
        # the module's own attributes, and those of the one around it
        places = {path, path.rpartition(".")[0]}
        held = [each for place in places for each in _tensors_held(parameters.model.get_submodule(place))]
        if held:
            raise UsageError(
                f"parameter {name!r} does not change the outputs, and its module keeps tensors in "
                f"{held[0]!r}, which may be cached copies of it from eval mode. Call model.train() and "
                "then model.eval() to refresh them, or choose the other parameters by --params"
            )


def _tensors_held(module: nn.Module) -> list[str]:
    """Return the names of attributes that are tensors or dicts of tensors, and neither parameters nor buffers."""
    known = vars(nn.Module())
    found = []
    for name, value in vars(module).items():
        values = value.values() if isinstance(value, dict) else [value]
        # weight_norm and pruning leave a tensor ``weight`` beside their parameters ``weight_g`` or ``weight_orig``
        derived = any(p.startswith(f"{name}_") for p in module._parameters)
        if name not in known and not derived and any(isinstance(v, Tensor) for v in values):
            found.append(name)
    return found


def first_adjoint(
    candidates: Sequence[JacobianProduct], vjp: JacobianProduct, x: Inputs, v: Tensor
) -> JacobianProduct:
    """Return the first of the ``candidates`` for J v that is the adjoint of ``vjp``, u ↦ Jᵀu, on ``x`` for ``v`` (P,).

    An LSTM's float32 kernel and many custom autograd.Functions have no forward mode. Its replacement needs derivatives
    of the backward pass, which may also be absent (nn.EmbeddingBag) or wrong.

    Raises:
        DerivativeError: no candidate is.
    """
    cause: Exception | None = None
    for candidate in candidates:
        with refusals_noted() as refusals:
            found = candidate(x, v).double()
            signs = torch.arange(found.numel(), device=x.device) % 3 - 1.0
            u = found / found.norm().clamp(min=1e-300) + signs.view_as(found) / signs.norm().clamp(min=1)
            apart = float((u * found).sum() - vjp(x, u.to(v)).double() @ v.double())
            if abs(apart) <= max(1e-3, 30 * torch.finfo(v.dtype).eps) * float(u.norm() * found.norm()):
                return candidate
        cause = refusals[0] if refusals else None
    flaw = "these would be wrong" if cause is None else first_line(cause)
    raise DerivativeError(
        "a layer lacks forward-mode derivatives, and its backward pass cannot be differentiated either "
        f"({flaw}); {REMEDY}"
    ) from cause


def agree(cheap: Product, sound: Product, few: Arguments, in_float64: Arguments) -> bool:
    """Return whether the cheap product equals the sound one.

    Forward over forward is silently wrong or absent in some layers (pytorch#196700, #196699). They are compared on 16
    examples in float64, because float32 rounds the tiny terms of confident examples apart. The cheap product must also
    exist in the model's own dtype: an LSTM's float32 kernel has no forward mode.
    """
    with refusals_noted():
        cheap(*few)
        first, second = cheap(*in_float64), sound(*in_float64)
        return bool((first - second).norm() <= 1e-8 * second.norm())
    return False  # there is no such derivative, or a layer insists on its dtype


def require_terms(terms: Product, product: Product, in_float64: Arguments) -> None:
    """Raise DerivativeError where the examples' ``terms`` do not add up to vᵀH v, with the ``product`` H v.

    The terms are derivatives of the product by weights on the examples. A layer with a right second derivative may have
    no third one, and torch.autograd.function.once_differentiable then drops it silently.
    """
    v = in_float64[0]
    with refusals_noted() as refusals:
        total, whole = float(terms(*in_float64).sum()), product(*in_float64).double()
    if refusals:  # a layer insists on its dtype
        return
    expected = float(whole @ v)
    # for saturated outputs, with curvatures of 1e-30, rounding alone makes a few percent
    rounding = max(1e-4 * max(abs(total), abs(expected)), 1e-6 * float(whole.norm() * v.norm()), 1e-12)
    if abs(total - expected) > rounding:
        raise DerivativeError(
            f"a layer has no derivatives beyond the second, so per-example curvature would be wrong; {REMEDY}"
        )


def gradients(
    output: Tensor,
    inputs: dict[str, Tensor],
    cotangent: Tensor | None = None,
    *,
    create_graph: bool = False,
    keep_graph: bool = False,
) -> tuple[Tensor | None, ...]:
    """Call autograd.grad; inputs that ``output`` does not depend on get None, even all of them."""
    if not output.requires_grad:
        return (None,) * len(inputs)
    return torch.autograd.grad(
        output,
        list(inputs.values()),
        cotangent,
        create_graph=create_graph,
        retain_graph=create_graph or keep_graph,
        allow_unused=True,
    )


def along(gradients: tuple[Tensor | None, ...], tangents: dict[str, Tensor], like: Tensor) -> Tensor:
    """Return Σ g·v over the parameters that have a gradient, as a 0-dim tensor."""
    parts = [(g * t).sum() for g, t in zip(gradients, tangents.values(), strict=True) if g is not None]
    return torch.stack(parts).sum() if parts else like.new_zeros(())
