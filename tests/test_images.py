"""Images in files that are decoded where they are taken, against the same images held in memory."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from gm_probe.core import images
from gm_probe.core.batches import Batches, Normalization
from gm_probe.core.datasets import Examples, open_source
from gm_probe.core.errors import DataError
from gm_probe.core.images import ImageFiles, Reading, blocks


def write(path: Path, array: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two classes of seven and four RGB images of 6×5 (PNG, so that every pixel is what was written)."""
    rng = np.random.default_rng(0)
    for name, count in (("a", 7), ("b", 4)):
        for i in range(count):
            write(tmp_path / "data" / name / f"{i}.png", rng.integers(0, 256, (6, 5, 3), dtype=np.uint8))
    return tmp_path / "data"


@pytest.fixture
def in_memory(folder: Path) -> Examples:
    return open_source(str(folder), labeled=True).pool


@pytest.fixture
def streamed(folder: Path, in_memory: Examples, monkeypatch: pytest.MonkeyPatch) -> Examples:
    monkeypatch.setattr(images, "IN_MEMORY", 4 * 6 * 5 * 3)  # bytes: four images
    examples = open_source(str(folder), labeled=True).pool
    assert isinstance(examples.x, ImageFiles)
    return examples


def tensor(examples: Examples) -> torch.Tensor:
    assert isinstance(examples.x, torch.Tensor)
    return examples.x


def test_it_looks_and_indexes_like_the_tensor(streamed: Examples, in_memory: Examples) -> None:
    x, expected = streamed.x, tensor(in_memory)
    assert (x.shape, x.dtype, x.dim(), len(x)) == (expected.shape, expected.dtype, 4, 11)
    assert not x.is_floating_point()
    assert torch.equal(x[2:5], expected[2:5])
    chosen = torch.tensor([10, 0, 3, 3])
    assert torch.equal(x[chosen], expected[chosen])
    assert in_memory.y is not None
    assert torch.equal(streamed.y, in_memory.y)  # type: ignore[arg-type]


def test_batches_are_the_same_and_decoded_ahead(
    streamed: Examples, in_memory: Examples, monkeypatch: pytest.MonkeyPatch
) -> None:
    normalization = Normalization((0.1, 0.2, 0.3), (1.0, 0.5, 0.25))
    threads = set()
    original = ImageFiles.__getitem__

    def spy(self: ImageFiles, key: slice | torch.Tensor) -> torch.Tensor:
        threads.add(threading.current_thread())
        return original(self, key)

    monkeypatch.setattr(ImageFiles, "__getitem__", spy)
    for size in (1, 4, 11, 20):
        pairs = zip(
            Batches(streamed, normalization, batch_size=size),
            Batches(in_memory, normalization, batch_size=size),
            strict=True,
        )
        for a, b in pairs:
            assert torch.equal(a.x, b.x)
            assert torch.equal(a.y, b.y)  # type: ignore[arg-type]
    assert threading.main_thread() not in threads


def test_a_pass_may_be_left_and_taken_again(streamed: Examples, in_memory: Examples) -> None:
    batches = Batches(streamed, batch_size=2)
    first = next(iter(batches)).x
    assert torch.equal(first, next(iter(batches)).x)
    assert len(list(batches)) == 6


def test_normalization_is_the_same(
    streamed: Examples, in_memory: Examples, monkeypatch: pytest.MonkeyPatch
) -> None:
    pixels = tensor(in_memory).double() / 255
    monkeypatch.setattr(images, "BLOCK", 3)
    found = Normalization.of(streamed)
    assert found.mean == pytest.approx(pixels.mean((0, 2, 3)).tolist(), rel=1e-12)
    assert found.std == pytest.approx(pixels.std((0, 2, 3), correction=0).tolist(), rel=1e-9)
    assert found == Normalization.of(in_memory)


