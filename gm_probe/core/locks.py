"""A folder held by one process at a time, and what that process tells of how far it is. Imports no torch."""

import io
import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

from gm_probe.core.errors import BusyError, StorageError
from gm_probe.core.schema import between, bounded, mapping, optional, scalar, table, text

try:
    import fcntl
except ImportError:  # Windows: two processes on one folder are the user's care there
    fcntl = None  # type: ignore[assignment]

LOCK = ".lock"
TAKING = ".lock.new"
"""There while a process looks whether a folder is held, and if not names itself."""
BEAT = 5.0
"""Seconds between two signs of life of who holds a folder."""
STALE = 60.0
"""Seconds without one after which a holder on another machine counts as gone."""
TELL = 1.0
"""Seconds between two words of how far a holder is."""


LIFETIME = 1e10
"""Seconds that no work takes."""
_PART = between(0.0, 1e15)
WORD = table(
    {
        "stage": text,
        "done": _PART,
        "total": _PART,
        "left": optional(between(0.0, LIFETIME)),
        "more": mapping(scalar),
    },
    required=("stage", "done", "total", "left", "more"),
)
"""What a lock may tell, as JSON has a ``Word``."""


@dataclass(frozen=True, slots=True)
class Word:
    """How far the holder of a folder is: ``done`` of ``total`` of a ``stage``, with ``left`` seconds to go.

    ``left`` is None until it is known.
    """

    stage: str
    done: float
    total: float
    left: float | None
    more: Mapping[str, Any]

    def share(self, stages: Sequence[str]) -> float:
        """Of all the work, that is done; its ``stages`` count alike."""
        if self.stage not in stages or self.total <= 0:
            return 0.0
        return (stages.index(self.stage) + min(self.done / self.total, 1.0)) / len(stages)


class Hold:
    """A held folder: its lock names the holder and, in a second line, what it last told; see ``told``."""

    def __init__(self, file: io.FileIO) -> None:
        self._file = file
        self._holder = f"{socket.gethostname()} {os.getpid()}\n"
        self._stage = ""
        self._first = self._began = self._last = 0.0
        self._write("")

    def tell(
        self, stage: str, done: float, total: float, more: Callable[[], Mapping[str, Any]] = dict
    ) -> None:
        """Leave a ``Word``, at most one every ``TELL`` seconds: ``more`` may cost what it does.

        The time left is reckoned from what was done since the stage was first told of, so a resumed run's is right.
        """
        now = time.monotonic()
        if stage != self._stage:
            self._stage, self._first, self._began = stage, done, now
        elif now - self._last < TELL:
            return
        self._last = now
        rate = (done - self._first) / max(now - self._began, 1e-9)
        known = rate > 0 and done < total  # beyond what was expected nobody knows
        word = Word(stage, done, total, (total - done) / rate if known else None, more())
        self._write(json.dumps(asdict(word)) + "\n")

    def _write(self, word: str) -> None:
        content = (self._holder + word).encode()
        with suppress(OSError):  # a full disk must not end the work over this
            self._file.seek(0)
            self._file.write(content)  # over what stood there, so that the first line is never torn
            self._file.truncate()


def told(folder: Path) -> Word | None:
    """What the holder of ``folder`` last told; None where that is nothing, or is just being written."""
    try:
        word = json.loads((folder / LOCK).read_text(encoding="utf-8").split("\n")[1])
        bounded(word)
        WORD(word, "")  # of another machine's gmprobe, which may be of another version
        return Word(**word)
    except (OSError, ValueError, IndexError, TypeError, RecursionError):
        return None


