"""The statistics of `correlate` against direct readings of their definitions, and what their intervals must do."""

from __future__ import annotations

from itertools import combinations, product
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy import stats

import gm_probe
from gm_probe.analysis.coefficients import granulated, kendall, linear_tau, tau_quantity
from gm_probe.analysis.conclusion import expected_sign, measures_alike
from gm_probe.analysis.conditional import conditional_information
from gm_probe.analysis.correlation import correlate
from gm_probe.analysis.definitions import direction_of
from gm_probe.analysis.design import design_of
from gm_probe.analysis.intervals import clusters_of, mean_interval, settings_spread, with_seeds
from gm_probe.analysis.permutation import permutation_p, permute_settings
from gm_probe.analysis.regret import regrets
from gm_probe.analysis.results import COLUMNS
from gm_probe.analysis.run_pairs import mid_ranks, pair_sums
from gm_probe.analysis.sign_error import sign_errors
from gm_probe.errors import UsageError
from gm_probe.tables.table import RunTable


def sign(a: float, b: float) -> int:
    return int(a > b) - int(a < b)


def sweep(seeds: int = 4, *, tied: bool = False, missing: int = 0, number: int = 0) -> RunTable:
    """A grid of 3 × 2 × 2 settings × ``seeds``; measure a follows the gap, b does not, c orders as a."""
    rng = np.random.default_rng(number)
    grid = np.array(list(product(range(3), range(2), range(2), range(seeds))))
    kept = np.sort(rng.permutation(len(grid))[missing:])
    grid = grid[kept]
    setting = grid[:, 0] * 4 + grid[:, 1] * 2 + grid[:, 2]
    quality = rng.normal(size=12)[setting] + 0.5 * rng.normal(size=len(grid))
    gap = quality + 0.3 * rng.normal(size=len(grid))
    a, b = quality + 0.3 * rng.normal(size=len(grid)), rng.normal(size=len(grid))
    if tied:
        gap, a, b = np.round(gap), np.round(a), np.round(b)
    frame = pd.DataFrame({"run": [f"r{i}" for i in range(len(grid))], "error_gap": gap, "a": a, "b": b})
    frame["c"] = np.exp(a)
    frame["test_error"] = 1 / (1 + np.exp(-gap))
    frame["seed"] = grid[:, 3]
    for place in range(3):
        frame[f"h{place}"] = grid[:, place]
    return RunTable(
        Path("sweep"),
        frame,
        ("error_gap",),
        ("a", "b", "c"),
        ("h0", "h1", "h2"),
        outcomes=("test_error",),
    )


# ---- sums over pairs, τ and what is made of it


@pytest.mark.parametrize("tied", [False, True])
def test_sums_over_pairs_are_those_of_a_loop(tied: bool) -> None:
    rng = np.random.default_rng(1)
    x, y = rng.normal(size=(2, 23))
    if tied:
        x, y = np.round(x), np.round(y)
    group = rng.integers(0, 4, 23)
    found = pair_sums(x, y, group)
    for i in range(23):
        others = [j for j in range(23) if j != i and group[j] == group[i]]
        assert found[0, i] == sum(sign(x[i], x[j]) * sign(y[i], y[j]) for j in others)
        assert found[1, i] == sum(x[i] != x[j] for j in others)
        assert found[2, i] == sum(y[i] != y[j] for j in others)


@pytest.mark.parametrize("tied", [False, True])
def test_tau_is_scipys(tied: bool) -> None:
    found = correlate(sweep(tied=tied), details=True)
    frame = found.runs.frame
    for name in ("a", "b"):
        expected = stats.kendalltau(frame[name], frame["error_gap"])
        assert found.get(name, "error_gap").value == pytest.approx(expected.statistic)
        assert found.get(name, "error_gap", "tau_naive").p == pytest.approx(expected.pvalue)
        rho = stats.spearmanr(frame[name], frame["error_gap"]).statistic
        assert found.get(name, "error_gap", "spearman").value == pytest.approx(rho)


