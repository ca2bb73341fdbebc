"""Checkpoints measured on an executor: what is seen meanwhile, what is printed, and the exit code."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import click

from gm_probe.cli.data import DataOptions, opened
from gm_probe.cli.live import ended_line, live_view
from gm_probe.cli.measure_output import as_rows, print_results, warn
from gm_probe.cli.output import note, notes_console, print_as
from gm_probe.cli.progress import progress_bar
from gm_probe.errors import ProbeError
from gm_probe.measures.costs import Outlook

if TYPE_CHECKING:
    from rich.console import Console

    from gm_probe.data.examples import Examples
    from gm_probe.executors.local import Executor, Outcome
    from gm_probe.measuring.many import Request

DONE = {"finished", "skipped"}
"""Ends of measurements that give a result."""


def opened_once(data: DataOptions, source: str, labeled: bool, path: Path) -> Examples:
    """Return the examples of ``source``, whatever the checkpoint."""
    return opened(data, source, labeled)[0]


def measure_all(
    checkpoints: Sequence[Path],
    request: Request,
    executor: Executor | None,
    output: str | None,
    *,
    quiet: bool,
    speaks: bool = True,
) -> list[Outcome]:
    """Measure ``checkpoints`` and print every result, also where some fail or the user interrupts.

    Args:
        executor: None measures one after the other in this process, with a bar.
        speaks: whether this process prints; one of those that ``torchrun`` started does.

    Raises:
        ProbeError: one failed; all were tried. Its exit code is that of the first that failed.
    """
    from gm_probe.executors.local import in_turn
    from gm_probe.measuring.many import measure_checkpoints

    paths = {str(path): path for path in checkpoints}
    here, quiet, ended = executor is None, quiet or not speaks, dict[str, "Outcome"]()
    view: AbstractContextManager[Callable[[Outcome], None]]
    if here:
        request = replace(request, watch=partial(_bar, quiet=quiet))
        view = nullcontext(partial(_told_here, len(paths), ended, notes_console(quiet)))
    else:
        view = live_view(list(paths), quiet=quiet, kept=request.save)

    def notify(outcome: Outcome) -> None:
        ended[outcome.name] = outcome
        show(outcome)

    try:
        with view as show:
            measure_checkpoints(checkpoints, request, executor or in_turn, notify)
    except KeyboardInterrupt:
        if here and request.save:
            note(
                notes_console(quiet), f"{len(ended)} of {len(paths)} ended; run the same command to continue"
            )
        raise
    finally:
        outcomes = [ended[name] for name in paths if name in ended]
        if speaks:
            _print(outcomes, output, quiet)
    _raise_failures(outcomes, named=here and not quiet)
    return outcomes


@contextmanager
def _bar(path: Path, costs: Mapping[str, float], quiet: bool) -> Iterator[Callable[[str, float], None]]:
    """Show a bar for ``path`` and give the ``notify`` that moves it."""
    outlook = Outlook(dict(costs))
    with progress_bar(path.name, sum(costs.values()), unit="gradient evaluations", quiet=quiet) as bar:

        def notify(name: str, evaluations: float) -> None:
            rate = f"{bar.speed:.2g} grad/s" if bar.speed else ""
            bar.update(evaluations, total=outlook.total(name, evaluations), state=rate, label=name)

        yield notify


def _told_here(total: int, ended: Mapping[str, Outcome], console: Console, outcome: Outcome) -> None:
    """Say how a checkpoint ended, where there are several or where nothing was measured."""
    if total > 1 or outcome.status == "skipped":
        note(console, ended_line(len(ended), total, outcome))


def _print(outcomes: Sequence[Outcome], output: str | None, quiet: bool) -> None:
    """Print the results to stdout, and what is to be said about them to stderr."""
    results = [outcome.result for outcome in outcomes if outcome.status in DONE]
    if output:
        entries = [
            each.result
            if each.status in DONE
            else {"checkpoint": each.name, "error": each.reason, "exit_code": each.exit_code}
            for each in outcomes
        ]
        print_as(output, entries, as_rows(results))
    else:
        print_results(results)
    if not quiet:
        for result in results:
            warn(result)


def _raise_failures(outcomes: Sequence[Outcome], *, named: bool) -> None:
    """Raise the error of those that failed, and name each where that was not done yet."""
    failed = [outcome for outcome in outcomes if outcome.status not in DONE]
    if not failed:
        return
    debug = click.get_current_context().find_root().params.get("debug", False)
    for outcome in failed:
        if debug and outcome.result:
            for line in str(outcome.result).splitlines():
                note(notes_console(), line)
        if len(outcomes) > 1 and not named:
            note(notes_console(), f"{outcome.status}: {outcome.name}: {outcome.reason}")
    error = ProbeError(f"{len(failed)} of {len(outcomes)} checkpoints could not be measured")
    if len(outcomes) == 1:
        internal = "internal error: " * (failed[0].exit_code == ProbeError.exit_code)
        error = ProbeError(f"{internal}{failed[0].reason}")
    error.exit_code = failed[0].exit_code
    raise error
