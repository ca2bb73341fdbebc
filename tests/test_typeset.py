"""Tables as Markdown and LaTeX: read back by parsers of those forms, whatever the cells hold."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from gm_probe.analysis.typeset import (
    _LATEX,
    PAGE,
    Cell,
    Sheet,
    escape_latex,
    escape_markdown,
    latex,
    markdown,
    two_decimals,
)

NASTY = 'a|b <img src=x> *c* _d_ `e` \\f {g} $h$ %i #j & ~k ^l [m](n)\nnew "line" −1 τ ρ'


def sheet(*cells: str, reason: str | None = None) -> Sheet:
    rows = tuple((Cell(cell), Cell("0.5", 0.5), Cell("—", reason=reason)) for cell in cells)
    return Sheet("s", "Title & co", "Caption_1.", ("Name", "τ|b", "p"), rows, notes=("100 % sure",))


def cells_of(line: str) -> list[str]:
    """The cells of a pipe table's line by the rule of GitHub's specification: a backslash frees the next sign."""
    body = re.fullmatch(r"\| (.*) \|", line)
    assert body, line
    parts = re.split(r"(?<!\\)((?:\\\\)*)\|", body[1])
    joined = [parts[i] + (parts[i + 1] if i + 1 < len(parts) else "") for i in range(0, len(parts), 2)]
    return [re.sub(r"\\(.)", r"\1", part.strip()) for part in joined]


def test_markdown_cells_come_back_as_they_went_in() -> None:
    lines = markdown([sheet(NASTY, "plain")]).splitlines()
    table = [line for line in lines if line.startswith("|")]
    assert cells_of(table[0]) == ["Name", "τ|b", "p"]
    assert table[1] == "| --- | ---: | ---: |"
    assert [cells_of(line) for line in table[2:]] == [
        [" ".join(NASTY.split()), "0.5", "—"],
        ["plain", "0.5", "—"],
    ]


def test_markdown_leaves_no_html_and_no_emphasis() -> None:
    shown = escape_markdown(NASTY)
    assert not re.search(r"(?<!\\)[<>*_`\[\]|{}]", shown)
    assert "\n" not in shown


def test_latex_leaves_no_special_sign_and_all_its_symbols_are_commands() -> None:
    shown = escape_latex(NASTY)
    commands = re.compile(r"\\(text[a-z]+\{\}|[&%#_{}$])|\$[^$]+\$")
    assert not re.search(r"[\\&%#_{}~^$<>|\"]", commands.sub("", shown))
    assert shown.isascii()
    assert "\n" not in shown
    assert escape_latex("\\{") == r"\textbackslash{}\{"


def test_latex_is_a_booktabs_table_with_balanced_braces() -> None:
    text = latex([sheet("a", "b")])
    for word in ("\\toprule", "\\midrule", "\\bottomrule", "\\label{tab:s}", "\\begin{tabular}{lrr}"):
        assert text.count(word) == 1
    rows = [line for line in text.splitlines() if line.endswith(r"\\")]
    assert len(rows) == 3
    assert all(len(re.findall(r"(?<!\\)&", row)) == 2 for row in rows)
    free = re.sub(r"\\[{}]", "", text)
    assert free.count("{") == free.count("}")
    assert r"Title \& co. Caption\_1. 100 \% sure." in text


@pytest.mark.skipif(shutil.which("pdflatex") is None, reason="no pdflatex here")
def test_latex_compiles(tmp_path: Path) -> None:
    body = latex(
        [sheet(NASTY + "".join(_LATEX), reason="x_y"), sheet(*map(str, range(PAGE + 60)), reason="z")]
    )
    document = (
        "\\documentclass{article}\\usepackage[T1]{fontenc}\\usepackage{booktabs,graphicx,longtable}"
        f"\\begin{{document}}{body}\\end{{document}}"
    )
    (tmp_path / "t.tex").write_text(document)
    command = ["pdflatex", "-halt-on-error", "-interaction=nonstopmode", "t.tex"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:]


def test_a_reason_has_one_mark_wherever_it_holds() -> None:
    rows = (
        (Cell("a"), Cell("—", reason="constant"), Cell("—", reason="no error")),
        (Cell("b"), Cell("—", reason="constant"), Cell("1", 1.0)),
    )
    table = Sheet("s", "T", "C", ("Name", "τ", "p"), rows)
    assert table.reasons == {"constant": "a", "no error": "b"}
    text = markdown([table])
    assert [
        cells_of(line) for line in text.splitlines() if line.startswith("| b") or line.startswith("| a")
    ] == [
        ["a", "— (a)", "— (b)"],
        ["b", "— (a)", "1"],
    ]
    assert text.endswith("- (a) constant\n- (b) no error\n")
    shown = latex([table])
    assert "a & ---\\textsuperscript{a} & ---\\textsuperscript{b}" in shown
    assert "(a) constant. (b) no error." in shown


def test_marks_go_on_after_z() -> None:
    rows = tuple((Cell(str(i), reason=f"reason {i}"),) for i in range(54))
    marks = list(Sheet("s", "T", "C", ("Name",), rows).reasons.values())
    assert (marks[0], marks[25], marks[26], marks[27], marks[52], marks[53]) == (
        "a",
        "z",
        "aa",
        "ab",
        "ba",
        "bb",
    )


def test_a_long_table_breaks_over_pages_with_its_head_on_each() -> None:
    text = latex([sheet(*map(str, range(PAGE + 1)))])
    assert "\\begin{longtable}{lrr}" in text
    assert "\\begin{table}" not in text
    assert text.index("\\midrule") < text.index("\\endhead") < text.index("\n  0 & ")


def test_an_empty_table_is_its_caption() -> None:
    empty = Sheet("s", "Left out", "Nothing was.", ("What",), ())
    assert markdown([empty]) == "### Left out\n\nNothing was.\n"
    assert latex([empty]).endswith("\nLeft out. Nothing was.\n")


def test_a_rounded_zero_has_no_sign() -> None:
    assert [two_decimals(x) for x in (-0.004, -0.006, 0.0, 1.0, -0.5)] == [
        "0.00",
        "−0.01",
        "0.00",
        "1.00",
        "−0.50",
    ]
