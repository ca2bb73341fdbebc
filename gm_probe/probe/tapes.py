"""Gradients with their graphs, kept between Hessian products: each further product is a backward pass alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from gm_probe.probe.derivatives import along, gradients

PLAYING = 2.0
"""Times what a tape holds: what playing it takes meanwhile."""


@dataclass(frozen=True, slots=True)
class Tape:
    """A scalar's gradient by ``values``, with the graph that led to it."""

    values: dict[str, Tensor]
    total: Tensor
    gradients: tuple[Tensor | None, ...]

    @classmethod
    def record(cls, function: Callable[[dict[str, Tensor]], Tensor], values: dict[str, Tensor]) -> Tape:
        with torch.enable_grad():
            total = function(values)
            return cls(values, total, gradients(total, values, create_graph=True))

    def play(self, tangents: dict[str, Tensor], *, keep: bool = False) -> tuple[Tensor | None, ...]:
        """The Hessian's product with ``tangents``; unless told to ``keep`` the graph, once only."""
        with torch.enable_grad():
            slope = along(self.gradients, tangents, self.total)
            return gradients(slope, self.values, keep_graph=keep)


class Tapes:
    """A tape for each of the first batches, as many as ``memory`` bytes hold beside what playing one takes."""

    def __init__(self, memory: float) -> None:
        self._memory = memory
        self.clear()

    def clear(self) -> None:
        self._room = self._memory
        self._tapes: dict[int, Tape] = {}

    def of(self, index: int, record: Callable[[], Tape]) -> Tape | None:
        """The tape of batch ``index``, made by ``record`` the first time; None where there is no room for it."""
        if index not in self._tapes and self._room:
            with saved_bytes() as saved:
                tape = record()
            size = sum(saved.values())
            if (1 + PLAYING) * size <= self._room:
                self._room -= size
                self._tapes[index] = tape
            else:
                self._room = 0.0  # nor will there be for another
        return self._tapes.get(index)


@contextmanager
def saved_bytes(ignored: frozenset[int] = frozenset()) -> Iterator[dict[int, int]]:
    """Fills a dict of address ↦ bytes with what autograd saves meanwhile, but for storages at ``ignored`` addresses.

    Each storage counts once, as long as its graph lives: an address that is used anew would count as the old one.
    """
    found: dict[int, int] = {}

    def save(value: Tensor) -> Tensor:
        storage = value.untyped_storage()
        address = storage.data_ptr()
        if address not in ignored:  # a view may be less than its storage, an expanded one more
            found[address] = max(found.get(address, 0), min(value.nbytes, storage.nbytes()))
        return value

    with torch.autograd.graph.saved_tensors_hooks(save, lambda value: value):
        yield found
