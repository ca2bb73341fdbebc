"""``gmprobe correlate``: statistics, a table and a figure over many runs."""

from pathlib import Path
from typing import TYPE_CHECKING

import click

from gm_probe.analysis.requests import require_statistics
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
    gap_option,
    measures_option,
    names,
    resamples_option,
    seed_column_option,
    seed_option,
    skip_option,
    source_argument,
)
from gm_probe.cli.statistics import as_json, as_rows, print_details, print_tables, warnings
from gm_probe.errors import DataError, UsageError
from gm_probe.tables.sources import beside, require_source
from gm_probe.tables.table import GAPS

if TYPE_CHECKING:  # pandas and scipy take a second to import, which --help must not wait for
    from gm_probe.analysis.results import SweepStatistics
    from gm_probe.tables.table import RunTable


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
@gap_option
@seed_column_option
@converged_only_option
@click.option(
    "--figure",
    "figure_path",
    metavar="PATH",
    type=PATH,
    help="Write the figure to this .png, .pdf or .svg file; without a suffix, write all three.  [default: "
    "beside SOURCE; none with --json or --csv]",
)
@click.option("--no-figure", is_flag=True, help="Write no figure.")
@click.option(
    "--details", is_flag=True, help="Print every statistic instead of τ alone; --json always has them."
)
@control_option
@skip_option
@seed_option
@resamples_option
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
    skip: str,
    seed: int,
    resamples: int,
    output: str | None,
    quiet: bool,
) -> None:
    """Correlate each measure with the generalization gap over many runs.

    SOURCE is a folder of run folders (runs/ unless given), a folder or database of MLflow, Lightning or
    Hugging Face, or a .csv, .tsv, .jsonl or .parquet file with one run per row: columns error_gap (test
    error − train error) and/or ce_gap (the same for cross-entropy), one column per measure, and one per
    hyperparameter. --gap makes another gap of any columns. Only finished and measured runs enter; every
    other run is counted and listed with its reason. In a file, the measures are all numeric columns except
    settings, identifiers and dates. A note on stderr lists them.

    The statistic is Kendall's τ-b, over all runs and within each --group-by subgroup, with a 95 % interval
    and a p-value. Both treat settings as independent, and the seeds of one setting as repeats. Runs that
    agree in every hyperparameter form one setting. --details adds τ between and within settings and
    subgroups, with a flag for Simpson's paradox, and τ over pairs beyond sampling noise. It also adds
    partial τ, granulated ψ, conditional mutual information, sign errors, prediction, selection, and
    differences between measures.

    Runs whose measures were taken with different settings (ρ, data, labels, ...) are not comparable; the
    result then names the settings that differ.

    A scatter plot (PNG, PDF, SVG) is written beside SOURCE. With --json or --csv it is written only if
    --figure asks for it.
    """
    if details and output:
        raise UsageError(
            "--details is for the printed tables; leave it out. --json has every statistic, --csv the "
            "main ones"
        )
    if no_figure and figure_path is not None:
        raise UsageError("--figure and --no-figure exclude each other; give one")
    wanted = figure_path is not None or not (no_figure or output)
    paths = _figure_paths(source, figure_path) if wanted else []
    require_source(source)
    require_statistics(names(skip), resamples)
    from gm_probe.tables import runs

    by = runs.recipe_groups(source) if group_by is None else names(group_by)
    if by and group_by is None:
        _say(f"subgroups by {', '.join(by)}, as the sweep's recipe says (--group-by chooses others)", quiet)
    found = runs.load_table(
        source,
        names(measures),
        names(hyper),
        by,
        gap=gap,
        seed_column=seed_column,
        converged_only=converged_only,
    )
    from gm_probe.analysis import correlation  # scipy, which a wrong table must not wait for

    by, controls = found.named(by), found.named(names(control))
    gaps = (gap,) if gap in GAPS else found.gaps
    statistics = correlation.correlate(
        found, gaps, by, controls=controls, seed=seed, resamples=resamples, skip=names(skip)
    )

    if output == "json":
        print_json(as_json(found, statistics))
    elif output == "csv":
        print_csv(as_rows(statistics))
    else:
        print_tables(statistics, gaps)
        if details:
            print_details(statistics, gaps)
    _print_notes(found, statistics, quiet)
    measured = [result for measure in statistics.measures for result in measure.gaps.values()]
    if all(result.tau is None for result in measured):
        raise DataError(f"no measure in {source} has a defined τ; the result gives the reasons")
    if paths:
        from gm_probe.analysis import plots

        groups = correlation.group_rows(found, by) if by else {}
        plots.write_figure(plots.scatter_panels(found, statistics.measures, gaps, groups), paths)
        _say(f"figure: {', '.join(map(str, paths))}", quiet)


def _figure_paths(source: Path, chosen: Path | None) -> list[Path]:
    """The files to write; a suffix chooses one format, none all three."""
    if chosen is None:
        chosen = beside(source, "correlate")
    elif chosen.suffix.lower() in FIGURE_SUFFIXES:
        return [chosen]
    elif chosen.suffix:
        raise UsageError(f"--figure {chosen}: no format {chosen.suffix!r}; use .png, .pdf, .svg or no suffix")
    return [chosen.with_name(chosen.name + suffix) for suffix in FIGURE_SUFFIXES]


def _say(text: str, quiet: bool) -> None:
    note(notes_console(quiet), text)


def _print_notes(found: "RunTable", statistics: "SweepStatistics", quiet: bool) -> None:
    from gm_probe.tables.table import by_reason

    for text in (*found.notes, *statistics.notes):
        _say(text, quiet)
    if found.excluded:
        total = found.num_runs + len(found.excluded)
        _say(f"excluded {len(found.excluded)} of {total} runs:", quiet)
        for reason, left_out in by_reason(found.excluded).items():
            shown = ", ".join(left_out[:5]) + (
                f" and {len(left_out) - 5} more (--json)" if len(left_out) > 5 else ""
            )
            _say(f"  {len(left_out)} {reason}: {shown}", quiet)
    for warning in warnings(statistics.measures):
        _say(f"warning: {warning}", quiet)
    for measure in statistics.measures:
        for text in measure.notes:
            _say(f"{measure.name}: {text}", quiet)
