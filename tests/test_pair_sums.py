"""Scores over pairs, jackknife, bootstrap and permutations, against loops over pairs, scipy and enumeration."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from gm_probe.analysis import pair_sums as pair_sums_module
from gm_probe.analysis.intervals import (
    fisher_interval,
    jackknife_error,
    jackknife_interval,
    percentile_interval,
)
from gm_probe.analysis.pair_sums import pair_sums, tau_of
from gm_probe.analysis.permutation import (
    permutation_p,
    permute_blocks,
    permute_within,
    permuted_coefficients,
)
from gm_probe.analysis.rank import inversions, mask_bits, order_bits, permuted_scores, run_scores
from gm_probe.analysis.sample import Draws, sample_of


def sign(a: float, b: float) -> int:
    return int(a > b) - int(a < b)


def loop(x: np.ndarray, y: np.ndarray, pairs: list[tuple[int, int]]) -> list[int]:
    """Score, pairs untied in x, pairs untied in y."""
    signs = [(sign(x[i], x[j]), sign(y[i], y[j])) for i, j in pairs]
    return [sum(a * b for a, b in signs), sum(a != 0 for a, _ in signs), sum(b != 0 for _, b in signs)]


def all_pairs(n: int) -> list[tuple[int, int]]:
    return list(itertools.combinations(range(n), 2))


def members(sets: np.ndarray, row: int, n: int) -> set[int]:
    return {j for j in range(n) if int(sets[row, j // 64]) >> (j % 64) & 1}


# ---- sets of bits and scores


@pytest.mark.parametrize("n", [0, 1, 5, 64, 65, 130])
def test_order_bits_are_the_sets_below_and_above(n: int) -> None:
    values = np.random.default_rng(n).integers(0, 9, n).astype(float)
    below, above = order_bits(values)
    for i in range(n):
        assert members(below, i, n) == {j for j in range(n) if values[j] < values[i]}
        assert members(above, i, n) == {j for j in range(n) if values[j] > values[i]}


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 2**32), st.integers(1, 90), st.integers(1, 40))
def test_run_scores_equal_a_loop(seed: int, n: int, num_values: int) -> None:
    rng = np.random.default_rng(seed)
    x, y = rng.integers(0, num_values, (2, n)).astype(float)
    mask = np.triu(rng.random((n, n)) < 0.5, 1)
    mask |= mask.T
    whole, some = run_scores(x, y), run_scores(x, y, mask_bits(mask))
    for i in range(n):
        others = [(i, j) for j in range(n) if j != i]
        assert whole[:, i].tolist() == loop(x, y, others)
        assert some[:, i].tolist() == loop(x, y, [pair for pair in others if mask[pair]])


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 2**32), st.integers(1, 40), st.integers(0, 40), st.booleans(), st.booleans())
def test_permuted_scores_equal_a_loop(seed: int, n: int, more: int, ties_x: bool, ties_y: bool) -> None:
    rng = np.random.default_rng(seed)
    x, y = rng.normal(size=n), rng.normal(size=n + more)
    x, y = x.round(0) if ties_x else x, y.round(0) if ties_y else y
    rows = np.stack([rng.permutation(n + more)[:n] for _ in range(3)])
    scores, both = permuted_scores(x, y, rows)
    for row, score, untied in zip(rows, scores, both, strict=True):
        signs = [sign(x[i], x[j]) * sign(y[row[i]], y[row[j]]) for i, j in all_pairs(n)]
        assert (score, untied) == (sum(signs), sum(map(abs, signs)))


def test_inversions_of_many_ranks() -> None:
    ranks = np.stack([np.random.default_rng(i).permutation(200) for i in range(4)])
    expected = [sum(row[i] > row[j] for i, j in all_pairs(200)) for row in ranks]
    assert inversions(ranks).tolist() == expected


# ---- sums by setting


def sweep(seed: int, num_settings: int = 7, n: int = 40) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return rng.normal(size=n).round(1), rng.normal(size=n).round(1), rng.integers(0, num_settings, n)


@pytest.mark.parametrize("between", [True, False])
def test_sums_by_setting_equal_a_loop(between: bool) -> None:
    x, y, setting = sweep(0)
    sums = pair_sums(x, y, setting, 9, between=between)  # settings 7 and 8 have no run
    pairs = all_pairs(len(x))
    for s in range(9):
        own = [(i, j) for i, j in pairs if setting[i] == setting[j] == s]
        others = [(i, j) for i, j in pairs if (setting[i] == s) != (setting[j] == s)]
        assert sums.own[:, s].tolist() == loop(x, y, own)
        assert sums.others[:, s].tolist() == loop(x, y, others)
    assert sums.total.tolist() == loop(x, y, pairs)
    assert tau_of(sums.total) == pytest.approx(stats.kendalltau(x, y).statistic)


def test_clear_pairs_only() -> None:
    x, y, setting = sweep(1)
    mask = np.abs(y[:, None] - y) > 1
    sums = pair_sums(x, y, setting, 7, mask_bits(mask))
    pairs = [(i, j) for i, j in all_pairs(len(x)) if mask[i, j]]
    assert sums.total.tolist() == loop(x, y, pairs)
    for s in range(7):
        own = [(i, j) for i, j in pairs if setting[i] == setting[j] == s]
        assert sums.own[:, s].tolist() == loop(x, y, own)


def test_leaving_out_a_setting_is_tau_without_its_runs() -> None:
    x, y, setting = sweep(2)
    without = tau_of(pair_sums(x, y, setting, 7).leave_one_out())
    for s in range(7):
        rest = setting != s
        assert without[s] == pytest.approx(stats.kendalltau(x[rest], y[rest]).statistic)


def test_a_resample_drops_pairs_of_a_run_or_setting_with_its_copy() -> None:
    x, y, setting = sweep(3)
    counts = np.random.default_rng(0).multinomial(7, np.full(7, 1 / 7), size=5)
    found = pair_sums(x, y, setting, 7, between=True).resampled(counts.astype(float))
    for b, times in enumerate(counts):
        drawn = [(i, copy) for i in range(len(x)) for copy in range(times[setting[i]])]
        pairs = [
            (i, j)
            for (i, copy), (j, other) in itertools.combinations(drawn, 2)
            if setting[i] != setting[j] or (copy == other and i != j)
        ]
        assert found[:, b].tolist() == loop(x, y, pairs)


def test_first_order_resamples_are_near_exact_for_many_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(4)
    x, y, setting = rng.normal(size=600), rng.normal(size=600), np.arange(600)
    y += 0.3 * x
    counts = Draws(0, 300).counts(600)
    first_order = tau_of(pair_sums(x, y, setting, 600, between=True).resampled(counts))
    monkeypatch.setattr(pair_sums_module, "EXACT_SETTINGS", 600)
    exact = tau_of(pair_sums(x, y, setting, 600, between=True).resampled(counts))
    assert np.corrcoef(exact, first_order)[0, 1] > 0.99
    assert first_order.std() == pytest.approx(exact.std(), rel=0.05)


# ---- intervals


def test_jackknife_error_of_a_mean_is_its_standard_error() -> None:
    values = np.random.default_rng(5).normal(size=17)
    without = (values.sum() - values) / 16
    assert jackknife_error(without) == pytest.approx(stats.sem(values))


def test_jackknife_interval_by_hand() -> None:
    without = np.array([0.4, 0.5, 0.6, 0.5, 0.5])  # squares 0.01 + 0.01; SE² = 4/5 · 0.02
    half = stats.t.ppf(0.975, 4) * math.sqrt(0.016) / (1 - 0.25)
    low, high, why = jackknife_interval(0.5, without)
    assert (low, high) == (
        pytest.approx(math.tanh(math.atanh(0.5) - half)),
        pytest.approx(math.tanh(math.atanh(0.5) + half)),
    )
    assert why is None


@pytest.mark.parametrize(
    ("value", "without", "reason"),
    [
        (0.5, [0.5] * 4, "4 settings"),
        (0.5, [0.5] * 5, "no resample differs"),
        (1.0, [1.0] * 6, "no resample differs"),
        (0.5, [0.5, math.nan, 0.4, 0.3, 0.6], "undefined when one of"),
    ],
)
def test_no_interval_says_why(value: float, without: list[float], reason: str) -> None:
    low, high, why = jackknife_interval(value, np.array(without))
    assert low is None
    assert high is None
    assert reason in str(why)


def test_fisher_interval_is_the_textbook_one() -> None:
    # Fisher's z of r has standard error 1/√(n − 3), and so r has (1 − r²)/√(n − 3)
    low, high, _ = fisher_interval(0.6, (1 - 0.36) / math.sqrt(100 - 3), 10**9)
    z, half = math.atanh(0.6), 1.959964 / math.sqrt(97)
    assert (low, high) == (pytest.approx(math.tanh(z - half)), pytest.approx(math.tanh(z + half)))
    assert percentile_interval(np.arange(1001.0)) == (25, 975)


# ---- permutations


def test_blocks_change_places_whole_and_among_equals() -> None:
    setting = np.array([2, 0, 1, 0, 1, 2, 3, 3, 3])
    found = permute_blocks(setting, 300, np.random.default_rng(0))
    assert found.limit == (
        "the permutation test exchanges only settings with as many runs (3 with 2 runs, 1 with 3 runs); "
        "6 arrangements of settings, so p is at least 0.33"
    )
    seen = set()
    for row in found.rows:
        assert sorted(row) == list(range(9))
        assert row[6:].tolist() == [6, 7, 8]
        for s in range(3):
            place, source = np.flatnonzero(setting == s), row[setting == s]
            assert len(set(setting[source])) == 1
            assert (np.sort(source) == source).all()
            assert len(place) == 2
        seen.add(tuple(row))
    assert len(seen) == len(found.rows) == 5  # every other order once: p is exact


def test_blocks_stay_in_their_stratum_and_uneven_sizes_say_so() -> None:
    setting = np.array([0, 0, 1, 1, 2, 2, 3, 3])
    stratum = np.array([0, 0, 0, 0, 1, 1, 1, 1])
    rows = permute_blocks(setting, 50, np.random.default_rng(0), stratum).rows
    assert all((stratum[row] == stratum).all() for row in rows)
    assert len({tuple(row) for row in rows}) == len(rows) == 3
    fixed = permute_blocks(setting, 50, np.random.default_rng(0), np.repeat([0, 1, 2, 2], 2))
    assert str(fixed.limit).startswith(
        "2 of 4 settings are not permuted, because no other setting shares their number of runs and"
    )
    none = permute_blocks(np.array([0, 1, 1, 2, 2, 2]), 50, np.random.default_rng(0))
    assert none.rows.shape == (0, 6)
    assert none.limit == "no two settings share their number of runs"


def test_runs_change_places_within_their_stratum() -> None:
    stratum = np.array([1, 0, 1, 0, 1])
    rows = permute_within(stratum, 400, np.random.default_rng(0))
    assert all(sorted(row) == list(range(5)) and (stratum[row] == stratum).all() for row in rows)
    assert len({tuple(row) for row in rows}) == 12


def test_permutation_p_is_near_the_enumerated_one() -> None:
    rng = np.random.default_rng(7)
    setting = np.repeat(np.arange(5), 2)
    x, y = rng.normal(size=10), rng.normal(size=10) + setting
    x += 0.7 * setting
    blocks = np.arange(10).reshape(5, 2)
    every = [np.concatenate(blocks[list(order)]) for order in itertools.permutations(range(5))]
    taus = np.array([stats.kendalltau(x, y[row]).statistic for row in every])  # the first is the identity
    exact = 2 * min(float((taus >= taus[0] - 1e-12).mean()), float((taus <= taus[0] + 1e-12).mean()))
    rows = permute_blocks(setting, 4000, rng).rows
    p = permutation_p(permuted_coefficients(x, y, rows))
    assert 0 < exact < 1
    assert p == pytest.approx(exact, abs=4 * math.sqrt(exact * (1 - exact) / 4000))


def test_coefficients_are_tau_b_for_few_runs_and_spearman_for_many() -> None:
    rng = np.random.default_rng(8)
    for n, reference in ((40, stats.kendalltau), (520, stats.spearmanr)):
        x, y = rng.normal(size=n).round(1), rng.normal(size=n).round(1)
        rows = np.stack([rng.permutation(n) for _ in range(3)])
        expected = [reference(x, of).statistic for of in (y, *(y[row] for row in rows))]
        assert permuted_coefficients(x, y, rows) == pytest.approx(expected)


# ---- draws


def test_draws_are_shared_seeded_and_fewer_for_many_runs() -> None:
    setting = np.repeat(np.arange(6), 2)
    one, same, other = Draws(1, 100), Draws(1, 100), Draws(2, 100)
    assert (one.counts(6) == same.counts(6)).all()
    assert (one.counts(6) != other.counts(6)).any()
    assert (one.blocks(setting).rows == same.blocks(setting).rows).all()
    assert one.counts(6).sum(axis=1).tolist() == [6] * 100
    many = Draws(0, 2000)
    assert len(many.counts(5000)) == 400
    assert list(many.notes) == ["400 bootstrap resamples instead of 2,000 for 5,000 settings"]


def test_runs_of_one_setting_are_the_units() -> None:
    values = np.arange(4.0)
    several, one = (
        sample_of(values, values, np.arange(4), np.array(of)) for of in ([5, 5, 9, 9], [3, 3, 3, 3])
    )
    assert (several.setting.tolist(), several.num_settings, several.one_setting) == ([0, 0, 1, 1], 2, False)
    assert (one.setting.tolist(), one.num_settings, one.one_setting) == ([0, 1, 2, 3], 4, True)
    assert several.only(np.array([True, True, False, False])).one_setting
