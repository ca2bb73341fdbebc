"""Images a second of FixMatch and SimCLR training, against a DataLoader that augments PIL images one by one.

    python benchmarks/views_cost.py --data CIFAR10 > benchmarks/results/views-cost.md

The folder holds train/ and test/ with class subfolders of JPEG files. Both loops take the same updates of the same
network; they differ in where batches come from: ours from images decoded once and augmented as a batch, the other from
files, each decoded and augmented by torchvision's transforms when it is its turn (no worker processes; of FixMatch's
labeled images, an eighth of a batch, it makes a strong view too, which is thrown away). One thread; CPU seconds of
this process; what is compared takes turns, and a figure is the median over rounds.
"""

from __future__ import annotations

import os
import platform
import statistics
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import click
import torch
import torchvision
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2
from train_cost import interleaved, ratios  # beside this file

from gm_probe.runtime.machine import keep_freed_memory
from gm_probe.training.config import TrainConfig
from gm_probe.training.run import Training

View = Callable[[Image.Image], Tensor]
OBJECTIVES: dict[str, dict[str, Any]] = {
    "simclr": {"batch_size": 128, "lr": 0.01},
    "fixmatch": {"batch_size": 16, "mu": 7, "labels": 250, "lr": 0.01},
}


def views(objective: str, mean: Sequence[float], std: Sequence[float]) -> tuple[View, View]:
    """What the two views of an unlabeled image are made by, as the papers' code does."""
    end = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(mean, std)]
    if objective == "simclr":
        colours = v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.4, 0.1)], p=0.8)
        one = v2.Compose(
            [v2.RandomResizedCrop(32), v2.RandomHorizontalFlip(), colours, v2.RandomGrayscale(0.2), *end]
        )
        return one, one
    weak = [v2.RandomHorizontalFlip(), v2.RandomCrop(32, padding=4, padding_mode="reflect")]
    return v2.Compose([*weak, *end]), v2.Compose([*weak, v2.RandAugment(2, 10), *end])


class Pictures(Dataset):
    """Two views of each file, decoded when it is taken."""

    def __init__(self, files: Sequence[Path], makers: tuple[View, View]) -> None:
        self.files, self.makers = files, makers

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        with Image.open(self.files[index]) as opened:
            picture = opened.convert("RGB")
        return self.makers[0](picture), self.makers[1](picture)


def batches(training: Training, pictures: DataLoader) -> Iterator[Tensor]:
    """The inputs of each step; FixMatch's first rows are weak views of labeled images."""
    labeled = training.config.batch_size if training.config.objective == "fixmatch" else 0
    for one, other in pictures:
        x = torch.cat([one, other[labeled:]])
        yield x.contiguous(memory_format=torch.channels_last)


def compare(objective: str, data: str, model: str, examples: int, rounds: int, folder: Path) -> None:
    sizes = {"num_train": examples, "num_unlabeled": 10, "num_test": 10, "epochs": 1000, "device": "cpu"}
    config = TrainConfig.from_dict(
        {"data": data, "model": model, "objective": objective, **sizes, **OBJECTIVES[objective]}
    )
    ours, other = Training(config, folder), Training(config, folder)
    size = config.batch_size * (1 + config.mu if objective == "fixmatch" else 1)
    images = ours.steps * size
    files = sorted((Path(data) / "train").glob("*/*"))
    chosen = torch.randperm(len(files), generator=torch.Generator().manual_seed(0))[:images].tolist()
    makers = views(objective, ours.normalization.mean, ours.normalization.std)
    loader = DataLoader(Pictures([files[i] for i in chosen], makers), size, shuffle=True)
    y = other.sampler.labels(torch.arange(config.batch_size))

    def theirs() -> None:
        other.model.train()
        for x in batches(other, loader):
            other.updates.step(x, y, config.lr)

    def ours_alone() -> None:
        for at in ours.sampler.deal(generator):
            x = ours.sampler.views(ours.splits.inputs.x[at], at, slice(None), generator)
            ours.normalization.apply(x)

    def theirs_alone() -> None:
        for _ in batches(other, loader):
            pass

    generator = torch.Generator().manual_seed(0)
    works = {
        "ours": ours.run_epoch,
        "DataLoader and PIL": theirs,
        "ours, batches alone": ours_alone,
        "DataLoader and PIL, batches alone": theirs_alone,
    }
    taken = interleaved(works, rounds)
    print(f"\n## {objective} on {model}, {ours.steps} steps of {size} images: {rounds} rounds\n")
    print("| loop | images/s | quartiles | times ours, in the same round |")
    print("|---|---|---|---|")
    for name, values in taken.items():
        low, middle, high = (images / value for value in statistics.quantiles(values, n=4)[::-1])
        base = "ours, batches alone" if "alone" in name else "ours"
        ratio = ratios(taken, base)[name][0]
        print(f"| {name} | {middle:,.0f} | {low:,.0f}–{high:,.0f} | {ratio:.2f} |", flush=True)


@click.command()
@click.option("--data", required=True)
@click.option("--model", default="wrn-10-1", show_default=True)
@click.option("--examples", default=1274, show_default=True)
@click.option("--rounds", default=7, show_default=True)
def main(data: str, model: str, examples: int, rounds: int) -> None:
    torch.set_num_threads(1)
    keep_freed_memory()
    torch.manual_seed(0)
    print("# What augmentation costs in FixMatch and SimCLR training\n")
    print(
        f"`python benchmarks/views_cost.py --data {Path(data).name.upper()} --model {model} --examples {examples} "
        f"--rounds {rounds}`, torch {torch.__version__}, torchvision {torchvision.__version__}, Python "
        f"{platform.python_version()}, one thread of {os.cpu_count()} cores. CPU seconds, taking turns; an image "
        "counts once, whatever its views; JPEGs of 32×32."
    )
    for objective in OBJECTIVES:
        with tempfile.TemporaryDirectory() as folder:
            compare(objective, data, model, examples, rounds, Path(folder))


if __name__ == "__main__":
    main()
