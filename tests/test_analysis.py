"""The run table, Kendall's τ-b and the scatter panels, on run folders and files made by hand."""

import itertools
import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gm_probe.analysis.coefficients import kendall
from gm_probe.analysis.correlation import correlate
from gm_probe.analysis.design import group_rows
from gm_probe.errors import DataError, UsageError
from gm_probe.files.atomic import write_json, write_toml
from gm_probe.tables.collect import write_table
from gm_probe.tables.runs import load_table
from gm_probe.tables.table import Exclusion, RunTable, by_reason, show


def make_run(
    path: Path,
    *,
    config: dict[str, Any] | None = None,
    status: str | None = "finished",
    measures: dict[str, Any] | None = None,
    settings: dict[str, Any] | None = None,
    **gaps: Any,
) -> None:
    write_toml(path / "config.toml", {"environment": {"torch": "2.14", "host": path.name}, **(config or {})})
    if status is not None:
        write_json(path / "summary.json", {"status": status, **gaps})
    if measures is not None:
        write_json(path / "measures.json", {"measures": measures, "settings": settings or {}})


def make_csv(folder: Path, text: str) -> Path:
    path = folder / "table.csv"
    path.write_text(text, encoding="utf-8")
    return path


def brute_tau(x: list[float], y: list[float]) -> float | None:
    """τ-b from its definition, one pair at a time."""
    score = free_x = free_y = 0
    for i, j in itertools.combinations(range(len(x)), 2):
        sign_x, sign_y = (x[i] > x[j]) - (x[i] < x[j]), (y[i] > y[j]) - (y[i] < y[j])
        score += sign_x * sign_y
        free_x += sign_x != 0
        free_y += sign_y != 0
    return score / math.sqrt(free_x * free_y) if free_x and free_y else None


# ---- τ-b


@given(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), max_size=25))
def test_tau_equals_a_loop_over_all_pairs_with_ties(pairs: list[tuple[int, int]]) -> None:
    x, y = [float(a) for a, _ in pairs], [float(b) for _, b in pairs]
    found = kendall(np.array(x), np.array(y)).value
    assert found == (None if (expected := brute_tau(x, y)) is None else pytest.approx(expected, abs=1e-12))


# ---- run folders


def sweep(root: Path) -> None:
    """Four usable runs and one of each kind that is not."""
    for i in range(4):
        make_run(
            root / f"run-{i}",
            config={"lr": 0.1 * (i % 2 + 1), "epochs": 3, "seed": i, "out": f"runs/{i}", "device": "cpu"},
            measures={
                "fisher_trace": {"value": float(i), "converged": i != 2},
                "local_inconsistency": {"value": None, "reason": "no example"}
                if i == 3
                else {"value": 2.0 * i},
            },
            error_gap=0.1 * i,
            ce_gap=None if i == 0 else 1.0 * i,
        )
    make_run(root / "boom", status="diverged")
    make_run(root / "broken-machine", status="failed")
    make_run(root / "midway", status=None)
    make_run(root / "bare", error_gap=0.1, ce_gap=0.2)
    make_run(root / "torn", measures={"fisher_trace": {"value": 1.0}}, error_gap=0.1)
    (root / "torn" / "measures.json").write_text('{"measures": {"fish')


def test_every_run_folder_is_included_or_excluded_with_its_reason(tmp_path: Path) -> None:
    sweep(tmp_path)
    table = load_table(tmp_path)
    assert table.num_runs + len(table.excluded) == 9
    reasons = {exclusion.run: exclusion.reason for exclusion in table.excluded}
    assert reasons.pop("torn").endswith(
        "is not valid JSON: Unterminated string starting at: line 1 column 15 (char 14); remove it and measure again"
    )
    assert reasons == {
        "boom": "diverged",
        "broken-machine": "failed",
        "midway": "unfinished",
        "bare": "not measured",
    }
    assert table.frame["run"].to_list() == ["run-0", "run-1", "run-2", "run-3"]
    assert table.measures == ("local_inconsistency", "fisher_trace")
    assert table.gaps == ("error_gap", "ce_gap")


