"""Every statistic of a sweep against loops over pairs, scipy, scikit-learn and cases by hand."""

import dataclasses
import itertools
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy import stats
from sklearn.isotonic import IsotonicRegression
from sklearn.metrics import mutual_info_score

from gm_probe.analysis import correlation, pair_sums, permutation, strata
from gm_probe.analysis.comparison import holm
from gm_probe.analysis.correlation import correlate
from gm_probe.analysis.prediction import prediction
from gm_probe.analysis.results import Correlation, Details, SweepStatistics
from gm_probe.analysis.sample import Draws, sample_of
from gm_probe.errors import ResourceError, UsageError
from gm_probe.tables.table import RunTable


def table_of(
    frame: pd.DataFrame, hyper: tuple[str, ...] = (), measures: tuple[str, ...] = ("m",)
) -> RunTable:
    """A table of ``frame`` with gaps, measures and outcomes by name."""
    gaps = tuple(name for name in ("error_gap", "ce_gap") if name in frame)
    known = {"run", *gaps, *measures, *hyper}
    outcomes = tuple(name for name in frame if name not in known)
    if "run" not in frame:
        frame = frame.assign(run=[f"r{i}" for i in range(len(frame))])
    missing = {
        name: dict.fromkeys(np.flatnonzero(frame[name].isna()).tolist(), "lost")
        for name in (*gaps, *measures)
    }
    return RunTable(Path("made"), frame, gaps, measures, hyper, missing=missing, outcomes=outcomes)


def grid(seed: int, *, levels: tuple[int, ...] = (4, 3), seeds: int = 4, effect: float = 0.6) -> pd.DataFrame:
    """A full grid with seeds; measure and gap share an effect of the setting; the gap is rounded, so tied."""
    rng = np.random.default_rng(seed)
    settings = np.array(list(itertools.product(*map(range, levels))))
    setting = np.repeat(np.arange(len(settings)), seeds)
    quality = rng.normal(size=len(settings))[setting]
    n = len(setting)
    frame = pd.DataFrame({"m": effect * quality + rng.normal(size=n)})
    frame["error_gap"] = (0.3 + 0.05 * quality + 0.05 * rng.normal(size=n)).round(2)
    frame["train_error"], frame["num_train"], frame["num_test"] = 0.01, 5000.0, 1000.0
    frame["test_error"] = frame["error_gap"] + 0.01
    frame["train_ce"] = quality + rng.normal(size=n)
    for i in range(len(levels)):
        frame[f"h{i}"] = settings[setting, i]
    return frame


def details(
    frame: pd.DataFrame, hyper: tuple[str, ...] = ("h0", "h1"), **options: Any
) -> tuple[Correlation, Details]:
    result = correlate(table_of(frame, hyper), ["error_gap"], resamples=200, **options)
    return result.measures[0].gaps["error_gap"], result.measures[0].details["error_gap"]


def pair_tau(frame: pd.DataFrame, pairs: list[tuple[int, int]]) -> float:
    """τ-b over the given pairs, from its definition."""
    signs = [
        (np.sign(frame["m"][i] - frame["m"][j]), np.sign(frame["error_gap"][i] - frame["error_gap"][j]))
        for i, j in pairs
    ]
    free_x, free_y = sum(a != 0 for a, _ in signs), sum(b != 0 for _, b in signs)
    return float(sum(a * b for a, b in signs) / math.sqrt(free_x * free_y))


def pairs_of(frame: pd.DataFrame) -> list[tuple[int, int]]:
    return list(itertools.combinations(range(len(frame)), 2))


# ---- τ itself


def test_tau_and_its_neighbours_are_scipys() -> None:
    frame = grid(0)
    tau, _ = details(frame)
    assert tau.tau == pytest.approx(stats.kendalltau(frame["m"], frame["error_gap"]).statistic)
    assert tau.spearman == pytest.approx(stats.spearmanr(frame["m"], frame["error_gap"]).statistic)
    assert tau.pearson == pytest.approx(stats.pearsonr(frame["m"], frame["error_gap"]).statistic)
    assert (tau.num_settings, tau.n, tau.num_permutations, tau.num_resamples) == (12, 48, 200, 200)
    assert tau.low is not None
    assert tau.low < (tau.tau or 0) < (tau.high or 0)


