"""Many small models of a sweep, trained one after another or as one stacked model: images/s, and do the weights agree?

    OMP_NUM_THREADS=1 python benchmarks/stacked_training.py --out benchmarks/results/stacked-training.csv

k 6CNNs of different seeds on random images of 3×32×32, SGD with momentum 0.9. Stacked: their parameters joined by
``torch.func.stack_module_state``, the forward pass by ``vmap``, one backward pass over the sum of the k losses, one
optimizer over the stacked tensors. With ``own`` data each model has batches of its own, as runs of different seeds
have; with ``shared`` all see the same ones, which lets ``vmap`` fold them into one convolution of the first layer.

Sequential and stacked training take turns in one process; a figure is the median over ``--repeats`` turns. On a CPU
the clock is the process's own (one thread), so that other processes' turns do not count; on a GPU it is the wall's.
"""

from __future__ import annotations

import csv
import statistics
import sys
import time
from pathlib import Path

import click
import torch
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state, vmap
from torch.nn import functional

from gm_probe.models.zoo import ModelSpec, initial_model
from gm_probe.runtime.devices import synchronize
from gm_probe.runtime.machine import environment

SPEC = ModelSpec("6cnn", (3, 32, 32), 10)
LR, MOMENTUM = 0.05, 0.9


def optimizer_of(parameters: list[Tensor]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=LR, momentum=MOMENTUM)


class Sequential:
    """One model after another, each in channels_last, as the engine trains them."""

    def __init__(self, k: int, device: torch.device, dtype: torch.dtype) -> None:
        self.models = [initial_model(SPEC, seed).to(device, dtype) for seed in range(k)]
        for model in self.models:
            model.to(memory_format=torch.channels_last)
        self.optimizers = [optimizer_of(list(model.parameters())) for model in self.models]

    def train(self, x: Tensor, y: Tensor) -> None:
        """``x`` (k, steps, B, 3, 32, 32), ``y`` (k, steps, B)."""
        for index, (model, optimizer) in enumerate(zip(self.models, self.optimizers, strict=True)):
            for images, labels in zip(x[index], y[index], strict=True):
                optimizer.zero_grad(set_to_none=True)
                images = images.contiguous(memory_format=torch.channels_last)
                functional.cross_entropy(model(images), labels).backward()
                optimizer.step()

    def weights(self) -> list[Tensor]:
        """Each parameter, (k, ...)."""
        return [
            torch.stack(list(same)) for same in zip(*(list(m.parameters()) for m in self.models), strict=True)
        ]


class Stacked:
    """All models as one."""

    def __init__(self, k: int, device: torch.device, dtype: torch.dtype, *, shared: bool) -> None:
        models = [initial_model(SPEC, seed).to(device, dtype) for seed in range(k)]
        self.parameters, buffers = stack_module_state(models)
        assert not buffers
        skeleton: nn.Module = initial_model(SPEC, 0).to("meta")

        def loss(parameters: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
            return functional.cross_entropy(functional_call(skeleton, parameters, (x,)), y)

        data = None if shared else 0
        self.losses = vmap(loss, in_dims=(0, data, data))
        self.shared = shared
        self.optimizer = optimizer_of(list(self.parameters.values()))

    def train(self, x: Tensor, y: Tensor) -> None:
        for step in range(x.shape[1]):
            at = (0, step) if self.shared else (slice(None), step)
            self.optimizer.zero_grad(set_to_none=True)
            self.losses(self.parameters, x[at], y[at]).sum().backward()
            self.optimizer.step()

    def weights(self) -> list[Tensor]:
        return list(self.parameters.values())


def batches(k: int, steps: int, batch: int, *, shared: bool) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    own = 1 if shared else k
    x = torch.randn(own, steps, batch, *SPEC.input_shape, generator=generator)
    y = torch.randint(0, SPEC.num_classes, (own, steps, batch), generator=generator)
    return x.expand(k, *x.shape[1:]), y.expand(k, *y.shape[1:])


def disagreement(k: int, batch: int, device: torch.device, dtype: torch.dtype, *, shared: bool) -> float:
    """Largest difference of two weights after 5 steps, relative to how far the weights have moved."""
    x, y = (t.to(device) for t in batches(k, 5, batch, shared=shared))
    x = x.to(dtype)
    one, other = Sequential(k, device, dtype), Stacked(k, device, dtype, shared=shared)
    before = [w.detach().clone() for w in one.weights()]
    one.train(x, y)
    other.train(x, y)
    pairs = list(zip(before, one.weights(), other.weights(), strict=True))
    moved = max(float((b - a).detach().abs().max()) for a, b, _ in pairs)
    return max(float((b - c).detach().abs().max()) for _, b, c in pairs) / moved


def speeds(
    k: int, batch: int, steps: int, repeats: int, device: torch.device, *, shared: bool
) -> tuple[list[float], list[float]]:
    """Images a second over all k models, sequential and stacked, a turn each."""
    x, y = (t.to(device) for t in batches(k, steps, batch, shared=shared))
    contenders = Sequential(k, device, torch.float32), Stacked(k, device, torch.float32, shared=shared)
    clock = time.process_time if device.type == "cpu" else time.perf_counter
    found: tuple[list[float], list[float]] = ([], [])
    for repeat in range(repeats + 1):  # the first turn warms up
        for contender, taken in zip(contenders, found, strict=True):
            began = clock()
            contender.train(x, y)
            synchronize(device)
            if repeat:
                taken.append(k * steps * batch / (clock() - began))
    return found


@click.command()
@click.option("--out", type=click.Path(path_type=Path), help="CSV file.  [default: stdout]")
@click.option("--k", "ks", type=int, multiple=True, default=(2, 4, 8), show_default=True)
@click.option("--batch", "sizes", type=int, multiple=True, default=(32, 128), show_default=True)
@click.option("--images", default=2048, show_default=True, help="Images a turn and model.")
@click.option("--repeats", default=7, show_default=True)
@click.option("--device", default="cpu", show_default=True)
def main(
    out: Path | None, ks: tuple[int, ...], sizes: tuple[int, ...], images: int, repeats: int, device: str
) -> None:
    """Compare sequential and stacked training."""
    torch.set_num_threads(1)
    place = torch.device(device)
    print(environment(place), file=sys.stderr)
    rows = []
    for k in ks:
        for batch in sizes:
            for data in ("own", "shared"):
                shared = data == "shared"
                steps = images // batch
                sequential, stacked = speeds(k, batch, steps, repeats, place, shared=shared)
                ratios = [s / q for q, s in zip(sequential, stacked, strict=True)]
                row = {
                    "k": k,
                    "batch": batch,
                    "data": data,
                    "sequential_images_per_second": round(statistics.median(sequential)),
                    "stacked_images_per_second": round(statistics.median(stacked)),
                    "stacked_over_sequential": round(statistics.median(ratios), 3),
                    "ratio_min": round(min(ratios), 3),
                    "ratio_max": round(max(ratios), 3),
                }
                for dtype in (torch.float32, torch.float64):
                    name = f"disagreement_{str(dtype).removeprefix('torch.')}"
                    row[name] = f"{disagreement(k, batch, place, dtype, shared=shared):.1e}"
                rows.append(row)
                print(row, file=sys.stderr, flush=True)
    file = sys.stdout if out is None else out.open("w", newline="", encoding="utf-8")
    with file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
