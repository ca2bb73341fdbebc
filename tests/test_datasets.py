"""Opening data: folders, array files, digits and torchvision's sets; whole, odd, broken and hostile."""

import hashlib
import os
import pickle
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from scipy.io import savemat

from gm_probe.data import datasets
from gm_probe.data.datasets import open_source
from gm_probe.data.examples import Examples
from gm_probe.errors import DataError, UsageError

RED, GREEN, BLUE = (250, 10, 20), (10, 240, 30), (5, 15, 230)


def put(path: Path, colour: int | tuple[int, ...], size: tuple[int, int] = (6, 4), mode: str = "") -> Path:
    """Save a plain image of ``size`` (width, height)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode or ("L" if isinstance(colour, int) else "RGB"), size, colour).save(path)
    return path


@pytest.fixture
def classes(tmp_path: Path) -> Path:
    """Three classes made out of sorted order, one nested, one with a file that is no image."""
    root = tmp_path / "my data ü"
    put(root / "zebra" / "1.png", BLUE)
    put(root / "ant" / "2.png", RED)
    put(root / "ant" / "10.PNG", RED)
    put(root / "mole" / "deep" / "er" / "a.bmp", GREEN)
    (root / "mole" / "notes.txt").write_text("no image")
    (root / "README.md").write_text("no class")
    return root


def refused(name: Path, *, labeled: bool = False, **options: Any) -> str:
    """The message of the DataError that opening ``name`` raises: one line."""
    with pytest.raises(DataError) as caught:
        open_source(str(name), labeled=labeled, **options)
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 4
    return str(caught.value)


# ---- folders


def test_labeled_folder(classes: Path) -> None:
    source = open_source(str(classes), labeled=True)
    pool = source.pool
    assert source.test is None
    assert pool.classes == ("ant", "mole", "zebra")
    assert pool.num_classes == 3
    assert pool.y.dtype == torch.int64
    assert pool.y.tolist() == [0, 0, 1, 2]
    assert pool.x.shape == (4, 3, 4, 6)
    assert pool.x.dtype == torch.uint8
    for image, colour in zip(pool.x, (RED, RED, GREEN, BLUE), strict=True):
        assert image.flatten(1).unique(dim=1).T.tolist() == [list(colour)]


def test_unlabeled_folder_reads_every_image_and_no_label(classes: Path) -> None:
    put(classes / "flat.png", GREEN)
    pool = open_source(str(classes), labeled=False).pool
    assert pool.y is None
    assert pool.classes == ()
    assert len(pool) == 5
    assert tuple(pool.x[0, :, 0, 0].tolist()) == GREEN  # a folder's own images come before its subfolders'
    with pytest.raises(DataError, match="has no labels"):
        _ = pool.num_classes


def test_flat_folder_has_no_classes(tmp_path: Path) -> None:
    put(tmp_path / "a.png", RED)
    assert len(open_source(str(tmp_path), labeled=False).pool) == 1
    assert "no class subfolders" in refused(tmp_path, labeled=True)


@pytest.mark.parametrize("name", ["test", "val", "valid", "validation"])
def test_train_and_test_parts(tmp_path: Path, name: str) -> None:
    for part in ("train", name):
        put(tmp_path / "both" / part / "ant" / "1.png", RED)
        put(tmp_path / "both" / part / "bee" / "1.png", BLUE)
    put(tmp_path / "both" / name / "bee" / "2.png", BLUE)
    source = open_source(str(tmp_path / "both"), labeled=True)
    assert source.pool.classes == ("ant", "bee")
    assert len(source.pool) == 2
    assert source.test.y.tolist() == [0, 1, 1]
    unlabeled = open_source(str(tmp_path / "both"), labeled=False)
    assert (len(unlabeled.pool), len(unlabeled.test), unlabeled.test.y) == (2, 3, None)


def test_test_is_preferred_to_validation(tmp_path: Path) -> None:
    for count, part in enumerate(("train", "test", "val"), 1):
        for index in range(count):
            put(tmp_path / part / "ant" / f"{index}.png", RED)
    source = open_source(str(tmp_path), labeled=True)
    assert source.test is not None
    assert (len(source.pool), len(source.test)) == (1, 2)


def test_parts_that_number_their_classes_differently_are_refused(tmp_path: Path) -> None:
    for file in ("train/ant", "train/bee", "test/bee"):
        put(tmp_path / file / "1.png", RED)
    message = refused(tmp_path, labeled=True)
    assert f"{tmp_path / 'train'} has the classes ant, bee but {tmp_path / 'test'} has bee" in message
    assert len(open_source(str(tmp_path), labeled=False).pool) == 2


def test_parts_of_other_sizes_are_refused_or_resized(tmp_path: Path) -> None:
    put(tmp_path / "train" / "ant" / "1.png", RED)
    put(tmp_path / "test" / "ant" / "1.png", RED, size=(8, 8))
    for labeled in (True, False):
        message = refused(tmp_path, labeled=labeled)
        assert "6×4" in message
        assert "8×8; resize all with --image-size" in message
    source = open_source(str(tmp_path), labeled=True, image_size=5)
    assert source.test.x.shape == source.pool.x.shape == (1, 3, 5, 5)


def test_grey_stays_grey_only_if_both_parts_are(tmp_path: Path) -> None:
    put(tmp_path / "train" / "ant" / "1.png", 7)
    put(tmp_path / "test" / "ant" / "1.png", RED)
    source = open_source(str(tmp_path), labeled=True)
    assert source.pool.x[0, :, 0, 0].tolist() == [7, 7, 7]
    assert source.test.x[0, :, 0, 0].tolist() == list(RED)


@pytest.mark.parametrize("part", ["train", "test", "val", "valid", "validation"])
def test_a_lone_part_is_no_class(tmp_path: Path, part: str) -> None:
    put(tmp_path / part / "ant" / "1.png", RED)
    assert f"Give {tmp_path / part}" in refused(tmp_path, labeled=True)


def test_a_class_may_be_called_train(tmp_path: Path) -> None:
    for name in ("train", "tractor"):  # as in CIFAR-100
        put(tmp_path / name / "1.png", RED)
    assert open_source(str(tmp_path), labeled=True).pool.classes == ("tractor", "train")


def test_hidden_entries_are_no_data(classes: Path) -> None:
    put(classes / ".ipynb_checkpoints" / "ant-checkpoint.png", RED)
    put(classes / "ant" / ".thumbnails" / "2.png", RED)
    put(classes / "ant" / "._2.png", RED)
    labeled = open_source(str(classes), labeled=True).pool
    assert labeled.classes == ("ant", "mole", "zebra")
    assert len(labeled) == len(open_source(str(classes), labeled=False).pool) == 4


def test_link_loops_are_not_followed(classes: Path) -> None:
    (classes / "loop").symlink_to(classes, target_is_directory=True)
    (classes / "ant" / "up").symlink_to(classes, target_is_directory=True)
    (classes / "self").symlink_to(classes / "self")
    labeled = open_source(str(classes), labeled=True).pool
    assert labeled.classes == ("ant", "mole", "zebra")
    assert len(labeled) == len(open_source(str(classes), labeled=False).pool) == 4


def test_a_linked_class_folder_is_a_class(classes: Path, tmp_path: Path) -> None:
    put(tmp_path / "elsewhere" / "1.png", GREEN)
    (classes / "bee").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    labeled = open_source(str(classes), labeled=True).pool
    assert labeled.classes == ("ant", "bee", "mole", "zebra")
    assert len(labeled) == len(open_source(str(classes), labeled=False).pool) == 5


def test_no_folder_is_read_twice(classes: Path, tmp_path: Path) -> None:
    put(tmp_path / "elsewhere" / "1.png", GREEN)
    (tmp_path / "elsewhere" / "back").symlink_to(classes / "ant", target_is_directory=True)
    for name in ("bee", "cow"):
        (classes / name).symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    (classes / "up").symlink_to(tmp_path, target_is_directory=True)
    assert len(open_source(str(classes), labeled=False).pool) == 5


def test_a_looping_image_link_is_named(classes: Path) -> None:
    (classes / "ant" / "self.png").symlink_to(classes / "ant" / "self.png")
    assert "self.png" in refused(classes)


def test_empty_folders(classes: Path, tmp_path: Path) -> None:
    (classes / "bee").mkdir()
    (classes / "bee" / "notes.txt").touch()
    assert f"{classes / 'bee'} holds no images" in refused(classes, labeled=True)
    (tmp_path / "void").mkdir()
    assert f"{tmp_path / 'void'} holds no readable images" in refused(tmp_path / "void")


def test_unreadable_folder_is_an_error_not_a_gap(classes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scandir = os.scandir

    def guarded(path: str | Path) -> Any:
        if Path(path).name == "ant":
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", guarded)
    for labeled in (True, False):
        assert f"cannot read the folder {classes / 'ant'}: Permission denied" in refused(
            classes, labeled=labeled
        )


# ---- decoding (odd and broken images of every kind are in test_trust.py)


def test_grey_stays_grey_only_if_all_are(tmp_path: Path) -> None:
    put(tmp_path / "a.png", 7)
    put(tmp_path / "b.png", 9)
    assert open_source(str(tmp_path), labeled=False).pool.x[:, :, 0, 0].tolist() == [[7], [9]]
    as_rgb = open_source(str(tmp_path), labeled=False, channels=3).pool.x
    assert as_rgb[:, :, 0, 0].tolist() == [[7] * 3, [9] * 3]
    put(tmp_path / "c.png", RED)
    mixed = open_source(str(tmp_path), labeled=False).pool.x
    assert mixed[:, :, 0, 0].tolist() == [[7] * 3, [9] * 3, list(RED)]
    as_grey = open_source(str(tmp_path), labeled=False, channels=1).pool.x
    assert as_grey.shape == (3, 1, 4, 6)
    red, green, blue = RED
    assert as_grey[2, 0, 0, 0] == pytest.approx(0.299 * red + 0.587 * green + 0.114 * blue, abs=1)


def test_sixteen_bits_are_scaled_not_clipped(tmp_path: Path) -> None:
    values = np.array([[0, 255, 256, 511], [32768, 40000, 65279, 65535]], dtype=np.uint16)
    for name in ("a.png", "b.tif"):
        Image.fromarray(values).save(tmp_path / name)
    pool = open_source(str(tmp_path), labeled=False).pool
    assert pool.x.shape == (2, 1, 2, 4)
    for image in pool.x:
        assert image[0].tolist() == [[0, 0, 1, 1], [128, 156, 254, 255]]


def test_other_sizes_are_refused_or_resized(classes: Path) -> None:
    put(classes / "zebra" / "9.png", BLUE, size=(7, 4))
    message = refused(classes, labeled=True)
    assert str(classes / "zebra" / "9.png") in message
    assert "is 7×4" in message
    assert "6×4" in message
    assert "--image-size" in message
    assert open_source(str(classes), labeled=True, image_size=5).pool.x.shape == (5, 3, 5, 5)


def test_postscript_never_reaches_ghostscript(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from PIL import EpsImagePlugin

    def run(*_: object) -> None:
        raise AssertionError("Ghostscript was called")

    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", run)
    (tmp_path / "a.png").write_bytes(
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n"
    )
    assert f"cannot decode {tmp_path / 'a.png'}: cannot identify image file" in refused(tmp_path)


@pytest.mark.parametrize("options", [{"image_size": 8}, {"channels": 1}])
def test_only_folders_are_converted(tmp_path: Path, options: dict[str, int]) -> None:
    for name in ("digits", "cifar10", str(save(tmp_path / "a.npz", x=X))):
        with pytest.raises(UsageError, match="apply to image folders only"):
            open_source(name, labeled=False, **options)


# ---- array files

X = np.arange(2 * 3 * 4 * 5, dtype=np.uint8).reshape(2, 3, 4, 5)
Y = np.array([4, 1], dtype=np.int32)


def save(path: Path, **arrays: np.ndarray) -> Path:
    if path.suffix == ".npz":
        np.savez(path, **arrays)
    elif path.suffix == ".npy":
        np.save(path, arrays["x"])
    else:
        torch.save({name: torch.from_numpy(array) for name, array in arrays.items()}, path)
    return path


@pytest.mark.parametrize("suffix", [".npz", ".npy", ".pt", ".pth"])
def test_arrays_without_labels(tmp_path: Path, suffix: str) -> None:
    path = save(tmp_path / f"my array ü{suffix}", x=X)
    pool = open_source(str(path), labeled=True).pool
    assert torch.equal(pool.x, torch.from_numpy(X))
    assert pool.y is None
    assert pool.source == str(path)


@pytest.mark.parametrize("suffix", [".npz", ".pt"])
def test_arrays_with_labels(tmp_path: Path, suffix: str) -> None:
    path = save(tmp_path / f"a{suffix}", x=X, y=Y)
    pool = open_source(str(path), labeled=True).pool
    assert pool.y.dtype == torch.int64
    assert pool.y.tolist() == [4, 1]
    assert pool.num_classes == 5
    assert open_source(str(path), labeled=False).pool.y is None


def test_a_bare_tensor_and_floats_as_they_are(tmp_path: Path) -> None:
    x = torch.randn(3, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    torch.save(torch.nn.Parameter(x), tmp_path / "a.pt")
    pool = open_source(str(tmp_path / "a.pt"), labeled=False).pool
    assert pool.x.dtype == torch.float64
    assert torch.equal(pool.x, x)
    assert not pool.x.requires_grad


class Bomb:
    """Unpickling it creates the file ``canary``."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch '{self.canary}'",)


