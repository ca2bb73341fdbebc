"""``gmprobe collect``: one table of all runs, for `correlate`, a spreadsheet or pandas."""

from __future__ import annotations

from pathlib import Path

import click

from gm_probe.cli.options import quiet_option
from gm_probe.cli.output import echo, note, notes_console
from gm_probe.cli.param_types import PATH
from gm_probe.runs.records import RUNS


@click.command(epilog="Example:  gmprobe collect runs/ --out table.csv")
@click.argument("folder", type=PATH, default=RUNS)
@click.option(
    "--out",
    type=PATH,
    help="Write the table to this .csv or .parquet file.  [default: table.csv in FOLDER]",
)
@quiet_option
def collect(folder: Path, out: Path | None, quiet: bool) -> None:
    """Write every run in FOLDER as one row: state, settings, errors and gaps, measures with their uncertainties.

    FOLDER is runs/ unless given. The command works at any time, also while the sweep runs; call it again to
    add new results. `gmprobe correlate` reads the table as it reads the folder.
    """
    from gm_probe.tables.collect import write_table

    out = out or folder / "table.csv"
    frame = write_table(folder, out)
    counts = ", ".join(f"{count} {state}" for state, count in frame["status"].value_counts().items())
    echo(f"{len(frame)} runs into {out}: {counts}")
    if not quiet:
        note(notes_console(), f"next:  gmprobe correlate {out}")
