"""Random crop, horizontal flip and RandAugment of a batch of images, on tensors and on their device."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from gm_probe.data.images import ImageFiles
from gm_probe.errors import UsageError
from gm_probe.runtime.devices import constant, upload

PADDING = 4
STRENGTH = 10 / 30
"""Magnitude 10 on RandAugment's scale of 0 to 30."""
NUM_OPERATIONS = 2


def require_images(x: Tensor | ImageFiles, who: str) -> None:
    """Raise UsageError unless x are grey or RGB images of 8 bits, which ``who`` augments."""
    if x.dtype != torch.uint8 or x.dim() != 4 or x.shape[1] not in {1, 3}:
        raise UsageError(
            f"{who} augments grey or RGB images of 8 bits, not {x.dtype} of shape {tuple(x.shape[1:])}"
        )


def draw_crops(count: int, generator: torch.Generator, padding: int = PADDING) -> Tensor:
    """Draw where to cut each of ``count`` images and whether to mirror it: (3, count) rows, columns and flags.

    Drawing is separate from cutting, so that processes can draw for a whole batch and cut their own images.

    Args:
        generator: on the CPU, so that the draw is the same on every device.
    """
    offsets = torch.randint(0, 2 * padding + 1, (2, count), generator=generator)
    flips = torch.randint(0, 2, (count,), generator=generator, dtype=torch.bool)
    return torch.cat([offsets, flips[None]])


def crop_and_flip(images: Tensor, draws: Tensor, padding: int = PADDING, *, reflect: bool = False) -> Tensor:
    """Pad each image, cut it back at its own random place, and mirror half of them.

    Args:
        images: (B, C, H, W), any dtype.
        draws: (3, B) from ``draw_crops``; it is moved to the images' device.
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
    """Return positions mirrored into 0 ... size - 1 at the outermost pixels, which are not repeated."""
    period = max(2 * (size - 1), 1)
    folded = index.remainder(period)
    return torch.minimum(folded, period - folded) if size > 1 else torch.zeros_like(index)


def draw_strong(count: int, generator: torch.Generator) -> Tensor:
    """Draw the operations of RandAugment that each of ``count`` images goes through, and the sign of each.

    Returns:
        (NUM_OPERATIONS, 2, count): the number of the operation, and 1 where its magnitude is negative.
    """
    shape = NUM_OPERATIONS, count
    chosen = torch.randint(0, len(_operations(32, 32)), shape, generator=generator)
    signs = torch.randint(0, 2, shape, generator=generator)
    return torch.stack([chosen, signs], 1)


def strengthen(images: Tensor, draws: Tensor) -> Tensor:
    """Apply RandAugment (Cubuk et al. 2020) of magnitude 10: each image goes through its own operations.

    Images with the same operation and sign are processed together.

    Args:
        images: (B, C, H, W) uint8, with one or three channels.
        draws: (NUM_OPERATIONS, 2, B) from ``draw_strong``, on the CPU.

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

    The places are moved to ``device`` in one copy. The host knows how many there are, so it never waits for them.
    """
    orders = upload(codes.argsort(dim=1, stable=True), device)
    for row, order in zip(codes, orders, strict=True):
        values, counts = row.unique(return_counts=True)
        yield dict(zip(values.tolist(), order.split(counts.tolist()), strict=True))


@cache
def _operations(height: int, width: int) -> dict[str, Callable[[Tensor, float], Tensor]]:
    """Return RandAugment's fourteen operations, with torchvision's ranges and a strength in [-1, 1]."""
    # imported here, because torchvision takes a second or two
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
"""Moves the pixels of images (B, C, H, W) to the nearest place, with zeros from outside."""
_SOURCES: dict[tuple[Any, ...], Tensor] = {}


def _warped(x: Tensor, name: tuple[str, float], warp: Warp) -> Tensor:
    """Apply ``warp`` by a cached table of where each pixel comes from; ``name`` identifies the warp."""
    height, width = x.shape[2:]
    key = (*name, height, width, x.device)
    if key not in _SOURCES:
        numbers = torch.arange(1.0, 1 + height * width).view(1, 1, height, width)
        _SOURCES[key] = warp(numbers).long().flatten().to(x.device)
    return functional.pad(x.flatten(2), (1, 0))[:, :, _SOURCES[key]].view(x.shape)


def sharpen(x: Tensor, factor: float) -> Tensor:
    """Blend uint8 images with their blur, or away from it for factors above 1; the outermost pixels stay."""
    if min(x.shape[2:]) <= 2:
        return x
    edge = (1 / 13,) * 3
    kernel = constant((edge, (1 / 13, 5 / 13, 1 / 13), edge), torch.float32, x.device)
    exact, channels = x.float(), x.shape[1]
    blurred = functional.conv2d(exact, kernel.expand(channels, 1, 3, 3), groups=channels).round()
    away = functional.pad(blurred - exact[:, :, 1:-1, 1:-1], (1, 1, 1, 1))
    return exact.add(away, alpha=1 - factor).clamp(0, 255).to(torch.uint8)
