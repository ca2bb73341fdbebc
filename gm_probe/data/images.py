"""Image files: decoded by Pillow into uint8, all at once or as they are taken.

Pixels count as torchvision's ImageFolder takes them: the first frame of an animation, alpha dropped, an EXIF rotation
and a colour profile not applied.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from copy import copy
from dataclasses import replace
from functools import cache, cached_property, partial
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from gm_probe.data.decoded import Decoded
from gm_probe.data.fields import Fields, tensors_of
from gm_probe.data.image_reading import MAX_PIXELS, ImageReading
from gm_probe.errors import DataError, first_line

FORMATS = ("JPEG", "PNG", "BMP", "PPM", "WEBP", "TIFF", "GIF", "AVIF", "JPEG2000")
"""What Pillow may take any file for, whatever its name says: never EPS, which it would hand to Ghostscript."""
NAMED_FORMATS = ("TGA", "DIB", "PCX", "DDS", "QOI", "SGI", "SUN", "MSP", "XBM", "XPM", "PSD")
"""What Pillow may take a file for whose suffix says so: garbage passes for some of these.

Icons and FITS are not among them: they may unpack to far more pixels than they claim.
"""
IN_MEMORY = 2**30
"""Bytes up to which decoded images are kept in memory; more are kept on disk (data.decoded)."""
T = TypeVar("T")
BLOCK = 1000  # images that are handled at once, so that a pass over all does not fill the memory
HEADERS = 1000
"""Number of headers that are read when a folder is opened: those of millions would take minutes."""
DEEP = 16
"""Number of 16-bit images that are decoded to see which of the bits are used."""


@cache
def suffixes() -> dict[str, str]:
    """Return every suffix of an image that is read, in lower case, and the format that Pillow has registered for it."""
    formats = {*FORMATS, *NAMED_FORMATS, "MPO"}  # an MPO file is opened as the JPEG that it begins with
    return {suffix: name for suffix, name in Image.registered_extensions().items() if name in formats}


@cache
def _formats(suffix: str) -> tuple[str, ...]:
    """Return what Pillow may take a file of this suffix for; an older or a smaller Pillow knows fewer formats."""
    by_name = suffixes().get(suffix)
    return tuple(
        name for name in (*FORMATS, *NAMED_FORMATS) if name in Image.OPEN and name in {*FORMATS, by_name}
    )


class Header(NamedTuple):
    """What a file says of its image, whose pixels are not decoded."""

    height: int
    width: int
    grey: bool
    deep: bool  # 16 bits a pixel and channel


class ImageFiles:
    """Images of one shape in files, as a read-only (N, C, H, W) uint8 tensor that is decoded where it is indexed.

    Those that ``in_memory`` found too large are decoded once: they, and what is selected from them, share a file.

    Only some headers are read at first. A broken file, or one of another size, is named when it is taken.

    Raises:
        DataError: no header can be read, or images of 16 bits use the lower ones alone.
    """

    dtype = torch.uint8

    def __init__(self, files: Sequence[Path], reading: ImageReading | None = None) -> None:
        self.files = tuple(files)
        reading = reading or ImageReading()
        seen = _evenly(self.files, HEADERS)
        read = _in_threads(_header_or_none, seen)
        headers = [(file, header) for file, header in zip(seen, read, strict=True) if header is not None]
        if not headers:
            headers = [(self.files[0], _header(self.files[0]))]  # raises an error that says what is wrong
        _require_full_range([file for file, header in headers if header.deep])
        channels = reading.channels
        if channels is None:
            grey = all(header.grey for _, header in headers) and _all_grey(self.files, set(seen))
            channels = 1 if grey else 3
        self._first, first = headers[0]
        self._reading = replace(reading, channels=channels)
        self._size = reading.size_of(first.height, first.width)
        uneven = [f"{file} ({h.width}×{h.height})" for file, h in headers if h.width != h.height]
        self.distorted = uneven[0] if reading.image_size and uneven else None
        """An image whose aspect ratio changes, with its size, if there is one."""
        self._agree = False  # whether all sizes are known to be the first's
        self._disk: Decoded | None = None
        self._numbers = np.arange(len(self.files))  # of these images, on the disk

    @property
    def not_kept(self) -> str:
        """Why images are decoded anew at every pass, in a sentence; empty where they are not."""
        if self._disk is None or not self._disk.lacking:
            return ""
        return (
            f"images beyond {IN_MEMORY / 2**30:g} GiB are decoded anew at every pass, because they cannot be kept on "
            f"disk ({self._disk.lacking}). Set TMPDIR to a folder with more room"
        )

    @property
    def shape(self) -> torch.Size:
        return torch.Size((len(self.files), self._reading.channels or 3, *self._size))

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
        if "_decoded" in vars(self):
            return self._decoded[key]
        places = np.arange(len(self))[key if isinstance(key, slice) else key.numpy()]
        if self._disk is None:
            return torch.from_numpy(self._decode(places))
        return torch.from_numpy(
            self._disk.taken(self._numbers[places], lambda some: self._decode(places[some]))
        )

    def _decode(self, places: np.ndarray) -> np.ndarray:
        """Decode the images at ``places`` (n,) to (n, C, H, W)."""
        files = [self.files[place] for place in places.tolist()]
        # no filter of warnings, which would hold for the process: this may run in a thread beside the caller's
        with ThreadPoolExecutor() as pool:
            arrays = list(pool.map(partial(decode, reading=self._reading), files))
        for file, array in zip(files, arrays, strict=True):
            self._require_size(file, array.shape[:2])
        images = np.stack(arrays)
        return images[:, None] if images.ndim == 3 else np.ascontiguousarray(images.transpose(0, 3, 1, 2))

    def select(self, indices: Tensor) -> Tensor | ImageFiles:
        """Return the images at ``indices``; they stay in their files unless all are decoded."""
        if "_decoded" in vars(self):
            return self._decoded[indices]
        other = copy(self)
        other.files = tuple(self.files[i] for i in indices.tolist())
        other._numbers = self._numbers[indices.numpy()]
        return other

    def in_memory(self) -> Tensor | ImageFiles:
        """Decode all images, once, if they fit into memory; if not, return these, which are kept on disk once decoded.

        All sizes are then known to agree.

        Raises:
            DataError: a file is no image, too large, or of another size than the first.
        """
        if len(self) * self.shape[1:].numel() <= IN_MEMORY:
            return self._decoded
        if not self._agree:
            for file, header in zip(self.files, _in_threads(_header, self.files), strict=True):
                self._require_size(file, self._reading.size_of(header.height, header.width))
            self._agree = True
        if self._disk is None or self._disk.lacking:  # there may be room for a selection
            self._disk, self._numbers = Decoded(len(self), self.shape[1:]), np.arange(len(self))
        return self

    @cached_property
    def _decoded(self) -> Tensor:
        with warnings.catch_warnings(action="ignore"):
            return self[:]

    def with_channels(self, channels: int) -> ImageFiles:
        """Return the same images as grey or RGB."""
        other = copy(self)
        other._reading, other._disk = replace(self._reading, channels=channels), None
        vars(other).pop("_decoded", None)
        return other

    def _require_size(self, file: Path, size: tuple[int, ...]) -> None:
        """Raise DataError where the (H, W) of ``file`` is another than the first's."""
        if tuple(size) != self._size:
            (height, width), (first_height, first_width) = size, self._size
            raise DataError(
                f"{file} is {width}×{height} but {self._first.name} is {first_width}×{first_height}; "
                "resize all with --image-size, or with --resize and --crop"
            )


