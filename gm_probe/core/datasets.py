"""Open labeled or unlabeled examples: image folders, array files, torchvision's data sets, bundled digits.

Images are kept as uint8, or decoded as they are taken where they are too many (core.images). Normalisation is not
applied here: it belongs to the checkpoint.
"""

from __future__ import annotations

import zipfile
from dataclasses import dataclass, replace
from functools import cached_property, partial
from hashlib import sha256
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from gm_probe.core.errors import CheckpointError, DataError, UsageError, did_you_mean, first_line
from gm_probe.core.files import default_data_root
from gm_probe.core.images import SUFFIXES, ImageFiles, contents, images_below, open_images, sound, unreadable
from gm_probe.core.pickles import load_torch

DESCRIPTIONS = {
    "digits": "1,797 handwritten digits of 8×8 that scikit-learn ships (bundled)",
    "cifar10": "CIFAR-10 by torchvision (--download, --data-root)",
    "cifar100": "CIFAR-100 by torchvision",
    "fashionmnist": "Fashion-MNIST by torchvision",
    "svhn": "SVHN by torchvision",
    "FOLDER": "images in class subfolders, or train/ and test/ (or val/) of such; unlabeled: any images below it",
    "FILE.npz": "arrays x (N, C, H, W) and, where labeled, y (N,); also .pt, and x alone as .npy",
}
"""What --data, --unlabeled and --labeled take."""
UNPACKED = 2**30
TEST_PARTS = ("test", "val", "valid", "validation")
"""What the test part beside ``train`` may be called; the first that is there counts."""


NUMPY_SUFFIXES, TORCH_SUFFIXES = (".npy", ".npz"), (".pt", ".pth")
"""Of array files."""
NUMPY_ZIP = (b"PK\x03\x04", b"PK\x05\x06")
"""Beginnings that numpy takes for an .npz."""


@dataclass(frozen=True)
class Examples:
    """Examples in memory, or images in files.

    Attributes:
        x: (N, C, H, W) uint8 images, or (N, ...) floats that are taken as they are. Index it to get a tensor.
        y: (N,) int64 class indices; None = unlabeled.
        classes: class names in index order; empty when unknown.
        source: where they came from, for messages and records.
        skipped: of the files there, those that could not be decoded and were asked to be left out: their errors.
    """

    x: Tensor | ImageFiles
    y: Tensor | None
    classes: tuple[str, ...]
    source: str
    skipped: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.x)

    def select(self, indices: Tensor) -> Examples:
        """The examples at ``indices`` (int64), in that order."""
        x = self.x[indices] if isinstance(self.x, Tensor) else self.x.select(indices)
        return replace(self, x=x, y=None if self.y is None else self.y[indices])

    @cached_property
    def digest(self) -> str:
        """SHA-256 of inputs and labels."""
        found = sha256()
        for values in (self.x,) if self.y is None else (self.x, self.y):
            for some in contents(values):
                found.update(some)
        return found.hexdigest()

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
    skip_bad: bool = False,
) -> Source:
    """Open ``name``: a folder, a .npz/.npy/.pt file, ``digits``, or one of ``DATASETS``.

    A folder that holds ``train`` and one of ``TEST_PARTS`` is opened as its two parts. ``labeled`` reads class
    subfolders as labels (sorted names = class indices); without it every image below counts, labels unread.

    Args:
        root: where torchvision's data sets are kept (default ``~/.cache/gm_probe``).
        download: let torchvision download what is missing.
        channels: 1 or 3 converts a folder's images to grey or RGB; None keeps grey only if all are.
        image_size: resize a folder's images to this many pixels a side.
        skip_bad: leave out images that cannot be decoded (``Examples.skipped``). All are decoded once more for it.

    Raises:
        DataError: a file is missing, broken, too large or of another size than the first, or two parts differ in
            their classes.
        UsageError: ``name`` is neither a path nor a known data set, or images of no folder are to be converted.
    """
    path = Path(name)
    known = name == "digits" or name in DATASETS
    if (channels or image_size or skip_bad) and (known or path.is_file()):
        raise UsageError(
            f"{name} is taken as it is; --image-size and --channels convert image folders only, and --skip-bad "
            "looks through them"
        )
    if name == "digits":
        pool = _digits()
        return Source(pool if labeled else pool.unlabeled(), None)
    if name in DATASETS:
        folder = root or default_data_root()
        parts = [_torchvision(name, folder, download, train) for train in (True, False)]
        if not labeled:
            parts = [part.unlabeled() for part in parts]
        return Source(*parts)
    if path.is_dir():
        read = partial(_folder, labeled=labeled, channels=channels, image_size=image_size, skip_bad=skip_bad)
        train = path / "train"
        try:
            others = [path / part for part in TEST_PARTS] if train.is_dir() else []
            test = next((part for part in others if part.is_dir()), None)
        except OSError as error:  # the parts it names were not given
            raise DataError(f"cannot read the folder {path}: {error.strerror}") from error
        if test is not None:
            return _two_parts(read(train), read(test))
        return Source(read(path), None)
    if path.is_file():
        pool = _array_file(path)
        return Source(pool if labeled else pool.unlabeled(), None)
    raise _no_source(name)


