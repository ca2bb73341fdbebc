"""Jobs on a Ray cluster: each a task that survives the loss of its machine."""

from __future__ import annotations

import json
import logging
import os
import secrets
import tempfile
import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from gm_probe.errors import ProbeError, ResourceError, UsageError, first_line, needs
from gm_probe.executors.local import Job, Outcome, attempt
from gm_probe.files.atomic import write_atomic
from gm_probe.files.locks import BEAT, LOCK, STALE, exclusive
from gm_probe.runs.records import MEASURES

RETRIES = 5
"""How often a job is begun again after its machine or process was lost."""
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Ray:
    """A cluster at ``address``; None starts one on this machine alone, on its loopback and without dashboard.

    A worker that sees the folder of the sweep works in it, and a job that is begun again continues where it stopped.
    Any other worker gets the run's files, works on a copy and returns its files, and this process writes them.
    gm_probe must be installed on every worker, and data files must have the same path there.

    Attributes:
        cpus, gpus: what a job asks Ray for. It computes on that many threads. A fraction of a GPU is shared with other
            jobs; with 0 GPUs a job sees none.
        fetch: treat no folder as shared.

    Raises:
        UsageError: this machine alone has less than a job asks for. On a cluster, which may grow, this is logged.
    """

    root: Path
    address: str | None = None
    cpus: int = 1
    gpus: float = 0.0
    fetch: bool = False

    def __call__(self, jobs: Sequence[Job]) -> Generator[Outcome, None, None]:
        if not jobs:
            return
        ray = _ray()
        ours = not ray.is_initialized()
        if ours:
            _connect(ray, self.address)
        task = ray.remote(num_cpus=self.cpus, num_gpus=self.gpus, max_retries=RETRIES)(_work)
        send = self.fetch
        token = self.root.resolve() / f".shared-{secrets.token_hex(8)}"
        left = list(reversed(jobs))
        waiting: dict[Any, Job] = {}
        try:
            self._check_room(ray, alone=ours and self.address is None)
            write_atomic(token, b"")
            while left or waiting:
                # only as many as keep every machine busy, since a waiting run's files take Ray's memory
                slots = 2 * int(ray.cluster_resources().get("CPU", 0) / self.cpus) + 1
                while left and len(waiting) < slots:
                    job = left.pop()
                    job = replace(job, out=job.out.resolve())
                    seen, files = None if self.fetch else token, _read(job.out) if send else None
                    waiting[task.remote(job, seen, files, self.cpus, self.gpus, Path.cwd())] = job
                [ready], _ = ray.wait(list(waiting), num_returns=1)
                job = waiting.pop(ready)
                outcome = _outcome(ray, ready, job)
                if outcome is None:  # that worker does not see the folder: send files from now on
                    send = True
                    left.append(job)
                else:
                    yield outcome
        finally:
            with suppress(Exception):  # the cluster may be gone
                for reference in waiting:
                    ray.cancel(reference, force=True)
            token.unlink(missing_ok=True)
            if ours:
                ray.shutdown()

    def _check_room(self, ray: Any, *, alone: bool) -> None:
        """Raise or log where no node has what a job asks for, because Ray would wait silently."""
        resources = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        nodes = [(node.get("CPU", 0), node.get("GPU", 0)) for node in resources]
        # the node with most CPUs among those with enough GPUs
        cpus, gpus = max(nodes, key=lambda node: (min(node[1], self.gpus), node[0]), default=(0, 0))
        lacks = {"--threads": self.cpus > cpus, "--gpus": self.gpus > gpus}
        if not any(lacks.values()):
            return
        lower = " and ".join(option for option, lacking in lacks.items() if lacking)
        told = (
            f"a run asks Ray for {self.cpus} CPU(s) and {self.gpus:g} GPU(s), "
            f"but the largest node has {cpus:g} and {gpus:g}"
        )
        if alone:
            raise UsageError(f"{told}; lower {lower}")
        _log.warning(f"{told}; runs wait until a larger node joins. If none will, lower {lower}")


def _ray() -> Any:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    with needs("--executor ray", "ray", "ray"):
        import ray
    return ray


def _connect(ray: Any, address: str | None) -> None:
    alone = {"include_dashboard": False, "_node_ip_address": "127.0.0.1"} if address is None else {}
    os.environ.setdefault("RAY_worker_niceness", "0")  # at Ray's 15, any other work would starve the workers
    try:
        with _in_root():
            # without an address, Ray would take RAY_ADDRESS or the cluster that was started last
            ray.init(address=address or "local", log_to_driver=False, logging_level="error", **alone)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise ResourceError(
            f"no Ray cluster at {address}: {first_line(error)}; "
            "start one with `ray start --head`, or set RAY_AUTH_MODE and RAY_AUTH_TOKEN as it has them"
        ) from error


