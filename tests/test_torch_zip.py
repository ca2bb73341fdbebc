"""Zip files that two readers could take for two files are refused; those of torch.save are read as torch reads them."""

import io
import struct
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from gm_probe.errors import CheckpointError
from gm_probe.files.pickles import load_torch
from gm_probe.files.torch_zip import read_records

END, END64, LOCATOR, ENTRY = 22, 56, 20, 46


def saved(size: int = 20) -> bytes:
    buffer = io.BytesIO()
    torch.save({"w": torch.arange(float(size)), "b": torch.ones(3)}, buffer)
    return buffer.getvalue()


def directory(content: bytes) -> tuple[int, int]:
    """Where the central directory begins and ends."""
    length, first = struct.unpack_from("<LL", content, len(content) - END + 12)
    return first, first + length


@pytest.mark.parametrize("size", [0, 1, 1000, 300_000])
def test_records_are_those_that_torch_and_python_see(tmp_path: Path, size: int) -> None:
    path = tmp_path / "a.pt"
    path.write_bytes(saved(size))
    with path.open("rb") as file, zipfile.ZipFile(path) as archive:
        found = {record.name.decode(): b"".join(record.blocks(file)) for record in read_records(path, file)}
        assert found == {name: archive.read(name) for name in archive.namelist()}
    assert torch.equal(load_torch(path)["w"], torch.arange(float(size)))


@pytest.mark.parametrize("wide", [False, True])
def test_what_pythons_zipfile_stores_is_read_too(tmp_path: Path, wide: bool) -> None:
    path = tmp_path / "a.pt"
    with zipfile.ZipFile(io.BytesIO(saved())) as old, zipfile.ZipFile(path, "w") as new:
        for name in old.namelist():
            with new.open(zipfile.ZipInfo(name), "w", force_zip64=wide) as record:
                record.write(old.read(name))
    if wide:  # headers with 64-bit fields beside a directory without
        with path.open("rb") as file:
            assert len(read_records(path, file)) == 8
    else:
        assert torch.equal(load_torch(path)["b"], torch.ones(3))


def two_directories(content: bytes) -> bytes:
    """Python's reader goes by the last end record, other readers by the first."""
    first, _ = directory(content)
    return content + content[first:]


def other_first(content: bytes) -> bytes:
    """Another archive before it, as in a self-extracting file."""
    return saved(7) + content


def gap(content: bytes) -> bytes:
    first, _ = directory(content)
    return content[:first] + b"\0" * 8 + content[first:]


def comment(content: bytes) -> bytes:
    return content[:-2] + struct.pack("<H", 4) + b"note"


def end_in_comment(content: bytes) -> bytes:
    """A second end record, in the comment of the first."""
    return content[:-2] + struct.pack("<H", END) + content[-END:]


def edited(content: bytes, place: int, form: str, value: int) -> bytes:
    changed = bytearray(content)
    struct.pack_into(form, changed, place, value)
    return bytes(changed)


def renamed(content: bytes) -> bytes:
    """The directory's name of the first record is another than its own."""
    first, _ = directory(content)
    changed = bytearray(content)
    changed[first + ENTRY] ^= 1
    return bytes(changed)


def hidden(content: bytes) -> bytes:
    """A record that the directory does not list."""
    first, end = directory(content)
    name, data = b"archive/data.pkl", b"\x80\x02}."
    local = struct.pack("<4sHHHHHLLLHH", b"PK\3\4", 20, 0, 0, 0, 0, zlib.crc32(data), 4, 4, len(name), 0)
    moved = len(local + name + data)
    whole = content[:first] + local + name + data + content[first:]
    whole = edited(whole, len(whole) - END + 16, "<L", first + moved)
    place = end + moved
    return edited(edited(whole, place + 48, "<Q", first + moved), place + END64 + 8, "<Q", place)


ODD: dict[str, Callable[[bytes], bytes]] = {
    "two directories": two_directories,
    "another archive before": other_first,
    "a gap before the directory": gap,
    "a comment": comment,
    "an end in the comment": end_in_comment,
    "bytes after the end": lambda content: content + b"\0",
    "a byte before the beginning": lambda content: b"PK\3\4" + content,
    "a record unlisted": hidden,
    "a name that differs": renamed,
    "a smaller count": lambda c: edited(c, len(c) - END + 10, "<H", 6),
    "a smaller wide count": lambda c: edited(c, directory(c)[1] + 32, "<Q", 6),
    "an offset that differs": lambda c: edited(c, len(c) - END + 16, "<L", 0),
    "a wide offset that differs": lambda c: edited(c, directory(c)[1] + 48, "<Q", 0),
    "a locator elsewhere": lambda c: edited(c, directory(c)[1] + END64 + 8, "<Q", 0),
    "a longer record": lambda c: edited(edited(c, directory(c)[0] + 20, "<L", 163), directory(c)[0] + 24, "<L", 163),
    "an encrypted record": lambda c: edited(c, directory(c)[0] + 8, "<H", 0x809),
    "a method in the header alone": lambda c: edited(c, 8, "<H", 8),
    "truncated": lambda content: content[:-30],
    "cut in half": lambda content: content[: len(content) // 2],
    "the beginning alone": lambda content: content[:4],
}  # fmt: skip


@pytest.mark.parametrize("name", ODD)
def test_what_readers_could_take_for_two_files_is_refused(tmp_path: Path, name: str) -> None:
    path = tmp_path / "a.pt"
    path.write_bytes(ODD[name](saved()))
    with pytest.raises(CheckpointError, match=r"not a zip file as torch\.save writes it|would unpack"):
        load_torch(path)


def test_a_checksum_of_the_directory_counts(tmp_path: Path) -> None:
    content = saved()
    path = tmp_path / "a.pt"
    path.write_bytes(edited(content, directory(content)[0] + 16, "<L", 1))
    with pytest.raises(CheckpointError, match=r"the checksum of its record archive/data\.pkl is wrong"):
        load_torch(path)


def test_a_tar_file_that_begins_as_a_pickle_is_refused(tmp_path: Path) -> None:
    """torch would unpack it, before it looks for pickles."""
    import tarfile

    path = tmp_path / "a.pt"
    with tarfile.open(path, "w") as tar:
        for name in ("N." * 5, "storages", "tensors", "pickle"):
            tar.addfile(tarfile.TarInfo(name), io.BytesIO(b""))
    with pytest.raises(CheckpointError, match="is a tar file"):
        load_torch(path)


def test_a_file_without_checksums_is_read(tmp_path: Path) -> None:
    """torch.save computes none where it is told so."""
    path = tmp_path / "a.pt"
    torch.serialization.set_crc32_options(False)
    try:
        path.write_bytes(saved())
    finally:
        torch.serialization.set_crc32_options(True)
    with zipfile.ZipFile(path) as archive:
        assert {entry.CRC for entry in archive.infolist()} == {0}
    assert torch.equal(load_torch(path)["b"], torch.ones(3))
