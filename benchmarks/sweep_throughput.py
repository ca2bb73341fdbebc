"""Throughput of a sweep on 2 local processes against 1: the same four 6CNN runs, in turn, several times.

    python benchmarks/sweep_throughput.py --data CIFAR10

`--jobs 1` has all cores (OMP_NUM_THREADS is left alone), `--jobs 2` one core a process.
"""

from __future__ import annotations

import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import click
import torch

RECIPE = """
[base]
data = "{data}"
model = "6cnn"
num_train = {images}
num_unlabeled = 500
num_test = 500
epochs = 4
batch_size = 64
device = "cpu"
[grid]
seed = [0, 1, 2, 3]
[measure]
num_starts = 2
"""


def seconds(recipe: Path, out: Path, jobs: int) -> float:
    """Of a whole `gmprobe sweep`, start-up included."""
    began = time.perf_counter()
    command = [sys.executable, "-m", "gm_probe", "sweep", str(recipe), "--out", str(out), "--jobs", str(jobs)]
    subprocess.run([*command, "--quiet"], check=True, stdout=subprocess.DEVNULL)
    passed = time.perf_counter() - began
    shutil.rmtree(out)
    return passed


@click.command()
@click.option("--data", required=True)
@click.option("--images", default=2000, show_default=True, help="Training examples a run.")
@click.option("--rounds", default=3, show_default=True)
def main(data: str, images: int, rounds: int) -> None:
    with tempfile.TemporaryDirectory() as name:
        recipe = Path(name) / "recipe.toml"
        recipe.write_text(RECIPE.format(data=data, images=images))
        pairs = []
        for number in range(rounds):
            order = (1, 2) if number % 2 == 0 else (2, 1)
            taken = {jobs: seconds(recipe, Path(name) / "runs", jobs) for jobs in order}
            pairs.append((taken[1], taken[2]))
            print(f"round {number + 1}: {taken[1]:.1f} s, {taken[2]:.1f} s", file=sys.stderr)
    ratios = sorted(one / two for one, two in pairs)
    one, two = (statistics.median(values) for values in zip(*pairs, strict=True))
    print(
        "| jobs | seconds for 4 runs, median | throughput against 1 job, median (lowest to highest) |\n|---|---|---|"
    )
    print(f"| 1 | {one:.1f} | 1 |")
    print(f"| 2 | {two:.1f} | {statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f}) |\n")
    print(
        f"torch {torch.__version__}, Python {platform.python_version()}, {os.cpu_count()} cores, {rounds} rounds."
    )


if __name__ == "__main__":
    main()
