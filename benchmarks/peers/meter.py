"""Time, memory and the unit of cost of one cell, in a process of its own."""

from __future__ import annotations

import contextlib
import resource
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from peers.subject import Subject

STATUS = Path("/proc/self/status")


def _kibibytes(field: str) -> int:
    [line] = [line for line in STATUS.read_text().splitlines() if line.startswith(field)]
    return int(line.split()[1])


class Memory:
    """Peak resident memory above what the process held at the start.

    The kernel's mark (what ``ru_maxrss`` reports) is set back first where it allows that; loading would hide the
    cell's own peak below its own otherwise. A child inherits the mark of the process that starts it, so that one
    must be small.
    """

    def __init__(self) -> None:
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")
        self._before = _kibibytes("VmRSS:")

    def peak_mebibytes(self) -> float:
        try:
            peak = _kibibytes("VmHWM:")
        except ValueError:  # a kernel without the field
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return max(0.0, (peak - self._before) / 1024)


def gradient_seconds(subject: Subject) -> float:
    """CPU seconds of one gradient pass over all images: the median of 3 over the first batch, after a warm-up."""
    subject.gradient()
    seconds = []
    for _ in range(3):
        start = time.process_time()
        subject.gradient()
        seconds.append(time.process_time() - start)
    return statistics.median(seconds) * subject.num_examples / len(subject.batches[0][1])


class OutOfTimeError(Exception):
    """The cell has used up its seconds."""


class Enough(Exception):
    """Raised out of a peer's loop when the run has what it was made for: no error."""


class Clock:
    """Counts products and notes when each ended; stops a run that is over its time.

    Args:
        limit: seconds that the run may take; a product that is under way is finished.
        minimum: products that it may make in any case.
    """

    def __init__(self, limit: float, minimum: int = 0) -> None:
        self.limit, self.minimum = limit, minimum
        self.start = time.perf_counter()
        self.ends: list[float] = []

    def restart(self) -> None:
        self.start, self.ends = time.perf_counter(), []

    @property
    def elapsed(self) -> float:
        return time.perf_counter() - self.start

    @property
    def count(self) -> int:
        return len(self.ends)

    def tick(self, products: int = 1) -> None:
        """Note that ``products`` products have just ended together."""
        before = self.ends[-1] if self.ends else 0.0
        now = self.elapsed
        self.ends += [before + (now - before) * (i + 1) / products for i in range(products)]

    def check(self) -> None:
        if self.elapsed > self.limit and self.count >= self.minimum:
            raise OutOfTimeError

    def counted(self, product: Callable[..., Any]) -> Callable[..., Any]:
        """``product``, counted and stopped in time."""

        def wrapped(*args: Any) -> Any:
            self.check()
            result = product(*args)
            self.tick()
            return result

        return wrapped

    @property
    def per_product(self) -> float | None:
        """Median seconds from one product's end to the next's, the first (a warm-up) left out where there are more."""
        steps = [b - a for a, b in zip([0.0, *self.ends], self.ends, strict=False)]
        return statistics.median(steps[1:] or steps) if steps else None
