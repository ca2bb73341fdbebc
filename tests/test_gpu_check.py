"""The check for a GPU runs on a CPU and on the simulated device, finds them equal, and goes on where it ended."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import simulated_device

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import gpu_check

BENCHMARKS, TESTS = Path(gpu_check.__file__).parent, Path(__file__).parent
ON_SIM = "import simulated_device; simulated_device.install(); import gpu_check; gpu_check.main()"


def require_right(folder: Path, device: str) -> dict[str, Any]:
    """No cell failed, but for peers that are not installed; numbers are the CPU's."""
    parts: dict[str, Any] = json.loads((folder / "gpu-check.json").read_text())["cells"][device]
    rows = [row for cells in parts.values() for cell in cells.values() for row in cell["rows"]]
    assert {row.get("failed", "not installed") for row in rows} == {"not installed"}
    assert {row.get("off by over 1%", 0) for row in rows} == {0}
    assert {row.get("right", "yes") for row in rows} == {"yes"}
    return parts


def test_runs_on_a_cpu_and_goes_on_where_time_ran_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def check(*options: str) -> str:
        given = ["--device", "cpu", "--size", "small", "--out", str(tmp_path), *options]
        gpu_check.main(given, standalone_mode=False)
        return capsys.readouterr().err

    with pytest.raises(SystemExit, match="cells are left, rnn first"):
        check("--seconds", "0")
    assert "three steps of iam-d" in check()
    assert list(require_right(tmp_path, "cpu")) == ["values", "rules", "memory", "products", "throughput"]
    page = (tmp_path / "gpu-check.md").read_text()
    assert page.startswith("# gm_probe on the device cpu: no GPU was used\n")
    assert "| mlp-4, 4 × 8² | H v |" in page
    assert check() == "", "what was done is not done again"


@pytest.mark.skipif(not simulated_device.available(), reason="this torch can have no device in Python")
def test_runs_on_a_second_device(tmp_path: Path) -> None:
    options = [
        option for part in ("values", "rules", "products", "throughput") for option in ("--only", part)
    ]
    subprocess.run(
        [sys.executable, "-W", "ignore", "-c", ON_SIM, "--device", "sim", "--size", "small", *options],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (BENCHMARKS.parent, BENCHMARKS, TESTS)))},
        cwd=tmp_path,
        check=True,
        timeout=300,
    )
    require_right(tmp_path, "sim")