def require_source(name: str) -> None:
    """Raise UsageError where ``name`` is no known data set, nothing here, and no path to elsewhere; nothing is read."""
    elsewhere = Path(name).name != name  # maybe on the machine that will read it
    if name not in {"digits", *DATASETS} and not elsewhere and not Path(name).exists():
        raise _no_source(name)


def _no_source(name: str) -> UsageError:
    known = ["digits", *DATASETS]
    hint = did_you_mean(name, known, f"not one of {', '.join(known)} either")
    return UsageError(f"no folder or file {name!r}; {hint}")


def _two_parts(train: Examples, test: Examples) -> Source:
    """Parts whose classes have the same numbers and whose images have the same shape; grey only if both are."""
    if train.classes != test.classes:
        lists = [", ".join(part.classes[:20]) + ", …" * (len(part.classes) > 20) for part in (train, test)]
        odd = sorted(set(train.classes) ^ set(test.classes))
        raise DataError(
            f"{train.source} has the classes {lists[0]} but {test.source} has {lists[1]}: they differ in {odd[0]}; "
            "give both the same class folders"
        )
    shapes = [tuple(part.x.shape[2:]) for part in (train, test)]
    if shapes[0] != shapes[1]:
        sizes = [f"{width}×{height}" for height, width in shapes]
        raise DataError(
            f"{train.source} has images of {sizes[0]} but {test.source} of {sizes[1]}; resize all with --image-size"
        )
    channels = max(part.x.shape[1] for part in (train, test))
    return Source(*(replace(part, x=_with_channels(part.x, channels)) for part in (train, test)))


def _with_channels(x: Tensor | ImageFiles, channels: int) -> Tensor | ImageFiles:
    return x.expand(-1, channels, -1, -1).contiguous() if isinstance(x, Tensor) else x.with_channels(channels)


def _digits() -> Examples:
    # imported here: scikit-learn takes a second, and only the digits need it
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = torch.from_numpy(np.round(digits.images * (255 / 16)).astype(np.uint8)).unsqueeze(1)
    labels = torch.from_numpy(digits.target.astype(np.int64))
    return Examples(images, labels, tuple(str(name) for name in digits.target_names), "digits")


DATASETS = {"cifar10": "CIFAR10", "cifar100": "CIFAR100", "fashionmnist": "FashionMNIST", "svhn": "SVHN"}
"""Names, and torchvision's classes for them."""


def _torchvision(name: str, root: Path, download: bool, train: bool) -> Examples:
    # imported here: torchvision takes a second or two, and only its own data sets need it
    import torchvision

    part: dict[str, Any] = {"split": "train" if train else "test"} if name == "svhn" else {"train": train}
    try:
        data = getattr(torchvision.datasets, DATASETS[name])(root=str(root), download=download, **part)
    except RuntimeError as error:
        raise DataError(
            f"{name} is not (whole) in {root}: {first_line(error)}; add --download, or name its folder with "
            "--data-root"
        ) from error
    except Exception as error:  # torchvision's readers raise many kinds on a broken file
        raise DataError(f"cannot download or read {name} in {root}: {first_line(error)}") from error
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
        if path.suffix in NUMPY_SUFFIXES:
            with path.open("rb") as file:
                _check_packed(path, file)
                loaded = np.load(file, allow_pickle=False)
                arrays: Any = {"x": loaded} if isinstance(loaded, np.ndarray) else dict(loaded)
        elif path.suffix in TORCH_SUFFIXES:
            arrays = load_torch(path)
        else:
            raise UsageError(f"{path}: data files end in .npz, .npy or .pt")
    except (UsageError, DataError):
        raise
    except CheckpointError as error:
        raise DataError(str(error)) from error
    except Exception as error:  # numpy, zipfile and torch each raise their own kinds on a broken file
        raise DataError(f"cannot read {path}: {first_line(error)}") from error
    if isinstance(arrays, Tensor):
        arrays = {"x": arrays}
    if not isinstance(arrays, dict) or "x" not in arrays:
        found = ", ".join(map(repr, arrays)) if isinstance(arrays, dict) else type(arrays).__name__
        raise DataError(
            f"{path} has no array 'x' but {found or 'nothing'}; save images as x (N, C, H, W) and labels as y (N,)"
        )
    x = _tensor(path, "x", arrays["x"])
    if x.dim() < 2 or len(x) == 0:
        raise DataError(f"{path}: x has shape {tuple(x.shape)}; it must be (N, ...) with N ≥ 1")
    if x.dtype == torch.uint8 and x.dim() == 4 and x.shape[1] > 4 >= x.shape[3]:
        raise DataError(f"{path}: x {tuple(x.shape)} looks like (N, H, W, C); transpose it to (N, C, H, W)")
    if x.dtype in {torch.uint16, torch.uint32, torch.uint64}:  # torch computes with none of them
        raise DataError(f"{path}: x is {x.dtype}; save pixels as uint8 or floats, and token ids as int64")
    if x.is_floating_point() and not bool(torch.isfinite(x).all()):
        raise DataError(f"{path}: x holds NaN or infinite values")
    y = None if arrays.get("y") is None else _tensor(path, "y", arrays["y"])
    if y is not None:
        if y.shape != (len(x),) or y.is_floating_point() or bool((y.to(torch.int64) < 0).any()):
            raise DataError(f"{path}: y must be {len(x)} class indices ≥ 0, got {y.dtype} {tuple(y.shape)}")
        y = y.to(torch.int64)
    return Examples(x, y, (), str(path))


