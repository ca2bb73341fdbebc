"""A run's disjoint train, unlabeled and test parts, and the check that they are still the same."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from torch import Tensor

from gm_probe.data.datasets import open_source
from gm_probe.data.examples import Examples, Recorded, Source, marks
from gm_probe.data.images import contents
from gm_probe.data.splits import Splits, hold_out, split
from gm_probe.errors import DataError, UsageError
from gm_probe.runs.records import CONFIG, read_run, read_split, run_of
from gm_probe.training.config import TrainConfig
from gm_probe.training.permissions import Permissions

NO_PERMISSIONS = Permissions()
OWN_UNLABELED = "own unlabeled"
"""The name in measures.json of the part that ``own_unlabeled`` returns."""
MARKS = "unlabeled_marks"
"""The name in split.json of the unlabeled examples' marks, which identify some of them without reading the others."""


def load_splits(config: TrainConfig) -> Splits:
    """Return the run's parts. Decoded data stays in memory, so that the runs of a sweep share it."""
    return _cut(open_data(config).in_memory(), config).in_memory()


def _cut(source: Source, config: TrainConfig) -> Splits:
    splits = split(
        source,
        num_train=config.num_train,
        num_unlabeled=config.num_unlabeled,
        num_test=config.num_test,
        seed=config.split_seed,
        num_labeled=config.labels,
    )
    return splits if config.validation is None else hold_out(splits, config.validation, config.split_seed)


def open_data(config: TrainConfig) -> Source:
    """Return the data of a run before it is split; a folder's images are still in their files.

    Raises:
        DataError, UsageError: as ``data.datasets.open_source``.
    """
    if Path(config.data).is_absolute() and not Path(config.data).exists():  # a run records absolute paths
        raise UsageError(f"no folder or file {config.data!r}; if it has moved, give its place with --data")
    place = Path(config.data).absolute()  # a relative name is another file after a change of folder
    version = (place, place.stat().st_mtime_ns if place.exists() else 0)
    return _open(
        config.data,
        version,
        root=None if config.data_root is None else Path(config.data_root),
        download=config.download,
        skip_bad=config.skip_bad,
        image_size=config.image_size,
        resize=config.resize,
        crop=config.crop,
    )


@lru_cache(maxsize=2)
def _open(data: str, version: tuple[Path, int], **options: Any) -> Source:
    """Open the data once per process, so that images that ``in_memory`` decodes are shared.

    Args:
        version: distinguishes files of the same name; it is only part of the cache's key.
    """
    return open_source(data, labeled=True, decode=False, **options)


def skipped(splits: Splits) -> tuple[str, ...]:
    """Return the errors of the files that were left out of the data and of its own test part."""
    return tuple(dict.fromkeys([*splits.train.skipped, *splits.test.skipped]))


def split_record(splits: Splits) -> dict[str, Any]:
    """Return the content of split.json: every part's indices, a digest of the examples used, and the files left out."""
    digest = hashlib.sha256()
    for part in (splits.inputs, splits.unlabeled, splits.test):
        for some in contents(part.x):
            digest.update(some)
    for part in (splits.train, splits.test):  # no other labels are read
        if part.y is not None:
            for some in contents(part.y):
                digest.update(some)
    left_out = {"skipped": list(skipped(splits))} if skipped(splits) else {}
    record = {**splits.indices, "sha256": digest.hexdigest(), **left_out}
    if Path(splits.unlabeled.source).is_dir():  # other data is in memory, and its digest takes little time
        record[MARKS] = list(marks(splits.unlabeled.x))
    return record


def check_splits(splits: Splits, run: Path, data: str) -> None:
    """Raise DataError unless ``splits``, made from ``data``, are those that the run folder was started with."""
    recorded, now = (
        {key: value for key, value in record.items() if key != MARKS}
        for record in (read_split(run), split_record(splits))
    )
    if recorded != now:
        raise DataError(_otherwise(run, data))


def _otherwise(run: Path, data: str) -> str:
    """Return the message for ``data`` that is not, or no longer, the data of ``run``."""
    trained_on = TrainConfig.from_record(read_run(run).config).data
    if data == trained_on:
        return (
            f"the data of {run} has changed since its start (or an older gm_probe split it differently), "
            "so its parts would no longer be disjoint. Restore the data, or train into a new folder"
        )
    return (
        f"{data} is not the data that {run} was trained on, which was in {trained_on}. Give its place "
        "with --data"
    )


def own_unlabeled(path: Path, permissions: Permissions = NO_PERMISSIONS) -> Examples:
    """Return the unlabeled part of a run folder, or of a checkpoint file in one, without labels.

    A folder's images are still in their files. Only those that ``Examples.subset`` takes are decoded, and compared with
    the run's record.

    Args:
        permissions: where its data may be looked for, whatever the folder says.

    Raises:
        UsageError: the path is not in a run, its data does not exist, or it needs more permissions.
        DataError: its data has changed since.
    """
    run = run_of(path)
    if not (run / CONFIG).exists():
        raise UsageError(f"{path} is not a gmprobe run. Add --unlabeled DATA or --labeled DATA")
    config = permissions.applied(TrainConfig.from_record(read_run(run).config), run)
    source, recorded = open_data(config), read_split(run)
    # where no image must be decoded, or there are no marks, all the data that the run used is compared
    if isinstance(source.pool.x, Tensor) or MARKS not in recorded:
        splits = load_splits(config)
        check_splits(splits, run, config.data)
        return splits.unlabeled.unlabeled()
    splits = _cut(source, config)
    otherwise = _otherwise(run, config.data)
    if any(recorded.get(part) != indices for part, indices in splits.indices.items()):
        raise DataError(otherwise)
    return replace(splits.unlabeled.unlabeled(), recorded=Recorded(tuple(recorded[MARKS]), otherwise))
