"""The normalisation of pixels that a checkpoint records: mean and standard deviation of each channel."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from gm_probe.data.examples import Examples
from gm_probe.data.fields import Fields
from gm_probe.data.images import blocks
from gm_probe.errors import DataError, UsageError
from gm_probe.runtime.devices import constant

PIXELS = "save pixels as uint8 or as floats in [0, 1], or pass --no-normalize for inputs that are ready"
"""The remedy for data that a normalisation cannot be applied to."""


ROUNDING = 1e-3
"""Floats may lie this far outside of [0, 1]."""


@dataclass(frozen=True, slots=True)
class Normalization:
    """Per-channel mean and standard deviation of pixels scaled to [0, 1]; empty = none applied."""

    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        finite = all(map(math.isfinite, (*self.mean, *self.std)))
        if len(self.mean) != len(self.std) or not finite or min(self.std, default=1) <= 0:
            raise UsageError(
                f"normalisation by mean {self.mean} and std {self.std} is invalid: give both per channel, with std > 0"
            )

    @classmethod
    def of(cls, examples: Examples) -> Normalization:
        """Return the mean and standard deviation of uint8 images; none for float data, which is taken as it is."""
        if examples.x.dtype != torch.uint8:
            return cls()
        # exact integer sums: float32 accumulation over a million pixels would lose digits
        sums = squares = torch.zeros(examples.x.shape[1], dtype=torch.float64)
        for block in blocks(examples.x):
            channels = block.transpose(0, 1).flatten(1)  # (C, n·H·W)
            sums = sums + channels.sum(1, dtype=torch.int64)
            squares = squares + channels.double().square().sum(1)
        count = len(examples) * math.prod(examples.x.shape[2:])
        mean = sums / count
        std = (squares / count - mean.square()).clamp(min=0).sqrt()
        if bool((std == 0).any()):
            raise DataError(f"{examples.source}: a colour channel is constant, so it cannot be normalised")
        return cls(tuple((mean / 255).tolist()), tuple((std / 255).tolist()))

    def require_range(self, examples: Examples, *, recorded: bool = False) -> None:
        """Check that ``examples`` and this normalisation are on one scale, pixels in [0, 1].

        Images are uint8, or have four dimensions or more. A table or a signal of floats has a scale of its own, unless
        the normalisation is ``recorded``: then it is that of the pixels that the model was trained on.

        Raises:
            UsageError: a mean or standard deviation is beyond what pixels in [0, 1] can have.
            DataError: the pixels lie outside of [0, 1], or are all darker than every mean.
        """
        x = examples.x
        if not self.mean or not (x.dtype == torch.uint8 or x.dim() >= 4 or recorded):
            return
        if not (all(0 <= mean <= 1 for mean in self.mean) and max(self.std) <= 1):
            raise UsageError(
                f"the normalisation by mean {_listed(self.mean)} and std {_listed(self.std)} is not for "
                f"pixels in [0, 1], but {examples.source} has such pixels. If it is for pixels from 0 to "
                "255, divide both by 255"
            )
        if not isinstance(x, Tensor) or not len(x) or not (x.dtype == torch.uint8 or x.is_floating_point()):
            return
        low, high = (float(value) / (255 if x.dtype == torch.uint8 else 1) for value in x.aminmax())
        if low < -ROUNDING or high > 1 + ROUNDING:
            raise DataError(
                f"{examples.source} holds floats from {low:.3g} to {high:.3g} but the normalisation is for pixels in "
                f"[0, 1]; {PIXELS}"
            )
        if 0 < high < min(self.mean):
            raise DataError(
                f"the brightest pixel of {examples.source} is {high:.3g} on the scale from 0 to 1, below every mean of "
                f"the normalisation ({_listed(self.mean)}); use the whole range: {PIXELS}"
            )

    def apply(self, x: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Scale uint8 (B, C, H, W) to [0, 1] and normalise; floats are normalised without scaling.

        Raises:
            DataError: another number of channels, integers whose range nobody knows, or several tensors.
        """
        if isinstance(x, Fields):
            if self.mean:
                raise DataError(
                    "inputs of several tensors have no channels to normalise. Give them as the model takes them"
                )
            return x.to(dtype)
        result = (
            x.to(dtype).div_(255) if x.dtype == torch.uint8 else x.to(dtype) if x.is_floating_point() else x
        )
        if self.mean:
            if len(self.mean) != x.shape[1]:
                raise DataError(
                    f"normalisation has {len(self.mean)} channels but the data has {x.shape[1]}; "
                    "set --mean/--std, or --channels"
                )
            if x.dtype != torch.uint8 and not x.is_floating_point():
                raise DataError(f"pixels of {x.dtype} cannot be normalised; {PIXELS}")
            mean, std = constant((self.mean, self.std), dtype, x.device)
            shape = (1, -1, *([1] * (x.dim() - 2)))
            result = (result - mean.view(shape)) / std.view(shape)
        return result


def _listed(values: tuple[float, ...]) -> str:
    return ",".join(f"{value:.4g}" for value in values)
