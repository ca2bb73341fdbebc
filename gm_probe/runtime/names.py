"""The names that devices may have. Imports no torch, so that a wrong one is reported at once."""

import sys
from importlib.metadata import entry_points

from gm_probe.errors import UsageError, did_you_mean

SUGGESTED = ("auto", "cpu", "cuda", "cuda:1", "xpu")
"""Devices by name, as an error suggests them; torch may know others."""
KINDS = frozenset(
    ("cpu", "cuda", "hip", "hpu", "ipu", "maia", "meta", "mps", "mtia", "privateuseone", "xla", "xpu")
)


def require_device_name(name: str) -> None:
    """Raise UsageError where ``name`` is certainly no device of torch's, whose plugins may add some."""
    kind, colon, number = name.partition(":")
    known = name == "auto" or (kind in KINDS and (not colon or number.isdecimal()))
    if not (known or "torch" in sys.modules or entry_points(group="torch.backends")):
        raise no_device(name)


def no_device(name: str) -> UsageError:
    """Return the error for ``name``, which torch does not know."""
    hint = did_you_mean(name, SUGGESTED, f"use {', '.join(SUGGESTED)} or another that torch knows")
    return UsageError(f"no device {name!r}; {hint}")
