"""Random crop, horizontal flip and RandAugment of a batch of images, on tensors and on their device."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional

PADDING = 4
STRENGTH = 10 / 30
"""Magnitude 10 on RandAugment's scale of 0 to 30."""
NUM_OPERATIONS = 2


def draw_crops(count: int, generator: torch.Generator, padding: int = PADDING) -> Tensor:
    """Where to cut each of ``count`` images and whether to mirror it: (3, count) rows, columns and flags.

    Drawn apart from the cutting, so that processes can draw for a whole batch and cut their own images.

    Args:
        generator: on the CPU, so that the draw is the same on every device.
    """
    offsets = torch.randint(0, 2 * padding + 1, (2, count), generator=generator)
    flips = torch.randint(0, 2, (count,), generator=generator, dtype=torch.bool)
    return torch.cat([offsets, flips[None]])


def crop_and_flip(images: Tensor, draws: Tensor, padding: int = PADDING, *, reflect: bool = False) -> Tensor:
    """Pad, cut back at a random place and mirror half of the images, each by its own draw.

    Args:
        images: (B, C, H, W), any dtype.
        draws: (3, B) from ``draw_crops``.
        reflect: pad with the image's own reflection instead of zeros.

    Returns:
        (B, C, H, W) of the same dtype, in channels-last memory format.
    """
    count, _, height, width = images.shape
    padded = images if reflect else functional.pad(images, (padding, padding, padding, padding))
    rows = draws[0, :, None] + torch.arange(height)  # (B, H)
    columns = draws[1, :, None] + torch.arange(width)  # (B, W)
    columns = torch.where(draws[2, :, None] == 1, columns.flip(1), columns)
    if reflect:
        rows, columns = _reflected(rows - padding, height), _reflected(columns - padding, width)
    index = torch.arange(count)[:, None, None]
    rows, columns = rows[:, :, None], columns[:, None, :]
    device = images.device
    # advanced indices around the channel slice put the channels last
    cut = padded[index.to(device), :, rows.to(device), columns.to(device)]  # (B, H, W, C)
    return cut.permute(0, 3, 1, 2)


def _reflected(index: Tensor, size: int) -> Tensor:
    """Positions outside of 0 ... size - 1 mirrored at the outermost pixels, which are not repeated."""
    period = max(2 * (size - 1), 1)
    folded = index.remainder(period)
    return torch.minimum(folded, period - folded) if size > 1 else torch.zeros_like(index)


def draw_strong(count: int, generator: torch.Generator, operations: int = NUM_OPERATIONS) -> Tensor:
    """Which operations of RandAugment each of ``count`` images goes through, and the sign of each.

    Returns:
        (operations, 2, count): the number of the operation, and 1 where its magnitude is negative.
    """
    chosen = torch.randint(0, len(_operations(32, 32)), (operations, count), generator=generator)
    signs = torch.randint(0, 2, (operations, count), generator=generator)
    return torch.stack([chosen, signs], 1)


def strengthen(images: Tensor, draws: Tensor) -> Tensor:
    """RandAugment (Cubuk et al. 2020) of magnitude 10: each image by its own operations, one after another.

    Images of one operation and sign are worked on together, by torchvision.

    Args:
        images: (B, C, H, W) uint8, of one or three channels.
        draws: (operations, 2, B) from ``draw_strong``.

    Returns:
        (B, C, H, W) uint8.
    """
    table = list(_operations(*images.shape[-2:]).values())
    for chosen, negative in draws:
        result = images.clone()
        code = (2 * chosen + negative).to(images.device)
        for value in code.unique().tolist():
            members = torch.nonzero(code == value).squeeze(1)
            operation = table[value // 2]
            result[members] = operation(images[members], -STRENGTH if value % 2 else STRENGTH)
        images = result
    return images


@cache
def _operations(height: int, width: int) -> dict[str, Callable[[Tensor, float], Tensor]]:
    """RandAugment's fourteen, with torchvision's ranges: images and a strength in [-1, 1] to images."""
    # imported here: torchvision takes a second or two
    from torchvision.transforms.v2 import functional as vision

    def shear(x: Tensor, level: float, axis: int) -> Tensor:
        angles = [0.0, 0.0]
        angles[axis] = math.degrees(math.atan(0.3 * level))
        return vision.affine(x, 0.0, [0, 0], 1.0, angles, center=[0, 0])

    def translate(x: Tensor, level: float, shift: tuple[int, int]) -> Tensor:
        return vision.affine(x, 0.0, [int(150 / 331 * level * pixels) for pixels in shift], 1.0, [0.0, 0.0])

    return {
        "identity": lambda x, level: x,
        "shear x": lambda x, level: shear(x, level, 0),
        "shear y": lambda x, level: shear(x, level, 1),
        "translate x": lambda x, level: translate(x, level, (width, 0)),
        "translate y": lambda x, level: translate(x, level, (0, height)),
        "rotate": lambda x, level: vision.rotate(x, 30 * level),
        "brightness": lambda x, level: vision.adjust_brightness(x, 1 + 0.9 * level),
        "color": lambda x, level: vision.adjust_saturation(x, 1 + 0.9 * level),
        "contrast": lambda x, level: vision.adjust_contrast(x, 1 + 0.9 * level),
        "sharpness": lambda x, level: vision.adjust_sharpness(x, 1 + 0.9 * level),
        "posterize": lambda x, level: vision.posterize(x, 8 - round(4 * abs(level))),
        "solarize": lambda x, level: vision.solarize(x, 255 * (1 - abs(level))),
        "autocontrast": lambda x, level: vision.autocontrast(x),
        "equalize": lambda x, level: vision.equalize(x),
    }
