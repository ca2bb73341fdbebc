"""Where jobs run: in this process, or in several. An executor takes jobs and yields their outcomes as they end."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnContext
from pathlib import Path
from typing import Any

import torch

from gm_probe.errors import BusyError, ProbeError, ResourceError, out_of_memory
from gm_probe.runtime.processes import count, shared

SAFE_PATH = "PYTHONSAFEPATH"


@dataclass(frozen=True, slots=True)
class Job:
    """Work on the run folder ``out``.

    Attributes:
        do: a function of ``out`` and the number of CPU threads (None = unchanged), which returns the status and the
            result. Other processes and machines get it pickled.
    """

    name: str
    out: Path
    do: Callable[[Path, int | None], tuple[str, Any]]


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a job ended.

    Attributes:
        status: finished, diverged, failed, skipped (it was complete before) or busy (in another sweep).
        result: what the job returned, or the traceback of an unexpected error.
        tried: False where the outcome was already known.
        exit_code: the exit code that the command line would have after a failure.
    """

    name: str
    status: str
    reason: str | None = None
    result: Any = None
    tried: bool = True
    exit_code: int = 0


Executor = Callable[[Sequence[Job]], Generator[Outcome, None, None]]
"""Runs jobs. Closing the generator early ends those that are still running."""


def attempt(job: Job, threads: int | None = None) -> Outcome:
    """Do ``job``, with errors as text: one failed run never stops the others, and not all errors can be pickled."""
    try:
        status, result = job.do(job.out, threads)
        return Outcome(job.name, status, None, result)
    except Exception as error:
        if count() > 1 and not shared(error):  # otherwise the other processes would wait for this one
            raise
        return _failure(job, error)


def _failure(job: Job, error: Exception) -> Outcome:
    status = "busy" if isinstance(error, BusyError) else "failed"
    if isinstance(error, ProbeError):
        return Outcome(job.name, status, str(error), exit_code=error.exit_code)
    code = ResourceError.exit_code if out_of_memory(error) else 1
    return Outcome(
        job.name, status, f"{type(error).__name__}: {error}", traceback.format_exc(), exit_code=code
    )


def in_turn(jobs: Sequence[Job]) -> Generator[Outcome, None, None]:
    """Do one job after the other in this process, or in all processes of a ``torchrun`` launch together."""
    for job in jobs:
        yield attempt(job)


@dataclass(frozen=True, slots=True)
class Processes:
    """Runs ``count`` jobs at a time, each in its own process; if one dies (out of memory, say), only its job fails.

    The machine's CPU threads are divided evenly, and so are ``gpus``, which are ids as CUDA_VISIBLE_DEVICES takes them:
    with more processes than GPUs, several share one. Closing the generator ends the processes.
    """

    count: int
    gpus: Sequence[str] = ()

    def __call__(self, jobs: Sequence[Job]) -> Generator[Outcome, None, None]:
        context = multiprocessing.get_context("spawn")  # after a fork, torch's threads would not work
        threads = max(1, torch.get_num_threads() // self.count)
        waiting = iter(jobs)
        workers: list[_Worker] = []
        busy: list[_Worker] = []

        def begin(worker: _Worker | None, slot: int) -> None:
            job = next(waiting, None)
            if job is None:
                return
            if worker is None or not worker.process.is_alive():
                worker = _Worker(context, slot, self.gpus[slot % len(self.gpus)] if self.gpus else None)
                workers.append(worker)
            worker.begin(job, threads)
            busy.append(worker)

        try:
            for slot in range(self.count):
                begin(None, slot)
            while busy:
                ready = wait([worker.tasks for worker in busy])
                for worker in [worker for worker in busy if worker.tasks in ready]:
                    busy.remove(worker)
                    yield worker.outcome()
                    begin(worker, worker.slot)
        finally:
            for worker in workers:
                worker.terminate()
            for worker in workers:
                worker.end()


def on_this_machine(jobs: int, *, spread: bool) -> Executor:
    """Return what does ``jobs`` at a time here: this process, or several, over the GPUs where jobs ``spread``."""
    return in_turn if jobs == 1 else Processes(jobs, visible_gpus() if spread else ())


def visible_gpus() -> list[str]:
    """Return the ids of the GPUs that this process may use, as CUDA_VISIBLE_DEVICES takes them."""
    count = torch.cuda.device_count()
    named = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    return named[:count] or list(map(str, range(count)))


class _Worker:
    """A process that does one job after another."""

    def __init__(self, context: SpawnContext, slot: int, gpu: str | None) -> None:
        self.slot = slot
        self.tasks, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, gpu))
        # the child inherits this, so that the parent handles a Ctrl-C while the child imports
        in_main_thread = threading.current_thread() is threading.main_thread()
        before = signal.signal(signal.SIGINT, signal.SIG_IGN) if in_main_thread else None
        try:
            with _safe_path():
                self.process.start()
        finally:
            if before is not None:
                signal.signal(signal.SIGINT, before)
        theirs.close()  # so that the pipe ends when the process ends
        self.job: Job | None = None

    def begin(self, job: Job, threads: int) -> None:
        self.job = job
        with suppress(ConnectionError):  # if it has died, the outcome will say so
            self.tasks.send((job, threads))

    def outcome(self) -> Outcome:
        assert self.job is not None
        try:
            return self.tasks.recv()
        except (EOFError, ConnectionError):
            self.process.join()
            reason = f"its process died (exit code {self.process.exitcode}: out of memory, or killed)"
            return Outcome(self.job.name, "failed", reason)

    def terminate(self) -> None:
        self.tasks.close()
        self.process.terminate()

    def end(self) -> None:
        """Wait until it has terminated, 10 seconds at most."""
        self.process.join(10)
        if self.process.is_alive():  # deep in a call that no signal reaches
            self.process.kill()
            self.process.join()


@contextmanager
def _safe_path() -> Iterator[None]:
    """Let new Python processes import nothing from the current folder, which may hold anybody's pickle.py."""
    before = os.environ.get(SAFE_PATH)
    os.environ[SAFE_PATH] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[SAFE_PATH]
        else:
            os.environ[SAFE_PATH] = before


def _serve(tasks: Connection, gpu: str | None) -> None:
    """Do jobs in a worker process until its parent closes the pipe or is gone."""
    if gpu is not None:  # CUDA starts with the first job, not with torch's import
        os.environ["CUDA_VISIBLE_DEVICES"] = gpu
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C also reaches the parent, which decides
    signal.signal(
        signal.SIGTERM, lambda *_: sys.exit(143)
    )  # runs `finally` blocks, so no half-written files stay
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        with suppress(EOFError, ConnectionError):
            while True:
                tasks.send(attempt(*tasks.recv()))
    except SystemExit:
        os._exit(143)  # torch's own shutdown takes time and is not needed
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # a SystemExit during shutdown would print a traceback


def _end_with_parent() -> None:
    """End this worker with its parent. Otherwise it would train into folders that the next sweep uses."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os.kill(os.getpid(), signal.SIGTERM)
