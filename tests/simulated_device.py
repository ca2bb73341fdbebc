"""A second device, "sim", for tests on machines without a GPU: the CPU's memory and kernels behind a device's rules.

As on a GPU an operation on tensors of two devices raises, and so does a CPU generator for the device's tensors. The
device has a global generator of its own. It cannot show other kernels, TF32, cuDNN or work that is still under way.

``install`` changes torch for good: call it in a process of its own. Every operation that reaches the device goes
through ``_run``, which lends its tensors to the CPU (two tensors, one memory, by DLPack) and hands the results back.
"""

import ctypes
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils import backend_registration
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten

HELPER = "_setup_privateuseone_for_python_backend"
OWN, CPU = 12, 1  # the numbers that DLPack gives an extension's device, as torch exports "sim", and the CPU
LIBRARIES: list[torch.library.Library] = []  # what they register lasts as long as they do
COUNTS: Counter[str] = Counter()
"""What the device was asked for: kernels; uploads, for which the host goes on at once; and waits of the host."""
_SHOWN = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
"""Tags of operations whose result, or its shape, the host must know."""


def available() -> bool:
    """Whether this torch can have a device in Python."""
    return hasattr(backend_registration, HELPER)


class SimModule:
    """``torch.sim``: what torch asks of a device's module, with a generator's state of its own."""

    def __init__(self) -> None:
        self.state = torch.Generator().manual_seed(0).get_state()

    def is_available(self) -> bool:
        return True

    is_initialized = is_available

    def device_count(self) -> int:
        return 1

    def current_device(self) -> int:
        return 0

    def _is_in_bad_fork(self) -> bool:
        return False

    def _lazy_init(self) -> None:
        pass

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]

    def manual_seed_all(self, seed: int) -> None:
        self.state = torch.Generator().manual_seed(seed).get_state()

    def get_rng_state(self, device: Any = 0) -> Tensor:
        return self.state.clone()

    def set_rng_state(self, state: Tensor, device: Any = 0) -> None:
        if state.device.type != "cpu":
            raise TypeError("a generator's state must be on the CPU")
        self.state = state.clone()

    def get_device_name(self, device: Any = 0) -> str:
        return "simulated"

    @contextmanager
    def drawing(self) -> Iterator[None]:
        """Let the CPU's kernels draw from this device's generator."""
        before = torch.get_rng_state()
        torch.set_rng_state(self.state)
        try:
            yield
        finally:
            self.state = torch.get_rng_state()
            torch.set_rng_state(before)


MODULE = SimModule()


# ---- one memory, two tensors


def _relabelled(tensor: Tensor, kind: int) -> Tensor:
    """A tensor over the memory of ``tensor`` on the device that DLPack knows by the number ``kind``."""
    address = ctypes.pythonapi.PyCapsule_GetPointer
    address.restype, address.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
    capsule = torch._C._to_dlpack(tensor)
    # a DLTensor begins with the data's address (8 bytes), then come its device's kind and number (4 bytes each)
    place = (ctypes.c_int32 * 2).from_address(address(capsule, b"dltensor") + 8)
    place[0], place[1] = kind, 0
    return torch._C._from_dlpack(capsule)


def _lent(tensor: Tensor) -> Tensor:
    return tensor if tensor.device.type == "cpu" else _relabelled(tensor, CPU)


def _owned(tensor: Tensor) -> Tensor:
    return _relabelled(tensor, OWN)


# ---- the rules


def _takes_numbers(operation: Any) -> bool:
    """Whether a 0-dim tensor of the CPU may stand in for a number, as on a GPU."""
    name = operation._schema.name.removeprefix("aten::")
    scalars = ("fill_", "masked_fill", "masked_fill_", "floor_divide", "floor_divide_", "lerp", "where")
    return torch.Tag.pointwise in operation.tags or name in scalars or name.startswith("_foreach")


def _takes_indices_of_the_cpu(operation: Any) -> bool:
    return operation._schema.name.removeprefix("aten::").strip("_") in {
        "index",
        "index_put",
        "index_put_impl",
        "unsafe_index",
    }


def _check_devices(operation: Any, leaves: list[Any]) -> None:
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    strangers = [t for t in tensors if t.device.type == "cpu" and (t.dim() or not _takes_numbers(operation))]
    if strangers and len(strangers) < len(tensors) and not _takes_indices_of_the_cpu(operation):
        raise RuntimeError(
            "Expected all tensors to be on the same device, but found at least two devices, sim:0 and cpu! "
            f"(in {operation})"
        )
    for leaf in leaves:
        if isinstance(leaf, torch.Generator) and leaf.device.type == "cpu":
            raise RuntimeError(f"Expected a 'sim' device type for generator but found 'cpu' (in {operation})")


def _count(operation: Any, args: Any) -> None:
    """Count a kernel, and a wait where the host must know its result, or how many places an index names."""
    COUNTS["kernels"] += 1
    if not _takes_indices_of_the_cpu(operation):
        COUNTS["waits"] += not _SHOWN.isdisjoint(operation.tags)
        return
    indices = [index for index in args[1] if index is not None]
    filled = len(args) > 2 and len(indices) == 1 and args[2].numel() == 1  # a masked_fill
    masked = any(index.dtype in {torch.bool, torch.uint8} for index in indices) and not filled
    COUNTS["waits"] += masked or any(index.device.type == "cpu" and index.dim() for index in indices)


# ---- running an operation