def test_tau_within_a_group_counts_the_pairs_that_share_it() -> None:
    found = correlate(sweep(tied=True, missing=5))
    frame = found.runs.frame
    pairs = [
        (sign(p.a, q.a), sign(p.error_gap, q.error_gap))
        for p, q in combinations(frame.itertuples(), 2)
        if p.h0 == q.h0
    ]
    score = sum(x * y for x, y in pairs)
    expected = score / np.sqrt(sum(x != 0 for x, _ in pairs) * sum(y != 0 for _, y in pairs))
    assert found.get("a", "error_gap", "tau_within", "h0").value == pytest.approx(expected)


def test_partial_tau_is_kendalls_formula() -> None:
    found = correlate(sweep(), controls=["h1"])
    frame = found.runs.frame
    xy, xz, zy = (
        stats.kendalltau(frame[one], frame[other]).statistic
        for one, other in (("a", "error_gap"), ("a", "h1"), ("h1", "error_gap"))
    )
    expected = (xy - xz * zy) / np.sqrt((1 - xz**2) * (1 - zy**2))
    assert found.get("a", "error_gap", "tau_partial", "h1").value == pytest.approx(expected)


def test_influence_is_the_derivative_by_a_runs_weight() -> None:
    rng = np.random.default_rng(2)
    x, y = np.round(rng.normal(size=(2, 15)), 1)
    linear = linear_tau(x, y, np.arange(15))
    assert linear is not None

    def weighted(weight: np.ndarray) -> float:
        pairs = np.outer(weight, weight)
        sx, sy = np.sign(x[:, None] - x), np.sign(y[:, None] - y)
        return float((pairs * sx * sy).sum() / np.sqrt((pairs * sx**2).sum() * (pairs * sy**2).sum()))

    for i in range(15):
        step = np.zeros(15)
        step[i] = 1e-6
        slope = (weighted(1 + step) - weighted(1 - step)) / 2e-6
        assert linear.influence[i] == pytest.approx(slope, abs=1e-6)


# ---- granulated ψ


def direct_psi(frame: pd.DataFrame, name: str, hyper: str, others: list[str]) -> float:
    """Jiang et al. 2020: the mean over the choices of the other hyperparameters of τ over the values of ``hyper``."""
    taus = []
    for _, cell in frame.groupby(others):
        rows = list(cell.itertuples())
        scores = [
            sign(getattr(p, name), getattr(q, name)) * sign(p.error_gap, q.error_gap)
            for p, q in combinations(rows, 2)
            if getattr(p, hyper) != getattr(q, hyper)
        ]
        if scores:
            taus.append(sum(scores) / len(scores))
    return float(np.mean(taus))


@pytest.mark.parametrize(("seeds", "missing"), [(1, 0), (1, 3), (3, 7)])
def test_psi_is_the_papers_formula_with_two_valued_hyperparameters(seeds: int, missing: int) -> None:
    found = correlate(sweep(seeds, missing=missing))
    hypers = ["h0", "h1", "h2"]
    expected = {
        name: direct_psi(found.runs.frame, "a", name, [other for other in hypers if other != name])
        for name in hypers
    }
    psi = found.of("a", "error_gap", "psi")
    assert {name: of.value for name, of in psi.items()} == pytest.approx(expected)
    mean = found.get("a", "error_gap", "psi_mean").value
    assert mean == pytest.approx(np.mean(list(expected.values())))


def test_psi_says_where_no_two_runs_differ_in_one_hyperparameter() -> None:
    x = np.arange(3.0)
    cells = {"h": (np.arange(3), np.arange(3))}
    clusters = clusters_of(np.arange(3), None)
    psi, mean = granulated(x, x, cells, clusters)
    assert psi["h"].value is None
    assert "differ in h alone" in psi["h"].note
    assert mean.value is None


# ---- intervals


def test_independent_settings_have_the_variance_of_their_sums() -> None:
    sums = np.array([1.0, -2.0, 0.5, 0.5])
    assert settings_spread(sums, 4).variance == pytest.approx(4 / 2 * (sums**2).sum())
    assert settings_spread(sums, 4).freedom == 3


@pytest.mark.parametrize(("size", "num"), [(12, 1), (6, 2), (4, 3), (2, 6)])
def test_the_variance_of_a_mean_over_groups_is_that_of_the_groups(size: int, num: int) -> None:
    """The covariance of normal values is a mean over pairs, with a variance that is known."""
    rng = np.random.default_rng(7)
    x, y = rng.normal(size=(2, 4000, num, size))
    x, y = (each - each.mean(axis=2, keepdims=True) for each in (x, y))
    mean = (x * y).mean(axis=(1, 2))
    shares = (x * y + (x * y).mean(axis=2, keepdims=True) - 2 * mean[:, None, None]) / (num * size)
    found = [settings_spread(of.ravel(), num * size, num).variance for of in shares]
    assert np.mean(found) == pytest.approx(mean.var(), rel=0.1)


