"""Open regular files and nothing else: no pipe that waits for ever, no device, no link to somewhere else.

Every file of a run folder is opened here, and so is every file that is written in place. What is found is judged by the
open file itself, so that nothing can be put in its place between the check and the reading. Imports no torch.
"""

from __future__ import annotations

import errno
import io
import os
import stat
from pathlib import Path

from gm_probe.errors import StorageError

RECORD = 2**26
"""Bytes that a record of a run or a sweep may have: some 50,000 runs, or 200,000 epochs."""
LARGER = {"split.json": 2**28}
"""The same for a record that grows with the data: some 20 million examples."""
_AT_ONCE = getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
_NO_LINK = getattr(os, "O_NOFOLLOW", 0)


def open_to_read(path: Path, *, follow: bool = False) -> io.BufferedReader:
    """Open a regular file for reading, without ever waiting for it.

    Args:
        follow: also open what a link leads to, as for a file that the user names.

    Raises:
        OSError: it cannot be opened, or is a link, a folder, a pipe, a socket or a device.
    """
    return io.BufferedReader(io.FileIO(_opened(path, os.O_RDONLY | (0 if follow else _NO_LINK)), "rb"))


def open_to_write(path: Path, *, append: bool = False) -> io.FileIO:
    """Open a regular file in place for reading and writing; create it where it is absent. Nothing is truncated.

    Raises:
        OSError: it cannot be opened; it is a link, a folder, a pipe, a socket or a device; or it has a second name (a
            hard link), by which it may belong to somebody else.
    """
    flags = os.O_RDWR | os.O_CREAT | _NO_LINK | (os.O_APPEND if append else 0)
    file = io.FileIO(_opened(path, flags), "ab+" if append else "rb+")
    if os.fstat(file.fileno()).st_nlink > 1:
        file.close()
        raise OSError(errno.EMLINK, "the file has a second name (a hard link). Remove one of them", str(path))
    return file


def _opened(path: Path, flags: int) -> int:
    try:
        handle = os.open(path, flags | _AT_ONCE, 0o666)
    except OSError as error:
        if error.errno == errno.ENXIO:  # a socket
            raise OSError(errno.EINVAL, "it is not a regular file", str(path)) from error
        if flags & _NO_LINK and path.is_symlink():
            raise OSError(error.errno, "it is a link, and links are not followed here", str(path)) from error
        raise
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise OSError(errno.EINVAL, "it is not a regular file", str(path))
    return handle


def read_record(path: Path, *, follow: bool = False) -> bytes:
    """Return the content of a record.

    Args:
        follow: as in ``open_to_read``.

    Raises:
        StorageError: it cannot be read, is no regular file of its folder, or is larger than any such record.
    """
    most = LARGER.get(path.name, RECORD)
    content = read_at_most(path, most, follow=follow)
    if content is None:
        raise StorageError(f"{path} is larger than {most:,} bytes, more than such a file can need. Remove it")
    return content


def read_at_most(path: Path, most: int, *, follow: bool = False) -> bytes | None:
    """Return the content of a file, or None where it is larger than ``most`` bytes.

    Args:
        follow: as in ``open_to_read``.

    Raises:
        StorageError: it cannot be read, or is no regular file of its folder.
    """
    try:
        with open_to_read(path, follow=follow) as file:
            size = os.fstat(file.fileno()).st_size
            content = file.read(most + 1) if size <= most else b""
    except OSError as error:
        raise StorageError(f"cannot read {path}: {error.strerror or error}") from error
    return None if max(size, len(content)) > most else content
