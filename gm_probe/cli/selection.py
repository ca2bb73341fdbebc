"""The options that say which runs enter and how τ is taken; `correlate` and `report` share them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from gm_probe.cli.param_types import PATH
from gm_probe.errors import DataError
from gm_probe.runs.records import RUNS
from gm_probe.tables.table import ACCURACIES, GAPS, OUTCOMES, RunTable

if TYPE_CHECKING:  # pandas and scipy take a second to import, which --help must not wait for
    from gm_probe.analysis.results import Correlations

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


def table_of(
    source: Path,
    measures: str,
    hyper: str,
    group_by: Sequence[str],
    *,
    gap: str,
    seed_column: str,
    converged_only: bool,
) -> RunTable:
    """Return the runs of ``source``, chosen by what the options hold."""
    from gm_probe.tables.runs import load_table

    return load_table(
        source,
        names(measures),
        names(hyper),
        group_by,
        gap=gap,
        seed_column=seed_column,
        converged_only=converged_only,
    )


def require_defined(found: Correlations, where: str) -> None:
    """Raise DataError if no measure has a defined τ; ``where`` says who gives the reasons."""
    if all(found.get(name, of).value is None for name in found.runs.measures for of in found.targets):
        raise DataError(f"no measure in {found.runs.source} has a defined τ; {where} gives the reasons")


def names(text: str) -> list[str]:
    """Split a comma-separated list."""
    return [name.strip() for name in text.split(",") if name.strip()]


def targets_of(gap: str) -> list[str]:
    """Return the gaps that ``--target`` names alone; none stands for all that the table then has."""
    return chosen if GAPS.keys() >= {*(chosen := names(gap))} else []