def balanced(num_settings: int, num_seeds: int) -> tuple[np.ndarray, np.ndarray]:
    setting, seed = np.indices((num_settings, num_seeds))
    return setting.ravel(), seed.ravel()


def test_seeds_that_bear_a_part_widen_the_interval_and_others_do_not() -> None:
    setting, seed = balanced(10, 5)
    rng = np.random.default_rng(3)
    own = rng.normal(size=50)
    clusters = clusters_of(setting, seed, own, own)
    settings = settings_spread(np.bincount(setting, own), 10)
    assert with_seeds(settings, own, clusters) == settings
    strong = own + 5 * np.array([-2.0, -1.0, 0.0, 1.0, 2.0])[seed]
    widened = with_seeds(settings, strong, clusters_of(setting, seed, strong, strong))
    assert widened.variance > 10 * settings.variance
    assert widened.freedom == pytest.approx(4, abs=0.5)


def test_run_variance_is_counted_once() -> None:
    """Over many draws without any effect of seeds the mean variance is that of independent runs."""
    setting, seed = balanced(12, 5)
    rng = np.random.default_rng(4)
    with_all, alone = [], []
    for _ in range(300):
        influence = rng.normal(size=60)
        influence -= influence.mean()
        settings = settings_spread(np.bincount(setting, influence), 12)
        alone.append(settings.variance)
        with_all.append(with_seeds(settings, influence, clusters_of(setting, seed)).variance)
    assert np.mean(alone) <= np.mean(with_all) < 2 * np.mean(alone)  # counted twice: 2.6


def test_two_shared_seeds_give_no_interval_and_say_so() -> None:
    tau = correlate(sweep(2)).get("a", "error_gap")
    assert tau.value is not None
    assert tau.low is None
    assert "share 2 seeds" in tau.note


def test_settings_without_partners_do_not_count_for_an_interval() -> None:
    x, setting = np.array([1.0, 2.0, 4.0, 3.0, 5.0, 6.0]), np.arange(6)
    linear = linear_tau(x, np.arange(6.0), setting, np.array([0, 0, 1, 1, 2, 3]))
    assert linear is not None
    found = tau_quantity(linear, clusters_of(setting, None))
    assert found.value == 0
    assert found.note == "no interval: 4 settings are paired; an interval needs 5"


def test_ranks_share_their_mean_as_scipys_do() -> None:
    values = np.round(np.random.default_rng(8).normal(size=40), 1)
    assert mid_ranks(values) == pytest.approx(stats.rankdata(values))


def test_seeds_of_its_own_need_no_more_than_settings() -> None:
    table = sweep(2)
    table.frame["seed"] = range(len(table.frame))
    assert correlate(table).get("a", "error_gap").low is not None


def test_a_setting_without_some_seeds_stays() -> None:
    found = correlate(sweep(4, missing=9)).get("a", "error_gap")
    assert found.low is not None
    assert found.n == 39


def test_p_is_the_intervals_own() -> None:
    """The interval excludes 0 exactly where p is below 5 %."""
    for number in range(8):
        found = correlate(sweep(number=number))
        for of in found.quantities.values():
            if of.low is not None and of.high is not None and of.p is not None:
                assert of.clear == (of.p < 0.05)
                assert of.low <= (of.value or 0) <= of.high


def test_intervals_cover_a_true_tau_of_0_with_shared_seeds() -> None:
    """A coarse check of what the calibration benchmark measures."""
    hits = []
    for number in range(200):
        rng = np.random.default_rng([5, number])
        setting, seed = balanced(12, 4)
        x, y = rng.normal(size=(2, 12))[:, setting] + 0.7 * rng.normal(size=(2, 4))[:, seed]
        found = kendall(x + 0.4 * rng.normal(size=48), y + 0.4 * rng.normal(size=48), setting, seed)
        assert found.low is not None
        assert found.high is not None
        hits.append(found.low <= 0 <= found.high)
    assert 0.89 < np.mean(hits) <= 1


