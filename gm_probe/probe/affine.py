"""Whether every single parameter enters a network's logits (piecewise) affinely; then tr H = tr F, with any labels.

H = F + mean over x and classes of (p − y)_c ∂²z_c/∂θ² (Lemma A.1's split). Where each scalar θ_i enters z affinely
while the others stay, ∂²z/∂θ_i² = 0 almost everywhere: the second term has a zero diagonal, not a zero matrix. That
holds for ReLU networks of convolutions, linear layers, max-pooling, residual sums and batch norm in eval mode, and
not for GELU, sigmoids, attention, layer norm or a weight used twice in sequence.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx
from torch._ops import OpOverload
from torch.func import functionalize
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode

from gm_probe.core.errors import first_line, of_machine
from gm_probe.core.parameters import Parameters, differentiable_attention, evaluating
from gm_probe.core.randomness import generators_kept
from gm_probe.probe.written import leaves_of, written


@dataclass(frozen=True, slots=True)
class Verdict:
    """``reason``: why the network is not, or cannot be shown to be, affine in each parameter; None if it is."""

    reason: str | None

    @property
    def affine(self) -> bool:
        return self.reason is None


def affine_in_each_parameter(parameters: Parameters, x: Tensor) -> Verdict:
    """Whether ∂²z/∂θ_i² = 0 almost everywhere for each trainable scalar θ_i, in eval mode.

    Decided on the operations that two examples of ``x`` (B, ...) run through, so that calls which no module list
    shows count, and per whole tensor: "yes" is certain for inputs that take the same path, "no" may be caution.
    Derivatives are autograd's: what a model hides from it (``.numpy()``) counts as constant. Never raises: a
    network that cannot be traced is not affine, and the reason says so. The model is left as it was.
    """
    try:
        return Verdict(_reason(parameters, x[:2]))
    except Exception as error:  # whatever a stranger's forward raises under tracing
        if of_machine(error):
            raise
        return Verdict(f"the network could not be traced ({first_line(error)})")


def _reason(parameters: Parameters, x: Tensor) -> str | None:
    model = parameters.model
    # clones, frozen ones too: some layers (an embedding with max_norm) write to their weights in a forward pass
    state = {name: p.detach().clone() for name, p in model.named_parameters()}
    frozen = {name: value for name, value in state.items() if name not in parameters.named}
    names = list(parameters.named)
    values = [state[name] for name in names]

    def logits(*trainable: Tensor) -> Tensor:
        return parameters.logits(x, {**dict(zip(names, trainable, strict=True)), **frozen})

    with (
        generators_kept(parameters.device, model),
        evaluating(model),
        differentiable_attention(),
    ):
        with torch.enable_grad(), _Watch() as watch:
            leaves = [value.detach().requires_grad_() for value in values]
            output = logits(*leaves)
            function = next(written(output), None)
        if watch.taken_out:
            return f"{watch.taken_out} takes data out of torch, by which its path may be chosen"
        if function is not None:
            return f"the autograd function {function} states derivatives of its own"
        # functionalized: what is written in place, or through a view, becomes a value of its own
        form = _form(make_fx(functionalize(logits))(*values).graph, names)
    moving = {id(leaf) for leaf in leaves_of(output)}
    lost = [
        name
        for name, leaf in zip(names, leaves, strict=True)
        if id(leaf) in moving and name not in form.names
    ]
    if form.flaw is None and lost:
        return f"the trace loses the path from parameter {lost[0]!r}, as through a tensor subclass"
    # a straight-through estimator's gradient is not the slope of what the trace shows
    return form.flaw or ("Tensor.detach hides a path from autograd" if watch.detached else None)


_LEAVING = frozenset(
    ["__array__", "__bool__", "__contains__", "__float__", "__index__", "__int__", "item", "numpy", "tolist"]
)


class _Watch(TorchFunctionMode):
    """Notes calls that hand a tensor's values to Python, where no trace follows them, or past autograd."""

    def __init__(self) -> None:
        super().__init__()
        self.taken_out: str | None = None
        self.detached = False

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(function, "__name__", "")
        if name in _LEAVING:
            self.taken_out = f"Tensor.{name}"
        self.detached |= name == "detach" and args[0].requires_grad
        return function(*args, **(kwargs or {}))


