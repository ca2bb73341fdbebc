"""What a batch is learned by: the base loss, and the logits that the inconsistency term is taken over.

An objective takes a gradient rule's criterion's place::

    rule = IAMD(model, FixMatch(threshold=0.95), rho=0.1, noise_scale=3.0)
    rule.backward(torch.cat([labeled, weak, strong]), y)      # all inputs in one forward pass

The labeled inputs come first, as many as there are labels. Of several processes each must hold as many labeled
and as many unlabeled inputs as any other.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.nn import functional

from gm_probe.checks import one_of, real
from gm_probe.errors import UsageError
from gm_probe.runtime.processes import count, sum_over_processes

Criterion = Callable[[Tensor, Any], Tensor]
"""Maps a model's outputs (B, ...) and the targets to a loss (0-dim), a weighted mean or a sum over examples."""


class Objective:
    """Supervised learning: every input has a label, and all logits are compared."""

    two_losses = False
    """Whether there is an unlabeled loss."""

    is_mean = False
    """Whether the criterion is known to be a plain mean over examples, so that no part's share need be found."""

    def __init__(self, criterion: Criterion = functional.cross_entropy) -> None:
        self.criterion = criterion

    def __call__(self, logits: Tensor, y: Any) -> Tensor:
        """The whole base loss (0-dim) of outputs (B, ...), the first of which have the labels y (n,)."""
        loss, rest = self.loss(logits, y), self.unlabeled_loss(logits, y)
        return loss if rest is None else loss + rest

    def loss(self, logits: Tensor, y: Any) -> Tensor:
        """The labeled loss, which SAM and ASAM sharpen."""
        return self.criterion(logits, y)

    def unlabeled_loss(self, logits: Tensor, y: Any) -> Tensor | None:
        """What the unlabeled inputs add to it."""
        return None

    def compared(self, logits: Tensor, y: Any) -> Tensor:
        """The outputs whose inconsistency counts."""
        return logits

    def noted(self, logits: Tensor, y: Tensor) -> list[Tensor]:
        """Further means over this batch to log."""
        return []


class Joint(Objective):
    """Cross-entropy on the labeled inputs; inconsistency over these and the unlabeled ones (paper §5.3)."""

    def loss(self, logits: Tensor, y: Tensor) -> Tensor:
        return self.criterion(logits[: len(y)], y)


class FixMatch(Joint):
    """FixMatch (Sohn et al. 2020) on labeled inputs and two views, weak and strong, of each unlabeled one.

    A weak view whose largest probability reaches ``threshold`` labels its strong view. The inconsistency is over
    labeled inputs and weak views.

    Args:
        threshold: τ.
        weight: λ_u of the unlabeled loss.
        mean: the unlabeled loss is averaged over the whole 'batch', or over the 'mask' of confident views.
    """

    two_losses = True

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

    def unlabeled_loss(self, logits: Tensor, y: Tensor) -> Tensor:
        weak, strong = self._views(logits, y)
        confident, pseudo = self._confident(weak)
        terms = functional.cross_entropy(strong, pseudo, reduction="none") * confident
        if self.mean == "batch":
            return self.weight * terms.mean()
        confident_views = sum_over_processes(confident.sum()) / count()  # a process: half the batch's, of two
        return self.weight * terms.sum() / confident_views.clamp(min=1 / count())

    def compared(self, logits: Tensor, y: Tensor) -> Tensor:
        return logits[: len(logits) - len(self._views(logits, y)[1])]

    def noted(self, logits: Tensor, y: Tensor) -> list[Tensor]:
        """The share of confident weak views."""
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
