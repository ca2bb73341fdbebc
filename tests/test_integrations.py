"""The rules inside Lightning, Hugging Face's Trainer and accelerate: the examples run, each in processes of its own."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn

import gm_probe

ROOT = Path(__file__).parents[1]
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")


def ran(example: str, *options: str, launch: tuple[str, ...] = ()) -> str:
    done = subprocess.run(
        [sys.executable, *launch, str(ROOT / "examples" / example), *options],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def losses(text: str) -> list[float]:
    return [float(value) for value in re.findall(r"loss'?:? '?(\d\.\d+)", text)]


def test_lightning(tmp_path: Path) -> None:
    """The loss falls, and a checkpoint goes on with the optimizer's, the rule's and the scheduler's state."""
    pytest.importorskip("lightning")
    file = tmp_path / "run.ckpt"
    first = losses(ran("lightning_training.py", "--epochs", "2", "--save", str(file)))
    state = torch.load(file, weights_only=False)["optimizer_states"][0]
    assert state["rule"]["steps"] == 2 * 29
    more = losses(
        ran("lightning_training.py", "--epochs", "3", "--resume", str(file), "--precision", "bf16-mixed")
    )
    assert (len(first), len(more)) == (2, 1)
    assert more[0] < first[1] < first[0]


@pytest.mark.parametrize("options", ["--model vit --epochs 3", "--model bert --bf16 --epochs 6"])
def test_trainer(options: str, tmp_path: Path) -> None:
    """Dict batches, padding, two batches a step, bf16; the rule's state is in the Trainer's checkpoint."""
    pytest.importorskip("accelerate")
    text = ran("huggingface_trainer.py", *options.split(), "--out", str(tmp_path))
    found = losses(text)
    assert found[-2] < found[0]  # the last one is the mean of all
    epochs = int(options.split()[-1])
    assert f"rule IAMD steps {8 * epochs}" in text
    last = tmp_path / f"checkpoint-{4 * epochs}"
    assert torch.load(last / "optimizer.pt", weights_only=True)["rule"]["steps"] == 8 * epochs


def test_accelerate_in_two_processes(tmp_path: Path) -> None:
    """Two processes that share each batch come to the weights of the rule itself in one process."""
    pytest.importorskip("accelerate")
    file = tmp_path / "weights.pt"
    text = ran("accelerate_loop.py", "--epochs", "2", "--save", str(file), launch=TORCHRUN)
    assert text.count("processes 2") == 2
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    images, labels = load_digits(return_X_y=True)
    x, y = torch.tensor(images[:1792], dtype=torch.float32) / 16, torch.tensor(labels[:1792])
    rule = gm_probe.IAMD(model, rho=0.1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for _ in range(2):
        for xs, ys in zip(x.split(64), y.split(64), strict=True):
            optimizer.zero_grad()
            rule.backward(xs, ys)
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
    for name, value in torch.load(file, weights_only=True).items():
        torch.testing.assert_close(value, model.state_dict()[name], rtol=1e-3, atol=1e-4)


def test_the_lines_of_the_page_are_those_of_the_examples() -> None:
    page = (ROOT / "docs" / "integrations.md").read_text(encoding="utf-8")
    sections = dict(zip(*[iter(re.split(r"^## (.*)$", page, flags=re.MULTILINE)[1:])] * 2, strict=True))
    names = {
        "Lightning": "lightning_training",
        "Hugging Face Trainer": "huggingface_trainer",
        "accelerate": "accelerate_loop",
    }
    for section, name in names.items():
        script = (ROOT / "examples" / f"{name}.py").read_text(encoding="utf-8")
        lines = {line.split("  #")[0].strip() for line in script.splitlines()}
        added = [line[1:].strip() for line in sections[section].splitlines() if line.startswith("+")]
        assert len(added) > 4
        assert set(added) <= lines, set(added) - lines
