"""On a second device all is as on the CPU, bit for bit.

The device is simulated (simulated_device.py), in a process of its own: it changes torch for good.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import simulated_device
from on_simulated_device import CHECKS

import gm_probe

pytestmark = pytest.mark.skipif(
    not simulated_device.available(),
    reason=f"this torch lacks {simulated_device.HELPER}: no device in Python",
)


@pytest.fixture(scope="module")
def found() -> dict[str, str]:
    """What went wrong with each check."""
    script = Path(__file__).with_name("on_simulated_device.py")
    paths = os.pathsep.join([str(Path(gm_probe.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(script)],
        env={**os.environ, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    result: dict[str, str] = json.loads(done.stdout.splitlines()[-1])
    return result


@pytest.mark.parametrize("name", CHECKS)
def test_is_bit_identical_with_the_cpu(name: str, found: dict[str, str]) -> None:
    assert found[name] == ""
