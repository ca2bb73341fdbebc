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
from gm_probe.core.locks import Hold, exclusive
from gm_probe.core.records import MEASURES, read_result, read_run
from gm_probe.sweep.executors import Executor, Job, Outcome
from gm_probe.sweep.measuring import DIGEST, How, measure_as, output_settings, telling
from gm_probe.sweep.saved_measures import as_recorded, coupled_settings, input_settings, merge_measures


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
            asked = {**how.settings.as_dict(), **how.scope, **input_settings(how.loading)}
            asked |= output_settings(how.loading)
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
