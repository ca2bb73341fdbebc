"""Settings that share their seeds: the same weights to start from, the same batches. Intervals and p allow for it."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from gm_probe.analysis.correlation import correlate
from gm_probe.analysis.design import design_of
from gm_probe.analysis.intervals import (
    NO_SHARE,
    Share,
    fisher_interval,
    jackknife_error,
    jackknife_interval,
    seeds_share,
)
from gm_probe.analysis.pair_sums import pair_sums, tau_of
from gm_probe.analysis.permutation import permute_blocks, permute_within
from gm_probe.analysis.requests import PARTS
from gm_probe.analysis.results import SweepStatistics
from gm_probe.analysis.sample import sample_of
from gm_probe.files.atomic import write_json, write_toml
from gm_probe.tables.runs import load_table
from gm_probe.tables.table import RunTable


def crossed(
    rng: np.random.Generator, of: int, seeds: int, shares: tuple[float, float, float]
) -> pd.DataFrame:
    """Independent measure and gap, each of effects of setting, seed and run with these parts of the variance."""
    setting, seed = np.repeat(np.arange(of), seeds), np.tile(np.arange(seeds), of)
    frame = pd.DataFrame({"run": [f"r{i}" for i in range(of * seeds)], "h": setting, "seed": seed})
    for name in ("m", "error_gap"):
        effects = (rng.normal(size=of)[setting], rng.normal(size=seeds)[seed], rng.normal(size=of * seeds))
        frame[name] = sum(math.sqrt(part) * each for part, each in zip(shares, effects, strict=True))
    return frame


def table_of(frame: pd.DataFrame, measures: tuple[str, ...] = ("m",)) -> RunTable:
    return RunTable(Path("made"), frame.reset_index(drop=True), ("error_gap",), measures, ("h",))


def without_each(values: np.ndarray, group: np.ndarray) -> np.ndarray:
    return np.array([values[group != each].mean() for each in range(group.max() + 1)])


# ---- the share of seeds in a variance


def test_the_share_in_a_mean_is_that_of_the_analysis_of_variance() -> None:
    """Of a complete table, by the textbook's mean squares."""
    rng = np.random.default_rng(0)
    table = rng.normal(size=(7, 1)) + 2 * rng.normal(size=(1, 5)) + rng.normal(size=(7, 5))
    setting, seed = (each.ravel() for each in np.indices((7, 5)))
    values = table.ravel()
    share = seeds_share(values.mean(), without_each(values, np.arange(35)), setting, seed)
    by_seed, by_setting = table.mean(0), table.mean(1, keepdims=True)
    rest = table - by_seed - by_setting + table.mean()
    assert share.of_seeds == pytest.approx(by_seed.var(ddof=1) / 5)
    assert (share.num_seeds, share.freedom) == (5, 6 * 4)
    assert share.of_runs == pytest.approx((rest**2).sum() / 24 / 35)
    error, freedom = share.added_to(jackknife_error(without_each(values, setting)), 6)
    parts = np.array([by_setting.var(ddof=1) / 7, share.of_seeds, share.of_runs])
    variance = parts[0] + parts[1] - parts[2]
    assert error == pytest.approx(math.sqrt(variance))
    assert freedom == pytest.approx(variance**2 / (parts**2 / [6, 4, 24]).sum())


def test_where_runs_are_missing_the_rest_is_that_of_least_squares() -> None:
    rng = np.random.default_rng(1)
    setting, seed = (each.ravel()[rng.permutation(35)[:26]] for each in np.indices((7, 5)))
    values = rng.normal(size=26) + seed
    share = seeds_share(values.mean(), without_each(values, np.arange(26)), setting, seed)
    dummies = np.concatenate([np.eye(7)[setting], np.eye(5)[seed]], axis=1)
    rest = values - dummies @ np.linalg.lstsq(dummies, values, rcond=None)[0]
    assert np.linalg.matrix_rank(dummies) == 11
    assert share.freedom == 26 - 11
    assert share.of_runs == pytest.approx((rest**2).sum() / 15 / 26)


def test_what_settings_differ_by_is_no_share_of_their_seeds() -> None:
    """Two merged sweeps of seeds of their own, whose settings differ, and one run a setting."""
    rng = np.random.default_rng(2)
    setting = np.repeat(np.arange(12), 5)
    seed = np.tile(np.arange(5), 12) + 5 * (setting >= 6)
    values = 10.0 * (setting >= 6) + rng.normal(size=12)[setting] + rng.normal(size=60)
    share = seeds_share(values.mean(), without_each(values, np.arange(60)), setting, seed)
    assert share.of_seeds < 3 * share.of_runs  # both of the runs' own noise
    alone = seeds_share(values.mean(), without_each(values, np.arange(60)), np.arange(60), seed)
    assert alone.of_seeds == pytest.approx(0)