def _run(operation: Any, *args: Any, **kwargs: Any) -> Any:
    """Run ``operation`` on the CPU over the device's memory."""
    with torch._C._AutoDispatchBelowAutograd():
        leaves, shape = tree_flatten((args, kwargs))
        _check_devices(operation, leaves)
        _count(operation, args)
        written = _written(operation, args, kwargs)
        lent = [_lent_leaf(leaf, written) for leaf in leaves]
        inner_args, inner_kwargs = tree_unflatten(lent, shape)
        draws = torch.Tag.nondeterministic_seeded in operation.tags
        with MODULE.drawing() if draws else _nothing():
            result = _overload(operation, args)(*inner_args, **inner_kwargs)
        back = {id(inner): own for own, inner in zip(leaves, lent, strict=True) if isinstance(own, Tensor)}
        for own, inner in zip(leaves, lent, strict=True):
            if isinstance(own, Tensor) and own.shape != inner.shape:  # an out= of no size yet has got one
                torch.ops.aten.set_.source_Tensor(own, _owned(inner))
        return tree_map_only(Tensor, lambda t: back[id(t)] if id(t) in back else _owned(t), result)


@contextmanager
def _nothing() -> Iterator[None]:
    yield


def _written(operation: Any, args: Any, kwargs: Any) -> set[int]:
    """The ids of the arguments that ``operation`` writes to."""
    found = set()
    for position, argument in enumerate(operation._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[position] if position < len(args) else kwargs.get(argument.name)
            found.add(id(value))
    return found


def _lent_leaf(leaf: Any, written: set[int]) -> Any:
    if isinstance(leaf, torch.device):
        return torch.device("cpu")
    if not isinstance(leaf, Tensor):
        return leaf
    if id(leaf) in written and leaf.numel() == 0:  # lent memory cannot grow
        return torch.empty(leaf.shape, dtype=leaf.dtype)
    return _lent(leaf)


def _overload(operation: Any, args: Any) -> Any:
    """The overload for numbers where one stands in a tensor's place: as a tensor it would promote otherwise."""
    for value, argument in zip(args, operation._schema.arguments, strict=False):
        if str(argument.type) == "Tensor" and isinstance(value, (bool, int, float, complex)):
            return operation.overloadpacket
    return operation


# ---- what torch must have of each device


def _empty(size: Any, *, dtype: Any = None, memory_format: Any = None, **_: Any) -> Tensor:
    layout = torch.contiguous_format if memory_format is None else memory_format
    return _owned(torch.empty(size, dtype=dtype, memory_format=layout, device="cpu"))


def _empty_strided(size: Any, stride: Any, *, dtype: Any = None, **_: Any) -> Tensor:
    return _owned(torch.empty_strided(size, stride, dtype=dtype, device="cpu"))


def _zeros(size: Any, *, dtype: Any = None, **_: Any) -> Tensor:
    return _owned(torch.zeros(size, dtype=dtype, device="cpu"))


def _copy_from(source: Tensor, target: Tensor, non_blocking: bool = False) -> Tensor:
    across = source.device != target.device
    upload = across and non_blocking and target.device.type == "sim"
    COUNTS["uploads" if upload else "waits" if across else "kernels"] += 1
    with torch._C._AutoDispatchBelowAutograd():
        _lent(target).copy_(_lent(source))
    return target


def _convolution_backward(grad: Tensor, x: Tensor, weight: Tensor, *options: Any) -> Any:
    sizes = [grad.shape[1]] if options[-1][2] else None
    return _run(torch.ops.aten.convolution_backward.default, grad, x, weight, sizes, *options)


def _through(operation: Any) -> Callable[..., Any]:
    return lambda *args, **kwargs: _run(operation, *args, **kwargs)


def _view(operation: Any) -> Callable[..., Any]:
    """The CPU's own function on the device's tensor: it looks at shapes alone."""
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)
    return lambda *args, **kwargs: operation.redispatch(keys, *args, **kwargs)


def install() -> None:
    """Give this process the device "sim"."""
    getattr(backend_registration, HELPER)("sim", MODULE)
    everything, some = torch.library.Library("_", "IMPL"), torch.library.Library("aten", "IMPL")
    LIBRARIES.extend((everything, some))
    everything.fallback(_run, "PrivateUse1")
    everything.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")
    aten = torch.ops.aten
    kernels: dict[str, Callable[..., Any]] = {
        "empty.memory_format": _empty,
        "empty_strided": _empty_strided,
        "_efficientzerotensor": _zeros,
        "_copy_from": _copy_from,
        "convolution_overrideable": _through(aten.convolution.default),
        "convolution_backward_overrideable": _convolution_backward,
        "native_layer_norm": _through(aten.native_layer_norm.default),
        "native_group_norm": _through(aten.native_group_norm.default),
        "as_strided": _view(aten.as_strided.default),
        "view": _view(aten.view.default),
        "_reshape_alias": _view(aten._reshape_alias.default),
        "unfold": _view(aten.unfold.default),
        "set_.source_Tensor": _view(aten.set_.source_Tensor),
        "set_.source_Storage": _view(aten.set_.source_Storage),
        "set_.source_Storage_storage_offset": _view(aten.set_.source_Storage_storage_offset),
    }
    for name, kernel in kernels.items():
        some.impl(name, kernel, "PrivateUse1")
    _give_storages_a_copy()


def _give_storages_a_copy() -> None:
    """Let a tensor be deep-copied: torch asks an allocator, which the device has not."""
    usual = torch.UntypedStorage.clone

    def clone(storage: torch.UntypedStorage) -> torch.UntypedStorage:
        if storage.device.type != "sim":
            return usual(storage)
        whole = torch.empty(0, dtype=torch.uint8, device="sim").set_(storage)
        return whole.clone().untyped_storage()

    torch.UntypedStorage.clone = clone
