"""The live view of many runs: who is at work, as the run folders tell it, and how the others ended."""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console, Group, RenderableType
from rich.constrain import Constrain
from rich.live import Live
from rich.markup import escape
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from gm_probe.cli.output import note, notes_console
from gm_probe.core.errors import printable
from gm_probe.core.locks import LIFETIME, Word, held, told

if TYPE_CHECKING:
    from gm_probe.sweep.executors import Outcome

LEFT_OUT = {"failed": "red", "diverged": "yellow", "busy": "yellow"}
"""How a run ends that gives no result now; each is named with its reason."""
NARROW = 100
"""Columns below which bars and words make way for the runs' names."""


@contextmanager
def live_view(
    paths: Mapping[str, Path], stages: Sequence[str], *, quiet: bool, kept: bool = True
) -> Iterator[Callable[[Outcome], None]]:
    """Show how the runs ``paths`` fare, and yield what is to be called with every outcome.

    On a terminal all that are at work, with bars; elsewhere a line for each that has ended. It looks at the run folders
    alone, so it is the same wherever the runs are done.

    Args:
        paths: run folders by their outcomes' names.
        stages: that each run passes, as its ``Word`` calls them.
        kept: what has ended need not be done again; said where they are interrupted.
    """
    console = notes_console(quiet)
    view = LiveView(paths, stages, console)
    moving = console.is_terminal and not console.is_dumb_terminal and not quiet

    def notify(outcome: Outcome) -> None:
        view.add(outcome)
        reason = f": {outcome.reason}" if outcome.reason else ""
        if not moving:
            note(console, f"[{len(view.ended)}/{len(paths)}] {outcome.name} {outcome.status}{reason}")
        elif outcome.status in LEFT_OUT:
            note(console, f"{outcome.status}: {outcome.name}{reason}")

    try:
        if moving:
            with Live(get_renderable=view.render, console=console, refresh_per_second=2, transient=True):
                yield notify
        else:
            yield notify
    except KeyboardInterrupt:
        goes_on = "; the same command goes on" if kept else ""
        note(console, f"{len(view.ended)} of {len(paths)} ended ({view.counts()}){goes_on}")
        raise


