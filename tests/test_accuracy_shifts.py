"""Synthetic shifts against scipy, their limits, and their seeds."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import ndimage
from scipy.fft import dctn, idctn

from gm_probe.accuracy import shifts
from gm_probe.accuracy.shifts import FAMILIES, Shift, shifted, synthetic_shifts, why_not_shifted
from gm_probe.data.examples import Examples

CPU = torch.device("cpu")


@pytest.fixture
def x() -> torch.Tensor:
    return torch.rand(5, 3, 12, 20, generator=torch.Generator().manual_seed(0))


def of(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_without_strength_nothing_changes(x: torch.Tensor) -> None:
    same = [
        shifts.noise(x, of(), 0.0),
        shifts.blur(x, 0.05),
        shifts.contrast(x, 1.0),
        shifts.brightness(x, of(), 0.0),
        shifts.rotation(x, of(), 0.0),
        shifts.crop(x, of(), 1.0),
        shifts.grey(x, 0.0),
        shifts.pixelation(x, 1.0),
        shifts.compression(x, 1e-4),
    ]
    for found in same:
        assert torch.allclose(found, x, atol=1e-4)


def test_blur_is_scipys(x: torch.Tensor) -> None:
    found = shifts.blur(x.double(), 0.9)
    expected = ndimage.gaussian_filter(x.double().numpy(), (0, 0, 0.9, 0.9), mode="mirror", radius=3)
    assert np.allclose(found.numpy(), expected, atol=1e-9)


def test_compression_rounds_the_cosine_transform(x: torch.Tensor) -> None:
    images = x[:, :, :8, :16].double()
    found = shifts.compression(images, 30.0)
    places = np.arange(8)
    steps = 30 / 255 * (1 + places[:, None] + places[None, :])
    for start in (0, 8):
        cells = images[:, :, :, start : start + 8].numpy()
        expected = idctn(
            np.round(dctn(cells, axes=(2, 3), norm="ortho") / steps) * steps, axes=(2, 3), norm="ortho"
        )
        assert np.allclose(found[:, :, :, start : start + 8].numpy(), expected, atol=1e-9)


def test_a_half_turn_mirrors_both_sides() -> None:
    square = torch.rand(3, 1, 9, 9, generator=of())
    assert torch.allclose(shifts.rotation(square, of(), 180.0), square.flip(2, 3), atol=1e-4)


def test_grey_and_contrast_by_their_formulas(x: torch.Tensor) -> None:
    grey = shifts.grey(x, 1.0)
    luma = 0.299 * x[:, 0] + 0.587 * x[:, 1] + 0.114 * x[:, 2]
    assert torch.allclose(grey, luma[:, None].expand_as(x), atol=1e-6)
    assert torch.allclose(shifts.contrast(x, 0.0), x.mean((1, 2, 3), keepdim=True).expand_as(x))


def test_a_crop_lies_within_its_image() -> None:
    ramp = torch.arange(16.0).expand(40, 1, 16, 16) / 15
    found = shifts.crop(ramp, of(), 0.5)
    spans = found.amax((1, 2, 3)) - found.amin((1, 2, 3))
    assert bool((spans < 0.55).all())
    assert float(spans.std()) < 0.1
    assert float(found.mean((1, 2, 3)).std()) > 0.05  # each at a place of its own


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_all_families_keep_shape_dtype_and_range(dtype: torch.dtype, x: torch.Tensor) -> None:
    images = (x * 255).round().to(dtype) if dtype == torch.uint8 else x
    made = synthetic_shifts(3)
    assert [(one.family, one.strength) for one in made] == [(f, s) for f in FAMILIES for s in (1, 2, 3)]
    for one in made:
        found = shifted(images, one, 0, CPU)
        assert found.shape == images.shape
        assert found.dtype == dtype
        assert not torch.equal(found, images), one.family
        assert torch.equal(found, shifted(images, one, 0, CPU)), f"{one.family} is not seeded"
        if dtype != torch.uint8:
            assert bool(((found >= 0) & (found <= 1)).all())
    assert "grey" not in {one.family for one in synthetic_shifts(1)}


def test_strengths_move_further_and_further(x: torch.Tensor) -> None:
    images = torch.rand(60, 3, 32, 32, generator=of())
    for family in FAMILIES:
        moved = [
            float((shifted(images, one, 0, CPU) - images).abs().mean())
            for one in synthetic_shifts(3)
            if one.family == family
        ]
        assert moved == sorted(moved), family


def test_seeds_and_blocks() -> None:
    images = torch.rand(1500, 1, 4, 4, generator=of())  # more than a block
    noisy = Shift("noise", 1, lambda x, g: shifts.noise(x, g, 0.1))
    first, second = shifted(images, noisy, 0, CPU), shifted(images, noisy, 1, CPU)
    assert not torch.equal(first, second)
    assert not torch.equal((first - images)[:500], (first - images)[1000:])


def test_what_is_no_image_is_not_shifted() -> None:
    def why(x: torch.Tensor) -> str | None:
        return why_not_shifted(Examples(x, None, (), "x"))

    assert why(torch.zeros(3, 3, 8, 8, dtype=torch.uint8)) is None
    assert why(torch.rand(3, 1, 8, 8)) is None
    assert why(torch.rand(3, 8)) == "they are not grey or RGB images"
    assert why(torch.rand(3, 5, 8, 8)) == "they are not grey or RGB images"
    assert why(torch.randn(3, 3, 8, 8)) == "their pixels are not in [0, 1]"
    assert why(torch.zeros(3, 3, 8, 8, dtype=torch.int64)) == "their pixels are integers of unknown range"