def _evenly(files: Sequence[Path], count: int) -> list[Path]:
    """Return at most ``count`` of ``files`` at even distances, with the first and the last."""
    if len(files) <= count:
        return list(files)
    return [files[i * (len(files) - 1) // (count - 1)] for i in range(count)]


def _all_grey(files: Sequence[Path], seen: set[Path]) -> bool:
    """Return whether every image is grey whose file is not among the ``seen``; what is broken is none."""
    headers = (_header_or_none(file) for file in files if file not in seen)
    return all(header is None or header.grey for header in headers)


def _require_full_range(files: Sequence[Path]) -> None:
    """Raise DataError where no image of 16 bits uses the upper two: values of 12 or 14 bits would be all but black."""
    peaks = []
    for file in _evenly(files, DEEP):
        try:
            peaks.append(int(decode(file, ImageReading()).max()))
        except DataError:  # it is named when it is taken
            continue
        if peaks[-1] >= 64:  # the upper eight bits are used
            return
    if peaks:
        bits = 8 + max(peaks).bit_length()
        raise DataError(
            f"{files[0]} stores 16 bits a pixel, but no pixel of {len(peaks)} such image(s) uses more than "
            f"{bits} of them. Scale the pixels to 0–65535, or save them with 8 bits"
        )


def sound(files: Sequence[Path]) -> tuple[list[int], list[str]]:
    """Decode every file; return the positions of those that can be decoded, and the errors of the others."""

    def problem(file: Path) -> str | None:
        try:
            decode(file, ImageReading())
        except DataError as error:
            return str(error)
        return None

    problems = _in_threads(problem, files)
    return [i for i, text in enumerate(problems) if text is None], [
        text for text in problems if text is not None
    ]


def blocks(images: Tensor | ImageFiles) -> Iterator[Tensor]:
    """Yield ``images`` in their order, some at a time."""
    for start in range(0, len(images), BLOCK):
        yield images[start : start + BLOCK]


def contents(values: Tensor | ImageFiles) -> Iterator[bytes]:
    """Yield the bytes of ``values`` for a digest, some at a time; the bytes of named tensors with their names."""
    if isinstance(values, Fields):
        for name, value in tensors_of(values).items():
            yield str(name).encode()
            yield from contents(value)
        return
    for block in blocks(values):
        yield block.contiguous().numpy().tobytes()


def decoded_ahead(images: Tensor | ImageFiles, keys: Sequence[slice] | Sequence[Tensor]) -> Iterator[Tensor]:
    """Yield ``images[key]`` of every key; of files, the next ones are decoded while one is at work."""
    if isinstance(images, Tensor | Fields):
        yield from (images[key] for key in keys)
        return
    with ThreadPoolExecutor(1) as ahead:
        waiting = [ahead.submit(images.__getitem__, key) for key in keys[:1]]
        for index in range(1, len(keys) + 1):
            waiting += [ahead.submit(images.__getitem__, key) for key in keys[index : index + 1]]
            yield waiting.pop(0).result()


def _in_threads(function: Callable[[Path], T], files: Sequence[Path]) -> list[T]:
    # filters of warnings hold for all threads, so they are set once; our own limit on pixels follows
    with warnings.catch_warnings(action="ignore"), ThreadPoolExecutor() as pool:  # decoding releases the GIL
        return list(pool.map(function, files))


def _header(file: Path) -> Header:
    with _opened(file) as image:
        return Header(image.height, image.width, _is_grey(image), _has_16_bits(image))


def _header_or_none(file: Path) -> Header | None:
    try:
        return _header(file)
    except DataError:
        return None


def decode(file: Path, reading: ImageReading) -> np.ndarray:
    """Return (H, W) grey or (H, W, 3) RGB uint8.

    Raises:
        DataError: it is broken, too large, or has pixels of unknown range.
    """
    with _opened(file) as image:
        try:
            picture = image
            if _is_deep(image):  # Pillow's own conversion clips at 255 instead of scaling
                picture = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
            grey = reading.channels == 1 or (reading.channels is None and _is_grey(picture))
            picture = reading.shaped(picture.convert("L" if grey else "RGB"))
            return np.asarray(picture, dtype=np.uint8)
        except DataError as error:
            raise DataError(f"{file}: {error}") from error
        except Exception as error:  # Pillow raises many kinds on broken files (OSError, struct.error, ...)
            raise _broken(file, error) from error


def _opened(file: Path) -> Image.Image:
    try:
        regular = file.is_file()
    except OSError as error:  # its folder may be listed but not entered
        raise _broken(file, error) from error
    if not regular:  # opening a pipe would wait for ever
        raise DataError(f"cannot decode {file}: it is missing or not a regular file. Remove or replace it")
    try:
        image = Image.open(file, formats=_formats(file.suffix.lower()))
    except Exception as error:  # Pillow raises many kinds here, too
        raise _broken(file, error) from error
    if image.width * image.height > MAX_PIXELS:
        image.close()
        raise DataError(f"{file} claims {image.width}×{image.height} pixels; the limit is {MAX_PIXELS:,}")
    if image.mode in {"I", "F"} and not _is_deep(image):
        image.close()
        raise DataError(f"{file} has 32-bit pixels of unknown range; convert it to 8 or 16 bits")
    return image


def _is_grey(image: Image.Image) -> bool:
    return image.mode in {"L", "1"} or _is_deep(image)


def _is_deep(image: Image.Image) -> bool:
    """Return whether it is grey of 16 bits."""
    return image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PPM")


def _has_16_bits(image: Image.Image) -> bool:
    """Return whether its pixels have 16 bits a channel; of colours Pillow keeps the upper eight."""
    modes = [str(tile[3:]) for tile in getattr(image, "tile", ())]
    # BGR;16 has 5 or 6 bits a channel
    return _is_deep(image) or any(";16" in mode and "BGR;16" not in mode for mode in modes)


def _broken(file: Path, error: Exception) -> DataError:
    return DataError(f"cannot decode {file}: {first_line(error)}; remove or replace it")