@pytest.mark.parametrize("x", [[1.0, 1.0, 1.0], [1.0], []])
def test_an_undefined_tau_says_why(x: list[float]) -> None:
    found = kendall(np.array(x), np.arange(len(x), dtype=float))
    assert found.value is None
    assert found.note


def test_a_perfect_tau_has_no_interval() -> None:
    found = kendall(np.arange(9.0), np.arange(9.0))
    assert found.value == 1
    assert found.low is None
    assert "cannot be estimated" in found.note


def test_mean_interval_is_students() -> None:
    values = np.array([1.0, 2.0, 4.0, 7.0])
    expected = stats.ttest_1samp(values, 0).confidence_interval(0.9)
    assert mean_interval(values, 0.9) == pytest.approx((3.5, expected.low, expected.high))


# ---- permutations, information, sign errors


def test_permutations_move_whole_settings_with_the_same_seeds() -> None:
    setting, seed = np.array([0, 0, 1, 1, 2, 2]), np.array([0, 1, 0, 1, 0, 2])
    rows = permute_settings(clusters_of(setting, seed), np.random.default_rng(0))
    assert {tuple(row) for row in rows} == {(0, 1, 2, 3, 4, 5), (2, 3, 0, 1, 4, 5)}


def test_permutation_p_is_twice_the_smaller_tail() -> None:
    x, y = np.array([-1.0, 0.0, 1.0]), np.array([-1.0, 0.0, 1.0])
    rows = np.array([[1, 0, 2], [2, 1, 0], [0, 2, 1]])
    assert permutation_p(x, y, rows) == pytest.approx(2 * 1 / 4)
    assert permutation_p(x, y, rows[:0]) is None


def test_conditional_information_is_that_of_the_table_of_signs() -> None:
    table = sweep(tied=True)
    frame, values = table.frame, design_of(table).values
    found = conditional_information(frame["a"].to_numpy(), frame["error_gap"].to_numpy(), values)
    for given, value in found.items():
        total, weight = 0.0, 0
        groups = [frame] if not given else [part for _, part in frame.groupby(list(given))]
        for part in groups:
            signs = [
                (sign(p.a, q.a), sign(p.error_gap, q.error_gap))
                for p, q in product(part.itertuples(), repeat=2)
                if p.a != q.a and p.error_gap != q.error_gap
            ]
            if signs:
                joint = np.array([[signs.count((i, j)) for j in (-1, 1)] for i in (-1, 1)]) / len(signs)
                outer = np.outer(joint.sum(1), joint.sum(0))
                with np.errstate(divide="ignore", invalid="ignore"):
                    bits = np.nansum(joint * np.log2(joint / outer))
                total, weight = total + bits * len(signs), weight + len(signs)
        assert value == pytest.approx(total / weight)


def test_sign_errors_are_those_of_each_pair_of_settings() -> None:
    table = sweep(4)
    frame = table.frame
    x, y = frame["a"].to_numpy(), frame["error_gap"].to_numpy()
    errors, _ = sign_errors(x, y, None, design_of(table).cells)
    expected = []
    settings = dict(tuple(frame.groupby(["h0", "h1", "h2"])))
    for one, other in combinations(settings, 2):
        if sum(p != q for p, q in zip(one, other, strict=True)) == 1:
            pairs = list(product(settings[one].itertuples(), settings[other].itertuples()))
            wrong = [(1 - sign(p.a, q.a) * sign(p.error_gap, q.error_gap)) / 2 for p, q in pairs]
            expected.append(np.mean(wrong))
    assert sorted(errors) == pytest.approx(sorted(expected))


# ---- picking a run


def test_picking_uses_the_measures_direction() -> None:
    measure, error = np.array([0.1, 0.5, 0.9]), np.array([0.3, 0.2, 0.1])
    chance = ("regret_random", "")
    worse, better = (regrets(measure, error, direction) for direction in ("worse", "better"))
    assert {key: of.value for key, of in worse.items()} == pytest.approx(
        {("regret", "smallest"): 0.2, chance: 0.1}
    )
    assert {key: of.value for key, of in better.items()} == pytest.approx(
        {("regret", "largest"): 0.0, chance: 0.1}
    )
    unknown = regrets(measure, error, None)
    assert list(unknown) == [("regret", "smallest"), chance, ("regret", "largest")]


