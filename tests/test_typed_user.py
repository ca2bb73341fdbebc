"""A user's file under `mypy --strict`: what gm_probe ships of types is enough to write against it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
USER = """
from pathlib import Path

import torch
from torch import Tensor, nn

import gm_probe
from gm_probe import (
    IAMD, SAM, Batches, Estimate, Normalization, Operator, Parameters, ProbeError, Report, Settings, TrainConfig,
)


def figures(model: nn.Module, images: Tensor, labels: Tensor | None = None) -> dict[str, float | None]:
    batches = Batches.from_tensors(images, labels, batch_size=10)
    report: Report = gm_probe.measure(model, batches, ["fisher_trace"], Settings(rho=0.05, num_starts=3))
    rows: dict[str, Estimate] = report.rows
    return {name: row.value for name, row in rows.items()}


def top(model: nn.Module, batches: Batches, logits: Tensor) -> float:
    fisher: Operator = gm_probe.fisher(Parameters(model), batches, logits)
    return gm_probe.lanczos(fisher, generator=torch.Generator()).value


def step(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor) -> float:
    rule: gm_probe.Rule = IAMD(model, nn.CrossEntropyLoss(), rho=0.1, beta=1.0, kl_grad="both")
    optimizer.zero_grad()
    seen = rule.backward(x, y)
    optimizer.step()
    return float(seen.loss)


def run(out: Path) -> object:
    try:
        return gm_probe.train(TrainConfig(model="mlp-8", epochs=1), out)["status"]
    except ProbeError as error:
        return error.exit_code


def patient(model: nn.Module, batches: Batches) -> str | int:
    try:
        gm_probe.measure(model, batches)
    except gm_probe.BusyError as error:
        return str(error)
    except (gm_probe.UsageError, gm_probe.CheckpointError, gm_probe.DataError) as error:
        return f"mine: {error}"
    except (gm_probe.DivergedError, gm_probe.ResourceError, gm_probe.StorageError) as error:
        return error.exit_code
    return 0


def checkpoint(path: Path, model: nn.Module) -> None:
    gm_probe.load_weights(model, gm_probe.read_checkpoint(path))
    spec = gm_probe.ModelSpec("mlp-8", (1, 8, 8), 10)
    gm_probe.save_checkpoint(path, model, spec, Normalization((0.5,), (0.25,)), ("a", "b"))


def unlabeled(model: nn.Module) -> SAM:
    return SAM(model, gm_probe.FixMatch(threshold=0.9), rho=0.05, m=8)


def kl(p: Tensor, q: Tensor) -> Tensor:
    return gm_probe.kl_divergence(p, q)
"""
WRONG = """
import gm_probe

gm_probe.Settings(rho="wide")
gm_probe.kl_divergence([0.5], [0.5])
gm_probe.Batches.from_tensors("images")
rule: int = gm_probe.MEASURES["fisher_trace"]
"""


def strict(text: str, folder: Path) -> tuple[int, str]:
    (folder / "user.py").write_text(text, encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--strict", "--config-file", os.devnull, "user.py"],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), "MYPY_CACHE_DIR": str(folder.parent / "mypy")},
        capture_output=True,
        text=True,
    )
    assert done.returncode in {0, 1}, done.stdout + done.stderr
    return done.returncode, done.stdout


def test_a_users_file_type_checks(tmp_path: Path) -> None:
    pytest.importorskip("mypy", reason="mypy is an extra")
    _, out = strict(USER, tmp_path)
    assert not [line for line in out.splitlines() if line.startswith("user.py")], out


def test_a_users_mistakes_are_seen(tmp_path: Path) -> None:
    """The types say something: four wrong lines, four complaints."""
    pytest.importorskip("mypy", reason="mypy is an extra")
    code, out = strict(WRONG, tmp_path)
    lines = {
        int(line.split(":")[1]) for line in out.splitlines() if line.startswith("user.py") and "error" in line
    }
    assert (code, lines) == (1, {4, 5, 6, 7}), out
