"""The options that say which runs enter and how τ is taken; `correlate` and `report` share them."""

import click

from gm_probe.cli.param_types import PATH
from gm_probe.runs.records import RUNS
from gm_probe.tables.table import GAPS

source_argument = click.argument("source", type=PATH, default=RUNS)
measures_option = click.option(
    "--measures", metavar="A,B", default="", help="Use these measures.  [default: all in SOURCE]"
)
gap_option = click.option(
    "--gap",
    metavar="GAP",
    default="both",
    show_default=True,
    help="Correlate with this gap: error_gap, ce_gap, both, a column, or arithmetic such as 'val_err - train_err'.",
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
target_option = click.option(
    "--target",
    metavar="A,B",
    default="",
    help="Correlate with these instead of the gap: test_error, test_accuracy, train_error, test_ce, ...",
)


def names(text: str) -> list[str]:
    """Split a comma-separated list."""
    return [name.strip() for name in text.split(",") if name.strip()]


def targets_of(gap: str, target: str) -> list[str]:
    """Return the targets that ``--target`` or else ``--gap`` names; none stands for every gap of the table."""
    return names(target) or ([gap] if gap in GAPS else [])
