"""Images a second of training: the rules against a bare loop, and many small models trained as one."""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from stacked_training import speeds
from torch import Tensor
from torch.nn import functional

from gm_probe import TrainConfig
from gm_probe.training.run import Training
from gpu.agreement import CLASSES, network
from gpu.plan import Cells, Size
from gpu.products import seconds_of

METHODS = ("sgd", "sam", "iam-d")


def throughput(size: Size, device: torch.device, references: Mapping[str, Any]) -> Cells:
    yield size.throughput[0], partial(_loops, size, device)
    yield f"{size.stacked[0]} 6CNNs", partial(_stacked, size, device)


def _rows(speeds: Mapping[str, float]) -> dict[str, Any]:
    first = next(iter(speeds.values()))
    rows = [{"how": how, "images/s": speed, "of the first": speed / first} for how, speed in speeds.items()]
    return {"rows": rows}


def _loops(size: Size, device: torch.device) -> dict[str, Any]:
    model, batch, steps = size.throughput
    count = batch * steps
    shape = (count + 20, 3, size.pixels, size.pixels)
    x, y = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8), np.arange(count + 20) % CLASSES
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "data.npz"
        np.savez(data, x=x, y=y)
        given = {"data": str(data), "num_train": count, "num_unlabeled": 10, "num_test": 10, "augment": True}
        given |= {"model": model, "batch_size": batch, "lr": 1e-3, "epochs": 1000, "device": str(device)}
        on_device = torch.tensor(x[:count], device=device), torch.tensor(y[:count], device=device)
        runs: dict[str, Callable[[], Any]] = {"a bare loop of SGD": _bare(model, batch, *on_device)}
        for method in METHODS:
            config = TrainConfig.from_dict({**given, "method": method})
            runs[method] = Training(config, Path(folder) / method).run_epoch
        for run in runs.values():
            run()
        return _rows({how: count / seconds_of(run, device, size.rounds) for how, run in runs.items()})


def _bare(model: str, batch: int, images: Tensor, labels: Tensor) -> Callable[[], None]:
    """An epoch of SGD as one would write it by hand, over images that stay on the device."""
    layout = torch.channels_last
    built = network(model, images.shape[-1]).to(images.device, memory_format=layout)
    optimizer = torch.optim.SGD(built.parameters(), lr=1e-3, momentum=0.9)
    place = {"device": images.device}
    along = torch.arange(images.shape[-1], **place)

    def epoch() -> None:
        for chosen in torch.randperm(len(images), **place).split(batch):
            padded, each = functional.pad(images[chosen], (4,) * 4), torch.arange(len(chosen), **place)
            rows, columns = (torch.randint(9, (len(chosen), 1), **place) + along for _ in range(2))
            flipped = torch.rand(len(chosen), 1, **place) < 0.5
            columns = torch.where(flipped, columns.flip(1), columns)
            cut = padded[each[:, None, None], :, rows[:, :, None], columns[:, None]].movedim(-1, 1)
            x = (cut.float() / 255 - 0.5) / 0.29
            optimizer.zero_grad()
            functional.cross_entropy(built(x.contiguous(memory_format=layout)), labels[chosen]).backward()
            optimizer.step()

    return epoch


def _stacked(size: Size, device: torch.device) -> dict[str, Any]:
    count, batch = size.stacked
    apart, together = speeds(count, batch, size.throughput[2], size.rounds, device, shared=False)
    return _rows(
        {"one by one": statistics.median(apart), "as one stacked model": statistics.median(together)}
    )
