"""Open labeled or unlabeled examples: image folders, array files, torchvision's data sets, bundled digits.

Images are decoded once and kept as uint8. Normalisation is not applied here: it belongs to the checkpoint.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision
from PIL import Image
from torch import Tensor

from gm_probe.core.errors import DataError, UsageError

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".ppm", ".pgm", ".webp", ".tif", ".tiff", ".gif"})
MAX_PIXELS = 64_000_000
"""Images with more pixels are refused before they are decoded (decompression bombs)."""


@dataclass(frozen=True)
class Examples:
    """Examples in memory.

    Attributes:
        x: (N, C, H, W) uint8 images, or (N, ...) floats that are taken as they are.
        y: (N,) int64 class indices; None = unlabeled.
        classes: class names in index order; empty when unknown.
        source: where they came from, for messages and records.
    """

    x: Tensor
    y: Tensor | None
    classes: tuple[str, ...]
    source: str

    def __len__(self) -> int:
        return len(self.x)

    def select(self, indices: Tensor) -> Examples:
        """The examples at ``indices`` (int64), in that order."""
        return replace(self, x=self.x[indices], y=None if self.y is None else self.y[indices])

    def unlabeled(self) -> Examples:
        """The same examples without their labels."""
        return replace(self, y=None)

    def subset(self, size: int | None, seed: int) -> Examples:
        """A seeded random subset of ``size`` examples, never the first ones of a sorted folder."""
        if size is None or size >= len(self):
            return self
        order = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed))
        return self.select(order[:size].sort().values)

    @property
    def num_classes(self) -> int:
        """Number of classes.

        Raises:
            DataError: the examples carry no labels.
        """
        if self.y is None:
            raise DataError(f"{self.source} has no labels; give class subfolders or an array file with 'y'")
        return len(self.classes) or int(self.y.max()) + 1


@dataclass(frozen=True)
class Source:
    """A data set as opened: ``pool`` to train on or measure over, ``test`` where it has a part of its own."""

    pool: Examples
    test: Examples | None


def open_source(
    name: str,
    *,
    labeled: bool,
    root: Path | None = None,
    download: bool = False,
    channels: int | None = None,
    image_size: int | None = None,
) -> Source:
    """Open ``name``: a folder, a .npz/.npy/.pt file, ``digits``, or one of ``DATASETS``.

    A folder that holds ``train`` and ``test`` is opened as its two parts. ``labeled`` reads class subfolders
    as labels (sorted names = class indices); without it every image below the folder counts, labels unread.

    Args:
        root: where torchvision's data sets are kept (default ``~/.cache/gm_probe``).
        download: let torchvision download what is missing.
        channels: 1 or 3 converts images to grey or RGB; None keeps grey only if all are.
        image_size: resize images to this many pixels a side.

    Raises:
        DataError: a file is missing, broken, too large or of another size than the first.
        UsageError: ``name`` is neither a path nor a known data set.
    """
    if name == "digits":
        pool = _digits()
        return Source(pool if labeled else pool.unlabeled(), None)
    if name in DATASETS:
        folder = root or Path.home() / ".cache" / "gm_probe"
        parts = [_torchvision(name, folder, download, train) for train in (True, False)]
        if not labeled:
            parts = [part.unlabeled() for part in parts]
        return Source(*parts)
    path = Path(name)
    if path.is_dir():
        read = partial(_folder, labeled=labeled, channels=channels, image_size=image_size)
        train, test = path / "train", path / "test"
        if labeled and train.is_dir() and test.is_dir():
            return Source(read(train), read(test))
        return Source(read(path), None)
    if path.is_file():
        pool = _array_file(path)
        return Source(pool if labeled else pool.unlabeled(), None)
    raise UsageError(
        f"no data at {name!r}: not a folder or file, and not one of {', '.join(['digits', *DATASETS])}"
    )


def _digits() -> Examples:
    # imported here: scikit-learn takes a second, and only the digits need it
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = torch.from_numpy(np.round(digits.images * (255 / 16)).astype(np.uint8)).unsqueeze(1)
    labels = torch.from_numpy(digits.target.astype(np.int64))
    return Examples(images, labels, tuple(str(name) for name in digits.target_names), "digits")


DATASETS: dict[str, Callable[..., Any]] = {
    "cifar10": torchvision.datasets.CIFAR10,
    "cifar100": torchvision.datasets.CIFAR100,
    "fashionmnist": torchvision.datasets.FashionMNIST,
    "svhn": torchvision.datasets.SVHN,
}


def _torchvision(name: str, root: Path, download: bool, train: bool) -> Examples:
    part: dict[str, Any] = {"split": "train" if train else "test"} if name == "svhn" else {"train": train}
    try:
        data = DATASETS[name](root=str(root), download=download, **part)
    except RuntimeError as error:
        raise DataError(
            f"{name} is not (whole) in {root}: {error}; add --download, or name its folder with --data-root"
        ) from error
    except OSError as error:
        raise DataError(f"cannot download or read {name} in {root}: {error}") from error
    images = torch.as_tensor(data.data)
    if name == "fashionmnist":
        images = images.unsqueeze(1)
    elif name != "svhn":
        images = images.permute(0, 3, 1, 2).contiguous()
    labels = torch.as_tensor(np.asarray(data.labels if name == "svhn" else data.targets), dtype=torch.int64)
    classes = tuple(getattr(data, "classes", None) or (str(index) for index in range(10)))
    return Examples(images, labels, classes, name)


def _array_file(path: Path) -> Examples:
    """Arrays ``x`` and optionally ``y`` of a .npz or .pt, or ``x`` alone as .npy."""
    try:
        if path.suffix == ".npy":
            arrays: Any = {"x": np.load(path, allow_pickle=False)}
        elif path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as file:
                arrays = dict(file)
        elif path.suffix in {".pt", ".pth"}:
            arrays = torch.load(path, map_location="cpu", weights_only=True)
        else:
            raise UsageError(f"{path}: data files end in .npz, .npy or .pt")
    except UsageError:
        raise
    except Exception as error:  # numpy, zipfile and torch each raise their own kinds on a broken file
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise DataError(f"cannot read {path}: {first}") from error
    if isinstance(arrays, Tensor):
        arrays = {"x": arrays}
    if not isinstance(arrays, dict) or "x" not in arrays:
        raise DataError(f"{path} has no array 'x'; save images as x (N, C, H, W) and labels as y (N,)")
    x = torch.as_tensor(arrays["x"])
    y = torch.as_tensor(arrays["y"]) if "y" in arrays else None
    if x.dim() < 2 or len(x) == 0:
        raise DataError(f"{path}: x has shape {tuple(x.shape)}; it must be (N, ...) with N ≥ 1")
    if y is not None:
        if y.shape != (len(x),) or y.is_floating_point() or bool((y < 0).any()):
            raise DataError(f"{path}: y must be {len(x)} class indices ≥ 0, got {y.dtype} {tuple(y.shape)}")
        y = y.to(torch.int64)
    if x.is_floating_point() and not bool(torch.isfinite(x).all()):
        raise DataError(f"{path}: x holds NaN or infinite values")
    return Examples(x, y, (), str(path))


def _folder(path: Path, *, labeled: bool, channels: int | None, image_size: int | None) -> Examples:
    if labeled:
        names = tuple(sorted(entry.name for entry in path.iterdir() if entry.is_dir()))
        if not names:
            raise DataError(f"{path} has no class subfolders; give unlabeled images with --unlabeled")
        files = [(file, index) for index, name in enumerate(names) for file in _images_below(path / name)]
    else:
        names = ()
        files = [(file, -1) for file in _images_below(path)]
    if not files:
        raise DataError(f"{path} holds no images (of {', '.join(sorted(IMAGE_SUFFIXES))})")
    empty = set(range(len(names))) - {index for _, index in files}
    if empty:
        raise DataError(f"{path / names[min(empty)]} holds no images; remove the folder or fill it")
    with ThreadPoolExecutor() as pool:  # Pillow releases the GIL while it decodes
        arrays = list(pool.map(partial(_decode, channels=channels, size=image_size), (f for f, _ in files)))
    if channels is None and any(array.ndim == 3 for array in arrays):
        arrays = [a if a.ndim == 3 else np.repeat(a[..., None], 3, axis=2) for a in arrays]
    for (file, _), array in zip(files, arrays, strict=True):
        if array.shape != arrays[0].shape:
            raise DataError(
                f"{file} is {array.shape[1]}×{array.shape[0]} but {files[0][0].name} is "
                f"{arrays[0].shape[1]}×{arrays[0].shape[0]}; resize all with --image-size"
            )
    images = torch.from_numpy(np.stack(arrays))
    images = images.unsqueeze(1) if images.dim() == 3 else images.permute(0, 3, 1, 2).contiguous()
    labels = torch.tensor([index for _, index in files], dtype=torch.int64) if labeled else None
    return Examples(images, labels, names, str(path))


def _images_below(path: Path) -> Iterator[Path]:
    """Images below ``path`` in sorted order, links to folders not followed (they may loop)."""
    for folder, subfolders, names in os.walk(path):
        subfolders.sort()
        for name in sorted(names):
            if not name.startswith(".") and Path(name).suffix.lower() in IMAGE_SUFFIXES:
                yield Path(folder) / name


def _decode(file: Path, channels: int | None, size: int | None) -> np.ndarray:
    """(H, W) grey or (H, W, 3) RGB uint8."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # our own cap follows
            with Image.open(file) as image:
                if image.width * image.height > MAX_PIXELS:
                    raise DataError(f"{file} claims {image.width}×{image.height} pixels; the cap is {MAX_PIXELS:,}")
                grey = channels == 1 or (channels is None and image.mode in {"L", "1"})
                converted = image.convert("L" if grey else "RGB")
                if size is not None:
                    converted = converted.resize((size, size), Image.Resampling.BILINEAR)
                return np.asarray(converted, dtype=np.uint8)
    except DataError:
        raise
    except Exception as error:  # Pillow raises many kinds on broken files (OSError, SyntaxError, struct.error, ...)
        raise DataError(f"cannot decode {file}: {error}; remove or replace it") from error