class _Form(NamedTuple):
    """How a value depends on the parameters: affinely on each of ``names``, unless there is a ``flaw``."""

    names: frozenset[str] = frozenset()
    flaw: str | None = None


_CONSTANT = _Form()


def _words(*lines: str) -> frozenset[str]:
    return frozenset(" ".join(lines).split())


_LINEAR = _words(
    # (piecewise) linear in all their tensors together; indices and conditions are integers, hence constants
    # values in another place
    "alias as_strided as_strided_scatter cat channel_shuffle clone col2im constant_pad_nd contiguous copy detach "
    "diag_embed diagonal diagonal_scatter embedding expand expand_as flatten flip gather im2col index index_add "
    "index_copy index_put index_select lift_fresh lift_fresh_copy masked_fill masked_scatter max_unpool2d "
    "max_unpool3d native_channel_shuffle permute pixel_shuffle pixel_unshuffle reflection_pad1d reflection_pad2d "
    "reflection_pad3d repeat replication_pad1d replication_pad2d replication_pad3d reshape roll scatter scatter_add "
    "select select_scatter slice slice_scatter split split_with_sizes squeeze stack t take transpose tril triu "
    "unbind unfold unsqueeze view where _reshape_alias _to_copy _unsafe_index _unsafe_view",
    # sums and means
    "add cumsum mean neg rsub sub sum trace _adaptive_avg_pool2d _adaptive_avg_pool3d adaptive_avg_pool1d "
    "avg_pool2d avg_pool3d upsample_bicubic2d upsample_bilinear2d upsample_linear1d upsample_nearest1d "
    "upsample_nearest2d upsample_nearest3d upsample_trilinear3d _upsample_bicubic2d_aa _upsample_bilinear2d_aa "
    "_upsample_nearest_exact1d _upsample_nearest_exact2d _upsample_nearest_exact3d",
    # choices between values
    "abs adaptive_max_pool2d adaptive_max_pool3d amax amin clamp clamp_max clamp_min cummax cummin hardshrink "
    "hardsigmoid hardtanh leaky_relu max max_pool2d_with_indices max_pool3d_with_indices maximum median min minimum "
    "relu relu6 softshrink sort threshold topk",
)
_LOCALLY_CONSTANT = _words(
    "ceil empty_like floor full_like heaviside new_empty new_empty_strided new_full new_ones new_zeros ones_like "
    "round sign trunc zeros_like"
)
_BATCH_NORMS = _words(
    # on the CPU, with cuDNN, with MIOpen; decomposed
    "native_batch_norm cudnn_batch_norm miopen_batch_norm _native_batch_norm_legit "
    "_native_batch_norm_legit_no_training"
)
_FACTORS = {
    # operation: arguments that it multiplies with each other; it is linear in the others
    "_embedding_bag": ("weight", "per_sample_weights"),
    "_embedding_bag_forward_only": ("weight", "per_sample_weights"),
    "_prelu_kernel": ("self", "weight"),
    "_trilinear": ("i1", "i2", "i3"),
    "addbmm": ("batch1", "batch2"),
    "addcmul": ("tensor1", "tensor2"),
    "addmm": ("mat1", "mat2"),
    "addmv": ("mat", "vec"),
    "addr": ("vec1", "vec2"),
    "baddbmm": ("batch1", "batch2"),
    "bmm": ("self", "mat2"),
    "convolution": ("input", "weight"),
    "dot": ("self", "tensor"),
    "linear": ("input", "weight"),
    "mm": ("self", "mat2"),
    "mul": ("self", "other"),
    "mv": ("self", "vec"),
    "vdot": ("self", "other"),
    **dict.fromkeys(_BATCH_NORMS, ("input", "weight")),
}
_FIXED = {
    # operation: arguments that it is not affine in; it is in the others
    "div": ("other",),
    "native_group_norm": ("input",),
    "native_layer_norm": ("input",),
    **dict.fromkeys(_BATCH_NORMS, ("running_mean", "running_var")),
}


def _form(graph: fx.Graph, names: list[str]) -> _Form:
    """How the graph's output depends on its placeholders, which are called ``names``."""
    order = {name: position for position, name in enumerate(names)}
    unnamed = iter(names)
    forms: dict[fx.Node, _Form] = {}
    for node in graph.nodes:
        if node.op == "placeholder":
            forms[node] = _Form(frozenset({next(unnamed)}))
        elif node.op == "call_function":
            if barred := _barred(node, forms):
                return _Form(flaw=barred)
            forms[node] = _after(node, forms, order)
        elif node.op == "output":
            return _joined(node.args, forms)
        else:
            forms[node] = _CONSTANT
    raise AssertionError("a graph has an output")


