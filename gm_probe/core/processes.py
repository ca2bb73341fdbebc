"""Sums and gathers over the processes of a ``torchrun`` launch; with a single process, nothing at all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, distributed


def rank() -> int:
    """This process's number; 0 prints."""
    return distributed.get_rank() if _together() else 0


def count() -> int:
    """How many processes share the work."""
    return distributed.get_world_size() if _together() else 1


def sum_over_processes(value: Tensor) -> Tensor:
    """``value`` summed over all processes, in place; the same bits in each."""
    if _together():
        distributed.all_reduce(value)
    return value


def everywhere(flag: bool, device: torch.device) -> bool:
    """Whether ``flag`` holds in every process: what decides on the passes to come must be the same in all."""
    return int(sum_over_processes(torch.tensor(int(flag), device=device))) == count()


def gather_examples(values: Tensor) -> Tensor:
    """Join each process's per-example values (n, ...) to (N, ...) in the order of the examples."""
    if not _together():
        return values
    parts: list[Tensor | None] = [None] * count()
    distributed.all_gather_object(parts, values.cpu())
    return torch.cat([part for part in parts if part is not None]).to(values.device)


@contextmanager
def joined(device: torch.device) -> Iterator[None]:
    """Join the processes that ``torchrun`` started (gloo on CPU, nccl on GPU); without torchrun, do nothing."""
    if int(os.environ.get("WORLD_SIZE", "1")) < 2 or _together():
        yield
        return
    distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield
    finally:
        distributed.destroy_process_group()


def _together() -> bool:
    return distributed.is_available() and distributed.is_initialized()
