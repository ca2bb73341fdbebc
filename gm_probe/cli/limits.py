"""What the shell lets a process have (``ulimit``), where libraries would end it without a word."""

from __future__ import annotations

import subprocess
import sys

from gm_probe.errors import ResourceError

try:
    import resource
except ImportError:  # Windows has no such limits
    resource = None  # type: ignore[assignment]


def require_room_for_torch() -> None:
    """Look, in a process that may abort, whether torch loads within this process's limit of memory.

    Raises:
        ResourceError: it does not.
    """
    if resource is None or "torch" in sys.modules:
        return
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    if limit == resource.RLIM_INFINITY:
        return
    tried = subprocess.run([sys.executable, "-P", "-c", "import torch"], capture_output=True, check=False)
    if tried.returncode != 0:
        raise ResourceError(
            f"torch cannot be loaded within {limit / 2**20:,.0f} MiB of memory; raise `ulimit -v`"
        )
