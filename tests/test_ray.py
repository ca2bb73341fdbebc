"""A real Ray cluster of processes on this machine: a sweep whose node is lost ends as one in this process."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pandas.testing import assert_frame_equal

from gm_probe.analysis.collect import collect
from gm_probe.core.files import read_json
from gm_probe.core.records import CHECKPOINT, METRICS
from gm_probe.sweep.recipe import Recipe, parse_recipe
from gm_probe.sweep.runner import run_recipe

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
    from gm_probe.sweep.ray_executor import Ray

    sweep, out = recipe(20), tmp_path / "ray"
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
            if len(ended) >= 4 and len(begun - ended) >= 2:
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
    from gm_probe.sweep.ray_executor import Ray

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
        assert Path(checkpoint) == out / name / CHECKPOINT
