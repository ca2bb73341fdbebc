"""The file that a run is resumed from, and the random states in it."""

from __future__ import annotations

import io
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gm_probe.errors import CheckpointError
from gm_probe.files.atomic import write_atomic
from gm_probe.files.pickles import load_torch
from gm_probe.files.regular import open_to_read
from gm_probe.runtime.devices import generator_state, set_generator_state


def write_state(path: Path, state: Mapping[str, Any]) -> None:
    """Write ``state``, which holds tensors, numbers and text, atomically."""
    buffer = io.BytesIO()
    torch.save(dict(state), buffer)
    write_atomic(path, buffer.getvalue())


def read_state(path: Path) -> dict[str, Any]:
    """Read what ``write_state`` wrote, with all tensors on the CPU, because their device may not exist here.

    Raises:
        CheckpointError: the file is broken.
    """
    try:
        open_to_read(path).close()  # refuses links and pipes
        return dict(load_torch(path))
    except MemoryError:
        raise
    except Exception as error:  # torch, zipfile and the unpickler raise many kinds on a broken file
        raise broken(path, error) from error


def broken(path: Path, error: Exception) -> CheckpointError:
    return CheckpointError(f"{path} cannot be resumed from ({error}). Remove it to start over")


def random_state(device: torch.device) -> dict[str, Any]:
    """Return the states of the global generators of torch (by type of device), Python and NumPy.

    Layers draw from them: dropout from torch's, and a user's network from any.
    """
    name, keys, *rest = np.random.get_state()
    return {
        device.type: generator_state(device),
        "cpu": torch.get_rng_state(),
        "python": random.getstate(),
        "numpy": (name, np.asarray(keys).tolist(), *rest),
    }


def set_random_state(state: Mapping[str, Any], device: torch.device) -> None:
    """Set what ``random_state`` returned; the generator of another type of device keeps its state."""
    torch.set_rng_state(state["cpu"])
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    set_generator_state(state.get(device.type), device)
