"""Learning from few labels with unlabeled inputs in every batch (paper §5.3)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gm_probe.data.splits import Splits
from gm_probe.training.batch_sampler import BatchSampler, require_even
from gm_probe.training.config import TrainConfig
from gm_probe.training.objectives.supervised import Objective


class Joint(Objective):
    """Cross-entropy on the labeled inputs; inconsistency over these and the unlabeled ones (paper §5.3)."""

    def loss(self, logits: Tensor, y: Tensor) -> Tensor:
        return self.criterion(logits[: len(y)], y)

    @staticmethod
    def sampler(config: TrainConfig, splits: Splits, compares: bool) -> BatchSampler:
        return MixedSampler(config, splits, labeled_alone=not compares)


class MixedSampler(BatchSampler):
    """Deals full batches of labeled examples and ``mu`` times as many unlabeled ones.

    An epoch is one pass over the unlabeled examples, filled up from the next pass. The labeled examples repeat as often
    as needed. To rules that use no others, the ``labeled_alone`` are dealt, in as many steps.
    """

    def __init__(self, config: TrainConfig, splits: Splits, *, labeled_alone: bool = False) -> None:
        self.config, self.splits, self.labeled_alone = config, splits, labeled_alone
        self.labeled = len(splits.train)
        self.unlabeled = len(splits.inputs) - self.labeled
        self.steps = -(-self.unlabeled // (config.mu * config.batch_size))
        self.rows = 1 if labeled_alone else 1 + config.mu
        self.examples = self.steps * config.batch_size * self.rows
        require_even(config, "labeled examples")

    def deal(self, generator: torch.Generator) -> Sequence[Tensor]:
        size, others = self.config.batch_size, self.config.mu * self.config.batch_size
        labeled = _passes(self.labeled, self.steps * size, generator).split(size)
        if self.labeled_alone:
            return labeled
        rest = self.labeled + _passes(self.unlabeled, self.steps * others, generator)
        return [torch.cat(pair) for pair in zip(labeled, rest.split(others), strict=True)]


def _passes(size: int, length: int, generator: torch.Generator) -> Tensor:
    """Return the first ``length`` positions of random orders of ``size``, one after another."""
    orders = [torch.randperm(size, generator=generator) for _ in range(-(-length // size))]
    return torch.cat(orders)[:length]
