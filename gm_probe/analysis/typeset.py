"""One table, three ways to print it: HTML (by the report's template), Markdown and LaTeX."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

UNDEFINED = "—"
PAGE = 45  # rows that one page of LaTeX holds
FITTED = "\\ifdim\\width>\\linewidth\\linewidth\\else\\width\\fi"


@dataclass(frozen=True, slots=True)
class Cell:
    """What stands in a table's cell, the number it is sorted by (None: by its text), and why it is empty or
    lacks something."""

    text: str
    order: float | None = None
    reason: str | None = None


@dataclass(frozen=True, slots=True)
class Sheet:
    """A table: ``name`` is its id, ``rows`` have a cell for each of ``columns``; ``notes`` stand below it.

    The first ``num_labels`` columns name the row and are set flush left, the others are numbers.
    """

    name: str
    title: str
    caption: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    num_labels: int = 1
    notes: tuple[str, ...] = ()

    @property
    def reasons(self) -> dict[str, str]:
        """Return the mark of each reason that a cell gives: a, b, ..., z, aa, ... in the order of the table."""
        found = dict.fromkeys(cell.reason for row in self.rows for cell in row if cell.reason is not None)
        return {reason: _mark(index) for index, reason in enumerate(found)}


def plain_sheet(
    name: str,
    title: str,
    caption: str,
    columns: Sequence[str],
    rows: Iterable[Sequence[str]],
    num_labels: int = 1,
) -> Sheet:
    """Return a sheet of text alone."""
    body = tuple(tuple(map(Cell, row)) for row in rows)
    return Sheet(name, title, caption, tuple(columns), body, num_labels)


def markdown(sheets: Sequence[Sheet]) -> str:
    """Return GitHub's pipe tables, each under a heading."""
    return "\n\n".join(_markdown(sheet) for sheet in sheets) + "\n"


def latex(sheets: Sequence[Sheet]) -> str:
    """Return tables for any TeX engine: ``table``, shrunk to the line where too wide, or ``longtable`` where long."""
    head = (
        "% \\usepackage{booktabs,graphicx,longtable}; with pdfTeX also \\usepackage[T1]{fontenc}\n"
        "% in documents of two columns: table* instead of table\n"
    )
    return head + "\n" + "\n".join(_latex(sheet) for sheet in sheets)


def _mark(index: int) -> str:
    letter = chr(ord("a") + index % 26)
    return letter if index < 26 else _mark(index // 26 - 1) + letter


def _markdown(sheet: Sheet) -> str:
    def line(cells: Iterable[str]) -> str:
        return f"| {' | '.join(cells)} |"

    def shown(cell: Cell) -> str:
        return escape_markdown(cell.text) + (f" ({marks[cell.reason]})" if cell.reason is not None else "")

    marks = sheet.reasons
    rules = ["---" if i < sheet.num_labels else "---:" for i in range(len(sheet.columns))]
    notes = [f"- {escape_markdown(note)}" for note in sheet.notes]
    notes += [f"- ({mark}) {escape_markdown(reason)}" for reason, mark in marks.items()]
    head = [f"### {escape_markdown(sheet.title)}", "", escape_markdown(sheet.caption)]
    body = [line(map(shown, row)) for row in sheet.rows]
    if body:
        body = ["", line(map(escape_markdown, sheet.columns)), line(rules), *body]
    return "\n".join(head + body + (["", *notes] if notes else []))


def _latex(sheet: Sheet) -> str:
    def line(cells: Iterable[str]) -> str:
        return f"  {' & '.join(cells)} \\\\"

    def shown(cell: Cell) -> str:
        raised = "" if cell.reason is None else f"\\textsuperscript{{{marks[cell.reason]}}}"
        return escape_latex(cell.text) + raised

    marks = sheet.reasons
    shape = "l" * sheet.num_labels + "r" * (len(sheet.columns) - sheet.num_labels)
    said = [f"{sheet.title}.", sheet.caption, *(f"{note}." for note in sheet.notes)]
    said += [f"({mark}) {reason}." for reason, mark in marks.items()]
    if not sheet.rows:
        return f"{escape_latex(' '.join(said))}\n"
    caption = f"\\caption{{{escape_latex(' '.join(said))}}}\\label{{tab:{sheet.name}}}"
    head = ["  \\toprule", line(map(escape_latex, sheet.columns)), "  \\midrule"]
    body = [*(line(map(shown, row)) for row in sheet.rows), "  \\bottomrule"]
    if len(sheet.rows) > PAGE:
        begin = [
            "{\\footnotesize",
            f"\\begin{{longtable}}{{{shape}}}",
            f"  {caption}\\\\",
            *head,
            "  \\endhead",
        ]
        return "\n".join([*begin, *body, "\\end{longtable}}", ""])
    begin = [
        "\\begin{table}",
        "  \\centering\\footnotesize",
        f"  {caption}",
        f"  \\resizebox{{{FITTED}}}{{!}}{{%",
    ]
    inner = [f"  \\begin{{tabular}}{{{shape}}}", *head, *body, "  \\end{tabular}}"]
    return "\n".join([*begin, *inner, "\\end{table}", ""])


def two_decimals(value: float) -> str:
    """Return a coefficient with a typographic minus sign, and without one before a rounded 0."""
    text = f"{value:.2f}"
    return "0.00" if text == "-0.00" else text.replace("-", "−")


def escape_markdown(text: str) -> str:
    """Return ``text`` on one line, with markup, HTML and cell ends escaped."""
    flat = " ".join(text.split())
    return re.sub(r"([\\`*_{}\[\]<>|~#&$])", r"\\\1", flat)


def escape_latex(text: str) -> str:
    """Return ``text`` as LaTeX shows it literally in text mode; the symbols used here become commands."""
    flat = " ".join(text.split())
    found = "".join(_LATEX.get(letter, letter) for letter in flat)
    return re.sub("\\$(\\\\[a-z]+)\\$\N{COMBINING CIRCUMFLEX ACCENT}", r"$\\hat{\1}$", found)


# fmt: off
_LATEX = {
    "\\": r"\textbackslash{}", "{": r"\{", "}": r"\}", "$": r"\$", "&": r"\&", "%": r"\%", "#": r"\#", "_": r"\_",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"\textless{}", ">": r"\textgreater{}",
    "|": r"\textbar{}", '"': r"\textquotedbl{}", "—": "---", "–": "--", "…": r"\dots{}", "’": "'", "“": "``", "”": "''",
    "−": "$-$", "±": r"$\pm$", "×": r"$\times$", "≥": r"$\geq$", "≤": r"$\leq$", "≠": r"$\neq$", "≈": r"$\approx$",
    "·": r"$\cdot$", "‖": r"$\Vert$", "∂": r"$\partial$", "½": r"$\frac12$", "²": r"$^2$", "₀": r"$_0$", "₁": r"$_1$",
    "₂": r"$_2$", "₃": r"$_3$", "ᵢ": r"$_i$", "τ": r"$\tau$", "ρ": r"$\rho$", "λ": r"$\lambda$", "ψ": r"$\psi$",
    "Ψ": r"$\Psi$", "θ": r"$\theta$", "σ": r"$\sigma$", "β": r"$\beta$", "δ": r"$\delta$", "Δ": r"$\Delta$",
    "η": r"$\eta$", "ξ": r"$\xi$",
}
# fmt: on
