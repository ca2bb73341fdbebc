"""Folders as transformers writes them: config.json beside weights. None of their code runs, nothing is downloaded."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gm_probe.errors import CheckpointError, StorageError, first_three, foreign_or, needs, start_of
from gm_probe.files.regular import read_at_most

NAME = "hf"
"""What --model calls the network that a folder's config.json describes."""
CONFIG = "config.json"
INDEX = "model.safetensors.index.json"
WEIGHTS = ("model.safetensors", "pytorch_model.bin")
LONGEST = 2**24
"""Bytes of a JSON file: some hundred times what the largest networks need."""
DEEP = ("layers", "layer", "depth", "depths", "blocks", "experts")
"""Settings whose names end so give a number of modules, each of which takes time to build."""
DEEPEST, LABELS, WIDEST = 1000, 10**5, 2**24
"""The most that a config may ask for: modules, labels, and anything else."""
# Kernels and backbones of these names may come from the Hub, and kernels are code. A path leads to another file, and a
# dtype becomes an attribute of torch.
_DROPPED = (
    "attn_implementation",
    "experts_implementation",
    "use_kernels",
    "auto_map",
    "quantization_config",
    "checkpoint_path",
    "dtype",
)


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
                    f"{folder / INDEX} names {start_of(name, 80)}, which is not a .safetensors file in its folder"
                )
        return [folder / str(name) for name in names]
    if (folder / WEIGHTS[1]).exists():
        return [folder / WEIGHTS[1]]
    if (folder / "adapter_config.json").exists():
        raise CheckpointError(
            f"{folder} holds a PEFT adapter, not a network. Merge it into its base (merge_and_unload) and "
            "save the result"
        )
    raise CheckpointError(
        f"{folder} has a {CONFIG} but no {WEIGHTS[0]}; save it with save_pretrained(FOLDER)"
    )


def load(folder: Path, state: Mapping[str, Tensor]) -> tuple[nn.Module, tuple[str, ...]]:
    """Build what the folder's config.json describes, in float32 and with eager attention, and load ``state``.

    transformers itself does both, for it knows which names of older files its networks have today.

    Returns:
        The network, and the names in ``state`` of parts beside it, such as the head of another task.

    Raises:
        UsageError: transformers is not installed.
        CheckpointError: no config of a classifier that transformers itself has, or weights that are not the network's.
    """
    path = folder / CONFIG
    record = _read(path)
    name = _architecture(path, record)
    if record.get("quantization_config"):
        raise CheckpointError(f"{path} describes a quantized network. Save it dequantized, in float32")
    _check_sizes(path, record, len(state))
    if ":" in str(record.get("architecture", "")):
        raise CheckpointError(
            f"{path} takes its network from {start_of(record['architecture'], 80)}, outside its folder. Build it "
            "with your own code: --model file.py:callable"
        )
    with _offline():
        with needs(f"--model {NAME}", "transformers", "hf"):
            import transformers
        _require_known(transformers, path, record, name)
        with _quiet(transformers), foreign_or(partial(_not_built, path)):
            config = transformers.CONFIG_MAPPING[record["model_type"]].from_dict(_plain(record))
            model, found = _built(getattr(transformers, name), config, path, state)
    return model, _left_out(folder, model, found)


def _require_known(transformers: Any, path: Path, record: Mapping[str, Any], name: str) -> None:
    """Raise CheckpointError unless transformers itself has the class ``name`` and the record's type."""
    kind = record.get("model_type")
    if isinstance(kind, str) and kind in transformers.CONFIG_MAPPING and hasattr(transformers, name):
        return
    remote = " and contains its own code, which is never run" if record.get("auto_map") else ""
    raise CheckpointError(
        f"{path} describes a {start_of(name, 80)} of type {start_of(kind, 80)}, which transformers "
        f"{transformers.__version__} does not have{remote}. Build it with your own code: --model "
        "file.py:callable"
    )


def _built(
    made: Any, config: Any, path: Path, state: Mapping[str, Tensor]
) -> tuple[nn.Module, dict[str, Any]]:
    """Return the network with its weights, and what transformers says of those that do not fit."""
    with torch.device("meta"):
        size = sum(p.numel() for p in made(config).parameters())
    held = sum(value.numel() for value in state.values())
    if size > 2 * held + 2**20:  # refused before it takes memory
        raise CheckpointError(f"{path} describes {size:,} parameters, but the weights are {held:,} numbers")
    model, found = made.from_pretrained(
        None,
        config=config,
        state_dict=dict(state),
        attn_implementation="eager",
        dtype=torch.float32,
        ignore_mismatched_sizes=True,  # the caller reports them
        output_loading_info=True,
        local_files_only=True,
        trust_remote_code=False,
    )
    return model, found


def _not_built(path: Path, cause: str) -> CheckpointError:
    return CheckpointError(f"transformers cannot build the network of {path}: {start_of(cause, 300)}")


def _left_out(folder: Path, model: nn.Module, found: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the names of parts beside the network; CheckpointError where its own weights do not fit."""
    wrong = {
        "missing": sorted(found["missing_keys"]),
        "of a different shape": sorted(str(entry[0]) for entry in found["mismatched_keys"]),
    }
    own = {child for child, _ in model.named_children()}
    left_out = [key for key in sorted(found["unexpected_keys"]) if key.partition(".")[0] not in own]
    wrong["unexpected"] = sorted(set(found["unexpected_keys"]) - set(left_out))
    problems = [f"{len(names)} {what} ({first_three(names)})" for what, names in wrong.items() if names]
    if problems:
        raise CheckpointError(f"the weights in {folder} do not fit its {CONFIG}: {'; '.join(problems)}")
    return tuple(left_out)


def _architecture(path: Path, record: Mapping[str, Any]) -> str:
    named = record.get("architectures")
    name = named[0] if isinstance(named, list) and named else None
    if not isinstance(name, str) or not re.fullmatch(
        r"\w+For(Image|Sequence)Classification(WithTeacher)?", name
    ):
        raise CheckpointError(
            f"{path} describes {start_of(name, 80)}. Only classifiers of images or sequences can be built "
            "(…ForImageClassification, …ForSequenceClassification)"
        )
    return name


@contextmanager
def _quiet(transformers: Any) -> Iterator[None]:
    """Silence transformers' progress bars and reports; our own messages replace them."""
    log = transformers.logging
    level, bar = log.get_verbosity(), log.is_progress_bar_enabled()
    log.set_verbosity(log.CRITICAL)
    log.disable_progress_bar()
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    finally:
        log.set_verbosity(level)
        if bar:
            log.enable_progress_bar()


@contextmanager
def _offline() -> Iterator[None]:
    """Keep the Hub's library from the network."""
    try:
        from huggingface_hub import constants
    except ImportError:  # without it transformers is not installed either
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
        content = read_at_most(path, LONGEST, follow=True)
        if content is None:
            raise CheckpointError(f"{path} has more than {LONGEST:,} bytes; networks need less")
        found = json.loads(content.decode())
    except StorageError as error:
        raise CheckpointError(str(error)) from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not valid JSON: {start_of(error)}") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{path} holds no JSON object")
    return found


def _plain(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return the config without what could bring code or downloads in, at any depth."""
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
                    f"{path} asks for {start_of(key, 80)} = {start_of(value, 80)}, but its weights or any network "
                    f"need at most {limit:,}"
                )
