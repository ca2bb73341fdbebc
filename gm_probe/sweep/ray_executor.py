"""Jobs on a Ray cluster: each a task that survives the loss of its machine."""

from __future__ import annotations

import os
import secrets
import shutil
import tempfile
import time
from collections.abc import Generator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

from gm_probe.core.errors import ProbeError, ResourceError, UsageError, first_line
from gm_probe.core.files import LOCK, STALE, exclusive, read_json, write_atomic, write_json
from gm_probe.core.records import MEASURES
from gm_probe.sweep.executors import Job, Outcome, attempt

RETRIES = 5
"""Times a job is begun again after its machine or process was lost."""


@dataclass(frozen=True, slots=True)
class Ray:
    """A cluster at ``address``; None starts one on this machine alone, on its loopback and without dashboard.

    Where a worker sees the folder of the sweep it works there: a job that is begun again goes on where it stopped.
    Elsewhere it gets the run's files, works on a copy and returns them, and this process writes them. Either way
    gm_probe must be installed there, and data that are no name must lie at the same path.

    Attributes:
        cpus, gpus: what a job asks Ray for; it computes on as many threads, and several share a GPU by a fraction.
        fetch: True = take nothing for shared.
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
        token = self.root.resolve() / f".shared-{secrets.token_hex(8)}"
        left = list(reversed(jobs))
        waiting: dict[Any, Job] = {}
        try:
            write_atomic(token, b"")
            while left or waiting:
                # no more than keep every machine busy: a run's files wait in Ray's memory
                slots = 2 * int(ray.cluster_resources().get("CPU", 0) / self.cpus) + 1
                while left and len(waiting) < slots:
                    job = replace(left[-1], out=left.pop().out.resolve())
                    seen = None if self.fetch else token
                    waiting[task.remote(job, seen, _read(job.out), self.cpus)] = job
                [ready], _ = ray.wait(list(waiting), num_returns=1)
                yield _outcome(ray, ready, waiting.pop(ready))
        finally:
            with suppress(Exception):  # the cluster may be gone
                for reference in waiting:
                    ray.cancel(reference, force=True)
            token.unlink(missing_ok=True)
            if ours:
                ray.shutdown()


def _ray() -> Any:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
    except ImportError as error:
        raise UsageError(
            "--executor ray needs ray, which is not installed; pip install 'gm_probe[ray]'"
        ) from error
    return ray


def _connect(ray: Any, address: str | None) -> None:
    alone = {"include_dashboard": False, "_node_ip_address": "127.0.0.1"} if address is None else {}
    os.environ.setdefault("RAY_worker_niceness", "0")  # of our own cluster: at 15 any other work starves them
    try:
        ray.init(address=address, log_to_driver=False, logging_level="error", **alone)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise ResourceError(
            f"no Ray cluster at {address}: {first_line(error)}; "
            "start one with `ray start --head`, or set RAY_AUTH_MODE and RAY_AUTH_TOKEN as it has them"
        ) from error


def _work(
    job: Job, token: Path | None, files: dict[str, bytes], threads: int
) -> tuple[Outcome, dict[str, bytes] | None]:
    """On a worker: the outcome, and the run's files where the driver does not see them."""
    if token is not None and token.exists():
        return _patient(job, threads), None
    place = Path(tempfile.gettempdir()) / f"gmprobe-{sha256(os.fsencode(job.out)).hexdigest()[:16]}"
    place.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        if not (place / name).exists():  # an earlier try here is further on
            write_atomic(place / name, content)
    outcome = _patient(replace(job, out=place), threads)
    found = _read(place)
    if outcome.status != "busy":
        shutil.rmtree(place, ignore_errors=True)
    return outcome, found


def _patient(job: Job, threads: int) -> Outcome:
    """A worker whose node was lost may live, and hold the run, for a moment: wait for its end."""
    end = time.monotonic() + STALE
    while True:
        outcome = attempt(job, threads)
        if outcome.status != "busy" or time.monotonic() > end:
            return outcome
        time.sleep(0.5)


def _outcome(ray: Any, reference: Any, job: Job) -> Outcome:
    try:
        outcome, files = ray.get(reference)
    except ray.exceptions.RayError as error:
        return Outcome(job.name, "failed", f"lost by Ray: {type(error).__name__}: {first_line(error)}")
    try:
        if files is not None:
            _write(job.out, files)
    except ProbeError as error:
        return Outcome(job.name, "failed", str(error))
    return outcome


def _read(folder: Path) -> dict[str, bytes]:
    """Every file of a run folder by its name, but for the lock and drafts."""
    if not folder.is_dir():
        return {}
    own = [path for path in folder.iterdir() if path.is_file() and not path.name.startswith(LOCK)]
    return {path.name: path.read_bytes() for path in own if path.suffix != ".tmp"}


def _write(folder: Path, files: dict[str, bytes]) -> None:
    """Replace what ``folder`` holds by what a worker returned."""
    with exclusive(folder):
        for path in folder.iterdir():
            if path.is_file() and path.name not in files and not path.name.startswith(LOCK):
                path.unlink()
        for name, content in sorted(files.items(), key=lambda item: item[0] in {"summary.json", MEASURES}):
            write_atomic(folder / name, content)
        if MEASURES in files:  # it names the checkpoint where the worker had it
            measured = read_json(folder / MEASURES)
            write_json(folder / MEASURES, {**measured, "checkpoint": str(folder / "checkpoint.safetensors")})
