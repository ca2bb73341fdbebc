"""Text tables in every encoding and separator that spreadsheets use."""

from __future__ import annotations

import csv
import io
from pathlib import Path

import pytest

from gm_probe.errors import DataError
from gm_probe.tables.delimited import read_delimited

HEADER, ROWS = (
    ["name", "größe", "gap"],
    [["a, b", "1", "0.5"], ['say "x"; y', "2", "0.25"], ["tab\tbar|", "", "3"]],
)


def written(separator: str, end: str = "\n") -> str:
    text = io.StringIO()
    csv.writer(text, delimiter=separator, lineterminator=end).writerows([HEADER, *ROWS])
    return text.getvalue()


@pytest.mark.parametrize("separator", [",", ";", "\t", "|"])
@pytest.mark.parametrize(
    "encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "cp1252"]
)
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_the_same_cells_however_written(tmp_path: Path, separator: str, encoding: str, end: str) -> None:
    (tmp_path / "t.csv").write_bytes(written(separator, end).encode(encoding))
    found = read_delimited(tmp_path / "t.csv")
    assert (found.header, found.rows) == (HEADER, ROWS)
    assert (found.written == ()) == (separator == "," and encoding.startswith("utf-8"))


@pytest.mark.parametrize("first", ["sep=;", '"sep=;"', "SEP=;", "sep=;;;"])
def test_a_first_line_names_the_separator(tmp_path: Path, first: str) -> None:
    """It wins over what the rows look like."""
    (tmp_path / "t.csv").write_text(f"{first}\na,b;c\n1,2;3\n4,5;6\n")
    assert read_delimited(tmp_path / "t.csv").header == ["a,b", "c"]


def test_decimal_commas_do_not_pass_for_separators(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("gap;m\n0,1;1,5\n0,2;2,5\n")
    assert read_delimited(tmp_path / "t.csv").rows == [["0,1", "1,5"], ["0,2", "2,5"]]


def test_blank_rows_and_empty_ends_are_passed_over(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("\n\na,b\n1,2,,\n\n,,\n3\n")
    assert read_delimited(tmp_path / "t.csv").rows == [["1", "2"], ["3", ""]]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "is empty"),
        (b"\xef\xbb\xbf\n", "is empty"),
        (b"a,b\n1,2,3\n", "line 2 has 3 cells, but the header has 2"),
        (b'a,b\n1,"2\n', "not a readable CSV"),
        (b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR\xff", "bytes that are not text"),
        (b"a,b\n\x81,2\n", "not a readable CSV"),
        (b"\xff\xfea\x00,\x00b\x00\n", "not a readable CSV: .* save it as UTF-8"),
    ],
)
def test_what_is_no_table_is_one_line(tmp_path: Path, data: bytes, message: str) -> None:
    (tmp_path / "t.csv").write_bytes(data)
    with pytest.raises(DataError, match=message) as caught:
        read_delimited(tmp_path / "t.csv")
    assert "\n" not in str(caught.value)
