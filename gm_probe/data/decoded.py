"""Images that were decoded once, in a file on disk: those too large for memory are not decoded at every pass."""

from __future__ import annotations

import errno
import math
import os
import shutil
import tempfile
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

SHARE = 2
"""At most this fraction (one part in SHARE) of the disk's free space is taken."""


class Decoded:
    """uint8 arrays of one ``shape``, numbered from 0 to ``count`` − 1, each decoded when it is first asked for.

    They are kept in a file without a name, which goes with the process however that ends.

    Attributes:
        lacking: why arrays are not kept, but decoded whenever they are asked for; empty where they are kept.
    """

    def __init__(self, count: int, shape: Sequence[int]) -> None:
        self._shape, self._bytes = (count, *shape), math.prod(shape)
        self._known = np.zeros(count, dtype=bool)
        self.lacking = ""
        if not hasattr(os, "pwrite"):
            self.lacking = "this system cannot write at a place of a file"
            return
        try:
            folder, size = _folder(), math.prod(self._shape)
            if size > (free := shutil.disk_usage(folder).free) // SHARE:
                self.lacking = f"they take {size / 1e9:.1f} GB, and {folder} has {free / 1e9:.1f} GB free"
                return
            self._file: Any = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115  it lives as long as this does
            weakref.finalize(self, self._file.close)
            self._file.truncate(size)
            self._map = np.memmap(self._file, np.uint8, "r", shape=self._shape)
        except OSError as error:
            self.lacking = f"no temporary file could be made: {error.strerror}"

    def taken(self, numbers: np.ndarray, decode: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
        """Return the arrays at ``numbers`` (n,); ``decode`` gives those at positions (k,) in ``numbers``."""
        known = self._known[numbers]
        if known.all():
            return self._map[numbers]
        result = np.empty((len(numbers), *self._shape[1:]), np.uint8)
        if known.any():
            result[known] = self._map[numbers[known]]
        result[~known] = fresh = decode(np.flatnonzero(~known))
        self._keep(numbers[~known], fresh)
        return result

    def _keep(self, numbers: np.ndarray, arrays: np.ndarray) -> None:
        if self.lacking:
            return
        try:
            for number, array in zip(numbers.tolist(), arrays, strict=True):
                # written to the file, not to the map: on a full disk the map would raise a signal that ends the process
                if os.pwrite(self._file.fileno(), array.tobytes(), number * self._bytes) < self._bytes:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                self._known[number] = True
        except OSError as error:
            self.lacking = f"{_folder()}: {error.strerror}"

    def __reduce__(self) -> tuple[Any, ...]:
        return Decoded, (self._shape[0], self._shape[1:])  # another process decodes for itself


def _folder() -> Path:
    """Return the folder that TMPDIR names; else /var/tmp, which is on a disk where /tmp may be in memory."""
    usual = Path("/var/tmp")
    named = any(os.environ.get(name) for name in ("TMPDIR", "TEMP", "TMP"))
    return usual if not named and os.access(usual, os.W_OK) else Path(tempfile.gettempdir())
