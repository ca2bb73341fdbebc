"""What may be asked of the statistics. Imports neither pandas nor scipy, so that a wrong request is told at once."""

from __future__ import annotations

from collections.abc import Collection

from gm_probe.errors import UsageError
from gm_probe.tables.table import require_known

PARTS = ("details", "conditional", "prediction", "comparisons")
"""What can be skipped; ``details`` holds all that goes beyond τ and comparisons."""
LEAST_RESAMPLES = 100


def require_statistics(skip: Collection[str], resamples: int) -> None:
    """Raise UsageError for an unknown part in ``skip``, or too few ``resamples``."""
    require_known(skip, PARTS, "part to skip named")
    if resamples < LEAST_RESAMPLES:
        raise UsageError(
            f"{resamples} resamples are too few for an interval or p. Give {LEAST_RESAMPLES} or more"
        )