def test_huge_values_have_a_pearson() -> None:
    frame = grid(0)
    huge = frame.assign(m=frame["m"] * 1e300)
    assert details(huge)[0].pearson == pytest.approx(details(frame)[0].pearson)


def test_seeds_widen_the_interval_and_the_p() -> None:
    """Ten settings copied to five seeds each hold no more information than ten runs."""
    rng = np.random.default_rng(3)
    alone = pd.DataFrame({"m": rng.normal(size=10), "error_gap": rng.normal(size=10), "h": range(10)})
    alone["error_gap"] += 0.8 * alone["m"]
    copied = alone.loc[np.repeat(np.arange(10), 5)].reset_index(drop=True)
    copied[["m", "error_gap"]] += 1e-9 * rng.normal(size=(50, 2))
    one, five = (details(frame, ("h",), seed=4)[0] for frame in (alone, copied))
    assert one.p_naive is not None
    assert one.p is not None
    assert five.p_naive is not None
    assert five.p_naive < one.p_naive / 100
    assert five.p == pytest.approx(one.p, abs=0.06)
    assert (five.high or 0) - (five.low or 0) > 0.8 * ((one.high or 0) - (one.low or 0))


def test_results_are_the_seeds(monkeypatch: pytest.MonkeyPatch) -> None:
    first, again, other = (details(grid(1), seed=seed) for seed in (5, 5, 6))
    assert first == again
    assert first[0].p != other[0].p
    assert first[0].low == other[0].low  # the jackknife draws nothing


# ---- between, within, strata, noise


def test_between_is_tau_of_the_means_and_within_of_pairs_of_one_setting() -> None:
    frame = grid(2)
    _, found = details(frame)
    means = frame.groupby(["h0", "h1"])[["m", "error_gap"]].mean()
    assert found.between.value == pytest.approx(stats.kendalltau(means["m"], means["error_gap"]).statistic)
    assert found.between.n == 12
    same = [
        (i, j) for i, j in pairs_of(frame) if (frame.loc[i, ["h0", "h1"]] == frame.loc[j, ["h0", "h1"]]).all()
    ]
    assert found.within.value == pytest.approx(pair_tau(frame, same))
    assert found.within.p is not None


def test_means_of_equal_values_are_equal_whatever_their_number() -> None:
    frame = grid(2).drop(index=[0, 5, 6]).assign(m=0.1)  # 0.1 + 0.1 + 0.1 is not 0.3
    frame.loc[frame["h0"] == 0, "m"] = -0.1
    found = details(frame.reset_index(drop=True))[1].between
    means = frame.round(3).groupby(["h0", "h1"])[["m", "error_gap"]].mean().round(9)
    assert means["m"].nunique() == 2
    assert found.value == pytest.approx(stats.kendalltau(means["m"], means["error_gap"]).statistic)


def test_within_p_by_enumeration() -> None:
    frame = pd.DataFrame({"m": [1.0, 2, 3, 1, 2], "error_gap": [1.0, 2, 3, 2, 1], "h": [0, 0, 0, 1, 1]})
    found = correlate(table_of(frame, ("h",)), resamples=4000).measures[0].details["error_gap"].within
    assert found.value == pytest.approx((3 - 1) / 4)
    scores = [
        sum(np.sign(a - b) for b, a in itertools.combinations(order, 2)) + last
        for order in itertools.permutations((1, 2, 3))
        for last in (-1, 1)
    ]
    exact = np.mean([abs(score) >= 2 for score in scores])
    assert found.p == pytest.approx(exact, abs=0.04)


