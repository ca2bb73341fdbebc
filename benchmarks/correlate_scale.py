"""How long `gmprobe correlate` takes on a large table, with all statistics.

    python benchmarks/correlate_scale.py [--settings 2000] [--seeds 5] [--measures 12]

Simulated runs on a grid of four hyperparameters, two gaps, three measures of no association and the others of
some, every outcome that a run folder has. Prints the time, the memory's peak, and what was taken smaller.
"""

from __future__ import annotations

import cProfile
import os
import platform
import pstats
import resource
import time
from itertools import product
from pathlib import Path

import click
import numpy as np
import pandas as pd
import scipy

from gm_probe.analysis.correlation import correlate
from gm_probe.tables.table import RunTable


def simulated(num_settings: int, seeds: int, num_measures: int) -> RunTable:
    """``num_settings`` × ``seeds`` runs; the measures follow the gap the more, the higher their number."""
    rng = np.random.default_rng(0)
    side = int(np.ceil(num_settings ** (1 / 4)))
    grid = np.array(list(product(range(side), repeat=4)))[:num_settings]
    setting = np.repeat(np.arange(num_settings), seeds)
    n = len(setting)
    quality = rng.normal(size=num_settings)[setting] + grid[setting, 0] / side
    test_error = 0.1 + 0.2 / (1 + np.exp(-(quality + 0.3 * rng.normal(size=n))))
    test_error = rng.binomial(10000, test_error) / 10000
    train_error = rng.binomial(50000, 0.002, size=n) / 50000
    frame = {"run": [f"run-{i}" for i in range(n)], "error_gap": test_error - train_error}
    frame["ce_gap"] = quality + rng.normal(size=n)
    measures = [f"measure_{i}" for i in range(num_measures)]
    for i, name in enumerate(measures):
        frame[name] = np.exp(max(0, i - 2) / num_measures * quality + rng.normal(size=n))
    hyperparameters = ("lr", "batch_size", "weight_decay", "width")
    frame |= {name: grid[setting, i] for i, name in enumerate(hyperparameters)}
    frame |= {"train_error": train_error, "test_error": test_error, "train_ce": train_error + rng.random(n)}
    frame |= {"num_train": np.full(n, 50000.0), "num_test": np.full(n, 10000.0)}
    outcomes = ("train_error", "test_error", "train_ce", "num_train", "num_test")
    return RunTable(
        Path("simulated"),
        pd.DataFrame(frame),
        ("error_gap", "ce_gap"),
        tuple(measures),
        hyperparameters,
        outcomes=outcomes,
    )


@click.command()
@click.option("--settings", default=2000, show_default=True)
@click.option("--seeds", default=5, show_default=True)
@click.option("--measures", default=12, show_default=True)
@click.option("--profile", is_flag=True, help="Also print where the time goes.")
def main(settings: int, seeds: int, measures: int, profile: bool) -> None:
    """Time all statistics on one simulated table."""
    table = simulated(settings, seeds, measures)
    profiler = cProfile.Profile()
    wall, cpu = time.perf_counter(), time.process_time()
    result = profiler.runcall(correlate, table) if profile else correlate(table)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"{table.num_runs:,} runs in {result.num_settings:,} settings, {measures} measures, 2 gaps: "
          f"{wall:.1f} s, {cpu:.1f} s of one core, {peak:.1f} GiB at most")  # fmt: skip
    for note in result.notes:
        print(f"- {note}")
    cores, load = os.cpu_count(), os.getloadavg()[0]
    print(f"{cores} cores (load {load:.1f}), OMP_NUM_THREADS={os.environ.get('OMP_NUM_THREADS', 'unset')}, "
          f"Python {platform.python_version()}, numpy {np.__version__}, scipy {scipy.__version__}")  # fmt: skip
    if profile:
        pstats.Stats(profiler).sort_stats("tottime").print_stats(25)


if __name__ == "__main__":
    main()