@pytest.mark.parametrize("name", ["a.npz", "a.npy", "zip.pt", "legacy.pt", "raw.pt", "raw.npy"])
def test_pickles_are_refused_unopened(tmp_path: Path, name: str) -> None:
    canary, path = tmp_path / "canary", tmp_path / name
    bomb = Bomb(canary)
    if name.startswith("raw"):
        path.write_bytes(pickle.dumps(bomb))
    elif path.suffix == ".pt":
        torch.save({"x": torch.ones(2, 2), "y": bomb}, path, _use_new_zipfile_serialization=name == "zip.pt")
    elif path.suffix == ".npz":
        np.savez(path, x=np.array([bomb], dtype=object), allow_pickle=True)
    else:
        np.save(path, np.array([bomb], dtype=object), allow_pickle=True)
    assert f"cannot read {path}: " in refused(path)
    assert not canary.exists()
    os.system(bomb.__reduce__()[1][0])  # the canary does sing where it is let
    assert canary.exists()


BAD_ARRAYS: dict[str, dict[str, Any]] = {
    "no array 'x' but 'images', 'labels'": {"images": X, "labels": Y},
    "it must be (N, ...)": {"x": X[:0]},
    "x has shape (3,)": {"x": np.ones(3)},
    "NaN": {"x": np.array([[1.0, np.nan]])},
    "infinite": {"x": np.array([[1.0, np.inf]])},
    "x is not an array of numbers": {"x": np.array([["a", "b"]])},
    "y is not an array of numbers": {"x": X, "y": np.array(["cat", "dog"])},
    "byte order": {"x": X.astype(">f4")},
    "is complex": {"x": X.astype(np.complex64)},
    "save pixels as uint8 or floats": {"x": np.zeros((2, 1, 8, 8), np.uint16)},
    "looks like (N, H, W, C)": {"x": np.zeros((2, 32, 32, 3), np.uint8)},
    "y is torch.int64 of shape (3,) for 2 examples; give one class index per example": {
        "x": X,
        "y": np.arange(3),
    },
    "y is torch.int64 of shape (2, 1, 1) for 2": {"x": X, "y": np.zeros((2, 1, 1), int)},
    "y must be class indices ≥ 0, got -1": {"x": X, "y": np.array([0, -1])},
    "y holds fractions, such as soft labels": {"x": X, "y": np.array([0.0, 0.5])},
}


