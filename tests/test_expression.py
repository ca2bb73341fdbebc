"""Arithmetic on columns: Python's own values, and one line for all that is none."""

from __future__ import annotations

import ast
import random
from pathlib import Path

import pandas as pd
import pytest

from gm_probe.errors import UsageError
from gm_probe.files.atomic import write_json, write_toml
from gm_probe.tables.expression import parse
from gm_probe.tables.numerals import Numbers, finite
from gm_probe.tables.runs import load_table

COLUMNS = {name: finite([1.5, -2.0, 4.0]) for name in ("a", "b")} | {
    "val/err": finite([0.3, 0.2, 0.1]),
    "train acc. (%)": finite([90.0, 80.0, 70.0]),
    "a-b": finite([7.0, 8.0, 9.0]),
    "2x": finite([2.0, 4.0, 8.0]),
}


def values(text: str) -> list[float]:
    return parse(text, COLUMNS).of(COLUMNS).values.tolist()


def test_a_larger_value_is_worse_or_better_as_its_columns_say() -> None:
    worse = [
        "val/err - train acc. (%)",
        "2 * val/err",
        "val/err / a",
        "(val/err - b) * 3",
        "a - b - -val/err",
    ]
    for text in worse:
        assert parse(text, COLUMNS).direction == "worse"
        assert parse(f"1 - ({text})", COLUMNS).direction == "better"
    assert parse("a - b", COLUMNS).direction is None
    known = {"val_acc": 0, "val_err": 0, "train_err": 0}
    assert parse("val_acc + val_err", known).direction is None, "they disagree"
    assert parse("train_err", known).direction == "worse"
    assert parse("train_err - val_acc", known).direction == "worse"


def test_values_are_pythons() -> None:
    rng = random.Random(0)
    for _ in range(200):
        text = "a"
        for _ in range(rng.randint(1, 6)):
            other = rng.choice(["a", "b", "2.5", "1e-3", ".5"])
            text = rng.choice(["{} + {}", "({} - {})", "{} * {}", "-{} + {}"]).format(
                *rng.sample([text, other], 2)
            )
        for row, (a, b) in enumerate(zip(COLUMNS["a"].values, COLUMNS["b"].values, strict=True)):
            assert values(text)[row] == pytest.approx(eval(text, {"a": a, "b": b}), rel=1e-11, abs=1e-11)  # noqa: S307


def test_names_may_be_odd_bare_or_quoted() -> None:
    assert values("1 - train acc. (%) / 100") == pytest.approx([0.1, 0.2, 0.3])
    assert values("`val/err` * 2") == values("[val/err]*2") == values("val/err * 2") == [0.6, 0.4, 0.2]
    assert values("a-b") == [7.0, 8.0, 9.0], "a column of that name"
    assert values("a - b") == [0.0, 0.0, 0.0], "a difference"
    assert values("`2x` / 2") == [1.0, 2.0, 4.0]
    assert values("2x") == [2.0, 4.0, 8.0], "the whole text is a column"
    assert values("--a") == [1.5, -2.0, 4.0]


def test_equal_differences_are_tied() -> None:
    columns = {"x": finite([0.3, 0.4, 1.1]), "y": finite([0.1, 0.2, 0.9])}
    assert len(set(parse("x - y", columns).of(columns).values)) == 1
    small = {"x": finite([3e-9, 4e-9]), "y": finite([1e-9, 2e-9])}
    assert parse("x - y", small).of(small).values.tolist() == [2e-9, 2e-9]
    assert parse("x / 1e9", small).of(small).values.tolist() == [3e-18, 4e-18], "quotients keep their digits"


def test_what_has_no_value_is_missing_for_its_reason() -> None:
    columns = {"x": finite([1.0, float("nan"), 3.0, float("inf")]), "y": finite([0.0, 1.0, 1.0, 1.0])}
    found = parse("x / y", columns).of(columns)
    assert found.missing == {0: "not finite", 1: "no value", 3: "not finite"}
    assert found.values.dropna().tolist() == [3.0]
    assert parse("x / 0", columns).of(columns).missing[2] == "not finite"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("val/er", "no column 'val'; did you mean 'val/err'"),
        ("a - bb", "no column 'bb'; did you mean 'b'"),
        ("[train acc] - a", "no column 'train acc'; did you mean 'train acc. (%)'"),
        ("__import__('os').system('x')", "no column '__import__'"),
        ("a - ", "is no arithmetic on columns"),
        ("a ** b", "is no arithmetic on columns"),
        ("a // b", "is no arithmetic on columns"),
        ("a(b)", "is no arithmetic on columns"),
        ("a b", "is no arithmetic on columns"),
        ("1 + 2", "is no arithmetic on columns"),
        ("", "is no arithmetic on columns"),
        ("a if b", "no column 'if'"),
        ("a; b", "no column ';'"),
        ("a > b", "no column '>'"),
        ("(" * 250 + "a" + ")" * 40, "is no arithmetic on columns"),
        ("a+" * 300 + "a", "601 characters, more than 300"),
    ],
)
def test_what_is_no_arithmetic_is_one_line(text: str, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse(text, COLUMNS)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_longest_expressions_have_a_value() -> None:
    assert values("a" + "+a" * 149)[0] == 225.0
    assert values("-" * 298 + "a")[0] == 1.5


def test_nothing_but_arithmetic_is_in_a_tree() -> None:
    kinds = {type(node) for node in ast.walk(parse("-(a + 2) * b / a - 1", COLUMNS).tree)}
    assert {kind.__name__ for kind in kinds} == {
        "BinOp", "UnaryOp", "Add", "Sub", "Mult", "Div", "USub", "Name", "Load", "Constant",
    }  # fmt: skip


def test_a_table_takes_it_for_its_gap() -> None:
    frame = pd.DataFrame({"metrics.val/err": [0.3, 0.5, None], "train_err": [0.1, 0.1, 0.1], "m": [1, 2, 3]})
    for text in ("val/err - train_err", "metrics.val/err - train_err", "val_error - train_error"):
        table = load_table(frame, gap=text)
        assert table.gaps == (text,)
        assert table.frame[text].dropna().tolist() == [0.2, 0.4]
        assert table.missing[text] == {2: "no value"}
        assert table.measures == ("m",)
    assert isinstance(parse("a", COLUMNS).of(COLUMNS), Numbers)


def test_run_folders_take_it_too(tmp_path: Path) -> None:
    for i in range(4):
        write_toml(tmp_path / f"r{i}" / "config.toml", {"lr": 0.1 * i, "trial": i % 2})
        summary = {"status": "finished", "error_gap": 0.1, "test_error": 0.3 + 0.1 * i, "train_error": 0.1}
        write_json(tmp_path / f"r{i}" / "summary.json", summary | ({} if i else {"train_error": None}))
        measures = {"fisher_trace": {"value": float(i)}}
        write_json(tmp_path / f"r{i}" / "measures.json", {"measures": measures})
    table = load_table(tmp_path, gap="test_error - train_error", seed_column="trial")
    assert table.frame["test_error - train_error"].tolist()[1:] == [0.3, 0.4, 0.5]
    assert table.missing["test_error - train_error"] == {0: "no value"}
    assert table.frame["seed"].tolist() == [0, 1, 0, 1]
    assert table.hyperparameters == ("lr",)
    with pytest.raises(UsageError, match="no column 'test_eror'; did you mean 'test_error'"):
        load_table(tmp_path, gap="test_eror")
    with pytest.raises(UsageError, match="did you mean 'trial'"):
        load_table(tmp_path, seed_column="trail")
