"""Folders of images: which files in them are read, and what is passed over."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from gm_probe.data.images import suffixes
from gm_probe.errors import DataError

KINDS = 20
"""The most suffixes that are counted separately; a folder may hold a million."""


class PassedOver(Counter[str]):
    """How many entries of a folder are not read, by what they are: ``.txt``, ``hidden``, ``folder notes`` and so on."""

    def note(self, kind: str, count: int = 1) -> None:
        """Count ``count`` entries of this kind."""
        if count:
            self[kind if kind in self or len(self) < KINDS else "other"] += count

    def __str__(self) -> str:
        return ", ".join(f"{count} × {kind}" for kind, count in self.most_common())


def images_below(path: Path, passed: PassedOver) -> Iterator[Path]:
    """Yield the images below ``path`` in sorted order, hidden folders left out; ``passed`` counts what is no image.

    Links are followed, and no folder is read twice.

    Raises:
        DataError: a folder cannot be read.
    """
    here, seen, waiting = path.resolve(), set(), [path]
    while waiting:
        folder = waiting.pop()
        real = folder.resolve()
        if real in seen or (real != here and here.is_relative_to(real)):  # a link to elsewhere, or back up
            passed.note("folder linked again")
            continue
        seen.add(real)
        images, subfolders = entries(folder, passed)
        yield from (folder / name for name in sorted(images))
        waiting += (folder / name for name in sorted(subfolders, reverse=True))


def entries(folder: Path, passed: PassedOver) -> tuple[list[str], list[str]]:
    """Return the names of the images and of the folders in ``folder``; ``passed`` counts the others.

    Raises:
        DataError: the folder cannot be read.
    """
    images, subfolders = [], []
    known = suffixes()
    try:
        with os.scandir(folder) as found:
            for entry in found:
                suffix = os.path.splitext(entry.name)[1].lower()  # noqa: PTH122  names by the million
                if entry.name.startswith("."):
                    passed.note("hidden")
                elif _is_folder(entry):
                    subfolders.append(entry.name)
                elif suffix in known:
                    images.append(entry.name)
                else:
                    passed.note(suffix or "no suffix")
    except OSError as error:
        raise unreadable(error) from error
    return images, subfolders


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a circle of links
        return False


def class_folders(path: Path) -> tuple[str, ...]:
    """Return the sorted names of the class folders in ``path``: not hidden, no links that lead back to ``path``.

    Raises:
        DataError: the folder cannot be read.
    """
    here = path.resolve()
    try:
        folders = [entry for entry in path.iterdir() if entry.is_dir() and not entry.name.startswith(".")]
        return tuple(sorted(entry.name for entry in folders if not here.is_relative_to(entry.resolve())))
    except OSError as error:
        raise unreadable(error) from error


def unreadable(error: OSError) -> DataError:
    """Return the error of a folder that cannot be listed."""
    return DataError(f"cannot read the folder {error.filename}: {error.strerror}")