def test_a_measure_that_few_runs_have_is_compared_with_the_best_of_all_runs() -> None:
    error = np.array([0.1, 0.2, 0.3, 0.4, np.nan])
    all_runs = regrets(np.array([1, 2, 3, 4, 0.0]), error, "worse")
    two_runs = regrets(np.array([np.nan, np.nan, 3, 4, 0.0]), error, "worse")
    assert all_runs["regret", "smallest"].value == 0
    assert two_runs["regret", "smallest"].value == pytest.approx(0.2)
    for found in (all_runs, two_runs):
        assert found["regret_random", ""].value == pytest.approx(0.15), "one random run for all measures"


def test_confidence_is_better_when_larger() -> None:
    assert direction_of("mean_confidence") == "better"
    assert expected_sign("mean_confidence", "worse") == -1
    assert expected_sign("mean_confidence", "better") == 1
    assert expected_sign("local_inconsistency", "worse") == 1
    assert expected_sign("theirs", "worse") == expected_sign("mean_confidence", None) == 0
    assert direction_of("disagreement") == "worse"


# ---- the result


def test_the_table_is_tidy() -> None:
    found = gm_probe.correlate(sweep())
    table = found.table
    assert tuple(table.columns) == COLUMNS
    assert not table.duplicated(["measure", "target", "statistic", "group"]).any()
    assert set(table["measure"]) == {"a", "b", "c"}
    assert table["value"].dtype == float


def test_a_frame_gives_what_its_table_gives() -> None:
    table = sweep()
    frame = table.frame.drop(columns="test_error")  # the gaps are in other units
    found = gm_probe.correlate(frame, measures=["a"], hyperparameters=["h0", "h1", "h2"])
    expected = gm_probe.correlate(table)
    assert found.get("a", "error_gap") == expected.get("a", "error_gap")


def test_measures_that_order_the_runs_alike_are_shown_once() -> None:
    assert measures_alike(sweep()) == {"a": ("c",), "b": ()}


def test_measures_that_order_the_runs_in_reverse_are_alike_only_if_they_are_expected_to() -> None:
    runs = np.arange(9.0)
    frame = pd.DataFrame({"error_gap": runs, "fisher_trace": runs, "hessian_trace": -runs, "mean_confidence": -runs,
                          "mine": -runs})  # fmt: skip
    found = gm_probe.correlate(frame, details=False)
    assert found.alike == {"fisher_trace": ("mean_confidence",), "hessian_trace": ("mine",)}
    assert found.get("hessian_trace", "error_gap").value == -1


def test_targets_are_gaps_outcomes_and_accuracy() -> None:
    table = sweep()
    found = correlate(table, targets=["test_error", "test_accuracy"])
    error, accuracy = (found.get("a", name) for name in ("test_error", "test_accuracy"))
    assert error.value == pytest.approx(-(accuracy.value or 0))
    with pytest.raises(UsageError, match="no target 'a'"):
        correlate(table, targets=["a"])


@pytest.mark.parametrize(
    ("target", "worse"),
    [("train_accuracy - test_accuracy", True), ("1 - test_accuracy", True), ("top1", False), ("-top1", True)],
)
def test_what_is_better_in_a_target_is_read_from_its_columns(target: str, worse: bool) -> None:
    rng = np.random.default_rng(0)
    accuracy = rng.uniform(0.5, 0.9, 30)
    frame = pd.DataFrame({"fisher_trace": 1 - accuracy + rng.normal(0, 0.02, 30), "test_accuracy": accuracy,
                          "top1": accuracy, "train_accuracy": 0.95})  # fmt: skip
    frame = frame.drop(columns="top1" if "test" in target else ["test_accuracy", "train_accuracy"])
    found = gm_probe.correlate(frame, targets=(), gap=target, details=False)
    assert found.conclusion[0] == f"tr F follows the {target} in the expected direction."
    assert (found.get("fisher_trace", target).value or 0) * (1 if worse else -1) > 0.5
    regret = accuracy.max() - accuracy[frame["fisher_trace"].argmin()]
    outcome = "test_error" if "test" in target else target
    assert found.get("fisher_trace", outcome, "regret", "smallest").value == pytest.approx(regret)


