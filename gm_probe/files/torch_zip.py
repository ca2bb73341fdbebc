"""The records of a zip file as torch.save writes it: one structure, of which no two readers can see different files.

Zip readers differ in where they look for the directory, in which of two directories or names they believe, and in what
they pass over. A file is read here only where nothing is left to choose: every byte belongs to one record, the one
directory, or its end.
"""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from gm_probe.errors import CheckpointError, printable

BEGINNING = b"PK\x03\x04"
"""First bytes of a zip file, by which torch recognises it."""
_LOCAL, _ENTRY = struct.Struct("<4sHHHHHLLLHH"), struct.Struct("<4sHHHHHHLLLHHHHHLL")
_END, _LOCATOR, _END64 = struct.Struct("<4sHHHHLLH"), struct.Struct("<4sLQL"), struct.Struct("<4sQHHLLQQQQ")
_WIDE = 0xFFFFFFFF
"""A 32-bit field that leaves its value to a 64-bit one."""
_ENCRYPTED, _DESCRIBED = 0x2041, 0x8
"""Bits of an entry's flags: how it is encrypted; a descriptor follows its data."""
_DESCRIPTORS = (16, 24)
"""Sizes of a descriptor with 32-bit and with 64-bit fields."""
_BLOCK = 2**20


@dataclass(frozen=True, slots=True)
class Record:
    """Bytes ``start`` to ``start + size`` of the file, and their checksum."""

    name: bytes
    start: int
    size: int
    checksum: int

    def blocks(self, file: IO[bytes]) -> Iterator[bytes]:
        file.seek(self.start)
        left = self.size
        while left:
            block = file.read(min(left, _BLOCK))
            if not block:
                return
            left -= len(block)
            yield block


def read_records(path: Path, file: IO[bytes]) -> list[Record]:
    """Return the records of the zip ``file`` at ``path``, in the order of their places, with their checksums checked.

    A file without any checksum is read too: torch.save can leave them out.

    Raises:
        CheckpointError: it is not as torch.save writes it: records are compressed, overlap, share a name or have
            another checksum, or bytes belong to none of them.
        ValueError: it is TorchScript.
    """
    size = file.seek(0, os.SEEK_END)
    try:
        first, count, end = _directory(file, size)
        file.seek(first)
        entries = sorted(_entries(file.read(end - first), count), key=lambda entry: entry.offset)
        total = sum(entry.size for entry in entries)
        if total > size:
            raise CheckpointError(
                f"{path} would unpack to {total:,} bytes from {size:,}; save it again with torch.save"
            )
        if any(entry.packed for entry in entries):
            if any(b"/code/" in entry.name for entry in entries):
                raise ValueError("a TorchScript archive")
            raise CheckpointError(f"{path} has compressed records; save it again with torch.save")
        bounds = [*(entry.offset for entry in entries), first]
        _need(bounds[0] == 0)
        records = [_record(file, entry, after) for entry, after in zip(entries, bounds[1:], strict=True)]
    except (struct.error, _OddError) as error:
        raise CheckpointError(
            f"cannot read {path}: it is truncated, or not a zip file as torch.save writes it, so two "
            "readers could see different contents. Copy it again, or save it again with torch.save"
        ) from error
    # torch's own reader ignores case
    if len({record.name.lower() for record in records}) < len(records):
        raise CheckpointError(f"{path} holds two records of one name; save it again with torch.save")
    if not any(
        record.checksum for record in records
    ):  # torch.save can be told to compute none (set_crc32_options)
        return records
    for record in records:
        checksum = 0
        for block in record.blocks(file):
            checksum = zlib.crc32(block, checksum)
        if checksum != record.checksum:
            name = printable(record.name.decode(errors="replace"))[:160]
            raise CheckpointError(
                f"{path} is damaged: the checksum of its record {name} is wrong. Copy it again"
            )
    return records


class _OddError(ValueError):
    """The file has not the one structure that is read."""


