"""Image files: found in folders, decoded by Pillow into uint8, all at once or as they are taken.

Pixels count as torchvision's ImageFolder takes them: the first frame of an animation, alpha dropped, an EXIF rotation
and a colour profile not applied.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from gm_probe.core.errors import DataError, first_line
from gm_probe.core.fields import Fields, tensors_of

SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".ppm", ".pgm", ".webp", ".tif", ".tiff", ".gif"})
FORMATS = ("JPEG", "PNG", "BMP", "PPM", "WEBP", "TIFF", "GIF")
"""What Pillow may take a file for, whatever its name says: never EPS, which it would hand to Ghostscript."""
MAX_PIXELS = 64_000_000
"""Images with more pixels are refused before they are decoded (decompression bombs)."""
IN_MEMORY = 2**30
"""Bytes up to which decoded images are kept; more are decoded again whenever they are taken."""
T = TypeVar("T")
BLOCK = 1000  # images handled at a time where a pass over all must not fill the memory


class ImageFiles:
    """Images of one shape in files, as a read-only (N, C, H, W) uint8 tensor that is decoded where it is indexed.

    Args:
        channels: 1 or 3 converts to grey or RGB; None keeps grey only if all are.
        image_size: resizes to this many pixels a side.

    Raises:
        DataError: a file is no image, too large, or of another size than the first.
    """

    dtype = torch.uint8

    def __init__(self, files: Sequence[Path], channels: int | None, image_size: int | None) -> None:
        self.files, self._image_size = tuple(files), image_size
        headers = _in_threads(_header, self.files)
        sizes = [(image_size, image_size) if image_size else size for size, _ in headers]
        for file, size in zip(self.files, sizes, strict=True):
            _require_equal(file, size, self.files[0], sizes[0])
        grey = channels == 1 or (channels is None and all(grey for _, grey in headers))
        self._frame = (1 if grey else 3, *sizes[0])  # (C, H, W)

    @property
    def shape(self) -> torch.Size:
        return torch.Size((len(self.files), *self._frame))

    def __len__(self) -> int:
        return len(self.files)

    def dim(self) -> int:
        return 4

    def is_floating_point(self) -> bool:
        return False

    def __getitem__(self, key: slice | Tensor) -> Tensor:
        """Decode the images of a slice, or at (n,) positions.

        Raises:
            DataError: one cannot be decoded.
        """
        files = self.files[key] if isinstance(key, slice) else [self.files[i] for i in key.tolist()]
        function = partial(decode, channels=self._frame[0], size=self._image_size)
        # no filter of warnings, which are the process's: this may run in a thread beside the caller's
        with ThreadPoolExecutor() as pool:
            return _stacked(files, list(pool.map(function, files)), self._frame[1:])

    def select(self, indices: Tensor) -> Tensor | ImageFiles:
        """Those at ``indices``: decoded, where they fit into memory."""
        if len(indices) * self._bytes_an_image <= IN_MEMORY:
            return self[indices]
        return self._like(tuple(self.files[i] for i in indices.tolist()), self._frame)

    def with_channels(self, channels: int) -> ImageFiles:
        """The same as grey or RGB."""
        return self._like(self.files, (channels, *self._frame[1:]))

    @property
    def _bytes_an_image(self) -> int:
        channels, height, width = self._frame
        return channels * height * width

    def _like(self, files: tuple[Path, ...], frame: tuple[int, int, int]) -> ImageFiles:
        other = object.__new__(ImageFiles)  # the headers are read
        other.files, other._image_size, other._frame = files, self._image_size, frame
        return other


def open_images(files: Sequence[Path], channels: int | None, image_size: int | None) -> Tensor | ImageFiles:
    """(N, C, H, W) uint8 of ``files`` (one at least): decoded where they fit into memory.

    Raises:
        DataError: as ``ImageFiles``, or a file that cannot be decoded.
    """
    [((height, width), _)] = _in_threads(_header, files[:1])
    pixels = image_size * image_size if image_size else height * width
    if len(files) * (channels or 3) * pixels <= IN_MEMORY:
        return decode_all(files, channels, image_size)
    return ImageFiles(files, channels, image_size)


def sound(files: Sequence[Path]) -> tuple[list[int], list[str]]:
    """Positions of the files that can be decoded, and the errors of the others: each is decoded once to know."""

    def problem(file: Path) -> str | None:
        try:
            decode(file, None, None)
        except DataError as error:
            return str(error)
        return None

    problems = _in_threads(problem, files)
    return [i for i, text in enumerate(problems) if text is None], [
        text for text in problems if text is not None
    ]


def decode_all(files: Sequence[Path], channels: int | None, image_size: int | None) -> Tensor:
    """(N, C, H, W) uint8; see ``ImageFiles``."""
    arrays = _in_threads(partial(decode, channels=channels, size=image_size), files)
    if channels is None and any(array.ndim == 3 for array in arrays):
        arrays = [a if a.ndim == 3 else np.repeat(a[..., None], 3, axis=2) for a in arrays]
    return _stacked(files, arrays, arrays[0].shape[:2])


def _stacked(files: Sequence[Path], arrays: Sequence[np.ndarray], size: tuple[int, ...]) -> Tensor:
    """(N, C, H, W) of (H, W) or (H, W, C) arrays, all of this (H, W)."""
    for file, array in zip(files, arrays, strict=True):
        _require_equal(file, array.shape[:2], files[0], size)
    images = torch.from_numpy(np.stack(arrays))
    return images.unsqueeze(1) if images.dim() == 3 else images.permute(0, 3, 1, 2).contiguous()


def blocks(images: Tensor | ImageFiles) -> Iterator[Tensor]:
    """``images`` in their order, some at a time."""
    for start in range(0, len(images), BLOCK):
        yield images[start : start + BLOCK]


def contents(values: Tensor | ImageFiles) -> Iterator[bytes]:
    """What ``values`` hold, for a digest: their bytes in order, some at a time; of several tensors with their names."""
    if isinstance(values, Fields):
        for name, value in tensors_of(values).items():
            yield str(name).encode()
            yield from contents(value)
        return
    for block in blocks(values):
        yield block.contiguous().numpy().tobytes()


def taken(images: Tensor | ImageFiles, keys: Sequence[slice] | Sequence[Tensor]) -> Iterator[Tensor]:
    """``images[key]`` of every key; of files, the next ones are decoded while one is at work."""
    if isinstance(images, Tensor | Fields):
        yield from (images[key] for key in keys)
        return
    with ThreadPoolExecutor(1) as ahead:
        waiting = [ahead.submit(images.__getitem__, key) for key in keys[:1]]
        for index in range(1, len(keys) + 1):
            waiting += [ahead.submit(images.__getitem__, key) for key in keys[index : index + 1]]
            yield waiting.pop(0).result()


def images_below(path: Path) -> Iterator[Path]:
    """Images below ``path`` in sorted order, hidden folders left out; links are followed, no folder is read twice."""
    here, seen, waiting = path.resolve(), set(), [path]
    while waiting:
        folder = waiting.pop()
        real = folder.resolve()
        if real in seen or (real != here and here.is_relative_to(real)):  # a link to elsewhere, or back up
            continue
        seen.add(real)
        images, subfolders = _entries(folder)
        yield from (folder / name for name in sorted(images))
        waiting += (folder / name for name in sorted(subfolders, reverse=True))


def _entries(folder: Path) -> tuple[list[str], list[str]]:
    """Names of the images and of the folders in ``folder``, the hidden ones left out; of others nothing is kept."""
    images, subfolders = [], []
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                if _is_folder(entry):
                    subfolders.append(entry.name)
                elif os.path.splitext(entry.name)[1].lower() in SUFFIXES:  # noqa: PTH122  names by the million
                    images.append(entry.name)
    except OSError as error:
        raise unreadable(error) from error
    return images, subfolders


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link that leads round in a circle
        return False


def unreadable(error: OSError) -> DataError:
    return DataError(f"cannot read the folder {error.filename}: {error.strerror}")


def _in_threads(function: Callable[[Path], T], files: Sequence[Path]) -> list[T]:
    # warnings are silenced once for all threads (the filters are the process's); our own cap follows
    with warnings.catch_warnings(action="ignore"), ThreadPoolExecutor() as pool:  # decoding releases the GIL
        return list(pool.map(function, files))


def _require_equal(file: Path, size: tuple[int, ...], first: Path, expected: tuple[int, ...]) -> None:
    """Raise DataError where the (H, W) of ``file`` is another than the first's."""
    if tuple(size) != tuple(expected):
        raise DataError(
            f"{file} is {size[1]}×{size[0]} but {first.name} is {expected[1]}×{expected[0]}; "
            "resize all with --image-size"
        )


