"""A run's disjoint train, unlabeled and test parts, and the proof that they are still the same."""

from __future__ import annotations

import hashlib
from functools import lru_cache
from pathlib import Path
from typing import Any

from gm_probe.core.datasets import Examples, Source, open_source
from gm_probe.core.errors import DataError, UsageError
from gm_probe.core.images import contents
from gm_probe.core.records import CONFIG, read_run, read_split
from gm_probe.core.splits import Splits, hold_out, split
from gm_probe.training.config import TrainConfig

OWN_UNLABELED = "own unlabeled"
"""What measures.json calls the part that ``own_unlabeled`` gives."""


def load_splits(config: TrainConfig) -> Splits:
    """The run's parts. Decoded data stays in memory, so that the runs of a sweep share it."""
    splits = split(
        _open(config.data, config.data_root, config.download, config.image_size, config.skip_bad),
        num_train=config.num_train,
        num_unlabeled=config.num_unlabeled,
        num_test=config.num_test,
        seed=config.split_seed,
        num_labeled=config.labels,
    )
    return splits if config.validation is None else hold_out(splits, config.validation, config.split_seed)


@lru_cache(maxsize=2)
def _open(data: str, root: str | None, download: bool, image_size: int | None, skip_bad: bool) -> Source:
    folder = None if root is None else Path(root)
    return open_source(
        data, labeled=True, root=folder, download=download, image_size=image_size, skip_bad=skip_bad
    )


def skipped(splits: Splits) -> tuple[str, ...]:
    """The errors of the files that were left out of the data, of its own test part too."""
    return tuple(dict.fromkeys([*splits.train.skipped, *splits.test.skipped]))


def split_record(splits: Splits) -> dict[str, Any]:
    """What split.json holds: every part's indices, a digest of the examples that were used, the files left out."""
    digest = hashlib.sha256()
    for part in (splits.inputs, splits.unlabeled, splits.test):
        for some in contents(part.x):
            digest.update(some)
    for part in (splits.train, splits.test):  # no other labels are ever read
        if part.y is not None:
            for some in contents(part.y):
                digest.update(some)
    left_out = {"skipped": list(skipped(splits))} if skipped(splits) else {}
    return {**splits.indices, "sha256": digest.hexdigest(), **left_out}


def check_splits(splits: Splits, run: Path) -> None:
    """Raise DataError unless ``splits`` are those that the run folder was started with."""
    if read_split(run) != split_record(splits):
        raise DataError(
            f"the data of {run} has changed since it was started (or an older gm_probe drew its parts otherwise): they "
            "would no longer be disjoint; restore the data, or train into a new folder"
        )


def own_unlabeled(path: Path) -> Examples:
    """The unlabeled part that a run folder, or a checkpoint file in one, was trained beside, labels dropped.

    Raises:
        UsageError: it is no run, nor in one.
        DataError: its data has changed since.
    """
    run = path if path.is_dir() else path.parent
    if not (run / CONFIG).exists():
        raise UsageError(f"{path} is no run folder, nor in one; give --unlabeled or --labeled DATA")
    splits = load_splits(TrainConfig.from_record(read_run(run).config))
    check_splits(splits, run)
    return splits.unlabeled.unlabeled()
