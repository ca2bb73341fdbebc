"""Open labeled or unlabeled examples: image folders, array files, torchvision's data sets, bundled digits.

Images are kept as uint8, or decoded as they are taken where they are too many (data.images). Normalisation is not
applied here: it belongs to the checkpoint.
"""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from gm_probe.data.examples import Examples, Source
from gm_probe.data.folders import PassedOver, class_folders, entries, images_below
from gm_probe.data.image_reading import ImageReading
from gm_probe.data.images import ImageFiles, sound
from gm_probe.data.labels import as_labels
from gm_probe.data.names import DATASETS, default_data_root, unknown_data
from gm_probe.errors import CheckpointError, DataError, UsageError, first_line
from gm_probe.files.pickles import load_torch
from gm_probe.files.regular import open_to_read
from gm_probe.files.tensors import not_finite, unusable, widened

DESCRIPTIONS = {
    "digits": "1,797 handwritten digits of 8×8 from scikit-learn (bundled)",
    "cifar10": "CIFAR-10 by torchvision (--download, --data-root)",
    "cifar100": "CIFAR-100 by torchvision",
    "fashionmnist": "Fashion-MNIST by torchvision",
    "svhn": "SVHN by torchvision",
    "FOLDER": (
        "images in class subfolders, or in train/ and test/ (or val/) with class subfolders; "
        "unlabeled: any images below it"
    ),
    "FILE.npz": "arrays x (N, C, H, W) and, where labeled, y (N,); also .pt, and x alone as .npy",
}
"""What --data, --unlabeled and --labeled take."""
UNPACKED = 2**30
TEST_PARTS = ("test", "val", "valid", "validation")
"""What the test part beside ``train`` may be called; the first that is there counts."""


NUMPY_SUFFIXES, TORCH_SUFFIXES = (".npy", ".npz"), (".pt", ".pth")
"""Suffixes of array files."""
NUMPY_ZIP = (b"PK\x03\x04", b"PK\x05\x06")
"""First bytes by which numpy recognises an .npz."""


def open_source(
    name: str,
    *,
    labeled: bool,
    root: Path | None = None,
    download: bool = False,
    channels: int | None = None,
    image_size: int | None = None,
    resize: int | None = None,
    crop: int | None = None,
    skip_bad: bool = False,
    decode: bool = True,
) -> Source:
    """Open ``name``: a folder, a .npz/.npy/.pt file, ``digits``, or one of ``DATASETS``.

    A folder that holds ``train`` and one of ``TEST_PARTS`` is opened as its two parts. ``labeled`` reads class
    subfolders as labels (sorted names = class indices); without it every image below counts, labels unread.

    Args:
        root: where torchvision's data sets are kept (default ``~/.cache/gm_probe``).
        download: let torchvision download what is missing.
        channels: convert a folder's images to so many channels; see ``data.image_reading.ImageReading``.
        image_size: resize a folder's images to this many pixels a side.
        resize: make the shorter side of a folder's images this long.
        crop: then cut out so many central pixels a side.
        skip_bad: leave out images that cannot be decoded (``Examples.skipped``). All are decoded once more for it.
        decode: False leaves a folder's images in their files until they are taken (``Examples.subset``).

    Raises:
        DataError: a file is missing, broken, too large or of another size than the first, or two parts differ in
            their classes.
        UsageError: ``name`` is neither a path nor a known data set, or images of no folder are to be converted.
    """
    path = Path(name)
    reading = ImageReading(channels, image_size, resize, crop)
    known = name == "digits" or name in DATASETS
    if (reading != ImageReading() or skip_bad) and (known or path.is_file()):
        raise UsageError(
            f"{name} is not an image folder, and --image-size, --resize, --crop, --channels and --skip-bad "
            "apply to image folders only. Leave them out"
        )
    if path.is_dir() and not known:
        source = _folder_source(path, labeled, reading, skip_bad)
        return source.in_memory() if decode else source
    if name == "digits":
        source = Source(_digits(), None)
    elif name in DATASETS:
        folder = root or default_data_root()
        source = Source(*(_torchvision(name, folder, download, train) for train in (True, False)))
    elif path.is_file():
        source = Source(_array_file(path), None)
    else:
        raise unknown_data(name)
    return source if labeled else source.unlabeled()


def _folder_source(path: Path, labeled: bool, reading: ImageReading, skip_bad: bool) -> Source:
    """Return the two parts of a folder that has such, or all of it; its images are still in their files."""
    read = partial(_folder, labeled=labeled, reading=reading, skip_bad=skip_bad)
    train = path / "train"
    try:
        others = [path / part for part in TEST_PARTS] if train.is_dir() else []
        test = next((part for part in others if part.is_dir()), None)
    except OSError as error:  # the user did not name the part in the message
        raise DataError(f"cannot read the folder {path}: {error.strerror}") from error
    if test is None:
        return Source(read(path), None)
    beside = PassedOver()
    loose, folders = entries(path, beside)
    beside.note("image beside the parts", len(loose))
    for name in folders:
        if path / name not in {train, test}:
            beside.note(f"folder {name}")
    return _two_parts(read(train, beside=beside), read(test, beside=beside))


def _two_parts(train: Examples, test: Examples) -> Source:
    """Return both parts as one source, grey only if both are; DataError where classes or shapes differ."""
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
            f"{train.source} has images of {sizes[0]} but {test.source} of {sizes[1]}; resize all with --image-size, "
            "or with --resize and --crop"
        )
    channels = max(part.x.shape[1] for part in (train, test))
    return Source(*(replace(part, x=_with_channels(part.x, channels)) for part in (train, test)))


