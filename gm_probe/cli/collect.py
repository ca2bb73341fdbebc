"""``gmprobe collect``: one table of all runs, for `correlate`, a spreadsheet or pandas."""

from __future__ import annotations

from pathlib import Path

import click

from gm_probe.cli.output import note, notes_console


@click.command(epilog="Example:  gmprobe collect runs/ --out table.csv")
@click.argument("folder", type=click.Path(path_type=Path))
@click.option(
    "--out", type=click.Path(path_type=Path), required=True, help="The table: a .csv or .parquet file."
)
@click.option("-q", "--quiet", is_flag=True, help="No notes on stderr.")
def collect(folder: Path, out: Path, quiet: bool) -> None:
    """Write every run in FOLDER as one row: state, settings, errors and gaps, measures with their uncertainties.

    At any time, also while the sweep runs: call it again for what has come since. `gmprobe correlate` reads the
    table as it reads the folder.
    """
    from gm_probe.analysis.collect import write_table

    frame = write_table(folder, out)
    counts = ", ".join(f"{count} {state}" for state, count in frame["status"].value_counts().items())
    click.echo(f"{len(frame)} runs into {out}: {counts}")
    if not quiet:
        note(notes_console(), f"next:  gmprobe correlate {out}")
