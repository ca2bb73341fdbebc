"""Run a recipe: what is finished is not done again, and one failed run never stops the others."""

from __future__ import annotations

import multiprocessing
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from gm_probe.core.batches import Batches
from gm_probe.core.checkpoints import load_weights, read_checkpoint
from gm_probe.core.devices import environment, pick_device
from gm_probe.core.errors import DivergedError, ProbeError, UsageError
from gm_probe.core.files import write_json
from gm_probe.core.models import build_model
from gm_probe.core.records import CHECKPOINT, CONFIG, MEASURES, SUMMARY, RunRecord, read_run
from gm_probe.probe.measures import measure
from gm_probe.sweep.recipe import MeasurePlan, Recipe
from gm_probe.training.config import TrainConfig
from gm_probe.training.loop import load_splits, train


@dataclass(frozen=True, slots=True)
class Outcome:
    """How one run ended: finished, diverged, failed, or skipped (it was complete before)."""

    name: str
    status: str
    reason: str | None = None


def is_complete(out: Path, plan: MeasurePlan) -> bool:
    """Whether a run folder needs nothing more: diverged, or finished and measured in full."""
    if not (out / CONFIG).exists():
        return False
    record = read_run(out)
    if record.status == "finished":
        return set(plan.measures) <= set(record.measures)
    return record.status == "diverged"


def run_one(config: TrainConfig, plan: MeasurePlan, out: Path) -> str:
    """Train (or resume) and measure one run; returns its status.

    Whatever goes wrong is written to the run's summary.
    """
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    try:
        train(config, out, resume=True)
        if plan.measures:
            _measure(config, plan, out)
        return "finished"
    except DivergedError:
        if read_run(out).status != "diverged":  # the measurement diverged, not the training
            raise
        return "diverged"


def _measure(config: TrainConfig, plan: MeasurePlan, out: Path) -> None:
    device = pick_device(config.device)
    checkpoint = read_checkpoint(out / CHECKPOINT)
    assert checkpoint.model is not None
    # the model's code is the one that the recipe names, never one that a file names
    model = build_model(checkpoint.model if checkpoint.model.name == config.model else _stranger(out, config))
    load_weights(model, checkpoint)
    if len(checkpoint.model.input_shape) == 3:
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  missing in the stubs
    examples = load_splits(config).unlabeled.unlabeled().subset(plan.max_examples, plan.settings.seed)
    batches = Batches(examples, checkpoint.normalization, batch_size=plan.batch_size, device=device)
    report = measure(model.to(device), batches, plan.measures, plan.settings)
    result = report.as_dict(
        checkpoint=str(out / CHECKPOINT), model=config.model, data=examples.source, **environment(device)
    )
    write_json(out / MEASURES, result)


def _stranger(out: Path, config: TrainConfig) -> Any:
    raise UsageError(f"{out / CHECKPOINT} is not of model {config.model}; remove the folder to train it again")


def _attempt(config: TrainConfig, plan: MeasurePlan, out: Path) -> tuple[str, str | None]:
    """``run_one`` with its error as text: exceptions of a worker may not survive pickling."""
    try:
        return run_one(config, plan, out), None
    except ProbeError as error:
        return "failed", str(error)
    except Exception as error:  # noqa: BLE001  one failed run never stops the others; its traceback is kept
        (out / "error.txt").write_text(traceback.format_exc(), encoding="utf-8")
        return "failed", f"{type(error).__name__}: {error}"


def run_recipe(
    recipe: Recipe,
    out: Path,
    *,
    jobs: int = 1,
    notify: Callable[[Outcome], None] | None = None,
) -> list[Outcome]:
    """Run every incomplete run of ``recipe`` below ``out``, ``jobs`` at a time, and return how each ended.

    With several jobs each has a process of its own; one that dies (out of memory, say) costs its own run only.
    A failed run is tried again by the next call.
    """
    outcomes: list[Outcome] = []

    def report(name: str, status: str, reason: str | None) -> None:
        if status == "failed":
            _record_failure(out / name, reason)
        outcomes.append(Outcome(name, status, reason))
        if notify is not None:
            notify(outcomes[-1])

    todo: list[tuple[str, TrainConfig]] = []
    for name, config in recipe.runs.items():
        if is_complete(out / name, recipe.plan):
            report(name, "skipped", None)
        else:
            _forget_failure(out / name)
            todo.append((name, config))
    if jobs <= 1:
        for name, config in todo:
            report(name, *_attempt(config, recipe.plan, out / name))
    else:
        for name, status, reason in _in_processes(todo, recipe.plan, out, jobs):
            report(name, status, reason)
    return outcomes


def _record_failure(out: Path, reason: str | None) -> None:
    # a finished training whose measurement failed keeps its summary; the missing measures say the rest
    if not (out / SUMMARY).exists():
        write_json(out / SUMMARY, {"status": "failed", "reason": reason})


def _forget_failure(out: Path) -> None:
    if (out / CONFIG).exists() and read_run(out).status == "failed":
        (out / SUMMARY).unlink()
    elif not (out / CONFIG).exists():
        (out / SUMMARY).unlink(missing_ok=True)


def _in_processes(
    todo: list[tuple[str, TrainConfig]], plan: MeasurePlan, out: Path, jobs: int
) -> Iterator[tuple[str, str, str | None]]:
    """One single-process pool a slot, so that a dying process breaks its own slot only."""
    context = multiprocessing.get_context("spawn")  # fork would copy torch's thread pools in an unusable state
    threads = max(1, torch.get_num_threads() // jobs)
    pools: dict[int, ProcessPoolExecutor] = {}
    running: dict[Future[tuple[str, str | None]], tuple[int, str]] = {}
    waiting = iter(todo)

    def begin(slot: int) -> None:
        following = next(waiting, None)
        if following is None:
            return
        name, config = following
        if slot not in pools:
            pools[slot] = ProcessPoolExecutor(1, mp_context=context)
        config = config if config.threads is not None else config.replace(threads=threads)
        running[pools[slot].submit(_attempt, config, plan, out / name)] = (slot, name)

    try:
        for slot in range(jobs):
            begin(slot)
        while running:
            done, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                slot, name = running.pop(future)
                try:
                    yield (name, *future.result())
                except BrokenProcessPool:
                    pools.pop(slot).shutdown(wait=False)
                    yield name, "failed", "its process died (out of memory, or killed); run the sweep again"
                begin(slot)
    finally:
        for pool in pools.values():
            pool.shutdown(wait=False, cancel_futures=True)


def read_outcomes(recipe: Recipe, out: Path) -> dict[str, RunRecord]:
    """Records of the recipe's runs that exist on disk."""
    return {name: read_run(out / name) for name in recipe.runs if (out / name / CONFIG).exists()}