class LiveView:
    """Counts the runs that have ended, and looks at the others' folders whenever it is drawn."""

    def __init__(self, paths: Mapping[str, Path], stages: Sequence[str], console: Console) -> None:
        self.paths, self.stages, self.console = paths, stages, console
        self.ended: dict[str, str] = {}  # statuses by name
        self._idle: set[str] = set()  # of these, those that took no work
        self._began = self._paced = time.monotonic()
        self._first: dict[str, float] = {}  # shares that were done when they were first seen
        self._words: dict[str, Word | None] = {}
        self._next_look = 0.0
        # what the names have in common says nothing
        self._common = os.path.commonpath([str(path.absolute().parent) for path in paths.values()] or ["/"])

    def add(self, outcome: Outcome) -> None:
        self.ended[outcome.name] = outcome.status
        if not outcome.tried or outcome.status in {"skipped", "busy"}:
            self._idle.add(outcome.name)

    def counts(self) -> str:
        found = Counter(self.ended.values())
        return ", ".join(f"{count} {status}" for status, count in sorted(found.items())) or "none"

    def _at_work(self) -> dict[str, Word | None]:
        """What each run tells that somebody holds; looking takes a tenth of the time at most, over however many."""
        now = time.monotonic()
        if now >= self._next_look:
            left = {name: path for name, path in self.paths.items() if name not in self.ended}
            self._words = {name: told(path) for name, path in left.items() if held(path)}
            self._next_look = now + 10 * (time.monotonic() - now)
        return {name: word for name, word in self._words.items() if name not in self.ended}

    def _eta(self, shares: Mapping[str, float]) -> float | None:
        """Seconds to go at the pace since the first word, in which a resumed run counts with what it did since."""
        now = time.monotonic()
        worked = [name for name in self.ended if name not in self._idle]
        if not self._first and not worked:
            self._paced = now  # so far, data was read
        for name, share in shares.items():
            if share > 0:
                self._first.setdefault(name, share)
        done = sum(1 - self._first.get(name, 0.0) for name in worked)
        done += sum(share - self._first.get(name, 0.0) for name, share in shares.items())
        left = len(self.paths) - len(self.ended) - sum(shares.values())
        return (now - self._paced) * left / done if done > 0 else None

    def render(self) -> RenderableType:
        """What is to be seen now; never an error, for rich raises it from where the runs are done."""
        try:
            return self._drawn()
        except Exception as error:  # noqa: BLE001  whatever it is, the runs go on
            why = printable(f"{type(error).__name__}: {error}")
            return Text(f"{len(self.ended)}/{len(self.paths)} (no view: {why})")

    def _drawn(self) -> RenderableType:
        words = self._at_work()
        shares = {name: 0.0 if word is None else word.share(self.stages) for name, word in words.items()}
        total, width = (
            len(self.paths),
            max(20, self.console.width - 3),
        )  # the terminal echoes ^C in the last line
        head = Table.grid(padding=(0, 1), expand=True)
        head.add_column(no_wrap=True)
        head.add_column(ratio=1)
        for _ in range(2):
            head.add_column(no_wrap=True)
        head.add_row(
            f"{len(self.ended)}/{total}",
            ProgressBar(total, len(self.ended) + sum(shares.values())),
            duration(time.monotonic() - self._began),
            f"ETA {duration(self._eta(shares)) or '-:--:--'}",
        )
        counts = Text(no_wrap=True, overflow="ellipsis")
        for status, count in sorted(Counter(self.ended.values()).items()):
            counts.append(f"{count} {status}", LEFT_OUT.get(status, "green")).append(", ")
        counts.append(f"{len(words)} at work, {total - len(self.ended)} left")
        room = max(1, self.console.height - 4)
        rows = list(words.items())[: room if len(words) > room else None]
        parts: list[RenderableType] = [head, counts]
        if rows:
            parts.append(self._table(rows, shares, width))
        if len(rows) < len(words):
            parts.append(Text(f"and {len(words) - len(rows)} more at work", "dim"))
        return Constrain(Group(*parts), width)

    def _table(
        self, rows: Sequence[tuple[str, Word | None]], shares: Mapping[str, float], width: int
    ) -> Table:
        wide = width >= NARROW
        result = Table.grid(padding=(0, 2 if wide else 1), expand=True)
        result.add_column(ratio=1, no_wrap=True, overflow="ellipsis")
        if wide:
            result.add_column(width=20)
        for _ in range(2):
            result.add_column(no_wrap=True)
        result.add_column(no_wrap=True, justify="right")
        for name, word in rows:
            bar = [ProgressBar(1.0, shares[name])] if wide else []
            where, loss = ("starting", "") if word is None else doing(word, brief=not wide)
            left = "" if word is None else duration(word.left)
            run = os.path.relpath(self.paths[name], self._common)
            cells = (escape(printable(text)) for text in (run, where, loss))
            result.add_row(next(cells), *bar, *cells, left)
        return result


def doing(word: Word, *, brief: bool = False) -> tuple[str, str]:
    """In words, where a run is, and its loss if it has one."""
    more = word.more
    if word.stage == "training" and {"epoch", "step", "steps"} <= set(more):
        epoch, step = f"{more['epoch']}/{word.total:g}", f"{more['step']}/{more['steps']}"
        loss = more.get("loss")
        short = "" if not isinstance(loss, int | float) else f"{loss:.3g}"
        if brief:
            return f"{epoch} {step}", short
        return f"epoch {epoch}, step {step}", short and f"loss {short}"
    return str(more.get("measure", word.stage)) if brief else f"{word.stage} {more.get('measure', '')}", ""


def duration(seconds: float | None) -> str:
    """As hours, minutes and seconds; empty where it is not known, or is no time that work takes."""
    known = seconds is not None and 0 <= seconds < LIFETIME
    return str(timedelta(seconds=round(seconds))) if known else ""  # type: ignore[arg-type]
