"""Several tensors that a model takes together, handled as one batch."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from gm_probe.errors import UsageError


class Fields:
    """Tensors of B rows each, by name or in order, that are sliced, moved and converted together.

    It stands where a batch's input tensor does: ``fields[:4]``, ``len(fields)`` and ``fields.to(device)`` act on every
    tensor. What has no rows (a number, a flag, None) is kept as it is.

    Args:
        content: a mapping (a dict, Hugging Face's BatchEncoding) or a tuple or list.

    Raises:
        UsageError: it holds no tensor, or tensors of different numbers of rows.
    """

    def __init__(self, content: Mapping[str, Any] | Sequence[Any]) -> None:
        self.named = isinstance(content, Mapping)
        self.content: dict[Any, Any] = dict(content if isinstance(content, Mapping) else enumerate(content))
        rows = {key: len(value) for key, value in self._tensors()}
        if not rows:
            raise UsageError(f"a batch of {type(content).__name__} holds no tensor with one row per example")
        if len(set(rows.values())) > 1:
            shown = ", ".join(f"{key!r}: {count}" for key, count in rows.items())
            raise UsageError(f"the tensors of one batch have different numbers of rows ({shown})")
        self._rows = next(iter(rows.values()))

    def _tensors(self) -> Iterator[tuple[Any, Tensor]]:
        return ((key, v) for key, v in self.content.items() if isinstance(v, Tensor) and v.dim())

    def each(self, function: Callable[[Tensor], Tensor]) -> Fields:
        """Return the fields with ``function`` applied to every tensor that has rows."""
        return self._like({**self.content, **{key: function(value) for key, value in self._tensors()}})

    def _like(self, content: dict[Any, Any]) -> Fields:
        return Fields(content if self.named else list(content.values()))

    @property
    def value(self) -> Any:
        """The content as a dict or a tuple, as a model or a loss takes it."""
        return dict(self.content) if self.named else tuple(self.content.values())

    @staticmethod
    def joined(parts: Sequence[Fields]) -> Fields:
        """Join batches of the same fields one after another."""
        first = parts[0]
        joined = {key: torch.cat([part.content[key] for part in parts]) for key, _ in first._tensors()}
        return first._like({**first.content, **joined})

    def __len__(self) -> int:
        return self._rows

    def __getitem__(self, key: Any) -> Fields:
        return self.each(lambda value: value[key])

    def select(self, indices: Tensor) -> Fields:
        """Return the rows at ``indices``, as images in files do."""
        return self[indices]

    def split(self, size: int) -> list[Fields]:
        """Cut into batches of ``size`` rows; the last may be smaller."""
        return [self[start : start + size] for start in range(0, len(self), size)]

    def clone(self) -> Fields:
        return self.each(Tensor.clone)

    def detach(self) -> Fields:
        return self.each(Tensor.detach)

    def to(self, *args: Any, **kwargs: Any) -> Fields:
        """Move every tensor; a dtype converts the floating-point ones alone."""
        dtypes = [value for value in (*args, *kwargs.values()) if isinstance(value, torch.dtype)]
        return self.each(lambda v: v if dtypes and not v.is_floating_point() else v.to(*args, **kwargs))

    def pin_memory(self) -> Fields:
        return self.each(Tensor.pin_memory)

    def double(self) -> Fields:
        return self.to(torch.float64)

    def is_floating_point(self) -> bool:
        """Return whether some tensor is, so that ``double`` changes something."""
        return any(value.is_floating_point() for _, value in self._tensors())

    def dim(self) -> int:
        """Return 0: several tensors are no image, whatever their shapes."""
        return 0

    @property
    def shape(self) -> tuple[int, ...]:
        return (self._rows,)

    @property
    def dtype(self) -> torch.dtype:
        """The first floating-point tensor's, or else the first tensor's."""
        every = [value for _, value in self._tensors()]
        return next((value.dtype for value in every if value.is_floating_point()), every[0].dtype)

    @property
    def device(self) -> torch.device:
        return next(self._tensors())[1].device


Inputs = Tensor | Fields
"""A batch's input: one tensor (B, ...), or several."""


Given = Tensor | Fields | np.ndarray | Mapping[str, Any] | tuple[Any, ...] | list[Any]
"""What ``as_inputs`` takes: one tensor or array, or several."""


def tensors_of(x: Inputs) -> dict[Any, Tensor]:
    """Return the tensors of an input by their names or places; a single tensor has none."""
    return {"": x} if isinstance(x, Tensor) else dict(x._tensors())


def with_tensors(x: Inputs, tensors: Mapping[Any, Tensor]) -> Inputs:
    """Return an input like ``x`` of other ``tensors``, by the keys of ``tensors_of``."""
    return tensors[""] if isinstance(x, Tensor) else x._like({**x.content, **tensors})


def ordinary(x: Tensor) -> Tensor:
    """Return tensors that were made in inference mode as copies, which autograd takes; others as they are."""
    if isinstance(x, Fields):
        return x.each(lambda value: value.clone() if value.is_inference() else value)
    return x.clone() if x.is_inference() else x


def as_inputs(x: Any) -> Inputs:
    """Return a tensor or array as a tensor, and a mapping, tuple or list of them as ``Fields``.

    Raises:
        UsageError: anything else.
    """
    if isinstance(x, np.ndarray):
        return _as_tensor(x)
    if isinstance(x, Tensor | Fields):
        return x
    if isinstance(x, Mapping):
        return Fields({key: _as_tensor(value) for key, value in x.items()})
    if isinstance(x, tuple | list):
        return Fields([_as_tensor(value) for value in x])
    raise UsageError(f"the input is a {type(x).__name__}; give a tensor, or a dict or tuple of tensors")


def _as_tensor(value: Any) -> Any:
    """Return an array as a tensor of its own, and anything else as it is."""
    if not isinstance(value, np.ndarray):
        return value
    try:
        return torch.from_numpy(np.array(value))
    except TypeError as error:
        raise UsageError(f"the input is an array of {value.dtype}, which torch does not support") from error


def arguments(model: nn.Module, x: Inputs) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the positional and keyword arguments by which ``model`` takes ``x``.

    Named tensors are keyword arguments and others positional ones, where ``forward`` takes them so; else all are one
    argument. Tensors are copied, since a model may begin by an operation in place.
    """
    if isinstance(x, Tensor):
        return (x.clone(),), {}
    content = x.clone().value
    args, kwargs = ((), content) if x.named else (content, {})
    try:
        inspect.signature(model.forward).bind(*args, **kwargs)
    except (TypeError, ValueError):
        return (content,), {}
    return args, kwargs