def test_yes_or_no_labels_are_read_and_have_no_number_of_classes(tmp_path: Path) -> None:
    labels = np.array([[0.0, 1.0], [1.0, 1.0]])
    examples = open_source(str(save(tmp_path / "a.npz", x=X, y=labels)), labeled=True).pool
    assert examples.y.tolist() == [[0, 1], [1, 1]]
    with pytest.raises(DataError, match=r"labels of shape \(2, 2\); give one class index for each example"):
        _ = examples.num_classes


@pytest.mark.parametrize("reason", BAD_ARRAYS)
def test_unusable_arrays_are_named(tmp_path: Path, reason: str) -> None:
    path = save(tmp_path / "a.npz", **BAD_ARRAYS[reason])
    message = refused(path)
    assert str(path) in message
    assert reason in message


def test_unsigned_labels_are_labels(tmp_path: Path) -> None:
    pool = open_source(str(save(tmp_path / "a.npz", x=X, y=Y.astype(np.uint16))), labeled=True).pool
    assert pool.y.tolist() == [4, 1]


@pytest.mark.parametrize("suffix", [".npz", ".npy", ".pt"])
@pytest.mark.parametrize("keep", [0.0, 0.5, 0.95])
def test_torn_array_files_are_named(tmp_path: Path, suffix: str, keep: float) -> None:
    path = save(tmp_path / f"a{suffix}", x=X)
    content = path.read_bytes()
    path.write_bytes(content[: int(keep * len(content))])
    assert f"cannot read {path}: " in refused(path)


