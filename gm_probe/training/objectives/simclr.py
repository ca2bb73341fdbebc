"""SimCLR (Chen et al. 2020); ``models.contrastive.Contrastive`` returns the logits of NT-Xent."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gm_probe.data.splits import Splits
from gm_probe.errors import UsageError
from gm_probe.models.contrastive import partners
from gm_probe.training.augment import require_images
from gm_probe.training.batch_sampler import BatchSampler, require_even
from gm_probe.training.config import TrainConfig
from gm_probe.training.objectives.supervised import Objective
from gm_probe.training.views import draw_views, see


class SimCLR(Objective):
    """The cross-entropy of NT-Xent logits, where each view's partner is its label."""

    @staticmethod
    def sampler(config: TrainConfig, splits: Splits, compares: bool) -> BatchSampler:
        return ViewsSampler(config, splits)


class ViewsSampler(BatchSampler):
    """Deals two views of every image in a batch, all first views before all second ones, and reads no label.

    Batches are full, because NT-Xent depends on their size. The few images left over in an epoch wait for the next.
    """

    rows = 2

    def __init__(self, config: TrainConfig, splits: Splits) -> None:
        require_even(config, "images")
        require_images(splits.inputs.x, "SimCLR")
        self.config, self.inputs = config, len(splits.inputs)
        self.steps = self.inputs // config.batch_size
        self.examples = self.steps * config.batch_size
        if not self.steps:
            raise UsageError(
                f"{self.inputs} training images do not fill a batch of {config.batch_size}. Choose a "
                "smaller --batch-size"
            )

    def deal(self, generator: torch.Generator) -> Sequence[Tensor]:
        order = torch.randperm(self.inputs, generator=generator)
        return order[: self.examples].split(self.config.batch_size)

    def views(self, x: Tensor, chosen: Tensor, mine: slice, generator: torch.Generator) -> Tensor:
        shape = (len(chosen), *x.shape[1:])
        return torch.cat([see(x, draw_views(shape, generator).of(mine)) for _ in range(2)])

    def labels(self, mine: Tensor) -> Tensor:
        return partners(len(mine))
