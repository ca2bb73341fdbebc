"""Which device to run on, and what it can do: its memory, its generator, copies to it."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, TypeVar

import torch
from torch import Tensor

from gm_probe.errors import ResourceError, UsageError, first_line
from gm_probe.runtime.names import no_device

LACKING = {
    "mps": "lacks float64, which gm_probe needs for its sums",
    "meta": "holds no values; load the weights first",
}
"""Devices that torch knows but gm_probe cannot use, and why."""


def generator_state(device: torch.device) -> Tensor | None:
    """Return the state of ``device``'s own global generator; None where it has none, as the CPU's is torch's."""
    return module_of(device).get_rng_state(*_place(device)) if _has_generator(device) else None


def set_generator_state(state: Tensor | None, device: torch.device) -> None:
    """Set what ``generator_state`` returned; None leaves the generator alone."""
    if state is not None and _has_generator(device):
        module_of(device).set_rng_state(state.cpu(), *_place(device))


def generator_on(device: torch.device) -> torch.Generator:
    """Return a generator on ``device``, or on the CPU where torch has none for it."""
    try:
        return torch.Generator(device)
    except RuntimeError:
        return torch.Generator()


def budget(device: torch.device) -> float:
    """Return how many bytes a pass may take by default: 4 GB, or half of a GPU's free memory."""
    memory = _free_and_total(device)
    return 4e9 if memory is None else memory[0] / 2


@lru_cache(maxsize=16)
def chunk(device: torch.device) -> int:
    """Return how many numbers are worked on at a time: about what a CPU's cache holds, or 1/64 of a GPU's memory."""
    memory = _free_and_total(device)
    return 2**21 if memory is None else memory[1] // (64 * 4)


def synchronize(device: torch.device) -> None:
    """Wait for the work that ``device`` was given; a CPU has done it already."""
    wait = getattr(module_of(device), "synchronize", None)
    if device.type != "cpu" and wait is not None:
        wait(*_place(device))


T = TypeVar("T", bound=Any)


def upload(value: T, device: torch.device) -> T:
    """Return a tensor, or ``Fields`` of several, on ``device``; the host does not wait for the copy.

    It may only go on at once where the copy is from pinned memory, as drivers of NVIDIA and AMD have it.
    """
    if value.device == device or device.type == "cpu":
        return value.to(device)
    pinned = value.pin_memory() if device.type == "cuda" and value.device.type == "cpu" else value
    return pinned.to(device, non_blocking=True)


@lru_cache(maxsize=64)
def constant(values: tuple[Any, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return nested tuples of numbers as a tensor on ``device``: a copy for each batch would make the host wait."""
    with torch.inference_mode(False):
        return torch.tensor(values, dtype=dtype, device=device)


def release_memory(device: torch.device) -> None:
    """Hand back what torch keeps of ``device``'s freed memory."""
    release = getattr(module_of(device), "empty_cache", None)
    if release is not None:
        release()


def room(device: torch.device) -> int:
    """Return how many bytes of data may stay on ``device``: a quarter of what is free, or 1 GB where nobody knows."""
    memory = _free_and_total(device)
    return 2**30 if memory is None else memory[0] // 4


def _free_and_total(device: torch.device) -> tuple[int, int] | None:
    """Return the bytes of ``device``'s memory, free and in all; None where torch does not know them."""
    ask = getattr(module_of(device), "mem_get_info", None)
    return None if ask is None else ask(device)


def module_of(device: torch.device) -> Any:
    """Return torch.cuda, torch.xpu and the like; None for a device without a module."""
    return getattr(torch, device.type, None)


def _place(device: torch.device) -> tuple[torch.device, ...]:
    """Return what the functions of its module take: torch.mps has a single device."""
    return () if device.type == "mps" else (device,)


def _has_generator(device: torch.device) -> bool:
    return device.type != "cpu" and hasattr(module_of(device), "get_rng_state")


def pick_device(name: str) -> torch.device:
    """Return ``auto`` (CUDA, else CPU), or any device that torch knows by ``name`` and that computes in float64.

    Raises:
        UsageError: torch knows no such name, or the device lacks float64, as MPS does.
        ResourceError: no such device here.
    """
    device = named_device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ResourceError(
            f"no device {name}: torch sees {torch.cuda.device_count()} CUDA device(s); use --device cpu"
        )
    require_float64(device)
    return device


def require_float64(device: torch.device) -> None:
    """Raise unless ``device`` computes in float64, in which sums over examples are kept.

    Raises:
        UsageError: it does not.
        ResourceError: there is no such device here.
    """
    if device.type in {"cpu", "cuda"}:
        return
    if device.type in LACKING:  # by name: what torch raises depends on the platform
        raise UsageError(f"device {device} {LACKING[device.type]}; use --device cpu")
    try:
        torch.ones(1, device=device)
    except Exception as error:  # each backend raises its own kind
        cause = first_line(error).partition(". ")[0]
        raise ResourceError(f"no device {device} here ({cause}); use --device cpu") from error
    try:
        float(torch.ones(2, dtype=torch.float64, device=device).sum())
    except Exception as error:
        raise UsageError(
            f"device {device} cannot compute in float64, which gm_probe needs for its sums "
            f"({first_line(error)}); use --device cpu"
        ) from error


def named_device(name: str) -> torch.device:
    """Return the device of this name, whether or not there is one here.

    Raises:
        UsageError: no such name.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.device(name)
    except RuntimeError as error:
        raise no_device(name) from error


@contextmanager
def deterministic(enabled: bool) -> Iterator[None]:
    """Let torch use no algorithm whose result differs from run to run, where ``enabled``; restored after.

    On a GPU some are slower, and an operation that has no such algorithm raises RuntimeError. Where not enabled, the
    caller's own setting is left as it is.
    """
    if not enabled:
        yield
        return
    before = torch.get_deterministic_debug_mode()  # which knows warnings from errors
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it when it starts
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.set_deterministic_debug_mode(before)
