"""Does a sweep that is killed ten times and resumed end in the same table as an undisturbed one?

    python benchmarks/kill_sweep.py > benchmarks/results/kill-sweep.md

`gmprobe sweep` of 20 runs, in its own process and on two, is killed by SIGKILL at random moments and called again, ten
times, and then left to its end. Of two processes all die, or the parent alone, or a worker (whose run has then failed,
and --retry-failed goes on with it) and later all. Compared: the collected tables without what was timed, and the bytes
of all final weights.
"""

from __future__ import annotations

import json
import os
import platform
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import click

RECIPE = """
[base]
data = "digits"
model = "mlp-32"
num_train = 600
num_unlabeled = 200
num_test = 300
epochs = 12
batch_size = 10
method = "iam-d"
device = "cpu"
threads = 1
[grid]
lr = [0.01, 0.02, 0.03, 0.05, 0.1]
seed = [0, 1, 2, 3]
[measure]
num_starts = 4
"""
KILLS = 10
TIMED = ["train_seconds"]


def begin(recipe: Path, out: Path, jobs: int) -> subprocess.Popen[bytes]:
    """`gmprobe sweep` in a group of its own, once it has begun a run or ended."""
    command = [sys.executable, "-m", "gm_probe", "sweep", str(recipe), "--out", str(out), "--jobs", str(jobs)]
    known = marks(out)
    log = (out.parent / "log").open("ab")
    child = subprocess.Popen(
        [*command, "--retry-failed"], start_new_session=True, stdout=log, stderr=subprocess.STDOUT
    )
    while child.poll() is None and marks(out) == known:
        time.sleep(0.01)
    return child


def marks(out: Path) -> dict[str, int]:
    """What a sweep at work changes first."""
    return {str(path): path.stat().st_mtime_ns for path in out.glob("*/.lock")}


def strike(child: subprocess.Popen[bytes], victim: str) -> None:
    """Kill the whole group, the parent or a worker, and wait until all of them are gone."""
    workers = children(child.pid)
    if victim == "the parent" or (victim == "a worker" and not workers):
        os.kill(child.pid, signal.SIGKILL)
    elif victim == "a worker":
        os.kill(workers[-1], signal.SIGKILL)
        time.sleep(0.5)  # the sweep goes on, and begins another worker
    if victim != "the parent":
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()
    while any(Path(f"/proc/{worker}").exists() for worker in workers):
        time.sleep(0.01)


def children(pid: int) -> list[int]:
    """Those that do a sweep's runs, the oldest first."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((path / "stat").read_text().rpartition(")")[2].split()[1])
            words = (path / "cmdline").read_bytes()
        except OSError:
            continue
        if parent == pid and b"spawn_main" in words:
            found.append(int(path.name))
    return sorted(found)


def check(jobs: int, folder: Path, recipe: Path, chance: random.Random) -> dict[str, Any]:
    """One undisturbed sweep, and one killed ``KILLS`` times; what was seen."""
    from pandas.testing import assert_frame_equal

    from gm_probe.tables.collect import collect

    whole, cut = folder / f"whole-{jobs}", folder / f"cut-{jobs}"
    began = time.perf_counter()
    assert begin(recipe, whole, jobs).wait() == 0
    seconds = time.perf_counter() - began
    victims: Counter[str] = Counter()
    complete: list[int] = []
    for number in range(KILLS):
        child = begin(recipe, cut, jobs)
        time.sleep(chance.random() * seconds / 6)  # some five sixths of the sweep's time, all in all
        if child.poll() is not None:
            raise SystemExit(f"the sweep ended before its kill {number + 1}; lengthen its runs")
        victim = chance.choice(["all", "the parent", "a worker"]) if jobs > 1 else "all"
        strike(child, victim)
        victims[victim] += 1
        done = len(list(cut.glob("*/measures.json")))
        complete.append(done)
        print(f"jobs {jobs}: kill {number + 1} ({victim}), {done} runs complete", file=sys.stderr)
    assert begin(recipe, cut, jobs).wait() == 0
    tables = [collect(root).drop(columns=TIMED) for root in (whole, cut)]
    assert_frame_equal(*tables, check_exact=True)
    weights = [
        {path.parent.name: path.read_bytes() for path in root.glob("*/checkpoint.safetensors")}
        for root in (whole, cut)
    ]
    files = [sorted(str(path.relative_to(root)) for path in root.rglob("*.*")) for root in (whole, cut)]
    return {
        "jobs": jobs,
        "seconds": round(seconds, 1),
        "rows": len(tables[1]),
        "columns": tables[1].shape[1],
        "finished": int((tables[1].status == "finished").sum()),
        "equal_weights": sum(weights[0][name] == weights[1][name] for name in weights[0]),
        "equal_files": files[0] == files[1],
        "victims": dict(victims),
        "complete": complete,
    }


@click.command()
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--jobs", type=int, multiple=True, default=(1, 2), show_default=True)
@click.option("--json", "as_json", is_flag=True)
def main(seed: int, jobs: tuple[int, ...], as_json: bool) -> None:
    chance = random.Random(seed)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        recipe = folder / "recipe.toml"
        recipe.write_text(RECIPE)
        results = [check(count, folder, recipe, chance) for count in jobs]
    if as_json:
        print(json.dumps(results))
    else:
        report(results, seed)


def report(results: list[dict[str, Any]], seed: int) -> None:
    import torch

    print("# A sweep killed ten times and resumed\n")
    print(
        f"`python benchmarks/kill_sweep.py --seed {seed}`, torch {torch.__version__}, "
        f"Python {platform.python_version()}, {os.cpu_count()} cores. The recipe stands in the file. Equal means to "
        "the last bit; the tables are compared without `train_seconds`.\n"
    )
    print(
        "| jobs | undisturbed, s | kills | runs complete after each | runs finished | table equal "
        "| final weights equal | same files |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for r in results:
        print(
            f"| {r['jobs']} | {r['seconds']} | {sum(r['victims'].values())} "
            f"({', '.join(f'{count} {who}' for who, count in r['victims'].items())}) "
            f"| {', '.join(map(str, r['complete']))} | {r['finished']} of {r['rows']} "
            f"| yes ({r['rows']} × {r['columns']}) | {r['equal_weights']} of {r['rows']} "
            f"| {'yes' if r['equal_files'] else 'no'} |"
        )


if __name__ == "__main__":
    main()
