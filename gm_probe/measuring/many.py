"""The one way by which checkpoints are measured: a request that an executor carries out on each of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, closing, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from gm_probe.data.examples import Examples
from gm_probe.errors import CheckpointError
from gm_probe.executors.local import Executor, Job, Outcome
from gm_probe.files.locks import FolderLock, exclusive
from gm_probe.measures.costs import Outlook, expected_costs
from gm_probe.measures.settings import Settings
from gm_probe.measuring.checkpoint import measure_checkpoint
from gm_probe.measuring.densities import density_costs
from gm_probe.measuring.saved import as_recorded, merge_measures
from gm_probe.measuring.setup import Setup
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
        given: names of settings that take the value given here, whatever the run's file records; None = all.
        watch: shows the progress; only for work in this process.
    """

    names: tuple[str, ...]
    examples: Callable[[Path], Examples]
    setup: Setup
    save: bool = False
    given: frozenset[str] | None = frozenset()
    watch: Watch | None = None

    def __call__(self, path: Path, threads: int | None) -> tuple[str, dict[str, Any]]:
        """Measure ``path``; return ``finished`` or ``skipped``, and its JSON object."""
        if not self.save:  # the folder may belong to anybody, so it is only read
            return "finished", self._measured(path, threads, None, self.setup)
        with ExitStack() as held:
            with failing_together():
                lock = held.enter_context(exclusive(path)) if rank() == 0 else None
                setup, changed = as_recorded(path, self.setup, self.given)
                if read_run(path).measured(self.names, setup.recorded(path, self.examples)):
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
                device = pick_device(setup.loading["device"])
            with watch as show:

                def notify(name: str, evaluations: float) -> None:
                    for each in (show, report):
                        if each is not None:
                            each(name, evaluations)

                loading = {**setup.loading, **setup.own_loading.get(path, {}), "device": device}
                chosen = setup.chosen(examples)
                result = measure_checkpoint(
                    path, chosen, self.names, setup.settings, notify=notify, **loading
                )
                result["settings"] |= {**setup.scope, **setup.digest(chosen)}
                return result
        finally:
            torch.set_num_threads(before)


def reporting(lock: FolderLock, names: Sequence[str], settings: Settings) -> Callable[[str, float], None]:
    """Return a ``notify`` for ``measure_checkpoint`` that reports progress in the locked run folder."""
    outlook = Outlook(expected_costs(names, settings))

    def notify(name: str, evaluations: float) -> None:
        total = outlook.total(name, evaluations)
        lock.report_progress(
            "measuring", evaluations, evaluations if total is None else total, lambda: {"measure": name}
        )

    return notify


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