def test_large_settings_are_permuted_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    frame = grid(2).drop(index=[0, 1, 9])  # settings of 2, 3 and 4 runs
    frame["m"] = frame["m"].round(1)
    small = details(frame.reset_index(drop=True))[1].within
    for most in (2, 3):
        monkeypatch.setattr(strata, "PAIRWISE_RUNS", most)
        assert details(frame.reset_index(drop=True))[1].within == small


def test_few_environments_are_drawn_from_too_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gm_probe.analysis.sign_error.MOST_PAIRS", 400)
    frame = pd.concat([grid(0, levels=(12,), seeds=5)], ignore_index=True)
    table = table_of(frame, ("h0",))
    result = correlate(table, resamples=100)
    signs = result.measures[0].details["error_gap"].sign_error
    assert "sign errors among 5 of 12 settings, drawn at random" in result.notes
    assert len(signs.environments) + signs.skipped == 66
    assert (
        len({label for each in signs.environments for label in each.label.removeprefix("h0 ").split(" / ")})
        <= 5
    )


def test_strata_pool_the_pairs_within_a_value() -> None:
    frame = grid(3)
    _, found = details(frame)
    for stratum in found.strata:
        same = [(i, j) for i, j in pairs_of(frame) if frame[stratum.by][i] == frame[stratum.by][j]]
        assert stratum.tau.value == pytest.approx(pair_tau(frame, same))
    assert [(each.by, each.num_strata) for each in found.strata] == [("h0", 4), ("h1", 3)]


def test_noise_filter_keeps_the_pairs_beyond_two_binomial_errors() -> None:
    frame = grid(4)
    _, found = details(frame)
    test, train = frame["test_error"], frame["train_error"]
    variance = test * (1 - test) / frame["num_test"] + train * (1 - train) / frame["num_train"]
    gap = frame["error_gap"]
    kept = [
        (i, j)
        for i, j in pairs_of(frame)
        if abs(gap[i] - gap[j]) > 1.96 * math.sqrt(variance[i] + variance[j])
    ]
    assert (found.noise_filtered.kept, found.noise_filtered.pairs) == (len(kept), 48 * 47 // 2)
    assert 0 < len(kept) < 48 * 47 // 2
    assert found.noise_filtered.tau.value == pytest.approx(pair_tau(frame, kept))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"num_test": None}, "lacks num_test"),
        ({"num_test": 0.0}, "set sizes above 0"),
        ({"test_error": 7.0}, "errors in [0, 1]"),
        ({"num_test": 1.0}, "no pair differs"),
    ],
)
def test_no_noise_filter_says_why(change: dict[str, Any], reason: str) -> None:
    frame = grid(4).assign(**change)
    frame = frame.drop(columns=[name for name, value in change.items() if value is None])
    assert reason in str(details(frame)[1].noise_filtered.tau.reason)


# ---- Simpson


def simpson(within: float, seed: int = 0) -> pd.DataFrame:
    """Six groups of ten settings: the groups' means rise together; inside a group the slope is ``within``."""
    rng = np.random.default_rng(seed)
    group = np.repeat(np.arange(6), 10)
    inside = rng.normal(size=60)
    frame = pd.DataFrame({"h0": group, "h1": np.tile(np.arange(10), 6)})
    frame["m"] = 5.0 * group + inside
    frame["error_gap"] = 5.0 * group + within * inside + 0.3 * rng.normal(size=60)
    return frame


def test_simpsons_paradox_is_flagged_and_a_clean_case_is_not() -> None:
    tau, found = details(simpson(-1.0))
    assert tau.low is not None
    assert tau.low > 0
    by = {each.by: each for each in found.strata}
    assert by["h0"].tau.high is not None
    assert by["h0"].tau.high < 0
    assert found.simpson == ("h0",)
    _, clean = details(simpson(1.0))
    assert clean.simpson == ()
    result = correlate(table_of(simpson(-1.0), ("h0", "h1")), resamples=100)
    assert result.measures[0].flags("error_gap") == ("Simpson",)


def test_no_flag_where_the_whole_or_the_strata_are_unclear() -> None:
    assert details(simpson(0.0))[1].simpson == ()


