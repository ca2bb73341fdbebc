"""SimCLR's views of a batch of images: resized crop, flip, colour jitter and grey, on tensors and on their device.

The settings are those of Chen et al. 2020 (App. A, and B.9 for CIFAR-10: jitter of strength 0.5, no blur) and of
torchvision's transforms of the same names. Each image has its own draws.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor
from torch.nn import functional

from gm_probe.runtime.devices import constant, upload
from gm_probe.training.augment import grouped

SCALE = (0.08, 1.0)
"""Share of the image's area that a crop covers."""
RATIO = (3 / 4, 4 / 3)
"""Ratio of a crop's width to its height, log-uniform."""
TRIES = 10
JITTER = 0.8
"""Probability of colour jitter, which multiplies brightness, contrast and saturation by 1 ± STRENGTH."""
STRENGTH = 0.4
HUE = 0.1
"""Largest turn of the hue, as a share of the colour circle."""
GREY = 0.2
"""Probability that a view is grey."""
LUMA = (0.2989, 0.587, 0.114)


@dataclass(frozen=True, slots=True)
class ViewDraws:
    """The random draws for the views of n images.

    Attributes:
        boxes: (4, n) top, left, height and width of the crop, in pixels.
        flips, jitters, greys: (n,) whether the view is mirrored, jittered, grey.
        factors: (4, n) factors of brightness, contrast and saturation, and the turn of the hue.
        order: (4, n) which of these comes first, second, ...
    """

    boxes: Tensor
    flips: Tensor
    jitters: Tensor
    greys: Tensor
    factors: Tensor
    order: Tensor

    def of(self, mine: slice) -> ViewDraws:
        """Return the draws of the images at ``mine``."""
        return ViewDraws(*(getattr(self, field.name)[..., mine] for field in fields(self)))

    def on(self, device: torch.device) -> ViewDraws:
        """Return the same draws on ``device``, moved in one copy; ``order`` stays on the CPU, where it is used."""
        flags = torch.stack([self.flips, self.jitters, self.greys])
        there = upload(torch.cat([self.boxes, self.factors, flags]), device)
        boxes, factors, flags = there.split([4, 4, 3])
        flips, jitters, greys = flags > 0
        return ViewDraws(boxes, flips, jitters, greys, factors, self.order)


def draw_views(shape: Sequence[int], generator: torch.Generator) -> ViewDraws:
    """Return draws for each image of a batch of ``shape`` (B, C, H, W), from a generator on the CPU."""
    count, _, height, width = shape

    def uniform(*shape: int, low: float = 0.0, high: float = 1.0) -> Tensor:
        return low + (high - low) * torch.rand(*shape, count, generator=generator)

    boxes = _boxes(uniform(TRIES, low=SCALE[0], high=SCALE[1]), uniform(TRIES), uniform(2), height, width)
    flips, jitters, greys = uniform(3)
    factors = uniform(4, low=-1.0)
    factors = torch.cat([1 + STRENGTH * factors[:3], HUE * factors[3:]])
    return ViewDraws(boxes, flips < 0.5, jitters < JITTER, greys < GREY, factors, uniform(4).argsort(0))


def _boxes(areas: Tensor, ratios: Tensor, places: Tensor, height: int, width: int) -> Tensor:
    """Return (4, n) the first of ``TRIES`` crops that fits, otherwise the largest one in the middle, like torchvision.

    Args:
        areas: (TRIES, n) shares of the image.
        ratios, places: (TRIES, n) and (2, n) in [0, 1), positions in the ranges of log-ratios and of free pixels.
    """
    low, high = map(math.log, RATIO)
    ratios = (low + (high - low) * ratios).exp()
    areas = areas * (height * width)
    heights, widths = (areas / ratios).sqrt().round(), (areas * ratios).sqrt().round()
    fits = (heights >= 1) & (heights <= height) & (widths >= 1) & (widths <= width)
    first = fits.int().argmax(0, keepdim=True)
    found = fits.any(0)
    whole = (
        float(min(height, round(width / RATIO[0]))),
        float(min(width, round(height * RATIO[1]))),
    )
    tall = torch.where(found, heights.gather(0, first)[0], whole[0])
    wide = torch.where(found, widths.gather(0, first)[0], whole[1])
    top = torch.where(found, (places[0] * (height - tall + 1)).floor(), ((height - tall) / 2).floor())
    left = torch.where(found, (places[1] * (width - wide + 1)).floor(), ((width - wide) / 2).floor())
    return torch.stack([top, left, tall, wide])


