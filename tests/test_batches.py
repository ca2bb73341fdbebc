"""Normalised batches against numpy, in a fixed order, down to the unequal last one."""

import math

import numpy as np
import pytest
import torch

from gm_probe.data.batches import Batches, cut
from gm_probe.data.examples import Examples
from gm_probe.data.normalization import Normalization
from gm_probe.errors import DataError, UsageError

PIXELS = np.random.default_rng(0).integers(0, 256, (7, 3, 5, 4), dtype=np.uint8)
LABELS = np.array([2, 0, 1, 1, 2, 0, 0])


@pytest.fixture
def images() -> Examples:
    return Examples(torch.from_numpy(PIXELS), torch.from_numpy(LABELS), (), "pixels")


@pytest.mark.parametrize(
    "y",
    [
        torch.tensor(1),
        torch.zeros(1).long(),
        torch.zeros(5).long(),
        torch.zeros(4, 1, 1).long(),
        torch.full((4,), 0.5),
        torch.full((4,), torch.nan),
        torch.zeros(4, dtype=torch.complex64),
    ],
)
def test_labels_of_another_shape_or_kind_are_refused(y: torch.Tensor) -> None:
    with pytest.raises(DataError, match="give one class index per example"):
        Batches.from_tensors(torch.rand(4, 3), y)


def test_labels_of_any_whole_numbers_and_inputs_with_gradients_are_taken() -> None:
    x = torch.rand(4, 3, requires_grad=True)
    (batch,) = Batches.from_tensors(x, torch.tensor([0, 1, 1, 0], dtype=torch.int32))
    assert batch.y.dtype == torch.int64
    assert not batch.x.requires_grad


def test_normalization_of_images(images: Examples) -> None:
    scaled = PIXELS.astype(np.float64) / 255
    found = Normalization.of(images)
    np.testing.assert_allclose(found.mean, scaled.mean((0, 2, 3)), rtol=1e-12)
    np.testing.assert_allclose(found.std, scaled.std((0, 2, 3)), rtol=1e-10)


def test_normalization_of_many_bright_pixels_is_exact() -> None:
    x = torch.full((400, 1, 64, 64), 254, dtype=torch.uint8)
    x[0, 0, 0, 0] = 255
    count = x.numel()
    found = Normalization.of(Examples(x, None, (), "bright"))
    assert found.mean[0] == pytest.approx((254 + 1 / count) / 255, rel=1e-14)
    assert found.std[0] == pytest.approx(math.sqrt((1 / count) * (1 - 1 / count)) / 255, rel=1e-3)


def test_bare_tensors_are_what_the_model_takes_not_pixels() -> None:
    with pytest.raises(DataError, match=r"x is uint8. .*x\.float\(\) / 255, x\.long\(\)"):
        Batches.from_tensors(torch.zeros(4, 3, dtype=torch.uint8))


def test_floats_need_no_normalization() -> None:
    assert Normalization.of(Examples(torch.randn(4, 3), None, (), "floats")) == Normalization()


