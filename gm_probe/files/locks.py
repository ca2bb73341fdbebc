"""A folder held by one process at a time, and the progress that this process reports. Imports no torch."""

import io
import json
import logging
import os
import socket
import stat
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from gm_probe.errors import BusyError, StorageError, printable
from gm_probe.files.regular import open_to_read, open_to_write
from gm_probe.files.schema import between, bounded, mapping, optional, scalar, table, text

try:
    import fcntl
except ImportError:  # on Windows nothing keeps two processes from one folder
    fcntl = None  # type: ignore[assignment]

LOCK = ".lock"
TAKING = ".lock.new"
"""There while a process looks whether a folder is held, and if not names itself."""
BEAT = 5.0
"""Seconds between two signs of life of who holds a folder."""
STALE = 60.0
"""Seconds without one after which a holder on another machine counts as gone, by the clock of who waits."""
POLL = 0.5
"""Seconds between two looks at the lock of another machine."""
LONGEST = 2**16
"""Bytes of a lock that are read: names, numbers and one progress report."""
REPORT_EVERY = 1.0
"""Seconds between two reports of how far a holder is."""
_log = logging.getLogger(__name__)


class Sign(NamedTuple):
    """A lock as it is at one time: when it was written (ns), and its content. Any change of it is a sign of life."""

    written: int
    content: bytes

    @property
    def holder(self) -> tuple[str, int] | None:
        """Host and process that the lock names; None where it names none, as one that was let go."""
        try:
            host, pid = self.content.decode().split("\n")[0].split()
            return host, int(pid)
        except ValueError:
            return None

    @property
    def elsewhere(self) -> bool:
        """Whether another machine holds the folder."""
        return self.holder is not None and self.holder[0] != socket.gethostname()


def _look(folder: Path) -> Sign | None:
    """Return the lock of ``folder`` as it is now; None where there is none to read."""
    try:
        with open_to_read(folder / LOCK) as file:
            return Sign(os.fstat(file.fileno()).st_mtime_ns, file.read(LONGEST))
    except OSError:
        return None


LIFETIME = 1e10
"""Seconds that no work takes."""
_PART = between(0.0, 1e15)
STAGE_PROGRESS = table(
    {
        "stage": text,
        "done": _PART,
        "total": _PART,
        "left": optional(between(0.0, LIFETIME)),
        "more": mapping(scalar),
    },
    required=("stage", "done", "total", "left", "more"),
)
"""The JSON form of ``StageProgress`` that a lock may hold."""


@dataclass(frozen=True, slots=True)
class StageProgress:
    """How far the holder of a folder is: ``done`` of ``total`` of a ``stage``, with ``left`` seconds to go.

    ``left`` is None until it is known.
    """

    stage: str
    done: float
    total: float
    left: float | None
    more: Mapping[str, Any]

    def share(self, stages: Sequence[str]) -> float:
        """Return the share of all the work that is done; each of its ``stages`` counts the same."""
        if self.stage not in stages or self.total <= 0:
            return 0.0
        return (stages.index(self.stage) + min(self.done / self.total, 1.0)) / len(stages)


