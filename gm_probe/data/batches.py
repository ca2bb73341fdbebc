"""Normalised batches in a fixed order."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import copy
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor

from gm_probe.checks import optional, whole
from gm_probe.data.examples import Examples
from gm_probe.data.fields import Fields, Given, as_inputs, ordinary, tensors_of
from gm_probe.data.images import ImageFiles, decoded_ahead
from gm_probe.data.labels import as_labels
from gm_probe.data.normalization import Normalization
from gm_probe.errors import DataError, UsageError, foreign_or
from gm_probe.runtime.devices import room, upload


class Batch(NamedTuple):
    """Model input and labels of B examples."""

    x: Tensor  # (B, ...), or Fields that stand for one
    y: Tensor | None  # (B,) int64, (B, L) of L yes-or-no labels; None = unlabeled


BATCH_SIZE = 250
"""Larger batches were not faster on a CPU."""


class Batches:
    """A re-iterable over examples in their stored order, normalised, without augmentation.

    Args:
        examples: what to iterate over.
        normalization: applied to every batch.
        batch_size: examples a batch; the last may be smaller. None = ``BATCH_SIZE``, or what memory holds where
            derivatives are taken (``gm_probe.measure``).
        device: of the inputs handed out.
        dtype: of the inputs handed out.
        channels_last: hand out images in channels-last memory format (faster convolutions on CPU and GPU).
        batch_dependent: an example's output depends on the rest of its batch, as NT-Xent logits do. Then its size
            belongs to what is measured, and batches, all of one size, are what is independent.

    Raises:
        DataError, UsageError: as ``Normalization.require_range`` raises them.
    """

    def __init__(
        self,
        examples: Examples,
        normalization: Normalization | None = None,
        *,
        batch_size: int | None = None,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        channels_last: bool = True,
        batch_dependent: bool = False,
    ) -> None:
        optional(whole, "batch_size", batch_size)
        self.examples = examples
        self.normalization = normalization or Normalization()
        self.normalization.require_range(examples)
        self.batch_size = batch_size or BATCH_SIZE
        self.auto_batch_size = batch_size is None and not batch_dependent  # True: a measurement may choose it
        self.device = torch.device(device)
        self.dtype = dtype
        self.channels_last = channels_last and examples.x.dim() == 4
        self.batch_dependent = batch_dependent
        if batch_dependent and len(examples) % self.batch_size:
            raise DataError(
                f"{len(examples)} examples that depend on each other do not fill batches of {self.batch_size}"
            )
        self._resident: Batch | None = None  # all examples on the device, once they are there
        self.total = len(examples)  # N over all processes that share the work
        self.first = 0  # the number of this process's first example among them

    @classmethod
    def from_tensors(
        cls, x: Given, y: Tensor | np.ndarray | list[Any] | None = None, **options: int | str
    ) -> Batches:
        """Return batches over tensors x (N, ...) and y (N,) that are already what the model takes.

        Args:
            x: a tensor or array, or a dict or tuple of several with N rows, which the model takes by name or in order.
            y: (N,) class indices, or (N, L) zeros and ones of L yes-or-no labels. They may be floats or booleans.

        Raises:
            UsageError: x is none of these.
            DataError: x is uint8, which elsewhere are pixels, and are scaled to [0, 1]; y does not fit.
        """
        x = as_inputs(x)
        if isinstance(x, Tensor) and not x.dim():
            raise UsageError("x is a single number; give a tensor with a row for each example")
        if isinstance(x, Tensor) and x.dtype == torch.uint8:
            raise DataError(
                "x is uint8. Give what the model takes: x.float() / 255, x.long(), or Examples with a Normalization"
            )
        device, dtype = x.device, x.dtype if x.is_floating_point() else torch.float32
        y = None if y is None else as_labels(y, len(x))
        examples = Examples(cast(Tensor, x.detach()), y, (), "tensors")
        return cls(examples, device=device, dtype=dtype, **options)  # type: ignore[arg-type]

    @property
    def num_examples(self) -> int:
        return len(self.examples)

    @property
    def labeled(self) -> bool:
        return self.examples.y is not None

    def shard(self, rank: int, count: int) -> Batches:
        """Return the part of process ``rank`` of ``count``: neighbouring examples, shared out evenly.

        Batches whose examples depend on each other are not cut.

        Raises:
            DataError: fewer examples, or such batches, than processes.
        """
        size, name = (self.batch_size, "batches") if self.batch_dependent else (1, "examples")
        units = self.num_examples // size
        if count > units:
            raise DataError(f"{units} {name} are too few for {count} processes. Use fewer processes")
        bounds = [units * i // count * size for i in (rank, rank + 1)]
        part = self.examples.select(torch.arange(*bounds))
        return self._with(examples=part, first=bounds[0], _resident=None)

    def of_size(self, batch_size: int) -> Batches:
        """Return the same examples in batches of another size."""
        whole("batch_size", batch_size)
        if self.batch_dependent and batch_size != self.batch_size:
            raise UsageError("the batch size cannot change: the examples of a batch depend on each other")
        return self._with(batch_size=batch_size, auto_batch_size=False)

    def over(self, examples: Examples) -> Batches:
        """Return batches of other examples, handed out in the same way.

        Raises:
            DataError, UsageError: as ``Normalization.require_range`` raises them.
        """
        self.normalization.require_range(examples)
        channels_last = self.channels_last and examples.x.dim() == 4
        total = len(examples)
        return self._with(
            examples=examples, total=total, first=0, channels_last=channels_last, _resident=None
        )

    def on(self, device: torch.device) -> Batches:
        """Return the same batches, handed out on ``device``."""
        return self if device == self.device else self._with(device=device, _resident=None)

    def of_dtype(self, dtype: torch.dtype) -> Batches:
        """Return the same batches, with floating-point inputs of ``dtype``."""
        return self._with(dtype=dtype)

    def _with(self, **changes: Any) -> Batches:
        other = copy(self)
        vars(other).update(changes)
        return other

    def trial_slice(self, count: int) -> slice:
        """Return which examples a product is tried on: the first ``count``, or all that depend on each other."""
        return slice(None) if self.batch_dependent else slice(count)

    def independent(self, terms: Tensor) -> Tensor:
        """Return independent terms with the mean of ``terms`` (n,): themselves, or one mean a batch."""
        return terms.view(-1, self.batch_size).mean(1) if self.batch_dependent else terms

    @contextmanager
    def naming(self, start: int, count: int) -> Iterator[None]:
        """Raise DataError with the numbers of ``count`` examples from ``start`` on, where a model fails on them."""
        where = f"examples {start} to {start + count - 1} of {self.examples.source}"

        def failed(cause: str) -> DataError:
            return DataError(
                f"the model failed on {where}: {cause}. Check the input's shape, dtype and device"
            )

        with foreign_or(failed):
            yield

    def __len__(self) -> int:
        return -(-self.num_examples // self.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        starts = range(0, self.num_examples, self.batch_size)
        keys = [slice(start, start + self.batch_size) for start in starts]
        placed = self._placed()
        inputs, y = placed or (self.examples.x, self.examples.y)
        for key, raw in zip(keys, decoded_ahead(inputs, keys), strict=True):
            x = ordinary(self.normalization.apply(upload(raw, self.device), self.dtype))
            if self.channels_last:
                x = x.contiguous(memory_format=torch.channels_last)
            yield Batch(x, None if y is None else upload(y[key], self.device))

    def _placed(self) -> Batch | None:
        """Return all examples on the device, uploaded once where it has room; None where they stay where they are."""
        x, y = self.examples.x, self.examples.y
        if self._resident is None and x is not (there := placed(x, self.device)):
            self._resident = Batch(cast(Tensor, there), None if y is None else upload(y, self.device))
        return self._resident


def placed(x: Tensor | ImageFiles, device: torch.device) -> Tensor | ImageFiles:
    """Return x on ``device``, if it is in memory and ``device`` has room for all of it; else x itself."""
    if not isinstance(x, Tensor | Fields) or x.device == device:
        return x
    fits = sum(tensor.nbytes for tensor in tensors_of(x).values()) <= room(device)
    return upload(x, device) if fits else x


def cut(values: Tensor, batches: Batches) -> Sequence[Tensor]:
    """Cut per-example values (N, ...) at the borders of ``batches``."""
    return values.split(batches.batch_size)
