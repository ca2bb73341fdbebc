"""Which readings of the class shares are shown, on Gaussian classes whose posterior is known."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from gm_probe.accuracy.calibration import Calibration
from gm_probe.accuracy.evidence import Evidence, Labeled
from gm_probe.accuracy.known import Known, know
from gm_probe.accuracy.predictions import Predictions
from gm_probe.accuracy.ranking import Standing, separated
from gm_probe.accuracy.readings import CHANGED, SAME, plausible, read
from gm_probe.accuracy.report import Accuracy
from gm_probe.accuracy.scores import scores_of
from gm_probe.accuracy.verdict import EstimateRequest, judge
from gm_probe.data.batches import Batches
from gm_probe.data.examples import Examples
from gm_probe.data.normalization import Normalization
from gm_probe.errors import DataError

EQUAL = torch.full((4,), 0.25)
SKEWED = torch.tensor([0.6, 0.2, 0.15, 0.05])


def drawn(shares: Tensor, size: int, seed: int, noise: float = 1.0, bias: float = 0.0) -> Labeled:
    """Draw labels and the logits of a classifier that was fitted to noise 1, under more noise or a drift to class 0."""
    g = torch.Generator().manual_seed(seed)
    labels = torch.multinomial(shares, size, replacement=True, generator=g)
    x = 2.2 * torch.nn.functional.one_hot(labels, 4) + noise * torch.randn(size, 4, generator=g)
    x[:, 0] += bias
    return Labeled(Predictions(2.2 * x), labels)


def learned(size: int) -> Known:
    """Return what is known of the classifier where the unlabeled set has this ``size``."""
    levels = [(f"noise {s}", 1 + s / 2, 0.0) for s in (1, 2, 3)] + [
        (f"drift {s}", 1.0, s / 1.5) for s in (1, 2, 3)
    ]
    shifted = tuple(
        (name.split()[0], drawn(EQUAL, 800, 10 + i, noise, bias))
        for i, (name, noise, bias) in enumerate(levels)
    )
    evidence = Evidence("m", drawn(EQUAL, size, 1).predictions, drawn(EQUAL, 800, 2), shifted=shifted)
    return know(evidence, [None] * 7, seed=0)


@pytest.fixture(scope="module")
def known() -> Known:
    return learned(800)


@pytest.mark.parametrize(("size", "sets"), [(30, 200), (2400, 20)])
def test_a_set_of_another_size_than_the_validation_set_is_not_biased(size: int, sets: int) -> None:
    """Among 30 examples chance moves the class shares that COT must meet, and lowers it by four points."""
    known, errors = learned(size), []
    assert known.size == min(size, 800)
    for seed in range(100, 100 + sets):
        target = drawn(EQUAL, size, seed)
        scores = scores_of(target.predictions, known.reference, known.shares, size=known.size)
        found = read(known, target.predictions, scores, "cot", None, [SAME], 0.9)
        errors.append(found.value - target.accuracy)
    # the validation set's own accuracy is off by chance
    own = drawn(EQUAL, 800, 2).accuracy - drawn(EQUAL, 100_000, 9).accuracy
    assert abs(sum(errors) / len(errors) - own) < 0.025


def test_estimators_of_one_sum_are_shown_and_not_chosen() -> None:
    sums = {"dispersion", "last_layer_gradient_norm"}
    sets = [drawn(EQUAL, 200, seed, noise) for seed, noise in ((1, 1.0), (2, 1.0), (3, 1.5), (4, 2.0))]
    exact = [
        replace(
            one, predictions=replace(one.predictions, dispersion=one.accuracy, gradient_norm=one.accuracy)
        )
        for one in sets
    ]
    evidence = Evidence("m", exact[0].predictions, exact[1], shifted=(("a", exact[2]), ("b", exact[3])))
    report = judge([evidence], EstimateRequest.of("validation", 0.9, 0))
    assert sums <= set(report.models[0].estimators)
    assert not any(name in report.models[0].accuracy.method for name in sums)


def test_without_a_shift_the_shares_stay(known: Known) -> None:
    assert plausible([(known, drawn(EQUAL, 800, 3).predictions)]) == [SAME]


def test_changed_shares_alone_are_found(known: Known) -> None:
    target = drawn(SKEWED, 800, 4)
    assert plausible([(known, target.predictions)]) == [CHANGED]
    scores = scores_of(target.predictions, known.reference, known.shares)
    found = {key: read(known, target.predictions, scores, "cot", None, [key], 0.9) for key in (SAME, CHANGED)}
    assert found[CHANGED].low <= target.accuracy <= found[CHANGED].high
    assert abs(found[CHANGED].value - target.accuracy) < abs(found[SAME].value - target.accuracy)


def test_shares_are_not_taken_from_em_where_its_assumption_fails(known: Known) -> None:
    """Noise and skewed shares together: the shares alone do not explain the confidences."""
    target = drawn(SKEWED, 800, 4, noise=2.5)
    signs, _ = known.signs_of(target.predictions)
    assert signs.rejected
    assert plausible([(known, target.predictions)]) == [SAME, CHANGED]


def test_a_shift_like_the_synthetic_ones_keeps_the_shares_in_view(known: Known) -> None:
    target = drawn(EQUAL, 800, 5, bias=1.6)
    keys = plausible([(known, target.predictions)])
    assert keys[0] == SAME
    scores = scores_of(target.predictions, known.reference, known.shares)
    found = read(known, target.predictions, scores, "cot", None, keys, 0.9)
    assert found.low <= target.accuracy <= found.high
    assert set(found.readings) == set(keys)
    assert found.low == min(low for _, low, _ in found.readings.values())
    assert found.high == max(high for _, _, high in found.readings.values())


def test_all_models_have_one_reading_by_their_votes(known: Known) -> None:
    same, changed = drawn(EQUAL, 800, 3).predictions, drawn(SKEWED, 800, 4).predictions
    assert plausible([(known, changed), (known, same), (known, changed)]) == [CHANGED, SAME]
    assert plausible([(known, same), (known, changed), (known, same)]) == [SAME, CHANGED]


def test_known_shares_leave_one_reading(known: Known) -> None:
    target = drawn(SKEWED, 800, 6)
    scores = scores_of(target.predictions, known.reference, SKEWED.double())
    found = read(known, target.predictions, scores, "cot", SKEWED.double(), [], 0.9)
    assert list(found.readings) == ["given"]
    assert found.low <= target.accuracy <= found.high
    assert "those given" in found.assumption


def test_equal_models_are_rarely_told_apart() -> None:
    """On small sets the difference of two equally good models is within its sampling error."""

    def standing(validation: Labeled, target: Labeled) -> Standing:
        accuracy = Accuracy(target.accuracy, 0.0, 1.0, 0.9, "", "")
        calibration = Calibration(0.0, 1.0, validation.accuracy, (0.0,) * 27, (1.0,) * 27)
        return Standing(Evidence("m", target.predictions, validation), calibration, accuracy, {})

    told = 0
    for seed in range(200):
        pair = [standing(drawn(EQUAL, 100, s), drawn(EQUAL, 100, s + 1)) for s in (4 * seed, 4 * seed + 2)]
        first, other = sorted(pair, key=lambda one: -one.accuracy.value)
        told += separated(first, other, 0.9)
    assert told / 200 <= 0.1


def test_other_examples_are_handed_out_in_the_same_way() -> None:
    x = torch.arange(48, dtype=torch.uint8).view(4, 3, 2, 2)
    batches = Batches(Examples(x, None, (), "a"), Normalization((0.0,) * 3, (0.5,) * 3), batch_size=3)
    other = batches.over(Examples(x[:2] + 1, torch.tensor([0, 1]), (), "b"))
    (batch,) = other
    assert torch.allclose(batch.x, (x[:2] + 1).float() / 127.5)
    assert (other.total, other.num_examples, other.labeled) == (2, 2, True)
    assert batches.total == 4
    with pytest.raises(DataError, match=r"\[0, 1\]"):
        batches.over(Examples(3 * torch.rand(2, 3, 2, 2) + 1, None, (), "c"))