def test_the_flag_also_looks_at_the_grouping_asked_for() -> None:
    frame = simpson(-1.0).assign(h2=0)
    frame.loc[::2, "h2"] = 1
    result = correlate(table_of(frame, ("h0", "h1", "h2")), group_by=["h0", "h2"], resamples=100)
    assert "h0, h2" in result.measures[0].details["error_gap"].simpson


# ---- ψ


def test_granulated_psi_equals_a_loop_over_cells() -> None:
    frame = grid(5)
    frame.loc[frame["h0"] == 3, "m"] = 1.0  # the cell of h0 = 3 is constant in the measure
    _, found = details(frame)
    expected = {}
    for name, other in (("h0", "h1"), ("h1", "h0")):
        taus = []
        for value in frame[other].unique():
            rows = frame.index[frame[other] == value]
            pairs = [(i, j) for i, j in itertools.combinations(rows, 2) if frame[name][i] != frame[name][j]]
            if len({frame["m"][i] for i in rows}) > 1:
                taus.append(pair_tau(frame, pairs))
        expected[name] = (float(np.mean(taus)), len(taus), taus)
    for name, (mean, num, _) in expected.items():
        assert found.granulated.psi[name].psi.value == pytest.approx(mean)
        assert found.granulated.psi[name].psi.n == num
    assert found.granulated.psi["h1"].skipped == 1
    assert found.granulated.psi["h1"].coverage == pytest.approx(36 / 48)
    assert found.granulated.mean.value == pytest.approx(np.mean([mean for mean, _, _ in expected.values()]))


def test_psi_has_an_interval_from_its_cells() -> None:
    frame = grid(6, levels=(3, 7), seeds=2)
    found = details(frame)[1].granulated.psi["h0"].psi
    taus = []
    for value in range(7):
        rows = frame.index[frame["h1"] == value]
        taus.append(
            pair_tau(
                frame,
                [(i, j) for i, j in itertools.combinations(rows, 2) if frame["h0"][i] != frame["h0"][j]],
            )
        )
    mean = np.mean(taus)
    half = stats.t.ppf(0.975, 6) * stats.sem(taus) / (1 - mean**2)
    assert found.low == pytest.approx(math.tanh(math.atanh(mean) - half))
    assert found.high == pytest.approx(math.tanh(math.atanh(mean) + half))


def test_cells_of_two_values_are_skipped_and_counted() -> None:
    _, found = details(grid(7, levels=(2, 3)))
    assert (found.granulated.psi["h0"].skipped, found.granulated.psi["h0"].runs) == (3, 0)
    assert "none of 3 cells has 3 values of h0" in str(found.granulated.psi["h0"].psi.reason)
    assert found.granulated.mean.n == 1


# ---- conditional mutual information


def information(frame: pd.DataFrame, given: tuple[str, ...]) -> float:
    """K(S) by scikit-learn: pairs in both orders, cells weighted by their pairs, bits."""
    bits = pairs = 0.0
    for _, cell in frame.groupby(list(given)) if given else [((), frame)]:
        signs = [
            (np.sign(a["m"] - b["m"]), np.sign(a["error_gap"] - b["error_gap"]))
            for (_, a), (_, b) in itertools.permutations(cell.iterrows(), 2)
        ]
        signs = [(a, b) for a, b in signs if a != 0 and b != 0]
        if signs:
            bits += len(signs) * mutual_info_score(*zip(*signs, strict=True)) / math.log(2)
            pairs += len(signs)
    return bits / pairs


def test_conditional_information_equals_scikit_learns() -> None:
    frame = grid(8)
    frame["m"] = frame["m"].round(1)  # ties in both
    found = details(frame)[1].conditioning
    assert found is not None
    assert [each.given for each in found.sets] == [(), ("h0",), ("h1",), ("h0", "h1")]
    for each in found.sets:
        assert each.raw == pytest.approx(information(frame, each.given))
        assert each.value == pytest.approx((each.raw or 0) - (each.null_mean or 0))
    assert found.least is not None
    assert found.least.value == min(each.value for each in found.sets if each.value is not None)


