"""The one way by which checkpoints are measured: a request that an executor carries out on each of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, closing, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from gm_probe.data.datasets import Examples
from gm_probe.errors import CheckpointError
from gm_probe.executors.local import Executor, Job, Outcome
from gm_probe.files.locks import FolderLock, exclusive
from gm_probe.measures.costs import expected_costs
from gm_probe.measuring.checkpoint import DIGEST, Setup, measure_as, reporting
from gm_probe.measuring.densities import density_costs
from gm_probe.measuring.opening import output_settings
from gm_probe.measuring.saved import as_recorded, batch_dependent_settings, input_settings, merge_measures
from gm_probe.runs.records import MEASURES, read_result, read_run
from gm_probe.runtime.devices import pick_device
from gm_probe.runtime.processes import failing_together, rank

Watch = Callable[[Path, Mapping[str, float]], AbstractContextManager[Callable[[str, float], None] | None]]
"""Show the progress of a checkpoint: called with it and the expected cost of each measure, it gives a ``notify``."""


@dataclass(frozen=True, slots=True)
class Request:
    """What to measure of each checkpoint.

    Attributes:
        examples: returns the examples to measure a checkpoint over, as ``own_unlabeled`` does.
        setup: its ``loading`` has the name of the device, which is resolved where a checkpoint is measured.
        save: write into the run's measures.json, with the settings that it records (see ``as_recorded``). A run that
            has every measure already is skipped.
        given: names of settings that take the value given here, whatever the run's file records.
        watch: shows the progress; only for work in this process.
    """

    names: tuple[str, ...]
    examples: Callable[[Path], Examples]
    setup: Setup
    save: bool = False
    given: frozenset[str] = frozenset()
    watch: Watch | None = None

    def __call__(self, path: Path, threads: int | None) -> tuple[str, dict[str, Any]]:
        """Measure ``path``; return ``finished`` or ``skipped``, and its JSON object."""
        if not self.save:  # the folder may belong to anybody, so it is only read
            return "finished", self._measured(path, threads, None, self.setup)
        with ExitStack() as held:
            with failing_together():
                lock = held.enter_context(exclusive(path)) if rank() == 0 else None
                setup, changed = as_recorded(path, self.setup, self.given)
                if read_run(path).measured(self.names, self._asked(path, setup)):
                    return "skipped", {
                        **read_result(path),
                        "checkpoint": str(path),
                        "as_before": changed,
                    }
            result = self._measured(path, threads, lock, setup)
            if rank() == 0:
                result["replaced"] = merge_measures(path / MEASURES, result)
            result["as_before"] = changed
            return "finished", result

    def _asked(self, path: Path, setup: Setup) -> dict[str, Any]:
        """Return the settings that the record of ``path`` must have to match this request."""
        asked = {**setup.settings.as_dict(), **setup.scope, **input_settings(setup.loading)}
        asked |= output_settings(setup.loading)
        asked |= batch_dependent_settings(path, setup.loading)
        if setup.of_other_data:
            asked[DIGEST] = setup.chosen(self.examples(path)).digest
        return asked

    def _measured(
        self, path: Path, threads: int | None, lock: FolderLock | None, setup: Setup
    ) -> dict[str, Any]:
        before = torch.get_num_threads()
        torch.set_num_threads(threads or before)
        costs = expected_costs(self.names, setup.settings) | density_costs(setup.loading.get("quadrature"))
        watch = nullcontext(None) if self.watch is None else self.watch(path, costs)
        report = None if lock is None else reporting(lock, self.names, setup.settings)
        try:
            with failing_together():
                if not path.exists():
                    raise CheckpointError(f"{path}: no such checkpoint")
                examples = self.examples(path)
                here = replace(
                    setup, loading={**setup.loading, "device": pick_device(setup.loading["device"])}
                )
            with watch as show:

                def notify(name: str, evaluations: float) -> None:
                    for each in (show, report):
                        if each is not None:
                            each(name, evaluations)

                return measure_as(path, examples, self.names, here, notify)
        finally:
            torch.set_num_threads(before)


def measure_checkpoints(
    paths: Sequence[Path],
    request: Request,
    executor: Executor,
    notify: Callable[[Outcome], None] = lambda outcome: None,
) -> dict[str, Outcome]:
    """Measure ``paths`` on ``executor``; a failure does not stop the others.

    Returns:
        The outcome of each, by its path, in the order of ``paths``.
    """
    found: dict[str, Outcome] = {}
    with closing(executor([Job(str(path), path, request) for path in paths])) as ended:
        for outcome in ended:
            found[outcome.name] = outcome
            notify(outcome)
    return {str(path): found[str(path)] for path in paths}
