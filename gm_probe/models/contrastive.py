"""SimCLR: a network whose output are NT-Xent logits, so that every gradient rule trains it as a classifier.

::

    encoder, features = as_encoder(build_model(spec))
    model = Contrastive(encoder, projector(features), temperature=0.5)
    rule = IAMD(model, rho=0.1)
    rule.backward(torch.cat([one_view, other_view]), partners(len(one_view)))

NT-Xent is the cross-entropy of these logits with each view's partner as its label, and the inconsistency term is
taken over them. The logits of a batch depend on each other, so a batch cannot be split (``m``). In training, torchrun's
processes share a batch, each with the same number of images: views are compared with those of all processes, in the
order of ranks. In eval mode each process has batches of its own.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from gm_probe.checks import real
from gm_probe.errors import UsageError
from gm_probe.runtime.processes import gather_with_gradient, rank


def projector(features: int, width: int = 128) -> nn.Sequential:
    """Build SimCLR's head: a hidden layer as wide as the ``features``, and ``width`` outputs."""
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
        real("temperature", temperature, above=0)
        self.encoder, self.head, self.temperature = encoder, head, temperature

    def forward(self, views: Tensor) -> Tensor:
        """Return (2B, 2B - 1) logits; in training shared by W processes, (2B, 2BW - 1)."""
        return nt_xent_logits(self.head(self.features(views)), self.temperature, shared=self.training)

    def features(self, x: Tensor) -> Tensor:
        """Return features (B, D), which a linear probe reads.

        Raises:
            UsageError: the encoder gives something else.
        """
        found = self.encoder(x)
        if not isinstance(found, Tensor) or found.dim() != 2:
            kind = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise UsageError(f"without its last linear layer the network returns {kind}, not features (B, D)")
        return found


def last_linear(model: nn.Module) -> str | None:
    """Return the name of the last linear layer, a classifier's head; None where there is none."""
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    return names[-1] if names else None


def as_encoder(classifier: nn.Module) -> tuple[nn.Module, int]:
    """Return ``classifier`` without its head, which is replaced in place, and the width of its features.

    Raises:
        UsageError: it has no linear layer.
    """
    name = last_linear(classifier)
    if not name:
        raise UsageError(
            "an encoder is a network without its last linear layer, but this network has no linear layer"
        )
    head = classifier.get_submodule(name)
    assert isinstance(head, nn.Linear)
    classifier.set_submodule(name, nn.Identity())
    return classifier, head.in_features


def nt_xent_logits(outputs: Tensor, temperature: float, *, shared: bool = False) -> Tensor:
    """Return cosine similarities of each of ``outputs`` (n, D) with all others, over τ: (n, n - 1), at least float32.

    ``shared``: the others are those of all W processes, in the order of ranks: (n, Wn - 1).
    """
    outputs = outputs.to(torch.promote_types(outputs.dtype, torch.float32))
    directions = functional.normalize(outputs, dim=1)
    every = gather_with_gradient(directions) if shared else directions
    n, total = len(directions), len(every)
    with torch.autocast(outputs.device.type, enabled=False):
        similarities = directions @ every.T / temperature
    # the view itself is left out, because a logit of -∞ would put NaN into the KL. In the flat matrix it is every
    # (total + 1)-th place, so views can skip it; a mask would make the host wait for the device
    flat, first = similarities.flatten(), n * rank() if shared else 0
    middle, last = first + 1, first + 1 + (n - 1) * (total + 1)
    between = flat[middle:last].view(n - 1, total + 1)[:, :total]
    return torch.cat([flat[:first], between.flatten(), flat[last:]]).view(n, total - 1)


def partners(images: int, before: int | None = None) -> Tensor:
    """Return (2B,) the column in which each of 2B views finds the other view of its image.

    Args:
        before: number of other processes' views before this one's; None = by rank, in a batch that all share.
    """
    # the first B views come before their partners, so leaving out the view itself moves these one column to the left
    index = torch.arange(images) + (2 * images * rank() if before is None else before)
    return torch.cat([index + images - 1, index])
