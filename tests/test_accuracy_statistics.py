"""Class shares, few labels and calibration against scipy, formulas and simulations."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats

from gm_probe.accuracy.calibration import Row, as_it_is, conformal, fitted, sampling_error
from gm_probe.accuracy.few_labels import (
    ENOUGH,
    clopper_pearson,
    labels_to_separate,
    paired_difference,
    prediction_powered,
)
from gm_probe.accuracy.shares import Corrected, em_shares, rejected, same_shares, skewed
from gm_probe.measures.scores import counted_shares


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# ---- class shares


def gaussians(shares: torch.Tensor, size: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return logits (N, 3), those of the exact posterior at equal shares, and labels (N,)."""
    g = generator(seed)
    labels = torch.multinomial(shares, size, replacement=True, generator=g)
    x = 2 * torch.nn.functional.one_hot(labels, 3) + torch.randn(size, 3, generator=g)
    return 2 * x.double(), labels


def test_em_finds_the_shares_where_only_these_changed() -> None:
    shares = torch.tensor([0.7, 0.2, 0.1], dtype=torch.float64)
    logits, labels = gaussians(shares, 8000, 0)
    found = em_shares(logits.softmax(1), torch.full((3,), 1 / 3, dtype=torch.float64))
    assert torch.allclose(found, counted_shares(labels, 3), atol=0.01)


def test_weights_stand_for_repeated_examples() -> None:
    logits, _ = gaussians(torch.tensor([0.5, 0.3, 0.2]), 50, 0)
    p, counts = logits.softmax(1), torch.arange(50) % 3 + 1
    known = torch.full((3,), 1 / 3, dtype=torch.float64)
    again = em_shares(p.repeat_interleave(counts, 0), known)
    assert torch.allclose(em_shares(p, known, counts.double()), again, atol=1e-5)


def test_bias_corrected_temperature_undoes_scale_and_biases() -> None:
    logits, labels = gaussians(torch.full((3,), 1 / 3), 6000, 0)
    found = Corrected.of(3 * logits + torch.tensor([1.0, -1.0, 0.0]), labels)
    assert found.scale == pytest.approx(1 / 3, rel=0.1)
    biases = found.biases - found.biases.mean()
    assert torch.allclose(biases, torch.tensor([-1 / 3, 1 / 3, 0], dtype=torch.float64), atol=0.1)


def test_the_test_of_label_shift_is_kolmogorov_smirnov() -> None:
    for shift in (0.0, 0.05, 0.2, 0.4):
        a, b = torch.randn(300, generator=generator(1)), torch.randn(200, generator=generator(2)) + shift
        p_value = stats.ks_2samp(a.numpy(), b.numpy(), method="asymp").pvalue
        assert rejected(a, b, torch.ones(200).double()) == (p_value < 0.05)


def test_equal_scores_are_one_step_of_the_test() -> None:
    """Confidences of a sure network are often exactly 1."""
    for number, share in enumerate((0.5, 0.9, 0.99)):
        draws = torch.rand(500, generator=generator(number)), torch.rand(400, generator=generator(9 + number))
        a, b = ((draw * 10).floor().where(draw > share, 1.0) for draw in draws)
        p_value = stats.ks_2samp(a.numpy(), b.numpy(), method="asymp").pvalue
        assert p_value > 0.1
        assert not rejected(a, b, torch.ones(400).double())
        assert rejected(torch.cat([a, torch.full((80,), 2.0)]), b, torch.ones(400).double())


def test_a_change_of_the_shares_alone_is_not_rejected() -> None:
    reference, labels = gaussians(torch.full((3,), 1 / 3), 1500, 0)
    shares = torch.tensor([0.7, 0.2, 0.1], dtype=torch.float64)
    changed, _ = gaussians(shares, 1500, 1)
    weights = (3 * shares)[labels]
    own = reference.softmax(1).amax(1)
    assert not rejected(changed.softmax(1).amax(1), own, weights)
    assert rejected((changed / 2).softmax(1).amax(1), own, weights)


