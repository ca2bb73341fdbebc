"""Synthetic shifts of images: what a labeled validation set is turned into to learn how scores follow the accuracy."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from gm_probe.data.examples import Examples
from gm_probe.data.images import ImageFiles, blocks

SMALLEST = 4
"""Pixels a side of the smallest image that is shifted."""
_LUMA = (0.299, 0.587, 0.114)


@dataclass(frozen=True, slots=True)
class Shift:
    """One strength of one family; ``apply`` maps images (B, C, H, W) in [0, 1] and a CPU generator to images."""

    family: str
    strength: int
    apply: Callable[[Tensor, torch.Generator], Tensor]


def noise(x: Tensor, generator: torch.Generator, sigma: float) -> Tensor:
    """Add Gaussian noise of standard deviation ``sigma``."""
    return x + sigma * torch.randn(x.shape, generator=generator).to(x)


def blur(x: Tensor, sigma: float) -> Tensor:
    """Convolve with a Gaussian of ``sigma`` pixels."""
    rows, columns = (_blurring(side, sigma, x) for side in x.shape[2:])
    return rows.T @ x @ columns


def _blurring(side: int, sigma: float, like: Tensor) -> Tensor:
    """Return the (side, side) matrix whose row i is the blurred i-th unit vector; borders are mirrored."""
    radius = min(max(1, math.ceil(2.5 * sigma)), side - 1)
    steps = torch.arange(-radius, radius + 1, dtype=like.dtype, device=like.device)
    kernel = (-(steps**2) / (2 * sigma**2)).exp()
    units = torch.eye(side, dtype=like.dtype, device=like.device)[:, None]
    padded = functional.pad(units, (radius, radius), mode="reflect")
    return functional.conv1d(padded, (kernel / kernel.sum())[None, None])[:, 0]


def contrast(x: Tensor, factor: float) -> Tensor:
    """Draw all pixels towards the image's mean."""
    mean = x.mean((1, 2, 3), keepdim=True)
    return mean + factor * (x - mean)


def brightness(x: Tensor, generator: torch.Generator, amount: float) -> Tensor:
    """Make each image lighter or darker by ``amount``, with equal chance."""
    signs = torch.randint(0, 2, (len(x), 1, 1, 1), generator=generator) * 2 - 1
    return x + amount * signs.to(x)


def warp(x: Tensor, matrices: Tensor) -> Tensor:
    """Sample each image at ``matrices`` (B, 2, 3) of its coordinates; beyond the border it is mirrored."""
    grid = functional.affine_grid(matrices.to(x), list(x.shape), align_corners=False)
    return functional.grid_sample(x, grid, padding_mode="reflection", align_corners=False)


def rotation(x: Tensor, generator: torch.Generator, degrees: float) -> Tensor:
    """Turn each image by ``degrees``, to the left or right with equal chance."""
    signs = torch.randint(0, 2, (len(x),), generator=generator) * 2 - 1
    angles = math.radians(degrees) * signs.double()
    cos, sin, zero = angles.cos(), angles.sin(), torch.zeros_like(angles)
    return warp(x, torch.stack([torch.stack([cos, -sin, zero], 1), torch.stack([sin, cos, zero], 1)], 1))


def crop(x: Tensor, generator: torch.Generator, share: float) -> Tensor:
    """Enlarge a window of ``share`` of each side, at a place of its own in each image."""
    places = (2 * torch.rand(len(x), 2, generator=generator) - 1) * (1 - share)
    matrices = torch.zeros(len(x), 2, 3)
    matrices[:, 0, 0] = matrices[:, 1, 1] = share
    matrices[:, :, 2] = places
    return warp(x, matrices)


def grey(x: Tensor, share: float) -> Tensor:
    """Draw the colours towards grey."""
    luma = (x * torch.tensor(_LUMA, dtype=x.dtype, device=x.device).view(1, 3, 1, 1)).sum(1, keepdim=True)
    return x + share * (luma - x)


def pixelation(x: Tensor, factor: float) -> Tensor:
    """Shrink by ``factor`` and enlarge again without smoothing."""
    size = [max(2, round(side / factor)) for side in x.shape[2:]]
    small = functional.interpolate(x, size=size, mode="area")
    return functional.interpolate(small, size=list(x.shape[2:]), mode="nearest")


