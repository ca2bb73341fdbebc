"""The options that say which runs enter and how τ is taken; `correlate` and `report` share them."""

import click

from gm_probe.cli.param_types import PATH
from gm_probe.runs.records import RUNS
from gm_probe.tables.table import ACCURACIES, GAPS, OUTCOMES

source_argument = click.argument("source", type=PATH, default=RUNS)
measures_option = click.option(
    "--measures", metavar="A,B", default="", help="Use these measures.  [default: all in SOURCE]"
)
target_option = click.option(
    "--target",
    "--gap",
    "gap",
    metavar="A,B",
    shell_complete=lambda _ctx, _option, text: [
        name for name in (*GAPS, "both", *OUTCOMES, *ACCURACIES) if name.startswith(text)
    ],
    default="both",
    help="Correlate with these: error_gap, ce_gap, an outcome such as test_error or test_accuracy, a column, or "
    "arithmetic on columns such as 'val_err - train_err'. Both names mean the same.  [default: both gaps]",
)
seed_column_option = click.option(
    "--seed-column", metavar="A", default="", help="Column that holds each run's seed.  [default: seed]"
)
converged_only_option = click.option(
    "--converged-only",
    is_flag=True,
    help="Leave out runs whose training ended before it reached its stop_ce; they are named.",
)
control_option = click.option(
    "--control",
    metavar="A,B",
    default="",
    help="Compute partial τ given these columns.  [default: train_ce, hessian_lambda_max and "
    "parameter_norm where present, and each hyperparameter]",
)


def names(text: str) -> list[str]:
    """Split a comma-separated list."""
    return [name.strip() for name in text.split(",") if name.strip()]


def targets_of(gap: str) -> list[str]:
    """Return the gaps that ``--target`` names alone; none stands for all that the table then has."""
    return chosen if GAPS.keys() >= {*(chosen := names(gap))} else []
