"""Do a device's numbers agree with the CPU's: every measure of four networks, every rule's steps, a resumed run?"""

from __future__ import annotations

import dataclasses
import math
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torchvision.models import VisionTransformer

from gm_probe import Batches, ModelSpec, Settings, TrainConfig, build_model, measure, train
from gm_probe.training.methods import METHODS
from gpu.plan import Cells, Size

CLASSES = 10
WITHIN = 0.01
"""Values count as equal up to this relative difference: iterations stop at a residual of 1 %."""


class Recurrent(nn.Module):
    """An RNN or LSTM that reads an image row by row."""

    def __init__(self, kind: str, pixels: int, width: int) -> None:
        super().__init__()
        self.inner = getattr(nn, kind.upper())(3 * pixels, width, batch_first=True)
        self.head = nn.Linear(width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.inner(x.movedim(1, 2).flatten(2))[0][:, -1])


def network(name: str, pixels: int, width: int = 0, seed: int = 0) -> nn.Module:
    """A network of gm_probe's by its name, an RNN or torchvision's Vision Transformer, with seeded weights."""
    torch.manual_seed(seed)
    if name in ("rnn", "lstm"):
        return Recurrent(name, pixels, width)
    if name == "vit":
        return VisionTransformer(pixels, pixels // 4, 2, 2, width, 2 * width, num_classes=CLASSES)
    return build_model(ModelSpec(name, (3, pixels, pixels), CLASSES))


def images(count: int, pixels: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(count, 3, pixels, pixels, generator=generator), torch.arange(count) % CLASSES


def cpu_noise(settings: type) -> dict[str, str]:
    """The setting by which a device draws the CPU's noise, in versions where that is a choice."""
    return {field.name: "cpu" for field in dataclasses.fields(settings) if field.name == "noise_device"}


def reference(size: Size) -> Cells:
    """What the CPU measures; it may be taken beforehand on another machine."""
    for name in size.networks:
        yield name, partial(_measured, name, size, torch.device("cpu"), False)


def values(size: Size, device: torch.device, references: Mapping[str, Any]) -> Cells:
    for name in size.networks:
        for tf32 in (False, True):
            told = f"measures of {name}" + ", TF32" * tf32
            yield told, partial(_compared, name, size, device, tf32, references)


def _measured(name: str, size: Size, device: torch.device, tf32: bool) -> dict[str, Any]:
    few = {"num_starts": 2, "min_probes": 2, "max_probes": 4, "sub_batch": 4, "max_iterations": 40}
    settings = Settings(**few, tf32=tf32, **cpu_noise(Settings))
    model, fresh = (network(name, size.pixels, size.width, seed).eval().to(device) for seed in (0, 1))
    data = Batches.from_tensors(*images(size.examples, size.pixels), batch_size=size.examples // 2)
    report = measure(model, data, size.measures, settings, initial=fresh)
    return {"rows": [], "values": {measure: row.value for measure, row in report.rows.items()}}


def _compared(
    name: str, size: Size, device: torch.device, tf32: bool, references: Mapping[str, Any]
) -> dict[str, Any]:
    expected, found = references[name]["values"], _measured(name, size, device, tf32)["values"]
    return {"rows": [judged({key: apart(found[key], expected[key]) for key in expected})], "values": found}


def apart(one: float | None, other: float | None) -> float:
    """The relative difference; infinite where one is undefined alone."""
    if one is None or other is None:
        return 0.0 if one is other else math.inf
    return abs(one - other) / max(abs(one), abs(other), 1e-12)


def judged(differences: Mapping[str, float]) -> dict[str, Any]:
    """A row of the page."""
    off = sum(not difference <= WITHIN for difference in differences.values())
    worst = sorted(differences, key=lambda key: -differences[key])[:3]
    furthest = ", ".join(f"{key} {differences[key]:.1e}" for key in worst)
    return {"numbers": len(differences), f"off by over {WITHIN:.0%}": off, "largest differences": furthest}


def rules(size: Size, device: torch.device, references: Mapping[str, Any]) -> Cells:
    for method in METHODS:
        yield f"three steps of {method}", partial(_steps, method, size, device)
    yield "a run that goes on here from a CPU", partial(_resumed, size, "cpu", str(device))
    yield "a run that goes on on a CPU from here", partial(_resumed, size, str(device), "cpu")


def _steps(method: str, size: Size, device: torch.device) -> dict[str, Any]:
    x, y = images(size.batch, size.pixels)
    ways = []
    for place in (torch.device("cpu"), device):
        model = network(size.trained, size.pixels).to(place)
        begin = nn.utils.parameters_to_vector(model.parameters()).detach().clone()
        rule = METHODS[method](model, generator=torch.Generator().manual_seed(1))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
        for _ in range(3):
            optimizer.zero_grad()
            rule.backward(x.to(place), y.to(place))
            optimizer.step()
        ways.append((nn.utils.parameters_to_vector(model.parameters()).detach() - begin).cpu())
    return {"rows": [judged({"weights": float((ways[1] - ways[0]).norm() / ways[0].norm())})]}


class _Stop(Exception):
    """Ends a run within its second epoch, which then goes on elsewhere."""


def _resumed(size: Size, first: str, then: str) -> dict[str, Any]:
    def stop(row: Mapping[str, Any]) -> None:
        if row["epoch"] == 2:
            raise _Stop

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        x, y = images(4 * size.batch + 20, size.pixels)
        np.savez(folder / "data.npz", x=x.numpy(), y=y.numpy())
        config = TrainConfig.from_dict(
            {"data": str(folder / "data.npz"), "num_unlabeled": 10, "num_test": 10, "model": size.trained}
            | {"batch_size": size.batch, "epochs": 2, "lr": 0.01, "method": "iam-d", **cpu_noise(TrainConfig)}
        )
        whole = train(config.replace(device="cpu"), folder / "whole")
        with suppress(_Stop):
            train(config.replace(device=first), folder / "run", notify=stop)
        ended = train(config.replace(device=then), folder / "run", resume=True)
    return {"rows": [judged({"test cross-entropy": apart(ended["test_ce"], whole["test_ce"])})]}
