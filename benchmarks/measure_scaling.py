"""How measuring scales: time against examples N, parameters P and processes, each cell in a fresh process.

    python benchmarks/measure_scaling.py > benchmarks/results/scaling.md

Random 64×64 images and fresh weights; the CNN at 32×32. One thread a process. Medians of ``--repeats`` runs.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import click
import numpy as np
import torch

from gm_probe.core.batches import Normalization
from gm_probe.core.checkpoints import save_checkpoint
from gm_probe.core.models import ModelSpec, initial_model

MODELS = {"6cnn": 32, "torchvision:resnet18": 64, "torchvision:resnet50": 64}
SELF = Path(__file__).resolve()


def cell(checkpoint: Path, data: Path) -> None:
    """Inside a process: take the measures, and print their seconds from rank 0."""
    import time

    from gm_probe.core import processes
    from gm_probe.core.datasets import open_source
    from gm_probe.probe.probe import Settings
    from gm_probe.sweep.measuring import measure_checkpoint

    torch.set_num_threads(1)
    with processes.joined(torch.device("cpu")):
        examples = open_source(str(data), labeled=False).pool
        starts: dict[str, float] = {}
        result = measure_checkpoint(
            checkpoint,
            examples,
            ["fisher_lambda_max", "fisher_trace"],
            Settings(max_iterations=15),
            batch_size=32,
            notify=lambda name, _: starts.setdefault(name, time.perf_counter()) and None,
        )
        end = time.perf_counter()
        if processes.rank() == 0:
            first = starts["fisher_lambda_max"]
            rows = result["measures"]
            print(
                json.dumps(
                    {
                        "parameters": result["num_parameters"],
                        "lambda": starts["fisher_trace"] - first,
                        "trace": end - starts["fisher_trace"],
                        "evaluations": [rows[name]["num_evals"] for name in rows],
                    }
                )
            )


def launch(processes: int, checkpoint: Path, data: Path) -> dict[str, float]:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command = [
        sys.executable,
        *(launcher if processes > 1 else []),
        str(SELF),
        "--cell",
        str(checkpoint),
        str(data),
    ]
    done = subprocess.run(
        command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=True
    )
    return json.loads(done.stdout.strip().splitlines()[-1])


@click.command()
@click.option("--examples", multiple=True, type=int, default=(64, 128, 256), show_default=True)
@click.option("--repeats", default=3, show_default=True)
@click.option("--cell", "inner", nargs=2, type=click.Path(path_type=Path), hidden=True)
def main(examples: tuple[int, ...], repeats: int, inner: tuple[Path, Path] | None) -> None:
    """Print the table."""
    if inner:
        cell(*inner)
        return
    print("| model | P | N | processes | λ_max(F), s | tr F, s | gradients |\n|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        for name, size in MODELS.items():
            spec = ModelSpec(name, (3, size, size), 10)
            checkpoint = Path(folder) / "c.safetensors"
            save_checkpoint(checkpoint, initial_model(spec, 0), spec, Normalization())
            for count in examples:
                data = Path(folder) / "x.npz"
                rng = np.random.default_rng(0)
                np.savez(data, x=rng.normal(size=(count, 3, size, size)).astype(np.float32))
                for processes in (1, 2) if count == max(examples) else (1,):
                    runs = [launch(processes, checkpoint, data) for _ in range(repeats)]
                    seconds = [statistics.median(run[key] for run in runs) for key in ("lambda", "trace")]
                    cost = "/".join(f"{value:g}" for value in runs[0]["evaluations"])
                    print(
                        f"| {name} | {runs[0]['parameters']:,} | {count} | {processes} | {seconds[0]:.1f} | "
                        f"{seconds[1]:.1f} | {cost} |",
                        flush=True,
                    )


if __name__ == "__main__":
    main()
