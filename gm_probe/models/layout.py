"""The memory format in which a network takes images: channels last is faster, and not every network takes it."""

from __future__ import annotations

from copy import copy

import torch
from torch import Tensor, nn

from gm_probe.data.batches import Batches
from gm_probe.data.fields import Inputs, arguments
from gm_probe.errors import of_machine
from gm_probe.models.parameters import evaluating
from gm_probe.runtime.precision import float32_products
from gm_probe.runtime.randomness import generators_kept


def settle_layout(model: nn.Module, x: Tensor) -> bool:
    """Put the network's weights into channels-last format where it takes images so, or else leave them contiguous.

    A network that flattens a convolution's output by ``x.view(len(x), -1)`` takes contiguous images alone.

    Args:
        x: (B, C, H, W) some images, on the model's device and in its dtype.

    Returns:
        Whether images are to be handed over in channels-last format. False, too, for a network that takes neither.
    """
    for layout in (torch.channels_last, torch.contiguous_format):
        model.to(memory_format=layout)
        if _runs(model, x.contiguous(memory_format=layout)):
            return layout is torch.channels_last
    return False


def in_layout_taken(model: nn.Module, batches: Batches) -> Batches:
    """Return ``batches`` in the memory format that the model takes with its weights as they are."""
    if not batches.channels_last:
        return batches
    few = next(iter(batches.of_size(min(2, batches.batch_size)))).x if not batches.batch_dependent else None
    if few is None or _runs(model, few):
        return batches
    other = copy(batches)
    other.channels_last = False
    return other if _runs(model, few.contiguous()) else batches


def _runs(model: nn.Module, x: Inputs) -> bool:
    try:
        with evaluating(model), torch.no_grad(), generators_kept(x.device, model), float32_products():
            args, kwargs = arguments(model, x)
            model(*args, **kwargs)
    except Exception as error:  # a user's layer may raise anything
        if of_machine(error):
            raise
        return False
    return True
