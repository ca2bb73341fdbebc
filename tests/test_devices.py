"""What this process does with its memory."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

FAULTS = """
import resource, torch
from gm_probe.core.devices import keep_freed_memory

def faults():
    for _ in range(20):  # until the allocator has settled
        torch.ones(2**24)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(5):
        torch.ones(2**24)  # 64 MiB, 16,384 pages
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

print(faults(), keep_freed_memory(), faults())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's allocator only")
def test_freed_memory_is_kept() -> None:
    """The kernel counts the pages that it had to hand out again."""
    done = subprocess.run([sys.executable, "-c", FAULTS], capture_output=True, text=True, check=True)
    default, set_, kept = done.stdout.split()
    assert set_ == "True"
    assert int(default) > 1000  # else there is nothing to keep, and the function can go
    assert int(kept) < 100
