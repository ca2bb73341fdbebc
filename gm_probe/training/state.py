"""The file that a run is resumed from, and the random states in it."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from gm_probe.core.errors import CheckpointError
from gm_probe.core.files import write_atomic
from gm_probe.core.pickles import load_torch
from gm_probe.core.regular import open_to_read


def write_state(path: Path, state: Mapping[str, Any]) -> None:
    """Write ``state``, of tensors, numbers and text, atomically."""
    buffer = io.BytesIO()
    torch.save(dict(state), buffer)
    write_atomic(path, buffer.getvalue())


def read_state(path: Path, device: torch.device) -> dict[str, Any]:
    """Read what ``write_state`` wrote, its tensors on ``device``.

    Raises:
        CheckpointError: the file is broken.
    """
    try:
        open_to_read(path).close()  # no link, no pipe
        return dict(load_torch(path, device))
    except MemoryError:
        raise
    except Exception as error:  # torch, zipfile and the unpickler raise many kinds on a broken file
        raise broken(path, error) from error


def broken(path: Path, error: Exception) -> CheckpointError:
    return CheckpointError(f"{path} cannot be resumed from ({error}); remove it to start over")


def random_state(device: torch.device) -> dict[str, Any]:
    """Torch's global generators: dropout draws from them."""
    cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    return {"cpu": torch.get_rng_state(), "cuda": cuda}


def set_random_state(state: Mapping[str, Any], device: torch.device) -> None:
    torch.set_rng_state(state["cpu"].cpu())
    if device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"].cpu(), device)
