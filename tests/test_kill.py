"""Two runs are killed at random and resumed: benchmarks/kill_resume.py does many, of every rule."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HARNESS = Path(__file__).parents[1] / "benchmarks" / "kill_resume.py"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the harness forks")
def test_killed_runs_end_in_the_same_bits() -> None:
    rules = "iam-d one pass, fp16, average, clipping;simclr, iam-d one pass"
    done = subprocess.run(
        [sys.executable, str(HARNESS), "--kills", "1", "--rules", rules, "--json"],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(HARNESS.parents[1])},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    for result in json.loads(done.stdout):
        assert result["kills"] >= 1
        assert result["equal"] == result["runs"] >= 1
