"""What a step of each rule costs against SGD, and what the training loop costs against a bare one.

    python benchmarks/train_cost.py > benchmarks/results/train-cost.md

One thread; CPU seconds of this process, so that a neighbour on the machine counts little. What is compared takes turns,
and a figure is the median over the rounds of the ratio within a round.
"""

from __future__ import annotations

import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
import torchvision
from PIL import Image
from torch import Tensor
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

from gm_probe.models.zoo import ModelSpec, initial_model
from gm_probe.runtime.machine import keep_freed_memory
from gm_probe.training.augment import crop_and_flip, draw_crops
from gm_probe.training.config import TrainConfig
from gm_probe.training.methods import METHODS
from gm_probe.training.rule import Rule
from gm_probe.training.run import Training

RULES: dict[str, dict[str, Any]] = {
    "sgd": {},
    "sam": {},
    "asam": {},
    "iam-s": {},
    "iam-d-onepass": {},
    "iam-d": {},
    "iam-d K=2": {"k_steps": 2},
    "iam-d K=3": {"k_steps": 3},
    "sam every=4": {"every": 4},
    "iam-d every=4": {"every": 4},
    "iam-d K=3 every=4": {"k_steps": 3, "every": 4},
    "iam-d K=3 tail=0.3": {"k_steps": 3, "tail": 0.3, "total_steps": 10},
}
"""With ``every`` and ``tail`` a step is the mean over a cycle, of which the rule takes its share."""
MODELS = {"6cnn": 128, "wrn-16-2": 64}
CLASSES, MEAN, STD = 10, 0.5, 0.29


def seconds(work: Callable[[], object]) -> float:
    began = time.process_time()
    work()
    return time.process_time() - began


