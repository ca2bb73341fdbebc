"""Results to stdout (a table on a terminal, JSON or CSV for machines), progress and notes to stderr."""

import csv
import io
import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import click
from rich.console import Console, ConsoleOptions, JustifyMethod, RenderableType
from rich.markup import escape
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

from gm_probe.errors import printable
from gm_probe.tables.cells import cell

FIGURE_SUFFIXES = (".png", ".pdf", ".svg")
"""What figures may be written as."""
UNFOLDED = 1000
"""Width of output that goes to no terminal."""


class _Safe(Console):
    """Shows no control character of a text that it is given, whoever prints: files choose names and reasons."""

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterator[Segment]:
        for segment in super().render(renderable, options):
            yield segment if segment.control else segment._replace(text=_lines(segment.text))


def _lines(text: str) -> str:
    """Return ``text`` with its line breaks and without other control characters."""
    return "\n".join(map(printable, text.split("\n")))


class _Results(_Safe):
    def on_broken_pipe(self) -> None:
        raise BrokenPipeError  # rich would exit with 1; ``cli.main`` takes a reader's early leave for success


def results_console() -> Console:
    """Return a console on stdout; rich drops colour when piped or when NO_COLOR is set.

    Only a terminal is narrow: what goes into a file or a pipe is as wide as it needs, so that no name is folded.
    """
    narrow = sys.stdout.isatty() or "COLUMNS" in os.environ
    return _Results(file=sys.stdout, soft_wrap=False, width=None if narrow else UNFOLDED)


def notes_console(quiet: bool = False) -> Console:
    """Return a console on stderr for progress, notes and warnings."""
    return _Safe(file=sys.stderr, quiet=quiet, highlight=False)


def print_json(value: Any) -> None:
    """Print strict JSON (no NaN) on stdout."""
    _print(json.dumps(value, indent=2, allow_nan=False) + "\n")


def print_as(form: str, result: Any, rows: Sequence[Mapping[str, Any]]) -> None:
    """Print ``result`` as JSON, or ``rows`` as CSV, as ``form`` says."""
    if form == "json":
        print_json(result)
    else:
        print_csv(rows)


def print_csv(rows: Sequence[Mapping[str, Any]]) -> None:
    """Print rows as CSV on stdout; the header is the union of their keys."""
    _print(csv_text(rows, list(dict.fromkeys(key for row in rows for key in row))))


def csv_text(rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> str:
    """Return ``rows`` as CSV. None is an empty field.

    Text that a spreadsheet would run as a formula gets a leading apostrophe.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(map(cell, columns))
    writer.writerows([cell(row.get(column)) for column in columns] for row in rows)
    return text.getvalue()


def _print(text: str) -> None:
    try:
        click.echo(text, nl=False)
    except BrokenPipeError as error:
        raise BrokenPipeError from error  # click would exit with 1 at an errno; see _Results


def table(
    title: str | None, columns: Sequence[str], rows: Sequence[Sequence[str]], *, left: bool = False
) -> Table:
    """Return a rich table whose first column is left-aligned, and the others right-aligned unless ``left``."""
    # rich would fold a title to the table's width, however wide the terminal
    above = None if title is None else Text(printable(title), "table.title", no_wrap=True, overflow="ignore")
    result = Table(title=above, title_justify="left", header_style="bold")
    for index, column in enumerate(columns):
        justify: JustifyMethod = "left" if left or index == 0 else "right"
        result.add_column(escape(printable(column)), justify=justify, overflow="fold")
    for row in rows:
        result.add_row(*(escape(_lines(cell)) for cell in row))
    return result


def number(value: float | None, digits: int = 4) -> str:
    """Return a number for a table: significant digits, no exponent below a million; a dash where it is undefined."""
    if value is None:
        return "—"
    text = f"{value:.{digits}g}"
    return f"{float(text):.0f}" if "e+" in text and abs(value) < 1e6 else text


def short_names(paths: Sequence[str]) -> list[str]:
    """Return ``paths`` without the folder that all of them share, for a table."""
    shared = (
        os.path.commonpath(list(map(os.path.dirname, paths)))
        if len(set(map(os.path.isabs, paths))) == 1
        else ""
    )
    return [os.path.relpath(path, shared) if shared else path for path in paths]


def note(console: Console, text: str) -> None:
    """Print a line for a person on ``console``, never wrapped where no terminal asks for it."""
    console.print(printable(text), markup=False, highlight=False, soft_wrap=not console.is_terminal)


def say(console: Console, text: str, style: str | None = None) -> None:
    """Print a remark beside a table on ``console``, wrapped as the table is."""
    console.print(printable(text), style=style, markup=False, highlight=False)


def echo(text: str) -> None:
    """Print a line on stdout, as it is."""
    _print(printable(text) + "\n")


def note_reading(console: Console, notes: Sequence[str], skipped: Sequence[str]) -> None:
    """Say how data was read, and which files were left out; ``skipped`` are their errors."""
    for text in notes:
        note(console, f"note: {text}")
    if skipped:
        more = f"; and {len(skipped) - 3} more" if len(skipped) > 3 else ""
        note(console, f"warning: {len(skipped)} file(s) left out: {'; '.join(skipped[:3])}{more}")