def test_the_null_mean_takes_off_the_bias_of_small_cells() -> None:
    raw, corrected = [], []
    for seed in range(40):
        frame = grid(100 + seed, levels=(5, 4), seeds=1)
        frame["m"] = np.random.default_rng(seed).normal(size=20)
        found = details(frame)[1].conditioning
        assert found is not None
        each = found.sets[1]
        raw.append(each.raw)
        corrected.append(each.value)
    assert np.mean(raw) > 0.08
    assert abs(np.mean(corrected)) < 3 * np.std(corrected) / math.sqrt(40)


def test_perfect_order_has_one_bit() -> None:
    frame = grid(9, seeds=1)
    frame["m"] = frame["error_gap"] = np.arange(12.0)
    found = details(frame)[1].conditioning
    assert found is not None
    assert {each.raw for each in found.sets[:3]} == {1.0}


# ---- sign error


def test_sign_error_equals_a_loop_over_pairs_of_settings() -> None:
    frame = grid(10, seeds=5)
    _, found = details(frame)
    errors = []
    for (_, a), (_, b) in itertools.combinations(frame.groupby(["h0", "h1"]), 2):
        if (a["h0"].iloc[0] == b["h0"].iloc[0]) + (a["h1"].iloc[0] == b["h1"].iloc[0]) != 1:
            continue
        weight, wrong = [], []
        for (_, p), (_, q) in itertools.product(a.iterrows(), b.iterrows()):
            gap = p["error_gap"] - q["error_gap"]
            sure = max(0.0, 1 - 2 * math.exp(-2 * 1000 * (abs(gap) / 2) ** 2)) ** 2
            weight.append(sure)
            wrong.append(sure * (1 - np.sign(p["m"] - q["m"]) * np.sign(gap)) / 2)
        if sum(weight) ** 2 >= 12 * sum(w**2 for w in weight) > 0:
            errors.append(sum(wrong) / sum(weight))
    signs = found.sign_error
    assert 3 <= len(errors) < signs.skipped + len(errors) == 4 * 3 + 3 * 6
    assert sorted(each.error for each in signs.environments) == pytest.approx(sorted(errors))
    assert signs.mean == pytest.approx(np.mean(errors))
    assert signs.percentile_90 == pytest.approx(np.quantile(errors, 0.9))
    assert signs.maximum == pytest.approx(max(errors))
    assert signs.note is None


def test_pairs_weigh_alike_without_a_test_size_and_two_seeds_are_too_few() -> None:
    _, alike = details(grid(10, seeds=4).drop(columns=["num_test"]))
    assert "num_test is unknown" in str(alike.sign_error.note)
    assert alike.sign_error.environments[0].hyperparameter == "h0"
    assert alike.sign_error.environments[0].label.startswith("h0 0 / 1 at h1=0")
    _, few = details(grid(10, seeds=2))
    assert few.sign_error.mean is None
    assert "effective size of 12" in str(few.sign_error.reason)


# ---- partial τ


def test_partial_tau_is_kendalls_formula() -> None:
    frame = grid(11)
    _, found = details(frame)
    for control in ("train_ce", "h0", "h1"):
        xy, xz, zy = (
            stats.kendalltau(a, b).statistic
            for a, b in itertools.combinations((frame["m"], frame[control], frame["error_gap"]), 2)
        )
        xy, xz, zy = stats.kendalltau(frame["m"], frame["error_gap"]).statistic, xy, zy
        expected = (xy - xz * zy) / math.sqrt((1 - xz**2) * (1 - zy**2))
        assert found.partial[control].value == pytest.approx(expected)
        assert found.partial[control].p is not None
        assert found.partial[control].low is not None


