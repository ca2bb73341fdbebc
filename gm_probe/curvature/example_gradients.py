"""Squared norms of each example's own parameter gradient, without forming those gradients for all layers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import grad, vmap
from torch.nn import functional

from gm_probe.curvature.derivatives import refusals_noted
from gm_probe.data.fields import Inputs, tensors_of, with_tensors
from gm_probe.linalg.work import EXAMPLE_NORMS, GRADIENT
from gm_probe.models.parameters import Parameters
from gm_probe.runtime.devices import chunk

_CHUNK = 2**21
"""Largest number of parameters for which per-example gradients are formed where no rule holds."""


def _square(values: Tensor) -> Tensor:
    """Return (B,) squared norms of (B, ...)."""
    flat = values.flatten(1)
    return torch.linalg.vecdot(flat, flat)


def _product(a: Tensor, g: Tensor) -> Tensor:
    """Return (B,) ‖Σ_t a_t g_tᵀ‖² for a (B, T, I) and g (B, T, O), in the order that multiplies less."""
    tokens, inputs, outputs = a.shape[1], a.shape[2], g.shape[2]
    if tokens == 1:
        return _square(a) * _square(g)
    if tokens * (inputs + outputs) < inputs * outputs:
        return torch.linalg.vecdot((a @ a.transpose(1, 2)).flatten(1), (g @ g.transpose(1, 2)).flatten(1))
    return _square(g.transpose(1, 2) @ a)


def _linear(module: nn.Linear, name: str, a: Tensor, g: Tensor) -> Tensor:
    if name == "bias":
        return _square(g.reshape(len(g), -1, g.shape[-1]).sum(1))
    return _product(a.reshape(len(a), -1, a.shape[-1]), g.reshape(len(g), -1, g.shape[-1]))


def _conv(module: nn.Conv2d, name: str, a: Tensor, g: Tensor) -> Tensor:
    if name == "bias":
        return _square(g.sum((2, 3)))
    assert not isinstance(module.padding, str)
    (rows, columns), (down, right) = module.kernel_size, module.dilation
    height, width = g.shape[2:]
    result = []
    size = max(1, chunk(a.device) // (a[0].shape[0] * rows * columns * height * width))
    for some, slopes in zip(a.split(size), g.split(size), strict=True):
        padded = functional.pad(some, (*[module.padding[1]] * 2, *[module.padding[0]] * 2)).permute(
            0, 2, 3, 1
        )
        windows = padded.unfold(1, (rows - 1) * down + 1, module.stride[0])
        windows = windows.unfold(2, (columns - 1) * right + 1, module.stride[1])[..., ::down, ::right]
        # with channels innermost, gathering is several times faster than functional.unfold
        windows = windows.permute(0, 1, 2, 4, 5, 3)  # (B, H, W, k, k, I)
        slopes = slopes.permute(0, 2, 3, 1)  # (B, H, W, O)
        pairs = zip(windows.chunk(module.groups, -1), slopes.chunk(module.groups, -1), strict=True)
        shape = (len(some), height * width, -1)
        norms = [_product(window.reshape(shape), slope.reshape(shape)) for window, slope in pairs]
        result.append(torch.stack(norms).sum(0))
    return torch.cat(result)


def _normalized(module: nn.Module, a: Tensor) -> Tensor:
    """Return the input of a normalisation layer's affine map."""
    match module:
        case nn.LayerNorm():
            return functional.layer_norm(a, module.normalized_shape, None, None, module.eps)
        case nn.GroupNorm():
            return functional.group_norm(a, module.num_groups, None, None, module.eps)
        case _:
            assert isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d)
            return functional.batch_norm(a, module.running_mean, module.running_var, eps=module.eps)


def _norm(module: nn.Module, name: str, a: Tensor, g: Tensor) -> Tensor:
    each = g if name == "bias" else g * _normalized(module, a)
    if isinstance(module, nn.LayerNorm):
        return _square(each.reshape(len(g), -1, *module.normalized_shape).sum(1))
    return _square(each.flatten(2).sum(2) if each.dim() > 2 else each)