def _with_channels(x: Tensor | ImageFiles, channels: int) -> Tensor | ImageFiles:
    return x if isinstance(x, Tensor) or x.shape[1] == channels else x.with_channels(channels)


def _digits() -> Examples:
    # imported here: scikit-learn takes a second, and only the digits need it
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = torch.from_numpy(np.round(digits.images * (255 / 16)).astype(np.uint8)).unsqueeze(1)
    labels = torch.from_numpy(digits.target.astype(np.int64))
    return Examples(images, labels, tuple(str(name) for name in digits.target_names), "digits")


def _torchvision(name: str, root: Path, download: bool, train: bool) -> Examples:
    # imported here: torchvision takes a second or two, and only its own data sets need it
    import torchvision

    part: dict[str, Any] = {"split": "train" if train else "test"} if name == "svhn" else {"train": train}
    try:
        data = getattr(torchvision.datasets, DATASETS[name])(root=str(root), download=download, **part)
    except RuntimeError as error:
        raise DataError(
            f"{name} is missing or incomplete in {root}: {first_line(error)}. Add --download, or name its "
            "folder with --data-root"
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
    """Read ``x`` and optionally ``y`` of a .npz or .pt, or ``x`` alone as .npy."""
    try:
        if path.suffix in NUMPY_SUFFIXES:
            with open_to_read(path, follow=True) as file:
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
    if _channels_last(x):
        raise DataError(f"{path}: x {tuple(x.shape)} looks like (N, H, W, C). Transpose it to (N, C, H, W)")
    if x.dtype in {torch.uint16, torch.uint32, torch.uint64}:  # torch computes with none of them
        raise DataError(f"{path}: x is {x.dtype}; save pixels as uint8 or floats, and token ids as int64")
    if not_finite(x, mask=False):
        raise DataError(f"{path}: x holds NaN or infinite values")
    y = None if arrays.get("y") is None else _tensor(path, "y", arrays["y"])
    if y is not None:
        y = as_labels(y, len(x), f"{path}: y")
        if bool((y < 0).any()):
            raise DataError(
                f"{path}: y must be class indices ≥ 0, got {int(y.min())}. Leave out such examples"
            )
    return Examples(x, y, (), str(path))


def _channels_last(x: Tensor) -> bool:
    """Return whether ``x`` looks like (N, H, W, C), which a network that flattens its input takes without a word."""
    if x.dim() != 4 or not x.shape[1] > 4 >= x.shape[3]:
        return False
    return x.dtype == torch.uint8 or (x.shape[3] in {3, 4} and x.shape[2] > 4)


def _tensor(path: Path, name: str, value: Any) -> Tensor:
    try:
        # called on the class: a file may have set attributes on a tensor that hide its methods; detach drops them
        tensor = Tensor.detach(torch.as_tensor(value))
    except (TypeError, ValueError, RuntimeError) as error:  # text, records, foreign byte order
        raise DataError(f"{path}: {name} is not an array of numbers: {first_line(error)}") from error
    if problem := unusable(tensor):
        raise DataError(f"{path}: {name} {problem}")
    return widened(tensor)


def _check_packed(path: Path, file: BinaryIO) -> None:
    """Refuse arrays that are packed hundredfold and unpack to more than images do in memory (data.images).

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
    path: Path,
    *,
    labeled: bool,
    reading: ImageReading,
    skip_bad: bool,
    beside: Mapping[str, int] | None = None,
) -> Examples:
    """Return the images of ``path``, still in their files; ``beside`` counts what was passed over outside of it."""
    passed = PassedOver(beside or {})
    names = _class_names(path) if labeled else ()
    if labeled:
        files = [
            (file, index) for index, name in enumerate(names) for file in images_below(path / name, passed)
        ]
        loose, _ = entries(path, passed)
        passed.note("image outside the class folders", len(loose))
    else:
        files = [(file, -1) for file in images_below(path, passed)]
    if not files:
        raise DataError(f"{path} holds no readable images{f' ({passed})' if passed else ''}")
    skipped: list[str] = []
    if skip_bad:
        kept, skipped = sound([file for file, _ in files])
        if not kept:
            raise DataError(f"{path}: none of {len(files)} images can be decoded; the first: {skipped[0]}")
        files = [files[index] for index in kept]
    empty = set(range(len(names))) - {index for _, index in files}
    if empty:
        raise DataError(f"{path / names[min(empty)]} holds no images. Remove the folder or add images")
    images = ImageFiles([file for file, _ in files], reading)
    labels = torch.tensor([index for _, index in files], dtype=torch.int64) if labeled else None
    notes = _notes(path, passed, images.distorted, reading)
    return Examples(images, labels, names, str(path), tuple(skipped), dict(passed), notes)


def _notes(path: Path, passed: PassedOver, distorted: str | None, reading: ImageReading) -> tuple[str, ...]:
    notes = [f"{path}: these entries were skipped: {passed}"] if passed else []
    if distorted:
        size = reading.image_size
        notes.append(
            f"--image-size {size} changes the aspect ratio of images such as {distorted}; "
            f"--resize {size} --crop {size} keeps it"
        )
    return tuple(notes)


def _class_names(path: Path) -> tuple[str, ...]:
    """Return the sorted names of the class folders.

    Raises:
        DataError: there are none, or one of them is a part with class folders of its own.
    """
    names = class_folders(path)
    if not names:
        raise DataError(
            f"{path} has no class subfolders, so it holds no labels. Give a folder with one subfolder per class, "
            "or pass it as --unlabeled"
        )
    # a class may be called train, as in CIFAR-100; with class folders in it, it is a part
    for name in names:
        if name in {"train", *TEST_PARTS} and class_folders(path / name):
            raise DataError(f"{path / name} has class folders, so it is not a class. Give {path / name}")
    return names
