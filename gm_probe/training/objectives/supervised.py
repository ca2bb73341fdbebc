"""The objective of a batch: its base loss, and the logits whose inconsistency counts.

An objective takes the place of a gradient rule's criterion::

    rule = IAMD(model, FixMatch(threshold=0.95), rho=0.1, noise_scale=3.0)
    rule.backward(torch.cat([labeled, weak, strong]), y)      # all inputs in one forward pass

The labeled inputs come first, as many as there are labels. Every process must hold the same number of labeled and of
unlabeled inputs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.nn import functional

from gm_probe.data.splits import Splits
from gm_probe.training.batch_sampler import BatchSampler
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
