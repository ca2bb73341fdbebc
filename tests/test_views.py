"""SimCLR's views of a batch against torchvision's operations on one image after another."""

from __future__ import annotations

import pytest
import torch
from conftest import seeded
from torch import Tensor
from torchvision.transforms import RandomResizedCrop
from torchvision.transforms.v2 import functional as vision

from gm_probe.errors import UsageError
from gm_probe.training.augment import require_images
from gm_probe.training.views import HUE, RATIO, SCALE, STRENGTH, ViewDraws, draw_views, see


def pictures(count: int, *shape: int) -> Tensor:
    """Smooth enough to have hues, with a grey image and a black one among them."""
    x = torch.randint(0, 256, (count, *shape), generator=seeded(0), dtype=torch.uint8)
    x[0] = x[0, :1]
    x[1] = 0
    return x


def one_by_one(x: Tensor, draws: ViewDraws) -> Tensor:
    grey = x.shape[1] == 1
    adjust = [vision.adjust_brightness, vision.adjust_contrast, vision.adjust_saturation, vision.adjust_hue]
    seen = []
    for n, image in enumerate(x.float() / 255):
        top, left, height, width = (int(value) for value in draws.boxes[:, n])
        image = vision.resized_crop(image, top, left, height, width, list(x.shape[2:]), antialias=True)
        if draws.flips[n]:
            image = vision.horizontal_flip(image)
        for index in draws.order[:, n].tolist() if draws.jitters[n] else ():
            if index < 2 or not grey:
                image = adjust[index](image, float(draws.factors[index, n]))
        if draws.greys[n] and not grey:
            image = vision.rgb_to_grayscale(image, num_output_channels=3)
        seen.append(image)
    return torch.stack(seen)


@pytest.mark.parametrize("shape", [(3, 32, 32), (3, 24, 40), (1, 8, 8)])
def test_against_torchvision_one_by_one(shape: tuple[int, int, int]) -> None:
    x = pictures(150, *shape)
    draws = draw_views(x.shape, seeded(3))
    torch.testing.assert_close(see(x, draws), one_by_one(x, draws), rtol=0, atol=2e-5)


def test_every_kind_of_draw_occurs_as_often_as_it_should() -> None:
    count = 20_000
    draws = draw_views((count, 3, 32, 32), seeded(1))
    for flags, share in ((draws.flips, 0.5), (draws.jitters, 0.8), (draws.greys, 0.2)):
        assert float(flags.float().mean()) == pytest.approx(
            share, abs=3 * (share * (1 - share) / count) ** 0.5
        )
    for row, half in zip(
        draws.factors - torch.tensor([1.0, 1, 1, 0])[:, None], [STRENGTH] * 3 + [HUE], strict=True
    ):
        assert float(row.abs().max()) <= half + 1e-6
        assert float(row.std()) == pytest.approx(half / 3**0.5, rel=0.02)  # of a uniform one
    first = draws.order[0].bincount(minlength=4) / count
    torch.testing.assert_close(first, torch.full((4,), 0.25), rtol=0, atol=0.01)
    assert torch.equal(draws.order.sort(0).values, torch.arange(4)[:, None].expand(4, count))


@pytest.mark.parametrize("size", [(32, 32), (20, 60)])
def test_boxes_are_distributed_as_torchvision_s(size: tuple[int, int]) -> None:
    """Means and quartiles of the crops' sides and places, over as many draws of each."""
    count = 4000
    boxes = draw_views((count, 3, *size), seeded(2)).boxes
    with torch.random.fork_rng():
        torch.manual_seed(0)
        image = torch.empty(3, *size)
        reference = [RandomResizedCrop.get_params(image, list(SCALE), list(RATIO)) for _ in range(count)]
    expected = torch.tensor(reference, dtype=torch.float).T
    assert bool((boxes[0] + boxes[2] <= size[0]).all())
    assert bool((boxes[1] + boxes[3] <= size[1]).all())
    error = expected.std(1) / count**0.5
    assert bool(((boxes.mean(1) - expected.mean(1)).abs() < 4 * 2**0.5 * error).all())
    levels = torch.tensor([0.25, 0.5, 0.75])
    assert float((boxes.quantile(levels, 1) - expected.quantile(levels, 1)).abs().max()) <= 1


def test_a_crop_that_never_fits_is_the_largest_in_the_middle() -> None:
    """Of a strip no crop of these proportions covers enough."""
    found = draw_views((50, 3, 4, 400), seeded(0)).boxes
    torch.manual_seed(0)
    top, left, height, width = RandomResizedCrop.get_params(torch.empty(3, 4, 400), [0.9, 1.0], list(RATIO))
    strips = found[:, found[2] == 4]
    assert torch.tensor([top, left, height, width]).tolist() in strips.T.int().tolist()


def test_draws_are_the_generator_s_alone() -> None:
    x = pictures(20, 3, 16, 16)
    once, again, other = (see(x, draw_views(x.shape, seeded(n))) for n in (5, 5, 6))
    assert torch.equal(once, again)
    assert not torch.equal(once, other)
    assert x.dtype == torch.uint8
    assert 0 <= float(once.min()) <= float(once.max()) <= 1


@pytest.mark.parametrize(
    "x", [torch.zeros(2, 3, 8, 8), torch.zeros(2, 4, 8, 8, dtype=torch.uint8), torch.zeros(2, 9)]
)
def test_other_inputs_are_refused(x: Tensor) -> None:
    with pytest.raises(UsageError, match="8 bits"):
        require_images(x, "SimCLR")
