"""Disjoint train, unlabeled and test parts of a data set, drawn by seed."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from gm_probe.data.examples import Examples, Source
from gm_probe.errors import DataError


@dataclass(frozen=True)
class Splits:
    """Disjoint parts of a data set.

    ``unlabeled`` is what label-free measures are taken over; its labels, where known, serve only `measure`'s
    labeled rows. ``inputs`` is what is trained on, never with a label: the train part and, where only some
    examples keep their labels, after it those that lost them (``train_unlabeled``). ``indices`` maps a part's
    name to its sorted positions in the source (``test`` refers to the source's own test part where it has one,
    unless ``hold_out`` took its place), so that a run can store them.
    """

    train: Examples
    unlabeled: Examples
    test: Examples
    inputs: Examples
    indices: dict[str, list[int]]

    @property
    def num_classes(self) -> int:
        """Classes in train and test; the unlabeled part's labels are not read."""
        return max(self.train.num_classes, self.test.num_classes)

    def in_memory(self) -> Splits:
        """Return the same parts, each decoded where it fits into memory."""
        return replace(
            self,
            train=self.train.in_memory(),
            unlabeled=self.unlabeled.in_memory(),
            test=self.test.in_memory(),
            inputs=self.inputs.in_memory(),
        )


def split(
    source: Source,
    *,
    num_train: int | None,
    num_unlabeled: int | None,
    num_test: int | None,
    seed: int,
    num_labeled: int | None = None,
) -> Splits:
    """Cut ``source`` into disjoint parts.

    The test part is the source's own where it has one, else it is cut from the pool. Defaults: a quarter of
    the pool but at most 5,000 unlabeled; a quarter for test if it must come from the pool; all the rest for
    training. The draw depends on ``seed`` and the pool's size alone.

    Args:
        num_labeled: training examples that keep their labels, as many of each class, drawn by ``seed``; they are then
            the train part.

    Raises:
        DataError: the sizes do not fit.
    """
    pool, own_test = source.pool, source.test
    train, unlabeled, test = _sizes(source, num_train, num_unlabeled, num_test)
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(pool), generator=generator)
    chosen = {"unlabeled": order[:unlabeled], "train": order[len(pool) - train :]}
    if own_test is None:
        chosen["test"] = order[unlabeled : unlabeled + test]
    else:
        chosen["test"] = torch.randperm(len(own_test), generator=generator)[:test]
    parts = {name: positions.sort().values for name, positions in chosen.items()}
    inputs = parts["train"]
    if num_labeled is not None:
        parts["train"], parts["train_unlabeled"] = _keep_labels(pool, inputs, num_labeled, generator)
        inputs = torch.cat([parts["train"], parts["train_unlabeled"]])
    return Splits(
        train=pool.select(parts["train"]),
        unlabeled=pool.select(parts["unlabeled"]),
        test=(pool if own_test is None else own_test).select(parts["test"]),
        inputs=pool.select(inputs).unlabeled(),
        indices={name: positions.tolist() for name, positions in parts.items()},
    )


def _sizes(
    source: Source, num_train: int | None, num_unlabeled: int | None, num_test: int | None
) -> tuple[int, int, int]:
    """Return the sizes of the train, unlabeled and test parts; DataError where they do not fit."""
    pool, own_test = source.pool, source.test
    total = len(pool)
    default = total // 4 if own_test is None else len(own_test)
    unlabeled = min(5000, total // 4) if num_unlabeled is None else num_unlabeled
    test = default if num_test is None else num_test
    from_pool = test if own_test is None else 0
    train = total - unlabeled - from_pool if num_train is None else num_train
    if train < 1 or unlabeled < 1 or (own_test is None and test < 1):
        raise DataError(
            f"{pool.source}: cannot split off {train} train, {unlabeled} unlabeled and {from_pool} test "
            f"examples out of {total}; each part needs at least one"
        )
    if train + unlabeled + from_pool > total:
        raise DataError(
            f"{pool.source} has {total} examples, fewer than {train} train + {unlabeled} unlabeled + "
            f"{from_pool} test; lower --num-train, --num-unlabeled or --num-test"
        )
    if own_test is not None and not 1 <= test <= len(own_test):
        raise DataError(f"{own_test.source} has {len(own_test)} test examples, not {test}")
    return train, unlabeled, test


def _keep_labels(
    pool: Examples, train: Tensor, count: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Return the sorted positions of ``count`` examples, as many of each class, and of all others."""
    classes = pool.select(train).num_classes
    assert pool.y is not None
    if count < 1 or count % classes:
        raise DataError(f"{count} labels cannot be shared by {classes} classes. Give a multiple of {classes}")
    shuffled = train[torch.randperm(len(train), generator=generator)]
    kept = []
    for index in range(classes):
        members = shuffled[pool.y[shuffled] == index]
        if len(members) < count // classes:
            name = pool.classes[index] if pool.classes else index
            raise DataError(
                f"{pool.source}: class {name} has {len(members)} training examples, but {count} labels "
                f"need {count // classes} of it"
            )
        kept.append(members[: count // classes])
    labeled = torch.cat(kept).sort().values
    others = train[~torch.isin(train, labeled)]
    if not len(others):
        raise DataError(
            f"{count} labels cover the whole training part, so no unlabeled examples remain. Give fewer labels"
        )
    return labeled, others


def hold_out(splits: Splits, share: float, seed: int) -> Splits:
    """Return ``splits`` with ``share`` of the training part, at least one example, in the test part's place.

    Where only some examples keep their labels, as many of each class, the same share of each class is held out.

    Raises:
        DataError: none would be left to train on.
    """
    train = splits.train
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed))
    groups, few_labels = [order], len(splits.inputs) > len(train)
    if few_labels:
        assert train.y is not None
        groups = [order[train.y[order] == index] for index in range(train.num_classes)]
    held, left = [], []
    for group in groups:
        size = max(1, round(share * len(group)))
        if size >= len(group):
            of_class = f" of a class (of {len(train)})" if len(groups) > 1 else ""
            raise DataError(
                f"{train.source}: {len(group)} training examples{of_class} are too few to hold out {size} of them"
            )
        held.append(group[:size])
        left.append(group[size:])
    chosen = {"train": torch.cat(left).sort().values, "test": torch.cat(held).sort().values}
    positions = torch.tensor(splits.indices["train"])
    indices = {part: positions[of].tolist() for part, of in chosen.items()}
    kept = inputs = train.select(chosen["train"])
    if few_labels:  # the train part comes first, then those without labels
        rest = torch.arange(len(train), len(splits.inputs))
        inputs = splits.inputs.select(torch.cat([chosen["train"], rest]))
    return Splits(
        train=kept,
        unlabeled=splits.unlabeled,
        test=train.select(chosen["test"]),
        inputs=inputs.unlabeled(),
        indices={**splits.indices, **indices},
    )
