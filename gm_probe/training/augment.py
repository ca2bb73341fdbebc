"""Random crop and horizontal flip of a batch of images, on tensors and on their device."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

PADDING = 4


def draw_crops(count: int, generator: torch.Generator, padding: int = PADDING) -> Tensor:
    """Where to cut each of ``count`` images and whether to mirror it: (3, count) rows, columns and flags.

    Drawn apart from the cutting, so that processes can draw for a whole batch and cut their own images.

    Args:
        generator: on the CPU, so that the draw is the same on every device.
    """
    offsets = torch.randint(0, 2 * padding + 1, (2, count), generator=generator)
    flips = torch.randint(0, 2, (count,), generator=generator, dtype=torch.bool)
    return torch.cat([offsets, flips[None]])


def crop_and_flip(images: Tensor, draws: Tensor, padding: int = PADDING) -> Tensor:
    """Zero-pad, cut back at a random place and mirror half of the images, each by its own draw.

    Args:
        images: (B, C, H, W), any dtype.
        draws: (3, B) from ``draw_crops``.

    Returns:
        (B, C, H, W) of the same dtype, in channels-last memory format.
    """
    count, _, height, width = images.shape
    padded = functional.pad(images, (padding, padding, padding, padding))
    rows = draws[0, :, None] + torch.arange(height)  # (B, H)
    columns = draws[1, :, None] + torch.arange(width)  # (B, W)
    columns = torch.where(draws[2, :, None] == 1, columns.flip(1), columns)
    index = torch.arange(count)[:, None, None]
    rows, columns = rows[:, :, None], columns[:, None, :]
    device = images.device
    # advanced indices around the channel slice put the channels last
    cut = padded[index.to(device), :, rows.to(device), columns.to(device)]  # (B, H, W, C)
    return cut.permute(0, 3, 1, 2)
