"""Images in files that are decoded where they are taken, against the same images held in memory."""

import contextlib
import copy
import os
import shutil
import struct
import tempfile
import threading
import zlib
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms

from gm_probe.data import images
from gm_probe.data.batches import Batches
from gm_probe.data.datasets import open_source
from gm_probe.data.examples import Examples
from gm_probe.data.image_reading import ImageReading
from gm_probe.data.images import ImageFiles, blocks
from gm_probe.data.normalization import Normalization
from gm_probe.errors import DataError, UsageError
from gm_probe.training.config import TrainConfig


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
    assert torch.equal(streamed.y, in_memory.y)


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
            assert torch.equal(a.y, b.y)
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
    assert ImageFiles(files, ImageReading(channels=3)).shape == (3, 3, 6, 5)
    colour = next(folder.rglob("*.png"))
    for headers in (1000, 2):  # where the coloured one is among the first that are looked at, or not
        monkeypatch.setattr(images, "HEADERS", headers)
        x = ImageFiles([files[0], colour, *files[1:]])
        assert x.shape == (4, 3, 6, 5)
        assert torch.equal(x[:1], torch.from_numpy(grey).expand(1, 3, 6, 5))
        assert torch.equal(x[:], x.in_memory())


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
    x = ImageFiles(files, ImageReading(image_size=8))
    assert x.shape == (3, 3, 8, 8)
    assert torch.equal(x[:], x.in_memory())
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


# ---- resizing and cropping, against torchvision


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize(("resize", "crop"), [(16, 16), (20, 13), (33, 32), (7, None), (None, 9)])
def test_resize_and_crop_are_torchvisions(
    tmp_path: Path, mode: str, resize: int | None, crop: int | None
) -> None:
    rng = np.random.default_rng(0)
    steps = [transforms.Resize(resize)] if resize else []
    steps += [transforms.CenterCrop(crop)] if crop else []
    for width, height in [(48, 16), (16, 48), (31, 30), (17, 23), (16, 16), (101, 37), (9, 10)]:
        picture = Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)).convert(mode)
        picture.save(tmp_path / "x.png")
        x = ImageFiles([tmp_path / "x.png"], ImageReading(resize=resize, crop=crop))
        expected = torch.from_numpy(np.array(transforms.Compose(steps)(picture))).view(
            *x.shape[2:], x.shape[1]
        )
        assert torch.equal(x[:][0], expected.permute(2, 0, 1))


def test_crops_that_would_have_a_black_border_are_refused(tmp_path: Path) -> None:
    file = write(tmp_path / "x.png", np.zeros((9, 30, 3), dtype=np.uint8))
    with pytest.raises(DataError, match=r"x\.png: it has 30×9 pixels, fewer than --crop 10; add --resize"):
        ImageFiles([file], ImageReading(crop=10)).in_memory()
    with pytest.raises(UsageError, match="--crop 10 is larger than --resize 9"):
        ImageReading(resize=9, crop=10)
    with pytest.raises(UsageError, match="--image-size"):
        ImageReading(image_size=8, crop=8)


@pytest.mark.parametrize("values", [{"channels": 2}, {"image_size": 0}, {"resize": -1}, {"crop": 0}])
def test_impossible_readings_are_refused_by_name(values: dict[str, int]) -> None:
    (name,) = values
    with pytest.raises(UsageError, match=f"{name} = "):
        ImageReading(**values)
    if name != "channels":
        with pytest.raises(UsageError, match=f"{name} = "):
            TrainConfig.from_dict(values)


def test_a_sliver_is_not_blown_up(tmp_path: Path) -> None:
    file = write(tmp_path / "x.png", np.zeros((1, 40_000, 3), dtype=np.uint8))
    with pytest.raises(DataError, match="the limit is 64,000,000"):
        ImageFiles([file], ImageReading(resize=224, crop=224)).in_memory()