def test_hyperparameters_are_the_settings_that_vary(tmp_path: Path) -> None:
    sweep(tmp_path)
    table = load_table(tmp_path)
    assert table.hyperparameters == ("lr",)
    assert table.frame["lr"].to_list() == [0.1, 0.2, 0.1, 0.2]
    assert load_table(tmp_path, hyperparameters=["epochs"]).hyperparameters == ("epochs",)
    assert load_table(tmp_path, group_by=["seed"]).hyperparameters == ("lr", "seed")


def test_missing_values_keep_their_reasons(tmp_path: Path) -> None:
    sweep(tmp_path)
    table = load_table(tmp_path)
    assert table.missing["local_inconsistency"] == {3: "no example"}
    assert table.missing["ce_gap"] == {0: "no ce_gap in summary.json"}
    assert table.unconverged["fisher_trace"] == {2}
    found = correlate(table)
    assert "fisher_trace: 1 of 4 not converged (kept)" in found.notes
    assert "local_inconsistency: 1 of 4 left out: no example" in found.notes
    assert found.get("local_inconsistency", "ce_gap").n == 2
    assert found.get("fisher_trace", "ce_gap").n == 3


def test_measure_rows_without_a_value_are_missing_with_a_reason(tmp_path: Path) -> None:
    make_run(tmp_path / "a", measures={"m": {"value": None}}, error_gap=0.1)
    make_run(tmp_path / "b", measures={"m": {"value": 1}}, error_gap=0.1)
    assert load_table(tmp_path).missing["m"] == {0: "no value and no reason recorded"}


@pytest.mark.parametrize("row", [{"value": "3"}, {"value": True}, [1, 2], {"value": 10**400}])
def test_runs_whose_measures_are_ill_typed_are_left_out_by_name(tmp_path: Path, row: Any) -> None:
    make_run(tmp_path / "a", measures={"m": row}, error_gap=0.1)
    make_run(tmp_path / "b", measures={"m": {"value": 1}}, error_gap=0.1)
    table = load_table(tmp_path)
    (left_out,) = table.excluded
    assert (left_out.run, table.num_runs) == ("a", 1)
    assert "measures.json: measures.m" in left_out.reason


def test_infinite_values_and_unmeasured_names_are_missing(tmp_path: Path) -> None:
    make_run(tmp_path / "a", measures={"m": {"value": 1}}, error_gap=0.1)
    (tmp_path / "a" / "measures.json").write_text('{"measures": {"m": {"value": Infinity}}}')
    make_run(tmp_path / "b", measures={"k": {"value": 1}}, error_gap=0.1)
    assert load_table(tmp_path).missing["m"] == {0: "not finite", 1: "not measured"}


def test_values_too_large_to_square_and_names_that_steer_a_terminal_are_listed(tmp_path: Path) -> None:
    for name, value in (("a", 1), ("b", 1e200), ("c", -1e200), ("x\x1b[2Jy", 2)):
        make_run(
            tmp_path / name,
            config={"big": 1e200 * len(name), "note": f"\x07{name}"},
            measures={"m": {"value": value, "grid": [{"rho": 0.1, "k_steps": 1, "value": value}]}},
            error_gap=0.1,
        )
    table = load_table(tmp_path)
    assert table.missing["m"] == {1: "beyond 1e150 in size", 2: "beyond 1e150 in size"}
    (left_out,) = table.excluded
    assert left_out == Exclusion(r"x\x1b[2Jy", "its name has unprintable characters")
    assert [show(value) for value in table.frame["note"]] == [r"\x07a", r"\x07b", r"\x07c"]
    assert show("naïve 测度 👩‍👧") == "naïve 测度 👩‍👧"


