"""Files written so that a reader sees the old content or the new, never a part. Imports no torch."""

import glob
import io
import json
import os
import re
import secrets
import socket
import stat
import tomllib
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import tomli_w

from gm_probe.errors import StorageError
from gm_probe.files.locks import alive
from gm_probe.files.regular import open_to_write, read_record

OURS = "gmprobe-"
"""Begins the part of a temporary file's name that says who writes it; no other program's file has it."""
DRAFT = re.compile(rf"\..+\.{OURS}(?P<host>.+)\.(?P<pid>\d+)\.[0-9a-f]{{8}}\.tmp")
"""The name of a temporary file of ``write_atomic``."""


def write_atomic(path: Path, data: bytes) -> None:
    """Write ``data`` to ``path`` through a synced temporary file and a rename; what a killed write left is removed.

    Raises:
        StorageError: the folder is missing, full or read-only; ``path`` is left as it was.
    """
    # named before it is made: Ctrl-C may come right after that
    writer = f"{OURS}{socket.gethostname()}.{os.getpid()}.{secrets.token_hex(4)}"
    temporary = path.parent / f".{path.name}.{writer}.tmp"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_temporary(path.parent, path.name, of_dead=True)
        with temporary.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        _sync_folder(path.parent)
    except OSError as error:
        raise StorageError(
            f"cannot write {path}: {error.strerror or error}; free space or choose another folder"
        ) from error
    finally:
        with suppress(OSError):  # the folder may not exist; the error before counts
            temporary.unlink()


def _sync_folder(folder: Path) -> None:
    if os.name == "nt":  # Windows cannot open a folder for syncing
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def append_line(path: Path, line: str) -> None:
    """Add ``line`` to ``path`` and sync it.

    Raises:
        StorageError: the file cannot be written, or is no regular file.
    """
    try:
        with io.BufferedWriter(open_to_write(path, append=True)) as file:
            file.write((line + "\n").encode())
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise StorageError(f"cannot write {path}: {error.strerror or error}") from error


def remove_temporary(folder: Path, name: str | None = None, *, of_dead: bool = False) -> None:
    """Remove what a killed ``write_atomic`` left in ``folder``, and nothing else.

    Args:
        name: of the file that was to be written; None = of any.
        of_dead: leave what another machine, or a process that still runs, may be writing.
    """
    for left in folder.glob(f".{'*' if name is None else glob.escape(name)}.{OURS}*.tmp"):
        draft = DRAFT.fullmatch(left.name)
        if draft is None or (of_dead and (draft["host"] != socket.gethostname() or alive(int(draft["pid"])))):
            continue
        with suppress(OSError):  # another that cleans up may be faster
            if stat.S_ISREG(left.lstat().st_mode):
                left.unlink()


def in_utf8(text: str) -> bytes:
    """Return the bytes of ``text`` in a file; a name that is no UTF-8, or of another locale, keeps its bytes."""
    return text.encode("utf-8", "surrogateescape")


def as_named(path: str) -> str:
    """Return ``path``, which may have been recorded under another locale, as this process names the same file."""
    try:
        os.fsencode(path)
    except UnicodeEncodeError:
        return os.fsdecode(in_utf8(path))
    return path


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` as strict JSON (no NaN: an undefined value is null, with a reason beside it)."""
    write_atomic(path, (json.dumps(value, indent=2, allow_nan=False) + "\n").encode())


def write_toml(path: Path, value: Mapping[str, Any]) -> None:
    """Write ``value`` as TOML; keys whose value is None are left out, since TOML has no null."""
    write_atomic(path, in_utf8(tomli_w.dumps(_without_none(value))))


def _without_none(value: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: _without_none(item) if isinstance(item, Mapping) else item
        for key, item in value.items()
        if item is not None
    }


def read_json(path: Path) -> Any:
    """Parse the JSON file ``path`` of a run folder.

    Raises:
        StorageError: it is missing, broken, too large or no regular file.
    """
    content = read_record(path)
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:
        raise StorageError(f"{path} is not valid JSON: {error}") from error


def read_toml(path: Path, *, follow: bool = False) -> dict[str, Any]:
    """Parse the TOML file ``path``.

    Args:
        follow: it may be a link: a file that the user names, not one of a run folder.

    Raises:
        StorageError: it is missing, broken, too large or no regular file.
    """
    content = read_record(path, follow=follow)
    try:
        return tomllib.loads(content.decode("utf-8", "surrogateescape"))
    except (ValueError, RecursionError) as error:
        raise StorageError(f"{path} is not valid TOML: {error}") from error
