"""``gmprobe correlate``: does a measure follow the gap over many runs?"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from gm_probe.cli.correlate_output import as_json, as_rows, print_answer, print_details, warnings
from gm_probe.cli.options import format_options
from gm_probe.cli.output import FIGURE_SUFFIXES, note, notes_console, print_as
from gm_probe.cli.param_types import PATH, split
from gm_probe.cli.table_options import TableOptions, groups_of, require_defined, table_options
from gm_probe.errors import UsageError
from gm_probe.tables.sources import beside, require_source

if TYPE_CHECKING:  # pandas and scipy take a second to import, which --help must not wait for
    from gm_probe.analysis.results import Correlations


@click.command(epilog="Example:  gmprobe correlate runs/ --group-by weight_decay")
@table_options
@click.option(
    "--group-by",
    metavar="A,B",
    help="Also correlate within each subgroup of these settings.  [default: those of the sweep's recipe]",
)
@click.option(
    "--figure",
    "figure_path",
    metavar="PATH",
    type=PATH,
    help="Write the figure to this .png, .pdf or .svg file; without a suffix, write all three.  [default: "
    "a .png beside SOURCE; none with --json or --csv]",
)
@click.option("--no-figure", is_flag=True, help="Write no figure.")
@click.option(
    "--details", is_flag=True, help="Also print every statistic; --json and --csv always have them."
)
@format_options
def correlate(
    group_by: str | None,
    figure_path: Path | None,
    no_figure: bool,
    details: bool,
    output: str | None,
    quiet: bool,
    **options: Any,
) -> None:
    """Tell whether each measure follows the generalization gap over many runs.

    SOURCE is a folder of run folders (runs/ unless given), a folder or database of MLflow, Lightning or
    Hugging Face, or a .csv, .tsv, .jsonl or .parquet file with one run per row: columns error_gap (test
    error − train error) and/or ce_gap (the same for cross-entropy), one column per measure, and one per
    hyperparameter. --target takes any column, or makes one of several. Only finished and measured runs enter; every
    other run is counted and listed with its reason. In a file, the measures are all numeric columns except
    settings, identifiers and dates. A note on stderr lists them.

    Each line gives Kendall's τ with a 95 % interval and its p, and what picking the run with the smallest
    measure (or the largest, where larger is better) costs in test error. Intervals count runs that agree in
    every hyperparameter as repeats of one setting, and cover the choice of seeds that settings share. Sentences
    at the end draw the conclusion. --details adds τ within groups, granulated ψ, partial τ, differences between
    measures, Spearman's ρ, conditional mutual information and sign errors.

    A scatter plot (PNG) is written beside SOURCE; with --json or --csv only if --figure asks for it.
    """
    asked, say = TableOptions(**options), partial(note, notes_console(quiet))
    if no_figure and figure_path is not None:
        raise UsageError("--figure and --no-figure exclude each other; give one")
    wanted = figure_path is not None or not (no_figure or output)
    paths = _figure_paths(asked.source, figure_path) if wanted else []
    require_source(asked.source)
    from gm_probe.tables.runs import recipe_groups

    by = recipe_groups(asked.source) if group_by is None else split(group_by)
    if by and group_by is None:
        say(f"subgroups by {', '.join(by)}, as the sweep's recipe says (--group-by chooses others)")
    table = asked.table(by)
    found = asked.correlate(table, by, details=details or output is not None)
    if output:
        print_as(output, as_json(found), as_rows(found))
    else:
        print_answer(found)
        if details:
            print_details(found)
    for text in _notes(found, output):
        say(text)
    require_defined(found, "the result")
    if paths:
        from gm_probe.analysis import plots
        from gm_probe.analysis.scatter import scatter_panels

        plots.write_figure(scatter_panels(found, groups_of(table, by)), paths)
        say(f"figure: {', '.join(map(str, paths))}")


def _figure_paths(source: Path, chosen: Path | None) -> list[Path]:
    """Return the files to write. A suffix chooses one format, none chooses all three; the default is one PNG."""
    if chosen is None:
        return [beside(source, "correlate.png")]
    if chosen.suffix.lower() in FIGURE_SUFFIXES:
        return [chosen]
    if chosen.suffix:
        raise UsageError(f"--figure {chosen}: no format {chosen.suffix!r}; use .png, .pdf, .svg or no suffix")
    return [chosen.with_name(chosen.name + suffix) for suffix in FIGURE_SUFFIXES]


def _notes(found: Correlations, output: str | None) -> Iterator[str]:
    """Yield how the runs were read, which were left out and, where no table says it, what is not comparable."""
    from gm_probe.tables.table import by_reason

    yield from (*found.runs.notes, *found.notes)
    if found.excluded:
        total = found.runs.num_runs + len(found.excluded)
        reasons = [f"{len(runs)} {reason}" for reason, runs in by_reason(found.excluded).items()]
        more = f" and {len(reasons) - 3} more reasons" if len(reasons) > 3 else ""
        shown = f"{'; '.join(reasons[:3])}{more}"
        yield f"excluded {len(found.excluded)} of {total} runs ({shown}); --json names them"
    yield from (f"warning: {text}" for text in warnings(found) if output)