def test_runs_measured_with_different_settings_are_not_comparable(tmp_path: Path) -> None:
    paper, given = {"value": 1.0, "protocol": "paper"}, {"value": 1.0, "labels": "given"}
    plain = {"local_inconsistency": paper, "fisher_trace": {"value": 1}, "hessian_trace": given}
    base = {"rho": 0.1, "k_steps": 1, "dtype": "float32", "seed": 0}
    changes: list[tuple[dict[str, Any], dict[str, Any]]] = [
        ({}, {}),
        ({"max_examples": None, "seed": 1}, {}),  # makes no difference
        ({"rho": 0.2}, {"local_inconsistency": {"value": 1.0, "protocol": "converged"}}),
        ({"rho": 0.2, "dtype": "float64"}, {"fisher_trace": {"value": None}}),
        ({}, {"hessian_trace": {"value": 1.0, "labels": "predicted"}}),
    ]
    for i, (settings, rows) in enumerate(changes):
        make_run(tmp_path / str(i), measures=plain | rows, settings=base | settings, error_gap=0.1 * i)
    warnings = correlate(load_table(tmp_path)).warnings
    dtype = "dtype differs between runs (float32 × 4, float64 × 1), so they are not comparable"
    assert warnings == {
        "local_inconsistency": (
            "rho differs between runs (0.1 × 3, 0.2 × 2), so they are not comparable",
            dtype,
            "protocol differs between runs (paper × 4, converged × 1), so they are not comparable",
        ),
        "fisher_trace": (),  # the run of another dtype has no value here
        "hessian_trace": (
            dtype,
            "labels differs between runs (given × 4, predicted × 1), so they are not comparable",
        ),
    }


@pytest.mark.parametrize(
    ("measure", "settings", "one", "other"),
    [
        ("average_inconsistency", "rho", 0.1, 0.5),
        ("local_inconsistency_adaptive", "eta", 0.01, 1.0),
        ("local_inconsistency_batchwise", "sub_batch", 128, 32),
        ("fisher_trace", "params", "", "weight"),
        ("fisher_trace", "mean", [0.3], []),
        ("mean_entropy", "temperature", 0.5, 0.1),
        ("mean_entropy", "data_sha256", "a", "b"),
    ],
)
def test_whatever_a_measure_depends_on_makes_runs_not_comparable(
    tmp_path: Path, measure: str, settings: str, one: object, other: object
) -> None:
    for i, value in enumerate([one, one, one, other]):
        base = {"rho": 0.1, "dtype": "float32", "eta": 0.01, settings: value}
        make_run(tmp_path / str(i), measures={measure: {"value": 1.0 + i}}, settings=base, error_gap=0.1 * i)
    [warning] = correlate(load_table(tmp_path)).warnings[measure]
    assert warning.startswith("normalized" if settings == "mean" else settings)


def test_a_long_list_of_differing_settings_is_cut(tmp_path: Path) -> None:
    for i in range(8):
        make_run(
            tmp_path / str(i), measures={"m": {"value": 1}}, settings={"data": f"d{min(i, 6)}"}, error_gap=0.1
        )
    found = correlate(load_table(tmp_path))
    shown = "d6 × 2, d0 × 1, d1 × 1, d2 × 1, d3 × 1 and 2 more"
    assert found.warnings == {"m": (f"data differs between runs ({shown}), so they are not comparable",)}


@pytest.mark.parametrize(
    ("kinds", "labels"),
    [
        (["predicted", "predicted"], {"hessian_trace": "predicted"}),
        (["given", "given"], {"hessian_trace": "given"}),
        (["given", "predicted"], {"hessian_trace": "mixed"}),
        (["given", None], {"hessian_trace": "mixed"}),
        ([None, None], {}),
    ],
)
def test_labels_of_a_measure(tmp_path: Path, kinds: list[str | None], labels: dict[str, str]) -> None:
    for i, kind in enumerate(kinds):
        row = {"value": 1.0} | ({"labels": kind} if kind else {})
        make_run(tmp_path / str(i), measures={"hessian_trace": row, "m": {"value": 1.0}}, error_gap=0.1)
    assert load_table(tmp_path).labels == labels