def interleaved(works: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """CPU seconds of each work in each round, after one that does not count."""
    taken: dict[str, list[float]] = {name: [] for name in works}
    for index in range(rounds + 1):
        for name, work in works.items():
            spent = seconds(work)
            if index:
                taken[name].append(spent)
    return taken


def ratios(taken: dict[str, list[float]], base: str) -> dict[str, tuple[float, float, float]]:
    """Median and quartiles of each one's time over ``base``'s in the same round."""
    result = {}
    for name, values in taken.items():
        quotients = [value / reference for value, reference in zip(values, taken[base], strict=True)]
        low, middle, high = statistics.quantiles(quotients, n=4)
        result[name] = (middle, low, high)
    return result


def cycle(rule: Rule, x: Tensor, y: Tensor, steps: int) -> Callable[[], None]:
    optimizer = torch.optim.SGD(rule.model.parameters(), lr=1e-4, momentum=0.9)

    def work() -> None:
        rule.steps = 0
        for _ in range(steps):
            optimizer.zero_grad()
            rule.backward(x, y)
            optimizer.step()

    return work


def rules(model: str, batch: int, rounds: int) -> None:
    x = torch.randn(batch, 3, 32, 32).contiguous(memory_format=torch.channels_last)
    y = torch.randint(0, CLASSES, (batch,))
    built = {}
    for name, options in RULES.items():
        network = initial_model(ModelSpec(model, (3, 32, 32), CLASSES), 0).to(
            memory_format=torch.channels_last
        )
        built[name] = METHODS[name.split()[0]](network, **options)
    steps = {name: options.get("total_steps", options.get("every", 1)) for name, options in RULES.items()}
    taken = interleaved({name: cycle(rule, x, y, steps[name]) for name, rule in built.items()}, rounds)
    taken = {name: [value / steps[name] for value in values] for name, values in taken.items()}
    base = statistics.median(taken["sgd"])
    print(f"\n## A step on {model}, batches of {batch}: {rounds} rounds\n")
    print(f"SGD: {base * 1000:.1f} ms.\n")
    print("| rule | by count | measured | quartiles | off by |")
    print("|---|---|---|---|---|")
    for name, (middle, low, high) in ratios(taken, "sgd").items():
        expected = built[name].cost(steps[name]) / steps[name] / 3
        print(
            f"| {name} | {expected:.2f} | {middle:.2f} | {low:.2f}–{high:.2f} | {middle / expected - 1:+.0%} |"
        )


class Pictures(Dataset):
    """As torchvision's CIFAR10: arrays in memory, each made a PIL image and transformed by itself."""

    def __init__(self, x: Tensor, y: Tensor) -> None:
        self.arrays, self.labels = x.permute(0, 2, 3, 1).numpy(), y.tolist()
        self.transform = v2.Compose(
            [
                v2.RandomCrop(32, padding=4),
                v2.RandomHorizontalFlip(),
                v2.ToImage(),
                v2.ToDtype(torch.float32, scale=True),
                v2.Normalize((MEAN,) * 3, (STD,) * 3),
            ]
        )

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.transform(Image.fromarray(self.arrays[index])), self.labels[index]


def loops(model: str, batch: int, rounds: int, examples: int, folder: Path) -> None:
    """An epoch of ours, of a bare loop over tensors in memory, and of one over a DataLoader."""
    rng = np.random.default_rng(0)
    count = examples + 20
    x = rng.integers(0, 256, (count, 3, 32, 32), dtype=np.uint8)
    np.savez(folder / "data.npz", x=x, y=np.arange(count) % CLASSES)
    config = TrainConfig.from_dict(
        {
            "data": str(folder / "data.npz"),
            "num_train": examples,
            "num_unlabeled": 10,
            "num_test": 10,
            "model": model,
            "batch_size": batch,
            "augment": True,
            "lr": 1e-3,
            "device": "cpu",
            "epochs": 1000,
        }
    )
    training = Training(config, folder)
    images, labels = training.splits.train.x, training.splits.train.y
    assert labels is not None

    def fresh() -> tuple[torch.nn.Module, torch.optim.Optimizer]:
        network = initial_model(ModelSpec(model, (3, 32, 32), CLASSES), 0).to(
            memory_format=torch.channels_last
        )
        return network, torch.optim.SGD(network.parameters(), lr=1e-3, momentum=0.9)

    def update(network: torch.nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor) -> None:
        optimizer.zero_grad()
        functional.cross_entropy(network(x.contiguous(memory_format=torch.channels_last)), y).backward()
        optimizer.step()

    bare_network, bare_optimizer = fresh()
    generator = torch.Generator()

    def bare() -> None:
        for chosen in torch.randperm(examples).split(batch):
            cut = crop_and_flip(images[chosen], draw_crops(len(chosen), generator))
            x = (cut.float() / 255 - MEAN) / STD
            update(bare_network, bare_optimizer, x, labels[chosen])

    pil_network, pil_optimizer = fresh()
    loader = DataLoader(Pictures(images, labels), batch, shuffle=True)

    def pil() -> None:
        for x, y in loader:
            update(pil_network, pil_optimizer, x, y)

    taken = interleaved({"ours": training.run_epoch, "bare": bare, "DataLoader and PIL": pil}, rounds)
    print(f"\n## An epoch of {examples:,} images on {model}, batches of {batch}: {rounds} rounds\n")
    print("| loop | images/s | speed against the bare loop | quartiles |")
    print("|---|---|---|---|")
    for name, (middle, low, high) in ratios(taken, "bare").items():
        speed = examples / statistics.median(taken[name])
        print(f"| {name} | {speed:,.0f} | {1 / middle:.3f} | {1 / high:.3f}–{1 / low:.3f} |")


@click.command()
@click.option("--rounds", default=15, show_default=True)
@click.option("--examples", default=1280, show_default=True)
def main(rounds: int, examples: int) -> None:
    torch.set_num_threads(1)
    keep_freed_memory()  # as `gmprobe train` does; the bare loops get it too
    torch.manual_seed(0)
    print("# What training costs\n")
    print(
        f"`python benchmarks/train_cost.py --rounds {rounds} --examples {examples}`, torch {torch.__version__}, "
        f"torchvision {torchvision.__version__}, Python {platform.python_version()}, one thread of {os.cpu_count()} "
        "cores. CPU seconds, taking turns; medians of the ratios within a round. Random 32×32 RGB images."
    )
    for model, batch in MODELS.items():
        rules(model, batch, rounds)
    for model, batch in MODELS.items():
        with tempfile.TemporaryDirectory() as folder:
            loops(model, batch, rounds, examples, Path(folder))


if __name__ == "__main__":
    main()
