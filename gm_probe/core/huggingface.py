"""Folders as transformers writes them: config.json beside weights. None of their code runs, nothing is downloaded."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gm_probe.core.errors import CheckpointError, UsageError, first_line, out_of_memory, printable

NAME = "hf"
"""What --model calls the network that a folder's config.json describes."""
CONFIG = "config.json"
INDEX = "model.safetensors.index.json"
WEIGHTS = ("model.safetensors", "pytorch_model.bin")
LONGEST = 2**24
"""Bytes of a JSON file: some hundred times what the largest networks need."""
DEEP = ("layers", "layer", "depth", "depths", "blocks", "experts")
"""Endings of the names of settings that say how many modules there are; each takes time, whatever it holds."""
DEEPEST, LABELS, WIDEST = 1000, 10**5, 2**24
"""Most that a config may ask for: of modules, of labels, of all else."""
HEADS = {
    "ForImageClassification": "AutoModelForImageClassification",
    "ForSequenceClassification": "AutoModelForSequenceClassification",
}
"""What an architecture's name ends with, and transformers' class that builds such."""
# kernels and backbones of these names may come from the Hub, and kernels are code
_DROPPED = ("attn_implementation", "experts_implementation", "use_kernels", "auto_map", "quantization_config")


def is_folder(path: Path) -> bool:
    """Return whether ``path`` is a folder of a model of transformers'."""
    return (path / CONFIG).is_file()


def weight_files(folder: Path) -> list[Path]:
    """Return the files of ``folder`` that hold the weights, several where they are sharded.

    Raises:
        CheckpointError: there are none, or the index names what is no file in the folder.
    """
    if (folder / WEIGHTS[0]).exists():
        return [folder / WEIGHTS[0]]
    if (folder / INDEX).exists():
        shards = _read(folder / INDEX).get("weight_map")
        if not isinstance(shards, dict) or not shards:
            raise CheckpointError(f"{folder / INDEX} has no weight_map, which names the files of the weights")
        names = dict.fromkeys(shards.values())
        for name in names:
            if not isinstance(name, str) or Path(name).name != name or not name.endswith(".safetensors"):
                raise CheckpointError(
                    f"{folder / INDEX} names {_short(name)}, which is no .safetensors in its folder"
                )
        return [folder / str(name) for name in names]
    if (folder / WEIGHTS[1]).exists():
        return [folder / WEIGHTS[1]]
    if (folder / "adapter_config.json").exists():
        raise CheckpointError(
            f"{folder} holds an adapter of PEFT, not a network; merge it into its base (merge_and_unload) and save that"
        )
    raise CheckpointError(
        f"{folder} has a {CONFIG} but no {WEIGHTS[0]}; save it with save_pretrained(FOLDER)"
    )


def build(folder: Path, tensors: int) -> nn.Module:
    """Build the network that the folder's config.json describes, with fresh weights in float32 and eager attention.

    Args:
        tensors: that its files hold; no network has more layers.

    Raises:
        UsageError: transformers is not installed.
        CheckpointError: no config of a classifier that transformers itself has, or one that it cannot build.
    """
    path = folder / CONFIG
    record = _read(path)
    architectures = record.get("architectures") or [None]
    name = architectures[0] if isinstance(architectures, list) else None
    automatic = next((auto for ending, auto in HEADS.items() if str(name).endswith(ending)), None)
    if automatic is None:
        raise CheckpointError(
            f"{path} is of {_short(name)}; classifiers of images and of sequences can be built (…{', …'.join(HEADS)})"
        )
    if record.get("quantization_config"):
        raise CheckpointError(f"{path} is of a quantized network; save it dequantized, in float32")
    _check_sizes(path, record, tensors)
    with _offline():
        try:
            import transformers
        except ImportError as error:
            raise UsageError(
                f"--model {NAME} needs transformers, which is not installed; pip install 'gm_probe[hf]'"
            ) from error
        kinds = transformers.CONFIG_MAPPING
        kind = record.get("model_type")
        if not isinstance(kind, str) or kind not in kinds:
            remote = " and brings its own code, which is never run" if record.get("auto_map") else ""
            raise CheckpointError(
                f"{path} is of the model type {_short(kind)}, which transformers {transformers.__version__} does not "
                f"have{remote}; build it by code of yours: --model file.py:callable"
            )
        try:
            config = kinds[kind].from_dict(_plain(record))
            return getattr(transformers, automatic).from_config(
                config, trust_remote_code=False, attn_implementation="eager", dtype=torch.float32
            )
        except Exception as error:  # whatever a config's values make it raise
            if out_of_memory(error):
                raise
            raise CheckpointError(
                f"transformers cannot build the network of {path}: {type(error).__name__}: "
                f"{printable(first_line(error))[:300]}"
            ) from error


@contextmanager
def _offline() -> Iterator[None]:
    """Keep the Hub's library from the network."""
    try:
        from huggingface_hub import constants
    except ImportError:  # then there is no transformers either
        yield
        return
    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def _read(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > LONGEST:
            raise CheckpointError(
                f"{path} has {path.stat().st_size:,} bytes; networks need less than {LONGEST:,}"
            )
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is no JSON: {printable(str(error))[:160]}") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{path} holds no JSON object")
    return found


def _plain(record: Mapping[str, Any]) -> dict[str, Any]:
    """The config without what could bring code or downloads in, at any depth."""
    return {
        key: _plain(value) if isinstance(value, dict) else value
        for key, value in record.items()
        if not any(word in key for word in _DROPPED)
    } | ({"use_pretrained_backbone": False} if "use_pretrained_backbone" in record else {})


def _check_sizes(path: Path, record: Mapping[str, Any], tensors: int) -> None:
    """Refuse what would take for ever to build, or all memory, whatever the weights."""
    left: list[tuple[str, Any]] = list(record.items())
    while left:
        key, value = left.pop()
        if isinstance(value, (dict, list)):
            left += value.items() if isinstance(value, dict) else [(key, inner) for inner in value]
        elif isinstance(value, int):
            limit = min(DEEPEST, tensors) if key.endswith(DEEP) else LABELS if "label" in key else WIDEST
            if value > limit:
                raise CheckpointError(
                    f"{path} asks for {printable(key)[:80]} = {_short(value)}; {limit:,} is the most that its weights "
                    "or any network can need"
                )


def _short(value: object) -> str:
    return printable(str(value))[:80] if isinstance(value, str) else f"{value!r}"[:80]