def test_predicted_classes_are_compared_by_chi_square() -> None:
    a = torch.tensor([0] * 50 + [1] * 50)
    for count in (50, 40, 30, 20):
        b = torch.tensor([0] * count + [1] * (100 - count))
        counts = np.stack([a.bincount().numpy(), b.bincount().numpy()])
        expected = stats.chi2_contingency(counts, correction=False).pvalue >= 0.01
        assert same_shares(a, b, 2) == expected
    assert same_shares(torch.zeros(5, dtype=torch.int64), torch.zeros(9, dtype=torch.int64), 2)


def test_skewed_shares_have_the_ratio() -> None:
    found = skewed(torch.full((5,), 0.2, dtype=torch.float64), 16.0, generator())
    assert float(found.sum()) == pytest.approx(1)
    assert float(found.max() / found.min()) == pytest.approx(16)


# ---- few labels


@pytest.mark.parametrize(("hits", "trials"), [(0, 20), (7, 20), (20, 20), (93, 100)])
def test_clopper_pearson_is_scipys(hits: int, trials: int) -> None:
    exact = stats.binomtest(hits, trials).proportion_ci(0.9, method="exact")
    assert clopper_pearson(hits, trials, 0.9) == pytest.approx((exact.low, exact.high))


def beta_world(accuracy: float, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return confidences (N,) that are calibrated, and whether each prediction is right."""
    rng = np.random.default_rng(seed)
    confidence = rng.beta(3 * accuracy, 3 * (1 - accuracy), 4000)
    return torch.from_numpy(confidence), torch.from_numpy(rng.random(4000) < confidence)


def test_the_prediction_powered_mean_by_its_formula() -> None:
    confidence, right = beta_world(0.7, 0)
    confidence = 2 * confidence  # a proxy of another scale, so that the weight is no limit of [0, 1]
    chosen = torch.randperm(4000, generator=generator())[:150]
    found = prediction_powered(right[chosen], confidence[chosen], confidence, 0.95)
    y, f, everywhere = (t.double().numpy() for t in (right[chosen], confidence[chosen], confidence))
    weight = np.cov(y, f)[0, 1] / (f.var(ddof=1) * (1 + 150 / 4000))
    assert 0.2 < weight < 0.8
    assert found.method.startswith("prediction-powered")
    assert found.value == pytest.approx(weight * everywhere.mean() + (y - weight * f).mean(), rel=1e-9)
    assert found.value == pytest.approx((found.low + found.high) / 2)


@pytest.mark.parametrize(("accuracy", "labels"), [(0.6, 50), (0.8, 100), (0.95, 200)])
def test_intervals_by_few_labels_cover_and_are_never_wider(accuracy: float, labels: int) -> None:
    confidence, right = beta_world(accuracy, 1)
    truth, held, gains = float(right.double().mean()), 0, 0
    g = generator(3)
    for _ in range(300):
        chosen = torch.randperm(4000, generator=g)[:labels]
        found = prediction_powered(right[chosen], confidence[chosen], confidence, 0.95)
        low, high = clopper_pearson(int(right[chosen].sum()), labels, 0.95)
        assert found.high - found.low <= high - low + 1e-12
        held += found.low <= truth <= found.high
        gains += found.high - found.low < 0.95 * (high - low)
    assert held / 300 >= 0.925  # 0.95 less two standard errors
    assert gains > 0 or accuracy > 0.9


def test_with_few_errors_the_exact_interval_stands() -> None:
    right = torch.ones(200, dtype=torch.bool)
    right[: ENOUGH - 1] = False
    found = prediction_powered(right, torch.rand(200), torch.rand(1000), 0.9)
    assert (found.low, found.high) == clopper_pearson(200 - ENOUGH + 1, 200, 0.9)


def test_a_paired_difference_covers_in_simulations() -> None:
    rng = np.random.default_rng(0)
    held = 0
    for _ in range(300):
        both, one, other = rng.random((3, 150))
        a = torch.from_numpy((both < 0.6) | (one < 0.3))
        b = torch.from_numpy((both < 0.6) | (other < 0.15))
        value, low, high = paired_difference(a, b, 0.95)
        assert value == pytest.approx((a.double() - b.double()).mean())
        held += low <= 0.4 * 0.15 <= high
    assert held / 300 >= 0.925


def test_the_advised_number_of_labels_has_the_power() -> None:
    difference, disagreement, one_right = 0.03, 0.2, 0.8
    count = round(labels_to_separate(difference, disagreement, one_right, 0.95))
    rng = np.random.default_rng(0)
    better = one_right / 2 + difference / disagreement / 2
    found = []
    for _ in range(400):
        first, second, _ = rng.multinomial(count, [better, one_right - better, 1 - one_right])
        found.append(stats.binomtest(first, first + second).pvalue < 0.05)
    assert 0.72 < np.mean(found) < 0.88
    assert labels_to_separate(0.0, 0.2, 0.8, 0.9) == np.inf


# ---- calibration


def rows() -> list[Row]:
    rng = np.random.default_rng(0)
    scores = rng.random(12)
    return [Row("abcd"[i // 3], {"s": s}, 0.2 + 0.6 * s + 0.05 * rng.normal()) for i, s in enumerate(scores)]


def test_each_family_is_left_out_of_its_own_fit() -> None:
    made, start = rows(), Row("none", {"s": 0.95}, 0.8)

    def slope(used: list[Row]) -> float:
        x = np.array([[row.scores["s"] - 0.95] for row in used])
        return np.linalg.lstsq(x, np.array([row.accuracy - 0.8 for row in used]), rcond=None)[0][0]

    found = fitted(made, "s", start)
    for index, row in enumerate(made):
        own = slope([other for other in made if other.family != row.family])
        expected = np.clip(0.8 + own * (row.scores["s"] - 0.95), 0, 1) - row.accuracy
        assert found.residuals[index] == pytest.approx(expected)
    assert found.slope == pytest.approx(slope(made))
    assert found.accuracy(0.95) == pytest.approx(0.8)
    assert found.accuracy(10.0) == 1.0
    assert found.mean_error == pytest.approx(np.abs(found.residuals).mean())
    # intervals are wider where the accuracy has dropped further
    assert found.half_width(0.3, 0.9) > found.half_width(0.8, 0.9) > 0


def test_a_score_that_is_an_accuracy_needs_no_line() -> None:
    found = as_it_is(rows(), "s", 0.8)
    assert found.accuracy(0.37) == 0.37
    assert found.residuals == tuple(row.scores["s"] - row.accuracy for row in rows())


def test_a_constant_score_gives_the_validation_accuracy() -> None:
    made = [Row("ab"[i % 2], {"s": 1.0}, i / 10) for i in range(6)]
    assert fitted(made, "s", Row("none", {"s": 1.0}, 0.7)).accuracy(1.0) == pytest.approx(0.7)


def test_the_conformal_quantile_covers_new_draws() -> None:
    assert conformal([1.0, -3.0, 2.0, 0.5], 0.75) == 3.0  # the fourth of five places
    assert conformal([1.0], 0.99) == 1.0
    rng = np.random.default_rng(0)
    held = [abs(rng.normal()) <= conformal(rng.normal(size=27), 0.9) for _ in range(2000)]
    assert 0.88 < np.mean(held) < 0.95


def test_sampling_errors_of_independent_sets_add_in_squares() -> None:
    one, other = sampling_error(0.8, [400], 0.9), sampling_error(0.8, [900], 0.9)
    assert one == pytest.approx(1.645 * np.sqrt(0.16 / 400), rel=0.01)
    assert sampling_error(0.8, [400, 900], 0.9) == pytest.approx(np.hypot(one, other))
    assert sampling_error(1.0, [400], 0.9) > 0
