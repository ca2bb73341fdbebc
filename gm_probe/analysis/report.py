"""One self-contained HTML page about a sweep: figures, tables, definitions, provenance, exclusions."""

import base64
import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.resources import files
from typing import NamedTuple

import jinja2
from markupsafe import Markup, escape

from gm_probe.analysis import curves, figures, grid, provenance, sheets
from gm_probe.analysis.plots import MARKERS, render
from gm_probe.analysis.report_figures import ReportFigure, Rows, report_figures
from gm_probe.analysis.report_leads import entered, leads
from gm_probe.analysis.results import Correlations
from gm_probe.analysis.typeset import Sheet
from gm_probe.errors import UsageError

MOST_COLOURS = 2 * len(figures.COLOURS)
"""Most subgroups that colour and filling can distinguish."""
LISTED = 200
"""Most runs whose commands a page lists."""
SHOWN = 16
"""Tables with more rows are folded."""
SECTIONS = {
    "correlation": ("Rank correlation with the gap", ("correlations",)),
    "scatter": ("Measures against gaps", ()),
    "beyond": ("What a single τ hides", ("beyond",)),
    "comparisons": ("Measures against each other", ("comparisons",)),
    "selection": ("Selection", ("selection",)),
    "grid": ("τ against ρ and K", ()),
    "training": ("Training", ()),
    "runs": ("Runs, and what was left out", ("exclusions", "runs")),
    "definitions": ("Definitions", ("measures", "statistics")),
    "origin": ("Versions and settings", ("versions", "trained", "measured")),
}
"""Sections of the page by the ``section`` of their pictures: title, and tables."""
OPEN = ("correlations", "selection")
"""Tables that are unfolded where they are short."""


@dataclass(frozen=True, slots=True)
class Report:
    """All that a page shows: the ``conclusion``, ``cautions`` to heed, then ``pictures`` and sheets by section.

    ``leads`` are the first sentences of sections, ``notes`` how the runs were read. ``printed`` are the sheets that are
    also written as Markdown and LaTeX. ``commands`` are those of the first ``LISTED`` runs, of ``num_commands``.
    """

    title: str
    conclusion: tuple[str, ...]
    cautions: tuple[str, ...]
    notes: tuple[str, ...]
    leads: dict[str, str]
    pictures: tuple[ReportFigure, ...]
    printed: tuple[Sheet, ...]
    explanations: tuple[Sheet, ...]
    command: str
    commands: tuple[str, ...]
    num_commands: int


def compose(statistics: Correlations, *, groups: Rows, shapes: Rows, command: str) -> Report:
    """Draw and tabulate ``statistics``.

    Args:
        groups, shapes: rows by subgroup, told apart by colour and by marker (``design.group_rows``).
        command: what the user typed.

    Raises:
        UsageError: more subgroups than there are colours or markers.
        StorageError: a run's record has become unreadable since ``table`` was read.
    """
    for option, rows, most in (("--group-by", groups, MOST_COLOURS), ("--markers", shapes, len(MARKERS))):
        if len(rows) > most:
            raise UsageError(
                f"{option} makes {len(rows)} subgroups, and a figure can distinguish {most}. Name fewer "
                "settings"
            )
    table = statistics.runs
    records = provenance.read_records(table)
    origin = provenance.provenance(records)
    grids = {gap: grid.grid_taus(table, records, gap) for gap in statistics.targets if records}
    drawn, unread = curves.read_curves(table) if records else ({}, {})
    left_out = [f"columns left out: {', '.join(table.left_out)}"] if table.left_out else []
    return Report(
        title=f"Generalization measures of {table.source.resolve().name}",
        conclusion=(*statistics.conclusion, entered(statistics)),
        cautions=_cautions(statistics, unread),
        notes=tuple(f"{note[0].upper()}{note[1:]}." for note in (*table.notes, *left_out, *statistics.notes)),
        leads=leads(statistics, grids),
        pictures=tuple(report_figures(statistics, groups, shapes, grids, drawn)),
        printed=(*sheets.statistics_sheets(statistics), *sheets.run_sheets(table)),
        explanations=(
            *sheets.definition_sheets(table.measures),
            *sheets.origin_sheets(origin, provenance.versions()),
        ),
        command=command,
        commands=tuple(origin.commands.values())[:LISTED],
        num_commands=len(origin.commands),
    )


def html(report: Report) -> str:
    """Return the page: nothing in it is fetched, and its content security policy allows nothing to be."""
    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(_part),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"breakable": _breakable, "drawing": _drawing}
    style, script = _part("report.css"), _part("report.js")
    return environment.get_template("report.html.j2").render(
        report=report,
        first=[picture for picture in report.pictures if not picture.section],
        sections=list(_sections(report)),
        unfolded=OPEN,
        shown=SHOWN,
        style=Markup(style),
        script=Markup(script),
        style_hash=_hash(style),
        script_hash=_hash(script),
    )


class _Section(NamedTuple):
    name: str
    title: str
    lead: str
    pictures: list[ReportFigure]
    sheets: list[Sheet]


def _sections(report: Report) -> Iterable[_Section]:
    tables = {sheet.name: sheet for sheet in (*report.printed, *report.explanations)}
    for name, (title, wanted) in SECTIONS.items():
        drawn = [picture for picture in report.pictures if picture.section == name]
        found = [tables[sheet] for sheet in wanted if sheet in tables]
        if drawn or found:
            yield _Section(name, title, report.leads.get(name, ""), drawn, found)


def _cautions(statistics: Correlations, unread: dict[str, str]) -> tuple[str, ...]:
    said = statistics.warnings or {}
    found = [f"{name}: {warning}." for name, warnings in said.items() for warning in warnings]
    if unread:
        run, reason = next(iter(unread.items()))
        found.append(f"Runs without a readable training curve: {len(unread):,}, the first {run}: {reason}.")
    return tuple(found)


def _breakable(text: str) -> Markup:
    """Return ``text``, escaped, with possible line breaks after underscores."""
    return escape(text).replace("_", Markup("_<wbr>"))


def _drawing(picture: ReportFigure) -> str:
    """Return a picture's SVG as base64."""
    return base64.b64encode(render(picture.figure, "svg")).decode()


def _part(name: str) -> str:
    return files("gm_probe.analysis").joinpath("page", name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    """Return the hash by which a content security policy allows inline text."""
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"
