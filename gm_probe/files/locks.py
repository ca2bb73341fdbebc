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
from typing import Any

from gm_probe.errors import BusyError, StorageError, printable
from gm_probe.files.regular import open_to_read, open_to_write
from gm_probe.files.schema import between, bounded, mapping, optional, scalar, table, text

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
"""Seconds without one after which a holder on another machine counts as gone, by the clock of who waits."""
POLL = 0.5
"""Seconds between two looks at the lock of another machine."""
LONGEST = 2**16
"""Bytes of a lock that are read: names, numbers and one progress report."""
REPORT_EVERY = 1.0
"""Seconds between two reports of how far a holder is."""
_log = logging.getLogger(__name__)
Sign = tuple[int, bytes]
"""A lock as it is at one time: when it was written (ns), and its content. Any change of it is a sign of life."""


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
        """Of all the work, that is done; its ``stages`` count alike."""
        if self.stage not in stages or self.total <= 0:
            return 0.0
        return (stages.index(self.stage) + min(self.done / self.total, 1.0)) / len(stages)


class FolderLock:
    """A held folder: its lock has the holder, its progress (see ``progress_of``) and a count of its signs of life."""

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
        """Leave a ``StageProgress``, at most one every ``REPORT_EVERY`` seconds: ``more`` may cost what it does.

        The time left is reckoned from what was done since the stage was first reported, so a resumed run's is right.
        """
        now = time.monotonic()
        if stage != self._stage:
            self._stage, self._first, self._began = stage, done, now
        elif now - self._last < REPORT_EVERY:
            return
        self._last = now
        rate = (done - self._first) / max(now - self._began, 1e-9)
        known = rate > 0 and done < total  # beyond what was expected nobody knows
        progress = StageProgress(stage, done, total, (total - done) / rate if known else None, more())
        self._progress = json.dumps(asdict(progress))
        self._write()

    def beat(self) -> None:
        """Give a sign of life: change the lock, so that who watches it needs no clock that agrees with this one."""
        self._beats += 1
        self._write()
        with suppress(OSError, TypeError):  # on a full disk this is all that changes; Windows has it not
            os.utime(self._file.fileno())

    def _write(self) -> None:
        content = f"{self._holder}{self._progress}\n{self._beats}\n".encode()
        with self._writing, suppress(OSError):  # a full disk must not end the work over this
            self._file.seek(0)
            self._file.write(content)  # over what stood there, so that the first line is never torn
            self._file.truncate()


def progress_of(folder: Path) -> StageProgress | None:
    """What the holder of ``folder`` last reported; None where that is nothing, or is just being written."""
    try:
        progress = json.loads(_read(folder)[1].decode().split("\n")[1])
        bounded(progress)
        STAGE_PROGRESS(progress, "")  # of another machine's gmprobe, which may be of another version
        return StageProgress(**progress)
    except (OSError, ValueError, IndexError, TypeError, RecursionError):
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
    path = folder / LOCK
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = open_to_write(path)  # nothing of another's is overwritten before the lock is ours
    except OSError as error:
        raise _unwritable(path, error) from error
    with file:
        _lock(file, folder)
        _require_ours(file, path)
        gone = _watched(folder)
        with _alone_in_taking(folder):
            if _other_machine(folder) not in (None, gone):  # another that watched was faster
                raise _busy(folder)
            lock = FolderLock(file)
            os.fsync(file.fileno())  # over a network others see it only now
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
    if content.strip(b"\0") and _named(content) is None:
        raise StorageError(f"{path} is not a lock of gmprobe. Move it away, or choose another folder")


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Wait until no other process is in here for ``path``; for a moment's work, such as replacing it.

    Raises:
        BusyError: another is in here for more than ``STALE`` seconds.
        StorageError: its folder cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = open_to_write(path.parent / f".{path.name}.lock")
    except OSError as error:
        raise _unwritable(path, error) from error
    with file:
        _lock(file, path.parent, within=STALE)
        yield


