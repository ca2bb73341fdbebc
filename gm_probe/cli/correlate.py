"""``gmprobe correlate``: statistics, a table and a figure over many runs."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from gm_probe.cli.output import (
    FIGURE_SUFFIXES,
    format_options,
    notes_console,
    number,
    print_csv,
    print_json,
    results_console,
    table,
)
from gm_probe.core.errors import DataError, UsageError

if TYPE_CHECKING:  # pandas and scipy take a second to import, which --help must not wait for
    from gm_probe.analysis.correlation import Correlation, MeasureStatistics
    from gm_probe.analysis.table import Exclusion, RunTable

LEGEND = (
    "p (naive) takes runs as independent, which seeds of one setting are not.\n"
    "ties: pairs of runs equal in the measure / equal in the gap."
)


@click.command(epilog="Example:  gmprobe correlate runs/ --group-by weight_decay")
@click.argument("source", type=click.Path(path_type=Path))
@click.option("--measures", metavar="A,B", default="", help="Measures to use. Default: all there are.")
@click.option(
    "--hyper",
    metavar="A,B",
    default="",
    help="Hyperparameters, as --json lists. Default: settings that vary.",
)
@click.option("--group-by", metavar="A,B", default="", help="Also within each subgroup of these settings.")
@click.option("--gap", type=click.Choice(["error_gap", "ce_gap", "both"]), default="both", show_default=True)
@click.option(
    "--converged-only",
    is_flag=True,
    help="Leave out runs whose training ended before it reached its stop_ce (they are counted).",
)
@click.option(
    "--figure",
    "figure_path",
    metavar="PATH",
    type=click.Path(path_type=Path),
    help="Figure file: .png, .pdf or .svg; no suffix writes all three. Default: beside SOURCE, "
    "or none with --json and --csv.",
)
@click.option("--no-figure", is_flag=True, help="Write no figure.")
@format_options
def correlate(
    source: Path,
    measures: str,
    hyper: str,
    group_by: str,
    gap: str,
    converged_only: bool,
    figure_path: Path | None,
    no_figure: bool,
    output: str | None,
    quiet: bool,
) -> None:
    """Correlate each measure with the generalization gap over many runs.

    SOURCE is a folder of run folders, or a .csv or .parquet file with one run a row: columns error_gap
    (test error − train error) and/or ce_gap (the same for cross-entropy), one a measure, one a
    hyperparameter. Only finished and measured runs enter; every other run is counted and listed with its
    reason. Of a file, the columns that bear a measure's name are taken, or else every numeric column that is
    not a setting or an identifier; stderr says which.

    The statistic is Kendall's τ-b, of all runs and of each --group-by subgroup. Its p is naive: it takes
    runs as independent, which seeds of one setting are not, so it is too small where settings repeat.

    Runs whose measures were taken with different settings (ρ, data, labels, ...) are not comparable: the
    result then says which settings differ.

    A scatter figure (PNG, PDF, SVG) is written beside SOURCE; with --json or --csv only where --figure asks
    for it.
    """
    from gm_probe.analysis import correlation, runs

    if no_figure and figure_path is not None:
        raise UsageError("--figure and --no-figure exclude each other; give one")
    wanted = figure_path is not None or not (no_figure or output)
    paths = _figure_paths(source, figure_path) if wanted else []
    by = _names(group_by)
    found = runs.load_table(source, _names(measures), _names(hyper), by, converged_only=converged_only)
    gaps = found.gaps if gap == "both" else (gap,)
    statistics = correlation.correlate(found, gaps, by)

    if output == "json":
        print_json(_as_json(found, statistics))
    elif output == "csv":
        print_csv(_as_rows(statistics))
    else:
        _print_tables(statistics, gaps)
    _print_notes(found, statistics, quiet)
    if all(result.tau is None for measure in statistics for result in measure.gaps.values()):
        raise DataError(f"no measure in {source} has a defined τ; the reasons stand in the result")
    if paths:
        from gm_probe.analysis import plots

        groups = correlation.group_rows(found, by) if by else {}
        plots.write_figure(plots.scatter_panels(found, statistics, gaps, groups), paths)
        _say(f"figure: {', '.join(map(str, paths))}", quiet)


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _figure_paths(source: Path, chosen: Path | None) -> list[Path]:
    """The files to write; a suffix chooses one format, none all three."""
    if chosen is None:
        chosen = source / "correlate" if source.is_dir() else source.with_name(f"{source.stem}-correlate")
    elif chosen.suffix.lower() in FIGURE_SUFFIXES:
        return [chosen]
    elif chosen.suffix:
        raise UsageError(f"--figure {chosen}: no format {chosen.suffix!r}; use .png, .pdf, .svg or no suffix")
    return [chosen.with_name(chosen.name + suffix) for suffix in FIGURE_SUFFIXES]


def _as_json(found: "RunTable", statistics: Sequence["MeasureStatistics"]) -> dict[str, Any]:
    return {
        "num_runs": found.num_runs,
        "excluded": _excluded(found.excluded),
        "hyperparameters": list(found.hyperparameters),
        "measures": {
            measure.name: {
                "labels": measure.labels,
                **{gap: _figures(result) for gap, result in measure.gaps.items()},
                "notes": [*measure.warnings, *measure.notes],
                "subgroups": {
                    label: {gap: _figures(result) for gap, result in gaps.items()}
                    for label, gaps in measure.subgroups.items()
                },
            }
            for measure in statistics
        },
    }


def _figures(result: "Correlation") -> dict[str, Any]:
    figures: dict[str, Any] = {
        "tau": result.tau,
        "p_naive": result.p_naive,
        "n": result.n,
        "ties_measure": result.ties_measure,
        "ties_gap": result.ties_gap,
        "missing": _excluded(result.missing),
    }
    return figures if result.reason is None else {**figures, "reason": result.reason}


def _excluded(exclusions: Sequence["Exclusion"]) -> list[dict[str, str]]:
    return [{"run": exclusion.run, "reason": exclusion.reason} for exclusion in exclusions]


def _as_rows(statistics: Sequence["MeasureStatistics"]) -> list[dict[str, Any]]:
    """One row a measure, subgroup (empty: all runs) and gap, for ``--csv``."""
    rows = []
    for measure in statistics:
        for subgroup, gaps in [("", measure.gaps), *measure.subgroups.items()]:
            for gap, result in gaps.items():
                figures = {**_figures(result), "missing": len(result.missing), "reason": result.reason}
                place = {"measure": measure.name, "labels": measure.labels, "subgroup": subgroup, "gap": gap}
                rows.append({**place, **figures})
    return rows


def _print_tables(statistics: Sequence["MeasureStatistics"], gaps: Sequence[str]) -> None:
    """One table a gap: side by side they would not fit 60 columns."""
    from gm_probe.analysis.table import GAPS

    console = results_console()
    for gap in gaps:
        rows, undefined = [], []
        for measure in statistics:
            labels = f" ({measure.labels} labels)" if measure.labels else ""
            for subgroup, results in [(None, measure.gaps), *measure.subgroups.items()]:
                result = results[gap]
                name = measure.name + labels if subgroup is None else f"  {subgroup}"
                ties = f"{result.ties_measure}/{result.ties_gap}"
                rows.append((name, number(result.tau, 3), number(result.p_naive, 2), str(result.n), ties))
                if result.reason is not None:
                    place = measure.name if subgroup is None else f"{measure.name}, {subgroup}"
                    undefined.append(f"{place}: τ undefined, {result.reason}")
        grid = table(f"{gap}: {GAPS[gap]}", ("measure", "τ-b", "p (naive)", "n", "ties"), rows)
        console.print(grid)
        for line in undefined:
            console.print(line, markup=False, highlight=False)
    for line in _warnings(statistics):
        console.print(line, style="bold", markup=False, highlight=False)
    console.print(LEGEND, style="dim", markup=False, highlight=False)


def _warnings(statistics: Sequence["MeasureStatistics"]) -> list[str]:
    """One line a warning, under the names of all the measures that it holds for."""
    names: dict[str, list[str]] = {}
    for measure in statistics:
        for warning in measure.warnings:
            names.setdefault(warning, []).append(measure.name)
    return [f"{', '.join(measures)}: {warning}" for warning, measures in names.items()]


def _print_notes(found: "RunTable", statistics: Sequence["MeasureStatistics"], quiet: bool) -> None:
    from gm_probe.analysis.table import by_reason

    for note in found.notes:
        _say(note, quiet)
    if found.excluded:
        total = found.num_runs + len(found.excluded)
        _say(f"excluded {len(found.excluded)} of {total} runs:", quiet)
        for reason, names in by_reason(found.excluded).items():
            shown = ", ".join(names[:5]) + (f" and {len(names) - 5} more (--json)" if len(names) > 5 else "")
            _say(f"  {len(names)} {reason}: {shown}", quiet)
    for warning in _warnings(statistics):
        _say(f"warning: {warning}", quiet)
    for measure in statistics:
        for note in measure.notes:
            _say(f"{measure.name}: {note}", quiet)


def _say(text: str, quiet: bool) -> None:
    notes_console(quiet).print(text, markup=False, soft_wrap=True)