def test_degrees_of_freedom_do_not_fall_to_nothing() -> None:
    error, freedom = Share(0.0101, 5, 0.0100, 16).added_to(0.05, 4)
    assert error == pytest.approx(math.sqrt(0.0026))
    assert freedom == 4


def test_seeds_never_narrow_an_interval() -> None:
    less = Share(0.001, 5, 0.002, 20)
    assert less.added_to(0.1, 17) == (0.1, 17)
    without = np.array([0.4, 0.5, 0.6, 0.5, 0.5, 0.45])
    assert jackknife_interval(0.5, without, share=less) == jackknife_interval(0.5, without)
    more = Share(0.003, 5, 0.001, 20)
    assert jackknife_interval(0.5, without, share=more) == fisher_interval(
        0.5, *more.added_to(jackknife_error(without), 5)
    )


def test_no_share_where_no_seed_is_shared() -> None:
    values, rows = np.arange(6.0), np.arange(6)
    setting = np.array([0, 0, 1, 1, 2, 2])
    cases = {
        "shared": ([4, 7, 4, 7, 4, 7], [0, 1, 0, 1, 0, 1]),
        "nested": ([0, 1, 2, 3, 4, 5], None),
        "one seed": ([3, 3, 3, 3, 3, 3], None),
        "unknown": ([-1, -1, -1, -1, -1, -1], None),
        "partly": ([-1, 4, 4, 7, 7, 2], [-1, 0, 0, 1, 1, -1]),
        "one of them": ([-1, 4, 4, -1, 3, 2], None),
    }
    for name, (seed, expected) in cases.items():
        found = sample_of(values, values, rows, setting, np.array(seed)).seed
        assert (None if found is None else found.tolist()) == expected, name
    assert sample_of(values, values, rows, np.zeros(6), np.array([0, 1, 0, 1, 0, 1])).seed is None
    assert seeds_share(0.5, values, setting, None) == NO_SHARE


# ---- what is left out


def test_leaving_out_a_run_is_tau_without_it() -> None:
    rng = np.random.default_rng(2)
    x, y, setting = rng.normal(size=40).round(1), rng.normal(size=40).round(1), rng.integers(0, 7, 40)
    for between in (True, False):
        sums = pair_sums(x, y, setting, 7, between=between)
        taus, inside = tau_of(sums.leave_one_run_out()), sums.inside()
        for run in range(40):
            rest = np.arange(40) != run
            assert taus[run] == pytest.approx(stats.kendalltau(x[rest], y[rest]).statistic)
            others = [i for i in range(40) if i != run and setting[i] == setting[run]]
            score = sum(np.sign(x[run] - x[i]) * np.sign(y[run] - y[i]) for i in others)
            assert inside.of_run[0, run] == score
        assert inside.total.tolist() == sums.own.sum(1).tolist()


def test_seeds_change_places_alike_in_every_setting() -> None:
    setting = np.array([0, 1, 0, 1, 2, 2, 0, 1])
    seed = np.array([2, 0, 0, 1, 1, 0, 1, 2])  # setting 2 has no seed 2
    rows = permute_within(setting, 300, np.random.default_rng(0), seed)
    drawn = permute_within(setting, 4, np.random.default_rng(0), seed)  # fewer than there are
    assert len(drawn) == 4
    for row in (*rows, *drawn):
        assert sorted(row) == list(range(8))
        assert (setting[row] == setting).all()
        moves = [
            {int(seed[place]): int(seed[source]) for place, source in enumerate(row) if setting[place] == s}
            for s in range(3)
        ]
        assert moves[0] == moves[1]
        order = [moves[0][place] for place in range(3) if moves[0][place] != 2]  # that 0 and 1 now have
        assert [moves[2][0], moves[2][1]] == order
    assert len({tuple(row) for row in rows}) == len(rows) == 5  # every other order once


