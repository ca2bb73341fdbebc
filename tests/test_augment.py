"""Crop and flip against a loop over images and pixels."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from gm_probe.training.augment import crop_and_flip, draw_crops


def numbered(count: int, channels: int, height: int, width: int) -> Tensor:
    """Every pixel has a value of its own, from 1 (0 is padding)."""
    return torch.arange(1, count * channels * height * width + 1).view(count, channels, height, width)


def draws_of(count: int, seed: int, padding: int = 4) -> Tensor:
    return draw_crops(count, torch.Generator().manual_seed(seed), padding)


def place(image: Tensor, row: int, column: int, flip: bool, padding: int) -> Tensor:
    """(C, H, W) image shifted by its crop and mirrored, pixel by pixel."""
    channels, height, width = image.shape
    result = torch.zeros_like(image)
    for c in range(channels):
        for i in range(height):
            for j in range(width):
                y = i + row - padding
                x = (width - 1 - j if flip else j) + column - padding
                if 0 <= y < height and 0 <= x < width:
                    result[c, i, j] = image[c, y, x]
    return result


@pytest.mark.parametrize("shape", [(9, 3, 5, 7), (4, 1, 6, 4)])
@pytest.mark.parametrize("padding", [0, 2, 4])
def test_same_draws_same_pixels(shape: tuple[int, int, int, int], padding: int) -> None:
    images = numbered(*shape)
    result = crop_and_flip(images, draws_of(len(images), 3, padding), padding)
    draws = torch.Generator().manual_seed(3)
    offsets = torch.randint(0, 2 * padding + 1, (2, shape[0]), generator=draws)
    flips = torch.randint(0, 2, (shape[0],), generator=draws, dtype=torch.bool)
    for n, image in enumerate(images):
        expected = place(image, int(offsets[0, n]), int(offsets[1, n]), bool(flips[n]), padding)
        assert torch.equal(result[n], expected)


def test_every_image_is_one_crop_whatever_the_draws() -> None:
    """Without knowledge of how the draws are made: each result is one of the 2·(2p+1)² possible images."""
    images, padding = numbered(40, 2, 4, 3), 1
    result = crop_and_flip(images, draws_of(len(images), 0, padding), padding)
    chosen = set()
    for image, cut in zip(images, result, strict=True):
        matches = [
            (row, column, flip)
            for row in range(3)
            for column in range(3)
            for flip in (False, True)
            if torch.equal(place(image, row, column, flip, padding), cut)
        ]
        assert len(matches) == 1
        chosen.update(matches)
    assert len(chosen) > 12


def test_draws_are_uniform() -> None:
    images = numbered(1, 1, 9, 9).expand(3600, 1, 9, 9)
    result = crop_and_flip(images, draws_of(len(images), 0, 1), 1)
    _, counts = torch.unique(result.flatten(1), dim=0, return_counts=True)
    assert len(counts) == 18
    assert 140 <= int(counts.min()) <= int(counts.max()) <= 260


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.float16])
def test_dtype_shape_and_input_are_kept(dtype: torch.dtype) -> None:
    images = (numbered(4, 3, 8, 6) % 200).to(dtype)
    before = images.clone()
    result = crop_and_flip(images, draws_of(len(images), 0))
    assert (result.dtype, result.shape) == (dtype, images.shape)
    assert torch.equal(images, before)


def test_reproducible_without_the_global_generator() -> None:
    images, state = numbered(16, 1, 8, 8), torch.get_rng_state()
    one, two = (crop_and_flip(images, draws_of(len(images), 1)) for _ in range(2))
    assert torch.equal(one, two)
    assert not torch.equal(one, crop_and_flip(images, draws_of(len(images), 2)))
    assert torch.equal(torch.get_rng_state(), state)