def _header(file: Path) -> tuple[tuple[int, int], bool]:
    """(H, W), and whether the image is grey; its pixels are not decoded."""
    with _opened(file) as image:
        return (image.height, image.width), _is_grey(image)


def decode(file: Path, channels: int | None, size: int | None) -> np.ndarray:
    """(H, W) grey or (H, W, 3) RGB uint8.

    Raises:
        DataError: it is broken, too large, or has pixels of unknown range.
    """
    with _opened(file) as image:
        try:
            picture = image
            if _is_deep(image):  # Pillow's own conversion clips at 255 instead of scaling
                picture = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
            grey = channels == 1 or (channels is None and _is_grey(picture))
            picture = picture.convert("L" if grey else "RGB")
            if size is not None:
                picture = picture.resize((size, size), Image.Resampling.BILINEAR)
            return np.asarray(picture, dtype=np.uint8)
        except Exception as error:  # Pillow raises many kinds on broken files (OSError, struct.error, ...)
            raise _broken(file, error) from error


def _opened(file: Path) -> Image.Image:
    try:
        regular = file.is_file()
    except OSError as error:  # its folder may be listed but not entered
        raise _broken(file, error) from error
    if not regular:  # opening a pipe would wait for ever
        raise DataError(f"cannot decode {file}: it is gone, or no regular file; remove or replace it")
    try:
        image = Image.open(file, formats=FORMATS)
    except Exception as error:  # likewise
        raise _broken(file, error) from error
    if image.width * image.height > MAX_PIXELS:
        image.close()
        raise DataError(f"{file} claims {image.width}×{image.height} pixels; the cap is {MAX_PIXELS:,}")
    if image.mode in {"I", "F"} and not _is_deep(image):
        image.close()
        raise DataError(f"{file} has 32-bit pixels of unknown range; convert it to 8 or 16 bits")
    return image


def _is_grey(image: Image.Image) -> bool:
    return image.mode in {"L", "1"} or _is_deep(image)


def _is_deep(image: Image.Image) -> bool:
    """Whether it is grey of 16 bits."""
    return image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PPM")


def _broken(file: Path, error: Exception) -> DataError:
    return DataError(f"cannot decode {file}: {first_line(error)}; remove or replace it")
