"""``gmprobe correlate``: does a measure follow the gap over many runs?"""

from pathlib import Path
from typing import TYPE_CHECKING

import click

from gm_probe.cli.output import (
    FIGURE_SUFFIXES,
    format_options,
    note,
    notes_console,
    print_csv,
    print_json,
)
from gm_probe.cli.param_types import PATH
from gm_probe.cli.selection import (
    control_option,
    converged_only_option,
    measures_option,
    names,
    require_defined,
    seed_column_option,
    source_argument,
    table_of,
    target_option,
    targets_of,
)
from gm_probe.cli.statistics import as_json, as_rows, print_answer, print_details, warnings
from gm_probe.errors import UsageError
from gm_probe.tables.sources import beside, require_source

if TYPE_CHECKING:  # pandas and scipy take a second to import, which --help must not wait for
    from gm_probe.analysis.results import Correlations


@click.command(epilog="Example:  gmprobe correlate runs/ --group-by weight_decay")
@source_argument
@measures_option
@click.option(
    "--hyper",
    metavar="A,B",
    default="",
    help="Use these hyperparameters; --json lists them.  [default: settings that vary]",
)
@click.option(
    "--group-by",
    metavar="A,B",
    help="Also correlate within each subgroup of these settings.  [default: those of the sweep's recipe]",
)
@seed_column_option
@target_option
@converged_only_option
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
@control_option
@format_options
def correlate(
    source: Path,
    measures: str,
    hyper: str,
    group_by: str | None,
    gap: str,
    seed_column: str,
    converged_only: bool,
    figure_path: Path | None,
    no_figure: bool,
    details: bool,
    control: str,
    output: str | None,
    quiet: bool,
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

    A scatter plot (PNG) is written beside SOURCE. With --json or --csv it is written only if
    --figure asks for it.
    """
    if no_figure and figure_path is not None:
        raise UsageError("--figure and --no-figure exclude each other; give one")
    wanted = figure_path is not None or not (no_figure or output)
    paths = _figure_paths(source, figure_path) if wanted else []
    require_source(source)
    from gm_probe.tables.runs import recipe_groups

    by = recipe_groups(source) if group_by is None else names(group_by)
    if by and group_by is None:
        _say(f"subgroups by {', '.join(by)}, as the sweep's recipe says (--group-by chooses others)", quiet)
    table = table_of(
        source, measures, hyper, by, gap=gap, seed_column=seed_column, converged_only=converged_only
    )
    from gm_probe.analysis import correlation  # scipy, which a wrong table must not wait for

    more = details or output is not None
    found = correlation.correlate(
        table, targets=targets_of(gap), group_by=by, controls=names(control), details=more
    )
    _print(found, output, details=details, quiet=quiet)
    require_defined(found, "the result")
    if paths:
        from gm_probe.analysis import design, plots

        groups = design.group_rows(table, table.named(by)) if by else {}
        plots.write_figure(plots.scatter_panels(found, groups), paths)
        _say(f"figure: {', '.join(map(str, paths))}", quiet)


def _print(found: "Correlations", output: str | None, *, details: bool, quiet: bool) -> None:
    if output == "json":
        print_json(as_json(found))
    elif output == "csv":
        print_csv(as_rows(found))
    else:
        print_answer(found)
        if details:
            print_details(found)
    _print_notes(found, quiet)
    for text in warnings(found) if output else ():
        _say(f"warning: {text}", quiet)


def _figure_paths(source: Path, chosen: Path | None) -> list[Path]:
    """The files to write; a suffix chooses one format, none all three. A PNG is written unless told."""
    if chosen is None:
        return [beside(source, "correlate.png")]
    if chosen.suffix.lower() in FIGURE_SUFFIXES:
        return [chosen]
    if chosen.suffix:
        raise UsageError(f"--figure {chosen}: no format {chosen.suffix!r}; use .png, .pdf, .svg or no suffix")
    return [chosen.with_name(chosen.name + suffix) for suffix in FIGURE_SUFFIXES]


def _say(text: str, quiet: bool) -> None:
    note(notes_console(quiet), text)


def _print_notes(found: "Correlations", quiet: bool) -> None:
    from gm_probe.tables.table import by_reason

    for text in (*found.runs.notes, *found.notes):
        _say(text, quiet)
    if found.excluded:
        total = found.runs.num_runs + len(found.excluded)
        reasons = [f"{len(runs)} {reason}" for reason, runs in by_reason(found.excluded).items()]
        more = f" and {len(reasons) - 3} more reasons" if len(reasons) > 3 else ""
        _say(
            f"excluded {len(found.excluded)} of {total} runs ({'; '.join(reasons[:3])}{more}); --json names them",
            quiet,
        )
