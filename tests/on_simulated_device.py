"""Run in a process of its own by test_simulated_device.py: the same work on the CPU and on "sim".

Every check maps a device to plain values, which must be the same bits on both.
"""

import io
import json
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from pathlib import Path
from typing import Any

import simulated_device
import torch
from torch import Tensor, nn

from gm_probe.cli import main as command_line
from gm_probe.data.batches import Batches
from gm_probe.errors import DeviceError
from gm_probe.measures.catalogue import MEASURES as ALL_MEASURES
from gm_probe.measures.measure import measure
from gm_probe.measures.names import DEFAULT_MEASURES
from gm_probe.measures.settings import Settings
from gm_probe.runs.records import CHECKPOINT, MEASURES, read_metrics
from gm_probe.sweep.recipe import parse_recipe
from gm_probe.sweep.runner import run_recipe
from gm_probe.training import run
from gm_probe.training.config import TrainConfig
from gm_probe.training.loop import train
from gm_probe.training.methods import METHODS, iam, sam

FAST: dict[str, Any] = {
    "data": "digits",
    "model": "mlp-8",
    "num_train": 40,
    "num_unlabeled": 20,
    "num_test": 20,
    "epochs": 1,
    "batch_size": 20,
}
OTHERS = [name for name in ALL_MEASURES if name not in DEFAULT_MEASURES]
FEW = Settings(num_starts=2, max_probes=4, min_probes=2, sub_batch=4, rho_grid=(0.2,), max_iterations=30)
DROPOUT = """
from torch import nn

def build():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 10))
"""


# ---- networks