def test_partial_tau_sees_through_a_common_cause() -> None:
    """A control that drives both: τ is clear, its partial is not, at the levels' own resolution."""
    rng = np.random.default_rng(0)
    cause = np.repeat(np.arange(6.0), 12)
    frame = pd.DataFrame({"h0": cause, "h1": np.tile(np.arange(12), 6)})
    frame["m"], frame["error_gap"] = (cause + rng.normal(size=72) for _ in range(2))
    tau, found = details(frame)
    assert tau.p is not None
    assert tau.p < 0.01
    assert found.partial["h0"].p is not None
    assert found.partial["h0"].p > 0.05


def test_controls_that_cannot_be_used_say_why() -> None:
    frame = grid(12).assign(kind=["a", "b", "c", "d"] * 12, same=1.0)
    frame["h0"] = frame["h0"].map({0: "w", 1: "x", 2: "y", 3: "z"})
    frame["copy"] = frame["m"]
    table = table_of(frame, ("h0", "h1"))
    found = (
        correlate(table, resamples=100, controls=["h0", "same", "copy"])
        .measures[0]
        .details["error_gap"]
        .partial
    )
    assert found["h0"].reason == "text with 4 values has no order. See τ within its strata"
    assert "constant" in str(found["same"].reason)
    assert "have the same order" in str(found["copy"].reason)
    with pytest.raises(UsageError, match="did you mean 'train_ce'"):
        correlate(table, controls=["train_c"])


# ---- comparison


def test_holm_by_hand() -> None:
    assert holm([0.01, 0.04, None, 0.03]) == pytest.approx([0.03, 0.06, None, 0.06])
    assert holm([0.6, 0.7]) == [1.0, 1.0]


def test_differences_between_measures() -> None:
    frame = grid(13, levels=(6, 5), seeds=2)
    frame["good"] = frame["error_gap"] + 0.01 * np.random.default_rng(0).normal(size=60)
    frame["monotone"] = np.exp(frame["m"])
    frame.loc[:4, "monotone"] = np.nan
    table = table_of(frame, ("h0", "h1"), ("m", "good", "monotone"))
    found = {
        (each.first, each.second): each for each in correlate(table, resamples=400).comparisons["error_gap"]
    }
    better = found["m", "good"]
    taus = [stats.kendalltau(frame[name], frame["error_gap"]).statistic for name in ("m", "good")]
    assert better.difference.value == pytest.approx(taus[0] - taus[1])
    assert better.p_holm is not None
    assert better.difference.p is not None
    adjusted = holm([each.difference.p for each in found.values()])
    assert [each.p_holm for each in found.values()] == adjusted
    assert better.p_holm < 0.05
    same = found["m", "monotone"].difference
    assert (same.value, same.n, same.p) == (0, 55, None)
    assert "order the runs alike" in str(same.p_reason)
    part = frame.iloc[5:]
    some = [stats.kendalltau(part[name], part["error_gap"]).statistic for name in ("good", "monotone")]
    assert found["good", "monotone"].difference.value == pytest.approx(some[0] - some[1])


# ---- prediction and selection


def test_the_direction_of_a_prediction_is_that_of_the_other_runs_alone() -> None:
    for seed in range(30):
        rng = np.random.default_rng(seed)
        x, y, setting = rng.normal(size=10), rng.normal(size=10), np.arange(10) // 2
        found = prediction(sample_of(x, y, np.arange(10), setting), Draws(0, 100))
        errors: list[float] = []
        for each in range(5):
            out, rest = setting == each, setting != each
            rising = bool(stats.spearmanr(x[rest], y[rest]).statistic >= 0)
            fit = IsotonicRegression(increasing=rising, out_of_bounds="clip").fit(x[rest], y[rest])
            errors += np.abs(fit.predict(x[out]) - y[out]).tolist()
        assert found.error == pytest.approx(np.mean(errors)), seed