@contextmanager
def exclusive(folder: Path) -> Iterator[Hold]:
    """Hold ``folder`` for this process alone; the lock goes with the process, however it ends.

    While it is held the lock file names host and process, and is touched every ``BEAT`` seconds: see ``held``.

    Raises:
        BusyError: another process holds it.
        StorageError: the folder cannot be written.
    """
    path = folder / LOCK
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # nothing of another's is overwritten before the lock is ours
        file = io.FileIO(os.open(path, os.O_RDWR | os.O_CREAT, 0o666), "r+")
    except OSError as error:
        raise _unwritable(folder, error) from error
    with file:
        _lock(file, folder, wait=False)
        with _alone_in_taking(folder):
            _require_no_other_machine(folder)
            hold = Hold(file)
            os.fsync(file.fileno())  # over a network others see it only now
        ended = threading.Event()
        beat = threading.Thread(target=_beat, args=(path, ended), daemon=True)
        try:
            beat.start()
            yield hold
        finally:
            ended.set()
            if beat.is_alive():
                beat.join()
            with suppress(OSError):
                file.truncate(0)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Wait until no other process is in here for ``path``; for a moment's work, such as replacing it.

    Raises:
        StorageError: its folder cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = (path.parent / f".{path.name}.lock").open("a")
    except OSError as error:
        raise _unwritable(path, error) from error
    with file:
        _lock(file, path.parent, wait=True)
        yield


def _lock(file: IO[Any] | io.FileIO, folder: Path, *, wait: bool) -> None:
    if fcntl is None:
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise BusyError(f"another gmprobe is working on {folder}; wait for it to end") from error
    except OSError as error:  # a network's file system without locks: two could write at a time
        raise StorageError(
            f"{folder} is on a file system without locks ({error.strerror or error}); choose a folder on a local disk, "
            "or mount it with locks"
        ) from error


@contextmanager
def _alone_in_taking(folder: Path) -> Iterator[None]:
    """Let one at a time look who holds ``folder``: a new file is made by one, even where locks exclude nobody."""
    path = folder / TAKING
    began, seen = time.monotonic(), 0
    while True:
        try:
            os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
            break
        except FileExistsError:
            with suppress(FileNotFoundError):
                made = path.stat().st_mtime_ns
                if made != seen:  # another's than before
                    began, seen = time.monotonic(), made
                elif time.monotonic() - began > BEAT:  # left by a kill within these few lines
                    path.unlink()
            time.sleep(0.01)
        except OSError as error:
            raise _unwritable(folder, error) from error
    try:
        yield
    except OSError as error:
        raise _unwritable(folder, error) from error
    finally:
        path.unlink(missing_ok=True)


def _unwritable(path: Path, error: OSError) -> StorageError:
    return StorageError(f"cannot write {path}: {error.strerror or error}; choose another folder")


def _require_no_other_machine(folder: Path) -> None:
    """Raise BusyError while one works on ``folder``: on some file systems a lock is known to one machine only."""
    holder = _holder(folder)
    if holder is not None and holder[0] != socket.gethostname() and held(folder):
        raise BusyError(
            f"{holder[0]} is working on {folder}, or was within the last {STALE:g} s; "
            "wait for it to end, or for that long"
        )


def _holder(folder: Path) -> tuple[str, int] | None:
    """Host and process that the lock file of ``folder`` names; None where nobody holds it."""
    try:
        host, pid = (folder / LOCK).read_text(encoding="utf-8").split("\n")[0].split()
        return host, int(pid)
    except (OSError, ValueError):  # never held, or let go
        return None


def _beat(path: Path, ended: threading.Event) -> None:
    while not ended.wait(BEAT):
        with suppress(OSError):  # the folder may be gone, or its server away for a moment
            os.utime(path)


def held(folder: Path) -> bool:
    """Whether a living process holds ``folder``: on this machine it is looked for, of others ``STALE`` decides."""
    holder = _holder(folder)
    try:
        silent = time.time() - (folder / LOCK).stat().st_mtime
    except OSError:
        return False
    if holder is None or silent >= STALE:
        return False
    host, pid = holder
    return host != socket.gethostname() or alive(pid)


def alive(pid: int) -> bool:
    """Whether a process of this machine has this number."""
    if os.name == "nt":  # signal 0 is no question there
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's
        return True
    return True
