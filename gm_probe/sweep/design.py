"""Designs: which points of the settings a recipe runs. A grid, a list, or random or Sobol points, times the grid."""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Mapping
from typing import Any

from gm_probe.checks import whole
from gm_probe.errors import UsageError, did_you_mean

DESIGNS = ("grid", "list", "random", "sobol")


def points(content: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return every point: those of [[list]], [random] or [sobol] (of one of them), each with every one of [grid].

    ``[random]`` and ``[sobol]`` take ``points`` (of Sobol a power of 2), ``seed`` and ``space``, which gives each
    setting a list to choose from or ``{low, high}``, with ``log = true`` spread evenly over magnitudes. Numbers are
    cut to three digits; whole bounds give whole numbers, both ends included.

    Raises:
        UsageError: a design that cannot be read so, or two that exclude each other.
    """
    given = [name for name in DESIGNS[1:] if name in content]
    if len(given) > 1:
        raise UsageError(f"recipe: [{given[0]}] and [{given[1]}] exclude each other; keep one")
    chosen: list[dict[str, Any]] = [{}]
    if "list" in content:
        chosen = _listed(content["list"])
    elif given:
        chosen = _drawn(given[0], content[given[0]])
    grid = content.get("grid", {})
    if not isinstance(grid, Mapping):
        raise UsageError(f"recipe: grid = {grid!r} must be a table, [grid]")
    for key, values in grid.items():
        if not isinstance(values, list) or not values:
            raise UsageError(f"recipe: grid.{key} must be a list of values")
        if any(key in point for point in chosen):
            raise UsageError(f"recipe: {key} is both in [grid] and in [{given[0]}]; keep one")
    cells = [dict(zip(grid, cell, strict=True)) for cell in itertools.product(*grid.values())]
    return [{**point, **cell} for point in chosen for cell in cells]


def require_known(table: str, content: Mapping[str, Any], known: Collection[str]) -> None:
    """Raise UsageError where a table of a recipe has a setting that is not among the ``known``."""
    unknown = sorted(set(content) - set(known))
    if unknown:
        raise UsageError(f"recipe: no setting {table}.{unknown[0]}; {did_you_mean(unknown[0], known)}")


def _listed(rows: Any) -> list[dict[str, Any]]:
    if not isinstance(rows, list) or not rows or not all(isinstance(row, Mapping) for row in rows):
        raise UsageError("recipe: list must be tables, [[list]], one per point")
    return [dict(row) for row in rows]


def _drawn(kind: str, content: Any) -> list[dict[str, Any]]:
    if not isinstance(content, Mapping):
        raise UsageError(f"recipe: {kind} = {content!r} must be a table, [{kind}]")
    require_known(kind, content, ("points", "seed", "space"))
    count = whole(f"recipe: {kind}.points", content.get("points"))
    seed = whole(f"recipe: {kind}.seed", content.get("seed", 0), 0)
    space = content.get("space")
    if not isinstance(space, Mapping) or not space:
        raise UsageError(f"recipe: [{kind}.space] must give each setting a list or {{low, high}}")
    if kind == "sobol" and count & (count - 1):
        raise UsageError(
            f"recipe: sobol.points = {count} must be a power of 2; otherwise the points are unbalanced"
        )
    import numpy as np  # with scipy it takes a second, which a wrong recipe must not wait for

    generator = np.random.default_rng(seed)
    if kind == "sobol":
        from scipy.stats import qmc

        units = qmc.Sobol(len(space), rng=generator).random_base2(count.bit_length() - 1)
    else:
        units = generator.random((count, len(space)))
    return [
        {
            key: _at(f"{kind}.space.{key}", part, float(u))
            for (key, part), u in zip(space.items(), row, strict=True)
        }
        for row in units
    ]


def _at(name: str, part: Any, u: float) -> Any:
    """Return the value of ``part`` of the space at ``u`` in [0, 1)."""
    if isinstance(part, list) and part:
        return part[int(u * len(part))]
    if not isinstance(part, Mapping) or not {"low", "high"} <= set(part) <= {"low", "high", "log"}:
        raise UsageError(f"recipe: {name} = {part!r} must be a list or {{low, high}}, optionally with log")
    low, high, log = part["low"], part["high"], part.get("log", False)
    integers = type(low) is int and type(high) is int
    numbers = all(type(end) in {int, float} and math.isfinite(end) for end in (low, high))
    if not numbers or type(log) is not bool or not low < high or (log and low <= 0):
        raise UsageError(f"recipe: {name} needs finite low < high" + (", low > 0 with log" if log else ""))
    if integers:  # each of them has its share
        ends = (low - 0.5, high + 0.5)
        return min(max(round(_between(*ends, u, log)), low), high)
    return float(f"{_between(low, high, u, log):.3g}")


def _between(low: float, high: float, u: float, log: bool) -> float:
    return low * (high / low) ** u if log else low + (high - low) * u