@contextmanager
def _in_root() -> Iterator[None]:
    """Change to the root folder, because workers import modules from the folder in which Ray was started."""
    here = Path.cwd()
    os.chdir(here.anchor)
    try:
        yield
    finally:
        os.chdir(here)


def _work(
    job: Job,
    token: Path | None,
    files: dict[str, bytes] | None,
    threads: int,
    gpus: float,
    here: Path = Path(),
) -> tuple[Outcome, dict[str, bytes] | None] | None:
    """Do ``job`` on a worker. Return the outcome, and the run's files where the driver does not see them.

    Returns None, with nothing done, where the folder is not seen here and no ``files`` came along. Relative file names
    are relative to the driver's current folder ``here``.
    """
    with suppress(OSError):  # the folder may not exist here; absolute names work all the same
        os.chdir(here)
    if not gpus:  # else all runs of a node would share its first one; CUDA looks here when it starts
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    if token is not None and token.exists():
        return _patient(job, threads), None
    if files is None:
        return None
    with tempfile.TemporaryDirectory(prefix="gmprobe-", ignore_cleanup_errors=True) as folder:
        return _on_a_copy(job, files, threads, Path(folder) / "run")


def _on_a_copy(
    job: Job, files: dict[str, bytes], threads: int, copy: Path
) -> tuple[Outcome, dict[str, bytes]]:
    """Do ``job`` on a ``copy`` of its folder, made of ``files``; return the outcome and the files that it left."""
    copy.mkdir()
    for name, content in files.items():
        write_atomic(copy / name, content)
    outcome, found = attempt(replace(job, out=copy), threads), _read(copy)
    # the results name the checkpoint in the copy, and the driver has it elsewhere
    if MEASURES in found:
        found[MEASURES] = found[MEASURES].replace(_in_json(copy), _in_json(job.out))
    if isinstance(outcome.result, dict) and "checkpoint" in outcome.result:
        named = outcome.result["checkpoint"].replace(str(copy), str(job.out))
        outcome = replace(outcome, result={**outcome.result, "checkpoint": named})
    return outcome, found


def _in_json(path: Path) -> bytes:
    """Return the beginning of a JSON string that starts with ``path``."""
    return json.dumps(str(path))[:-1].encode()


def _patient(job: Job, threads: int) -> Outcome:
    """Attempt ``job``, and wait where a worker whose node was lost still lives, and holds the run, for a moment.

    ``exclusive`` itself waits ``STALE`` for the lock of another machine; the rest is for a lock of this machine.
    """
    end = time.monotonic() + STALE + 2 * BEAT
    while True:
        outcome = attempt(job, threads)
        if outcome.status != "busy" or time.monotonic() > end:
            return outcome
        time.sleep(0.5)


def _outcome(ray: Any, reference: Any, job: Job) -> Outcome | None:
    """Return how ``job`` ended, after its files are written; None where the worker needs its files first."""
    try:
        done = ray.get(reference)
    except ray.exceptions.RayError as error:
        return Outcome(job.name, "failed", f"lost by Ray: {type(error).__name__}: {first_line(error)}")
    if done is None:
        return None
    outcome, files = done
    try:
        if files is not None:
            _write(job.out, files)
    except ProbeError as error:
        return Outcome(job.name, "failed", str(error))
    return outcome


def _read(folder: Path) -> dict[str, bytes]:
    """Return every file of a run folder by its name, except the lock and unfinished writes."""
    if not folder.is_dir():
        return {}
    files = {}
    for path in folder.iterdir():
        if path.is_file() and not path.name.startswith(LOCK) and path.suffix != ".tmp":
            with suppress(FileNotFoundError):  # removed since it was listed, as a finished run's state is
                files[path.name] = path.read_bytes()
    return files


def _write(folder: Path, files: dict[str, bytes]) -> None:
    """Replace the files of ``folder`` by those that a worker returned."""
    with exclusive(folder):
        for path in folder.iterdir():
            if path.is_file() and path.name not in files and not path.name.startswith(LOCK):
                path.unlink()
        for name, content in sorted(files.items(), key=lambda item: item[0] in {"summary.json", MEASURES}):
            write_atomic(folder / name, content)