def test_permutations_of_settings_keep_runs_with_their_seed() -> None:
    rng = np.random.default_rng(3)
    setting, seed = (each.ravel() for each in np.indices((6, 5)))
    order = rng.permutation(30)
    setting, seed = setting[order], seed[order]
    found = permute_blocks(setting, 200, rng, seed=seed)
    assert found.limit is None
    assert all((seed[row] == seed).all() for row in found.rows)
    some = permute_blocks(setting[1:], 200, rng, seed=seed[1:])  # a setting lacks a seed: none is like it
    assert str(some.limit).startswith(
        "the permutation test exchanges only settings with the same seeds (1 with 4 runs, 5 with 5 runs)"
    )
    assert all((seed[1:][row] == seed[1:]).all() for row in some.rows)


def test_p_is_that_of_the_runs_whatever_their_order() -> None:
    """Measure and gap depend on the seed alone: no order of settings tells anything."""
    frame = crossed(np.random.default_rng(11), 10, 5, (0.0, 1.0, 0.0))
    frame["m"] = frame["error_gap"]
    shuffled = frame.sample(frac=1, random_state=0)
    for each in (frame, shuffled):
        found = correlate(table_of(each), resamples=300, skip=PARTS).measures[0].gaps["error_gap"]
        assert (found.tau, found.p) == (pytest.approx(1), 1)


# ---- what correlate says


def covered(seed_share: float, *, told: bool) -> float:
    """How often the interval of independent measure and gap holds 0, where seeds are ``told`` of or not."""
    rng, hits = np.random.default_rng(3), []
    for _ in range(150):
        frame = crossed(rng, 10, 6, (0.3, seed_share, 0.7 - seed_share))
        frame = frame if told else frame.drop(columns="seed")
        tau = correlate(table_of(frame), resamples=100, skip=PARTS).measures[0].gaps["error_gap"]
        assert tau.low is not None
        assert tau.high is not None
        hits.append(tau.low <= 0 <= tau.high)
    return float(np.mean(hits))


def test_the_interval_covers_where_seeds_matter_and_are_shared() -> None:
    """Binomial standard error at 95 %: 1.8 %."""
    assert covered(0.6, told=False) < 0.8
    assert covered(0.6, told=True) > 0.9


def test_the_interval_stays_as_it_was_where_seeds_do_not_matter() -> None:
    rng = np.random.default_rng(4)
    widths = []
    for _ in range(40):
        frame = crossed(rng, 12, 5, (0.8, 0.0, 0.2))
        whole, alone = (
            correlate(table_of(each), resamples=100, skip=PARTS).measures[0].gaps["error_gap"]
            for each in (frame, frame.drop(columns="seed"))
        )
        assert whole.tau == alone.tau
        widths.append(((whole.high or 0) - (whole.low or 0)) / ((alone.high or 0) - (alone.low or 0)))
    assert min(widths) >= 1
    assert np.median(widths) < 1.02


def test_within_tests_the_order_of_seeds() -> None:
    """Five seeds of one order in all settings are one observation of 120, not twelve settings of them."""
    rng = np.random.default_rng(5)
    frame = crossed(rng, 12, 5, (0.5, 0.5, 0.0))
    seeds = frame[frame["h"] == 0]
    tau = stats.kendalltau(seeds["m"], seeds["error_gap"]).statistic
    found, fooled = (
        correlate(table_of(each), resamples=1000).measures[0].details["error_gap"].within
        for each in (frame, frame.drop(columns="seed"))
    )
    assert found.value == fooled.value == pytest.approx(tau)
    every = [
        stats.kendalltau(seeds["m"], order).statistic for order in itertools.permutations(seeds["error_gap"])
    ]
    above, below = (np.array(every) >= tau - 1e-12).mean(), (np.array(every) <= tau + 1e-12).mean()
    assert found.p == pytest.approx(min(1, 2 * min(above, below)))
    assert fooled.p is not None
    assert fooled.p < 0.01
    assert found.p_reason == "120 arrangements of 5 seeds, so p is at least 0.017"
    assert fooled.p_reason is None


def test_difference_between_and_partial_allow_for_seeds() -> None:
    rng = np.random.default_rng(6)
    frame = crossed(rng, 10, 5, (0.2, 0.7, 0.1))
    frame["other"] = crossed(rng, 10, 5, (0.2, 0.7, 0.1))["m"]
    frame["train_ce"] = crossed(rng, 10, 5, (0.2, 0.7, 0.1))["m"]
    told, untold = (
        correlate(table_of(each, ("m", "other")), resamples=400)
        for each in (frame, frame.drop(columns="seed"))
    )

    def widths(of: SweepStatistics) -> list[float]:
        of_measure = of.measures[0].details["error_gap"]
        found = [of.comparisons["error_gap"][0].difference, of_measure.within, of_measure.partial["train_ce"]]
        return [(each.high or 0) - (each.low or 0) for each in (*found, of_measure.between)]

    *wide, between = widths(told)
    *narrow, between_untold = widths(untold)
    assert all(one > 1.5 * other for one, other in zip(wide, narrow, strict=True))
    assert between_untold <= between < 1.2 * between_untold  # a seed moves all means alike


