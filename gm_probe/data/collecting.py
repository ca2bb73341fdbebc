"""What people hold their data in, as ``Batches``: tensors, arrays, pairs, lists of batches, data sets, loaders."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, RandomSampler

from gm_probe.data.batches import BATCH_SIZE, Batches
from gm_probe.data.examples import Examples
from gm_probe.data.fields import Fields, Inputs, as_inputs
from gm_probe.data.labels import as_labels
from gm_probe.errors import UsageError, foreign_or

Data = (
    Batches
    | Examples
    | Tensor
    | np.ndarray
    | Mapping[str, Any]
    | tuple[Any, ...]
    | list[Any]
    | Dataset[Any]
    | DataLoader[Any]
)
"""What ``as_batches`` takes."""
_TAKEN = (
    "give a tensor x (N, ...), a pair (x, y), a dict of tensors, a list of such batches, a Dataset, a DataLoader that "
    "does not shuffle, Examples, or Batches"
)


def as_batches(data: Data) -> Batches:
    """Return examples as ``Batches``, in their order; what is not in tensors yet is collected in memory once.

    Args:
        data: a tensor or array x (N, ...) of what the model takes; a dict of several, labels under ``labels``, as
            Hugging Face's tokenizers and collators make it; a pair (x, y); a list of such batches; a data set or a
            loader of such batches; ``Examples`` or ``Batches``.

    Raises:
        UsageError: anything else, or a loader that shuffles or leaves examples out.
        DataError: labels that are not whole numbers, one or a row for each example; pixels without a normalisation.
    """
    if isinstance(data, Batches):
        return data
    if isinstance(data, Examples):
        if not isinstance(data.x, Tensor | Fields) or (
            isinstance(data.x, Tensor) and data.x.dtype == torch.uint8
        ):
            raise UsageError(
                f"{data.source} holds pixels, and their normalisation is unknown. Give Batches(examples, "
                "Normalization(...))"
            )
        return Batches(data, device=data.x.device)
    if isinstance(data, list | Dataset | DataLoader):
        return Batches.from_tensors(*_collected(_batches_of(data)))
    return Batches.from_tensors(*_pair(data))


def _batches_of(data: list[Any] | Dataset[Any] | DataLoader[Any]) -> Iterable[Any]:
    if isinstance(data, list):
        return data
    endless = data.dataset if isinstance(data, DataLoader) else data
    if isinstance(endless, IterableDataset):
        raise UsageError(f"a {type(endless).__name__} may be infinite. Give a list of its batches")
    if not isinstance(data, DataLoader):
        return DataLoader(data, batch_size=BATCH_SIZE)
    sampler: Any = getattr(data.batch_sampler, "sampler", data.sampler)
    if isinstance(sampler, RandomSampler):
        raise UsageError("the DataLoader shuffles the examples. Create it with shuffle=False")
    if data.drop_last and data.batch_size and len(sampler) % data.batch_size:
        raise UsageError(
            f"the DataLoader leaves out {len(sampler) % data.batch_size} example(s). Create it with drop_last=False"
        )
    return data


def _collected(batches: Iterable[Any]) -> tuple[Inputs, Tensor | None]:
    """Join ``batches`` to inputs (N, ...) and labels (N,) or (N, L).

    Raises:
        UsageError: they cannot be read, have different shapes, or are labeled in part.
    """

    def fails(cause: str) -> UsageError:
        return UsageError(f"the batches cannot be joined into one set of examples ({cause}); {_TAKEN}")

    with foreign_or(fails):
        pairs = [_pair(batch) for batch in batches]
        inputs = [as_inputs(x) for x, _ in pairs]
        labels = [as_labels(y, len(x)) for x, (_, y) in zip(inputs, pairs, strict=True) if y is not None]
        if not inputs:
            raise fails("there is none")
        if labels and len(labels) < len(inputs):
            raise fails("some have labels, and others have none")
        return _joined(inputs), torch.cat(labels) if labels else None


def _joined(inputs: Sequence[Inputs]) -> Inputs:
    fields = [x for x in inputs if isinstance(x, Fields)]
    return (
        Fields.joined(fields)
        if len(fields) == len(inputs)
        else torch.cat([x for x in inputs if isinstance(x, Tensor)])
    )


def _pair(batch: Any) -> tuple[Any, Any]:
    """Return the inputs and the labels, or None, of a batch."""
    if isinstance(batch, Mapping) and batch.get("labels") is not None:
        return {key: value for key, value in batch.items() if key != "labels"}, batch["labels"]
    if isinstance(batch, Tensor | Fields | np.ndarray | Mapping):
        return batch, None
    if isinstance(batch, tuple | list) and len(batch) == 1:
        return batch[0], None
    if isinstance(batch, tuple | list) and len(batch) == 2:
        return batch[0], batch[1]
    what = (
        f"{type(batch).__name__} of {len(batch)}" if isinstance(batch, tuple | list) else type(batch).__name__
    )
    raise UsageError(f"a {what} is not a batch of examples; {_TAKEN}")
