"""Hand-written autograd functions (torch.autograd.Function): where a model has them, and whether they rerun it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node

from gm_probe.curvature.derivatives import gradients
from gm_probe.data.fields import Inputs
from gm_probe.errors import UsageError
from gm_probe.models.door import alike
from gm_probe.models.parameters import Parameters
from gm_probe.runtime.randomness import Draws

STEP = 0.1
"""How far weights are moved, relative to their length, to test whether the backward pass sees the moved ones."""


def written(output: Tensor, seen: set[Node] | None = None, *, others: str = "") -> Iterator[str]:
    """Yield the names of hand-written functions behind ``output``, whose derivatives need not be right.

    Args:
        seen: nodes to skip; the nodes that are visited are added.
        others: part of the name of torch's own functions that count as well.
    """
    for node in _nodes(output, set() if seen is None else seen):
        name = node.name().rstrip("0123456789").removesuffix("Backward")
        if isinstance(node, torch.autograd.function.BackwardCFunction) or (others and others in name):
            yield name


def leaves_of(output: Tensor) -> list[Tensor]:
    """Return the leaves that ``output.backward()`` would accumulate gradients in."""
    itself = [output] if output.is_leaf and output.requires_grad else []
    return itself + [node.variable for node in _nodes(output, set()) if hasattr(node, "variable")]


def _nodes(output: Tensor, seen: set[Node]) -> Iterator[Node]:
    """Yield the nodes of the graph behind ``output`` that are not in ``seen``, and add them to it."""
    waiting = [output.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        yield node
        waiting += [following for following, _ in node.next_functions]


def require_moved_alone(loss: Tensor, moved: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> None:
    """Raise UsageError where ``loss`` depends on the model's ``own`` parameters other than by the ``moved`` ones."""
    names = {id(p): name for name, p in own.items()}
    # θ + δ, which may be several nodes, as of tensor subclasses
    sums = {node for value in moved.values() for node in _nodes(value, set())}
    for node in _nodes(loss, set()):
        for following, _ in node.next_functions if node not in sums else ():
            name = names.get(id(getattr(following, "variable", None)))
            if name is not None:
                raise UsageError(
                    f"the loss takes parameter {name!r} from a list or a cache, so it does not see perturbed weights. "
                    "Let it read model.parameters() in every call"
                )


def located(parameters: Parameters, x: Inputs, *, others: str = "") -> list[str]:
    """Return the hand-written functions that run on ``x`` (B, ...), each with the name of its module."""
    found: list[str] = []
    seen: set[Node] = set()
    names = {module: name for name, module in parameters.model.named_modules()}

    def hook(module: nn.Module, args: object, output: object) -> None:
        # inner modules end first, so a node is assigned to the innermost one
        for tensor in _tensors(output):
            place = f"module {names[module]!r}" if names[module] else "the model itself"
            found.extend(f"{name} in {place}" for name in written(tensor, seen, others=others))

    with ExitStack() as stack, torch.enable_grad():
        for module in names:
            stack.callback(module.register_forward_hook(hook).remove)
        parameters.taken(x, parameters.leaves())
    return list(dict.fromkeys(found))


def _tensors(value: object) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple | Mapping):
        for each in value.values() if isinstance(value, Mapping) else value:
            yield from _tensors(each)


def require_repeatable(parameters: Parameters, x: Inputs, draws: Draws) -> None:
    """Raise UsageError unless perturbed passes over ``x`` (B, ...) can be trusted.

    Two passes with the same ``draws`` must agree, and their backward passes must see the moved weights.
    """
    with draws.again(), torch.enable_grad():
        outputs = parameters.taken(x, parameters.leaves())
    with draws.again(), torch.no_grad():
        again = parameters.taken(x)
    if not alike(again, outputs.detach(), torch.finfo(outputs.dtype).eps ** 0.5):
        raise UsageError(
            "two passes with the same random draws gave different outputs: the model draws from a "
            "generator that is not replayed. Use the global generators of torch, random or numpy, or one "
            "that is a module's attribute"
        )
    require_moved_weights(parameters, x, draws, outputs)


def require_moved_weights(
    parameters: Parameters, x: Inputs, draws: Draws, outputs: Tensor | None = None
) -> None:
    """Raise UsageError where a call with moved weights also uses the model's own.

    Forward may read its own weights without the modules' attributes. Hand-written code may rerun a part of the model in
    the backward pass, after the model has got its own weights back. Then a backward pass within a call at moved weights
    gives another gradient.

    Args:
        outputs: the outputs for ``x`` with their graph; None if they are not known.
    """
    if outputs is None:
        with torch.enable_grad():
            outputs = parameters.taken(x, parameters.leaves())
    own = {id(p): name for name, p in parameters.model.named_parameters()}
    for leaf in leaves_of(outputs):
        if id(leaf) in own:
            raise UsageError(
                f"forward takes parameter {own[id(leaf)]!r} from a list, a cache or an older view, so it "
                "does not see perturbed weights. Let it read the module's own attribute in every pass"
            )
    if next(written(outputs), None) is None:
        return
    length = float(parameters.vector().norm()) or 1.0
    noise = parameters.random(STEP * length, torch.Generator().manual_seed(0))
    with torch.enable_grad():
        values = {
            name: (p.detach() + move).requires_grad_()
            for (name, p), move in zip(
                parameters.named.items(), parameters.split(noise).values(), strict=True
            )
        }
        slopes = torch.arange(outputs.numel(), device=outputs.device).view_as(outputs) % 3 - 1.0
        with draws.again():
            right = parameters.in_force(x, values, lambda found: gradients(found, values, slopes.to(found)))
        wrong = any(
            value.grad is not None for value in values.values()
        )  # a rerun accumulated gradients itself
        if not wrong:
            with draws.again():
                found = gradients(parameters.taken(x, values), values, slopes.to(outputs))
            expected = parameters.join(right)
            apart = float((parameters.join(found) - expected).double().norm())
            tolerance = max(1e-3, 30 * torch.finfo(expected.dtype).eps)
            wrong = apart > tolerance * float(expected.double().norm())
    if wrong:
        raise UsageError(
            "the model reruns a part of itself in its backward pass "
            f"({'; '.join(located(parameters, x)[:3])}), which does not see perturbed weights. Switch off "
            "its own activation checkpointing"
        )
