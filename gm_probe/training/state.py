"""The file that a run is resumed from, and the random states in it."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from gm_probe.core.devices import generator_state, set_generator_state
from gm_probe.core.errors import CheckpointError
from gm_probe.core.files import write_atomic
from gm_probe.core.pickles import load_torch


def write_state(path: Path, state: Mapping[str, Any]) -> None:
    """Write ``state``, of tensors, numbers and text, atomically."""
    buffer = io.BytesIO()
    torch.save(dict(state), buffer)
    write_atomic(path, buffer.getvalue())


def read_state(path: Path) -> dict[str, Any]:
    """Read what ``write_state`` wrote, its tensors on the CPU whatever device they were on: it may not be here.

    Raises:
        CheckpointError: the file is broken.
    """
    try:
        return dict(load_torch(path))
    except MemoryError:
        raise
    except Exception as error:  # torch, zipfile and the unpickler raise many kinds on a broken file
        raise broken(path, error) from error


def broken(path: Path, error: Exception) -> CheckpointError:
    return CheckpointError(f"{path} cannot be resumed from ({error}); remove it to start over")


def random_state(device: torch.device) -> dict[str, Any]:
    """Return the states of torch's global generators, by kind of device: dropout draws from them."""
    return {device.type: generator_state(device), "cpu": torch.get_rng_state()}


def set_random_state(state: Mapping[str, Any], device: torch.device) -> None:
    """Set what ``random_state`` returned; a kind of device that it does not know keeps its generator's state."""
    torch.set_rng_state(state["cpu"])
    set_generator_state(state.get(device.type), device)