def test_a_constant_channel_is_refused(images: Examples) -> None:
    x = images.x.index_fill(1, torch.tensor([1]), 7)
    with pytest.raises(DataError, match="pixels: a colour channel is constant"):
        Normalization.of(Examples(x, None, (), "pixels"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("channels_last", [True, False])
def test_batches_against_numpy(images: Examples, dtype: torch.dtype, channels_last: bool) -> None:
    mean, std = np.array([0.4, 0.5, 0.6]), np.array([0.2, 0.25, 0.3])
    normalization = Normalization(tuple(mean), tuple(std))
    batches = Batches(images, normalization, batch_size=3, dtype=dtype, channels_last=channels_last)
    wanted = (PIXELS / 255 - mean[:, None, None]) / std[:, None, None]
    assert len(batches) == 3
    assert batches.num_examples == 7
    assert batches.labeled
    got = list(batches)
    assert [len(batch.x) for batch in got] == [3, 3, 1]
    x = torch.cat([batch.x for batch in got])
    assert x.dtype == dtype
    np.testing.assert_allclose(x.numpy(), wanted, rtol=2e-6 if dtype == torch.float32 else 1e-13, atol=2e-6)
    assert torch.cat([batch.y for batch in got if batch.y is not None]).tolist() == LABELS.tolist()
    for batch in got:
        assert batch.x.is_contiguous(memory_format=torch.channels_last) == channels_last or len(batch.x) == 1


def test_iterating_twice_gives_the_same(images: Examples) -> None:
    batches = Batches(images, batch_size=4)
    before = images.x.clone()
    for one, other in zip(batches, batches, strict=True):
        assert torch.equal(one.x, other.x)
    assert torch.equal(images.x, before)


def test_floats_are_normalised_unscaled() -> None:
    x = torch.tensor([[1.0, 10.0], [3.0, 30.0]], dtype=torch.float64)
    examples = Examples(x, None, (), "floats")
    (plain,) = Batches(examples, dtype=torch.float64)
    assert torch.equal(plain.x, x)
    assert plain.y is None
    (batch,) = Batches(examples, Normalization((2.0, 20.0), (1.0, 5.0)), dtype=torch.float64)
    assert batch.x.tolist() == [[-1.0, -2.0], [1.0, 2.0]]


def test_integers_that_are_no_pixels_stay_integers() -> None:
    tokens = torch.tensor([[3, 70_000], [0, 1]])
    (batch,) = Batches(Examples(tokens, None, (), "tokens"))
    assert batch.x.dtype == torch.int64
    assert torch.equal(batch.x, tokens)


def test_integers_of_unknown_range_are_not_normalised() -> None:
    pixels = Examples(torch.full((2, 1, 3, 3), 255, dtype=torch.int16), None, (), "pixels")
    with pytest.raises(DataError, match=r"torch\.int16 .*save pixels as uint8.*--no-normalize"):
        next(iter(Batches(pixels, Normalization((0.5,), (0.25,)))))


def test_from_tensors_keeps_the_precision() -> None:
    x = torch.linspace(0, 1, 10, dtype=torch.float64).view(5, 2)
    batches = Batches.from_tensors(x, torch.arange(5), batch_size=2)
    assert torch.equal(torch.cat([batch.x for batch in batches]), x)
    assert [None if batch.y is None else batch.y.tolist() for batch in batches] == [[0, 1], [2, 3], [4]]
    assert not Batches.from_tensors(x).labeled


def test_wrong_number_of_channels(images: Examples) -> None:
    batches = Batches(images, Normalization((0.5,), (0.2,)))
    with pytest.raises(DataError, match="normalisation has 1 channels but the data has 3"):
        next(iter(batches))


@pytest.mark.parametrize(
    ("mean", "std"),
    [
        ((0.5,), ()),
        ((0.5, 0.5), (1.0,)),
        ((0.5,), (0.0,)),
        ((0.5,), (-1.0,)),
        ((math.nan,), (1.0,)),
        ((0.5,), (math.inf,)),
    ],
)
def test_impossible_normalizations(mean: tuple[float, ...], std: tuple[float, ...]) -> None:
    with pytest.raises(UsageError, match="normalisation by mean"):
        Normalization(mean, std)


@pytest.mark.parametrize(("num", "batch_size"), [(7, 3), (6, 3), (1, 5), (3, 1)])
def test_len_counts_the_batches(num: int, batch_size: int) -> None:
    batches = Batches.from_tensors(torch.zeros(num, 2), batch_size=batch_size)
    assert len(batches) == len(list(batches))
    pieces = cut(torch.arange(num), batches)
    assert [len(piece) for piece in pieces] == [len(batch.x) for batch in batches]


# ---- one scale of pixels and normalisation

SANE = Normalization((0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
UNIT = PIXELS.astype(np.float32) / 255
UNEVEN = {
    "mean in 0–255": (PIXELS, Normalization((127.5,) * 3, (50.0,) * 3), UsageError, "divide both by 255"),
    "std in 0–255": (PIXELS, Normalization((0.0,) * 3, (255.0,) * 3), UsageError, "divide both by 255"),
    "one mean": (UNIT, Normalization((0.5, 0.5, 1.5), (0.2,) * 3), UsageError, "mean 0.5,0.5,1.5"),
    "negative mean": (UNIT, Normalization((-0.5,) * 3, (0.2,) * 3), UsageError, "not for pixels"),
    "floats in 0–255": (UNIT * 255, SANE, DataError, "holds floats from 0 to 255"),
    "normalised before": ((UNIT - 0.5) / 0.25, SANE, DataError, r"holds floats from -2 to 2"),
    "12 bits in 16": (UNIT / 16, SANE, DataError, "below every mean"),
    "divided twice": (UNIT / 255, SANE, DataError, "below every mean"),
    "0 to 16 as uint8": (PIXELS // 16, SANE, DataError, "below every mean"),
}


@pytest.mark.parametrize("name", UNEVEN)
def test_another_scale_than_the_normalisations_is_refused(name: str) -> None:
    array, normalization, kind, words = UNEVEN[name]
    with pytest.raises(kind, match=words):
        Batches(Examples(torch.from_numpy(array), None, (), "pixels"), normalization)


@pytest.mark.parametrize(
    "array", [PIXELS, UNIT, UNIT.astype(np.float64), UNIT * (1 + 1e-6), np.zeros_like(PIXELS), UNIT + 0]
)
def test_pixels_on_the_same_scale_are_taken(array: np.ndarray) -> None:
    for std in (1.0, 0.25, 1 / 255):
        examples = Examples(torch.from_numpy(array), None, (), "pixels")
        Batches(examples, Normalization((0.485, 0.456, 0.406), (std,) * 3))
        Batches(examples, Normalization())


def test_a_table_has_a_scale_of_its_own_unless_the_normalisation_is_recorded() -> None:
    table = Examples(torch.tensor([[1.0, 10.0], [3.0, 30.0]]), None, (), "table")
    Normalization((2.0, 20.0), (1.0, 5.0)).require_range(table)
    with pytest.raises(DataError, match="table holds floats from 1 to 30"):
        Normalization((0.5, 0.5), (0.2, 0.2)).require_range(table, recorded=True)
