"""One progress bar with rate and time left on stderr; where stderr is no terminal, a line now and then."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from gm_probe.cli.output import note, notes_console

FIRST, EVERY = 10.0, 30.0
"""Seconds until the first line where there is no bar, and from one line to the next."""
WINDOW = 30.0
"""Seconds over which the speed is taken: the next measure may be slower than the last."""


class Bar:
    """What ``progress_bar`` hands out.

    Args:
        total: units of work in all.
        unit: their name in the plural.
        lines: whether to print a line now and then.
    """

    def __init__(
        self, progress: Progress, console: Console, label: str, total: float, unit: str, lines: bool
    ) -> None:
        self._progress, self._console = progress, console
        self._label, self._unit, self._total = label, unit, total
        self._task = progress.add_task(label, total=total, state="")
        self._began = time.monotonic()
        self._due = self._began + FIRST if lines else math.inf
        self._seen: deque[tuple[float, float]] = deque([(self._began, 0.0)])

    @property
    def speed(self) -> float | None:
        """Return the units per second over the last ``WINDOW``, once known."""
        (before, done), (now, completed) = self._seen[0], self._seen[-1]
        return (completed - done) / (now - before) if now > before and completed > done else None

    def update(
        self, completed: float, *, total: float | None = math.nan, state: str = "", label: str | None = None
    ) -> None:
        """Move to ``completed`` units of ``total``; None = nobody knows how many there will be. Left out: as before."""
        now = time.monotonic()
        self._seen.append((now, float(completed)))
        while len(self._seen) > 2 and self._seen[1][0] < now - WINDOW:
            self._seen.popleft()
        self._label = label or self._label
        if total is None or not math.isnan(total):
            self._total = math.inf if total is None else total
        known = self._total if self._total < math.inf and completed <= self._total else None
        self._progress.update(self._task, completed=completed, state=state, description=label)
        self._progress.tasks[0].total = known  # ``update`` takes None for no change
        if now >= self._due:
            self._due = now + EVERY
            self.print(self._line(completed, known, now - self._began))

    def advance(self, units: float) -> None:
        """Move on by so many ``units``."""
        self.update(self._seen[-1][1] + units)

    def print(self, text: str) -> None:
        """Print a line above the bar."""
        note(self._console, text)

    def _line(self, completed: float, total: float | None, elapsed: float) -> str:
        of = "" if total is None else f" of {'' if float(total).is_integer() else 'about '}{_few(total)}"
        left = "unknown"
        if total is not None and self.speed:
            left = f"about {_duration((total - completed) / self.speed)}"
        return (
            f"{self._label}: {_few(completed)}{of} {self._unit} after {_duration(elapsed)}; time left: {left}"
        )


def _few(number: float) -> str:
    return f"{number:,.0f}" if number >= 10 or float(number).is_integer() else f"{number:.1f}"


def _duration(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))


@contextmanager
def progress_bar(label: str, total: float, *, unit: str, quiet: bool) -> Iterator[Bar]:
    """Show a bar that vanishes when the work is done; without a terminal, print a line now and then."""
    console = notes_console(quiet)
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=None),
        TaskProgressColumn(),
        TextColumn("{task.fields[state]}", markup=False),
        TimeElapsedColumn(),
        TextColumn("ETA"),
        TimeRemainingColumn(),
    )
    hidden = quiet or not console.is_terminal
    shown = (
        notes_console(quiet=True) if hidden else console
    )  # rich before 14.3 ends a disabled bar with a line
    with Progress(*columns, console=shown, transient=True, disable=hidden, expand=True) as progress:
        yield Bar(progress, console, label, float(total), unit, lines=hidden and not quiet)
