"""A real Ray cluster of processes on this machine: a sweep whose node is lost ends as one in this process.

What a driver and its workers tell each other is tested without one.
"""

from __future__ import annotations

import json
import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from pandas.testing import assert_frame_equal

from gm_probe.errors import UsageError
from gm_probe.executors.local import Job, Outcome, attempt
from gm_probe.files.atomic import read_json, write_json
from gm_probe.files.locks import BEAT, STALE
from gm_probe.runs.records import CHECKPOINT, MEASURES, METRICS, STATE, SUMMARY
from gm_probe.sweep.recipe import Recipe, parse_recipe
from gm_probe.sweep.runner import run_recipe
from gm_probe.tables.collect import collect

# its niceness of 15 would starve the workers beside other work on few cores
os.environ.update(RAY_USAGE_STATS_ENABLED="0", RAY_worker_niceness="0")
ray = pytest.importorskip("ray", reason="ray is not installed (pip install 'gm_probe[ray]')")
pytestmark = pytest.mark.filterwarnings("default")  # Ray's own are no matter of ours

BASE = {
    "data": "digits",
    "model": "mlp-8",
    "num_train": 200,
    "num_unlabeled": 40,
    "num_test": 50,
    "epochs": 8,
    "batch_size": 4,
    "device": "cpu",
    "threads": 1,
}
PLAN = {"measures": ["local_inconsistency"], "num_starts": 2}


def recipe(runs: int) -> Recipe:
    return parse_recipe({"base": BASE, "grid": {"seed": list(range(runs))}, "measure": PLAN})


@pytest.fixture
def cluster() -> Iterator[Any]:
    """A head that computes nothing; nodes are the test's to add."""
    from ray.cluster_utils import Cluster

    memory = {"object_store_memory": 80 * 2**20}
    cluster = Cluster(
        initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False, **memory}
    )
    try:
        ray.init(address=cluster.address, log_to_driver=False, logging_level="error")
        yield cluster
    finally:
        ray.shutdown()
        cluster.shutdown()


def add_node(cluster: Any) -> Any:
    return cluster.add_node(num_cpus=1, object_store_memory=80 * 2**20)


class Completions(threading.Thread):
    """Sees how often each run of a sweep completes: each time its summary is a new file."""

    def __init__(self, out: Path) -> None:
        super().__init__(daemon=True)
        self.out, self.seen, self.over = out, set(), threading.Event()

    def run(self) -> None:
        over = False
        while not over:
            over = self.over.wait(0.02)  # one look more after the end: the last run may just have completed
            for path in self.out.glob("*/summary.json"):
                self.seen.add((path.parent.name, path.stat().st_ino))


def test_a_sweep_survives_the_loss_of_a_node(cluster: Any, tmp_path: Path) -> None:
    from gm_probe.executors.ray import Ray

    sweep, out = recipe(6), tmp_path / "ray"
    run_recipe(sweep, tmp_path / "here")
    nodes = [add_node(cluster), add_node(cluster)]
    completions = Completions(out)
    completions.start()
    lost: list[int] = []

    def kill_in_the_middle() -> None:
        """Once both nodes are within a run, and some have ended."""
        end = time.monotonic() + 200
        while time.monotonic() < end:
            begun = {path.parent.name for path in out.glob(f"*/{METRICS}") if path.stat().st_size}
            ended = {path.parent.name for path in out.glob(f"*/{CHECKPOINT}")}
            if len(ended) >= 1 and len(begun - ended) >= 2:
                cluster.remove_node(nodes[0], allow_graceful=False)
                lost.append(len(begun - ended))
                return

    killer = threading.Thread(target=kill_in_the_middle)
    killer.start()
    outcomes = run_recipe(sweep, out, executor=Ray(out))
    killer.join()
    completions.over.set()
    completions.join()
    assert lost
    assert {outcome.name for outcome in outcomes} == set(sweep.runs)
    assert {outcome.status for outcome in outcomes} <= {"finished", "skipped"}
    assert sorted(name for name, _ in completions.seen) == sorted(sweep.runs)  # none completed twice
    assert not list(out.glob(".shared-*"))
    here, there = (collect(tmp_path / name).drop(columns="train_seconds") for name in ("here", "ray"))
    assert_frame_equal(there, here)


