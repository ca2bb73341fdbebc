"""Run a recipe: what is finished is not done again, and one failed run never stops the others."""

from collections.abc import Callable
from contextlib import closing, suppress
from functools import partial
from pathlib import Path

import torch

from gm_probe.errors import DivergedError, StorageError
from gm_probe.executors.local import Executor, Job, Outcome, on_this_machine
from gm_probe.files.atomic import in_utf8, read_json, write_atomic, write_json
from gm_probe.measuring.many import Request
from gm_probe.measuring.setup import Setup
from gm_probe.runs.records import (
    CONFIG,
    ERROR,
    STATE,
    SUMMARY,
    failure,
    read_run,
    run_state,
)
from gm_probe.sweep.recipe import MeasurePlan, Recipe
from gm_probe.training.config import TrainConfig
from gm_probe.training.loop import train
from gm_probe.training.objectives import trains_encoder
from gm_probe.training.permissions import Permissions
from gm_probe.training.run_splits import own_unlabeled


def is_complete(out: Path, plan: MeasurePlan) -> bool:
    """Return whether a run folder needs nothing more: diverged, or finished and measured as the plan says."""
    try:
        if not (out / CONFIG).exists():
            return False
        record = read_run(out)
    except (StorageError, OSError):
        return False  # trying the run will say what is broken, or may not be read
    if record.status == "finished" and not (out / STATE).exists():
        batch_dependent = plan.batch_dependent if trains_encoder(record.config.get("objective")) else {}
        return record.measured(plan.measures, {**plan.asked, **batch_dependent})
    return record.status == "diverged"


def train_and_measure(config: TrainConfig, plan: MeasurePlan, out: Path, threads: int | None = None) -> str:
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
        # for a finished run, this only removes what a kill after its summary left
        train(config, out, resume=True)
        return _request(config, plan)(out, None)[0] if plan.measures else "finished"
    except DivergedError:
        if read_run(out).status != "diverged":  # the measurement diverged, not the training
            raise
        return "diverged"
    finally:
        torch.set_num_threads(before)


def _request(config: TrainConfig, plan: MeasurePlan) -> Request:
    """Return the request to measure a trained run as the plan says, whatever its record says."""
    loading = {
        "model_name": config.model,  # the code that the recipe names, never one that a file names
        "batch_size": plan.batch_size,
        "device": config.device,
        "head": "simclr" if config.trains_encoder else "classifier",
    }
    examples = partial(own_unlabeled, permissions=Permissions.of(config))
    return Request(plan.measures, examples, Setup(plan.settings, plan.scope, loading), save=True, given=None)


def _do(config: TrainConfig, plan: MeasurePlan, out: Path, threads: int | None) -> tuple[str, None]:
    # where a lost machine's job is done again, it may have been complete already
    return "skipped" if is_complete(out, plan) else train_and_measure(config, plan, out, threads), None


def _forget_failure(out: Path) -> None:
    with suppress(OSError, StorageError):
        (out / ERROR).unlink(missing_ok=True)
        summary = read_json(out / SUMMARY)
        if isinstance(summary, dict) and summary.get("status") == "failed":
            (out / SUMMARY).unlink()


def _record_failure(out: Path, outcome: Outcome) -> None:
    with suppress(StorageError, OSError):  # a full disk, say: the outcome is still reported
        write_atomic(out / ERROR, in_utf8(f"{outcome.result or ''}{outcome.reason}\n"))
        # a finished training whose measurement failed keeps its summary; the missing measures say the rest
        if not (out / SUMMARY).exists():
            write_json(out / SUMMARY, {"status": "failed", "reason": outcome.reason})


def failed_before(out: Path) -> bool:
    """Return whether an earlier try ended so, which a sweep does not repeat unasked."""
    with suppress(StorageError, OSError):
        return run_state(out) == "failed"
    return False


def run_recipe(
    recipe: Recipe,
    out: Path,
    *,
    jobs: int = 1,
    executor: Executor | None = None,
    retry_failed: bool = True,
    notify: Callable[[Outcome], None] | None = None,
) -> list[Outcome]:
    """Run every incomplete run of ``recipe`` below ``out`` and return how each ended.

    Args:
        jobs: runs at a time on this machine; they share its GPUs unless runs name one.
        executor: runs them in its stead.
        retry_failed: try runs again that an earlier call saw fail.
        notify: called with every outcome as it is known.
    """
    outcomes: list[Outcome] = []

    def report(outcome: Outcome) -> None:
        outcomes.append(outcome)
        if notify is not None:
            notify(outcome)

    todo: list[Job] = []
    for name, config in recipe.runs.items():
        folder = out / name
        if folder.is_symlink():
            reason = f"{folder} is a link; a sweep writes into its own folder only. Remove the link"
            report(Outcome(name, "failed", reason, tried=False))
        elif is_complete(folder, recipe.plan):
            _forget_failure(folder)  # a disk may fail at the last sync although everything was written
            report(Outcome(name, "skipped", tried=False))
        elif not retry_failed and failed_before(folder):
            report(Outcome(name, "failed", failure(folder), tried=False))
        else:
            _forget_failure(folder)
            todo.append(Job(name, folder, partial(_do, config, recipe.plan)))
    free = all(config.device in {"auto", "cuda"} for config in recipe.runs.values())
    with closing((executor or on_this_machine(jobs, spread=free))(todo)) as ended:
        for outcome in ended:
            if outcome.status == "failed":
                _record_failure(out / outcome.name, outcome)
            report(outcome)
    return outcomes
