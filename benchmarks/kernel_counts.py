"""Count the kernels, copies and host reads of a pass, beside those of a plain forward and backward pass.

Usage: python benchmarks/kernel_counts.py [MODEL ...]
       python benchmarks/kernel_counts.py --steps [MODEL]

With --steps it counts a training step on the simulated device of tests/. Other counts are of dispatched operations on
the CPU, and need no GPU: each is a kernel launch there. Views, empty tensors and zero tangents that torch never
materialises are not counted.
"""

from __future__ import annotations

import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from gm_probe import ModelSpec, build_model
from gm_probe.curvature.operators import fisher, hessian
from gm_probe.data.batches import Batches
from gm_probe.inconsistency.ascent import Divergence
from gm_probe.linalg.work import Work
from gm_probe.models.parameters import Parameters, as_measured
from gm_probe.training.config import TrainConfig
from gm_probe.training.run import Training

FREE = frozenset((
    "view", "_unsafe_view", "t", "transpose", "permute", "expand", "slice", "select", "split", "split_with_sizes",
    "unsqueeze", "squeeze", "detach", "alias", "as_strided", "unbind", "_reshape_alias", "unfold", "diagonal",
    "empty", "empty_strided", "empty_like", "new_empty", "new_empty_strided", "_efficientzerotensor", "to",
    "_has_same_storage_numel", "is_same_size", "_local_scalar_dense",
))  # fmt: skip
COPIES = ("clone", "_to_copy", "copy_", "cat")
STEPS: dict[str, dict[str, Any]] = {
    "sgd": {"augment": True},
    "sam": {"augment": True, "method": "sam"},
    "iam-d": {"augment": True, "method": "iam-d"},
    "fixmatch": {"objective": "fixmatch", "labels": 20, "mu": 1},
    "fixmatch, iam-d": {"objective": "fixmatch", "labels": 20, "mu": 1, "method": "iam-d"},
    "simclr": {"objective": "simclr"},
}
"""Runs whose steps are counted, on images of 32 × 32."""
FEW, MORE, BATCH = 4, 12, 20
"""Steps of the epochs that are compared, fewer than lie between two looks at the loss; examples in a batch."""
MODELS = ("6cnn", "torchvision:resnet18", "torchvision:resnet50")


class Operations(TorchDispatchMode):
    """Counts every operation that is dispatched within, by its name."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        self.found[func._schema.name.partition("::")[2]] += 1
        return func(*args, **(kwargs or {}))

    @property
    def kernels(self) -> int:
        return sum(count for name, count in self.found.items() if name not in FREE)

    @property
    def copies(self) -> int:
        return sum(self.found[name] for name in COPIES)

    @property
    def reads(self) -> int:
        """How often the host waited for a number."""
        return self.found["_local_scalar_dense"]


def passes(
    model: nn.Module, x: torch.Tensor, y: torch.Tensor, batch_size: int
) -> dict[str, Callable[[], Any]]:
    """Return each pass over x (N, ...) in batches, by its name; ``plain`` is one batch's own gradient."""
    parameters, work = Parameters(model), Work(len(x))
    batches = Batches.from_tensors(x, batch_size=batch_size)
    with torch.no_grad():
        logits = torch.cat([parameters.logits(batch.x) for batch in batches])
    v = torch.randn(parameters.size, generator=torch.Generator().manual_seed(0)) / parameters.size**0.5
    divergence = Divergence(parameters, batches, logits, work)
    f, h = fisher(parameters, batches, logits, work), hessian(parameters, batches, y, work)

    def plain() -> Any:
        return torch.autograd.grad(functional.cross_entropy(model(x), y), list(model.parameters()))

    return {
        "plain": plain,
        "KL gradient": lambda: divergence.value_and_gradient(0.1 * v),
        "KL": lambda: divergence.terms(0.1 * v),
        "F v": lambda: f.matvec(v),
        "H v": lambda: h.matvec(v),
    }


def counted(run: Callable[[], Any]) -> Operations:
    """Run once to settle what is tried on first use, then count."""
    run()
    with Operations() as operations:
        run()
    return operations


def step_counts(settings: Mapping[str, Any], folder: Path, device: str = "sim") -> dict[str, float]:
    """What one more step in an epoch asks of the simulated device: kernels, uploads without a wait, and waits."""
    few, more = (_epoch(settings, folder, steps, device) for steps in (FEW, MORE))
    return {name: (more[name] - few[name]) / (MORE - FEW) for name in ("kernels", "uploads", "waits")}


def _epoch(settings: Mapping[str, Any], folder: Path, steps: int, device: str) -> Counter[str]:
    """The counts of a run's second epoch, of so many steps."""
    from simulated_device import COUNTS

    labeled = settings.get("labels", 0)
    count = steps * BATCH + labeled
    x = np.random.default_rng(0).integers(0, 256, (count + 20, 3, 32, 32), dtype=np.uint8)
    data = folder / f"{count}.npz"
    np.savez(data, x=x, y=np.arange(len(x)) % 10)
    given = {"data": str(data), "num_train": count, "num_unlabeled": 10, "num_test": 10}
    config = TrainConfig.from_dict({**given, "batch_size": BATCH, "lr": 1e-3, "device": device, **settings})
    training = Training(config, folder / "run")
    training.run_epoch()
    COUNTS.clear()
    training.run_epoch()
    return COUNTS.copy()


def main_of_steps(model: str) -> None:
    sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
    import simulated_device

    simulated_device.install()
    print("| step | kernels | uploads | waits |\n|---|---:|---:|---:|")
    with tempfile.TemporaryDirectory() as folder:
        for name, settings in STEPS.items():
            found = step_counts({"model": model, **settings}, Path(folder))
            print(f"| {name} | {found['kernels']:g} | {found['uploads']:g} | {found['waits']:g} |")


def main(names: Sequence[str]) -> None:
    if names[:1] == ["--steps"]:
        main_of_steps(*(names[1:] or ["6cnn"]))
        return
    print("| network | pass | kernels | of plain | copies | host reads |\n|---|---|---|---|---|---|")
    for name in names or MODELS:
        torch.manual_seed(0)
        model = build_model(ModelSpec(name, (3, 32, 32), 10)).eval()
        x, y = torch.randn(4, 3, 32, 32), torch.randint(0, 10, (4,))
        with as_measured(model):
            found = {kind: counted(run) for kind, run in passes(model, x, y, len(x)).items()}
        for kind, of in found.items():
            share = of.kernels / found["plain"].kernels
            print(f"| {name} | {kind} | {of.kernels:,} | {share:.2f} | {of.copies} | {of.reads} |")


if __name__ == "__main__":
    main(sys.argv[1:])
