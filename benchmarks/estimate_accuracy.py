"""How far `gmprobe estimate` is off, and how often its intervals cover, on public CIFAR-10 networks under shifts.

    python benchmarks/estimate_accuracy.py --checkpoints DIR --data CIFAR10_TEST_FOLDER --cache DIR

The held-out shifts (benchmarks/held_out_shifts.py) belong to no family that the calibration uses. Label shift is made
by drawing images with unequal class shares. All logits are kept under --cache, so that a second call goes on at once.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

import torch
from cifar_resnet import resnet20, resnet56
from held_out_shifts import held_out_shifts

from gm_probe.accuracy.predictions import predict
from gm_probe.accuracy.shifts import shifted, synthetic_shifts
from gm_probe.core.batches import Batches, Normalization
from gm_probe.core.checkpoints import load_weights, read_checkpoint
from gm_probe.core.datasets import Examples, open_source

NETWORKS = {"resnet20-12fca82f.th": resnet20, "resnet56-4bfd9763.th": resnet56}
IMAGENET = Normalization((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
CPU = torch.device("cpu")


def sets(data: str, size: int, clean: int) -> dict[str, Examples]:
    """Return a validation set, a target set to be shifted and a larger one that is not, which share no image."""
    pool = open_source(data, labeled=True, decode=False).pool
    order = torch.randperm(len(pool), generator=torch.Generator().manual_seed(0))
    parts = order[:size], order[size : 2 * size], order[2 * size : 2 * size + clean]
    names = ("validation", "target", "clean")
    return {name: pool.select(part).in_memory() for name, part in zip(names, parts, strict=True)}


def conditions(found: dict[str, Examples]) -> Iterator[tuple[str, str, int, Examples]]:
    """Yield kind, family, strength and examples of every pass; made as they are needed."""
    yield "validation", "none", 0, found["validation"]
    yield "clean", "none", 0, found["clean"]
    for kind, part, shifts in (
        ("calibration", "validation", synthetic_shifts(3)),
        ("held-out", "target", held_out_shifts()),
    ):
        for shift in shifts:
            examples = found[part]
            x = shifted(examples.x, shift, seed=0, device=CPU)
            yield kind, shift.family, shift.strength, replace(examples, x=x)


def collect(checkpoints: Path, found: dict[str, Examples], cache: Path) -> None:
    """Run every network over every condition, except where the cache has it."""
    models = {}
    for name, build in NETWORKS.items():
        models[name] = build().eval()
        load_weights(models[name], read_checkpoint(checkpoints / name))
    for kind, family, strength, examples in conditions(found):
        for name, model in models.items():
            file = cache / f"{name}-{kind}-{family}-{strength}.pt"
            if file.exists():
                continue
            made = predict(model, Batches(examples, IMAGENET))
            right = float((made.classes == examples.y).double().mean())
            torch.save({**asdict(made), "labels": examples.y}, file)
            print(f"{name:22s} {kind:12s} {family:12s} {strength} accuracy {right:.3f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkpoints", type=Path, required=True)
    parser.add_argument("--data", required=True, help="Folder of class folders of CIFAR-10 test images.")
    parser.add_argument("--cache", type=Path, required=True)
    parser.add_argument(
        "--size", type=int, default=1000, help="Images of the validation and of the target set."
    )
    parser.add_argument("--clean", type=int, default=2000, help="Unshifted images for label shift.")
    given = parser.parse_args()
    given.cache.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    collect(given.checkpoints, sets(given.data, given.size, given.clean), given.cache)


if __name__ == "__main__":
    sys.exit(main())
