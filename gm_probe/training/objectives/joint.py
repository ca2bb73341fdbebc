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
        return (MixedSampler if compares else LabeledSampler)(config, splits)


class LabeledSampler(BatchSampler):
    """Deals only the labeled part of ``MixedSampler``'s batches, in as many steps, to rules that use no other."""

    def __init__(self, config: TrainConfig, splits: Splits) -> None:
        self.config, self.labeled = config, len(splits.train)
        self.splits = splits
        self.unlabeled = len(splits.inputs) - self.labeled
        self.steps = -(-self.unlabeled // (config.mu * config.batch_size))
        self.examples = self.steps * config.batch_size
        require_even(config, "labeled examples")

    def deal(self, generator: torch.Generator) -> Sequence[Tensor]:
        size = self.config.batch_size
        return _passes(self.labeled, self.steps * size, generator).split(size)


class MixedSampler(LabeledSampler):
    """Deals full batches of labeled examples and ``mu`` times as many unlabeled ones.

    An epoch is one pass over the unlabeled examples, filled up from the next pass. The labeled examples repeat as often
    as needed.
    """

    def __init__(self, config: TrainConfig, splits: Splits) -> None:
        super().__init__(config, splits)
        self.rows = 1 + config.mu
        self.examples *= self.rows

    def deal(self, generator: torch.Generator) -> Sequence[Tensor]:
        labeled = super().deal(generator)
        size = self.config.mu * self.config.batch_size
        rest = self.labeled + _passes(self.unlabeled, self.steps * size, generator)
        return [torch.cat(pair) for pair in zip(labeled, rest.split(size), strict=True)]


def _passes(size: int, length: int, generator: torch.Generator) -> Tensor:
    """Return the first ``length`` positions of random orders of ``size``, one after another."""
    orders = [torch.randperm(size, generator=generator) for _ in range(-(-length // size))]
    return torch.cat(orders)[:length]