@pytest.mark.parametrize("content", [[1, 2], 3, {"y": torch.ones(2)}])
def test_other_torch_files(tmp_path: Path, content: Any) -> None:
    torch.save(content, tmp_path / "a.pt")
    assert "no array 'x'" in refused(tmp_path / "a.pt")


@pytest.mark.parametrize("kind", ["meta", "sparse"])
def test_tensors_without_plain_values(tmp_path: Path, kind: str) -> None:
    x = torch.ones(2, 3, device="meta") if kind == "meta" else torch.ones(2, 3).to_sparse()
    torch.save({"x": x}, tmp_path / "a.pt")
    assert str(tmp_path / "a.pt") in refused(tmp_path / "a.pt")


def test_unknown_names_and_files(tmp_path: Path) -> None:
    (tmp_path / "a.csv").touch()
    with pytest.raises(UsageError, match=r"a\.csv: data files end in \.npz, \.npy or \.pt"):
        open_source(str(tmp_path / "a.csv"), labeled=False)
    with pytest.raises(UsageError, match=r"no folder or file 'cifar11'; did you mean 'cifar10'\?"):
        open_source("cifar11", labeled=False)


# ---- digits and torchvision


def test_digits() -> None:
    source = open_source("digits", labeled=True)
    pool = source.pool
    assert source.test is None
    assert pool.x.shape == (1797, 1, 8, 8)
    assert pool.x.dtype == torch.uint8
    assert (int(pool.x.min()), int(pool.x.max())) == (0, 255)
    assert pool.classes == tuple("0123456789")
    assert pool.y.bincount().tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
    assert open_source("digits", labeled=False).pool.y is None


