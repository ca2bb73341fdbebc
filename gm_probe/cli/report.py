"""``gmprobe report``: one self-contained HTML page over many runs."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from gm_probe.cli.options import quiet_option
from gm_probe.cli.output import FIGURE_SUFFIXES, note, notes_console
from gm_probe.cli.param_types import PATH, split
from gm_probe.cli.table_options import TableOptions, groups_of, require_defined, table_options
from gm_probe.errors import UsageError
from gm_probe.tables.sources import beside, require_source

if TYPE_CHECKING:
    from gm_probe.analysis.report import Report


@click.command(epilog="Example:  gmprobe report runs/ --group-by weight_decay --out report.html")
@table_options
@click.option(
    "--out",
    metavar="FILE.html",
    type=PATH,
    help="Write the page to this file.  [default: report.html in SOURCE, or beside a file]",
)
@click.option("--markdown", metavar="FILE", type=PATH, help="Also write the tables as Markdown to this file.")
@click.option(
    "--latex",
    metavar="FILE",
    type=PATH,
    help="Also write the tables as LaTeX (booktabs) to this file.",
)
@click.option(
    "--figures",
    metavar="DIR",
    type=PATH,
    help="Also write every figure as PNG, PDF and SVG into this folder.",
)
@click.option(
    "--group-by",
    metavar="A,B",
    default="",
    help="Form subgroups by these settings, and show each in its own colour.",
)
@click.option(
    "--markers", metavar="A,B", default="", help="Show the values of these settings by different markers."
)
@quiet_option
@click.pass_context
def report(
    ctx: click.Context,
    out: Path | None,
    markdown: Path | None,
    latex: Path | None,
    figures: Path | None,
    group_by: str,
    markers: str,
    quiet: bool,
    **options: Any,
) -> None:
    """Write one HTML page about many runs: figures, statistics, definitions, versions, exclusions.

    SOURCE is what `gmprobe correlate` takes: a folder of run folders (runs/ unless given), the files of
    another tracker, or a table with one run per row. The page is self-contained: it opens without a
    network, and works on a phone, by keyboard, in dark mode and on paper.
    """
    asked = TableOptions(**options)
    require_source(asked.source)
    out = _page(asked.source, out)
    _require_distinct({"SOURCE": asked.source, "--out": out, "--markdown": markdown, "--latex": latex})
    by, shape_by = split(group_by), split(markers)
    table = asked.table([*by, *shape_by])
    # imported late: an error in the table must not wait for scipy
    from gm_probe.analysis.report import compose, html
    from gm_probe.files.atomic import write_atomic

    found = asked.correlate(table, by)
    page = compose(
        found, groups=groups_of(table, by), shapes=groups_of(table, shape_by), command=_command(ctx)
    )
    write_atomic(out, html(page).encode(errors="replace"))
    written = [str(out), *_beside(page, markdown, latex, figures)]
    note(notes_console(quiet), f"report: {', '.join(written)}")
    require_defined(found, str(out))


def _beside(page: Report, markdown: Path | None, latex: Path | None, figures: Path | None) -> Iterator[str]:
    """Write the page's tables and pictures to files of their own; yield what was written."""
    from gm_probe.analysis import plots, typeset
    from gm_probe.files.atomic import write_atomic

    for path, text in ((markdown, typeset.markdown), (latex, typeset.latex)):
        if path is not None:
            write_atomic(path, text(page.printed).encode(errors="replace"))
            yield str(path)
    if figures is not None:
        for picture in page.pictures:
            plots.write_figure(
                picture.figure, [figures / f"{picture.name}{suffix}" for suffix in FIGURE_SUFFIXES]
            )
        yield f"{len(page.pictures)} figures in {figures}"


def _page(source: Path, chosen: Path | None) -> Path:
    if chosen is None:
        return beside(source, "report.html")
    if chosen.suffix.lower() not in (".html", ".htm"):
        raise UsageError(f"--out {chosen}: the report is an HTML page; choose a name that ends in .html")
    return chosen


def _require_distinct(paths: dict[str, Path | None]) -> None:
    """Raise UsageError where one file would be written over another, or over what is read."""
    seen: dict[Path, str] = {}
    for name, path in paths.items():
        if path is not None and (other := seen.setdefault(path.resolve(), name)) != name:
            raise UsageError(f"{name} {path} is {other} too; give each its own file")


def _command(ctx: click.Context) -> str:
    """Return what the user typed, without options at their defaults."""
    words = ["gmprobe", "report"]
    for parameter in ctx.command.params:
        name = str(parameter.name)
        if ctx.get_parameter_source(name) is not ParameterSource.COMMANDLINE:
            continue
        value = ctx.params[name]
        if isinstance(parameter, click.Argument):
            words.append(str(value))
        elif isinstance(parameter, click.Option) and parameter.is_flag:
            words.append(parameter.opts[-1])
        else:
            words.append(f"{parameter.opts[-1]}={value}")
    return shlex.join(words)
