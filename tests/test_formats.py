"""Files that hold a network in another way: each is named by its content, whatever it is called."""

from __future__ import annotations

import io
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import nn

from gm_probe.errors import CheckpointError
from gm_probe.models.checkpoints import read_checkpoint


def zipped(*names: str) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name in names:
            archive.writestr(name, b"x")
    return buffer.getvalue()


def tarred() -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("a.pt"), io.BytesIO())
    return buffer.getvalue()


def npz() -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, w=np.ones(3))
    return buffer.getvalue()


def onnx() -> bytes:
    """The start of a ModelProto: ir_version 8, producer_name 'pytorch'."""
    return b"\x08\x08\x12\x07pytorch" + bytes(50)


FILES: dict[str, tuple[bytes, str]] = {
    "HDF5": (b"\x89HDF\r\n\x1a\n" + bytes(100), "an HDF5 file"),
    "Keras": (zipped("metadata.json", "config.json", "model.weights.h5"), "a Keras model"),
    "GGUF": (b"GGUF" + bytes(100), "a GGUF file"),
    "ONNX": (onnx(), "an ONNX model"),
    "npy": (b"\x93NUMPY\x01\x00" + bytes(100), "a NumPy array"),
    "npz": (npz(), r"NumPy arrays \(\.npz\)"),
    "msgpack": (b"\x82\xa6params\x81\xa1w\x01\xa4step\x00", "a msgpack file, as Flax"),
    "tar": (tarred(), "a tar archive"),
    "gzip": (b"\x1f\x8b\x08" + bytes(50), "a gzip archive"),
    "zip": (
        zipped("folder/readme.txt"),
        r"a zip archive without torch weights \(it begins with folder/readme",
    ),
    "empty zip": (b"PK\x03\x04" + bytes(60), "it is truncated, or not a zip file"),
    "lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "a Git LFS pointer"),
    "html": (b"<!doctype HTML>\n<html>", "a web page"),
    "json": (b'{"architectures": []}', "a JSON text"),
    "image": (b"\x89PNG\r\n\x1a\n" + bytes(50), "an image"),
}


@pytest.mark.parametrize("kind", FILES)
@pytest.mark.parametrize("suffix", [".pt", ""])
def test_other_files_are_named(tmp_path: Path, kind: str, suffix: str) -> None:
    content, said = FILES[kind]
    path = tmp_path / f"a{suffix}"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=said) as caught:
        read_checkpoint(path)
    message = str(caught.value)
    assert str(path) in message
    assert message.isprintable()
    assert ";" in message or kind == "empty zip"  # what to do


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_programs_are_named(tmp_path: Path) -> None:
    torch.export.save(torch.export.export(nn.Linear(2, 2), (torch.ones(1, 2),)), tmp_path / "a.pt2")
    with pytest.raises(CheckpointError, match=r"a program of torch\.export .*program\.state_dict"):
        read_checkpoint(tmp_path / "a.pt2")
    torch.jit.trace(nn.Linear(2, 2), torch.ones(1, 2)).save(str(tmp_path / "b.pt"))
    with pytest.raises(CheckpointError, match="a TorchScript program"):
        read_checkpoint(tmp_path / "b.pt")


def test_a_file_is_read_as_its_name_says(tmp_path: Path) -> None:
    state = {"w": torch.ones(2)}
    safetensors.torch.save_file(state, tmp_path / "a.bin")
    with pytest.raises(CheckpointError, match=r"is a safetensors file; rename it to a\.safetensors"):
        read_checkpoint(tmp_path / "a.bin")
    for legacy in (False, True):
        torch.save(state, tmp_path / "a.safetensors", _use_new_zipfile_serialization=not legacy)
        with pytest.raises(CheckpointError, match=r"is a torch file; rename it to a\.pt"):
            read_checkpoint(tmp_path / "a.safetensors")
    torch.save(state, tmp_path / "weights")
    assert torch.equal(read_checkpoint(tmp_path / "weights").state["w"], state["w"])


def test_a_safetensors_file_is_no_msgpack_for_the_length_of_its_header(tmp_path: Path) -> None:
    """A header of 0xa188 bytes begins as a map of 8 names does."""
    header = (
        b'{"__metadata__":{"a":"'
        + b"x" * 41_260
        + b'"},"w":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
    )
    header = header.ljust(0xA188)
    (tmp_path / "a.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    assert read_checkpoint(tmp_path / "a.safetensors").state["w"].tolist() == [0]