class FolderLock:
    """A held folder. Its lock names the holder, its progress (``progress_of``) and a count of its signs of life."""

    def __init__(self, file: io.FileIO) -> None:
        self._file = file
        self._holder = f"{socket.gethostname()} {os.getpid()}\n"
        self._progress, self._beats = "", 0
        self._writing = threading.Lock()  # the beat comes from a thread of its own
        self._stage = ""
        self._first = self._began = self._last = 0.0
        self._write()

    def report_progress(
        self, stage: str, done: float, total: float, more: Callable[[], Mapping[str, Any]] = dict
    ) -> None:
        """Write a ``StageProgress`` into the lock, at most one every ``REPORT_EVERY`` seconds.

        The time left is computed from what was done since the stage was first reported, so it is right for a resumed
        run. ``more`` is called only where its result is written.
        """
        now = time.monotonic()
        if stage != self._stage:
            self._stage, self._first, self._began = stage, done, now
        elif now - self._last < REPORT_EVERY:
            return
        self._last = now
        rate = (done - self._first) / max(now - self._began, 1e-9)
        known = rate > 0 and done < total  # unknown once more was done than was expected
        progress = StageProgress(stage, done, total, (total - done) / rate if known else None, more())
        self._progress = json.dumps(asdict(progress))
        self._write()

    def beat(self) -> None:
        """Give a sign of life by a change of the lock: who watches it needs no clock that agrees with this one."""
        self._beats += 1
        self._write()
        with suppress(OSError, TypeError):  # on a full disk only the date changes; Windows lacks this call
            os.utime(self._file.fileno())

    def _write(self) -> None:
        content = f"{self._holder}{self._progress}\n{self._beats}\n".encode()
        with self._writing, suppress(OSError):  # a full disk must not end the work over this
            self._file.seek(0)
            self._file.write(content)  # overwritten in place, so that the first line is never incomplete
            self._file.truncate()


def progress_of(folder: Path) -> StageProgress | None:
    """Return what the holder of ``folder`` last reported; None where that is nothing, or is just being written."""
    sign = _look(folder)
    try:
        progress: Any = json.loads(sign.content.decode().split("\n")[1]) if sign else None
        bounded(progress)
        STAGE_PROGRESS(progress, "")  # of another machine's gmprobe, which may be of another version
        return StageProgress(**progress)
    except (ValueError, IndexError, TypeError, RecursionError):
        return None


@contextmanager
def exclusive(folder: Path) -> Iterator[FolderLock]:
    """Hold ``folder`` for this process alone; the lock goes with the process, however it ends.

    While it is held the lock file names host and process, and changes every ``BEAT`` seconds. Some file systems keep a
    lock to one machine. So where the file names another machine it is watched, ``STALE`` seconds at most: if it
    changes, that machine is at work; if it does not, the machine is gone.

    Raises:
        BusyError: another process holds it.
        StorageError: the folder cannot be written, or its lock is no file of gmprobe.
    """
    with _opened(folder / LOCK) as file:
        _lock(file, folder)
        _require_ours(file, folder / LOCK)
        gone = _watched(folder)
        with _alone_in_taking(folder):
            now = _look(folder)
            if now is not None and now.elsewhere and now != gone:  # another that watched was faster
                raise _busy(folder, now)
            lock = FolderLock(file)
            os.fsync(file.fileno())  # over a network, other machines see it only after this
        ended = threading.Event()
        beat = threading.Thread(target=_beat, args=(lock, ended), daemon=True)
        try:
            beat.start()
            yield lock
        finally:
            ended.set()
            if beat.is_alive():
                beat.join()
            with suppress(OSError):
                file.truncate(0)


def _require_ours(file: io.FileIO, path: Path) -> None:
    """Raise StorageError where a file of this name is somebody else's: it would be overwritten."""
    content = file.read(LONGEST)
    if content.strip(b"\0") and Sign(0, content).holder is None:
        raise StorageError(f"{path} is not a lock of gmprobe. Move it away, or choose another folder")


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Wait until no other process is in here for ``path``; for a moment's work, such as replacing it.

    Raises:
        BusyError: another is in here for more than ``STALE`` seconds.
        StorageError: its folder cannot be written.
    """
    with _opened(path.parent / f".{path.name}.lock") as file:
        _lock(file, path.parent, within=STALE)
        yield


def _opened(path: Path) -> io.FileIO:
    """Open a lock; nothing of another's is overwritten before the lock is ours."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return open_to_write(path)
    except OSError as error:
        raise _unwritable(path, error) from error


def _lock(file: io.FileIO, folder: Path, *, within: float = 0.0) -> None:
    """Lock ``file``; where another process has it, try for ``within`` seconds."""
    if fcntl is None:
        return
    end = time.monotonic() + within
    while True:
        try:
            return fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            if time.monotonic() >= end:
                raise BusyError(f"another gmprobe is working on {folder}; wait for it to end") from error
            time.sleep(0.01)
        except OSError as error:  # a network file system without locks: two processes could write at once
            raise StorageError(
                f"{folder} is on a file system without locks ({error.strerror or error}); choose a folder on a local "
                "disk, or mount it with locks"
            ) from error


