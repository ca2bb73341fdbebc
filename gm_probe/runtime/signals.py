"""SIGINT and SIGTERM: at the first, what is at work ends in order; at the second, the process ends at once.

A handler may be called while it is at work already, or while the code that it interrupts holds any lock. So handlers
here set plain flags, raise, or end the process by ``os._exit``; they take no lock and call nothing that takes one.
"""

from __future__ import annotations

import atexit
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

INTERRUPTED, TERMINATED = 130, 143
"""Exit codes of a process that ended by SIGINT or SIGTERM, as shells have it: 128 and the signal's number."""
ENDED_BY = {
    signal.SIGINT: (INTERRUPTED, "interrupted; finished results are kept"),
    signal.SIGTERM: (TERMINATED, "terminated; finished results are kept"),
}
SAME = 0.5
"""Seconds in which a second SIGTERM counts as the first: launchers pass on what the whole process group was sent."""


class Terminated(SystemExit):
    """SIGTERM came. No ``Exception``: nothing that carries on after a failed run may carry on after this."""

    def __init__(self, message: str) -> None:
        super().__init__(TERMINATED)
        self.message = message


class _Ending:
    """Whether the program handles signals, was asked to end, is saying so, and has said so."""

    handled = asked = speaking = said = False


@contextmanager
def ending_in_order(*, for_good: bool = False) -> Iterator[None]:
    """Raise KeyboardInterrupt at SIGINT and ``Terminated`` at SIGTERM; a second signal ends the process at once.

    Outside of the main thread, which alone may ask for signals, nothing changes. A SIGINT that the caller ignores stays
    ignored.

    Args:
        for_good: keep the handlers after the block, for the rest of the process.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    _Ending.handled, _Ending.asked, _Ending.speaking, _Ending.said = True, False, False, False
    handlers: dict[signal.Signals, Callable[[int, Any], None]] = {signal.SIGTERM: _terminate}
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        handlers[signal.SIGINT] = _interrupt
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    if for_good:  # Python's own end would set the defaults, by which a process dies with another code
        atexit.register(lambda: [signal.signal(number, signal.SIG_IGN) for number in handlers])
    try:
        yield
    finally:
        if for_good:
            _Ending.asked = _Ending.said = True  # what is left is Python's own end
        else:
            for number, handler in before.items():
                signal.signal(number, handler or signal.SIG_DFL)
            _Ending.handled = False


@contextmanager
def last_words() -> Iterator[None]:
    """Say within why the program ends. A signal that comes later ends it without another line."""
    _Ending.asked = _Ending.speaking = True
    try:
        yield
    finally:
        _Ending.said, _Ending.speaking = True, False


@contextmanager
def sigterm_noted() -> Iterator[Callable[[], bool]]:
    """Only note SIGTERM meanwhile; yields what says whether it came. A second one ends the process at once."""
    came: list[float] = []

    def handler(number: int, _: Any) -> None:
        now = time.monotonic()
        if (came and now - came[0] > SAME) or (not came and _Ending.handled and _Ending.asked):
            _end_at_once(number)
        came.append(now)
        _Ending.asked = True

    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    asked, before = _Ending.asked, signal.signal(signal.SIGTERM, handler)
    try:
        yield lambda: bool(came)
    finally:
        signal.signal(signal.SIGTERM, before or signal.SIG_DFL)
        if not _Ending.handled:
            _Ending.asked = asked


def _ending_by(error: Callable[[], BaseException]) -> Callable[[int, Any], None]:
    """Return a handler that raises ``error`` at the first signal, so that every ``finally`` runs.

    A later signal ends the process at once.
    """

    def handler(number: int, _: object) -> None:
        if _Ending.asked:
            _end_at_once(number)
            return
        _Ending.asked = True
        raise error()

    return handler


_terminate = _ending_by(lambda: Terminated(ENDED_BY[signal.SIGTERM][1]))
_interrupt = _ending_by(KeyboardInterrupt)


def _end_at_once(number: int) -> None:
    """End the process with one line, or return where another call, which this one interrupts, is about to."""
    if _Ending.speaking:
        return
    _Ending.speaking = True
    code, message = ENDED_BY[signal.Signals(number)]
    with suppress(OSError):
        if not _Ending.said:
            # a progress bar may have hidden the cursor, and its line may be half drawn
            restored = "\r\x1b[K\x1b[?25h" if os.isatty(2) else ""
            os.write(2, f"{restored}gmprobe: {message}\n".encode())
    os._exit(code)
