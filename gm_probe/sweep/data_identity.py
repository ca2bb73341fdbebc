"""Which training set each of several checkpoints was trained on, read from the run folders' records."""

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from gm_probe.data.examples import Examples
from gm_probe.data.images import blocks
from gm_probe.errors import CheckpointError, DataError, StorageError
from gm_probe.models.huggingface import is_folder
from gm_probe.runs.records import CHECKPOINT, CONFIG, SPLIT, find_runs, read_run, read_split
from gm_probe.training.permissions import Permissions
from gm_probe.training.run_splits import MARKS, NO_PERMISSIONS, own_unlabeled

UNKNOWN = "unknown"
"""What the training set of every checkpoint without a run folder is called."""
# fmt: off
NO_PROCEDURE = frozenset((
    "environment", "data_root", "download", "device", "threads", "seed", "split_seed",
    "data", "image_size", "resize", "crop", "num_train", "labels", "num_unlabeled", "num_test", "validation",
    "eval_every", "track_every", "track_rho",
))
# fmt: on
"""Settings in a run's config.toml that are no part of its training procedure: place, seeds, data, bookkeeping."""


def is_run(path: Path) -> bool:
    return (path / CONFIG).exists() and (path / SPLIT).exists()


def find_checkpoints(given: Sequence[Path]) -> tuple[list[Path], list[tuple[Path, str]], list[str]]:
    """Return the checkpoints in the given order, each once; runs left out, with the reason; notes on both.

    Raises:
        CheckpointError: a path does not exist.
        DataError: no run below a folder has finished.
    """
    kept: dict[Path, Path] = {}
    excluded: list[tuple[Path, str]] = []
    repeated: list[Path] = []
    for path in given:
        if not path.exists():
            raise CheckpointError(f"{path}: no such checkpoint")
        if path.name == CHECKPOINT and is_run(path.parent):
            path = path.parent  # the run's own file: its training set is known
        found = [path]
        if path.is_dir() and not ((path / CHECKPOINT).exists() or is_folder(path)):
            found, others = _finished_runs(path)
            excluded += others
        for one in found:
            if kept.setdefault(one.resolve(), one) is not one:
                repeated.append(one)
    notes = [f"left out {len(excluded)} run(s): {reasons(excluded)}"] if excluded else []
    if repeated:
        notes.append(f"{', '.join(map(str, repeated))} given more than once; counted once")
    return list(kept.values()), excluded, notes


def _finished_runs(root: Path) -> tuple[list[Path], list[tuple[Path, str]]]:
    finished: list[Path] = []
    others: list[tuple[Path, str]] = []
    for path in find_runs(root):
        try:
            status = read_run(path).status
            if status == "finished" and not (path / CHECKPOINT).exists():
                status = f"no {CHECKPOINT}"
        except StorageError as error:  # one torn file must not hide the other runs
            status = str(error)
        if status == "finished":
            finished.append(path)
        else:
            others.append((path, status))
    if not finished:
        raise DataError(f"no finished run in {root} ({reasons(others)}); use `gmprobe train --resume`")
    return finished, others


def reasons(excluded: Sequence[tuple[Path, str]]) -> str:
    counts = Counter(reason for _, reason in excluded)
    return "; ".join(f"{count} × {reason}" for reason, count in counts.items())


def training_sets_of(paths: Sequence[Path]) -> list[str]:
    """Return one name per checkpoint; names are equal where the training sets have the same examples of the same data.

    Equal digests of all parts show that data is the same wherever it lies (a copied folder). Different digests with
    equal indices show that it has changed. Where the indices differ, too, data of one name counts as the same.
    """
    splits = {path: read_split(path) for path in paths if is_run(path)}
    sources: dict[str, tuple[Any, ...]] = {}
    contents: dict[str, set[str]] = {}
    keys: dict[Path, tuple[str, str]] = {}
    for path, split in splits.items():
        config = read_run(path).config
        sizes = (config.get(name) for name in ("image_size", "resize", "crop"))
        source = sources.setdefault(split["sha256"], (config.get("data"), *sizes))
        train = _digest([source, split["train"]])
        indices = {name: part for name, part in split.items() if name not in {"sha256", MARKS}}
        keys[path] = train, _digest([source, indices])
        contents.setdefault(keys[path][1], set()).add(split["sha256"])
    changed = {train for train, parts in keys.values() if len(contents[parts]) > 1}
    names = []
    for path in paths:
        if path not in splits:
            names.append(UNKNOWN)
            continue
        key = keys[path][0]
        if key in changed:
            key = _digest([key, splits[path]["sha256"]])
        names.append(f"{Path(str(sources[splits[path]['sha256']][0])).name}-{key[:12]}")
    return names


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def described(paths: Sequence[Path], training_sets: Sequence[str]) -> list[dict[str, Any]]:
    """Return a row for each training set, with the checkpoints trained on it."""
    rows: list[dict[str, Any]] = []
    for name in dict.fromkeys(training_sets):
        members = [path for path, own in zip(paths, training_sets, strict=True) if own == name]
        known = name != UNKNOWN
        rows.append(
            {
                "training_set": name,
                "data": read_run(members[0]).config.get("data") if known else None,
                "num_train": len(read_split(members[0])["train"]) if known else None,
                "num_models": len(members),
                "checkpoints": [str(path) for path in members],
            }
        )
        if not known:
            rows[-1]["reason"] = "training set unknown; assumed to be the same"
    return rows


def doubts(paths: Sequence[Path], training_sets: Sequence[str]) -> list[str]:
    """Return notes on why these pairs may differ in more than their seeds."""
    notes = []
    sizes = Counter(training_sets)
    if sizes[UNKNOWN]:
        apart = ", and different from the runs'" if len(sizes) > 1 else ""
        notes.append(f"{sizes[UNKNOWN]} checkpoint(s): training set unknown; assumed to be the same{apart}")
    configs = [read_run(path).config for path in paths if is_run(path)]
    settings = dict.fromkeys(key for config in configs for key in config if key not in NO_PROCEDURE)
    varying = [key for key in settings if len({str(config.get(key)) for config in configs}) > 1]
    if varying:
        notes.append(f"the runs differ in {', '.join(varying)}, so pairs compare these too, not only seeds")
    counts = {len(read_split(path)["train"]) for path in paths if is_run(path)}
    if len(counts) > 1:
        notes.append(f"the training sets have {', '.join(map(str, sorted(counts)))} examples")
    if len(sizes) > 1 and min(sizes.values()) == 1:
        notes.append(
            "a training set has one model only, so its mean prediction is that model's and instability "
            "includes inconsistency"
        )
    return notes


def common_unlabeled(runs: Sequence[Path], permissions: Permissions = NO_PERMISSIONS) -> Examples:
    """Return the unlabeled part that all ``runs`` were trained beside, looked for where ``permissions`` says.

    Raises:
        DataError: two runs have different ones, or the data has changed.
    """
    first, examples = runs[0], own_unlabeled(runs[0], permissions)
    split = read_split(first)
    for run in runs[1:]:
        if read_split(run) == split:  # the digest of the examples is in it, so they need not be read again
            continue
        if not _equal(own_unlabeled(run, permissions), examples):
            raise DataError(
                f"{first} and {run} have different unlabeled parts. Give --unlabeled data that no run was trained on"
            )
    return examples


def _equal(a: Examples, b: Examples) -> bool:
    if a.recorded is not None and b.recorded is not None:
        return a.recorded.marks == b.recorded.marks
    return a.x.shape == b.x.shape and all(map(torch.equal, blocks(a.x), blocks(b.x)))
