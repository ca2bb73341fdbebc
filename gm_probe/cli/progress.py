"""One progress bar with rate and ETA on stderr; nothing where stderr is no terminal."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

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


class Bar:
    """What ``progress_bar`` hands out."""

    def __init__(self, progress: Progress, console: Console, label: str, total: float) -> None:
        self._progress, self._console, self._total = progress, console, total
        self._task = progress.add_task(label, total=total, state="")

    @property
    def speed(self) -> float | None:
        """Units a second, once known."""
        return self._progress.tasks[0].speed

    def update(self, completed: float, *, state: str = "", label: str | None = None) -> None:
        """Move to ``completed`` of the total; a total that was an estimate grows when it is passed."""
        if completed > self._total:
            self._total = completed * 1.02
        self._progress.update(
            self._task, completed=completed, total=self._total, state=state, description=label
        )

    def print(self, text: str) -> None:
        """A line above the bar."""
        note(self._console, text)


@contextmanager
def progress_bar(label: str, total: float, *, quiet: bool) -> Iterator[Bar]:
    """A bar that vanishes when it is done."""
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
        yield Bar(progress, console, label, total)
