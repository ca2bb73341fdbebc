"""The objective of a batch: its base loss, and the logits whose inconsistency counts.

An objective takes the place of a gradient rule's criterion::

    rule = IAMD(model, FixMatch(threshold=0.95), rho=0.1, noise_scale=3.0)
    rule.backward(torch.cat([labeled, weak, strong]), y)      # all inputs in one forward pass

The labeled inputs come first, as many as there are labels. Every process must hold the same number of labeled and of
unlabeled inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from gm_probe.data.splits import Splits
from gm_probe.errors import UsageError
from gm_probe.runtime.processes import count
from gm_probe.training.augment import crop_and_flip, draw_crops
from gm_probe.training.config import TrainConfig

Criterion = Callable[[Tensor, Any], Tensor]
"""Maps a model's outputs (B, ...) and the targets to a loss (0-dim), a weighted mean or a sum over examples."""


class Objective:
    """Supervised learning: every input has a label, and all logits are compared."""

    two_losses = False
    """Whether there is an unlabeled loss."""

    is_mean = False
    """Whether the criterion is known to be a plain mean over examples, so that the parts' shares are known."""

    notes: tuple[str, ...] = ()
    """The names in a metrics row of the means that ``noted`` returns."""

    def __init__(self, criterion: Criterion = functional.cross_entropy) -> None:
        self.criterion = criterion

    @classmethod
    def of(cls, config: TrainConfig, criterion: Criterion) -> Objective:
        """Return the objective with the settings of a run; ``criterion`` is the labeled loss."""
        return cls(criterion)

    @staticmethod
    def sampler(config: TrainConfig, splits: Splits, compares: bool) -> BatchSampler:
        """Return what deals the batches; ``compares`` means that the rule also compares outputs of unlabeled inputs."""
        return BatchSampler(config, splits)

    def __call__(self, logits: Tensor, y: Any) -> Tensor:
        """Return the whole base loss (0-dim) of outputs (B, ...), the first of which have the labels y (n,)."""
        loss, rest = self.loss(logits, y), self.unlabeled_loss(logits, y)
        return loss if rest is None else loss + rest

    def loss(self, logits: Tensor, y: Any) -> Tensor:
        """Return the labeled loss, at whose gradient SAM and ASAM perturb."""
        return self.criterion(logits, y)

    def unlabeled_loss(self, logits: Tensor, y: Any) -> Tensor | None:
        """Return the loss that the unlabeled inputs add; None where there is none."""
        return None

    def compared(self, logits: Tensor, y: Any) -> Tensor:
        """Return the outputs whose inconsistency counts."""
        return logits

    def noted(self, logits: Tensor, y: Tensor) -> list[Tensor]:
        """Return further means over this batch to log."""
        return []


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