@pytest.mark.parametrize("direction", [1, -1])
def test_prediction_equals_scikit_learns_isotonic_regression(direction: int) -> None:
    frame = grid(14, effect=2.0)
    frame["m"] = direction * frame["m"].round(1)
    _, found = details(frame)
    errors, baseline = [], []
    for _, out in frame.groupby(["h0", "h1"]):
        rest = frame.drop(index=out.index)
        fit = IsotonicRegression(increasing=direction > 0, out_of_bounds="clip").fit(
            rest["m"], rest["error_gap"]
        )
        errors += np.abs(fit.predict(out["m"]) - out["error_gap"]).tolist()
        baseline += np.abs(rest["error_gap"].mean() - out["error_gap"]).tolist()
    assert found.prediction is not None
    assert found.prediction.error == pytest.approx(np.mean(errors))
    assert found.prediction.error_mean == pytest.approx(np.mean(baseline))
    assert found.prediction.folds == 12
    assert found.prediction.skill is not None
    assert found.prediction.skill > 0


def test_regret_by_hand() -> None:
    frame = pd.DataFrame(
        {
            "m": [3.0, 1, 1, 4],
            "error_gap": [0.1, 0.3, 0.2, 0.4],
            "test_error": [0.1, 0.4, 0.2, 0.5],
            "h": range(4),
        }
    )
    found = details(frame, ("h",))[1].selection
    assert (found.run, found.n) == ("r1", 4)
    assert found.test_error == pytest.approx(0.3)  # two runs share the least measure
    assert found.regret == pytest.approx(0.2)
    assert found.regret_random == pytest.approx(0.3 - 0.1)
    assert details(frame.drop(columns=["test_error"]), ("h",))[1].selection.reason == "no test_error"


# ---- the whole


def nodes(value: Any) -> Iterator[Any]:
    """Every dataclass and number below ``value``."""
    if dataclasses.is_dataclass(value):
        yield value
        for each in dataclasses.fields(value):
            yield from nodes(getattr(value, each.name))
    elif isinstance(value, dict):
        for each in value.values():
            yield from nodes(each)
    elif isinstance(value, tuple | list):
        for each in value:
            yield from nodes(each)
    else:
        yield value


PRINCIPAL = {"Quantity": "value", "Correlation": "tau", "SignError": "mean", "Prediction": "error",
             "Selection": "regret", "ConditionalInformation": "value", "Conditioning": "least"}  # fmt: skip
ODD = {
    "two runs": grid(0).iloc[:2],
    "one setting": grid(0).iloc[:4],
    "two settings": grid(0).iloc[:8],
    "four settings": grid(0).iloc[:16],
    "settings of one run": grid(0, seeds=1),
    "uneven": grid(0).drop(index=[0, 4, 5, 12, 13, 14]),
    "constant measure": grid(0).assign(m=1.0),
    "constant gap": grid(0).assign(error_gap=0.5),
    "no value": grid(0).assign(m=np.nan),
    "half missing": grid(0).assign(m=lambda frame: frame["m"].where(frame.index % 2 == 0)),
    "perfect": grid(0).assign(m=lambda frame: frame["error_gap"] ** 3),
    "reversed": grid(0, seeds=1).assign(m=np.arange(12.0), error_gap=-np.arange(12.0)),
    "unset hyperparameter": grid(0).assign(
        h0=lambda frame: frame["h0"].astype(object).where(frame["h0"] > 0, None)
    ),
    "constant hyperparameters": grid(0).assign(h0=1, h1=1),
    "test errors unknown": grid(0).assign(test_error=np.nan, num_test=np.nan),
    "only two values": grid(0).assign(
        m=lambda frame: (frame["m"] > 0).astype(float), error_gap=lambda f: f["h1"] > 0
    ),
}