def _need(holds: bool) -> None:
    if not holds:
        raise _OddError


def _directory(file: IO[bytes], size: int) -> tuple[int, int, int]:
    """Return where the directory begins, how many entries it has, and where it ends, by the last bytes of the file."""
    end = size - _END.size
    file.seek(max(end, 0))
    mark, disk, of, here, count, length, first, comment = _END.unpack(file.read())
    _need(mark == b"PK\x05\x06" and (disk, of, comment) == (0, 0, 0) and here == count)
    place = end - _LOCATOR.size - _END64.size
    file.seek(max(place, 0))
    wide = file.read(_END64.size + _LOCATOR.size) if place >= 0 else b""
    if wide[_END64.size :][:4] == b"PK\x06\x07":
        _, disk, at, disks = _LOCATOR.unpack(wide[_END64.size :])
        _need((disk, at, disks) == (0, place, 1))
        narrow = (count, length, first)
        mark, more, _, _, disk, of, here, count, length, first = _END64.unpack(wide[: _END64.size])
        _need((mark, more, disk, of) == (b"PK\x06\x06", _END64.size - 12, 0, 0) and here == count)
        tops = (0xFFFF, _WIDE, _WIDE)
        _need(all(a in (b, top) for a, b, top in zip(narrow, (count, length, first), tops, strict=True)))
        end = place
    _need(first + length == end and count > 0)
    return first, count, end


@dataclass(frozen=True, slots=True)
class _Entry:
    """What the directory says of a record; ``offset`` is where its own header begins."""

    offset: int
    name: bytes
    size: int
    checksum: int
    described: bool
    packed: bool


def _entries(directory: bytes, count: int) -> Iterator[_Entry]:
    at = 0
    for _ in range(count):
        mark, _, _, flags, method, _, _, checksum, packed, size, *more = _ENTRY.unpack_from(directory, at)
        length, extra, comment, disk, _, _, offset = more
        at += _ENTRY.size
        name = directory[at : at + length]
        size, packed, offset = _widened(directory[at + length : at + length + extra], [size, packed, offset])
        at += length + extra + comment
        _need(mark == b"PK\x01\x02" and disk == 0 and b"\0" not in name and not flags & _ENCRYPTED)
        _need(method != 0 or packed == size)
        yield _Entry(offset, name, size, checksum, bool(flags & _DESCRIBED), method != 0)
    _need(at == len(directory))


def _widened(extra: bytes, values: list[int]) -> list[int]:
    """Return ``values``; those that are ``_WIDE`` come from the one 64-bit field among an entry's extra fields."""
    fields = []
    while extra:
        kind, length = struct.unpack_from("<HH", extra)
        fields += [extra[4 : 4 + length]] if kind == 1 else []
        _need(len(extra) >= 4 + length)
        extra = extra[4 + length :]
    _need(len(fields) < 2)
    wide = iter(struct.unpack(f"<{len(fields[0]) // 8}Q", fields[0]) if fields else ())
    found = [next(wide, _WIDE) if value == _WIDE else value for value in values]
    _need(next(wide, None) is None)
    return found


def _record(file: IO[bytes], entry: _Entry, after: int) -> Record:
    """Return ``entry``'s record, which must reach to ``after`` with its header and descriptor."""
    file.seek(entry.offset)
    mark, _, flags, method, *_, length, extra = _LOCAL.unpack(file.read(_LOCAL.size))
    name = file.read(length)
    start = entry.offset + _LOCAL.size + length + extra
    _need(
        mark == BEGINNING
        and name == entry.name
        and method == 0
        and bool(flags & _DESCRIBED) == entry.described
    )
    rest = after - start - entry.size
    if entry.described:
        _need(rest in _DESCRIPTORS)
        file.seek(start + entry.size)
        _need(file.read(4) == b"PK\x07\x08")
    else:
        _need(rest == 0)
    return Record(name, start, entry.size, entry.checksum)
