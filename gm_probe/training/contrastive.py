"""SimCLR: a network whose output are NT-Xent logits, so that every gradient rule trains it as a classifier.

::

    model = Contrastive(encoder, projector(512), temperature=0.5)
    rule = IAMD(model, rho=0.1)
    rule.backward(torch.cat([one_view, other_view]), partners(len(one_view)))

NT-Xent is the cross-entropy of these logits with each view's partner as its label, and the inconsistency term is
taken over them. They couple a batch: it cannot be cut (``m``), nor shared by processes.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from gm_probe.core.errors import UsageError
from gm_probe.core.processes import count


def projector(features: int, width: int = 128) -> nn.Sequential:
    """SimCLR's head: a hidden layer as wide as the ``features``, and ``width`` outputs."""
    return nn.Sequential(nn.Linear(features, features), nn.ReLU(), nn.Linear(features, width))


class Contrastive(nn.Module):
    """Encoder and projector; maps 2B views, the second of each image B rows after the first, to NT-Xent logits.

    Args:
        encoder: maps inputs to features (2B, D).
        head: maps features to what is compared.
        temperature: τ, by which cosine similarities are divided.
    """

    def __init__(self, encoder: nn.Module, head: nn.Module, *, temperature: float = 0.5) -> None:
        super().__init__()
        if not temperature > 0:
            raise UsageError(f"temperature must be above 0, not {temperature}")
        self.encoder, self.head, self.temperature = encoder, head, temperature

    def forward(self, views: Tensor) -> Tensor:
        """(2B, 2B - 1) logits."""
        if count() > 1:
            raise UsageError("NT-Xent compares all views of a batch: train in one process")
        return nt_xent_logits(self.head(self.encoder(views)), self.temperature)


def nt_xent_logits(outputs: Tensor, temperature: float) -> Tensor:
    """Cosine similarities of each of ``outputs`` (n, D) with all others, over τ: (n, n - 1), at least float32."""
    outputs = outputs.to(torch.promote_types(outputs.dtype, torch.float32))
    directions = functional.normalize(outputs, dim=1)
    n = len(directions)
    with torch.autocast(outputs.device.type, enabled=False):
        similarities = directions @ directions.T / temperature
    # without the diagonal: a logit of -∞ would put NaN into the KL
    others = ~torch.eye(n, dtype=torch.bool, device=outputs.device)
    return similarities[others].view(n, n - 1)


def partners(images: int, device: torch.device | None = None) -> Tensor:
    """(2B,) the column in which each of 2B views finds the other view of its image."""
    # of the first views the diagonal lies left of the partner, which moves it up by one
    index = torch.arange(images, device=device)
    return torch.cat([index + images - 1, index])