def test_a_target_of_unknown_direction_is_expected_nowhere_and_picks_nothing() -> None:
    frame = pd.DataFrame({"fisher_trace": range(9), "theirs": [0, 2, 1, 4, 3, 6, 5, 8, 7]})
    found = gm_probe.correlate(frame, gap="theirs", details=False)
    assert found.conclusion == ("tr F rises with the theirs.",)


def test_picks_of_two_targets_are_not_compared() -> None:
    frame = pd.DataFrame({"fisher_trace": [1, 2, 3], "hessian_trace": [3, 2, 1], "error_gap": [0.1, 0.2, 0.3],
                          "ce_gap": [0.9, 0.8, 0.5]})  # fmt: skip
    said = gm_probe.correlate(frame, details=False).conclusion[-2:]
    assert said == (
        "The best pick is the smallest tr F: it costs 0.0 points of error gap over the best run, and a random run 10.0 "
        "points.",
        "The best pick is the smallest tr H: it costs 0 of CE gap over the best run, and a random run 0.233.",
    )


def test_a_setting_without_effect_is_told() -> None:
    """Plain SGD has no ρ, so a grid of methods and ρ has each of its runs more than once."""
    rng = np.random.default_rng(0)
    gap, sharp = rng.uniform(size=(2, 12))
    gap[6:9], sharp[6:9] = gap[:3], sharp[:3]
    frame = pd.DataFrame(
        {"error_gap": gap, "m": sharp, "rho": [0.1] * 6 + [0.2] * 6, "seed": [*range(6)] * 2}
    )
    frame.loc[[4, 5], ["error_gap", "m"]] = None  # nothing is known of these
    notes = [note for note in gm_probe.correlate(frame, details=False).notes if "repeat" in note]
    assert notes == [
        "3 runs repeat the values of another, such as row 7. Is one listed twice, or has a setting no effect?"
    ]


def test_a_gap_that_is_mostly_negative_is_told() -> None:
    frame = pd.DataFrame({"m": range(4), "error_gap": [-0.1, -0.2, -0.3, 0.1]})
    notes = gm_probe.correlate(frame, details=False).notes
    assert "error_gap is negative in 3 of 4 runs. It should be test error − train error" in notes


def test_the_conclusion_names_what_follows_and_what_cannot_be_told() -> None:
    said = " ".join(correlate(sweep()).conclusion)
    assert "a rises with the error gap." in said
    assert "Whether b follows the error gap cannot be decided." in said
    assert "The best pick is" in said


def test_the_conclusion_names_what_runs_against_the_gap_in_a_subgroup() -> None:
    rng = np.random.default_rng(0)
    size, place = np.repeat([0, 1], 36), np.tile(np.repeat(np.arange(12), 3), 2)
    gap = 20 * size + place + 0.5 * rng.normal(size=72)
    trace = 20 * size + np.where(size == 0, -place, place) + 0.5 * rng.normal(size=72)
    frame = pd.DataFrame({"run": [str(i) for i in range(72)], "error_gap": gap, "fisher_trace": trace})
    frame = frame.assign(size=size, place=place, seed=np.tile(np.arange(3), 24))
    table = RunTable(Path("s"), frame, ("error_gap",), ("fisher_trace",), ("size", "place"))
    said = correlate(table, group_by=["size"]).conclusion
    assert said[:2] == (
        "tr F follows the error gap in the expected direction.",
        "Among the runs with size=0, tr F runs against the error gap.",
    )


def test_simpsons_paradox_is_noted() -> None:
    rng = np.random.default_rng(6)
    group, place = np.repeat([0, 1], 12), np.tile(np.arange(12), 2)
    gap = 20 * group + place + 3 * rng.normal(size=24)
    measure = 20 * group - place + 3 * rng.normal(size=24)
    frame = pd.DataFrame(
        {"run": [str(i) for i in range(24)], "error_gap": gap, "m": measure, "h": group, "k": place}
    )
    table = RunTable(Path("s"), frame, ("error_gap",), ("m",), ("h", "k"))
    found = correlate(table)
    assert "Simpson" in found.get("m", "error_gap", "tau_within", "h").note
    assert any("Simpson" in sentence for sentence in found.conclusion)