def see(images: Tensor, draws: ViewDraws) -> Tensor:
    """Return a view of each image by its own draw.

    Args:
        images: (B, C, H, W) uint8 with one or three channels.

    Returns:
        (B, C, H, W) float32 in [0, 1].
    """
    there = draws.on(images.device)
    x = resized_crop(images.float() / 255, there.boxes, there.flips)
    # grey images have only brightness and contrast
    operations: list[Jitter] = [brighten, contrast, *([] if x.shape[1] == 1 else [saturate, turn])]
    x = _jittered(x, torch.where(draws.jitters, draws.order, len(draws.order)), there.factors, operations)
    return x if x.shape[1] == 1 else torch.where(there.greys[:, None, None, None], grey(x), x)


def resized_crop(x: Tensor, boxes: Tensor, flips: Tensor) -> Tensor:
    """Cut each of x (B, C, H, W) to its box (4, B) and enlarge that to H × W, bilinear; mirror where ``flips`` (B,)."""
    height, width = x.shape[2:]
    top, left, tall, wide = boxes[:, :, None]
    # pixels lie at half-integers; beyond the box its outermost pixels repeat, as if it had been cut out
    down, right = (torch.arange(size, device=x.device) + 0.5 for size in (height, width))
    rows = top + ((down * tall / height) - 0.5).clamp(min=0).minimum(tall - 1)
    columns = left + ((right * wide / width) - 0.5).clamp(min=0).minimum(wide - 1)
    columns = torch.where(flips[:, None], columns.flip(1), columns)
    rows, columns = (2 * rows + 1) / height - 1, (2 * columns + 1) / width - 1
    shape = (len(x), height, width)
    grid = torch.stack([columns[:, None, :].expand(shape), rows[:, :, None].expand(shape)], -1)
    return functional.grid_sample(
        x, grid.to(x.dtype), mode="bilinear", padding_mode="border", align_corners=False
    )


Jitter = Callable[[Tensor, Tensor], Tensor]
"""Maps images (B, C, H, W) in [0, 1] and a factor (B, 1, 1, 1) of each to images."""


def _jittered(x: Tensor, order: Tensor, factors: Tensor, operations: list[Jitter]) -> Tensor:
    """Apply all ``operations`` to each image in its own order; images with the same one at a turn go together.

    Args:
        order: (4, B) on the CPU, the number of each image's operation at each turn; larger numbers mean none.
        factors: (4, B) factors of the operations.
    """
    x = x.contiguous()
    for groups in grouped(order, x.device):
        for index, operation in enumerate(operations):
            if index in groups:
                members = groups[index]
                x[members] = operation(x[members], factors[index, members][:, None, None, None])
    return x


def brighten(x: Tensor, factor: Tensor) -> Tensor:
    return (x * factor).clamp(0, 1)


def contrast(x: Tensor, factor: Tensor) -> Tensor:
    """Scale the distance from the image's mean brightness."""
    return _blend(x, grey(x)[:, :1].mean((1, 2, 3), keepdim=True), factor)


def saturate(x: Tensor, factor: Tensor) -> Tensor:
    return _blend(x, grey(x), factor)


def turn(x: Tensor, share: Tensor) -> Tensor:
    """Turn the hue by ``share`` of the colour circle; saturation and value of HSV stay."""
    value, darkest = x.amax(1), x.amin(1)
    span = value - darkest
    safe = torch.where(span > 0, span, 1.0)
    red, green, blue = x.unbind(1)
    sixth = torch.where(
        red == value,
        (green - blue) / safe,
        torch.where(green == value, 2 + (blue - red) / safe, 4 + (red - green) / safe),
    )
    sixth = sixth + 6 * share[:, 0]

    def channel(offset: int) -> Tensor:
        k = (offset + sixth).remainder(6)
        return value - span * torch.minimum(k, 4 - k).clamp(0, 1)

    return torch.stack([channel(5), channel(3), channel(1)], 1)


def grey(x: Tensor) -> Tensor:
    """Return the brightness in every channel."""
    if x.shape[1] == 1:
        return x
    luma = constant(LUMA, x.dtype, x.device)[:, None, None]
    return (x * luma).sum(1, keepdim=True).expand_as(x)


def _blend(x: Tensor, other: Tensor, factor: Tensor) -> Tensor:
    return (factor * x + (1 - factor) * other).clamp(0, 1)
