"""Work that runs out of memory is done again on batches of half the size, or told by an error that says what to do."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from gm_probe.data.batches import Batches
from gm_probe.errors import ResourceError, first_line, out_of_memory
from gm_probe.runtime.devices import release_memory
from gm_probe.runtime.processes import count

T = TypeVar("T")


def within_memory(batches: Batches, compute: Callable[[Batches], T]) -> tuple[T, Batches]:
    """Return ``compute(batches)``, and the batches that it succeeded on: half as large whenever memory ran out.

    Only for what is a sum over examples. Of several processes none may fall behind the others: the error is theirs.

    Raises:
        ResourceError: a single example is too much, or a batch whose size belongs to what is computed.
    """
    while True:
        try:
            return compute(batches), batches
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error) or count() > 1:
                raise
            if batches.batch_dependent:
                raise ResourceError(
                    f"out of memory on batches of {batches.batch_size}, whose examples depend on each "
                    f"other ({first_line(error)}). A smaller --batch-size fits, but is a different measure"
                ) from error
            size = min(batches.batch_size, batches.num_examples) // 2
            if size == 0:
                raise ResourceError(
                    f"out of memory on a single example ({first_line(error)}). Close other programs, or "
                    "use a machine with more memory"
                ) from error
        # outside of the except clause, whose traceback keeps what was allocated alive
        release_memory(batches.device)
        batches = batches.of_size(size)
