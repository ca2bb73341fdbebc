"""Random crop, horizontal flip and RandAugment of a batch of images, on tensors and on their device."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from gm_probe.runtime.devices import constant, upload

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
        draws: (3, B) from ``draw_crops``, taken to the images' device.
        reflect: pad with the image's own reflection instead of zeros.

    Returns:
        (B, C, H, W) of the same dtype, in channels-last memory format.
    """
    count, _, height, width = images.shape
    padded = images if reflect else functional.pad(images, (padding, padding, padding, padding))
    device = images.device
    draws = upload(draws, device)
    rows = draws[0, :, None] + torch.arange(height, device=device)  # (B, H)
    columns = draws[1, :, None] + torch.arange(width, device=device)  # (B, W)
    columns = torch.where(draws[2, :, None] == 1, columns.flip(1), columns)
    if reflect:
        rows, columns = _reflected(rows - padding, height), _reflected(columns - padding, width)
    index = torch.arange(count, device=device)[:, None, None]
    # advanced indices around the channel slice put the channels last
    cut = padded[index, :, rows[:, :, None], columns[:, None, :]]  # (B, H, W, C)
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

    Images of one operation and sign are worked on together.

    Args:
        images: (B, C, H, W) uint8, of one or three channels.
        draws: (operations, 2, B) from ``draw_strong``, on the CPU.

    Returns:
        (B, C, H, W) uint8.
    """
    table = list(_operations(*images.shape[-2:]).values())
    for groups in grouped(2 * draws[:, 0] + draws[:, 1], images.device):
        result = images.clone()
        for value, members in groups.items():
            operation = table[value // 2]
            result[members] = operation(images[members], -STRENGTH if value % 2 else STRENGTH)
        images = result
    return images


def grouped(codes: Tensor, device: torch.device) -> Iterator[dict[int, Tensor]]:
    """Yield, for each row of ``codes`` (T, B) on the CPU, the places (k,) of each value in it.

    The places are taken to ``device`` in one copy. The host knows their numbers, so that it never waits for them.
    """
    orders = upload(codes.argsort(dim=1, stable=True), device)
    for row, order in zip(codes, orders, strict=True):
        values, counts = row.unique(return_counts=True)
        yield dict(zip(values.tolist(), order.split(counts.tolist()), strict=True))


@cache
def _operations(height: int, width: int) -> dict[str, Callable[[Tensor, float], Tensor]]:
    """RandAugment's fourteen, with torchvision's ranges: images and a strength in [-1, 1] to images."""
    # imported here: torchvision takes a second or two
    from torchvision.transforms.v2 import functional as vision

    def shear(level: float, axis: int) -> Warp:
        angles = [0.0, 0.0]
        angles[axis] = math.degrees(math.atan(0.3 * level))
        return lambda x: vision.affine(x, 0.0, [0, 0], 1.0, angles, center=[0, 0])

    def translate(level: float, shift: tuple[int, int]) -> Warp:
        by = [int(150 / 331 * level * pixels) for pixels in shift]
        return lambda x: vision.affine(x, 0.0, by, 1.0, [0.0, 0.0])

    return {
        "identity": lambda x, level: x,
        "shear x": lambda x, level: _warped(x, ("shear x", level), shear(level, 0)),
        "shear y": lambda x, level: _warped(x, ("shear y", level), shear(level, 1)),
        "translate x": lambda x, level: _warped(x, ("translate x", level), translate(level, (width, 0))),
        "translate y": lambda x, level: _warped(x, ("translate y", level), translate(level, (0, height))),
        "rotate": lambda x, level: _warped(x, ("rotate", level), lambda x: vision.rotate(x, 30 * level)),
        "brightness": lambda x, level: vision.adjust_brightness(x, 1 + 0.9 * level),
        "color": lambda x, level: vision.adjust_saturation(x, 1 + 0.9 * level),
        "contrast": lambda x, level: vision.adjust_contrast(x, 1 + 0.9 * level),
        "sharpness": lambda x, level: sharpen(x, 1 + 0.9 * level),
        "posterize": lambda x, level: vision.posterize(x, 8 - round(4 * abs(level))),
        "solarize": lambda x, level: vision.solarize(x, 255 * (1 - abs(level))),
        "autocontrast": lambda x, level: vision.autocontrast(x),
        "equalize": lambda x, level: vision.equalize(x),
    }


Warp = Callable[[Tensor], Tensor]
"""Moves the pixels of images (B, C, H, W), to the nearest place and with zeros from outside."""
_SOURCES: dict[tuple[Any, ...], Tensor] = {}


def _warped(x: Tensor, name: tuple[str, float], warp: Warp) -> Tensor:
    """Apply ``warp``, known by its ``name``, by where each pixel comes from, which it is asked for but once."""
    height, width = x.shape[2:]
    key = (*name, height, width, x.device)
    if key not in _SOURCES:
        numbers = torch.arange(1.0, 1 + height * width).view(1, 1, height, width)
        _SOURCES[key] = warp(numbers).long().flatten().to(x.device)
    return functional.pad(x.flatten(2), (1, 0))[:, :, _SOURCES[key]].view(x.shape)


def sharpen(x: Tensor, factor: float) -> Tensor:
    """Blend uint8 images with their blur, whose outermost pixels are the image's own; above 1 away from it."""
    if min(x.shape[2:]) <= 2:
        return x
    edge = (1 / 13,) * 3
    kernel = constant((edge, (1 / 13, 5 / 13, 1 / 13), edge), torch.float32, x.device)
    exact, channels = x.float(), x.shape[1]
    blurred = functional.conv2d(exact, kernel.expand(channels, 1, 3, 3), groups=channels).round()
    away = functional.pad(blurred - exact[:, :, 1:-1, 1:-1], (1, 1, 1, 1))
    return exact.add(away, alpha=1 - factor).clamp(0, 255).to(torch.uint8)
