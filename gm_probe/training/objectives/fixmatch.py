"""FixMatch (Sohn et al. 2020): confident predictions on weak views are the labels of strong ones."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from gm_probe.checks import one_of, real
from gm_probe.data.splits import Splits
from gm_probe.errors import UsageError
from gm_probe.runtime.processes import count, sum_over_processes
from gm_probe.training.augment import crop_and_flip, draw_crops, draw_strong, require_images, strengthen
from gm_probe.training.batch_sampler import BatchSampler
from gm_probe.training.config import TrainConfig
from gm_probe.training.objectives.joint import Joint, MixedSampler
from gm_probe.training.objectives.supervised import Criterion, Objective


class FixMatch(Joint):
    """FixMatch (Sohn et al. 2020) on labeled inputs and two views, weak and strong, of each unlabeled one.

    A weak view whose largest probability reaches ``threshold`` labels its strong view. The inconsistency is taken over
    labeled inputs and weak views.

    Args:
        threshold: τ.
        weight: weight λ_u of the unlabeled loss.
        mean: average the unlabeled loss over the whole 'batch', or over the 'mask' of confident views.
    """

    two_losses = True
    notes = ("running_confident",)

    def __init__(
        self,
        criterion: Criterion = functional.cross_entropy,
        *,
        threshold: float = 0.95,
        weight: float = 1.0,
        mean: str = "batch",
    ) -> None:
        super().__init__(criterion)
        self.threshold = real("threshold", threshold, least=0, most=1)
        self.weight = real("weight", weight, least=0)
        self.mean = one_of("mean", mean, ("batch", "mask"))

    @classmethod
    def of(cls, config: TrainConfig, criterion: Criterion) -> Objective:
        return cls(criterion, threshold=config.threshold, weight=config.lambda_u, mean=config.unlabeled_mean)

    @staticmethod
    def sampler(config: TrainConfig, splits: Splits, compares: bool) -> BatchSampler:
        return FixMatchSampler(config, splits)

    def unlabeled_loss(self, logits: Tensor, y: Tensor) -> Tensor:
        weak, strong = self._views(logits, y)
        confident, pseudo = self._confident(weak)
        terms = functional.cross_entropy(strong, pseudo, reduction="none") * confident
        if self.mean == "batch":
            return self.weight * terms.mean()
        confident_views = sum_over_processes(confident.sum()) / count()  # the mean over processes
        return self.weight * terms.sum() / confident_views.clamp(min=1 / count())

    def compared(self, logits: Tensor, y: Tensor) -> Tensor:
        return logits[: len(logits) - len(self._views(logits, y)[1])]

    def noted(self, logits: Tensor, y: Tensor) -> list[Tensor]:
        """Return the share of confident weak views."""
        return [self._confident(self._views(logits, y)[0])[0].mean()]

    def _views(self, logits: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        unlabeled = len(logits) - len(y)
        if unlabeled < 2 or unlabeled % 2:
            raise UsageError(
                f"{unlabeled} unlabeled inputs are not pairs of weak and strong views of the same images"
            )
        weak, strong = logits[len(y) :].chunk(2)
        return weak, strong

    def _confident(self, weak: Tensor) -> tuple[Tensor, Tensor]:
        probability, pseudo = weak.detach().float().softmax(1).max(1)
        return (probability >= self.threshold).float(), pseudo


class FixMatchSampler(MixedSampler):
    """Deals weak views of all examples (flip and reflect-padded crop), then a strong one of each unlabeled example.

    A strong view is another weak view, changed by RandAugment.
    """

    def __init__(self, config: TrainConfig, splits: Splits) -> None:
        super().__init__(config, splits)
        self.rows = 1 + 2 * config.mu

    def views(self, x: Tensor, chosen: Tensor, mine: slice, generator: torch.Generator) -> Tensor:
        require_images(x, "fixmatch")
        weak = crop_and_flip(x, draw_crops(len(chosen), generator)[:, mine], reflect=True)
        draws = draw_crops(len(chosen), generator)[:, mine]
        operations = draw_strong(len(chosen), generator)[:, :, mine]
        unlabeled = slice(self.config.batch_size // count(), None)
        strong = crop_and_flip(x[unlabeled], draws[:, unlabeled], reflect=True)
        return torch.cat([weak, strengthen(strong, operations[:, :, unlabeled])])