@pytest.mark.parametrize("name", list(datasets.DATASETS))
def test_missing_torchvision_data(tmp_path: Path, name: str) -> None:
    message = refused(Path(name), labeled=True, root=tmp_path / "none")
    assert f"{name} is missing or incomplete in {tmp_path / 'none'}" in message
    assert "--download" in message


def _by_hand(root: Path, monkeypatch: pytest.MonkeyPatch) -> np.ndarray:
    """CIFAR-10's python format with 2 images a file, whose checksums the real loader is told of."""
    kind = torchvision.datasets.CIFAR10
    folder = root / kind.base_folder
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (12, 3, 32, 32), dtype=np.uint8)

    def dump(name: str, value: dict[str, Any]) -> str:
        content = pickle.dumps(value)
        (folder / name).write_bytes(content)
        return hashlib.md5(content).hexdigest()

    files = []
    for index, name in enumerate([*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]):
        part = images[2 * index : 2 * index + 2].reshape(2, -1)
        files.append([name, dump(name, {"data": part, "labels": [index, 9 - index]})])
    names = [f"class {i}" for i in range(10)]
    monkeypatch.setattr(kind, "train_list", files[:5])
    monkeypatch.setattr(kind, "test_list", files[5:])
    meta = {"filename": "batches.meta", "key": "label_names"}
    monkeypatch.setattr(kind, "meta", {**meta, "md5": dump("batches.meta", {"label_names": names})})
    return images


def test_cifar10_by_the_real_loader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = _by_hand(tmp_path, monkeypatch)
    source = open_source("cifar10", labeled=True, root=tmp_path)
    assert torch.equal(source.pool.x, torch.from_numpy(images[:10]))
    assert torch.equal(source.test.x, torch.from_numpy(images[10:]))
    assert source.pool.y.tolist() == [0, 9, 1, 8, 2, 7, 3, 6, 4, 5]
    assert source.test.y.tolist() == [5, 4]
    assert source.pool.classes == tuple(f"class {i}" for i in range(10))
    assert source.pool.x.is_contiguous()
    bare = open_source("cifar10", labeled=False, root=tmp_path)
    assert bare.pool.y is None
    assert bare.test.y is None


