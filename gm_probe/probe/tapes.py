"""Gradients with their graphs, kept between Hessian products: each further product is a backward pass alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from gm_probe.core.errors import out_of_memory
from gm_probe.probe.derivatives import along, gradients
from gm_probe.probe.speed import clearly_less, saved_bytes, timed


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

    def play(self, tangents: dict[str, Tensor], *, keep: bool) -> tuple[Tensor | None, ...]:
        """The Hessian's product with ``tangents``; unless told to ``keep`` the graph, once only."""
        with torch.enable_grad():
            slope = along(self.gradients, tangents, self.total)
            return gradients(slope, self.values, keep_graph=keep)

    def num_bytes(self, saved: Mapping[int, int]) -> int:
        """What it holds: what autograd ``saved`` by address, and of parameters and gradients what is not among it."""
        held = dict(saved)
        for tensor in (*self.values.values(), *self.gradients):
            if tensor is not None and tensor.layout == torch.strided:
                held.setdefault(tensor.untyped_storage().data_ptr(), tensor.nbytes)
        return sum(held.values())


class Tapes:
    """Products by tapes that are kept, where playing one again is faster than the usual way.

    That is found from the first products over full batches, each taken in the one way or in the other: on a few
    examples tapes do better than on whole batches, and a shorter last batch takes longer an example. They are kept for
    the first batches, as many as ``memory`` bytes hold. Where memory runs out, all are let go for good.
    """

    def __init__(self, memory: float, device: torch.device) -> None:
        self._memory, self._device = memory, device
        self._full = 0  # examples in the first batch
        self._products = 0  # over as many
        self._playing = 0.0  # seconds
        self._useful = memory > 0
        self.clear()

    def clear(self) -> None:
        self._room = self._memory
        self._tapes: dict[int, Tape] = {}

    def product(
        self,
        index: int,
        count: int,
        *,
        record: Callable[[], Tape],
        play: Callable[[Tape], Tensor],
        usual: Callable[[], Tensor],
    ) -> Tensor:
        """A product over the batch ``index`` of ``count`` examples, by its tape or in the ``usual`` way."""
        try:
            trial = self._trial(count) if self._useful else 0
            tape = self._of(index, record) if self._useful and trial not in (1, 3) else None
            if trial == 2 and tape is not None:
                self._playing, result = timed(lambda: play(tape), self._device)
                return result
            if trial == 3:  # not the first time, which is slow
                seconds, result = timed(usual, self._device)
                self._useful = clearly_less(self._playing, seconds)
                if not self._useful:
                    self.clear()
                return result
            if trial == 2:
                self._useful = False  # not even one could be kept
            return usual() if tape is None else play(tape)
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error) or not self._tapes:
                raise
        # outside of the except clause, whose traceback holds on to what was allocated
        self._useful = False
        self.clear()
        return usual()

    def _trial(self, count: int) -> int:
        """The number of this product over ``count`` examples: up to 3 while it is being found out what is faster."""
        self._full = self._full or count
        if count == self._full:
            self._products += 1
            return self._products
        return 1 if self._products < 3 else 4

    def _of(self, index: int, record: Callable[[], Tape]) -> Tape | None:
        """The tape of batch ``index``, made by ``record`` the first time; None where there is no room for it."""
        if index not in self._tapes and self._room:
            with saved_bytes() as saved:
                tape = record()
            size = tape.num_bytes(saved)
            if size <= self._room:
                self._room -= size
                self._tapes[index] = tape
            else:
                self._room = 0.0  # nor will there be for another
        return self._tapes.get(index)
