"""Measure trained runs again, without training: each a job on the executors of a sweep."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from gm_probe.core.datasets import Examples
from gm_probe.core.devices import pick_device
from gm_probe.core.errors import StorageError, UsageError
from gm_probe.core.files import Hold, exclusive, read_json
from gm_probe.core.records import CHECKPOINT, CONFIG, MEASURES, SUMMARY, find_runs, read_run
from gm_probe.probe.speed import BATCH_SIZE
from gm_probe.sweep.executors import Executor, Job, Outcome
from gm_probe.sweep.measuring import How, as_recorded, measure_checkpoint, merge_measures, telling


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
            asked = {**how.settings.as_dict(), **how.scope, **self._coupled(out, how.loading)}
            if read_run(out).measured(self.names, asked):
                return "skipped", read_json(out / MEASURES)
            result = self._measured(out, threads, hold, how)
            result["replaced"] = merge_measures(out / MEASURES, result)
            result["as_before"] = changed
            return "finished", result

    def _measured(self, out: Path, threads: int | None, hold: Hold | None, how: How) -> dict[str, Any]:
        before = torch.get_num_threads()
        torch.set_num_threads(threads or before)
        try:
            examples = self.examples(out).subset(how.scope["max_examples"], how.settings.seed)
            notify = None if hold is None else telling(hold, self.names, how.settings)
            loading = {**how.loading, "device": pick_device(how.loading["device"])}
            result = measure_checkpoint(out, examples, self.names, how.settings, notify=notify, **loading)
            result["settings"] |= how.scope
            return result
        finally:
            torch.set_num_threads(before)

    @staticmethod
    def _coupled(out: Path, loading: Mapping[str, Any]) -> dict[str, Any]:
        """What NT-Xent's figures depend on besides; nothing of a classifier."""
        if loading.get("head") != "simclr":
            return {}
        return {
            "head": "simclr",
            "temperature": loading.get("temperature") or read_run(out).config.get("temperature"),
            "batch_images": loading.get("batch_size") or BATCH_SIZE,
        }


def trained_runs(folder: Path) -> list[Path]:
    """The finished runs below ``folder``, or itself where it is one run or holds none.

    A run whose files are broken is among them: measuring it says what is, and does not stop the others.

    Raises:
        UsageError: none of its runs has finished.
    """
    if (folder / CONFIG).exists() or not any(folder.rglob(CONFIG)):
        return [folder]
    runs = [run for run in find_runs(folder) if _has_finished(run)]
    if not runs:
        raise UsageError(f"no run in {folder} has finished; see `gmprobe status {folder}`")
    return runs


def last_finished(folder: Path) -> Path:
    """The run below ``folder`` that finished last.

    Raises:
        UsageError: none has.
    """
    whole = [run for run in trained_runs(folder) if not _is_broken(run) and (run / SUMMARY).exists()]
    if not whole:
        raise UsageError(f"no run in {folder} has finished; see `gmprobe status {folder}`")
    return max(whole, key=lambda run: (run / SUMMARY).stat().st_mtime)


def _has_finished(run: Path) -> bool:
    try:
        return (run / CHECKPOINT).exists() and (_is_broken(run) or read_run(run).status == "finished")
    except OSError:  # another's, who lets nobody in
        return False


def _is_broken(run: Path) -> bool:
    try:
        read_run(run)
    except StorageError:
        return True
    return False


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
