"""Crop and flip against a loop over images and pixels; RandAugment against torchvision's, image by image."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from gm_probe.training.augment import crop_and_flip, draw_crops, draw_strong, strengthen


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


@pytest.mark.parametrize("size", [(5, 7), (8, 8), (3, 2)])
def test_reflecting_crop(size: tuple[int, int]) -> None:
    """Against numpy's padding by reflection, also of images smaller than the padding."""
    images = torch.arange(6 * 2 * size[0] * size[1]).view(6, 2, *size)
    draws = draw_crops(6, torch.Generator().manual_seed(0))
    result = crop_and_flip(images, draws, reflect=True)
    for image, (row, column, flip), found in zip(images, draws.T.tolist(), result, strict=True):
        padded = np.pad(image.numpy(), ((0, 0), (4, 4), (4, 4)), mode="reflect")
        cut = padded[:, row : row + size[0], column : column + size[1]]
        assert np.array_equal(found.numpy(), cut[:, :, ::-1] if flip else cut)


@pytest.mark.parametrize("channels", [1, 3])
def test_randaugment_against_torchvision_image_by_image(channels: int) -> None:
    from torchvision.transforms.v2 import InterpolationMode, RandAugment

    theirs = RandAugment(2, 10)
    names = list(theirs._AUGMENTATION_SPACE)
    images = torch.randint(
        0, 256, (84, channels, 12, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    draws = draw_strong(84, torch.Generator().manual_seed(1))
    result = strengthen(images, draws)
    assert result.dtype == torch.uint8
    assert len(draws[:, 0].unique()) == 14
    for n, given in enumerate(images):
        image = given
        for chosen, negative in draws[:, :, n].tolist():
            values, signed = theirs._AUGMENTATION_SPACE[names[chosen]]
            table = values(31, 12, 16)
            magnitude = 0.0 if table is None else float(table[10])
            image = theirs._apply_image_or_video_transform(
                image,
                names[chosen],
                -magnitude if signed and negative else magnitude,
                InterpolationMode.NEAREST,
                theirs._fill,
            )
        apart = (result[n].int() - image.int()).abs()
        assert int(apart.max()) <= 2  # their magnitudes are float32, so a value may round otherwise
        assert float((apart > 0).float().mean()) < 0.05
