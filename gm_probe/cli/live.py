"""A bar over many runs: how many have ended, and how; the reasons of those without a result stay on the screen."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from gm_probe.cli.output import note, notes_console

if TYPE_CHECKING:
    from gm_probe.executors.local import Outcome

LEFT_OUT = ("failed", "diverged", "busy")
"""Ends of runs without a result; each is named with its reason."""
A_WEEK = 7 * 86400.0
"""Seconds over which the pace is measured, because a run may take hours."""


@contextmanager
def live_view(
    names: Collection[str], *, quiet: bool, kept: bool = True
) -> Iterator[Callable[[Outcome], None]]:
    """Show how many of the runs ``names`` have ended, and yield what must be called with every outcome.

    A terminal gets a bar; anything else gets a line for each run that has ended.

    Args:
        kept: what has ended need not be done again; the user is told so where the runs are interrupted.
    """
    console = notes_console(quiet)
    moving = console.is_terminal and not console.is_dumb_terminal and not quiet
    ended: Counter[str] = Counter()
    columns = (
        MofNCompleteColumn(),
        BarColumn(bar_width=None),
        TextColumn("{task.description}", markup=False),
        TimeElapsedColumn(),
        TextColumn("ETA"),
        TimeRemainingColumn(),
    )
    shown = console if moving else notes_console(quiet=True)  # a disabled bar of older rich ends with a line
    with Progress(
        *columns, console=shown, transient=True, disable=not moving, expand=True, speed_estimate_period=A_WEEK
    ) as progress:
        task = progress.add_task("", total=len(names))

        def notify(outcome: Outcome) -> None:
            ended[outcome.status] += 1
            progress.update(task, advance=1, description=_counts(ended))
            if not moving:
                note(console, ended_line(ended.total(), len(names), outcome))
            elif outcome.status in LEFT_OUT:
                note(console, f"{outcome.status}: {outcome.name}{_reason(outcome)}")

        try:
            yield notify
        except KeyboardInterrupt:
            goes_on = "; run the same command to continue" if kept else ""
            note(console, f"{ended.total()} of {len(names)} ended ({_counts(ended)}){goes_on}")
            raise


def ended_line(number: int, total: int, outcome: Outcome) -> str:
    """Return the line that says how the ``number``-th of ``total`` runs ended."""
    return f"[{number}/{total}] {outcome.name} {outcome.status}{_reason(outcome)}"


def _reason(outcome: Outcome) -> str:
    return f": {outcome.reason}" if outcome.reason else ""


def _counts(ended: Counter[str]) -> str:
    return ", ".join(f"{count} {status}" for status, count in sorted(ended.items())) or "none"
