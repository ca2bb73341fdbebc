"""Numbers as tables write them: points, commas, thousands, percent."""

from __future__ import annotations

import math
import random

import pytest

from gm_probe.tables.numerals import read_numbers


def values(*cells: str, beside: tuple[str, ...] = ()) -> list[float]:
    return read_numbers({"m": cells, "other": beside or ("0",) * len(cells)})["m"].values.to_list()


@pytest.mark.parametrize(
    ("cells", "expected"),
    [
        (("0.5", "-3", "+.25", "1e-3", " 7 "), (0.5, -3, 0.25, 1e-3, 7)),
        (("0,5", "-3", ",25", "1,5E-03", "7"), (0.5, -3, 0.25, 1.5e-3, 7)),
        (("1,234.5", "12", "1,234,567"), (1234.5, 12, 1234567)),
        (("1.234,5", "12", "1.234.567"), (1234.5, 12, 1234567)),
        (("1 234,5", "1\N{NO-BREAK SPACE}234", "1\N{NARROW NO-BREAK SPACE}234"), (1234.5, 1234, 1234)),
        (("1'234.5", "1’234"), (1234.5, 1234)),
        (("9.18%", "100 %", "-5%"), (0.0918, 1, -0.05)),
        (("9,18 %", "100%"), (0.0918, 1)),
        (("−0.5", "−1"), (-0.5, -1)),
    ],
)
def test_notations(cells: tuple[str, ...], expected: tuple[float, ...]) -> None:
    assert values(*cells) == pytest.approx(list(expected), rel=1e-15)


@pytest.mark.parametrize(
    "cell", ["1,2,3.5", "1 2", "12,34.5", "0x10", "1_000", "True", "12:30", "1.2.3", "٣"]
)
def test_what_is_no_number(cell: str) -> None:
    read = read_numbers({"m": [cell, "0.5"]})["m"]
    assert read.text == {0: cell}


def test_a_cell_that_may_be_either_follows_the_columns_that_tell() -> None:
    assert values("1.234", "2.345", beside=("0.5", "0.25")) == [1.234, 2.345]
    assert values("1.234", "2.345", beside=("0,5", "0,25")) == [1234, 2345]
    assert values("1,234", "2,345", beside=("0.5", "0.25")) == [1234, 2345]
    assert values("1,234", "2,345", beside=("0,5", "0,25")) == [1.234, 2.345]
    assert values("1.234", "2") == [1.234, 2], "by itself 1.234 is what programs write"
    assert all(map(math.isnan, values("1,234", "2,345")))


def test_excel_errors_and_blanks_have_no_value() -> None:
    read = read_numbers({"m": ["", "#N/A", "#DIV/0!", "NaN", "-", "0,5"]})["m"]
    assert read.missing == dict.fromkeys(range(5), "no value")
    assert read.text == {}


def test_any_numbers_come_back_from_either_notation() -> None:
    draws = random.Random(0)
    numbers = [
        round(draws.uniform(-1, 1) * 10 ** draws.randint(-3, 6), draws.randint(0, 5)) for _ in range(300)
    ]
    written = [f"{number:,.5f}" for number in numbers]
    assert values(*written) == numbers
    swapped = [text.translate(str.maketrans(",.", ".,")) for text in written]
    assert values(*swapped) == numbers