def test_where_nothing_is_shared_workers_return_their_files(cluster: Any, tmp_path: Path) -> None:
    from gm_probe.executors.ray import Ray

    add_node(cluster)
    sweep, out = recipe(2), tmp_path / "ray"
    run_recipe(sweep, tmp_path / "here")
    outcomes = run_recipe(sweep, out, executor=Ray(out, fetch=True))
    assert [outcome.status for outcome in outcomes] == ["finished"] * 2
    here, there = (collect(tmp_path / name).drop(columns="train_seconds") for name in ("here", "ray"))
    assert_frame_equal(there, here)
    for name in sweep.runs:
        weights = [(tmp_path / where / name / CHECKPOINT).read_bytes() for where in ("here", "ray")]
        assert weights[0] == weights[1]
        checkpoint = read_json(out / name / "measures.json")["checkpoint"]
        assert Path(checkpoint) == out / name


class Cluster:
    """Stands for Ray: a task is done in this process when its result is asked for.

    Args:
        blind: its workers do not see the folder of the sweep.
    """

    exceptions = ray.exceptions

    def __init__(self, *nodes: dict[str, float], blind: bool = False) -> None:
        self.resources, self.blind = nodes, blind
        self.address: str | None = None
        self.sent: list[dict[str, bytes] | None] = []
        self.over = False

    def is_initialized(self) -> bool:
        return False

    def init(self, address: str | None, **_: Any) -> None:
        self.address = address

    def shutdown(self) -> None:
        self.over = True

    def nodes(self) -> list[dict[str, Any]]:
        lost = {"Alive": False, "Resources": {"CPU": 64.0, "GPU": 8.0}}
        return [lost, *({"Alive": True, "Resources": node} for node in self.resources)]

    def cluster_resources(self) -> dict[str, float]:
        return {"CPU": sum(node.get("CPU", 0) for node in self.resources)}

    def remote(self, **_: Any) -> Callable[[Any], Any]:
        class Task:
            def __init__(self, function: Any) -> None:
                self.function = function

            def remote(task, job: Job, token: Path, files: dict[str, bytes] | None, *more: Any) -> Any:
                self.sent.append(files)
                return lambda: task.function(job, None if self.blind else token, files, *more)

        return Task

    def wait(self, references: list[Any], **_: Any) -> tuple[list[Any], list[Any]]:
        return references[:1], references[1:]

    def get(self, reference: Any) -> Any:
        return reference()


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., Cluster]:
    """Makes a ``Cluster`` that the executor takes for Ray; its workers keep copies in ``tmp_path / "copies"``."""
    from gm_probe.executors import ray as ray_executor

    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")  # and restored: a worker's process is this one
    (tmp_path / "copies").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "copies"))

    def make(*nodes: dict[str, float], blind: bool = False) -> Cluster:
        cluster = Cluster(*nodes, blind=blind)
        monkeypatch.setattr(ray_executor, "_ray", lambda: cluster)
        return cluster

    return make


def list_files(out: Path, threads: int | None) -> tuple[str, list[str]]:
    return "finished", sorted(path.name for path in out.iterdir())


