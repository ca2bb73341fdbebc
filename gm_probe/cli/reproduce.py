"""``gmprobe reproduce``: the paper's tables and figures, each with what came out here."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import click

from gm_probe.cli.options import (
    data_root_option,
    device_option,
    download_option,
    jobs_option,
    json_option,
    quiet_option,
)
from gm_probe.cli.output import note, notes_console, print_json, results_console, table
from gm_probe.cli.param_types import PATH, Choice
from gm_probe.errors import UsageError
from gm_probe.reproduce.catalogue import SCALES, paper_recipe, paper_recipes


@click.command(epilog="Example:  gmprobe reproduce fig6 --scale smoke")
@click.argument("name", required=False)
@click.option(
    "--scale",
    type=Choice(SCALES),
    help="Scale of the study. smoke takes seconds; small runs the same axes on 2 cores; paper uses the "
    "paper's setting.  [default: small, or paper where that is as cheap; none for studies that need "
    "a GPU]",
)
@click.option("--out", type=PATH, help="Folder to write to.  [default: reproduce/NAME-SCALE]")
@click.option("--data", help="Use this image folder, file or data set instead of the recipe's data.")
@click.option(
    "--only",
    metavar="LABEL",
    help="Use only this data set of a table, named as in its column, such as CIFAR-10.",
)
@data_root_option
@download_option
@jobs_option
@device_option
@click.option(
    "--list", "listing", is_flag=True, help="List every table and figure with its claim, scales and cost."
)
@json_option
@quiet_option
def reproduce(
    name: str | None,
    scale: str | None,
    out: Path | None,
    data: str | None,
    only: str | None,
    data_root: Path | None,
    download: bool,
    jobs: int,
    device: str,
    listing: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Reproduce table or figure NAME of the paper (--list lists them).

    The command writes a folder with the figure (PNG, SVG), its numbers (CSV), tables (Markdown, LaTeX) and
    NAME.md. NAME.md states a test, says whether the paper's claim holds in it, and gives the paper's own
    numbers. Run the same command again to continue where it stopped.
    """
    if listing:
        if name is not None:
            raise UsageError("--list takes no NAME")
        _list(as_json)
        return
    if name is None:
        raise UsageError("give NAME, or use --list to see all names")
    chosen = paper_recipe(name)
    scale = scale or chosen.default
    chosen.at(scale)
    from gm_probe.reproduce.finding import Task
    from gm_probe.reproduce.finding import reproduce as run

    console = notes_console(quiet)
    name = chosen.name
    folder = out or Path("reproduce") / f"{name}-{scale}"
    note(console, f"{chosen.title}: {scale}, about {chosen.costs[scale]}")
    root = None if data_root is None else str(data_root)
    task = Task(name, scale, folder, data, jobs, device, root, download, only, partial(note, console))
    found, paths = run(task)
    if as_json:
        said = {key: getattr(found, key) for key in ("outcome", "text", "untested")}
        files = [path.name for path in paths]
        print_json({"name": name, "scale": scale, **said, "out": str(folder), "files": files})
        return
    console = results_console()
    for text in (f"Claim: {chosen.claim}", f"{found.verdict} {found.text}"):
        note(console, text)
    note(notes_console(quiet), f"written: {folder}/{{{', '.join(path.name for path in paths)}}}")


def _list(as_json: bool) -> None:
    found = paper_recipes()
    if as_json:
        print_json(
            [
                {key: getattr(r, key) for key in ("name", "also", "title", "claim")}
                | {"scales": dict(r.costs)}
                for r in found.values()
            ]
        )
        return
    rows = []
    for r in found.values():
        costs = "\n".join(f"{scale}: {cost}" for scale, cost in r.costs.items())
        rows.append(["\n".join([r.name, *r.also]), r.claim, costs])
    listing = table(None, ["name", "claim", "scales and their cost"], rows, left=True)
    listing.show_lines = True
    results_console().print(listing)
