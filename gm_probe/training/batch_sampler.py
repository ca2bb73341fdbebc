"""How batches are dealt: which examples each step trains on, their labels, and the views that the network gets."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gm_probe.data.splits import Splits
from gm_probe.errors import UsageError
from gm_probe.runtime.processes import count
from gm_probe.training.augment import crop_and_flip, draw_crops
from gm_probe.training.config import TrainConfig


class BatchSampler:
    """Deals every training example once per epoch; the last batch is smaller.

    A last batch that would leave a process with one example joins the one before it, since BatchNorm has no statistics
    of a single example.

    Positions are those in ``Splits.inputs``, where the labeled examples come first. Draws are made for a whole batch,
    so that the number of processes that share it does not matter.

    Attributes:
        examples: number of examples in one epoch.
        steps: number of batches in one epoch.
        rows: number of network inputs for each of a batch's ``batch_size`` examples.
    """

    rows = 1

    def __init__(self, config: TrainConfig, splits: Splits) -> None:
        self.config, self.labeled = config, len(splits.train)
        self.splits = splits
        self.examples = self.labeled
        self.steps = -(-self.labeled // config.batch_size)
        last = self.labeled - (self.steps - 1) * config.batch_size
        if self.steps > 1 and last < min(2 * count(), config.batch_size):
            self.steps -= 1
        elif last < count():
            raise UsageError(
                f"{last} training examples are too few for {count()} processes; use more examples or fewer processes"
            )

    def deal(self, generator: torch.Generator) -> Sequence[Tensor]:
        """Return the positions of each step's examples, labeled ones first."""
        order = torch.randperm(self.labeled, generator=generator)
        cuts = torch.arange(1, self.steps) * self.config.batch_size
        return order.tensor_split(cuts)

    def views(self, x: Tensor, chosen: Tensor, mine: slice, generator: torch.Generator) -> Tensor:
        """Return the network's inputs, made of x, which is this process's part (``mine``) of those at ``chosen``."""
        if self.config.augment:
            x = crop_and_flip(x, draw_crops(len(chosen), generator)[:, mine])
        return x

    def labels(self, mine: Tensor) -> Tensor:
        """Return (n,) the labels of the first rows of this process's inputs, of the examples at ``mine``."""
        y = self.splits.train.y
        assert y is not None
        return y[mine[mine < len(y)]]


def require_even(config: TrainConfig, what: str) -> None:
    """Raise UsageError unless each process gets the same number of a batch's examples."""
    if config.batch_size % count():
        raise UsageError(
            f"a batch of {config.batch_size} {what} cannot be shared equally by {count()} processes. "
            "Choose another --batch-size"
        )
