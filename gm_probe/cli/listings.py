"""``gmprobe models | datasets | measures | recipes``: what there is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import click
from rich.padding import Padding
from rich.text import Text

from gm_probe.cli.options import json_option
from gm_probe.cli.output import echo, number, print_json, results_console, say, table

NARROW = 100
"""Columns below which names and definitions do not fit beside each other."""


@click.command(epilog="Example:  gmprobe models")
@json_option
def models(as_json: bool) -> None:
    """List the models that --model takes."""
    from gm_probe.models.zoo import BUILT_IN, MODELS, num_parameters

    sizes = {name: num_parameters(name) for name in BUILT_IN}
    if as_json:
        print_json(
            [
                {"name": name, "num_parameters": sizes.get(name), "description": text}
                for name, text in MODELS.items()
            ]
        )
        return
    rows = [[name, f"{size:,}" if (size := sizes.get(name)) else "—", text] for name, text in MODELS.items()]
    _print(["model", "parameters", ""], rows)
    echo("parameters: for images of 3×32×32 and 10 classes")


@click.command(epilog="Example:  gmprobe datasets")
@json_option
def datasets(as_json: bool) -> None:
    """List the data that --data, --unlabeled and --labeled take."""
    from gm_probe.data.datasets import DESCRIPTIONS

    _list("data", DESCRIPTIONS, as_json)


@click.command(epilog="Example:  gmprobe recipes")
@json_option
def recipes(as_json: bool) -> None:
    """List the built-in recipes of `gmprobe sweep`."""
    from gm_probe.sweep.recipe import builtin_recipes

    _list("recipe", builtin_recipes(), as_json)


@click.command(epilog="Example:  gmprobe measures")
@json_option
def measures(as_json: bool) -> None:
    """List the measures: definition, whether labels are needed, cost, and what a larger value means."""
    from gm_probe.measures.catalogue import MEASURES

    if as_json:
        shown = ("needs_labels", "cost", "symbol", "description", "direction", "group")
        print_json([{"name": name} | {key: getattr(m, key) for key in shown} for name, m in MEASURES.items()])
        return
    console = results_console()
    if console.width < NARROW:
        for name, m in MEASURES.items():
            labels = ", needs labels" if m.needs_labels else ""
            larger = f", larger is {m.direction}" if m.direction else ""
            say(console, f"{name} ({m.group}): {m.symbol}, cost {number(m.cost, 3)}{larger}{labels}")
            console.print(Padding(Text(m.description), (0, 0, 0, 4)))
    else:
        rows = [
            [
                *(name, m.group, m.symbol, "yes" if m.needs_labels else "no", number(m.cost, 3)),
                *(m.direction or "—", m.description),
            ]
            for name, m in MEASURES.items()
        ]
        _print(["measure", "group", "symbol", "labels", "cost", "larger is", "definition"], rows)
    say(console, "larger is: whether a larger value is expected to go with better or worse generalization")
    say(console, "group: --measures takes this word for all its measures, and all for every measure")
    echo("cost: typical gradient evaluations over the examples at the default settings")


def _list(kind: str, entries: Mapping[str, str], as_json: bool) -> None:
    if as_json:
        print_json([{"name": name, "description": text} for name, text in entries.items()])
        return
    _print([kind, ""], list(entries.items()))


def _print(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table whose last column is text."""
    listing = table(None, columns, rows)
    listing.columns[-1].justify = "left"
    results_console().print(listing)
