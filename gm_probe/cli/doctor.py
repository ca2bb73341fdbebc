"""``gmprobe doctor``: what this machine has, what is missing, and the command that mends it."""

from __future__ import annotations

import sys
from dataclasses import asdict
from itertools import groupby
from pathlib import Path

import click

from gm_probe.cli.options import data_root_option, device_option, json_option
from gm_probe.cli.output import print_json, results_console, table
from gm_probe.cli.param_types import PATH

MARKS = {"ok": "ok", "absent": "–", "broken": "WRONG"}


@click.command(epilog="Example:  gmprobe doctor --out runs/")
@click.option(
    "--out",
    type=PATH,
    default=Path(),
    show_default=True,
    help="Folder that runs will be written to; it is tested and left unchanged.",
)
@data_root_option
@device_option
@json_option
def doctor(out: Path, data_root: Path | None, device: str, as_json: bool) -> None:
    """Check what gmprobe needs on this machine, and say how to fix what is missing.

    It lists versions and extras, devices, threads, the data sets on this machine, and whether --out can be
    written and locked. Exit code 0: everything required works. 6: a required library or the --device is
    missing or too old. 7: --out cannot be written.
    """
    from gm_probe.cli.health import diagnose

    findings = list(diagnose(out, data_root, device))
    code = next((finding.exit_code for finding in findings if finding.exit_code), 0)
    if as_json:
        print_json({"exit_code": code, "findings": list(map(asdict, findings))})
    else:
        console = results_console()
        for section, group in groupby(findings, key=lambda finding: finding.section):
            rows = [
                [MARKS[f.state], f.name, f"{f.found}\n→ {f.remedy}" if f.remedy else f.found] for f in group
            ]
            listing = table(section, ["", "", ""], rows, left=True)
            listing.show_header = False
            console.print(listing)
    sys.exit(code)