def test_equal_measures_count_once_in_the_adjustment() -> None:
    frame = crossed(np.random.default_rng(7), 12, 3, (0.5, 0.0, 0.5))
    frame["other"] = crossed(np.random.default_rng(8), 12, 3, (0.5, 0.0, 0.5))["m"] + 2 * frame["error_gap"]
    frame["twin"] = frame["m"]
    found = correlate(table_of(frame, ("m", "other", "twin")), resamples=400).comparisons["error_gap"]
    by_pair = {(each.first, each.second): each for each in found}
    assert by_pair["m", "other"].p_holm == by_pair["m", "other"].difference.p  # the only one to adjust for
    assert by_pair["other", "twin"].p_holm == by_pair["m", "other"].p_holm
    assert by_pair["m", "twin"].p_holm is None


@pytest.mark.parametrize(
    ("seeds", "note"),
    [(1, "all runs have the same seed"), (2, "settings share 2 seeds, too few to estimate"), (5, None)],
)
def test_too_few_seeds_to_tell_are_said(seeds: int, note: str | None) -> None:
    frame = crossed(np.random.default_rng(9), 12, seeds, (0.4, 0.4, 0.2))
    told, untold = (correlate(table_of(each), resamples=100) for each in (frame, frame.drop(columns="seed")))
    assert [any(said.startswith(note or "settings share") for said in of.notes) for of in (told, untold)] == [
        note is not None,
        False,
    ]
    whole, alone = (of.measures[0].gaps["error_gap"] for of in (told, untold))
    assert (whole.low == alone.low) == (seeds < 5)
    within = told.measures[0].details["error_gap"].within
    if seeds == 2:
        assert within.low is None
        assert within.interval_reason == "2 seeds that settings share; an interval needs 5"
        assert within.p == 1  # they can only change places


def test_one_seed_that_comes_twice_is_not_the_one_of_all_runs() -> None:
    frame = crossed(np.random.default_rng(9), 12, 1, (1.0, 0.0, 0.0)).assign(seed=[0, 0, *range(1, 11)])
    notes = correlate(table_of(frame), resamples=100, skip=PARTS).notes
    assert not any("the same seed" in note or "share" in note for note in notes)
    same = correlate(table_of(frame.assign(seed=0)), resamples=100, skip=PARTS).notes
    assert any(note.startswith("all runs have the same seed") for note in same)


def test_seeds_of_their_own_are_not_shared() -> None:
    frame = crossed(np.random.default_rng(9), 12, 2, (0.4, 0.4, 0.2)).assign(seed=range(24))
    assert not any("seed" in note for note in correlate(table_of(frame), resamples=100, skip=PARTS).notes)


# ---- where seeds come from


def test_seeds_are_read_from_runs_and_files(tmp_path: Path) -> None:
    frame = crossed(np.random.default_rng(10), 6, 2, (0.5, 0.3, 0.2))
    for row in frame.to_dict("records"):
        folder = tmp_path / "runs" / row["run"]
        folder.mkdir(parents=True)
        write_toml(folder / "config.toml", {"lr": row["h"] / 10, "seed": row["seed"]})
        write_json(folder / "summary.json", {"status": "finished", "error_gap": row["error_gap"]})
        write_json(folder / "measures.json", {"settings": {}, "measures": {"m": {"value": row["m"]}}})
    frame.rename(columns={"h": "lr"}).to_csv(tmp_path / "runs.csv", index=False)
    for source in (tmp_path / "runs", tmp_path / "runs.csv"):
        table = load_table(source)
        assert table.hyperparameters == ("lr",)
        seed = design_of(table, (), ()).seed
        assert seed is not None
        order = np.argsort([int(name[1:]) for name in table.frame["run"]])
        assert len(set(zip(seed[order].tolist(), frame["seed"], strict=True))) == 2
    measured = load_table(tmp_path / "runs.csv", ["seed"])
    assert design_of(measured, (), ()).seed is None
