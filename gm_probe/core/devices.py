"""Which device to run on, and what machine a result came from."""

from __future__ import annotations

import platform
from importlib.metadata import version
from typing import Any

import torch

from gm_probe.core.errors import ResourceError, UsageError


def pick_device(name: str) -> torch.device:
    """``auto`` (CUDA, else CPU: MPS lacks the estimators' float64), ``cpu``, ``cuda``, ``cuda:1`` or ``mps``.

    Raises:
        UsageError: no such name.
        ResourceError: no such device here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UsageError(f"no device {name!r}; use auto, cpu, cuda, cuda:1 or mps") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ResourceError(
            f"no device {name}: torch sees {torch.cuda.device_count()} CUDA device(s); use --device cpu"
        )
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise ResourceError("no MPS device here; use --device cpu")
    return device


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
