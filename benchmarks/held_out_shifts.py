"""Shifts of images that `gmprobe estimate` does not calibrate on: 14 families in three strengths each."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from gm_probe.accuracy.shifts import Shift


def impulse(x: Tensor, g: torch.Generator, share: float) -> Tensor:
    drawn = torch.rand(len(x), 1, *x.shape[2:], generator=g)
    return torch.where(drawn < share / 2, 0.0, torch.where(drawn > 1 - share / 2, 1.0, x))


def motion(x: Tensor, g: torch.Generator, length: float) -> Tensor:
    size = int(length)
    padded = functional.pad(x, (size // 2, size - 1 - size // 2, 0, 0), mode="replicate")
    return padded.unfold(3, size, 1).mean(-1)


def dilation(x: Tensor, g: torch.Generator, size: float) -> Tensor:
    side = int(size)
    thick = functional.max_pool2d(functional.pad(x, (side // 2,) * 4, mode="replicate"), side, 1)
    return x + (size - side + 1 if size < 3 else 1.0) * (thick[:, :, : x.shape[2], : x.shape[3]] - x)


def posterize(x: Tensor, g: torch.Generator, levels: float) -> Tensor:
    return (x * (levels - 1)).round() / (levels - 1)


def solarize(x: Tensor, g: torch.Generator, threshold: float) -> Tensor:
    return torch.where(x > threshold, 1 - x, x)


def hue(x: Tensor, g: torch.Generator, degrees: float) -> Tensor:
    # a turn around the grey axis
    angle, third = math.radians(degrees), 1 / 3
    axis = torch.tensor([[0.0, -1, 1], [1, 0, -1], [-1, 1, 0]]) / math.sqrt(3)
    turn = math.cos(angle) * torch.eye(3) + math.sin(angle) * axis + (1 - math.cos(angle)) * third
    return torch.einsum("ij,bjhw->bihw", turn, x)


def cast(x: Tensor, g: torch.Generator, amount: float) -> Tensor:
    gains = 1 + amount * (2 * torch.rand(len(x), 3, 1, 1, generator=g) - 1)
    return x * gains


def gamma(x: Tensor, g: torch.Generator, power: float) -> Tensor:
    return x**power


def smooth_field(x: Tensor, g: torch.Generator, channels: int, cells: int) -> Tensor:
    coarse = torch.rand(len(x), channels, cells, cells, generator=g)
    return functional.interpolate(coarse, size=list(x.shape[2:]), mode="bicubic", align_corners=True)


def fog(x: Tensor, g: torch.Generator, amount: float) -> Tensor:
    mask = amount * smooth_field(x, g, 1, 4).clamp(0, 1)
    return x * (1 - mask) + mask


def cutout(x: Tensor, g: torch.Generator, share: float) -> Tensor:
    side = round(share * x.shape[2])
    places = (torch.rand(len(x), 2, generator=g) * (x.shape[2] - side + 1)).long()
    rows = torch.arange(x.shape[2])
    inside = (rows >= places[:, :, None]) & (rows < places[:, :, None] + side)  # (B, 2, side)
    return torch.where(inside[:, None, 0, :, None] & inside[:, None, 1, None, :], 0.5, x)


def sample(x: Tensor, grid: Tensor) -> Tensor:
    return functional.grid_sample(x, grid, padding_mode="border", align_corners=False)


def shear(x: Tensor, g: torch.Generator, amount: float) -> Tensor:
    matrices = torch.zeros(len(x), 2, 3)
    matrices[:, 0, 0] = matrices[:, 1, 1] = 1
    matrices[:, 0, 1] = amount * (torch.randint(0, 2, (len(x),), generator=g) * 2 - 1)
    return sample(x, functional.affine_grid(matrices, list(x.shape), align_corners=False))


def elastic(x: Tensor, g: torch.Generator, amount: float) -> Tensor:
    still = torch.zeros(len(x), 2, 3)
    still[:, 0, 0] = still[:, 1, 1] = 1
    grid = functional.affine_grid(still, list(x.shape), align_corners=False)
    return sample(x, grid + amount * (smooth_field(x, g, 2, 6).permute(0, 2, 3, 1) - 0.5))


def overlay(x: Tensor, g: torch.Generator, share: float) -> Tensor:
    return (1 - share) * x + share * x.roll(1, 0)


def stripes(x: Tensor, g: torch.Generator, amount: float) -> Tensor:
    waves = torch.sin(torch.arange(x.shape[2]) * math.pi / 2.5)[:, None]
    return x + amount * waves


_FAMILIES: dict[
    str, tuple[Callable[[Tensor, torch.Generator, float], Tensor], tuple[float, float, float]]
] = {
    "impulse": (impulse, (0.02, 0.06, 0.15)),
    "motion": (motion, (3, 5, 9)),
    "dilation": (dilation, (2.3, 3, 5)),
    "posterize": (posterize, (5, 3, 2)),
    "solarize": (solarize, (0.9, 0.75, 0.5)),
    "hue": (hue, (30, 80, 180)),
    "cast": (cast, (0.3, 0.6, 0.9)),
    "gamma": (gamma, (1.6, 2.5, 4)),
    "fog": (fog, (0.5, 0.8, 1.2)),
    "cutout": (cutout, (0.25, 0.4, 0.6)),
    "shear": (shear, (0.2, 0.4, 0.7)),
    "elastic": (elastic, (0.2, 0.4, 0.7)),
    "overlay": (overlay, (0.15, 0.3, 0.4)),
    "stripes": (stripes, (0.06, 0.12, 0.25)),
}


def held_out_shifts() -> list[Shift]:
    """Return all of them; ``gm_probe.accuracy.shifts.shifted`` applies one."""
    return [
        Shift(name, index + 1, lambda x, g, f=function, s=strength: f(x, g, s))
        for name, (function, strengths) in _FAMILIES.items()
        for index, strength in enumerate(strengths)
    ]
