"""Whether a model's derivatives can be had and trusted, tried on a few examples: layers may lack or misstate them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from gm_probe.data.fields import Inputs
from gm_probe.errors import DerivativeError, UsageError, first_line, foreign_or, of_machine
from gm_probe.models.parameters import Parameters

JacobianProduct = Callable[[Inputs, Tensor], Tensor]
"""input (B, ...), direction v (P,) ↦ J v (B, ..., C); or input, cotangent u (B, ..., C) ↦ Jᵀu (P,)"""
Product = Callable[[Tensor, Inputs, Tensor], Tensor]
"""direction (P,), input (B, ...), data (B, ...) ↦ a product or the examples' terms"""
Arguments = tuple[Tensor, Inputs, Tensor]

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


def require_gradients(parameters: Parameters, x: Tensor, generator: torch.Generator) -> None:
    """Raise UsageError unless the logits of ``x`` (B, ...) have gradients by all parameters that they depend on.

    A layer's backward pass may raise, and a forward pass under ``torch.no_grad`` or by way of NumPy hides parameters
    from autograd: they would silently count as constants.
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
    if not torch.allclose(moved, logits, rtol=1e-4, atol=1e-4 * float(logits.detach().abs().max())):
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
    """The names of attributes that are tensors or dicts of tensors, and neither parameters nor buffers."""
    known = vars(nn.Module())
    return [
        name
        for name, value in vars(module).items()
        if name not in known
        and not any(
            p.startswith(f"{name}_") for p in module._parameters
        )  # as weight_norm and pruning leave theirs
        and any(isinstance(v, Tensor) for v in (value.values() if isinstance(value, dict) else [value]))
    ]


def first_adjoint(
    candidates: Sequence[JacobianProduct], vjp: JacobianProduct, x: Inputs, v: Tensor
) -> JacobianProduct:
    """The first of the ``candidates`` for J v that is the adjoint of ``vjp``, u ↦ Jᵀu, on ``x`` for ``v`` (P,).

    An LSTM's kernel for float32 and a stranger's autograd.Function have no forward mode, and what takes its place needs
    derivatives of the backward pass, which may be absent, too (nn.EmbeddingBag) or wrong.

    Raises:
        DerivativeError: none is.
    """
    cause: Exception | None = None
    for candidate in candidates:
        try:
            found = candidate(x, v).double()
            signs = torch.arange(found.numel(), device=x.device) % 3 - 1.0
            u = found / found.norm().clamp(min=1e-300) + signs.view_as(found) / signs.norm().clamp(min=1)
            apart = float((u * found).sum() - vjp(x, u.to(v)).double() @ v.double())
        except Exception as error:  # whatever a stranger's layer raises
            if of_machine(error):
                raise
            cause = error
            continue
        if abs(apart) <= max(1e-3, 30 * torch.finfo(v.dtype).eps) * float(u.norm() * found.norm()):
            return candidate
        cause = None
    flaw = "these would be wrong" if cause is None else first_line(cause)
    raise DerivativeError(
        "a layer lacks forward-mode derivatives, and its backward pass cannot be differentiated either "
        f"({flaw}); {REMEDY}"
    ) from cause


def agree(cheap: Product, sound: Product, few: Arguments, in_float64: Arguments) -> bool:
    """Return whether the cheap product gives what the sound one does.

    Forward over forward is silently wrong or absent through some layers (pytorch#196700, #196699). Asked of 16 examples
    in float64: on confident ones the terms are so small that float32 rounds them apart. In the model's own dtype it
    must exist, too: an LSTM's kernel for float32 has no forward mode.
    """
    try:
        cheap(*few)
        first, second = cheap(*in_float64), sound(*in_float64)
    except Exception as error:  # no such derivative, or a layer that insists on its dtype
        if of_machine(error):
            raise
        return False
    return bool((first - second).norm() <= 1e-8 * second.norm())


def require_terms(terms: Product, product: Product, in_float64: Arguments) -> None:
    """Raise DerivativeError where the examples' ``terms`` do not add up to vᵀ of the ``product`` H v.

    They are derivatives of the product by weights on the examples: a layer whose second derivative is right may have no
    third, and torch.autograd.function.once_differentiable then drops it in silence.
    """
    v = in_float64[0]
    try:
        total, whole = float(terms(*in_float64).sum()), product(*in_float64).double()
    except Exception as error:  # a layer that insists on its dtype
        if of_machine(error):
            raise
        return
    expected = float(whole @ v)
    # of saturated outputs (curvatures of 1e-30) rounding alone takes a few percent
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
    """autograd.grad; None for what ``output`` does not depend on, be it all of them."""
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
    """Σ g·v over the parameters that have a gradient, as a 0-dim tensor."""
    parts = [(g * t).sum() for g, t in zip(gradients, tangents.values(), strict=True) if g is not None]
    return torch.stack(parts).sum() if parts else like.new_zeros(())
