"""Read and write checkpoints. Nothing in a file can run code: ``weights_only=True`` always, no fallback."""

import io
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from gm_probe.data.normalization import Normalization
from gm_probe.errors import CheckpointError, UsageError, first_three, start_of
from gm_probe.files.atomic import write_atomic
from gm_probe.files.pickles import load_torch, passing_over
from gm_probe.files.regular import open_to_read
from gm_probe.files.state_dicts import Chosen, below, choose, choose_at
from gm_probe.files.tensors import unusable
from gm_probe.models import huggingface
from gm_probe.models.formats import refuse_foreign, whole_object
from gm_probe.models.zoo import ModelSpec
from gm_probe.runs.records import CHECKPOINT

HEADER = "gm_probe"
LISTED = 2**21
"""Bytes of a safetensors header: some 20,000 tensors."""


@dataclass(frozen=True)
class Checkpoint:
    """Weights as read, with what gm_probe recorded beside them (None in a foreign file).

    Attributes:
        key: under which the weights stand in the file; empty at the top.
        alternatives: keys of the same weights with other values, such as an average of them, where none was chosen by
            ``key``.
        elsewhere: keys of other tensors in the file.
    """

    path: Path
    state: dict[str, Tensor]
    model: ModelSpec | None
    normalization: Normalization | None
    classes: tuple[str, ...]
    key: str = ""
    alternatives: tuple[str, ...] = ()
    elsewhere: tuple[str, ...] = ()


def is_simclr(checkpoint: Checkpoint) -> bool:
    """Return whether it records a SimCLR model, that is, an encoder and its projector."""
    return checkpoint.model is not None and checkpoint.model.temperature is not None


def read_checkpoint(path: Path, key: str | None = None, strip: str | None = None) -> Checkpoint:
    """Read a run folder, a folder of Hugging Face's, a .safetensors, or a torch file (.pt, .pth, .th, .ckpt, ...).

    Torch files may hold a state dict at the top or under any key, and in lists. Of several, the raw weights are
    taken before an average of them, those under a usual key before others; ``alternatives`` names the others.

    Args:
        key: dotted path of the state dict to take, or what the names of its tensors begin with.
        strip: prefix; only the tensors are taken whose names begin with it, named without it.

    Raises:
        CheckpointError: the file is missing, broken, holds code, or no usable weights.
        UsageError: nothing is under ``key``, or no name begins with ``strip``.
    """
    path, files = _files(path)
    size, contents, header = 0, [], None
    for file in files:
        if not file.is_file():
            raise CheckpointError(f"{file}: no such checkpoint")
        try:
            refuse_foreign(file)
        except OSError as error:
            raise CheckpointError(f"cannot read {file}: {error.strerror or error}") from error
        size += file.stat().st_size
        content, header = _read_safetensors(file) if file.suffix == ".safetensors" else _read_torch(file)
        contents.append(content)
    content = contents[0] if len(contents) == 1 else {n: v for part in contents for n, v in part.items()}
    chosen = _chosen(path, content, key)
    state = chosen.state if strip is None else _stripped(path, chosen.state, strip)
    # called on the class: a file may have set attributes on a tensor that hide its methods; detach drops them
    state = {name: Tensor.detach(value) for name, value in state.items()}
    for name, value in state.items():
        if problem := unusable(value, size):
            raise CheckpointError(f"{path}: tensor {start_of(name)!r} {problem}")
    model, normalization, classes = (None, None, ()) if header is None else _recorded(path, header)
    alternatives = () if key is not None else chosen.alternatives
    return Checkpoint(path, state, model, normalization, classes, chosen.key, alternatives, chosen.elsewhere)


def _recorded(path: Path, header: Any) -> tuple[ModelSpec, Normalization, tuple[str, ...]]:
    """Return the network, normalisation and class names that gm_probe recorded in ``header``."""
    try:
        record = json.loads(header)
        spec, classes = ModelSpec.from_dict(record["model"]), record["classes"]
        if not isinstance(classes, list) or not all(isinstance(name, str) for name in classes):
            raise TypeError("classes is not a list of names")
        if classes and spec.temperature is None and len(classes) != spec.num_classes:
            raise ValueError(f"{len(classes)} names for {spec.num_classes} classes")
        return spec, Normalization(tuple(record["mean"]), tuple(record["std"])), tuple(classes)
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError, UsageError) as error:
        raise CheckpointError(f"{path}: its gm_probe header is broken ({start_of(error)})") from error


