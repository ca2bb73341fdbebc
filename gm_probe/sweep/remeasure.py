"""Measure trained runs again, without training: each a job on the executors of a sweep."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from gm_probe.core.datasets import Examples
from gm_probe.core.devices import pick_device
from gm_probe.core.errors import StorageError, UsageError
from gm_probe.core.locks import Hold, exclusive
from gm_probe.core.records import CHECKPOINT, CONFIG, MEASURES, SUMMARY, find_runs, read_result, read_run
from gm_probe.sweep.executors import Executor, Job, Outcome
from gm_probe.sweep.measuring import DIGEST, How, measure_as, telling
from gm_probe.sweep.saved_measures import as_recorded, coupled_settings, input_settings, merge_measures

BROKEN = "broken"


@dataclass(frozen=True, slots=True)
class Remeasure:
    """What to take of each run.

    Attributes:
        examples: of a run folder, such as ``own_unlabeled``.
        how: its ``loading`` has the device's name, which is looked for where a run is measured.
        save: merge into the run's measures.json, taken as what is there was (see ``as_recorded``); a run that has all
            of it is not measured again.
        given: names of settings that were asked for, whatever the run has.
    """

    names: tuple[str, ...]
    examples: Callable[[Path], Examples]
    how: How
    save: bool
    given: frozenset[str]

    def __call__(self, out: Path, threads: int | None) -> tuple[str, dict[str, Any]]:
        if not self.save:  # the folder may be anybody's: it is only read
            return "finished", self._measured(out, threads, None, self.how)
        with exclusive(out) as hold:
            how, changed = as_recorded(out, self.how, self.given)
            asked = {**how.settings.as_dict(), **how.scope, "head": None, **input_settings(how.loading)}
            asked |= coupled_settings(out, how.loading)
            if how.of_other_data:
                asked[DIGEST] = how.chosen(self.examples(out)).digest
            if read_run(out).measured(self.names, asked):
                return "skipped", {**read_result(out), "checkpoint": str(out)}
            result = self._measured(out, threads, hold, how)
            result["replaced"] = merge_measures(out / MEASURES, result)
            result["as_before"] = changed
            return "finished", result

    def _measured(self, out: Path, threads: int | None, hold: Hold | None, how: How) -> dict[str, Any]:
        before = torch.get_num_threads()
        torch.set_num_threads(threads or before)
        try:
            notify = None if hold is None else telling(hold, self.names, how.settings)
            here = replace(how, loading={**how.loading, "device": pick_device(how.loading["device"])})
            return measure_as(out, self.examples(out), self.names, here, notify)
        finally:
            torch.set_num_threads(before)


def trained_runs(folder: Path) -> list[Path]:
    """The finished runs below ``folder``, or itself where it is one run or holds none.

    A run whose files are broken is among them: measuring it says what is, and does not stop the others.

    Raises:
        UsageError: none of its runs has finished.
    """
    if (folder / CONFIG).exists() or not any(folder.rglob(CONFIG)):
        return [folder]
    runs = [run for run in find_runs(folder) if _status(run) in {"finished", BROKEN}]
    if not runs:
        raise UsageError(f"no run in {folder} has finished; see `gmprobe status {folder}`")
    return runs


def last_finished(folder: Path) -> Path:
    """The run below ``folder`` that finished last.

    Raises:
        UsageError: none has.
    """
    whole = [run for run in trained_runs(folder) if _status(run) == "finished"]
    if not whole:
        raise UsageError(f"no run in {folder} has finished; see `gmprobe status {folder}`")
    return max(whole, key=lambda run: (run / SUMMARY).stat().st_mtime)


def _status(run: Path) -> str | None:
    """Of a run that has a checkpoint; ``BROKEN`` where its files are, None where there is nothing to be seen."""
    try:
        status = read_run(run).status
        if (run / CHECKPOINT).exists():
            return status
        return BROKEN if status == "finished" else None  # its weights are gone
    except StorageError:
        return BROKEN
    except OSError:  # another's, who lets nobody in
        return None


def measure_runs(
    runs: Sequence[Path], what: Remeasure, executor: Executor, notify: Callable[[Outcome], None]
) -> dict[str, Outcome]:
    """Measure ``runs`` on ``executor``; the outcomes by path, in the order of ``runs``."""
    found: dict[str, Outcome] = {}
    with closing(executor([Job(str(run), run, what) for run in runs])) as ended:
        for outcome in ended:
            found[outcome.name] = outcome
            notify(outcome)
    return {str(run): found[str(run)] for run in runs}
