"""Disjoint train, unlabeled-probe and test parts of a data set, drawn by seed."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from gm_probe.core.datasets import Examples, Source
from gm_probe.core.errors import DataError


@dataclass(frozen=True)
class Splits:
    """Disjoint parts.

    ``unlabeled`` is what label-free measures are taken over; its labels, where known, serve only `measure`'s
    labeled rows. ``indices`` maps a part's name to its sorted positions in the source (``test`` refers to the
    source's own test part where it has one, unless ``hold_out`` took its place), so that a run can store them.
    """

    train: Examples
    unlabeled: Examples
    test: Examples
    indices: dict[str, list[int]]

    @property
    def num_classes(self) -> int:
        """Classes in train and test; the unlabeled part's labels are not read."""
        return max(self.train.num_classes, self.test.num_classes)


def split(
    source: Source,
    *,
    num_train: int | None,
    num_unlabeled: int | None,
    num_test: int | None,
    seed: int,
) -> Splits:
    """Cut ``source`` into disjoint parts.

    The test part is the source's own where it has one, else it is cut from the pool. Defaults: a quarter of
    the pool but at most 5,000 unlabeled; a quarter for test if it must come from the pool; all the rest for
    training. The draw depends on ``seed`` and the pool's size alone.

    Raises:
        DataError: the sizes do not fit.
    """
    pool, own_test = source.pool, source.test
    total = len(pool)
    unlabeled = min(5000, total // 4) if num_unlabeled is None else num_unlabeled
    from_pool = 0 if own_test is not None else (total // 4 if num_test is None else num_test)
    train = total - unlabeled - from_pool if num_train is None else num_train
    if train < 1 or unlabeled < 1 or (own_test is None and from_pool < 1):
        raise DataError(
            f"{pool.source}: cannot cut {train} train, {unlabeled} unlabeled and {from_pool} test examples "
            f"out of {total}; each part needs at least one"
        )
    if train + unlabeled + from_pool > total:
        raise DataError(
            f"{pool.source} has {total} examples, fewer than {train} train + {unlabeled} unlabeled + "
            f"{from_pool} test; lower --num-train, --num-unlabeled or --num-test"
        )
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(total, generator=generator)
    parts = {
        "unlabeled": order[:unlabeled].sort().values,
        "train": order[total - train :].sort().values,
    }
    if own_test is None:
        parts["test"] = order[unlabeled : unlabeled + from_pool].sort().values
        test = pool.select(parts["test"])
    else:
        size = len(own_test) if num_test is None else num_test
        if not 1 <= size <= len(own_test):
            raise DataError(f"{own_test.source} has {len(own_test)} test examples, not {size}")
        parts["test"] = torch.randperm(len(own_test), generator=generator)[:size].sort().values
        test = own_test.select(parts["test"])
    return Splits(
        train=pool.select(parts["train"]),
        unlabeled=pool.select(parts["unlabeled"]),
        test=test,
        indices={name: positions.tolist() for name, positions in parts.items()},
    )


def hold_out(splits: Splits, share: float, seed: int) -> Splits:
    """``splits`` with ``share`` of the training part, at least one example, in the test part's place.

    Raises:
        DataError: none would be left to train on.
    """
    train = splits.train
    size = max(1, round(share * len(train)))
    if size >= len(train):
        raise DataError(
            f"{train.source}: {len(train)} training examples are too few to hold out {size} of them"
        )
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed))
    chosen = {"train": order[size:].sort().values, "test": order[:size].sort().values}
    positions = torch.tensor(splits.indices["train"])
    indices = {part: positions[of].tolist() for part, of in chosen.items()}
    return Splits(
        train=train.select(chosen["train"]),
        unlabeled=splits.unlabeled,
        test=train.select(chosen["test"]),
        indices={**splits.indices, **indices},
    )
