"""Read and write checkpoints. Nothing in a file can run code: ``weights_only=True`` always, no fallback."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from gm_probe.core.batches import Normalization
from gm_probe.core.errors import CheckpointError, UsageError
from gm_probe.core.files import write_atomic
from gm_probe.core.models import ModelSpec
from gm_probe.core.pickles import entries, load_torch
from gm_probe.core.records import CHECKPOINT
from gm_probe.core.regular import open_to_read

HEADER = "gm_probe"
NESTED = ("state_dict", "model_state_dict", "model_state", "model")
PREFIXES = ("module.", "_orig_mod.", "model.")
LISTED = 2**21
"""Bytes of a safetensors header: some 20,000 tensors."""


@dataclass(frozen=True)
class Checkpoint:
    """Weights as read, with what gm_probe recorded beside them (None in a foreign file)."""

    path: Path
    state: dict[str, Tensor]
    model: ModelSpec | None
    normalization: Normalization | None
    classes: tuple[str, ...]


def is_simclr(checkpoint: Checkpoint) -> bool:
    """Whether it records a SimCLR model: an encoder and its projector."""
    return checkpoint.model is not None and checkpoint.model.temperature is not None


def read_checkpoint(path: Path) -> Checkpoint:
    """Read a run folder, a .safetensors, or a torch file (.pt, .pth, .th, .ckpt, ...).

    Torch files may hold a plain state dict or one under 'state_dict', 'model', 'model_state_dict' or
    'model_state' (Lightning's included), or one such inside another.

    Raises:
        CheckpointError: the file is missing, broken, holds code, or no usable weights.
    """
    if path.is_dir():
        inner = path / CHECKPOINT
        if not inner.exists():
            raise CheckpointError(f"{path} holds no {CHECKPOINT}; give a run folder or a checkpoint file")
        path = inner
    if not path.is_file():
        raise CheckpointError(f"{path}: no such checkpoint")
    try:
        with open_to_read(
            path, follow=True
        ) as file:  # safetensors says of what it may not read that it is not there
            beginning = file.read(8)
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from error
    if path.suffix == ".safetensors":
        state, header = _read_safetensors(path, int.from_bytes(beginning, "little"))
    else:
        state, header = _read_torch(path)
    if not state:
        raise CheckpointError(f"{path} holds no tensors")
    _check_tensors(path, state, path.stat().st_size)
    if header is None:
        return Checkpoint(path, state, None, None, ())
    try:
        record = json.loads(header)
        spec, classes = ModelSpec.from_dict(record["model"]), record["classes"]
        if not isinstance(classes, list) or not all(isinstance(name, str) for name in classes):
            raise TypeError("classes is no list of names")
        if classes and spec.temperature is None and len(classes) != spec.num_classes:
            raise ValueError(f"{len(classes)} names of {spec.num_classes} classes")
        normalization = Normalization(tuple(record["mean"]), tuple(record["std"]))
        return Checkpoint(path, state, spec, normalization, tuple(classes))
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError, UsageError) as error:
        raise CheckpointError(f"{path}: its gm_probe header is broken ({_plain(error)})") from error


def _read_safetensors(path: Path, length: int) -> tuple[dict[str, Tensor], str | None]:
    """Of a file that says its header has ``length`` bytes."""
    if LISTED < length <= path.stat().st_size:  # it takes many times its size in memory
        raise CheckpointError(f"{path} has a header of {length:,} bytes; networks need less than {LISTED:,}")
    try:
        with _utf8_name(path) as name, safetensors.safe_open(name, framework="pt", device="cpu") as file:
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  no __iter__
            return state, (file.metadata() or {}).get(HEADER)
    except MemoryError:
        raise
    except Exception as error:  # safetensors and torch raise many kinds on a broken file
        raise CheckpointError(f"{path} is not a readable safetensors file: {_plain(error)}") from error


@contextmanager
def _utf8_name(path: Path) -> Iterator[Path]:
    """``path`` by a name that is UTF-8, which safetensors asks of one."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        with path.open("rb") as file:
            yield Path(f"/dev/fd/{file.fileno()}")
    else:
        yield path


def _read_torch(path: Path) -> tuple[dict[str, Tensor], str | None]:
    try:
        content = load_torch(path)
    except (MemoryError, CheckpointError):
        raise
    except Exception as error:  # torch, zipfile and the unpickler raise many kinds on a broken file
        code = re.search(r"GLOBAL (\S+)|(TorchScript)", str(error))
        if code is not None:
            raise CheckpointError(
                f"{path} holds more than plain tensors, which could run code ({_plain(code[1] or code[2])}); "
                "where you trust it, load it yourself and torch.save(model.state_dict(), ...) to a new file"
            ) from error
        reason = str(error).rpartition("WeightsUnpickler error: ")[2].strip().partition("\n")[0]
        raise CheckpointError(
            f"{path} is not a readable checkpoint: {type(error).__name__}: {_plain(reason)}"
        ) from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds {type(content).__name__}, not a state dict")
    header = content.get(HEADER)
    for _ in range(3):  # bounded: a hostile file may nest itself in itself
        content = next((entries(content[k]) for k in NESTED if isinstance(content.get(k), dict)), content)
    others = [
        name
        if isinstance(name, str)
        else f"a key of {type(name).__name__}"  # whose text may be beyond all bounds
        for name, value in content.items()
        if not isinstance(name, str) or not isinstance(value, Tensor)
    ]
    if others:
        raise CheckpointError(
            f"{path} is no state dict: {_some(others)} are not tensors; weights are looked for at the top or "
            f"under {', '.join(NESTED)}"
        )
    nested = [name for name, value in content.items() if value.is_nested]
    if nested:
        raise CheckpointError(f"{path}: tensor {_plain(nested[0])!r} is nested; dense weights are needed")
    # by the class: on a tensor, too, a file may have set an attribute that hides a method; this leaves them behind
    return {name: Tensor.detach(value) for name, value in content.items()}, header


def _plain(text: object) -> str:
    """The start of a message or name, safe to print on one line: files choose parts of it."""
    return "".join(c if c.isprintable() else "?" for c in " ".join(str(text).split()))[:160]


def _some(names: Sequence[object]) -> str:
    """The first three names, safe to print."""
    return ", ".join(_plain(name) for name in names[:3]) + (", …" if len(names) > 3 else "")


def _check_tensors(path: Path, state: Mapping[str, Tensor], size: int) -> None:
    for name, value in state.items():
        problem = _problem(value, size)
        if problem is not None:
            raise CheckpointError(f"{path}: tensor {_plain(name)!r} {problem}")


NOT_FINITE = "NaN or infinite value(s); use an earlier checkpoint"


def _problem(value: Tensor, size: int) -> str | None:
    """Why a tensor from a file of ``size`` bytes cannot serve as weights."""
    if value.is_meta:
        return "has no data (it was saved from the meta device)"
    if value.layout != torch.strided or value.is_quantized:
        return "is sparse or quantized; dense weights are needed"
    if value.is_complex():
        return "is complex; real weights are needed"
    held = value.untyped_storage().nbytes()
    if held > size or value.numel() * value.element_size() > max(held, 2**20):
        return f"claims {value.numel():,} values but the file holds fewer"
    if not value.is_floating_point():
        return None
    if value.element_size() == 1:  # narrow floats have no isfinite
        try:
            value = value.float()
        except NotImplementedError:
            return f"is {value.dtype}, which torch cannot convert to float32"
    pieces = value.reshape(-1).split(
        2**20
    )  # a mask over all of it, and what it takes, would be twice the file
    # −∞ is a mask's, where the tensor turns out to be a buffer (``load_weights``)
    bad = sum(int((~(torch.isfinite(piece) | torch.isneginf(piece))).sum()) for piece in pieces)
    return f"has {bad} {NOT_FINITE}" if bad else None


def load_weights(model: nn.Module, checkpoint: Checkpoint) -> None:
    """Copy the checkpoint's weights into ``model``; see ``fitting``.

    Raises:
        CheckpointError: a mismatch, or −∞ in what is no buffer, naming the tensors.
    """
    state = fitting(model, checkpoint)
    buffers = {name for name, _ in model.named_buffers(remove_duplicate=False)}
    for name, value in state.items():
        if name not in buffers and value.is_floating_point() and value.numel():
            infinite = int(torch.isneginf(value.float() if value.element_size() == 1 else value).sum())
            if infinite:
                raise CheckpointError(f"{checkpoint.path}: tensor {name!r} has {infinite} {NOT_FINITE}")
    model.load_state_dict(state, strict=False)


def fitting(model: nn.Module, checkpoint: Checkpoint) -> dict[str, Tensor]:
    """The checkpoint's tensors by their names in ``model`` (which may be on the meta device): each with its shape.

    Prefixes 'module.', '_orig_mod.' and 'model.' are stripped, also nested. Only BatchNorm's
    ``num_batches_tracked`` may be absent (checkpoints before torch 0.4.1 have none; eval mode ignores it).

    Raises:
        CheckpointError: a mismatch, naming the tensors.
    """
    expected = model.state_dict()
    state = strip_prefixes(checkpoint, expected)
    for first, *others in _tied(model):  # of which a file may hold one alone, as safetensors' own writer does
        held = [name for name in (first, *others) if name in state]
        for name in held[1:]:
            if state[name].shape == state[held[0]].shape and not torch.equal(state[name], state[held[0]]):
                raise CheckpointError(
                    f"{checkpoint.path}: tensors {held[0]!r} and {name!r} differ, but the model has one for both; "
                    "check --model"
                )
        state |= {name: state[held[0]] for name in (first, *others) if held}
    missing = [k for k in expected if k not in state and not k.endswith("num_batches_tracked")]
    extra = [k for k in state if k not in expected]
    shapes = [
        f"{k} {tuple(state[k].shape)} ≠ {tuple(expected[k].shape)} in the model"
        for k in expected
        if k in state and state[k].shape != expected[k].shape
    ]
    problems = [
        f"{len(names)} {kind} ({_some(names)})"
        for kind, names in (("missing", missing), ("unexpected", extra), ("of another shape", shapes))
        if names
    ]
    if problems:
        raise CheckpointError(
            f"{checkpoint.path} does not fit the model: {'; '.join(problems)}; check --model"
        )
    for name, value in state.items():
        if expected[name].is_floating_point() and not value.is_floating_point():
            raise CheckpointError(f"{checkpoint.path}: tensor {name!r} is {value.dtype}, not floating point")
    return state


def _tied(model: nn.Module) -> list[list[str]]:
    """The names of every tensor that has several."""
    names: dict[int, list[str]] = {}
    for name, value in model.state_dict(keep_vars=True).items():
        names.setdefault(id(value), []).append(name)
    return [some for some in names.values() if len(some) > 1]


def strip_prefixes(checkpoint: Checkpoint, expected: Mapping[str, Any]) -> dict[str, Tensor]:
    """The checkpoint's tensors by the names in ``expected``, where a name agrees once its prefixes are gone."""
    stripped: dict[str, Tensor] = {}
    for name, value in checkpoint.state.items():
        short = name
        while short not in expected:
            prefix = next((p for p in PREFIXES if short.startswith(p)), None)
            if prefix is None:
                short = name  # no match below any prefix: report the name as the file has it
                break
            short = short.removeprefix(prefix)
        if short in stripped:
            raise CheckpointError(
                f"{checkpoint.path} holds two tensors for {_plain(short)!r} once its prefixes are stripped; "
                "save one model"
            )
        stripped[short] = value
    return stripped


def save_checkpoint(
    path: Path,
    model: nn.Module,
    spec: ModelSpec,
    normalization: Normalization,
    classes: tuple[str, ...] = (),
) -> None:
    """Write weights and record to ``path``: .safetensors, or a torch file by any other suffix. Atomic.

    ``gmprobe measure`` needs neither ``--model`` nor ``--mean/--std`` for such a file.

    Raises:
        StorageError: it cannot be written.
    """
    header = json.dumps(
        {
            "model": spec.as_dict(),
            "mean": normalization.mean,
            "std": normalization.std,
            "classes": classes,
        }
    )
    # cloned: safetensors refuses tied tensors that share memory, and strict loading wants both names
    state = {
        name: value.detach().to("cpu").clone(memory_format=torch.contiguous_format)
        for name, value in model.state_dict().items()
    }
    if path.suffix == ".safetensors":
        write_atomic(path, safetensors.torch.save(state, metadata={HEADER: header}))
    else:
        buffer = io.BytesIO()
        torch.save({"state_dict": state, HEADER: header}, buffer)
        write_atomic(path, buffer.getvalue())