def compression(x: Tensor, step: float) -> Tensor:
    """Round the cosine coefficients of 8 × 8 blocks, the higher the coarser, as JPEG does.

    Args:
        step: width of the rounding of the lowest coefficient, in grey levels of 255.
    """
    height, width = x.shape[2:]
    padded = functional.pad(x, (0, -width % 8, 0, -height % 8), mode="replicate")
    place = torch.arange(8, dtype=x.dtype, device=x.device)
    cosines = torch.cos(math.pi / 8 * (place[None, :] + 0.5) * place[:, None]) / 2
    cosines[0] /= math.sqrt(2)
    cells = padded.unfold(2, 8, 8).unfold(3, 8, 8)
    steps = step / 255 * (1 + place[:, None] + place[None, :])
    rounded = (cosines @ cells @ cosines.T / steps).round() * steps
    cells = cosines.T @ rounded @ cosines
    return cells.transpose(3, 4).reshape(padded.shape)[:, :, :height, :width]


_STRENGTHS: dict[str, tuple[Callable[..., Tensor], bool, tuple[float, float, float]]] = {
    "noise": (noise, True, (0.03, 0.08, 0.16)),
    "blur": (blur, False, (0.5, 0.9, 1.5)),
    "contrast": (contrast, False, (0.55, 0.3, 0.15)),
    "brightness": (brightness, True, (0.15, 0.3, 0.45)),
    "rotation": (rotation, True, (10.0, 25.0, 50.0)),
    "crop": (crop, True, (0.85, 0.65, 0.45)),
    "grey": (grey, False, (0.4, 0.7, 1.0)),
    "pixelation": (pixelation, False, (1.3, 1.8, 2.8)),
    "compression": (compression, False, (12.0, 30.0, 70.0)),
}
"""Each family's function, whether it draws numbers, and its three strengths, on images of some 32 pixels a side."""
FAMILIES = tuple(_STRENGTHS)


def synthetic_shifts(channels: int, side: int = 32) -> list[Shift]:
    """Return the families in three strengths each; grey images have no colours to lose.

    Args:
        side: pixels of the images' shorter side. Blur and pixelation grow with it beyond 32.
    """
    scale = max(1.0, side / 32)
    found = []
    for family, (function, draws, strengths) in _STRENGTHS.items():
        if family == "grey" and channels != 3:
            continue
        for index, strength in enumerate(strengths):
            amount = strength * scale if family in {"blur", "pixelation"} else strength

            def apply(
                x: Tensor,
                generator: torch.Generator,
                function: Callable[..., Tensor] = function,
                draws: bool = draws,
                amount: float = amount,
            ) -> Tensor:
                return function(x, generator, amount) if draws else function(x, amount)

            found.append(Shift(family, index + 1, apply))
    return found


def why_not_shifted(examples: Examples) -> str | None:
    """Return why ``examples`` cannot be shifted as images are, None where they can."""
    x = examples.x
    if x.dim() != 4 or x.shape[1] not in (1, 3) or min(x.shape[2:]) < SMALLEST:
        return "they are not grey or RGB images"
    if x.dtype == torch.uint8:
        return None
    if not isinstance(x, Tensor) or not x.is_floating_point():
        return "their pixels are integers of unknown range"
    low, high = (float(value) for value in x.aminmax())
    return None if low >= 0 and high <= 1 else "their pixels are not in [0, 1]"


def shifted(x: Tensor | ImageFiles, shift: Shift, seed: int, device: torch.device) -> Tensor:
    """Return images ``x`` (N, C, H, W) after ``shift``, on the CPU, in the dtype of ``x``.

    Random numbers depend on the seed and the shift alone, not on the device.
    """
    generator = torch.Generator().manual_seed(zlib.crc32(f"{shift.family}:{shift.strength}:{seed}".encode()))
    return torch.cat([_one_block(block, shift, generator, device) for block in blocks(x)])


def _one_block(block: Tensor, shift: Shift, generator: torch.Generator, device: torch.device) -> Tensor:
    pixels = block.to(device)
    unit = pixels.float() / 255 if pixels.dtype == torch.uint8 else pixels
    moved = shift.apply(unit, generator).clamp(0, 1)
    found = (moved * 255).round().to(torch.uint8) if pixels.dtype == torch.uint8 else moved
    return found.cpu()
