"""Run a recipe: what is finished is not done again, and one failed run never stops the others."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Generator, Mapping
from contextlib import closing, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnContext
from pathlib import Path
from typing import Any

import torch

from gm_probe.core.devices import pick_device
from gm_probe.core.errors import BusyError, DivergedError, ProbeError, StorageError
from gm_probe.core.files import exclusive, read_json, write_atomic, write_json
from gm_probe.core.records import CHECKPOINT, CONFIG, MEASURES, SUMMARY, read_run
from gm_probe.sweep.measuring import measure_checkpoint
from gm_probe.sweep.recipe import MeasurePlan, Recipe
from gm_probe.training.config import TrainConfig
from gm_probe.training.loop import train
from gm_probe.training.parts import OWN_UNLABELED, own_unlabeled

TRACEBACK = "error.txt"


@dataclass(frozen=True, slots=True)
class Outcome:
    """How one run ended: finished, diverged, failed, skipped (it was complete before) or busy (in another sweep)."""

    name: str
    status: str
    reason: str | None = None


def is_complete(out: Path, plan: MeasurePlan) -> bool:
    """Whether a run folder needs nothing more: diverged, or finished and measured as the plan says."""
    if not (out / CONFIG).exists():
        return False
    try:
        record = read_run(out)
    except StorageError:
        return False  # trying the run will say what is broken
    if record.status == "finished":
        asked = {**plan.settings.as_dict(), **_scope(plan)}
        same = all(record.settings.get(name) == value for name, value in asked.items())
        return not plan.measures or (same and set(plan.measures) <= set(record.measures))
    return record.status == "diverged"


def run_one(config: TrainConfig, plan: MeasurePlan, out: Path, threads: int | None = None) -> str:
    """Train (or resume) and measure one run; returns its status.

    Args:
        threads: where ``config`` names none: what a run computes does not depend on how it is scheduled, so
            they are not part of its configuration.
    """
    record = read_run(out) if (out / CONFIG).exists() else None
    if record is not None and config.threads is None:
        config = config.replace(threads=record.config.get("threads"))
    before = torch.get_num_threads()
    torch.set_num_threads(config.threads or threads or before)
    try:
        if record is None or record.status != "finished":
            train(config, out, resume=True)
        if plan.measures:
            with exclusive(out):
                _measure(config, plan, out)
        return "finished"
    except DivergedError:
        if read_run(out).status != "diverged":  # the measurement diverged, not the training
            raise
        return "diverged"
    finally:
        torch.set_num_threads(before)


def _measure(config: TrainConfig, plan: MeasurePlan, out: Path) -> None:
    examples = own_unlabeled(out).subset(plan.max_examples, plan.settings.seed)
    result = measure_checkpoint(
        out / CHECKPOINT,
        examples,
        plan.measures,
        plan.settings,
        model_name=config.model,  # the code that the recipe names, never one that a file names
        batch_size=plan.batch_size,
        device=pick_device(config.device),
    )
    result["settings"] |= _scope(plan)
    write_json(out / MEASURES, result)


def _scope(plan: MeasurePlan) -> dict[str, Any]:
    """Over what a run of a sweep is measured, as its measures.json says it."""
    return {"part": OWN_UNLABELED, "max_examples": plan.max_examples}


def _attempt(
    config: TrainConfig, plan: MeasurePlan, out: Path, threads: int | None = None
) -> tuple[str, str | None]:
    """``run_one`` with its error as text: exceptions of a worker may not survive pickling."""
    try:
        _forget_failure(out)
        return run_one(config, plan, out, threads), None
    except BusyError as error:
        return "busy", str(error)
    except ProbeError as error:
        return "failed", str(error)
    except Exception as error:  # noqa: BLE001  one failed run never stops the others; its traceback is kept
        with suppress(StorageError):
            write_atomic(out / TRACEBACK, traceback.format_exc().encode())
        return "failed", f"{type(error).__name__}: {error}"


def _forget_failure(out: Path) -> None:
    (out / TRACEBACK).unlink(missing_ok=True)
    with suppress(StorageError):
        summary = read_json(out / SUMMARY)
        if isinstance(summary, dict) and summary.get("status") == "failed":
            (out / SUMMARY).unlink()


def _record_failure(out: Path, reason: str | None) -> None:
    # a finished training whose measurement failed keeps its summary; the missing measures say the rest
    if not (out / SUMMARY).exists():
        with suppress(StorageError):  # a full disk, say: the outcome is still reported
            write_json(out / SUMMARY, {"status": "failed", "reason": reason})


def run_recipe(
    recipe: Recipe,
    out: Path,
    *,
    jobs: int = 1,
    notify: Callable[[Outcome], None] | None = None,
) -> list[Outcome]:
    """Run every incomplete run of ``recipe`` below ``out``, ``jobs`` at a time, and return how each ended.

    With several jobs each has a process of its own; one that dies (out of memory, say) costs its run only.
    A failed run is tried again by the next call. Whatever ends this call ends its processes too.
    """
    outcomes: list[Outcome] = []

    def report(outcome: Outcome) -> None:
        if outcome.status == "failed":
            _record_failure(out / outcome.name, outcome.reason)
        outcomes.append(outcome)
        if notify is not None:
            notify(outcome)

    todo: dict[str, TrainConfig] = {}
    for name, config in recipe.runs.items():
        if is_complete(out / name, recipe.plan):
            report(Outcome(name, "skipped"))
        else:
            todo[name] = config
    run = _in_processes(todo, recipe.plan, out, jobs) if jobs > 1 else _in_turn(todo, recipe.plan, out)
    with closing(run) as ended:
        for outcome in ended:
            report(outcome)
    return outcomes


def _in_turn(todo: Mapping[str, TrainConfig], plan: MeasurePlan, out: Path) -> Generator[Outcome, None, None]:
    for name, config in todo.items():
        yield Outcome(name, *_attempt(config, plan, out / name))


def _in_processes(
    todo: Mapping[str, TrainConfig], plan: MeasurePlan, out: Path, jobs: int
) -> Generator[Outcome, None, None]:
    context = multiprocessing.get_context("spawn")  # fork would copy torch's threads in an unusable state
    threads = max(1, torch.get_num_threads() // jobs)
    waiting = iter(todo.items())
    workers: list[_Worker] = []
    busy: list[_Worker] = []

    def begin(worker: _Worker | None) -> None:
        following = next(waiting, None)
        if following is None:
            return
        if worker is None or not worker.process.is_alive():
            worker = _Worker(context)
            workers.append(worker)
        name, config = following
        worker.begin(name, config, plan, out / name, threads)
        busy.append(worker)

    try:
        for _ in range(jobs):
            begin(None)
        while busy:
            ready = wait([worker.tasks for worker in busy])
            for worker in [worker for worker in busy if worker.tasks in ready]:
                busy.remove(worker)
                yield Outcome(worker.run, *worker.result())
                begin(worker)
    finally:
        for worker in workers:
            worker.stop()


class _Worker:
    """A process that does one run after another, as it is told."""

    def __init__(self, context: SpawnContext) -> None:
        self.tasks, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs,))
        # a Ctrl-C while it imports is the parent's to handle: the child inherits this
        before = signal.signal(signal.SIGINT, signal.SIG_IGN) if _in_main_thread() else None
        try:
            self.process.start()
        finally:
            if before is not None:
                signal.signal(signal.SIGINT, before)
        theirs.close()  # so that the process's end is the pipe's end
        self.run = ""

    def begin(self, run: str, *task: object) -> None:
        self.run = run
        with suppress(ConnectionError):  # it has died: the result will say so
            self.tasks.send(task)

    def result(self) -> tuple[str, str | None]:
        try:
            return self.tasks.recv()
        except (EOFError, ConnectionError):
            self.process.join()
            return "failed", (
                f"its process died (exit code {self.process.exitcode}: out of memory, or killed); "
                "run the sweep again"
            )

    def stop(self) -> None:
        self.tasks.close()
        self.process.terminate()
        self.process.join(10)
        if self.process.is_alive():  # deep in a call that no signal reaches
            self.process.kill()
            self.process.join()


def _in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()


def _serve(tasks: Connection) -> None:
    """What a worker does, until its parent closes the pipe or is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent too, which decides
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # by way of `finally`: no half-written files stay
    threading.Thread(target=_end_with_parent, daemon=True).start()
    with suppress(EOFError, ConnectionError):
        while True:
            tasks.send(_attempt(*tasks.recv()))


def _end_with_parent() -> None:
    """A worker that outlived a killed parent would train into folders that the next sweep works on."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os.kill(os.getpid(), signal.SIGTERM)