def run_folder(folder: Path, *names: str) -> Job:
    folder.mkdir()
    for name in names:
        (folder / name).write_bytes(b"the driver's")
    return Job(folder.name, folder, list_files)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ((8, 0.0), "8 CPU(s) and 0 GPU(s), but the largest node has 4 and 0; lower --threads"),
        ((1, 2.0), "1 CPU(s) and 2 GPU(s), but the largest node has 2 and 1; lower --gpus"),
        ((4, 0.5), "4 CPU(s) and 0.5 GPU(s), but the largest node has 2 and 1; lower --threads"),
        ((8, 2.0), "8 CPU(s) and 2 GPU(s), but the largest node has 2 and 1; lower --threads and --gpus"),
    ],
)
def test_what_no_node_has_is_refused_on_one_machine_and_told_on_a_cluster(
    asked: tuple[int, float],
    message: str,
    stand_in: Callable[..., Cluster],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    from gm_probe.executors.ray import Ray

    cluster = stand_in({"CPU": 2.0, "GPU": 1.0}, {"CPU": 4.0}, {})
    job = run_folder(tmp_path / "run")
    with pytest.raises(UsageError) as refused:
        list(Ray(tmp_path, None, *asked)([job]))
    assert message in str(refused.value)
    assert (cluster.sent, cluster.over) == ([], True)
    assert not list(tmp_path.glob(".shared-*"))
    [outcome] = Ray(tmp_path, "auto", *asked)([job])  # others may join: it goes on
    assert outcome.status == "finished"
    assert message.split(";")[0] in caplog.text
    caplog.clear()
    for fits in ((4, 0.0), (2, 1.0)):
        list(Ray(tmp_path, None, *fits)([job]))
    assert not caplog.records


@pytest.mark.parametrize(("given", "taken"), [(None, "local"), ("auto", "auto")])
def test_no_address_joins_no_cluster(
    given: str | None, taken: str, stand_in: Callable[..., Cluster], tmp_path: Path
) -> None:
    from gm_probe.executors.ray import Ray

    cluster = stand_in({"CPU": 1.0})
    list(Ray(tmp_path, given)([run_folder(tmp_path / "run")]))
    assert cluster.address == taken


def test_files_go_to_workers_that_do_not_see_the_folder(
    stand_in: Callable[..., Cluster], tmp_path: Path
) -> None:
    from gm_probe.executors.ray import Ray

    jobs = [run_folder(tmp_path / name, STATE) for name in "abc"]
    files = {STATE: b"the driver's"}
    shared = stand_in({"CPU": 1.0})
    assert [outcome.result for outcome in Ray(tmp_path)(jobs)] == [[STATE]] * 3
    assert shared.sent == [None] * 3
    apart = stand_in({"CPU": 1.0}, blind=True)
    assert [outcome.result for outcome in Ray(tmp_path)(jobs)] == [[STATE]] * 3
    assert apart.sent == [None] * 3 + [files] * 3
    told = stand_in({"CPU": 1.0}, blind=True)
    assert [outcome.result for outcome in Ray(tmp_path, fetch=True)(jobs)] == [[STATE]] * 3
    assert told.sent == [files] * 3


def test_a_file_that_vanishes_while_a_folder_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from gm_probe.executors.ray import _read

    run_folder(tmp_path / "run", STATE, SUMMARY)
    read = Path.read_bytes

    def read_late(path: Path) -> bytes:
        if path.name == STATE:
            path.unlink()
        return read(path)

    monkeypatch.setattr(Path, "read_bytes", read_late)
    assert list(_read(tmp_path / "run")) == [SUMMARY]


def test_a_workers_copy_is_in_a_private_folder_that_goes(
    stand_in: Callable[..., Cluster], tmp_path: Path
) -> None:
    from gm_probe.executors.ray import _work

    def look(out: Path, threads: int | None) -> tuple[str, bytes]:
        assert out.parent.stat().st_mode & 0o077 == 0
        assert out.is_relative_to(tmp_path / "copies")
        return "finished", (out / METRICS).read_bytes()

    stand_in()
    done = _work(Job("run", tmp_path / "run", look), None, {METRICS: b"sent"}, 1, 0.0)
    assert done is not None
    assert (done[0].result, done[1]) == (b"sent", {METRICS: b"sent"})
    assert not list((tmp_path / "copies").iterdir())


def test_what_a_copy_measured_names_the_run_folder(stand_in: Callable[..., Cluster], tmp_path: Path) -> None:
    from gm_probe.executors.ray import Ray

    def measured(out: Path, threads: int | None) -> tuple[str, dict[str, str]]:
        write_json(out / MEASURES, {"checkpoint": str(out / CHECKPOINT)})
        return "finished", {"checkpoint": str(out)}

    stand_in({"CPU": 1.0}, blind=True)
    run = run_folder(tmp_path / 'Rün "1"').out
    [outcome] = Ray(tmp_path, fetch=True)([Job("run", run, measured)])
    assert outcome.result == {"checkpoint": str(run)}
    assert read_json(run / MEASURES) == {"checkpoint": str(run / CHECKPOINT)}


@pytest.mark.parametrize("silent", [STALE + BEAT, STALE + 3 * BEAT])
def test_a_lost_holder_is_waited_for_beyond_what_clocks_differ(
    silent: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from gm_probe.executors import ray as ray_executor

    class Clock:
        now = 0.0

        def monotonic(self) -> float:
            return self.now

        def sleep(self, seconds: float) -> None:
            self.now += seconds

    clock = Clock()

    def attempt(job: Job, threads: int) -> Outcome:
        return Outcome(job.name, "busy" if clock.now < silent else "finished")

    monkeypatch.setattr(ray_executor, "time", clock)
    monkeypatch.setattr(ray_executor, "attempt", attempt)
    outcome = ray_executor._patient(Job("run", tmp_path, list_files), 1)
    assert outcome.status == ("finished" if silent < STALE + 2 * BEAT else "busy")


@pytest.mark.parametrize(("gpus", "visible"), [(0.0, ""), (0.25, "0")])
def test_a_run_sees_a_gpu_only_where_it_asked_for_one(
    gpus: float, visible: str, stand_in: Callable[..., Cluster], tmp_path: Path
) -> None:
    from gm_probe.executors.ray import Ray

    def look(out: Path, threads: int | None) -> tuple[str, str]:
        return "finished", os.environ["CUDA_VISIBLE_DEVICES"]

    stand_in({"CPU": 1.0, "GPU": 1.0})
    [outcome] = Ray(tmp_path, gpus=gpus)([Job("run", tmp_path, look)])
    assert outcome.result == visible


def test_measure_picks_its_device_on_the_worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import gm_probe.cli.measure as command
    from gm_probe.measuring import many as measuring

    devices: list[torch.device] = []

    def cluster(jobs: Sequence[Job]) -> Iterator[Outcome]:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
        for job in jobs:
            yield attempt(job, 1)

    def tell(*_: object, device: torch.device, **__: object) -> None:
        devices.append(device)
        raise UsageError("enough seen")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr("gm_probe.executors.ray.Ray", lambda *_: cluster)
    monkeypatch.setattr(measuring, "measure_checkpoint", tell)
    for name in ("auto", "cuda", "cpu"):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
        CliRunner().invoke(
            command.measure, [str(tmp_path), "--unlabeled", "digits", "--executor", "ray", "--device", name]
        )
    assert [device.type for device in devices] == ["cuda", "cuda", "cpu"]
    wrong = CliRunner().invoke(command.measure, [str(tmp_path), "--executor", "ray", "--device", "cud"])
    assert isinstance(wrong.exception, UsageError)


def test_a_sweep_reserves_the_threads_that_its_runs_use(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import gm_probe.cli.sweep as command

    asked: list[int] = []

    def cluster(root: Path, address: str | None, threads: int, gpus: float) -> Any:
        asked.append(threads)
        return lambda jobs: (Outcome(job.name, "finished") for job in jobs)

    monkeypatch.setattr("gm_probe.executors.ray.Ray", cluster)
    base = "\n".join(f"{key} = {json.dumps(value)}" for key, value in {**BASE, "threads": 4}.items())
    path = tmp_path / "r.toml"
    path.write_text(f"[base]\n{base}\n[grid]\nseed = [0, 1]\n")
    args = [str(path), "--out", str(tmp_path / "out"), "--executor"]
    assert CliRunner().invoke(command.sweep, [*args, "ray", "-q"]).exit_code == 0
    assert CliRunner().invoke(command.sweep, [*args, "ray", "-q", "--threads", "2"]).exit_code == 0
    assert asked == [4, 2]
    script = CliRunner().invoke(command.sweep, [*args, "slurm"])
    assert "#SBATCH --cpus-per-task=4\n" in script.output