def _embedding(module: nn.Embedding, name: str, a: Tensor, g: Tensor) -> Tensor:
    a, g = a.reshape(len(a), -1), g.reshape(len(g), -1, g.shape[-1])
    same = a[:, :, None] == a[:, None, :]
    if module.padding_idx is not None:
        same &= (a != module.padding_idx)[:, :, None]
    return ((g @ g.transpose(1, 2)) * same).sum((1, 2))


_RULES: dict[type[nn.Module], Callable[..., Tensor]] = {
    nn.Linear: _linear,
    nn.Conv2d: _conv,
    nn.BatchNorm1d: _norm,
    nn.BatchNorm2d: _norm,
    nn.LayerNorm: _norm,
    nn.GroupNorm: _norm,
    nn.Embedding: _embedding,
}


def _has_rule(module: nn.Module) -> bool:
    if type(module) not in _RULES:  # a subclass may compute something else
        return False
    match module:
        case nn.Conv2d():
            return module.padding_mode == "zeros" and not isinstance(module.padding, str)
        case nn.BatchNorm1d() | nn.BatchNorm2d():
            return module.running_mean is not None
        case nn.Embedding():
            return module.max_norm is None and not module.scale_grad_by_freq
    return True


@contextmanager
def _hooked(modules: Iterable[nn.Module], hook: Callable[..., Tensor | None]) -> Iterator[None]:
    """Call ``hook`` after the forward pass of each of ``modules`` in this context."""
    with ExitStack() as stack:
        for module in modules:
            stack.callback(module.register_forward_hook(hook).remove)
        yield


class IrregularLayerError(RuntimeError):
    """A layer ran twice on a batch, or on some of its examples only, unlike on the examples of the trial."""


