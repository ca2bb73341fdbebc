"""SIGTERM, by which a scheduler takes a machine back: what is at work ends in order."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

TERMINATED = 143
"""Exit code of a process that ended by SIGTERM, as shells have it: 128 + 15."""


class Terminated(SystemExit):
    """SIGTERM came. No ``Exception``: nothing that carries on after a failed run may carry on after this."""

    def __init__(self, message: str) -> None:
        super().__init__(TERMINATED)
        self.message = message


@contextmanager
def on_sigterm(handler: Callable[[int, Any], None]) -> Iterator[None]:
    """Have ``handler`` called at SIGTERM; outside of the main thread, which alone may ask for that, nothing changes."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before or signal.SIG_DFL)


@contextmanager
def sigterm_noted() -> Iterator[Callable[[], bool]]:
    """Only note SIGTERM meanwhile; yields what says whether it came."""
    came = threading.Event()
    with on_sigterm(lambda *_: came.set()):
        yield came.is_set


def terminate(*_: object) -> None:
    """A handler that ends the process by way of every ``finally``, so that no half-written file stays."""
    raise Terminated("terminated; what was finished is kept")