def _told(path: Path) -> str:
    return hashlib.md5(path.read_bytes()).hexdigest()


def test_svhn_by_the_real_loader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its files have the images last, and 10 for the digit 0."""
    kind = torchvision.datasets.SVHN
    rng = np.random.default_rng(2)
    images = {part: rng.integers(0, 256, (32, 32, 3, 4), dtype=np.uint8) for part in ("train", "test")}
    split_list = {}
    for part, x in images.items():
        path = tmp_path / f"{part}_32x32.mat"
        savemat(path, {"X": x, "y": np.array([[10], [1], [9], [10]])})
        split_list[part] = ["", path.name, _told(path)]
    monkeypatch.setattr(kind, "split_list", split_list)
    source = open_source("svhn", labeled=True, root=tmp_path)
    assert torch.equal(source.pool.x, torch.from_numpy(images["train"].transpose(3, 2, 0, 1).copy()))
    assert torch.equal(source.test.x, torch.from_numpy(images["test"].transpose(3, 2, 0, 1).copy()))
    assert source.pool.y.tolist() == [0, 1, 9, 0]
    assert source.pool.num_classes == 10


def test_altered_cifar10_is_refused_unopened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _by_hand(tmp_path, monkeypatch)
    bad = tmp_path / torchvision.datasets.CIFAR10.base_folder / "data_batch_3"
    bad.write_bytes(pickle.dumps(Bomb(tmp_path / "canary")))
    with pytest.raises(DataError, match=r"cifar10 is missing or incomplete in .*--download"):
        open_source("cifar10", labeled=True, root=tmp_path)
    assert not (tmp_path / "canary").exists()


def _idx(values: np.ndarray) -> bytes:
    return bytes([0, 0, 8, values.ndim]) + struct.pack(f">{values.ndim}I", *values.shape) + values.tobytes()


def test_fashionmnist_whole_and_torn(tmp_path: Path) -> None:
    folder = tmp_path / "FashionMNIST" / "raw"
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 256, (3, 28, 28), dtype=np.uint8), np.array([0, 9, 3], np.uint8)
    for part in ("train", "t10k"):
        (folder / f"{part}-images-idx3-ubyte").write_bytes(_idx(images))
        (folder / f"{part}-labels-idx1-ubyte").write_bytes(_idx(labels))
    source = open_source("fashionmnist", labeled=True, root=tmp_path)
    assert torch.equal(source.pool.x, torch.from_numpy(images).unsqueeze(1))
    assert source.pool.y.tolist() == [0, 9, 3]
    for content in (_idx(images)[:100], b"", b"<html>"):
        (folder / "train-images-idx3-ubyte").write_bytes(content)
        assert "fashionmnist" in refused(Path("fashionmnist"), labeled=True, root=tmp_path)


def test_downloads_that_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def download(self: object) -> None:
        raise OSError(101, "Network is unreachable")

    monkeypatch.setattr(torchvision.datasets.CIFAR10, "download", download)
    with pytest.raises(DataError, match=r"cannot download or read cifar10 .*Network is unreachable"):
        open_source("cifar10", labeled=True, root=tmp_path, download=True)


# ---- subsets


def test_subset_is_seeded_and_not_the_first() -> None:
    examples = Examples(torch.arange(100).unsqueeze(1), torch.arange(100), (), "here")
    chosen = examples.subset(10, seed=3)
    picked = chosen.y.tolist()
    assert picked == sorted(set(picked))
    assert picked != list(range(10))
    assert chosen.x.squeeze(1).tolist() == picked
    again, other = examples.subset(10, seed=3), examples.subset(10, seed=4)
    assert torch.equal(again.x, chosen.x)
    assert not torch.equal(other.x, chosen.x)
    assert examples.subset(100, seed=0) is examples
    assert examples.subset(None, seed=0) is examples


def test_subset_leaves_the_global_generator_alone() -> None:
    examples = Examples(torch.zeros(50, 1), None, (), "here")
    before = torch.get_rng_state()
    examples.subset(5, seed=0)
    assert torch.equal(torch.get_rng_state(), before)
