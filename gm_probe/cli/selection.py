"""The options that say which runs enter and how τ is taken; `correlate` and `report` share them."""

from functools import reduce
from pathlib import Path
from typing import Any

import click

_OPTIONS = (
    click.argument("source", type=click.Path(path_type=Path)),
    click.option("--measures", metavar="A,B", default="", help="Measures to use. Default: all there are."),
    click.option(
        "--hyper",
        metavar="A,B",
        default="",
        help="Hyperparameters, as --json of correlate lists. Default: settings that vary.",
    ),
    click.option(
        "--group-by",
        metavar="A,B",
        default="",
        help="Also within each subgroup of these settings; figures tell them apart.",
    ),
    click.option(
        "--gap", type=click.Choice(["error_gap", "ce_gap", "both"]), default="both", show_default=True
    ),
    click.option(
        "--converged-only",
        is_flag=True,
        help="Leave out runs whose training ended before it reached its stop_ce (they are counted).",
    ),
    click.option(
        "--control",
        metavar="A,B",
        default="",
        help="Take partial τ given these columns. Default: train_ce, hessian_lambda_max, parameter_norm where there "
        "are such, and each hyperparameter.",
    ),
    click.option(
        "--skip",
        metavar="A,B",
        default="",
        help="Leave out slow parts: details (all but τ), conditional, prediction, comparisons.",
    ),
    click.option(
        "--seed", type=click.IntRange(0), default=0, show_default=True, help="Seed of all resampling."
    ),
    click.option(
        "--resamples", default=2000, show_default=True, help="Bootstrap resamples and permutations."
    ),
)


def selection_options(command: Any) -> Any:
    """Add the argument and the options, each handed to the command under its own name."""
    return reduce(lambda inner, option: option(inner), reversed(_OPTIONS), command)
