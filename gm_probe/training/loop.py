"""The training loop: epoch after epoch of a run, which can be resumed from its folder."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from gm_probe.errors import DivergedError, UsageError, memory_or
from gm_probe.files.atomic import remove_temporary, write_json
from gm_probe.files.locks import FolderLock, exclusive
from gm_probe.runs.record_kinds import ERRORS
from gm_probe.runs.records import CONFIG, SPLIT, STATE, SUMMARY, read_run
from gm_probe.runtime import processes
from gm_probe.runtime.devices import deterministic
from gm_probe.runtime.precision import float32_products
from gm_probe.runtime.signals import Terminated, sigterm_noted
from gm_probe.training.config import TrainConfig
from gm_probe.training.objectives import OBJECTIVES
from gm_probe.training.run import Training
from gm_probe.training.run_splits import check_splits, load_splits


def _less_memory(config: TrainConfig, rows: int) -> str:
    """Return this run's own ways to save memory; ``rows`` is the number of inputs per example of a batch."""
    objective = OBJECTIVES[config.objective]
    if "m" not in objective.refused:
        return "accumulate gradients with --m, "
    return "lower --mu, " if "mu" in objective.settings and rows > 1 else ""


def train(
    config: TrainConfig,
    out: Path,
    *,
    resume: bool = False,
    notify: Callable[[dict[str, Any]], None] | None = None,
) -> dict[str, Any]:
    """Train one run into the folder ``out`` and return its summary.

    With ``resume`` a finished run is returned as it is, and an interrupted one continues from its last saved state. Its
    weights and metrics are then bit-identical with an uninterrupted run on the same machine, with the same versions,
    threads and number of processes (on a GPU only under ``deterministic``). At SIGTERM the state is saved within a
    step, and the process ends as ``Terminated``.

    Args:
        notify: called with every epoch's metrics row.

    Raises:
        UsageError: ``out`` already holds a run (without ``resume``), or a run with other settings.
        DivergedError: the loss or a weight stopped being finite. The summary says ``diverged``, and the last good state
            stays.
        ResourceError: memory ran out; the batch size is never changed.
        DataError, StorageError, CheckpointError: as the parts raise them.
    """
    alone = exclusive(out) if processes.rank() == 0 else nullcontext()
    with deterministic(config.deterministic), alone as lock, sigterm_noted() as asked_to_stop:
        done = _earlier(config, out, resume)
        processes.wait_for_all()  # until all have seen the folder as it was
        if processes.rank() == 0:
            remove_temporary(out)  # the files that a killed process left
            if done is not None:
                (out / STATE).unlink(missing_ok=True)
        summary = _train(config, out, notify, lock, asked_to_stop) if done is None else done
        if asked_to_stop():  # too late to stop this run, but not those after it
            raise Terminated(f"terminated; {out} had finished")
        return summary


def _earlier(config: TrainConfig, out: Path, resume: bool) -> dict[str, Any] | None:
    """Return the summary of a finished run in ``out``; None where there is something to train."""
    if not (out / CONFIG).exists():
        return None
    if not resume:
        raise UsageError(f"{out} already holds a run. Continue it with --resume, or choose another --out")
    record = read_run(out)
    recorded, now = TrainConfig.from_record(record.config).identity(), config.identity()
    changed = sorted(key for key in {*recorded, *now} if recorded.get(key) != now.get(key))
    if changed == ["data"] and (out / SPLIT).exists():  # the same data may have moved
        check_splits(load_splits(config), out, config.data)
    elif changed:
        raise UsageError(
            f"{out} was started with a different {', '.join(changed)}. Repeat its settings to resume"
        )
    if record.status == "diverged":  # it would diverge again, because runs are deterministic
        raise DivergedError(str(record.summary.get("reason")))
    if record.status != "finished":
        return None
    prefix = "probe_" if config.trains_encoder else ""
    for key in ("epochs", "num_train", "num_test", *(f"{prefix}{name}" for name in ERRORS)):
        record.result(key)
    return record.summary


def _train(
    config: TrainConfig,
    out: Path,
    notify: Callable[[dict[str, Any]], None] | None,
    lock: FolderLock | None,
    asked_to_stop: Callable[[], bool],
) -> dict[str, Any]:
    training = Training(config, out, lock, asked_to_stop)
    stopped = False

    def too_much(cause: str) -> str:
        return (
            f"out of memory in epoch {training.epoch + 1} on batches of {config.batch_size} ({cause}); "
            f"{_less_memory(config, training.sampler.rows)}lower --batch-size or choose a smaller --model. "
            "That is a different run and needs another --out"
        )

    try:
        with memory_or(too_much), float32_products(tf32=config.tf32):
            if (out / STATE).exists():
                check_splits(training.splits, out, config.data)
                training.load_state()
            else:
                training.begin()
            while training.epoch < config.epochs and not stopped:
                row = training.run_epoch()
                stopped = training.evaluate_epoch(row)
                training.log(row)
                if notify is not None:
                    notify(row)
                # after stop_ce no state is saved, because resuming from it would train further
                if not stopped and training.epoch < config.epochs:
                    training.save_state()
                    if training.stop_everywhere():
                        raise training.terminated()
            return training.finish()
    except DivergedError as error:
        if processes.rank() == 0:
            write_json(out / SUMMARY, {"status": "diverged", "epochs": training.epoch, "reason": str(error)})
        raise
