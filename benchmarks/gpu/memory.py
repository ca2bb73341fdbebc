"""What happens where memory runs out, at five depths: the right value on smaller batches, or one clear line?"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from gm_probe import Batches, ResourceError, Settings, measure
from gm_probe.runtime.devices import release_memory
from gpu.agreement import WITHIN, apart, images, network
from gpu.plan import Cells, Size

DEPTHS = (0.8, 0.4, 0.2, 0.1, 0.0)
"""Shares of what the measurement takes that are left to it."""
NAMES = ("fisher_trace", "local_inconsistency")


class Narrow(nn.Module):
    """A network that runs out of memory on more than ``most`` examples, for devices whose memory has no limit."""

    def __init__(self, inner: nn.Module, most: float) -> None:
        super().__init__()
        self.inner, self.most = inner, most

    def forward(self, x: Tensor) -> Tensor:
        if len(x) > self.most:
            raise torch.OutOfMemoryError("out of memory (simulated)")
        return self.inner(x)


def memory(size: Size, device: torch.device, references: Mapping[str, Any]) -> Cells:
    for depth in DEPTHS:
        yield f"{depth:.0%} of the memory that it needs", partial(_limited, depth, size, device)


def _limited(depth: float, size: Size, device: torch.device) -> dict[str, Any]:
    count = 8 * size.batch
    model = network(size.trained, size.pixels).eval().to(device)
    data = Batches.from_tensors(*images(count, size.pixels), batch_size=count)
    settings = Settings(num_starts=1, max_probes=2, min_probes=2)
    before = _held(device)
    expected = measure(model, data, NAMES, settings).rows
    needed = torch.cuda.max_memory_allocated(device) - before if device.type == "cuda" else 0
    limited = model if device.type == "cuda" else Narrow(model, depth * count)
    try:
        with _at_most(before + depth * needed, device):
            report = measure(limited, data, NAMES, settings)
    except ResourceError as error:
        ended, right = f"refused: {error}", "\n" not in str(error)
    else:
        ended = f"measured in batches of {report.batch_size} instead of {count}"
        right = all(apart(report.rows[name].value, expected[name].value) <= WITHIN for name in NAMES)
    row = {"what came of it": ended, "right": "yes" if right else "**no**"}
    return {"rows": [row | {"bytes kept": _held(device) - before}], "needed_bytes": needed}


@contextmanager
def _at_most(limit: float, device: torch.device) -> Iterator[None]:
    """Let this process have so many bytes of a GPU."""
    if device.type != "cuda":
        yield
        return
    torch.cuda.set_per_process_memory_fraction(limit / torch.cuda.mem_get_info(device)[1], device)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, device)


def _held(device: torch.device) -> int:
    """Bytes of live tensors, once what was freed is handed back; the peak is counted from here."""
    release_memory(device)
    if device.type != "cuda":
        return 0
    torch.cuda.reset_peak_memory_stats(device)
    return torch.cuda.memory_allocated(device)
