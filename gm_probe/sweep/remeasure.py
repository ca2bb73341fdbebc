"""Measure trained runs again, without training: each a job on the executors of a sweep."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from gm_probe.core.datasets import Examples
from gm_probe.core.errors import StorageError, UsageError
from gm_probe.core.files import Hold, exclusive, read_json
from gm_probe.core.records import CHECKPOINT, CONFIG, MEASURES, find_runs, read_run
from gm_probe.probe.probe import Settings
from gm_probe.probe.speed import BATCH_SIZE
from gm_probe.sweep.executors import Executor, Job, Outcome
from gm_probe.sweep.measuring import as_recorded, measure_checkpoint, merge_measures, telling


@dataclass(frozen=True, slots=True)
class Remeasure:
    """What to take of each run.

    Attributes:
        examples: of a run folder, such as ``own_unlabeled``; ``part`` is what measures.json calls them.
        save: merge into the run's measures.json, taken as what is there was (see ``as_recorded``); a run that has all
            of it is not measured again.
        given: names of settings that were asked for, whatever the run has.
        loading: as ``measure_checkpoint`` takes it.
    """

    names: tuple[str, ...]
    settings: Settings
    examples: Callable[[Path], Examples]
    part: str
    max_examples: int | None
    save: bool
    given: frozenset[str]
    loading: Mapping[str, Any]

    def __call__(self, out: Path, threads: int | None) -> tuple[str, dict[str, Any]]:
        scope = {"part": self.part, "max_examples": self.max_examples}
        if not self.save:  # the folder may be anybody's: it is only read
            return "finished", self._measured(out, threads, None, self.settings, scope)
        with exclusive(out) as hold:
            settings, scope, changed = as_recorded(out, self.settings, scope, self.given)
            if read_run(out).measured(self.names, {**settings.as_dict(), **scope, **self._coupled(out)}):
                return "skipped", read_json(out / MEASURES)
            result = self._measured(out, threads, hold, settings, scope)
            result["replaced"] = merge_measures(out / MEASURES, result)
            result["as_before"] = changed
            return "finished", result

    def _measured(
        self, out: Path, threads: int | None, hold: Hold | None, settings: Settings, scope: Mapping[str, Any]
    ) -> dict[str, Any]:
        before = torch.get_num_threads()
        torch.set_num_threads(threads or before)
        try:
            examples = self.examples(out).subset(scope["max_examples"], settings.seed)
            notify = None if hold is None else telling(hold, self.names, settings)
            result = measure_checkpoint(out, examples, self.names, settings, notify=notify, **self.loading)
            result["settings"] |= scope
            return result
        finally:
            torch.set_num_threads(before)

    def _coupled(self, out: Path) -> dict[str, Any]:
        """What NT-Xent's figures depend on besides; nothing of a classifier."""
        if self.loading.get("head") != "simclr":
            return {}
        return {
            "head": "simclr",
            "temperature": self.loading.get("temperature") or read_run(out).config.get("temperature"),
            "batch_images": self.loading.get("batch_size") or BATCH_SIZE,
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


def _has_finished(run: Path) -> bool:
    try:
        return (run / CHECKPOINT).exists() and read_run(run).status == "finished"
    except StorageError:
        return True
    except OSError:  # another's, who lets nobody in
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
