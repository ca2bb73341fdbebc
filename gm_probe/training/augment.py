"""Random crop and horizontal flip of a batch of images, on tensors and on their device."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def crop_and_flip(images: Tensor, generator: torch.Generator, padding: int = 4) -> Tensor:
    """Zero-pad, cut back at a random place and mirror half of the images, each drawn on its own.

    Args:
        images: (B, C, H, W), any dtype.
        generator: on the CPU, so that the draw is the same on every device.

    Returns:
        (B, C, H, W) of the same dtype.
    """
    count, _, height, width = images.shape
    padded = functional.pad(images, (padding, padding, padding, padding))
    offsets = torch.randint(0, 2 * padding + 1, (2, count), generator=generator)
    flips = torch.randint(0, 2, (count,), generator=generator, dtype=torch.bool)
    rows = offsets[0, :, None] + torch.arange(height)  # (B, H)
    columns = offsets[1, :, None] + torch.arange(width)  # (B, W)
    columns = torch.where(flips[:, None], columns.flip(1), columns)
    index = torch.arange(count)[:, None, None]
    rows, columns = rows[:, :, None], columns[:, None, :]
    device = images.device
    # advanced indices around the channel slice put the channels last
    cut = padded[index.to(device), :, rows.to(device), columns.to(device)]  # (B, H, W, C)
    return cut.permute(0, 3, 1, 2)