def test_outcomes_are_read_unless_they_are_settings(tmp_path: Path) -> None:
    for i in range(2):
        make_run(
            tmp_path / str(i),
            config={"num_train": 100 * (i + 1)},
            measures={"m": {"value": 1.0}},
            error_gap=0.1,
            test_error=0.2 + i,
            train_ce=None if i else 0.5,
            num_train=7,
            num_test=8,
        )
    table = load_table(tmp_path)
    assert (table.outcomes, table.hyperparameters) == (("test_error", "train_ce", "num_test"), ("num_train",))
    assert table.frame["test_error"].to_list() == [0.2, 1.2]
    assert table.frame["num_train"].to_list() == [100, 200]
    assert math.isnan(table.frame["train_ce"][1])


def test_nested_settings_and_unset_ones(tmp_path: Path) -> None:
    measures = {"m": {"value": 1.0}}
    make_run(tmp_path / "a", config={"sgd": {"lr": 1}, "clip": True}, measures=measures, error_gap=0.1)
    make_run(tmp_path / "b", config={"sgd": {"lr": 2.0}}, measures=measures, error_gap=0.2)
    table = load_table(tmp_path)
    assert set(table.hyperparameters) == {"sgd.lr", "clip"}
    assert list(group_rows(table, ["clip", "sgd.lr"])) == ["clip=true, sgd.lr=1", "clip=unset, sgd.lr=2"]


def test_no_usable_run_folder_counts_the_reasons(tmp_path: Path) -> None:
    for name in "ab":
        make_run(tmp_path / name, status="diverged")
    make_run(tmp_path / "c", error_gap=0.1)
    with pytest.raises(DataError, match=r"2 × diverged; 1 × not measured"):
        load_table(tmp_path)


def test_no_gap_in_any_summary(tmp_path: Path) -> None:
    make_run(tmp_path / "a", measures={"m": {"value": 1}})
    with pytest.raises(DataError, match="error_gap or ce_gap"):
        load_table(tmp_path)


def test_a_setting_and_a_measure_of_one_name(tmp_path: Path) -> None:
    for i in range(2):
        make_run(tmp_path / str(i), config={"rho": i}, measures={"rho": {"value": i}}, error_gap=0.1)
    with pytest.raises(DataError, match="2 × its measure rho has the same name as a setting"):
        load_table(tmp_path)
    for i in range(2, 5):  # the fewer are left out
        make_run(tmp_path / str(i), config={"rho": i}, measures={"m": {"value": i}}, error_gap=0.1)
    table = load_table(tmp_path)
    assert (table.num_runs, table.measures, table.hyperparameters) == (3, ("m",), ("rho",))


# ---- statistics of a table


def simpson(folder: Path) -> RunTable:
    """τ is −1 within each weight decay and positive over all: the groups' means rise together."""
    rows = [f"{group + 0.1 * i},{group - 0.01 * i},{group}" for group in (1, 2, 3) for i in range(3)]
    path = make_csv(folder, "m,error_gap,weight_decay\n" + "\n".join(rows))
    return load_table(path)


def test_subgroups_can_differ_in_sign_from_the_whole(tmp_path: Path) -> None:
    found = correlate(simpson(tmp_path), group_by=["weight_decay"])
    # 9 runs: 27 pairs between groups concordant, 3 × 3 within discordant
    whole, *subgroups = found.of("m", "error_gap", "tau").values()
    assert whole.value == pytest.approx((27 - 9) / 36)
    assert list(found.of("m", "error_gap", "tau"))[1:] == [
        "weight_decay=1",
        "weight_decay=2",
        "weight_decay=3",
    ]
    for subgroup in subgroups:
        assert subgroup.value == pytest.approx(-1)
        assert subgroup.n == 3
    assert found.get("m", "error_gap", "tau_within", "weight_decay").value == pytest.approx(-1)