@contextmanager
def _alone_in_taking(folder: Path) -> Iterator[None]:
    """Let one process at a time look who holds ``folder``: one alone can make a new file, whatever locks do."""
    path = folder / TAKING
    began, seen = time.monotonic(), 0
    while True:
        try:
            os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
            break
        except FileExistsError:
            with suppress(FileNotFoundError):
                made = _left(path)
                if made != seen:  # another process made it meanwhile
                    began, seen = time.monotonic(), made
                elif (
                    time.monotonic() - began > BEAT
                ):  # left by a process that was killed within these few lines
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


def _left(path: Path) -> int:
    """Return when the empty file ``path`` was made (ns); StorageError where ``exclusive`` cannot have made it."""
    found = path.lstat()
    if not stat.S_ISREG(found.st_mode) or found.st_size:
        raise StorageError(f"{path} is not a file of gmprobe. Move it away, or choose another folder")
    return found.st_mtime_ns


def _unwritable(path: Path, error: OSError) -> StorageError:
    return StorageError(f"cannot write {path}: {error.strerror or error}; choose another folder")


def _busy(folder: Path, sign: Sign) -> BusyError:
    host, _ = sign.holder or ("another gmprobe", 0)
    return BusyError(f"{host} is working on {folder}; wait for it to end")


def _watched(folder: Path) -> Sign | None:
    """Watch the lock of another machine until it has been silent for ``STALE`` seconds, and return it as it then is.

    Returns None as soon as no other machine is named.

    Raises:
        BusyError: it gave a sign of life.
    """
    first = sign = _look(folder)
    waiting = False
    while sign is not None and sign.elsewhere:
        if sign != first:
            raise _busy(folder, sign)
        if _watch.silence(folder, sign) >= STALE:
            return sign
        if not waiting:
            where, who = (printable(str(name)) for name in (folder, sign.holder and sign.holder[0]))
            _log.warning(
                f"{where} was locked by {who}; waiting up to {STALE:g} s for a sign that it is still running"
            )
            waiting = True
        time.sleep(min(POLL, STALE / 10))
        sign = _look(folder)
    return None


def _beat(lock: FolderLock, ended: threading.Event) -> None:
    while not ended.wait(BEAT):
        lock.beat()


class _Watch:
    """Since when each lock is as it is, by this process's own clock, and whether it was ever seen to change."""

    def __init__(self) -> None:
        self._seen: dict[Path, tuple[Sign, float, bool]] = {}

    def silence(self, folder: Path, sign: Sign) -> float:
        """Return for how many seconds the lock of ``folder``, now ``sign``, is known not to have changed."""
        now = time.monotonic()
        before, since, changed = self._seen.get(folder, (sign, now, False))
        if sign != before:
            since, changed = now, True
        self._seen[folder] = sign, since, changed
        return now - since

    def lives(self, folder: Path, sign: Sign) -> bool:
        """Return whether the holder gives signs of life; before any was seen, whether the lock was changed lately."""
        silent = self.silence(folder, sign) >= STALE
        recent = abs(time.time() - sign.written / 1e9) < STALE
        return not silent and (self._seen[folder][2] or recent)


_watch = _Watch()


def held(folder: Path) -> bool:
    """Return whether ``folder`` seems to be held, without waiting. Only ``exclusive`` may decide who works in it.

    A process of this machine is looked for. Of another machine, the signs of life that this process has seen decide; at
    its first look it has only the date of the last one. ``exclusive`` relies on no date.
    """
    sign = _look(folder)
    if sign is None or sign.holder is None or not (sign.elsewhere or alive(sign.holder[1])):
        return False
    return _watch.lives(folder, sign)


def alive(pid: int) -> bool:
    """Return whether a process of this machine has this number."""
    if os.name == "nt":  # signal 0 would end the process there
        return True
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:  # another user's
        return True
    return True
