"""One table, three ways to print it: HTML (by the report's template), Markdown and LaTeX."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

UNDEFINED = "—"


@dataclass(frozen=True, slots=True)
class Cell:
    """What stands in a table's cell, the number it is sorted by (None: by its text), and why it is empty."""

    text: str
    order: float | None = None
    reason: str | None = None


@dataclass(frozen=True, slots=True)
class Sheet:
    """A table: ``name`` is its id, ``rows`` have a cell for each of ``columns``; ``notes`` stand below it.

    The first ``num_labels`` columns name the row and are set flush left, the others are figures.
    """

    name: str
    title: str
    caption: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    num_labels: int = 1
    notes: tuple[str, ...] = ()

    @property
    def reasons(self) -> tuple[str, ...]:
        """Why cells are empty, or lack something: a line a reason, with the columns and rows that it holds for."""
        rows: dict[tuple[str, str], list[str]] = {}
        for row in self.rows:
            label = " / ".join(cell.text for cell in row[: self.num_labels])
            columns: dict[str, list[str]] = {}
            for column, cell in zip(self.columns, row, strict=True):
                if cell.reason is not None:
                    columns.setdefault(cell.reason, []).append(column)
            for reason, names in columns.items():
                rows.setdefault((reason, ", ".join(names)), []).append(label)
        return tuple(
            f"{names} of {'every row' if len(of) == len(self.rows) > 1 else '; '.join(of)}: {reason}"
            for (reason, names), of in rows.items()
        )


def markdown(sheets: Sequence[Sheet]) -> str:
    """GitHub's pipe tables, each under a heading."""
    return "\n\n".join(_markdown(sheet) for sheet in sheets) + "\n"


def latex(sheets: Sequence[Sheet]) -> str:
    r"""``table`` environments for a document with ``\usepackage{booktabs}``, for any TeX engine."""
    head = "% Needs \\usepackage{booktabs}; with pdfTeX also \\usepackage[T1]{fontenc}.\n"
    return head + "\n" + "\n".join(_latex(sheet) for sheet in sheets)


def _markdown(sheet: Sheet) -> str:
    def line(cells: Sequence[str]) -> str:
        return f"| {' | '.join(cells)} |"

    rules = ["---" if i < sheet.num_labels else "---:" for i in range(len(sheet.columns))]
    rows = [line([escape_markdown(cell.text) for cell in row]) for row in sheet.rows]
    notes = [f"- {escape_markdown(note)}" for note in (*sheet.notes, *sheet.reasons)]
    return "\n".join(
        [f"### {escape_markdown(sheet.title)}", "", escape_markdown(sheet.caption), ""]
        + [line([escape_markdown(column) for column in sheet.columns]), line(rules), *rows]
        + (["", *notes] if notes else [])
    )


def _latex(sheet: Sheet) -> str:
    def line(cells: Sequence[str]) -> str:
        return f"  {' & '.join(cells)} \\\\"

    shape = "l" * sheet.num_labels + "r" * (len(sheet.columns) - sheet.num_labels)
    notes = " ".join(f"{note}." for note in (*sheet.notes, *sheet.reasons))
    caption = f"{sheet.title}. {sheet.caption} {notes}".strip()
    return "\n".join(
        [
            "\\begin{table}",
            "  \\centering",
            f"  \\caption{{{escape_latex(caption)}}}",
            f"  \\label{{tab:{sheet.name}}}",
            "  \\footnotesize",
            f"  \\begin{{tabular}}{{{shape}}}",
            "  \\toprule",
            line([escape_latex(column) for column in sheet.columns]),
            "  \\midrule",
            *(line([escape_latex(cell.text) for cell in row]) for row in sheet.rows),
            "  \\bottomrule",
            "  \\end{tabular}",
            "\\end{table}",
            "",
        ]
    )


def escape_markdown(text: str) -> str:
    """``text`` on one line, nothing of it taken for markup, HTML or a cell's end."""
    flat = " ".join(text.split())
    return re.sub(r"([\\`*_{}\[\]<>|~#&$])", r"\\\1", flat)


def escape_latex(text: str) -> str:
    """``text`` as LaTeX shows it literally, in text mode; the symbols used here as their commands."""
    flat = " ".join(text.split())
    return "".join(_LATEX.get(letter, letter) for letter in flat)


_LATEX = {
    "\\": r"\textbackslash{}",
    "{": r"\{",
    "}": r"\}",
    "$": r"\$",
    "&": r"\&",
    "%": r"\%",
    "#": r"\#",
    "_": r"\_",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    '"': r"\textquotedbl{}",
    "−": "$-$",
    "±": r"$\pm$",
    "×": r"$\times$",
    "≥": r"$\geq$",
    "≤": r"$\leq$",
    "≠": r"$\neq$",
    "≈": r"$\approx$",
    "·": r"$\cdot$",
    "—": "---",
    "–": "--",
    "…": r"\dots{}",
    "’": "'",
    "τ": r"$\tau$",
    "ρ": r"$\rho$",
    "λ": r"$\lambda$",
    "ψ": r"$\psi$",
    "Ψ": r"$\Psi$",
    "θ": r"$\theta$",
    "σ": r"$\sigma$",
    "β": r"$\beta$",
    "δ": r"$\delta$",
    "Δ": r"$\Delta$",
    "η": r"$\eta$",
    "‖": r"$\Vert$",
    "∂": r"$\partial$",
    "₀": r"$_0$",
    "ᵢ": r"$_i$",
    "½": r"$\frac12$",
    "²": r"$^2$",
}
