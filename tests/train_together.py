"""What test_train_processes.py runs, also under torchrun: train the runs of a JSON file, and one step under DDP."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from gm_probe.errors import UsageError
from gm_probe.runtime import processes
from gm_probe.training.config import TrainConfig
from gm_probe.training.loop import train
from gm_probe.training.methods import METHODS


def gradients(method: str, wrap: bool) -> list[float]:
    """The gradient of 8 examples, of which this process holds its part."""
    torch.manual_seed(0)
    model: nn.Module = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    x, y = torch.randn(7, 3, dtype=torch.float64), torch.arange(7) % 3
    mine = slice(processes.rank(), None, processes.count())
    rule = METHODS[method](DistributedDataParallel(model) if wrap else model)
    rule.backward(x[mine], y[mine])
    return torch.cat([p.grad.flatten() for p in model.parameters()]).tolist()  # type: ignore[union-attr]


def train_all(folder: Path) -> None:
    runs = json.loads((folder / "runs.json").read_text())
    with processes.joined(torch.device("cpu")):
        together = processes.count() > 1
        for name, settings in runs.items():
            try:
                train(TrainConfig.from_dict(settings), folder / f"{name}-{processes.count()}")
            except UsageError as error:
                (folder / f"{name}-{processes.count()}-{processes.rank()}.txt").write_text(str(error))
        steps = {method: gradients(method, wrap=together) for method in METHODS}
        # at the first process alone, so that what each holds is compared too
        every = processes.from_all(steps)
        if processes.rank() == 0:
            (folder / f"gradients-{processes.count()}.json").write_text(json.dumps(every))


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    train_all(folder)
    threads = [path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")]
    assert not any("gloo" in thread for thread in threads), threads  # one that outlives Python aborts its end


if __name__ == "__main__":
    main(Path(sys.argv[1]))
