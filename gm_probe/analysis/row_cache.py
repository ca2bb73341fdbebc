"""Rows read before: a run whose files are what they were is not read again."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from gm_probe.core import records
from gm_probe.core.errors import StorageError
from gm_probe.core.files import read_json, write_atomic
from gm_probe.core.records import CONFIG, ERROR, MEASURES, SUMMARY

CACHE = ".collected.json"
FILES = (CONFIG, SUMMARY, MEASURES, ERROR)
"""What a row is read from."""
SETTLED = 2.0
"""Seconds after which a file that changes again has another time of change, however coarse the clock of its disk."""

Stamp = list[list[int] | None]
Row = dict[str, Any]
Cell = bool | int | float | str


def stamp(run: Path) -> Stamp:
    """What differs once one of the run's files has been written, replaced or removed."""
    found: Stamp = []
    for name in FILES:
        try:
            stat = (run / name).stat()
            found.append([stat.st_mtime_ns, stat.st_ctime_ns, stat.st_size, stat.st_ino])
        except OSError:
            found.append(None)
    return found


class RowCache:
    """Rows of the runs below ``root`` by their name, kept in a file there.

    A file that is broken, or that other code wrote, counts as none; where it cannot be written the rows are as right.
    """

    def __init__(self, root: Path, code: Path) -> None:
        """``code`` is the source file that makes the rows."""
        self._path = root / CACHE
        self._code = hashlib.sha256(code.read_bytes() + Path(records.__file__).read_bytes()).hexdigest()
        self._known = self._read()
        self._kept: dict[str, tuple[Stamp, Row]] = {}
        self._settled = (time.time() - SETTLED) * 1e9

    def row(self, name: str, run: Path, read: Callable[[Path], Row]) -> Row:
        """The row of ``run``: as it was read before, or by ``read``, whose StorageError is nothing to keep."""
        now = stamp(run)  # before it is read: what changes meanwhile is read again next time
        before, row = self._known.get(name, (None, {}))
        if before != now:
            row = read(run)
        if all(max(times[:2]) < self._settled for times in now if times is not None):
            self._kept[name] = now, row
        return row

    def write(self) -> None:
        """Keep what ``row`` gave, and no rows of runs that are gone."""
        if self._kept != self._known:
            content = {"code": self._code, "rows": self._kept}
            with suppress(StorageError):
                write_atomic(self._path, json.dumps(content).encode())

    def _read(self) -> dict[str, tuple[Stamp, Row]]:
        with suppress(StorageError, TypeError, ValueError, KeyError, AttributeError):
            content = read_json(self._path)
            rows = {name: (before, dict(row)) for name, (before, row) in content["rows"].items()}
            cells = (cell for _, row in rows.values() for cell in row.values())
            whole = content["code"] == self._code and all(isinstance(cell, Cell | None) for cell in cells)
            return rows if whole else {}
        return {}