def test_subgroups_part_the_runs(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    frame = pd.DataFrame({"m": rng.normal(size=60), "error_gap": rng.normal(size=60)})
    frame["lr"], frame["batch_size"] = rng.integers(0, 3, 60), rng.integers(0, 2, 60)
    frame.loc[::7, "m"] = np.nan
    frame.to_csv(tmp_path / "t.csv", index=False)
    table = load_table(tmp_path / "t.csv")
    taus = correlate(table, group_by=["lr", "batch_size"]).of("m", "error_gap", "tau")
    assert sum(of.n for group, of in taus.items() if group) == taus[""].n == 51
    for label, rows in group_rows(table, ["lr", "batch_size"]).items():
        part = frame.iloc[rows].dropna()
        expected = brute_tau(part["m"].to_list(), part["error_gap"].to_list())
        assert taus[label].value == pytest.approx(expected)


def test_by_reason_puts_the_commonest_first() -> None:
    found = by_reason([Exclusion("a", "failed"), Exclusion("b", "diverged"), Exclusion("c", "diverged")])
    assert list(found.items()) == [("diverged", ["b", "c"]), ("failed", ["a"])]


def test_runs_that_missed_their_stop_ce_are_noted_or_left_out_on_request(tmp_path: Path) -> None:
    for index, met in enumerate([True, True, False, None]):
        measures = {"fisher_trace": {"value": float(index), "converged": True}}
        make_run(tmp_path / str(index), measures=measures, error_gap=0.1 * index, met_stop_ce=met)
    kept = load_table(tmp_path)
    assert kept.num_runs == 4
    assert any("1 of 4 runs ended before" in note for note in kept.notes)
    strict = load_table(tmp_path, converged_only=True)
    assert strict.frame["run"].to_list() == ["0", "1", "3"]
    assert strict.excluded == (Exclusion("2", "ended before reaching its stop_ce"),)


def test_a_collected_table_says_which_runs_finished_and_converged(tmp_path: Path) -> None:
    """The statistics of the table are those of the folder."""
    for index, met in enumerate([True, True, False, None]):
        measures = {"fisher_trace": {"value": float(index), "converged": True}}
        make_run(tmp_path / "runs" / str(index), measures=measures, error_gap=0.1 * index, met_stop_ce=met)
    make_run(tmp_path / "runs" / "lost", status="diverged")
    write_table(tmp_path / "runs", tmp_path / "runs.csv")
    for converged_only in (False, True):
        folder, file = (
            load_table(tmp_path / name, converged_only=converged_only) for name in ("runs", "runs.csv")
        )
        assert file.frame["run"].to_list() == folder.frame["run"].to_list()
        assert by_reason(file.excluded) == by_reason(folder.excluded)
        assert ("diverged", ["lost"]) in by_reason(file.excluded).items()
        assert any("1 of 4 runs ended before" in note for note in file.notes) != converged_only


def test_what_a_file_does_not_say_of_its_runs_is_an_error_or_is_not_guessed(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"no column met_stop_ce.*run folders"):
        load_table(make_csv(tmp_path, "error_gap,a\n1,2\n2,3\n"), converged_only=True)
    with pytest.raises(DataError, match=r"no run of .* is usable: ended before"):
        load_table(make_csv(tmp_path, "error_gap,a,met_stop_ce\n1,2,False\n2,3,False\n"), converged_only=True)
    numbers = load_table(
        make_csv(tmp_path, "error_gap,a,met_stop_ce\n1,2,0.0\n2,3,1.0\n3,4,\n"), converged_only=True
    )
    assert numbers.num_runs == 2
    foreign = load_table(make_csv(tmp_path, "error_gap,a,status\n1,2,good\n2,3,bad\n"))
    assert (foreign.num_runs, foreign.excluded) == (2, ())
    with pytest.raises(DataError, match="row 3 holds 'x'"):
        load_table(
            make_csv(tmp_path, "error_gap,fisher_trace,status\n1,2,failed\n1,2,finished\n2,x,finished\n")
        )


def test_every_measure_is_known_to_correlate() -> None:
    from gm_probe.measures.catalogue import MEASURES, PAIR_MEASURES
    from gm_probe.tables.table import KNOWN_MEASURES

    assert {*MEASURES, *PAIR_MEASURES} - {"error", "cross_entropy"} == set(KNOWN_MEASURES)
