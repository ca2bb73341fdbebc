"""Jobs on a Ray cluster: each a task that survives the loss of its machine."""

from __future__ import annotations

import json
import logging
import os
import secrets
import shutil
import stat
import tempfile
import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

from gm_probe.errors import ProbeError, ResourceError, UsageError, first_line
from gm_probe.executors.local import Job, Outcome, attempt
from gm_probe.files.atomic import write_atomic
from gm_probe.files.locks import BEAT, LOCK, STALE, exclusive, held
from gm_probe.runs.records import MEASURES

RETRIES = 5
"""Times a job is begun again after its machine or process was lost."""
SENT = "sent"
"""Beside a worker's copy of a run folder: the digest of the files that it began with."""
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Ray:
    """A cluster at ``address``; None starts one on this machine alone, on its loopback and without dashboard.

    Where a worker sees the folder of the sweep it works there: a job that is begun again goes on where it stopped.
    Elsewhere it gets the run's files, works on a copy and returns them, and this process writes them. Either way
    gm_probe must be installed there, and data that are no name must lie at the same path.

    Attributes:
        cpus, gpus: what a job asks Ray for; it computes on as many threads, and several share a GPU by a fraction.
            With 0 GPUs it sees none.
        fetch: True = take nothing for shared.

    Raises:
        UsageError: this machine alone has less than a job asks for. Of a cluster, which others may join, it is logged.
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
                # no more than keep every machine busy: a run's files wait in Ray's memory
                slots = 2 * int(ray.cluster_resources().get("CPU", 0) / self.cpus) + 1
                while left and len(waiting) < slots:
                    job = left.pop()
                    job = replace(job, out=job.out.resolve())
                    seen, files = None if self.fetch else token, _read(job.out) if send else None
                    waiting[task.remote(job, seen, files, self.cpus, self.gpus, Path.cwd())] = job
                [ready], _ = ray.wait(list(waiting), num_returns=1)
                job = waiting.pop(ready)
                outcome = _outcome(ray, ready, job)
                if outcome is None:  # that worker does not see the folder: from now on files go along
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
        """Say where no node has what a job asks for: Ray waits for one in silence."""
        resources = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        nodes = [(node.get("CPU", 0), node.get("GPU", 0)) for node in resources]
        # the one with most CPUs of those with GPUs enough
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
        with _in_root():
            # by no address Ray would take RAY_ADDRESS, or the cluster that was started last
            ray.init(address=address or "local", log_to_driver=False, logging_level="error", **alone)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise ResourceError(
            f"no Ray cluster at {address}: {first_line(error)}; "
            "start one with `ray start --head`, or set RAY_AUTH_MODE and RAY_AUTH_TOKEN as it has them"
        ) from error


@contextmanager
def _in_root() -> Iterator[None]:
    """Be at the root meanwhile: workers import what lies in the folder from where Ray was started."""
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
    """On a worker: the outcome, and the run's files where the driver does not see them.

    None = nothing is done, for the folder is not seen here and no ``files`` came along. Names of files are meant as
    from the driver's folder ``here``.
    """
    with suppress(OSError):  # it may not be there; names that begin at the root lead as far
        os.chdir(here)
    if not gpus:  # else all runs of a node would share its first one; CUDA looks here when it starts
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    if token is not None and token.exists():
        return _patient(job, threads), None
    if files is None:
        return None
    copies = _copies()
    own = copies / sha256(os.fsencode(job.out)).hexdigest()[:16]
    place = _lay_out(own, files)
    outcome = _patient(replace(job, out=place), threads)
    found = _read(place)
    if outcome.status != "busy":
        shutil.rmtree(own, ignore_errors=True)
    with suppress(OSError):  # other runs have their copies there
        copies.rmdir()
    # the checkpoint is named where it was measured, and the driver has it elsewhere
    if MEASURES in found:
        found[MEASURES] = found[MEASURES].replace(_in_json(place), _in_json(job.out))
    if isinstance(outcome.result, dict) and "checkpoint" in outcome.result:
        named = outcome.result["checkpoint"].replace(str(place), str(job.out))
        outcome = replace(outcome, result={**outcome.result, "checkpoint": named})
    return outcome, found


def _copies() -> Path:
    """The folder of this user's copies of run folders, in which nobody else can put anything."""
    if not hasattr(os, "getuid"):  # on Windows every user has temporary folders of his own
        return Path(tempfile.gettempdir()) / "gmprobe"
    folder = Path(tempfile.gettempdir()) / f"gmprobe-{os.getuid()}"
    with suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    found = folder.lstat()
    private = (
        stat.S_ISDIR(found.st_mode)
        and found.st_uid == os.getuid()
        and not stat.S_IMODE(found.st_mode) & 0o077
    )
    # another user may have made it first: then no earlier try is looked for
    return folder if private else Path(tempfile.mkdtemp(prefix="gmprobe-"))


def _lay_out(own: Path, files: dict[str, bytes]) -> Path:
    """Return the copy of a run in the folder ``own``: ``files``, or what an earlier try has made of the same ones."""
    place = own / "run"
    sent = sha256()
    for name, content in sorted(files.items()):
        sent.update(f"{name}\0{len(content)}\0".encode(errors="surrogateescape") + content)
    digest = sent.hexdigest().encode()
    with suppress(OSError):
        if (own / SENT).read_bytes() == digest:
            return place
    if not held(place):  # where it is, the job ends as busy
        shutil.rmtree(own, ignore_errors=True)
    place.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        write_atomic(place / name, content)
    write_atomic(own / SENT, digest)  # last: what is torn counts as none
    return place


def _in_json(path: Path) -> bytes:
    """The start of a string in JSON that begins with ``path``."""
    return json.dumps(str(path))[:-1].encode()


def _patient(job: Job, threads: int) -> Outcome:
    """A worker whose node was lost may live, and hold the run, for a moment: wait for its end.

    ``exclusive`` watches the lock of another machine for ``STALE`` by itself; the rest is for one of this machine.
    """
    end = time.monotonic() + STALE + 2 * BEAT
    while True:
        outcome = attempt(job, threads)
        if outcome.status != "busy" or time.monotonic() > end:
            return outcome
        time.sleep(0.5)


def _outcome(ray: Any, reference: Any, job: Job) -> Outcome | None:
    """How ``job`` ended, its files written; None where the worker needs them first."""
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
    """Every file of a run folder by its name, but for the lock and drafts."""
    if not folder.is_dir():
        return {}
    files = {}
    for path in folder.iterdir():
        if path.is_file() and not path.name.startswith(LOCK) and path.suffix != ".tmp":
            with suppress(FileNotFoundError):  # gone since it was listed, as a finished run's state goes
                files[path.name] = path.read_bytes()
    return files


def _write(folder: Path, files: dict[str, bytes]) -> None:
    """Replace what ``folder`` holds by what a worker returned."""
    with exclusive(folder):
        for path in folder.iterdir():
            if path.is_file() and path.name not in files and not path.name.startswith(LOCK):
                path.unlink()
        for name, content in sorted(files.items(), key=lambda item: item[0] in {"summary.json", MEASURES}):
            write_atomic(folder / name, content)