class ExampleGradients:
    """x ↦ ‖∇_θ cᵀz_x‖² for each example x of a batch and any cotangent c.

    Layers with a closed form (linear, convolution, normalisation, embedding) use their inputs and output gradients.
    Parameters used otherwise are differentiated example by example (vmap). Both are first compared with plain reverse
    mode on a few examples; ``supported`` is the result.

    Args:
        x: (B, ...) a batch for the trial.
    """

    def __init__(self, parameters: Parameters, x: Inputs) -> None:
        self.parameters = parameters
        uses = Counter(
            id(p)
            for module in parameters.model.modules()
            for p in module._parameters.values()
            if p is not None
        )
        names = {id(p): name for name, p in parameters.named.items()}
        few = x[:: max(1, len(x) // 4)][:4]
        self._layers: dict[nn.Module, list[str]] = {}
        self._rest: list[str] = []
        self.supported = False
        spread: set[nn.Module] | None = None
        # by chance there are as many positions as examples, but then not also as one example fewer
        with refusals_noted():  # the model may not accept so few examples
            spread = self._spread(few) | self._spread(few[: max(1, len(few) - 1)])
        if spread is None:
            return
        covered = set()
        for module in parameters.model.modules():
            own = [n for n, p in module._parameters.items() if id(p) in names and uses[id(p)] == 1]
            if own and _has_rule(module) and module not in spread:
                self._layers[module] = own
                covered |= {names[id(module._parameters[n])] for n in own}
        self._rest = [name for name in parameters.named if name not in covered]
        self.supported = self._holds(few)
        # A weight is also used outside of its layer. For many parameters, single gradients would take too long.
        if not self.supported and self._layers and parameters.size <= _CHUNK:
            self._layers, self._rest = {}, list(parameters.named)
            self.supported = self._holds(few)

    @property
    def passes(self) -> float:
        """The cost of one cotangent, in forward passes."""
        return (EXAMPLE_NORMS if self._layers else 0.0) + (GRADIENT if self._rest else 0.0)

    def squared_norms(self, x: Inputs, cotangents: Tensor) -> Tensor:
        """Return (K, B) squared gradient norms of cᵀz_x for cotangents (K, B, ..., C), from one forward pass.

        Raises:
            IrregularLayerError: the rules do not hold on these examples.
        """
        result = cotangents.new_zeros(cotangents.shape[:2])
        row = 0

        def collect(module: nn.Module, names: list[str], a: Tensor, g: Tensor) -> None:
            for name in names:
                result[row] += _RULES[type(module)](module, name, a.detach(), g)

        with torch.enable_grad(), self._tapped(collect, len(x)) as leaves:
            logits = self.parameters.logits(x, self.parameters.values())  # weights need no gradient here
            for row, cotangent in enumerate(cotangents):
                if logits.requires_grad:
                    torch.autograd.grad(
                        logits, leaves, cotangent, retain_graph=row < len(cotangents) - 1, allow_unused=True
                    )
        for row, cotangent in enumerate(cotangents if self._rest else ()):
            result[row] += self._others(x, cotangent)
        return result

    @contextmanager
    def _tapped(
        self, collect: Callable[[nn.Module, list[str], Tensor, Tensor], None], rows: int
    ) -> Iterator[list[Tensor]]:
        """Hand every layer's input and output gradient to ``collect``, and yield the leaves to differentiate by.

        Args:
            rows: number of examples; a layer must see one row of each.
        """
        leaves: list[Tensor] = []
        calls: Counter[nn.Module] = Counter()

        def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
            calls[module] += 1
            if calls[module] > 1:
                raise IrregularLayerError("its two gradients are added before they are squared")
            if len(args[0]) != rows or len(output) != rows:
                raise IrregularLayerError("rows cannot be assigned to examples")
            fresh = not output.requires_grad
            if (
                fresh
            ):  # nothing before it has a gradient; a copy, because in-place writes to a leaf are forbidden
                leaves.append(output.detach().requires_grad_())
                output = leaves[-1].clone()
            # a hook on the tensor sees the gradient before any later in-place operation
            output.register_hook(partial(collect, module, self._layers[module], args[0]))
            return output if fresh else None

        with _hooked(self._layers, hook):
            yield leaves

    def _spread(self, x: Inputs) -> set[nn.Module]:
        """Return the layers that run more than once, or not on one row per example (a position embedding, say)."""
        calls: Counter[nn.Module] = Counter()
        apart: set[nn.Module] = set()

        def hook(module: nn.Module, args: tuple[object, ...], output: object) -> None:
            calls[module] += 1
            rows = (*(args or (None,))[:1], output)  # a hook does not see an input passed by keyword
            if not all(isinstance(t, Tensor) and len(t) == len(x) for t in rows):
                apart.add(module)

        with _hooked(filter(_has_rule, self.parameters.model.modules()), hook), torch.no_grad():
            self.parameters.logits(x)
        return apart | {module for module, count in calls.items() if count > 1}

    def _others(self, x: Inputs, cotangent: Tensor) -> Tensor:
        """Return (B,) squared norms over the parameters that no rule covers."""
        values = self.parameters.values()
        fixed = {name: value for name, value in values.items() if name not in self._rest}

        def output(rest: dict[str, Tensor], one: dict[Any, Tensor], c: Tensor) -> Tensor:
            alone = with_tensors(x, {key: value[None] for key, value in one.items()})
            return (self.parameters.logits(alone, {**fixed, **rest})[0] * c).sum()

        rest = {name: values[name] for name in self._rest}
        numbers = max(1, sum(map(Tensor.numel, rest.values())))
        size = max(1, chunk(self.parameters.device) // numbers)
        norms = []
        for some, slopes in zip(x.split(size), cotangent.split(size), strict=True):
            gradients = vmap(grad(output), (None, 0, 0))(rest, tensors_of(some), slopes)
            norms.append(torch.stack([_square(g) for g in gradients.values()]).sum(0))
        return torch.cat(norms)

    def _holds(self, x: Inputs) -> bool:
        """Return whether the rules agree with plain reverse mode on the few examples ``x``."""
        with refusals_noted():
            values = self.parameters.leaves()
            with torch.enable_grad():
                logits = self.parameters.logits(x, values)
                signs = torch.where(torch.arange(logits.numel(), device=x.device) % 3 == 0, -1.0, 1.0)
                cotangent = signs.to(logits).view_as(logits)
                norms = []
                for n in range(len(x)):
                    gradients = torch.autograd.grad(
                        (logits[n] * cotangent[n]).sum(),
                        list(values.values()),
                        retain_graph=True,
                        allow_unused=True,
                    )
                    norms.append(self.parameters.join(gradients).square().sum())
            expected = torch.stack(norms)
            found = self.squared_norms(x, cotangent.detach()[None])[0]
            return bool(torch.allclose(found, expected, rtol=1e-3, atol=1e-3 * float(expected.max())))
        return False
