"""How measuring scales: time against examples N, parameters P and processes, each cell in a fresh process.

    python benchmarks/measure_scaling.py > table.md

Random 64×64 images and fresh weights; the CNN at 32×32. One thread a process. Medians of ``--repeats`` runs of each
measure alone, from reading the checkpoint to its value.
"""

from __future__ import annotations

import itertools
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch

from gm_probe.data.datasets import open_source
from gm_probe.data.normalization import Normalization
from gm_probe.measures.context import Settings
from gm_probe.measuring.checkpoint import measure_checkpoint
from gm_probe.models.checkpoints import save_checkpoint
from gm_probe.models.zoo import ModelSpec, initial_model
from gm_probe.runtime import processes

MODELS = {"6cnn": 32, "torchvision:resnet18": 64, "torchvision:resnet50": 64}
NAMES = {"fisher_lambda_max": "λ_max(F)", "fisher_trace": "tr F", "hessian_lambda_max": "λ_max(H)"}
SELF = Path(__file__).resolve()


def cell(checkpoint: Path, data: Path, measures: list[str]) -> None:
    """Inside a process: take each measure by itself, and print what it took from rank 0."""
    torch.set_num_threads(1)
    taken = {}
    with processes.joined(torch.device("cpu")):
        examples = open_source(str(data), labeled=False).pool
        for name in measures:
            begin = time.perf_counter()
            result = measure_checkpoint(checkpoint, examples, [name], Settings(), batch_size=32)
            row = result["measures"][name]
            taken[name] = {
                "seconds": time.perf_counter() - begin,
                "cost": f"{row['num_evals']:g}" + ("" if row["converged"] else " (not converged)"),
            }
        if processes.rank() == 0:
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
            print(json.dumps({"parameters": result["num_parameters"], "peak": peak, **taken}))


def launch(number: int, checkpoint: Path, data: Path, measures: str) -> dict[str, Any]:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(number)]
    command = [
        sys.executable,
        *(launcher if number > 1 else []),
        str(SELF),
        "--cell",
        str(checkpoint),
        str(data),
        "--measures",
        measures,
    ]
    done = subprocess.run(
        command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=True
    )
    return json.loads(done.stdout.strip().splitlines()[-1])


def row(model: str, count: int, number: int, runs: list[dict[str, Any]]) -> str:
    cells = [model, f"{runs[0]['parameters']:,}", str(count), str(number)]
    for name in NAMES:
        if name not in runs[0]:
            cells += ["—", "—"]
            continue
        seconds = statistics.median(run[name]["seconds"] for run in runs)
        cells += [f"{seconds:.1f}", runs[0][name]["cost"]]
    return " | ".join(["", *cells, f"{statistics.median(run['peak'] for run in runs):,.0f}", ""]).strip()


@click.command()
@click.option("--models", default=",".join(MODELS), show_default=True, help="comma-separated")
@click.option("--examples", multiple=True, type=int, default=(64, 128, 256), show_default=True)
@click.option("--processes", "numbers", multiple=True, type=int, default=(1, 2), show_default=True)
@click.option("--repeats", default=3, show_default=True)
@click.option("--measures", default=",".join(NAMES), show_default=True, help="comma-separated")
@click.option("--cell", "inner", nargs=2, type=click.Path(path_type=Path), hidden=True)
def main(
    models: str,
    examples: tuple[int, ...],
    numbers: tuple[int, ...],
    repeats: int,
    measures: str,
    inner: tuple[Path, Path] | None,
) -> None:
    """Print the table; several processes take the most examples alone."""
    if inner:
        cell(*inner, measures.split(","))
        return
    titles = [title for symbol in NAMES.values() for title in (f"{symbol}, s", "gradients")]
    titles = ["model", "P", "N", "processes", *titles, "peak MiB"]
    print(f"| {' | '.join(titles)} |\n|{'---|' * len(titles)}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        for name in models.split(","):
            size = MODELS[name]
            spec = ModelSpec(name, (3, size, size), 10)
            checkpoint = Path(folder) / "c.safetensors"
            save_checkpoint(checkpoint, initial_model(spec, 0), spec, Normalization())
            for number, count in itertools.product(numbers, examples):
                if number > 1 and count < max(examples):
                    continue
                data = Path(folder) / "x.npz"
                rng = np.random.default_rng(0)
                np.savez(data, x=rng.normal(size=(count, 3, size, size)).astype(np.float32))
                runs = [launch(number, checkpoint, data, measures) for _ in range(repeats)]
                print(row(name, count, number, runs), flush=True)


if __name__ == "__main__":
    main()