def test_a_changed_aspect_ratio_is_said(folder: Path) -> None:
    notes = open_source(str(folder), labeled=True, image_size=4).pool.notes
    assert notes == (
        f"--image-size 4 changes the aspect ratio of images such as {folder / 'a' / '0.png'} (5×6); "
        "--resize 4 --crop 4 keeps it",
    )
    assert open_source(str(folder), labeled=True, resize=4, crop=4).pool.notes == ()
    for file in folder.rglob("*.png"):
        write(file, np.zeros((6, 6, 3), dtype=np.uint8))
    assert open_source(str(folder), labeled=True, image_size=4).pool.notes == ()


# ---- what is decoded


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> Counter[Path]:
    """How often each file was decoded."""
    found: Counter[Path] = Counter()
    original = images.decode

    def spy(file: Path, reading: ImageReading) -> np.ndarray:
        found[file] += 1
        return original(file, reading)

    monkeypatch.setattr(images, "decode", spy)
    return found


def test_only_what_is_taken_is_decoded_and_once(folder: Path, decoded: Counter[Path]) -> None:
    for part in ("train", "test"):
        shutil.copytree(folder, folder.parent / "both" / part)
    source = open_source(str(folder.parent / "both"), labeled=True, decode=False)
    assert (len(source.pool), len(source.test), source.pool.x.shape[1:]) == (11, 11, (3, 6, 5))
    assert not decoded
    few = source.test.subset(4, seed=0)
    assert few is source.test.subset(4, seed=0)
    assert decoded.total() == len(decoded) == 4
    assert {file.parent.parent.name for file in decoded} == {"test"}
    decoded.clear()
    whole = source.test.subset(None, seed=0)
    assert torch.equal(tensor(whole), tensor(open_source(str(folder), labeled=True).pool))
    decoded.clear()
    assert torch.equal(tensor(source.test.in_memory()), tensor(whole))
    assert torch.equal(tensor(source.test.select(torch.tensor([3, 1]))), tensor(whole)[[3, 1]])
    assert not decoded


# ---- formats


