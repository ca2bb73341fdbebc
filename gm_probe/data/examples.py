"""Examples: inputs with their labels, in memory or as images in files, and a data set of one or two parts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from hashlib import sha256

import torch
from torch import Tensor

from gm_probe.data.images import ImageFiles, blocks, contents
from gm_probe.errors import DataError


@dataclass(frozen=True)
class Examples:
    """Examples in memory, or images in files.

    Attributes:
        x: (N, C, H, W) uint8 images, or (N, ...) floats that are taken as they are. Index it to get a tensor. Or
            ``Fields`` of several tensors with N rows, which stand for one.
        y: (N,) int64 class indices, or (N, L) zeros and ones of L yes-or-no labels; None = unlabeled.
        classes: class names in index order; empty when unknown.
        source: where they came from, for messages and records.
        skipped: of the files there, those that could not be decoded and were asked to be left out: their errors.
        passed_over: how many entries of the folder are no images that are read, by suffix or kind.
        notes: what a person should know of how they were read, a sentence each.
        recorded: what they must be; ``in_memory`` compares them with it.
    """

    x: Tensor | ImageFiles
    y: Tensor | None
    classes: tuple[str, ...]
    source: str
    skipped: tuple[str, ...] = ()
    passed_over: Mapping[str, int] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    recorded: Recorded | None = None

    def __len__(self) -> int:
        return len(self.x)

    def select(self, indices: Tensor) -> Examples:
        """Return the examples at ``indices`` (int64), in that order; images in files stay there."""
        x = self.x[indices] if isinstance(self.x, Tensor) else self.x.select(indices)
        recorded = None if self.recorded is None else self.recorded.select(indices)
        return replace(self, x=x, y=None if self.y is None else self.y[indices], recorded=recorded)

    def in_memory(self) -> Examples:
        """Return the same examples, decoded where they fit into memory, and else kept on disk once they are.

        Raises:
            DataError: a file cannot be decoded, or they are not what was recorded.
        """
        held = self
        if isinstance(self.x, ImageFiles):
            x = self.x.in_memory()
            told = (x.not_kept,) if isinstance(x, ImageFiles) and x.not_kept else ()
            held = replace(self, x=x, notes=(*self.notes, *told))
        if self.recorded is None:
            return held
        self.recorded.require(held)
        return replace(held, recorded=None)

    @cached_property
    def digest(self) -> str:
        """SHA-256 of inputs and labels."""
        found = sha256()
        for values in (self.x,) if self.y is None else (self.x, self.y):
            for some in contents(values):
                found.update(some)
        return found.hexdigest()

    def unlabeled(self) -> Examples:
        """Return the same examples without their labels."""
        return replace(self, y=None)

    def subset(self, size: int | None, seed: int) -> Examples:
        """Return a seeded random subset of ``size`` examples, never the first ones of a sorted folder; None = all.

        It is in memory where it fits, and nothing else is decoded. The one that was taken last is kept.

        Raises:
            DataError: as ``in_memory``.
        """
        if size is None or size >= len(self):
            return self._kept("all", self)
        return self._kept((size, seed), self.select(self.chosen(size, seed)))

    def chosen(self, size: int | None, seed: int) -> Tensor:
        """Return the sorted positions of the examples that ``subset`` takes."""
        order = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed))
        return order[:size].sort().values

    def _kept(self, key: object, chosen: Examples) -> Examples:
        if key not in self._last:
            self._last.clear()
            self._last[key] = chosen.in_memory()
        return self._last[key]

    @cached_property
    def _last(self) -> dict[object, Examples]:
        """The last result of ``subset``: many models are measured over it, one after the other."""
        return {}

    @property
    def num_classes(self) -> int:
        """Number of classes.

        Raises:
            DataError: the examples carry no labels, or several yes-or-no labels each.
        """
        if self.y is None:
            raise DataError(f"{self.source} has no labels. Give class subfolders or an array file with 'y'")
        if self.y.dim() > 1:
            raise DataError(
                f"{self.source} has labels of shape {tuple(self.y.shape)}; give one class index for each example"
            )
        return len(self.classes) or int(self.y.max()) + 1


@dataclass(frozen=True)
class Recorded:
    """What examples were when a run began.

    Attributes:
        marks: one for each example, as ``marks`` gives it.
        otherwise: the message of the error where they are no longer the same.
    """

    marks: tuple[str, ...]
    otherwise: str

    def select(self, indices: Tensor) -> Recorded:
        """Return the record of the examples at ``indices``."""
        return replace(self, marks=tuple(self.marks[i] for i in indices.tolist()))

    def require(self, examples: Examples) -> None:
        """Raise DataError unless ``examples`` are those that were recorded."""
        if len(self.marks) != len(examples) or any(
            mark != now for mark, now in zip(self.marks, marks(examples.x), strict=True)
        ):
            raise DataError(self.otherwise)


def marks(x: Tensor | ImageFiles) -> Iterator[str]:
    """Yield the first 16 digits of the SHA-256 of each example."""
    for block in blocks(x):
        for one in block:
            yield sha256(one.contiguous().numpy().tobytes()).hexdigest()[:16]


@dataclass(frozen=True)
class Source:
    """A data set as opened: ``pool`` to train on or measure over, ``test`` where it has a part of its own."""

    pool: Examples
    test: Examples | None

    def in_memory(self) -> Source:
        """Return the same data, decoded where it fits into memory."""
        return Source(self.pool.in_memory(), None if self.test is None else self.test.in_memory())

    def unlabeled(self) -> Source:
        """Return the same data without its labels."""
        return Source(self.pool.unlabeled(), None if self.test is None else self.test.unlabeled())