def _tensor(path: Path, name: str, value: Any) -> Tensor:
    if isinstance(value, Tensor) and value.is_nested:
        raise DataError(f"{path}: {name} is a nested tensor; it must be one array")
    try:
        # by the class: on a tensor a file may have set an attribute that hides a method; this leaves them behind
        tensor = Tensor.detach(torch.as_tensor(value))
    except (TypeError, ValueError, RuntimeError) as error:  # text, records, foreign byte order
        raise DataError(f"{path}: {name} is no array of numbers: {first_line(error)}") from error
    if tensor.is_meta or tensor.layout != torch.strided or tensor.is_quantized or tensor.is_complex():
        raise DataError(f"{path}: {name} must hold plain real numbers, got {tensor.dtype} on {tensor.device}")
    if tensor.numel() * tensor.element_size() > max(tensor.untyped_storage().nbytes(), 2**20):
        raise DataError(f"{path}: {name} claims {tensor.numel():,} values but the file holds fewer")
    if tensor.is_floating_point() and tensor.element_size() == 1:  # narrow floats lack most operations
        try:
            return tensor.float()
        except NotImplementedError as error:
            raise DataError(
                f"{path}: {name} is {tensor.dtype}, which torch cannot convert to float32"
            ) from error
    return tensor


def _check_packed(path: Path, file: BinaryIO) -> None:
    """Refuse arrays that are packed hundredfold and unpack to more than images do in memory (core.images).

    Whether they are packed the ``file`` at ``path`` itself says, by which numpy goes, and not its suffix.
    """
    packed = file.read(4) in NUMPY_ZIP
    file.seek(0)
    if packed:
        with zipfile.ZipFile(file) as archive:
            size, total = path.stat().st_size, sum(entry.file_size for entry in archive.infolist())
        if total > max(100 * size, UNPACKED):
            raise DataError(f"{path} would unpack to {total:,} bytes from {size:,}; save it with np.savez")
        file.seek(0)


def _folder(
    path: Path, *, labeled: bool, channels: int | None, image_size: int | None, skip_bad: bool
) -> Examples:
    if labeled:
        names = _class_names(path)
        if not names:
            raise DataError(f"{path} has no class subfolders; give unlabeled images with --unlabeled")
        # a class may well be called train (CIFAR-100 has it); class folders in it make it a part
        for name in names:
            if name in {"train", *TEST_PARTS} and _class_names(path / name):
                raise DataError(
                    f"{path / name} is a part with class folders, not a class; give {path / name}"
                )
        files = [(file, index) for index, name in enumerate(names) for file in images_below(path / name)]
    else:
        names = ()
        files = [(file, -1) for file in images_below(path)]
    if not files:
        raise DataError(f"{path} holds no images (of {', '.join(sorted(SUFFIXES))})")
    skipped: list[str] = []
    if skip_bad:
        kept, skipped = sound([file for file, _ in files])
        if not kept:
            raise DataError(f"{path}: none of {len(files)} images can be decoded; the first: {skipped[0]}")
        files = [files[index] for index in kept]
    empty = set(range(len(names))) - {index for _, index in files}
    if empty:
        raise DataError(f"{path / names[min(empty)]} holds no images; remove the folder or fill it")
    images = open_images([file for file, _ in files], channels, image_size)
    labels = torch.tensor([index for _, index in files], dtype=torch.int64) if labeled else None
    return Examples(images, labels, names, str(path), tuple(skipped))


def _class_names(path: Path) -> tuple[str, ...]:
    """Sorted names of the class folders in ``path``: not hidden, no links that lead back to ``path``."""
    here = path.resolve()
    try:
        folders = [entry for entry in path.iterdir() if entry.is_dir() and not entry.name.startswith(".")]
        return tuple(sorted(entry.name for entry in folders if not here.is_relative_to(entry.resolve())))
    except OSError as error:
        raise unreadable(error) from error