def _lock(file: io.FileIO, folder: Path, *, within: float = 0.0) -> None:
    """Lock ``file``, where another has it within so many seconds."""
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
        except OSError as error:  # a network's file system without locks: two could write at a time
            raise StorageError(
                f"{folder} is on a file system without locks ({error.strerror or error}); choose a folder on a local "
                "disk, or mount it with locks"
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
                made = _left(path)
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


def _left(path: Path) -> int:
    """When the empty file ``path`` was made (ns); StorageError where it is something that ``exclusive`` never makes."""
    found = path.lstat()
    if not stat.S_ISREG(found.st_mode) or found.st_size:
        raise StorageError(f"{path} is not a file of gmprobe. Move it away, or choose another folder")
    return found.st_mtime_ns


def _unwritable(path: Path, error: OSError) -> StorageError:
    return StorageError(f"cannot write {path}: {error.strerror or error}; choose another folder")


def _busy(folder: Path) -> BusyError:
    host, _ = _holder(folder) or ("another gmprobe", 0)
    return BusyError(f"{host} is working on {folder}; wait for it to end")


def _watched(folder: Path) -> Sign | None:
    """Watch the lock of another machine until it has been silent for ``STALE`` seconds, and return it as it then is.

    Returns None at once where no other machine is named.

    Raises:
        BusyError: it gave a sign of life.
    """
    first = sign = _other_machine(folder)
    if sign is None:
        return None
    if _watch.silence(folder, sign) < STALE:
        host, _ = _holder(folder) or ("another machine", 0)
        where, who = printable(str(folder)), printable(host)
        _log.warning(
            f"{where} was locked by {who}; waiting up to {STALE:g} s for a sign that it is still running"
        )
    while _watch.silence(folder, sign) < STALE:
        time.sleep(min(POLL, STALE / 10))
        sign = _other_machine(folder)
        if sign is None:  # it has let go
            return None
        if sign != first:
            raise _busy(folder)
    return sign


def _other_machine(folder: Path) -> Sign | None:
    """The lock of ``folder`` as it is now, where it names another machine."""
    try:
        sign = _read(folder)
    except OSError:
        return None
    holder = _named(sign[1])
    return None if holder is None or holder[0] == socket.gethostname() else sign


def _read(folder: Path) -> Sign:
    """Return the lock of ``folder`` as it is now; OSError where there is none."""
    with open_to_read(folder / LOCK) as file:
        return os.fstat(file.fileno()).st_mtime_ns, file.read(LONGEST)


def _holder(folder: Path) -> tuple[str, int] | None:
    """Host and process that the lock file of ``folder`` names; None where nobody holds it."""
    try:
        return _named(_read(folder)[1])
    except OSError:  # never held
        return None


def _named(content: bytes) -> tuple[str, int] | None:
    """Host and process that a lock of this content names; None where it names none, as one that was let go."""
    try:
        host, pid = content.decode().split("\n")[0].split()
        return host, int(pid)
    except ValueError:
        return None


def _beat(lock: FolderLock, ended: threading.Event) -> None:
    while not ended.wait(BEAT):
        lock.beat()


class _Watch:
    """Since when each lock is as it is, by this process's own clock, and whether it was ever seen to change."""

    def __init__(self) -> None:
        self._seen: dict[Path, tuple[Sign, float, bool]] = {}

    def silence(self, folder: Path, sign: Sign) -> float:
        """Seconds for which the lock of ``folder``, now ``sign``, is known not to have changed."""
        now = time.monotonic()
        before, since, changed = self._seen.get(folder, (sign, now, False))
        if sign != before:
            since, changed = now, True
        self._seen[folder] = sign, since, changed
        return now - since

    def lives(self, folder: Path, sign: Sign) -> bool:
        """Whether the holder gives signs of life; before any was seen, whether the date of the last is about now."""
        silent = self.silence(folder, sign) >= STALE
        recent = abs(time.time() - sign[0] / 1e9) < STALE
        return not silent and (self._seen[folder][2] or recent)


_watch = _Watch()


def held(folder: Path) -> bool:
    """Whether ``folder`` seems to be held, without waiting: for those who look on, never for who wants to work in it.

    A process of this machine is looked for. Of another machine, the signs of life that this process has seen decide; at
    its first look it has only the date of the last one. ``exclusive`` relies on no date.
    """
    try:
        sign = _read(folder)
    except OSError:
        return False
    holder = _named(sign[1])
    if holder is None or (holder[0] == socket.gethostname() and not alive(holder[1])):
        return False
    return _watch.lives(folder, sign)


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
