"""Options that several commands share, each written once."""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce
from typing import Any

import click

from gm_probe.cli.param_types import AT_ONCE, PATH, Choice

Decorator = Callable[[Any], Any]

quiet_option = click.option("-q", "--quiet", is_flag=True, help="Print no progress and no notes on stderr.")
json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")
jobs_option = click.option(
    "--jobs",
    type=AT_ONCE,
    default=1,
    show_default=True,
    help="Number of runs at a time on this machine, each in a process.",
)
device_option = click.option(
    "--device",
    default="auto",
    show_default=True,
    help="Compute on this device: auto, cpu, cuda, cuda:1, or another that torch knows.",
)
data_root_option = click.option(
    "--data-root",
    metavar="DIR",
    type=PATH,
    help="Folder in which torchvision keeps its data sets.  [default: ~/.cache/gm_probe]",
)
download_option = click.option(
    "--download", is_flag=True, help="Let torchvision download a missing data set."
)
unlabeled_option = click.option(
    "--unlabeled",
    metavar="DATA",
    help="Use this data without labels: an image folder (its labels are not read), an array file, or a data "
    "set name.",
)
HEADS = {
    "classifier": "exclusive classes",
    "binary": "one yes-or-no logit",
    "multilabel": "several independent logits",
    "simclr": "SimCLR's NT-Xent logits over seeded views in batches of --batch-size images (250)",
}


def head_option(*heads: str) -> Decorator:
    """Return the option ``--head``, with these of ``HEADS``."""
    meanings = ", ".join(HEADS[head] for head in heads)
    return click.option(
        "--head",
        type=Choice(heads),
        default=heads[0],
        show_default=True,
        help=f"State what the outputs mean: {meanings}.",
    )


def composed(*decorators: Decorator) -> Decorator:
    """Return a decorator that adds the options of ``decorators``, in this order."""
    return lambda command: reduce(lambda inner, outer: outer(inner), reversed(decorators), command)


format_options = composed(
    click.option("--json", "output", flag_value="json", help="Print JSON."),
    click.option("--csv", "output", flag_value="csv", help="Print CSV."),
    quiet_option,
)
"""``--json`` and ``--csv`` (one destination, ``output``) and ``--quiet``."""
