"""What a number given by a caller must be, in one wording. NaN, infinity and truth values are no such numbers."""

import math
from collections.abc import Iterable
from numbers import Integral, Real
from typing import Any, TypeVar

from gm_probe.errors import UsageError, did_you_mean

T = TypeVar("T")


def whole(name: str, value: Any, least: int = 1, most: float = math.inf) -> int:
    """Return ``value`` as an int.

    Raises:
        UsageError: it is no whole number, or not from ``least`` to ``most``. 2.0 and True are none.
    """
    if isinstance(value, Integral) and not isinstance(value, bool) and least <= int(value) <= most:
        return int(value)
    upper = f" and ≤ {most:,}" if most < math.inf else ""
    raise UsageError(f"{name} = {value!r} must be a whole number ≥ {least}{upper}")


def real(
    name: str,
    value: Any,
    *,
    least: float = -math.inf,
    above: float = -math.inf,
    most: float = math.inf,
    below: float = math.inf,
) -> float:
    """Return ``value`` as a float.

    Raises:
        UsageError: it is no finite number, or not within the bounds.
    """
    number = isinstance(value, Real) and not isinstance(value, bool)
    if number and math.isfinite(value) and least <= value <= most and above < value < below:
        return float(value)
    bounds = {"≥": least, "above": above, "≤": most, "below": below}
    told = " and ".join(f"{sign} {bound:g}" for sign, bound in bounds.items() if math.isfinite(bound))
    raise UsageError(f"{name} = {value!r} must be a finite number {told}".rstrip())


def instance(name: str, value: Any, kind: type) -> None:
    """Raise UsageError where ``value`` is no ``kind``."""
    if not isinstance(value, kind):
        raise UsageError(f"{name} = {value!r} must be of type {kind.__name__}")


def optional(check: Any, name: str, value: Any, *bounds: Any, **more: Any) -> None:
    """``check`` what is not None."""
    if value is not None:
        check(name, value, *bounds, **more)


def one_of(name: str, value: T, choices: Iterable[T]) -> T:
    """Return ``value``, or raise UsageError where it is none of ``choices``."""
    known = list(choices)
    if value in known and isinstance(value, str):
        return value
    hint = did_you_mean(value, [str(choice) for choice in known], f"choose from {', '.join(map(str, known))}")
    raise UsageError(f"{name} = {value!r}; {hint}")


def truth(name: str, value: Any) -> bool:
    """Return ``value``, or raise UsageError where it is neither True nor False."""
    if isinstance(value, bool):
        return value
    raise UsageError(f"{name} = {value!r} must be True or False")
