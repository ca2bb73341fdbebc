"""One self-contained HTML page about a sweep: figures, tables, definitions, provenance, exclusions."""

import base64
import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.resources import files

import jinja2
from markupsafe import Markup, escape

from gm_probe.analysis import curves, figures, grid, provenance, sheets
from gm_probe.analysis.pictures import Picture, Rows, pictures
from gm_probe.analysis.plots import MARKERS, render
from gm_probe.analysis.results import Correlations
from gm_probe.analysis.typeset import Sheet
from gm_probe.errors import UsageError
from gm_probe.tables.table import by_reason

MOST_COLOURS = 2 * len(figures.COLOURS)
"""Subgroups that colour and filling tell apart."""
LISTED = 200
"""Runs whose commands a page lists."""
SHOWN = 16
"""Rows up to which a table is unfolded."""
SECTIONS = {
    "correlation": ("Rank correlation with the gap", ("correlations",), ""),
    "scatter": (
        "Measures against gaps",
        (),
        "Each point is a run.",
    ),
    "beyond": ("What a single τ hides", ("beyond",), ""),
    "comparisons": ("Measures against each other", ("comparisons",), ""),
    "selection": ("Selection", ("selection",), ""),
    "grid": ("τ against ρ and K", (), ""),
    "training": ("Training", (), ""),
    "runs": ("Runs, and what was left out", ("exclusions", "runs"), ""),
    "definitions": ("Definitions", ("measures", "statistics"), ""),
    "origin": ("Versions and settings", ("versions", "trained", "measured"), ""),
}
"""Sections of the page by the ``section`` of their pictures: title, tables, and a word ahead."""


@dataclass(frozen=True, slots=True)
class Report:
    """All that a page shows: ``facts`` on top, ``cautions`` to heed, then ``pictures`` and ``sheets`` by section.

    ``commands`` are those of the first ``LISTED`` runs, of ``num_commands``.
    """

    title: str
    facts: tuple[str, ...]
    cautions: tuple[str, ...]
    pictures: tuple[Picture, ...]
    results: tuple[Sheet, ...]
    runs: tuple[Sheet, ...]
    explanations: tuple[Sheet, ...]
    command: str
    commands: tuple[str, ...]
    num_commands: int

    @property
    def printed(self) -> tuple[Sheet, ...]:
        """For Markdown and LaTeX: figures, runs and exclusions, without the words."""
        return (*self.results, *self.runs)


def compose(
    statistics: Correlations,
    *,
    groups: Rows,
    shapes: Rows,
    command: str,
) -> Report:
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
    return Report(
        title=f"Generalization measures of {table.source.resolve().name}",
        facts=_facts(statistics),
        cautions=_cautions(statistics, unread),
        pictures=tuple(pictures(statistics, groups, shapes, grids, drawn)),
        results=sheets.statistics_sheets(statistics),
        runs=sheets.run_sheets(table),
        explanations=(
            *sheets.definition_sheets(table.measures),
            *sheets.origin_sheets(origin, provenance.versions()),
        ),
        command=command,
        commands=tuple(origin.commands.values())[:LISTED],
        num_commands=len(origin.commands),
    )


def html(report: Report) -> str:
    """The page: nothing in it is fetched, and its content security policy allows nothing to be."""
    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(_part),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["breakable"] = _breakable
    style, script = _part("report.css"), _part("report.js")
    return environment.get_template("report.html.j2").render(
        report=report,
        sections=list(_sections(report)),
        shown=SHOWN,
        style=Markup(style),
        script=Markup(script),
        style_hash=_hash(style),
        script_hash=_hash(script),
    )


@dataclass(frozen=True, slots=True)
class _Section:
    name: str
    title: str
    lead: str
    drawings: tuple[tuple[Picture, str], ...]
    sheets: tuple[Sheet, ...]


def _sections(report: Report) -> Iterable[_Section]:
    tables = {sheet.name: sheet for sheet in (*report.results, *report.runs, *report.explanations)}
    for name, (title, wanted, lead) in SECTIONS.items():
        drawings = tuple(
            (picture, base64.b64encode(render(picture.figure, "svg")).decode())
            for picture in report.pictures
            if picture.section == name
        )
        found = tuple(tables[sheet] for sheet in wanted if sheet in tables)
        if drawings or found:
            yield _Section(name, title, lead, drawings, found)


def _facts(found: Correlations) -> tuple[str, ...]:
    table = found.runs
    reasons = "; ".join(f"{len(runs):,} {reason}" for reason, runs in by_reason(table.excluded).items())
    left_out = f"left out: {len(table.excluded):,} ({reasons})" if reasons else "no run was left out"
    return (
        *found.conclusion,
        f"{table.num_runs:,} runs of {found.num_settings:,} settings; {left_out}.",
        *(f"{note}." for note in (*table.notes, *found.notes)),
    )


def _cautions(statistics: Correlations, unread: dict[str, str]) -> tuple[str, ...]:
    said = statistics.warnings or {}
    found = [f"{name}: {warning}." for name, warnings in said.items() for warning in warnings]
    if unread:
        run, reason = next(iter(unread.items()))
        found.append(f"Runs without a readable training curve: {len(unread):,}, the first {run}: {reason}.")
    return tuple(found)


def _breakable(text: str) -> Markup:
    """``text``, escaped, that may go on in another line after an underscore."""
    return escape(text).replace("_", Markup("_<wbr>"))


def _part(name: str) -> str:
    return files("gm_probe.analysis").joinpath("page", name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    """As a content security policy names inline text that it allows."""
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"
