"""Which device to run on, and what machine a result came from."""

from __future__ import annotations

import ctypes
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from typing import Any

import torch

from gm_probe.core.errors import ResourceError, UsageError, did_you_mean

NAMES = ("auto", "cpu", "cuda", "cuda:1", "mps")
"""Devices by name, cuda:1 for those of any number."""


@contextmanager
def generators_kept(device: torch.device | None = None) -> Iterator[None]:
    """Leave torch's global generators, on the CPU and on a ``device`` that is a GPU, as they were."""
    with torch.random.fork_rng(devices=[device] if device is not None and device.type == "cuda" else []):
        yield


def pick_device(name: str) -> torch.device:
    """``auto`` (CUDA, else CPU: MPS lacks the estimators' float64), ``cpu``, ``cuda``, ``cuda:1`` or ``mps``.

    Raises:
        UsageError: no such name.
        ResourceError: no such device here.
    """
    device = named_device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ResourceError(
            f"no device {name}: torch sees {torch.cuda.device_count()} CUDA device(s); use --device cpu"
        )
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise ResourceError("no MPS device here; use --device cpu")
    return device


def named_device(name: str) -> torch.device:
    """As ``pick_device``, whether or not there is such a device here.

    Raises:
        UsageError: no such name.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.device(name)
    except RuntimeError as error:
        hint = did_you_mean(name, NAMES, f"use {', '.join(NAMES)}")
        raise UsageError(f"no device {name!r}; {hint}") from error


@contextmanager
def deterministic(enabled: bool) -> Iterator[None]:
    """Let torch use no algorithm whose result differs from run to run; restored after.

    On a GPU some are slower, and an operation that has no such algorithm raises RuntimeError.
    """
    before = torch.are_deterministic_algorithms_enabled()
    if enabled:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it when it starts
        torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


@contextmanager
def full_precision() -> Iterator[None]:
    """Products of float32 in float32: TF32 (on a GPU) or bfloat16 would round weights away that moved little."""
    cudnn: Any = torch.backends.cudnn
    onednn: Any = torch.backends.mkldnn
    places: tuple[Any, ...] = (torch.backends.cuda.matmul, cudnn.conv, cudnn.rnn)
    places += (onednn.matmul, onednn.conv, onednn.rnn)
    before = [place.fp32_precision for place in places]
    try:
        for place in places:
            place.fp32_precision = "ieee"
        yield
    finally:
        for place, precision in zip(places, before, strict=True):
            place.fp32_precision = precision


_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # of glibc's malloc.h


def keep_freed_memory() -> bool:
    """Let glibc's malloc keep what tensors free for the next ones, for the rest of this process.

    By default it hands large blocks back to the kernel, which zeroes them page by page when they return: a third of the
    time of a Hessian product on a CPU. The process then holds its peak. False where there is no glibc.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return bool(mallopt(_M_MMAP_MAX, 0)) and bool(mallopt(_M_TRIM_THRESHOLD, -1))


def environment(device: torch.device) -> dict[str, Any]:
    """Versions, device and threads, to be stored with every result."""
    name = (
        torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else platform.processor() or platform.machine()
    )
    return {
        "gm_probe": version("gm_probe"),
        "torch": torch.__version__,
        "torchvision": version("torchvision"),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": str(device),
        "device_name": name,
        "threads": torch.get_num_threads(),
    }