def _files(path: Path) -> tuple[Path, list[Path]]:
    """Return the path that names a checkpoint, and the files that hold its weights."""
    if not path.is_dir():
        return path, [path]
    if (path / CHECKPOINT).exists():
        return path / CHECKPOINT, [path / CHECKPOINT]
    if huggingface.is_folder(path):
        return path, huggingface.weight_files(path)
    raise CheckpointError(
        f"{path} holds no {CHECKPOINT}; give a run folder, a checkpoint file, or a folder of Hugging Face's with "
        f"{huggingface.CONFIG}"
    )


def _chosen(path: Path, content: Any, key: str | None) -> Chosen:
    chosen = choose(content) if key is None else choose_at(content, key)
    if chosen is not None:
        return chosen
    there = choose(content)
    if there is not None:
        raise UsageError(
            f"{path} holds no tensors under --key {start_of(key)}. There are tensors under "
            f"{first_three([there.key or 'no key', *there.alternatives, *there.elsewhere])}"
        )
    if not isinstance(content, (dict, list, tuple)):
        raise CheckpointError(f"{path} holds {type(content).__name__}, not a state dict")
    names = content if isinstance(content, dict) else ()
    # keys of other types may have texts of any length
    keys = [name if isinstance(name, str) else f"a key of {type(name).__name__}" for name in names]
    held = f"it has {first_three(keys)}" if keys else f"it is a {type(content).__name__} without names"
    raise CheckpointError(
        f"{path} holds no named tensors as model.state_dict() returns them ({held}). Save the state dict"
    )


def _stripped(path: Path, state: dict[str, Tensor], strip: str) -> dict[str, Tensor]:
    found = below(state, strip if strip.endswith(".") else f"{strip}.") or below(state, strip)
    if not found:
        raise UsageError(
            f"{path}: no tensor's name begins with --strip {start_of(strip)}; the names are "
            f"{first_three(list(state))}"
        )
    return found


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], str | None]:
    with open_to_read(path, follow=True) as file:
        length = int.from_bytes(file.read(8), "little")
    if LISTED < length <= path.stat().st_size:  # parsing it takes many times its size in memory
        raise CheckpointError(f"{path} has a header of {length:,} bytes; networks need less than {LISTED:,}")
    try:
        with _utf8_name(path) as name, safetensors.safe_open(name, framework="pt", device="cpu") as file:
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  no __iter__
            return state, (file.metadata() or {}).get(HEADER)
    except MemoryError:
        raise
    except Exception as error:  # safetensors and torch raise many kinds on a broken file
        raise CheckpointError(f"{path} is not a readable safetensors file: {start_of(error)}") from error


@contextmanager
def _utf8_name(path: Path) -> Iterator[Path]:
    """Yield a name of ``path`` in UTF-8, which safetensors needs."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        with open_to_read(path, follow=True) as file:
            yield Path(f"/dev/fd/{file.fileno()}")
    else:
        yield path


def _read_torch(path: Path) -> tuple[Any, Any]:
    """Return all that the file holds, and gm_probe's record in it."""
    try:
        with passing_over():
            content = load_torch(path)
    except (MemoryError, CheckpointError):
        raise
    except Exception as error:  # torch, zipfile and the unpickler raise many kinds on a broken file
        code = re.search(r"GLOBAL (\S+)|(TorchScript)", str(error))
        if code is not None:
            whole = whole_object(path)
            what = f"a whole object of {start_of(whole)}" if whole else start_of(code[1] or code[2])
            raise CheckpointError(
                f"{path} holds more than plain tensors, which could run code ({what}). If you trust the "
                "file, load it yourself and torch.save(model.state_dict(), ...) to a new file"
            ) from error
        reason = str(error).rpartition("WeightsUnpickler error: ")[2].strip().partition("\n")[0]
        if reason.startswith("Unsupported operand"):
            raise CheckpointError(
                f"{path} uses a pickle protocol that torch cannot read without running code "
                f"({start_of(reason)}). Save it again with torch.save's default pickle_protocol, which is 2"
            ) from error
        raise CheckpointError(
            f"{path} is not a readable checkpoint: {type(error).__name__}: {start_of(reason)}"
        ) from error
    return content, content.get(HEADER) if isinstance(content, dict) else None


def save_checkpoint(
    path: Path, model: nn.Module, spec: ModelSpec, normalization: Normalization, classes: tuple[str, ...] = ()
) -> None:
    """Write weights and record to ``path``: .safetensors, or a torch file by any other suffix. Atomic.

    ``gmprobe measure`` needs neither ``--model`` nor ``--mean/--std`` for such a file.

    Raises:
        StorageError: it cannot be written.
    """
    header = json.dumps(
        {"model": spec.as_dict(), "mean": normalization.mean, "std": normalization.std, "classes": classes}
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