@pytest.mark.parametrize("frame", ODD.values(), ids=ODD.keys())
def test_whatever_is_undefined_says_why(frame: pd.DataFrame) -> None:
    frame = frame.reset_index(drop=True).assign(other=lambda frame: np.arange(len(frame)) % 5 * 1.0)
    frame["error_gap"] = frame["error_gap"].astype(float)
    table = table_of(frame, ("h0", "h1"), ("m", "other"))
    result = correlate(table, group_by=["h1"], resamples=100)
    seen = set()
    for node in nodes(result):
        if isinstance(node, float):
            assert math.isfinite(node)
        assert not isinstance(node, np.generic), "JSON has no numpy numbers"
        kind = type(node).__name__
        if kind in PRINCIPAL:
            seen.add(kind)
            assert (getattr(node, PRINCIPAL[kind]) is None) == (node.reason is not None), node
        if kind in ("Quantity", "Correlation"):
            assert (node.low is None) == (node.high is None)
            defined = node.reason is None
            has_interval = kind == "Correlation" or node.interval_reason is not None
            if defined and node.low is None and has_interval:
                assert node.interval_reason
        if kind == "Correlation" and node.reason is None and node.p is None:
            assert node.p_reason
    assert seen == set(PRINCIPAL)


def test_what_is_skipped_is_absent() -> None:
    table = table_of(grid(0), ("h0", "h1"))
    result = correlate(table, resamples=100, skip=["conditional", "prediction", "comparisons"])
    found = result.measures[0].details["error_gap"]
    assert (found.conditioning, found.prediction, result.comparisons) == (None, None, {})
    assert correlate(table, resamples=100, skip=["details"]).measures[0].details == {}
    with pytest.raises(UsageError, match="did you mean 'prediction'"):
        correlate(table, skip=["predictions"])
    with pytest.raises(UsageError, match="50 resamples"):
        correlate(table, resamples=50)


@pytest.mark.parametrize(
    ("frame", "hyper", "note"),
    [
        (grid(0), (), "no hyperparameter is known"),
        (grid(0).assign(h0=1, h1=1), ("h0", "h1"), "all runs have the same setting"),
        (grid(0, seeds=1), ("h0", "h1"), "no setting has two runs (12 settings with one run each)"),
        (grid(0).drop(index=[0, 1, 2]), ("h0", "h1"), "1 of 12 settings have a single run"),
    ],
)
def test_notes_on_the_design(frame: pd.DataFrame, hyper: tuple[str, ...], note: str) -> None:
    result: SweepStatistics = correlate(table_of(frame.reset_index(drop=True), hyper), resamples=100)
    assert result.notes[0].startswith(note)


def test_a_seed_is_no_hyperparameter_even_when_grouped_by() -> None:
    frame = grid(0).assign(seed=lambda frame: np.arange(len(frame)) % 4)
    result = correlate(table_of(frame, ("h0", "h1", "seed")), group_by=["seed"], resamples=100)
    assert (result.num_settings, result.largest_setting) == (12, 4)
    assert list(result.measures[0].subgroups) == ["seed=0", "seed=1", "seed=2", "seed=3"]


def test_large_tables_say_what_they_take_smaller(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gm_probe.analysis.sample.MOST_DRAWS", 3000)
    monkeypatch.setattr("gm_probe.analysis.prediction.MOST_FOLDS", 5)
    monkeypatch.setattr("gm_probe.analysis.conditional.RUNS_TIMES_PERMUTATIONS", 2400)
    for module in (permutation, correlation):
        monkeypatch.setattr(module, "EXACT_RUNS", 20)
    for module in (pair_sums, correlation):
        monkeypatch.setattr(module, "EXACT_SETTINGS", 10)
    result = correlate(table_of(grid(0), ("h0", "h1")), resamples=500)
    assert set(result.notes) == {
        "250 bootstrap resamples instead of 500 for 12 settings",
        "more than 20 runs, so permutations use Spearman's ρ instead of τ",
        "more than 10 settings, so bootstrap resamples use τ's first-order term",
        "200 permutations instead of 500 for 48 values",
        "250 permutations instead of 500 for 12 values",
        "50 permutations for conditional information for 48 runs",
        "predictions leave out 12 settings in 5 groups",
    }
    tau = result.measures[0].gaps["error_gap"]
    assert (tau.num_resamples, tau.num_permutations) == (250, 200)


def test_too_many_runs_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(correlation, "MOST_RUNS", 40)
    with pytest.raises(ResourceError, match="48 runs; the pairs of more than 40"):
        correlate(table_of(grid(0)))
