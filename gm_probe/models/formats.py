"""Name files that hold a network in another way than as plain tensors, by their first bytes alone."""

from __future__ import annotations

import pickletools
import re
import zipfile
from pathlib import Path

from gm_probe.errors import CheckpointError, start_of
from gm_probe.files.regular import open_to_read

_WEIGHTS = "save plain weights: torch.save(model.state_dict(), 'weights.pt')"
_SOURCE = f"load it in the program that made it, and {_WEIGHTS}"
_CONVERT = "convert its weights to a PyTorch state dict, and save that with torch.save or safetensors"
_UNPACK = "unpack it first, and give the checkpoint inside"

STARTS: tuple[tuple[bytes, str, str], ...] = (
    (b"\x89HDF\r\n\x1a\n", "an HDF5 file, as Keras writes weights", _CONVERT),
    (b"GGUF", "a GGUF file of llama.cpp", "give the .safetensors that it was made from"),
    (b"\x93NUMPY", "a NumPy array (.npy)", _CONVERT),
    (b"\x1f\x8b", "a gzip archive", _UNPACK),
    (b"BZh", "a bzip2 archive", _UNPACK),
    (b"\xfd7zXZ\x00", "an xz archive", _UNPACK),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive", _UNPACK),
    (b"Rar!", "a RAR archive", _UNPACK),
    (b"\x28\xb5\x2f\xfd", "a zstd archive", _UNPACK),
    (b"\x89PNG", "an image (PNG)", "images go with --unlabeled or --labeled"),
    (b"\xff\xd8\xff", "an image (JPEG)", "images go with --unlabeled or --labeled"),
    (b"version https://git-lfs", "a Git LFS pointer, not the file itself", "fetch it with `git lfs pull`"),
    (b"<!DOCTYPE html", "a web page", "download the file itself"),
    (b"<html", "a web page", "download the file itself"),
    (b"{", "a JSON text", "give the weights beside it, or their folder"),
)
"""First bytes, what the file is, and what to do."""
RECORDS: tuple[tuple[str, str, str], ...] = (
    (r"/?constants\.pkl", "a TorchScript program", _SOURCE),
    (
        r"(serialized_exported_program\.json|models/.+\.json|.*/archive_format|archive_format)",
        "a program of torch.export (.pt2)",
        "save plain weights: torch.save(program.state_dict, 'weights.pt')",
    ),
    (r"model\.weights\.h5", "a Keras model (.keras)", _CONVERT),
    (r".*\.npy", "NumPy arrays (.npz)", _CONVERT),
    (r"\.data/extern_modules", "a torch.package", _SOURCE),
)
"""Names of a zip file's records, below its root folder or at the top, and the same."""


def refuse_foreign(path: Path) -> None:
    """Raise CheckpointError where ``path`` is no torch file and no safetensors file, but another that is known.

    A torch file named .safetensors, or the other way round, is refused too: the name says how a file may be read.

    Raises:
        OSError: it cannot be read.
    """
    with open_to_read(path, follow=True) as file:
        start = file.read(512)
    named = path.suffix == ".safetensors"
    if start[8:9] == b"{" and int.from_bytes(start[:8], "little") <= path.stat().st_size:
        if named:
            return
        raise CheckpointError(f"{path} is a safetensors file; rename it to {path.stem}.safetensors")
    if named and (start.startswith(b"\x80\x02") or (start.startswith(b"PK\x03\x04") and _zip(path) is None)):
        raise CheckpointError(f"{path} is a torch file; rename it to {path.stem}.pt")
    known = _known(path, start)
    if known is not None:
        raise CheckpointError(f"{path} is {known[0]}; {known[1]}")


def _known(path: Path, start: bytes) -> tuple[str, str] | None:
    if start.startswith(b"PK\x03\x04"):
        return _zip(path)
    for magic, kind, remedy in STARTS:
        if start.lower().startswith(magic.lower()):
            return kind, remedy
    if start[257:262] == b"ustar":
        return "a tar archive", _UNPACK
    if start[4:8] == b"TFL3":
        return "a TensorFlow Lite model", _CONVERT
    # protobuf: the version of ONNX's format, then its producer, domain, graph or operators
    if start[:1] == b"\x08" and 1 <= start[1] <= 64 and start[2:3] in (b"\x12", b"\x1a", b"\x3a", b"\x42"):
        return "an ONNX model", "give the PyTorch weights that it was exported from"
    # a map whose first key is a short text; 0x80 begins a pickle
    if re.match(rb"([\x81-\x8f]|\xde..|\xdf....)[\xa1-\xbf\xd9]", start, re.DOTALL):
        return "a msgpack file, as Flax writes weights", _CONVERT
    return None


def _zip(path: Path) -> tuple[str, str] | None:
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except Exception:  # noqa: BLE001  broken in any way: torch's reader says in which
        return None
    short = [name.partition("/")[2] for name in names]
    for pattern, kind, remedy in RECORDS:
        if any(re.fullmatch(pattern, name) for name in (*names, *short)):
            return kind, remedy
    if any(name.lower().endswith("data.pkl") for name in names):
        return None
    first = f"it begins with {start_of(names[0], 80)}" if names else "it is empty"
    return f"a zip archive without torch weights ({first})", _UNPACK


def whole_object(path: Path) -> str | None:
    """Return the class of the object that a torch file pickles whole, such as 'mynet.Net'; None: a dict or a list."""
    try:
        with zipfile.ZipFile(path) as archive:
            name = next(name for name in archive.namelist() if name.endswith("data.pkl"))
            with archive.open(name) as record:
                for operation, argument, _ in pickletools.genops(record):
                    if operation.name != "PROTO":
                        kind = str(argument).replace(" ", ".")
                        return None if operation.name != "GLOBAL" or kind.startswith("collections.") else kind
    except Exception:  # noqa: BLE001  broken in any way, or of torch's older format
        return None
    return None
