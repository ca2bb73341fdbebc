"""Sums and gathers over the processes of a ``torchrun`` launch; with a single process, nothing at all."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, distributed

from gm_probe.errors import ProbeError, ResourceError, UsageError, first_line, foreign_or

MOST_DEVICES = 64
"""The bound where torch counts no devices: that one is missing is reported where it is used."""


def rank() -> int:
    """Return this process's rank; process 0 prints."""
    return distributed.get_rank() if _together() else 0


def count() -> int:
    """Return the number of processes that share the work."""
    return distributed.get_world_size() if _together() else 1


def sum_over_processes(value: Tensor) -> Tensor:
    """Return ``value`` summed over all processes, in place; the same bits in each."""
    if _together():
        distributed.all_reduce(value)
    return value


def average_over_processes(values: Sequence[Tensor]) -> None:
    """Set each of ``values``, of one dtype, to its mean over the processes, in place."""
    if not _together() or not values:
        return
    mean = sum_over_processes(torch.cat([value.reshape(-1) for value in values])) / count()
    for value, piece in zip(values, mean.split([value.numel() for value in values]), strict=True):
        value.copy_(piece.view_as(value))


def from_all(value: Any) -> list[Any]:
    """Return every process's ``value``, in the order of their ranks."""
    if not _together():
        return [value]
    values: list[Any] = [None] * count()
    distributed.all_gather_object(values, value)
    return values


@contextmanager
def failing_together() -> Iterator[None]:
    """Raise in every process what one of them raises within, so that all go on to the same work.

    What runs within talks to no other process.
    """
    own: Exception | None = None
    try:
        yield
    except Exception as error:  # noqa: BLE001  raised below, once the others know of it
        own = error
    told = from_all(None if own is None else (first_line(own), getattr(own, "exit_code", 1)))
    first = next(filter(None, told), None)
    if first is None:
        return
    if own is None:
        own = ProbeError(first[0])
        own.exit_code = first[1]
    if count() > 1:
        own.add_note(_SHARED)
    raise own


_SHARED = "every process of torchrun raised an error here"


def shared(error: Exception) -> bool:
    """Return whether every process raised an error where this one raised ``error``."""
    return _SHARED in getattr(error, "__notes__", ())


def wait_for_all() -> None:
    """Go on once every process is here."""
    if _together():
        distributed.barrier()


def own_device(device: torch.device) -> torch.device:
    """Return ``device``; if it names no number and ``torchrun`` started several processes, this one's GPU."""
    if device.type != "cpu" and device.index is None and "LOCAL_RANK" in os.environ:
        present = torch.get_device_module(device).device_count()
        return torch.device(device.type, _told("LOCAL_RANK", 0, present or MOST_DEVICES))
    return device


def everywhere(flag: bool, device: torch.device) -> bool:
    """Return whether ``flag`` holds in every process: what decides on the passes to come must be the same in all."""
    return int(sum_over_processes(torch.tensor(int(flag), device=device))) == count()


def gather_examples(values: Tensor) -> Tensor:
    """Join each process's per-example values (n, ...) to (N, ...) in the order of the examples."""
    if not _together():
        return values
    return torch.cat(from_all(values.cpu())).to(values.device)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, own: Tensor) -> Tensor:
        parts = [torch.empty_like(own, memory_format=torch.contiguous_format) for _ in range(count())]
        distributed.all_gather(parts, own.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> Tensor:
        # the gradient of the sum of all processes' losses, since each process used every part
        total = sum_over_processes(slopes[0].clone(memory_format=torch.contiguous_format))
        return total.chunk(count())[rank()]


def gather_with_gradient(own: Tensor) -> Tensor:
    """Join (n, ...) tensors of one shape, one of each process, to (W·n, ...) in the order of ranks.

    The gradient that comes back is that of the sum of what all processes make of it.
    """
    joined: Tensor = _Gather.apply(own) if _together() else own
    return joined


@contextmanager
def joined(device: torch.device) -> Iterator[None]:
    """Join the processes that ``torchrun`` started (by gloo on CPU, nccl on GPU); without torchrun, do nothing.

    Raises:
        UsageError: the environment says that there are some, but not which this one is, or where they meet.
        ResourceError: they do not meet.
    """
    if _together() or launched() < 2:
        yield
        return
    if device.type != "cpu":  # collectives of plain objects use the current device
        torch.get_device_module(device).set_device(own_device(device))
    # Its functions take the group of the moment of their import as a default. Imported later (as torch.optim does,
    # by torch._dynamo), they would keep the group and its threads alive until the interpreter's end, which aborts then
    import_module("torch.distributed.nn")
    backend = _backend(device)
    with _stdout_apart(), foreign_or(_not_joined):
        distributed.init_process_group(backend)
    try:
        yield
        distributed.barrier()  # no process ends the group while another still uses it
    finally:
        distributed.destroy_process_group()


def _backend(device: torch.device) -> str:
    try:
        return distributed.get_default_backend_for_device(device)
    except ValueError as error:
        raise UsageError(
            f"torch has no backend for several processes on device {device.type}. Use one process, or --device cpu"
        ) from error


def launched() -> int:
    """Return how many processes ``torchrun`` started; 1 without it.

    Raises:
        UsageError: the environment says that there are several, but not which this one is, or where they meet.
    """
    if "WORLD_SIZE" not in os.environ:
        return 1
    world = _told("WORLD_SIZE", 1, 2**16)
    if world > 1:
        _told("RANK", 0, world)
        _told("MASTER_PORT", 1, 2**16)
        if not os.environ.get("MASTER_ADDR"):
            raise _not_told("MASTER_ADDR", "is not set")
    return world


def _told(name: str, least: int, end: int) -> int:
    """Return the whole number from ``least`` to below ``end`` in the environment variable ``name``."""
    text = os.environ.get(name)
    if text is None:
        raise _not_told(name, "is not set")
    if not text.isdecimal() or len(text) > 20 or not least <= int(text) < end:
        raise _not_told(name, f"is {text[:40]!r}, not a whole number from {least} to {end - 1}")
    return int(text)


def _not_told(name: str, problem: str) -> UsageError:
    return UsageError(
        f"{name} {problem}, although WORLD_SIZE or LOCAL_RANK is set for several processes. Start them "
        "with torchrun, or unset these variables"
    )


def _not_joined(cause: str) -> ResourceError:
    where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    return ResourceError(
        f"the processes of torchrun cannot connect at {where}: {cause}. Start them with torchrun"
    )


@contextmanager
def _stdout_apart() -> Iterator[None]:
    """Send what libraries print to stdout, as gloo of torch 2.10 does, to stderr: stdout is for results."""
    results = os.dup(1)
    try:
        os.dup2(2, 1)
        yield
    finally:
        os.dup2(results, 1)
        os.close(results)


def _together() -> bool:
    return distributed.is_available() and distributed.is_initialized()