def _barred(node: fx.Node, forms: Mapping[fx.Node, _Form]) -> str | None:
    """Why no network with this operation can be judged, wherever the result goes."""
    if not isinstance(node.target, OpOverload):
        return None
    if torch.Tag.nondeterministic_seeded in node.target.tags:
        return f"{node.target.overloadpacket} draws at random"
    if torch.Tag.dynamic_output_shape in node.target.tags and not _by_integers(node):
        return f"{node.target.overloadpacket} picks by the data what is computed, be it nothing"
    # left over where functionalization does not reach: views of what it changes are not followed
    writes = node.target._schema.is_mutable and torch.Tag.inplace_view not in node.target.tags
    if writes and _joined((node.args, node.kwargs), forms).names:
        return f"{node.target.overloadpacket} writes to a tensor in place"
    return None


def _by_integers(node: fx.Node) -> bool:
    """Whether it is an indexing by whole numbers, whose result has a shape that no data change."""
    if node.target is not torch.ops.aten.index.Tensor:
        return False
    indices = node.args[1]
    assert isinstance(indices, Sequence)
    chosen = (index.meta["val"].dtype for index in indices if isinstance(index, fx.Node))
    return not any(dtype in (torch.bool, torch.uint8) for dtype in chosen)


def _joined(argument: Any, forms: Mapping[fx.Node, _Form]) -> _Form:
    """The form of an argument that may hold several nodes, or none."""
    parts: list[_Form] = []
    fx.node.map_arg(argument, lambda node: parts.append(forms[node]))
    flaw = next((part.flaw for part in parts if part.flaw), None)
    return _Form(frozenset().union(*(part.names for part in parts)), flaw)


def _after(node: fx.Node, forms: Mapping[fx.Node, _Form], order: Mapping[str, int]) -> _Form:
    """The form of an operation's result."""
    names, flaw = whole = _joined((node.args, node.kwargs), forms)
    value = node.meta.get("val")
    if isinstance(value, Tensor) and not (value.is_floating_point() or value.is_complex()):
        return _CONSTANT  # integers and booleans move in jumps only: comparisons, indices, argmax
    if flaw or node.target is operator.getitem:
        return whole
    if not names:
        return _CONSTANT
    if not isinstance(node.target, OpOverload):
        return _Form(names, f"{node.target} is unknown")
    called, operation = str(node.target.overloadpacket), node.target._schema.name.removeprefix("aten::")
    if torch.Tag.inplace_view in node.target.tags:  # of a tensor's shape alone
        operation = operation.removesuffix("_")
    if operation in _LOCALLY_CONSTANT:
        return _CONSTANT
    nearest = max(names, key=order.__getitem__)
    if not (operation in _LINEAR or operation in _FACTORS or operation in _FIXED) or (
        isinstance(value, Tensor) and value.is_complex()  # whose absolute value is no piecewise linear map
    ):
        return _Form(names, f"{called} is not piecewise affine (reached by parameter {nearest!r})")

    keys = (argument.name for argument in node.target._schema.arguments)
    arguments = {**dict(zip(keys, node.args, strict=False)), **node.kwargs}
    fixed = _FIXED.get(operation, ())
    if arguments.get("reduce") == "multiply":  # scatter's values times what lies there
        return _Form(names, f"{called} multiplies (reached by parameter {nearest!r})")
    if arguments.get("training") is True:
        called, fixed = f"{called} by the batch's own statistics", (*fixed, "input")
    parts = {key: _joined(argument, forms).names for key, argument in arguments.items()}
    for key in fixed:
        if bound := parts.get(key):
            nearest = max(bound, key=order.__getitem__)
            return _Form(names, f"{called} is not affine in its {key!r} (reached by parameter {nearest!r})")
    for one, other in combinations(_FACTORS.get(operation, ()), 2):
        if twice := parts.get(one, frozenset()) & parts.get(other, frozenset()):
            first = min(twice, key=order.__getitem__)
            return _Form(names, f"parameter {first!r} is multiplied by itself (in {called})")
    return whole
