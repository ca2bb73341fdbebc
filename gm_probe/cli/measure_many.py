"""Many checkpoints measured on an executor: what is seen meanwhile, and what is printed in the end."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from gm_probe.cli.data import DataOptions
from gm_probe.cli.figures import as_rows, print_result, warn
from gm_probe.cli.live import live_view
from gm_probe.cli.output import note, notes_console, print_csv, print_json
from gm_probe.core.errors import ProbeError

if TYPE_CHECKING:
    from gm_probe.core.datasets import Examples
    from gm_probe.sweep.executors import Executor, Outcome
    from gm_probe.sweep.remeasure import Remeasure

DONE = {"finished", "skipped"}
"""How a measurement ends that gives a result."""


@lru_cache(maxsize=1)
def _source(data: DataOptions, source: str, labeled: bool) -> Examples:
    return data.open(source, labeled=labeled)[0]


def opened_once(data: DataOptions, source: str, labeled: bool, run: Path) -> Examples:
    """The examples of ``source``, whichever the run; a process reads them once."""
    return _source(data, source, labeled)


def measure_many(
    checkpoints: Sequence[Path], what: Remeasure, executor: Executor, output: str | None, quiet: bool
) -> None:
    """Measure on ``executor``, print all that came, also where it is interrupted, and fail where one failed."""
    from gm_probe.sweep.remeasure import measure_runs

    ended: dict[str, Outcome] = {}
    names = [str(path) for path in checkpoints]
    try:
        with live_view(names, quiet=quiet, kept=what.save) as show:

            def notify(outcome: Outcome) -> None:
                ended[outcome.name] = outcome
                show(outcome)

            measure_runs(checkpoints, what, executor, notify)
    finally:
        outcomes = [ended[name] for name in names if name in ended]
        _print_outcomes(outcomes, output, quiet)
    failed = sum(outcome.status not in DONE for outcome in outcomes)
    if failed:
        raise ProbeError(f"{failed} of {len(outcomes)} checkpoints could not be measured")


def _print_outcomes(outcomes: Sequence[Outcome], output: str | None, quiet: bool) -> None:
    results = [outcome.result for outcome in outcomes if outcome.status in DONE]
    if output == "json":
        print_json(results)
    elif output == "csv":
        print_csv(as_rows(results))
    else:
        for result in results:
            print_result(result)
    if not quiet:
        for result in results:
            warn(result)
    for outcome in outcomes:
        if outcome.status not in DONE:
            note(notes_console(), f"{outcome.status}: {outcome.name}: {outcome.reason}")
