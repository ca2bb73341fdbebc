"""Which examples each step of an epoch takes, and in which views."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gm_probe.data.splits import Splits
from gm_probe.errors import UsageError
from gm_probe.models.contrastive import partners
from gm_probe.runtime.processes import count
from gm_probe.training.augment import crop_and_flip, draw_crops, draw_strong, strengthen
from gm_probe.training.config import TrainConfig
from gm_probe.training.views import draw_views, require_images, see


class BatchSampler:
    """Supervised learning: every training example once an epoch, the last batch what is left.

    A last batch that would leave a process with one example joins the one before it, since BatchNorm has no statistics
    of a single example.

    Positions are those in ``Splits.inputs``, where the labeled examples come first. Draws are made for a whole batch,
    so that the number of processes that share it does not matter.

    Attributes:
        examples: taken in one epoch.
        steps: batches in one epoch.
        rows: inputs of the network for each of a batch's ``batch_size`` examples.
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
        """The positions of each step's examples, labeled ones first."""
        order = torch.randperm(self.labeled, generator=generator)
        cuts = torch.arange(1, self.steps) * self.config.batch_size
        return order.tensor_split(cuts)

    def views(self, x: Tensor, chosen: Tensor, mine: slice, generator: torch.Generator) -> Tensor:
        """What the network is given of the inputs x, this process's part (``mine``) of those at ``chosen``."""
        if self.config.augment:
            x = crop_and_flip(x, draw_crops(len(chosen), generator)[:, mine])
        return x

    def labels(self, mine: Tensor) -> Tensor:
        """(n,) what the first rows of this process's inputs, of the examples at ``mine``, are to be called."""
        y = self.splits.train.y
        assert y is not None
        return y[mine[mine < len(y)]]


class LabeledSampler(BatchSampler):
    """The labeled part of ``MixedSampler``'s batches, for rules that have no use for the rest: as many steps."""

    def __init__(self, config: TrainConfig, splits: Splits) -> None:
        self.config, self.labeled = config, len(splits.train)
        self.splits = splits
        self.unlabeled = len(splits.inputs) - self.labeled
        self.steps = -(-self.unlabeled // (config.mu * config.batch_size))
        self.examples = self.steps * config.batch_size
        _require_even(config, "labeled examples")

    def deal(self, generator: torch.Generator) -> Sequence[Tensor]:
        size = self.config.batch_size
        return _passes(self.labeled, self.steps * size, generator).split(size)


class MixedSampler(LabeledSampler):
    """Batches of labeled examples and ``mu`` times as many unlabeled ones, all of them whole.

    An epoch is one pass over the unlabeled examples, filled up from the next; the labeled ones are passed over as
    often as that takes.
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


class FixMatchSampler(MixedSampler):
    """Weak views of all examples (flip and reflect-padded crop); after them a strong one of each unlabeled one.

    A strong view is a weak one of its own, by RandAugment.
    """

    def __init__(self, config: TrainConfig, splits: Splits) -> None:
        super().__init__(config, splits)
        self.rows = 1 + 2 * config.mu

    def views(self, x: Tensor, chosen: Tensor, mine: slice, generator: torch.Generator) -> Tensor:
        if x.dtype != torch.uint8 or x.dim() != 4 or x.shape[1] not in {1, 3}:
            raise UsageError(
                f"fixmatch augments grey or RGB images of 8 bits, not {x.dtype} of shape {tuple(x.shape[1:])}"
            )
        weak = crop_and_flip(x, draw_crops(len(chosen), generator)[:, mine], reflect=True)
        draws = draw_crops(len(chosen), generator)[:, mine]
        operations = draw_strong(len(chosen), generator)[:, :, mine]
        unlabeled = slice(self.config.batch_size // count(), None)
        strong = crop_and_flip(x[unlabeled], draws[:, unlabeled], reflect=True)
        return torch.cat([weak, strengthen(strong, operations[:, :, unlabeled])])


class ViewsSampler(BatchSampler):
    """SimCLR: two views of every image in a batch, all first ones before all second ones, and no label is read.

    Batches are whole, for NT-Xent depends on their size: the few images that an epoch's order has left over wait for
    the next.
    """

    rows = 2

    def __init__(self, config: TrainConfig, splits: Splits) -> None:
        _require_even(config, "images")
        require_images(splits.inputs.x)
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


def _require_even(config: TrainConfig, what: str) -> None:
    """Raise UsageError unless each process gets as many of a batch."""
    if config.batch_size % count():
        raise UsageError(
            f"a batch of {config.batch_size} {what} cannot be shared equally by {count()} processes. "
            "Choose another --batch-size"
        )


def _passes(size: int, length: int, generator: torch.Generator) -> Tensor:
    """The first ``length`` of one random order of ``size`` positions after another."""
    orders = [torch.randperm(size, generator=generator) for _ in range(-(-length // size))]
    return torch.cat(orders)[:length]


def make_sampler(config: TrainConfig, splits: Splits) -> BatchSampler:
    """The sampler of ``config``'s objective, and of its gradient rule."""
    if config.objective == "simclr":
        return ViewsSampler(config, splits)
    if config.objective == "fixmatch":
        return FixMatchSampler(config, splits)
    if config.objective == "joint":
        return (MixedSampler if config.method.startswith("iam-") else LabeledSampler)(config, splits)
    return BatchSampler(config, splits)