def test_blocks_cover_all_once(
    streamed: Examples, in_memory: Examples, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(images, "BLOCK", 3)
    for x in (streamed.x, in_memory.x):
        found = list(blocks(x))
        assert [len(block) for block in found] == [3, 3, 3, 2]
        assert torch.equal(torch.cat(found), tensor(in_memory))


def test_a_selection_that_fits_is_decoded(streamed: Examples, in_memory: Examples) -> None:
    few, many = torch.tensor([9, 1, 4]), torch.tensor([9, 1, 4, 5, 0])
    assert isinstance(streamed.select(few).x, ImageFiles)
    assert torch.equal(tensor(streamed.select(few).in_memory()), tensor(in_memory)[few])
    still = streamed.select(many).in_memory()
    assert isinstance(still.x, ImageFiles)
    assert torch.equal(still.x[:], tensor(in_memory)[many])
    assert torch.equal(tensor(streamed.subset(3, seed=1)), tensor(in_memory.subset(3, seed=1)))


def test_grey_only_where_all_are(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    grey = np.arange(30, dtype=np.uint8).reshape(6, 5)
    flat = folder.parent / "grey"
    files = [write(flat / f"{i}.png", grey + i) for i in range(3)]
    assert ImageFiles(files).shape == (3, 1, 6, 5)
    assert ImageFiles(files, Reading(channels=3)).shape == (3, 3, 6, 5)
    colour = next(folder.rglob("*.png"))
    for headers in (1000, 2):  # where the coloured one is among the first that are looked at, or not
        monkeypatch.setattr(images, "HEADERS", headers)
        x = ImageFiles([files[0], colour, *files[1:]])
        assert x.shape == (4, 3, 6, 5)
        assert torch.equal(x[:1], torch.from_numpy(grey).expand(1, 3, 6, 5))
        assert torch.equal(x[:], x.in_memory())  # type: ignore[arg-type]


def test_two_parts_agree_in_channels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    write(tmp_path / "train" / "a" / "0.png", rng.integers(0, 256, (4, 4), dtype=np.uint8))
    write(tmp_path / "test" / "a" / "0.png", rng.integers(0, 256, (4, 4, 3), dtype=np.uint8))
    held = open_source(str(tmp_path), labeled=True)
    monkeypatch.setattr(images, "IN_MEMORY", 0)
    files = open_source(str(tmp_path), labeled=True)
    assert held.test is not None
    assert files.test is not None
    for a, b in ((held.pool, files.pool), (held.test, files.test)):
        assert isinstance(b.x, ImageFiles)
        assert torch.equal(tensor(a), b.x[:])


def test_resized_images_may_differ_in_size(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    odd = write(folder / "a" / "odd.png", np.zeros((9, 9, 3), dtype=np.uint8))
    files = [*sorted(folder.rglob("0.png")), odd]
    x = ImageFiles(files, Reading(image_size=8))
    assert x.shape == (3, 3, 8, 8)
    assert torch.equal(x[:], x.in_memory())  # type: ignore[arg-type]
    for room in (images.IN_MEMORY, 0):  # decoded, and found by the headers before anything is decoded
        monkeypatch.setattr(images, "IN_MEMORY", room)
        with pytest.raises(
            DataError, match=r"odd\.png is 9×9 but 0\.png is 5×6; resize all with --image-size"
        ):
            ImageFiles(files).in_memory()


def test_a_broken_file_is_named_when_it_is_taken(folder: Path) -> None:
    whole = (folder / "b" / "1.png").read_bytes()
    (folder / "b" / "1.png").write_bytes(whole[: len(whole) // 2])  # the header is whole
    files = sorted((folder / "b").glob("*.png"))
    for _ in range(2):
        x = ImageFiles(files)
        assert len(x[:1]) == 1
        with pytest.raises(DataError, match=r"cannot decode .*1\.png"):
            _ = x[:]
        with pytest.raises(DataError, match=r"cannot decode .*1\.png"):
            list(Batches(Examples(x, None, (), "files"), batch_size=1))
        (folder / "b" / "1.png").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"cannot decode .*1\.png"):
        ImageFiles(files[1:2])


def test_a_file_that_changed_its_size_is_an_error(folder: Path) -> None:
    files = sorted((folder / "b").glob("*.png"))
    x = ImageFiles(files)
    write(files[2], np.zeros((3, 3, 3), dtype=np.uint8))
    with pytest.raises(DataError, match=r"2\.png is 3×3"):
        _ = x[1:3]


def test_a_file_that_is_gone_is_named(folder: Path) -> None:
    files = sorted((folder / "b").glob("*.png"))
    x = ImageFiles(files)
    files[3].unlink()
    with pytest.raises(DataError, match=r"cannot decode .*3\.png"):
        _ = x[2:]
