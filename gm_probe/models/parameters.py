"""A model's trainable parameters as one flat vector, and its logits at moved parameters.

The model itself is never written to: moved parameters and copied buffers are handed to it for one call. So a
model is bit-identical after a measurement whatever happens in it.
"""

import math
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from gm_probe.data.fields import Inputs, arguments
from gm_probe.errors import CheckpointError, UsageError, first_three
from gm_probe.files.tensors import not_finite
from gm_probe.models.door import Outputs, unwrapped
from gm_probe.models.recomputation import activations_kept, parametrizations_computed
from gm_probe.runtime.precision import float32_products

T = TypeVar("T")
Values = Mapping[str, Tensor] | Tensor | None
"""Parameter values: tensors by name, one vector (P,), or the model's own."""


class Parameters:
    """The P trainable parameters of ``model`` in the order of ``named_parameters`` (tied ones once).

    Args:
        model: wrappers around it are looked through (models.door).
        pattern: regular expression; only parameters in whose name it is found count, the others are constants.
        outputs: how what the model returns is read.
        or_frozen: where all parameters are frozen, take these, to run the model without a derivative.

    Raises:
        UsageError: the model has none, or none of that name, or complex ones, or some of another dtype or on another
            device than others.
    """

    def __init__(
        self, model: nn.Module, pattern: str = "", outputs: Outputs | None = None, *, or_frozen: bool = False
    ) -> None:
        self.model = model = unwrapped(model)
        self.outputs = outputs or Outputs()
        trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self._frozen = not trainable
        if or_frozen and not trainable:
            trainable = dict(model.named_parameters())
        if not or_frozen or not trainable:
            self.require_trainable()
        self.named = _matching(trainable, pattern, model)
        _require_alike(self.named)
        first = next(iter(self.named.values()))
        self.dtype, self.device = first.dtype, first.device
        self._sizes = [p.numel() for p in self.named.values()]
        self._sparse = [
            m for m in model.modules() if isinstance(m, nn.Embedding | nn.EmbeddingBag) and m.sparse
        ]
        self._places = list(_places(model))
        self._theta: Tensor | None = None  # set within ``one_pass``
        self._constants: dict[str, Tensor] | None = None  # set within ``one_pass``
        self.sparse_gradients = False  # True where forward uses a functional embedding with sparse=True
        self._writes = True  # until a call has shown that forward does not write to parameters
        self.size = sum(self._sizes)
        if not self.size:
            raise UsageError(f"all selected parameters are empty: {first_three(list(self.named))}")

    def require_trainable(self) -> None:
        """Raise UsageError where no parameter is, so that no derivative can be taken."""
        if self._frozen:
            raise UsageError("the model has no trainable parameters (all have requires_grad=False)")

    def check_finite(self) -> None:
        """Raise CheckpointError naming the first parameter or buffer that holds NaN or infinity.

        Buffers may hold −∞, as attention's masks do: as a statistic it would show in the outputs.
        """
        for name, value in [*self.model.named_parameters(), *self.model.named_buffers()]:
            # detached: of a model that was built in inference mode, torch would refuse the value itself
            if not_finite(value.detach(), mask=not isinstance(value, nn.Parameter)):
                raise CheckpointError(
                    f"tensor {name!r} of the model holds NaN or infinite values; use an earlier checkpoint"
                )

    def split(self, vector: Tensor) -> dict[str, Tensor]:
        """Cut a (P,) vector into views of the parameters' shapes."""
        pieces = vector.split(self._sizes)
        return {
            name: piece.view(p.shape) for (name, p), piece in zip(self.named.items(), pieces, strict=True)
        }

    def join(self, tensors: Iterable[Tensor | None]) -> Tensor:
        """Join tensors in the parameters' order to one (P,) vector; None stands for zeros (unused)."""
        pairs = zip(tensors, self.named.values(), strict=True)
        # an embedding's gradient may be sparse
        return torch.cat([p.new_zeros(p.numel()) if t is None else dense(t).reshape(-1) for t, p in pairs])

    def values(self, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        """Return copies of the parameters: some layers write to theirs in forward (an embedding with max_norm)."""
        return {name: p.detach().to(dtype or p.dtype, copy=True) for name, p in self.named.items()}

    def leaves(self, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        """Return ``values`` as leaves of autograd's graph."""
        return {name: value.requires_grad_() for name, value in self.values(dtype).items()}

    def moved(self, offset: Tensor) -> dict[str, Tensor]:
        """Return θ + offset, differentiable in θ and in ``offset`` (P,)."""
        return {name: self.named[name] + piece for name, piece in self.split(offset).items()}

    def vector(self, dtype: torch.dtype | None = None) -> Tensor:
        """Return a copy of θ (P,), which ``logits`` takes in place of single tensors: few kernels on a GPU.

        Within ``one_pass`` all calls have one copy: do not write to it.
        """
        theta = self._joined() if self._theta is None else self._theta.detach()
        return theta.to(dtype or self.dtype)

    def _joined(self) -> Tensor:
        return self.join([p.detach() for p in self.named.values()])

    @contextmanager
    def one_pass(self) -> Iterator[None]:
        """Copy θ, buffers and other parameters once for all calls within, which leave the model unchanged meanwhile."""
        before = self._theta, self._constants
        if self._theta is None:
            self._theta, self._constants = self._joined(), self._copied_constants()
        try:
            yield
        finally:
            self._theta, self._constants = before

    def logits(self, x: Inputs, values: Values = None) -> Tensor:
        """Return logits (B, C), or (B, L, 2) of yes-or-no labels, at parameter ``values`` (default: the model's own).

        Buffers and ``x`` are left untouched.
        """
        return self.outputs.logits(self.taken(x, values))

    def taken(self, x: Inputs, values: Values = None) -> Tensor:
        """Return the outputs as a loss takes them; see ``Outputs.taken``."""
        return self.in_force(x, values, lambda outputs: outputs)

    def in_force(self, x: Inputs, values: Values, then: Callable[[Tensor], T]) -> T:
        """Return ``then`` of the outputs, called before the model has its own parameters again.

        Args:
            values: tensors by their names, or one vector (P,).

        Raises:
            UsageError: forward writes to parameters in this call, and did not before.
        """
        shared = isinstance(values, Tensor) and not self._writes
        if isinstance(values, Tensor):
            values = self._parts(values)
        elif values is None:
            values = self.values()
        # copies, also in eval mode: some models write to a buffer or a parameter in every forward pass
        constants = self._copied_constants() if self._constants is None else self._constants
        missing = {  # parameters without a value are constants, too
            name: self.named[name].detach().clone() for name in self.named if name not in values
        }
        rest = {**constants, **missing}
        dtype = next((value.dtype for value in values.values()), self.dtype)
        if dtype != self.dtype:  # the whole model moves to the dtype of the parameters it is given
            rest = {name: as_dtype(t, dtype) for name, t in rest.items()}
        tensors = {**rest, **values}
        versions = [_version(tensor) for tensor in tensors.values()]
        placed = {f"model.{place}": tensors[name] for place, name in self._places}
        args, kwargs = arguments(self.model, x)
        run = _Then(self.model, lambda returned: then(self.outputs.taken(returned, len(x))))
        with (
            _dense_gradients(self._sparse),
            differentiable_recurrence(self.model),
            activations_kept(),
            parametrizations_computed(),
        ):
            found: T = functional_call(run, placed, args, kwargs, tie_weights=False)
        self._note_writes(tensors, versions, shared)
        return found

    def _parts(self, vector: Tensor) -> dict[str, Tensor]:
        """Return ``split`` in a form that forward can take."""
        parts = self.split(vector)
        if self._writes:
            parts = {name: part.clone() for name, part in parts.items()}
        if self.sparse_gradients:
            parts = {name: _Densely.apply(part) for name, part in parts.items()}
        return parts

    def _note_writes(self, tensors: Mapping[str, Tensor], versions: list[int | None], shared: bool) -> None:
        """Remember whether forward wrote to parameters, and copy anew the constants of a pass that it wrote to.

        Args:
            shared: other calls have the same tensors.
        """
        pairs = zip(tensors.items(), versions, strict=True)
        written = {
            name for (name, tensor), version in pairs if version is None or _version(tensor) != version
        }
        self._writes = not written.isdisjoint(self.named)
        if self._writes and shared:
            raise UsageError(
                "forward writes to the model's parameters on some inputs only, so results would depend on the order of "
                "the batches. Let it leave its parameters alone"
            )
        if self._constants is not None and not written <= set(self.named):
            self._constants = self._copied_constants()

    def _copied_constants(self) -> dict[str, Tensor]:
        """Return copies of the buffers, and of the model's other parameters."""
        others = (item for item in self.model.named_parameters() if item[0] not in self.named)
        return copied({**dict(self.model.named_buffers()), **dict(others)})

    def rounding(self, offset: Tensor) -> float:
        """Return the share of ``offset`` (P,) that is lost where θ + offset is rounded to θ's dtype."""
        weights = self.vector()
        lost = float(((weights + offset) - weights - offset).norm())
        return lost / float(offset.norm()) if lost else 0.0

    def random(self, norm: float, generator: torch.Generator) -> Tensor:
        """Return a (P,) Gaussian vector with σ = norm/√P, so that its length is about ``norm``."""
        sample = torch.randn(self.size, generator=generator, dtype=self.dtype, device=generator.device)
        return sample.to(self.device) * (norm / math.sqrt(self.size))


def _matching(
    trainable: Mapping[str, nn.Parameter], pattern: str, model: nn.Module
) -> dict[str, nn.Parameter]:
    """Return the ``trainable`` parameters in whose name ``pattern`` is found; UsageError where there are none."""
    try:
        found = {name: p for name, p in trainable.items() if re.search(pattern, name)}
    except re.error as error:
        raise UsageError(f"{pattern!r} is not a regular expression: {error}") from error
    if found:
        return found
    frozen = [name for name, _ in model.named_parameters() if re.search(pattern, name)]
    if frozen:
        raise UsageError(f"{pattern!r} matches frozen parameters only ({frozen[0]!r}: requires_grad=False)")
    raise UsageError(f"{pattern!r} matches no parameter's name; names are {first_three(list(trainable))}")


def _require_alike(parameters: Mapping[str, nn.Parameter]) -> None:
    """Raise UsageError unless all are real, of one dtype and on one device."""
    first_name, first = next(iter(parameters.items()))
    for name, p in parameters.items():
        if p.is_complex():
            raise UsageError(
                f"parameter {name!r} is complex ({p.dtype}), but a ball in parameter space needs real numbers. Hold it "
                "as two real parameters (torch.complex(real, imag) in forward), freeze it by requires_grad_(False), or "
                "choose the others by --params"
            )
        if p.dtype != first.dtype:
            raise UsageError(
                f"parameter {name!r} is {p.dtype} and {first_name!r} {first.dtype}. Convert all to one dtype "
                "(model.float()), and use autocast for speed"
            )
        if p.device != first.device:
            raise UsageError(
                f"parameter {name!r} is on {p.device} and {first_name!r} on {first.device}. Use one device for all"
            )


class _Then(nn.Module):
    """A function of what ``model`` returns, inside one call of functional_call."""

    def __init__(self, model: nn.Module, then: Callable[[Any], Any]) -> None:
        super().__init__()
        self.model, self.then = model, then

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.then(self.model(*args, **kwargs))


class _Densely(torch.autograd.Function):
    """The identity, whose gradient is dense: a sparse one passes through no view."""

    generate_vmap_rule = True

    @staticmethod
    def forward(value: Tensor) -> Tensor:
        return value.view_as(value)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return dense(gradient)

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor) -> Tensor:
        return tangent.view_as(tangent)


@contextmanager
def _dense_gradients(embeddings: Iterable[nn.Embedding | nn.EmbeddingBag]) -> Iterator[None]:
    """Let ``embeddings`` have dense gradients: their sparse ones have no second derivative (torch 2.14)."""
    try:
        for module in embeddings:
            module.sparse = False
        yield
    finally:
        for module in embeddings:
            module.sparse = True


def _version(tensor: Tensor) -> int | None:
    """Return how often a tensor was written to; None where nobody counts (in inference mode)."""
    return None if tensor.is_inference() else tensor._version


def copied(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return copies of the tensors; the dense ones of one dtype are copied as one."""
    found: dict[str, Tensor] = {}
    kinds: dict[Any, list[str]] = {}
    for name, tensor in tensors.items():
        tensor = tensor.detach()
        if tensor.is_contiguous() and type(tensor) in (Tensor, nn.Parameter):
            kinds.setdefault((tensor.dtype, tensor.device), []).append(name)
        else:
            found[name] = tensor.clone()
    for names in kinds.values():
        sizes = [tensors[name].numel() for name in names]
        parts = torch.cat([tensors[name].detach().reshape(-1) for name in names]).split(sizes)
        found |= {name: part.view(tensors[name].shape) for name, part in zip(names, parts, strict=True)}
    return found


def dense(tensor: Tensor) -> Tensor:
    """Return a sparse tensor as a dense one, and others as they are."""
    return tensor.to_dense() if tensor.layout != torch.strided else tensor


def as_dtype(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a floating-point tensor in ``dtype``, a complex one in its complex partner, and others as they are."""
    if tensor.is_complex():
        return tensor.to(dtype.to_complex())
    return tensor.to(dtype) if tensor.is_floating_point() else tensor


def _places(model: nn.Module) -> Iterator[tuple[str, str]]:
    """Yield where each parameter and buffer is held, once a module, and the name it has in ``named_parameters``.

    functional_call's own tying goes by all names: of a module that is registered under two, it puts a tensor in twice
    and takes the second for the original, which it leaves in the model for good (torch 2.14).
    """
    names: dict[Tensor, str] = {}
    for prefix, module in model.named_modules():
        held = [
            *module.named_parameters(prefix, recurse=False, remove_duplicate=False),
            *module.named_buffers(prefix, recurse=False, remove_duplicate=False),
        ]
        for place, tensor in held:
            yield place, names.setdefault(tensor, place)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put ``model`` into eval mode; restore each module's own mode after, whatever happens.

    By the flags alone: a model's own ``train()`` may change its weights (adapters that merge theirs). A forward pass
    leaves the modules' attributes as they were: what some compute from their weights once, to keep it in eval mode
    (LeViT's attention biases), would hide moved weights from every later pass.
    """
    modes = [(module, module.training) for module in model.modules()]
    spaces = [vars(module) for module in model.modules()]
    spaces += [value for space in spaces for value in space.values() if isinstance(value, dict)]
    kept: list[list[dict[str, Any]]] = []  # one entry per pass: a model may call itself

    def keep(*_: object) -> None:
        kept.append([dict(space) for space in spaces])

    def restore(*_: object) -> None:
        for space, content in zip(spaces, kept.pop(), strict=True):
            space.clear()
            space.update(content)

    hooks = [
        model.register_forward_pre_hook(keep, prepend=True),
        model.register_forward_hook(restore, always_call=True),
    ]
    try:
        for module, _ in modes:
            module.training = False
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for module, mode in modes:
            module.training = mode


@contextmanager
def as_measured(model: nn.Module, *, tf32: bool = False) -> Iterator[None]:
    """Make ``model`` the fixed, differentiable function that is measured; see the contexts."""
    with evaluating(unwrapped(model)), differentiable_attention(), _eager(), float32_products(tf32=tf32):
        yield


@contextmanager
def _eager() -> Iterator[None]:
    """Run the code of modules that are compiled inside a model, since compiled code has no second derivatives."""
    if "torch._dynamo" not in sys.modules:  # nothing is compiled, and its import would take seconds
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield


@contextmanager
def differentiable_attention() -> Iterator[None]:
    """Run attention by kernels that have second and forward-mode derivatives; the fused ones have neither.

    Inference mode, in which every derivative would be 0 without a word, is off meanwhile.
    """
    fast = torch.backends.mha.get_fastpath_enabled()
    try:
        torch.backends.mha.set_fastpath_enabled(False)
        with torch.inference_mode(False), sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


@contextmanager
def differentiable_recurrence(model: nn.Module) -> Iterator[None]:
    """Run recurrent layers without cuDNN, for the passes of ``model`` within.

    cuDNN differentiates none in eval mode and none twice, and no generator's state replays its dropout.
    """
    cudnn = torch.backends.cudnn
    before = cudnn.enabled
    try:
        if any(isinstance(module, nn.RNNBase) for module in model.modules()):
            cudnn.enabled = False
        yield
    finally:
        cudnn.enabled = before
