"""What machine a result came from, and how its memory is kept."""

import ctypes
import platform
from importlib.metadata import version
from typing import Any

import torch

from gm_probe.runtime.devices import module_of

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


def environment(device: torch.device, *, tf32: bool = False) -> dict[str, Any]:
    """Return versions, device, threads and whether products may use TF32, to be stored with every result."""
    named = getattr(module_of(device), "get_device_name", None) if device.type != "cpu" else None
    return {
        "gm_probe": version("gm_probe"),
        "torch": torch.__version__,
        "torchvision": version("torchvision"),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": str(device),
        "device_name": named(device) if named is not None else platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "tf32": tf32,
    }
