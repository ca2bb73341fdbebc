"""The examples run as their first lines say, on images small enough for a test."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """train/ and val/ of bright and dark noise, 32×32."""
    rng, folder = np.random.default_rng(0), tmp_path_factory.mktemp("images")
    for part, count in (("train", 24), ("val", 12)):
        for name, low in (("bright", 150), ("dark", 0)):
            (folder / part / name).mkdir(parents=True)
            for index in range(count):
                pixels = rng.integers(low, low + 100, (32, 32, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / part / name / f"{index}.png")
    return folder


def test_finetune_in_two_processes_and_bf16(images: Path, tmp_path: Path) -> None:
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [
            sys.executable,
            *torchrun,
            str(ROOT / "examples" / "finetune.py"),
            str(images),
            *["--image-size", "32", "--epochs", "3", "--batch-size", "12", "--lr", "0.05"],
            *["--amp", "bf16"],
        ],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    found = re.findall(r"epoch (\d)  loss (\S+)  inconsistency (\S+)  validation accuracy (\S+)", done.stdout)
    assert [int(epoch) for epoch, *_ in found] == [1, 2, 3]
    assert float(found[-1][3]) > 0.9
    assert all(float(row[2]) > 0 for row in found)
    assert torch.load(tmp_path / "finetuned.pt", weights_only=True)["fc.weight"].shape == (2, 512)
