"""The options that say which runs enter and how τ is taken; `correlate` and `report` share them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

from gm_probe.cli.options import composed
from gm_probe.cli.param_types import PATH, split
from gm_probe.errors import DataError
from gm_probe.runs.records import RUNS
from gm_probe.tables.table import ACCURACIES, GAPS, OUTCOMES, RunTable

if TYPE_CHECKING:  # pandas and scipy take a second to import, which --help must not wait for
    from numpy import ndarray

    from gm_probe.analysis.results import Correlations

table_options = composed(
    click.argument("source", type=PATH, default=RUNS),
    click.option(
        "--measures", metavar="A,B", default="", help="Use these measures.  [default: all in SOURCE]"
    ),
    click.option(
        "--hyper",
        metavar="A,B",
        default="",
        help="Use these hyperparameters; --json lists them.  [default: settings that vary]",
    ),
    click.option(
        "--seed-column", metavar="A", default="", help="Column that holds each run's seed.  [default: seed]"
    ),
    click.option(
        "--target",
        "--gap",
        "gap",
        metavar="A,B",
        shell_complete=lambda _context, _option, text: [
            name for name in (*GAPS, "both", *OUTCOMES, *ACCURACIES) if name.startswith(text)
        ],
        default="both",
        help="Correlate with these: error_gap, ce_gap, an outcome such as test_error or test_accuracy, a column, "
        "or arithmetic on columns such as 'val_err - train_err'. Both names mean the same.  [default: both gaps]",
    ),
    click.option(
        "--converged-only",
        is_flag=True,
        help="Leave out runs whose training ended before it reached its stop_ce; they are named.",
    ),
    click.option(
        "--control",
        metavar="A,B",
        default="",
        help="Compute partial τ given these columns.  [default: train_ce, hessian_lambda_max and "
        "parameter_norm where present, and each hyperparameter]",
    ),
)


@dataclass(frozen=True, slots=True)
class TableOptions:
    """What ``table_options`` hold; lists are texts with commas."""

    source: Path
    measures: str
    hyper: str
    seed_column: str
    gap: str
    converged_only: bool
    control: str

    def table(self, group_by: Sequence[str]) -> RunTable:
        """Return the runs and columns that were chosen."""
        from gm_probe.tables.runs import load_table

        return load_table(
            self.source,
            split(self.measures),
            split(self.hyper),
            group_by,
            gap=self.gap,
            seed_column=self.seed_column,
            converged_only=self.converged_only,
        )

    def correlate(self, table: RunTable, group_by: Sequence[str], *, details: bool = True) -> Correlations:
        """Return the statistics of ``table``."""
        from gm_probe.analysis.correlation import correlate

        chosen = split(self.gap)
        gaps = chosen if GAPS.keys() >= set(chosen) else []  # an empty list takes all that the table has
        return correlate(
            table, targets=gaps, group_by=group_by, controls=split(self.control), details=details
        )


def groups_of(table: RunTable, group_by: Sequence[str]) -> Mapping[str, ndarray]:
    """Return the rows of each subgroup by its label; none without ``group_by``."""
    from gm_probe.analysis.design import group_rows

    return group_rows(table, table.named(group_by)) if group_by else {}


def require_defined(found: Correlations, where: str) -> None:
    """Raise DataError if no measure has a defined τ; ``where`` says who gives the reasons."""
    if all(found.get(name, of).value is None for name in found.runs.measures for of in found.targets):
        raise DataError(f"no measure in {found.runs.source} has a defined τ; {where} gives the reasons")