def test_every_suffix_that_pillow_decodes_is_read(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    names = images.suffixes()
    written = {}
    for suffix, name in names.items():
        for mode in ("RGB", "L", "1"):
            with contextlib.suppress(OSError, KeyError, ValueError):
                Image.fromarray(pixels).convert(mode).save(tmp_path / f"x{suffix}", format=name)
                written[suffix] = name
                break
    assert {".jfif", ".avif", ".jp2", ".webp", ".tga", ".qoi", ".mpo", ".dib", ".pnm"} <= set(written)
    for suffix, name in written.items():
        file = tmp_path / f"x{suffix}"
        kind = "JPEG" if name == "MPO" else name
        with Image.open(file, formats=[kind]) as picture:
            expected = np.asarray(picture.convert("RGB"))
        assert np.array_equal(images.decode(file, ImageReading(channels=3)), expected), suffix
    assert len(open_source(str(tmp_path), labeled=False, decode=False).pool) == len(written)


@pytest.mark.parametrize("suffix", [".eps", ".ps", ".mpg", ".wmf", ".pdf", ".ico", ".hdf", ".fits"])
def test_what_runs_programs_or_unpacks_without_a_limit_is_not_read(suffix: str) -> None:
    assert suffix not in images.suffixes()


def test_garbage_is_no_image_of_a_format_without_a_mark(tmp_path: Path) -> None:
    """Pillow takes nearly any bytes for TGA: a file is taken for it only where its name says so."""
    Image.new("RGB", (8, 8), (1, 2, 3)).save(tmp_path / "x.tga")
    assert images.decode(tmp_path / "x.tga", ImageReading())[0, 0].tolist() == [1, 2, 3]
    (tmp_path / "x.tga").rename(tmp_path / "x.png")
    with pytest.raises(DataError, match="cannot identify"):
        images.decode(tmp_path / "x.png", ImageReading())


# ---- 16 bits


def _png16(values: np.ndarray) -> bytes:
    """An RGB PNG of 16 bits a channel, which Pillow cannot write, from (H, W, 3) values."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    height, width, _ = values.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    header = struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0)
    parts = [(b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(kind, data) for kind, data in parts)


@pytest.mark.parametrize("kind", ["grey.png", "grey.tif", "rgb.png"])
@pytest.mark.parametrize(("bits", "right"), [(10, False), (12, False), (14, False), (15, True), (16, True)])
def test_values_of_fewer_bits_in_16_are_refused(tmp_path: Path, kind: str, bits: int, right: bool) -> None:
    rng = np.random.default_rng(0)
    for i in range(3):
        values = rng.integers(0, 2**bits, (8, 8, 3), dtype=np.uint16)
        if kind == "rgb.png":
            (tmp_path / f"{i}.png").write_bytes(_png16(values))
        else:
            Image.fromarray(values[..., 0]).save(tmp_path / f"{i}{Path(kind).suffix}")
    if right:
        x = tensor(open_source(str(tmp_path), labeled=False).pool)
        assert int(x.max()) >= 64
        return
    with pytest.raises(DataError, match=rf"uses more than {bits} of them. Scale the pixels to 0–65535"):
        open_source(str(tmp_path), labeled=False)


def test_one_dark_image_of_16_bits_among_others_is_taken(tmp_path: Path) -> None:
    Image.fromarray(np.full((4, 4), 300, np.uint16)).save(tmp_path / "a.png")
    Image.fromarray(np.full((4, 4), 60_000, np.uint16)).save(tmp_path / "b.png")
    assert tensor(open_source(str(tmp_path), labeled=False).pool)[:, 0, 0, 0].tolist() == [1, 234]


# kept on disk


def test_streamed_images_are_decoded_once(
    streamed: Examples, in_memory: Examples, decoded: Counter[Path]
) -> None:
    """By passes in order, in another order, over a part, and by a part of that."""
    expected, order = tensor(in_memory), torch.tensor([9, 1, 4, 5, 0])
    assert isinstance(streamed.x, ImageFiles)
    some = streamed.select(order)
    assert torch.equal(some.x[torch.tensor([3, 1])], expected[[5, 1]])
    for _ in range(2):
        assert torch.equal(torch.cat(list(blocks(streamed.x))), expected)
        assert torch.equal(some.x[:], expected[order])
        assert torch.equal(some.select(torch.tensor([4, 2])).x[:], expected[[0, 4]])
    assert set(decoded.values()) == {1}
    assert len(decoded) == len(expected)


def test_the_file_has_no_name(
    streamed: Examples, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / "place"
    place.mkdir()
    monkeypatch.setenv("TMPDIR", str(place))
    monkeypatch.setattr(tempfile, "tempdir", None)
    examples = open_source(str(folder), labeled=True).pool
    assert torch.equal(examples.x[:], streamed.x[:])
    assert not list(place.iterdir())


@pytest.mark.parametrize("free", [0, 2 * 11 * 90 - 1])
def test_without_room_they_are_decoded_at_every_pass(
    streamed: Examples, folder: Path, decoded: Counter[Path], monkeypatch: pytest.MonkeyPatch, free: int
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=free))
    examples = open_source(str(folder), labeled=True).pool
    for _ in range(2):
        assert torch.equal(examples.x[:], streamed.x[:])
    assert max(decoded.values()) == 3
    assert "TMPDIR" in examples.notes[-1]


def test_a_disk_that_fills_up_costs_nothing_but_time(
    streamed: Examples, in_memory: Examples, decoded: Counter[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    original, written = os.pwrite, 0

    def full(file: int, data: bytes, place: int) -> int:
        nonlocal written
        written += 1
        return original(file, data if written < 4 else data[:5], place)

    monkeypatch.setattr(os, "pwrite", full)
    for _ in range(3):
        assert torch.equal(streamed.x[:], tensor(in_memory))
    assert sorted(decoded.values()) == [1] * 3 + [3] * 8
    assert isinstance(streamed.x, ImageFiles)
    assert "No space left" in streamed.x.not_kept


def test_another_process_keeps_images_of_its_own(streamed: Examples) -> None:
    again = copy.deepcopy(streamed)  # by the same protocol as pickling
    assert torch.equal(again.x[:], streamed.x[:])