def convolutional() -> nn.Module:
    layers = [nn.Conv2d(2, 3, 3, padding=1), nn.BatchNorm2d(3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()]
    return nn.Sequential(*layers, nn.Dropout(0.5), nn.Linear(12, 4))


class Attentive(nn.Module):
    """Attention over the four places of a picture, with layer normalisation."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.norm, self.enter, self.head = nn.LayerNorm(4), nn.Linear(8, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.enter(x.flatten(1).view(len(x), 4, 8))
        mixed, _ = self.attention(tokens, tokens, tokens, need_weights=False)
        return self.head(nn.functional.gelu(self.norm(tokens + mixed)).mean(1))


class Forgetful(nn.Module):
    """It makes a constant on the CPU, whatever device its input is on."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.flatten(1)) + torch.arange(4.0)


def network(kind: Callable[[], nn.Module]) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        return kind()


def pictures(count: int = 11) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(count, 2, 4, 4, generator=generator)
    return x, torch.randint(0, 4, (count,), generator=generator)


# ---- checks


def measured(kind: Callable[[], nn.Module], device: str, names: Sequence[str] = DEFAULT_MEASURES) -> Any:
    """What measuring gives; the batches are on the CPU, whatever the model is on."""
    x, y = pictures()
    model = network(kind).eval().to(device)
    report = measure(model, Batches.from_tensors(x, y, batch_size=6), names, FEW)
    return {name: row.as_dict() for name, row in report.rows.items()}


def stepped(method: str, device: str) -> Any:
    """Gradients of two steps of a rule, whole and in sub-batches, with dropout and BatchNorm in train mode."""
    found = []
    for m in (None, 4):
        x, y = pictures(8)
        model = network(convolutional).to(device)
        used = METHODS[method](model, m=m)
        torch.manual_seed(9)
        for _ in range(2):
            used.backward(x.to(device), y.to(device))
        found.append([p.grad.tolist() for p in model.parameters() if p.grad is not None])
        found.append([buffer.tolist() for buffer in model.buffers()])
    return found


def trained(device: str, **settings: Any) -> Any:
    with tempfile.TemporaryDirectory() as folder:
        train(TrainConfig.from_dict({**FAST, **settings, "device": device}), Path(folder) / "run")
        return of_run(Path(folder) / "run")


def of_run(out: Path) -> Any:
    timing = {"seconds", "examples_per_second"}
    rows = [{key: value for key, value in row.items() if key not in timing} for row in read_metrics(out)]
    return rows, (out / CHECKPOINT).read_bytes().hex()


class Interrupted(Exception):
    pass


@contextmanager
def interrupted(at: int) -> Iterator[None]:
    """A run breaks down after its step ``at``."""
    usual = run.Training._report_progress

    def tell(training: run.Training) -> None:
        if training.progress.step == at:
            raise Interrupted

    run.Training._report_progress = tell
    try:
        with suppress(Interrupted):
            yield
    finally:
        run.Training._report_progress = usual


def resumed(first: str, then: str, **settings: Any) -> Any:
    """A run that breaks down on one device within its first epoch and goes on on another; None = it is not stopped."""
    given = {**FAST, "num_train": 80, "epochs": 2, "checkpoint_every": 2, **settings}
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        if first != then or first == "sim":
            with interrupted(3):
                train(TrainConfig.from_dict({**given, "device": first}), out)
            assert not (out / CHECKPOINT).exists()
        train(TrainConfig.from_dict({**given, "device": then}), out, resume=True)
        return of_run(out)


def with_dropout(device: str) -> Any:
    """Stopped within an epoch and resumed on the same device: the device's own generator goes on where it was."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "network.py"
        file.write_text(DROPOUT)
        rows, weights = resumed(device, device, model=f"{file}:build", method="sam")
        place = folder.encode().hex()  # the checkpoint records the file
        return rows, weights.replace(place, "")[-2000:]


def pairs_of(device: str) -> Any:
    with tempfile.TemporaryDirectory() as folder:
        runs = []
        for size, seed in ((40, 0), (40, 1), (50, 0), (50, 1)):
            out = Path(folder) / f"{size}-{seed}"
            train(TrainConfig.from_dict({**FAST, "num_train": size, "seed": seed, "device": "cpu"}), out)
            runs.append(str(out))
        printed = io.StringIO()
        with redirect_stdout(printed), redirect_stderr(io.StringIO()), suppress(SystemExit):
            command_line(["pairs", *runs, "--device", device, "--json"])
        result = json.loads(printed.getvalue())
        return result["measures"], [[pair["kl_ab"], pair["disagreement"]] for pair in result["pairs"]]


def swept(device: str) -> Any:
    recipe = parse_recipe(
        {
            "base": {**FAST, "device": device},
            "grid": {"method": ["sgd", "iam-d"], "seed": [0]},
            "measure": {
                "measures": ["local_inconsistency", "fisher_trace", "hessian_lambda_max"],
                "num_starts": 2,
            },
        }
    )
    with tempfile.TemporaryDirectory() as folder:
        run_recipe(recipe, Path(folder))
        found = {}
        for name in recipe.runs:
            out = Path(folder) / name
            found[name] = of_run(out), json.loads((out / MEASURES).read_text())["measures"]
        return [found[name] for name in sorted(found)]


def refused(device: str) -> Any:
    """What is on another device than the model is named, and no layer or example is blamed."""
    expected = [True] * 4
    if device == "cpu":
        return expected
    x, y = pictures(8)
    model, weights = network(convolutional).to(device), torch.ones(4)
    there = x.to(device), y.to(device)
    weighted = nn.CrossEntropyLoss(weights)
    forgetful = network(Forgetful).eval().to(device)
    return [
        "x is on cpu" in told(lambda: sam.SAM(model).backward(x, y)),
        "the model is on sim:0" in told(lambda: iam.IAMD(model).backward(x.to(device), y)),
        "criterion" in told(lambda: iam.IAMS(model, weighted).backward(*there)),
        "two devices" in told(lambda: measure(forgetful, Batches.from_tensors(x, y))),
    ]


def told(action: Callable[[], object]) -> str:
    try:
        action()
    except DeviceError as error:
        return str(error)
    return ""


CHECKS: dict[str, Callable[[str], Any]] = {
    "the measures of a convolutional network": lambda device: measured(convolutional, device),
    "its other measures": lambda device: measured(convolutional, device, OTHERS),
    "the measures of an attentive network": lambda device: measured(Attentive, device),
    **{f"steps of {method}": lambda device, method=method: stepped(method, device) for method in METHODS},
    "a run by one-pass IAM-D": lambda device: trained(device, method="iam-d-onepass"),
    "a run with all about it": lambda device: trained(
        device,
        model="wrn-10-1",
        augment=True,
        ema_decay=0.5,
        clip_norm=1.0,
        track_every=1,
        eval_every=1,
        optimizer="adamw",
    ),
    "a run by fixmatch": lambda device: trained(device, objective="fixmatch", labels=20, mu=1, batch_size=10),
    "a joint run": lambda device: trained(
        device, objective="joint", method="iam-d", labels=20, mu=1, batch_size=10
    ),
    "a run by simclr": lambda device: trained(device, objective="simclr", batch_size=10),
    "resumed on the same device, with dropout": with_dropout,
    "resumed on the device": lambda device: resumed("cpu", device, method="iam-d-onepass", optimizer="adamw"),
    "resumed on the CPU": lambda device: resumed(device, "cpu", method="iam-d-onepass", ema_decay=0.5),
    "pairs": pairs_of,
    "a sweep": swept,
    "what is elsewhere is named": refused,
}


def judged(check: Callable[[str], Any], expected: Any) -> str:
    """What is wrong on the device; nothing where it gives what is ``expected``."""
    try:
        return "" if check("sim") == expected else "other values"
    except (Exception, SystemExit) as error:  # noqa: BLE001  a fault may show as any
        return f"{type(error).__name__}: {str(error)[:300]}"


def main() -> None:
    simulated_device.install()
    torch.set_num_threads(1)
    expected = {name: check("cpu") for name, check in CHECKS.items()}
    print(json.dumps({name: judged(check, expected[name]) for name, check in CHECKS.items()}))


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    main()
