"""What a sweep folder was asked for: sweep.json, from which any process can do one of its runs."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

from gm_probe.errors import StorageError, UsageError, did_you_mean
from gm_probe.files.atomic import write_json
from gm_probe.runs.records import SWEEP, read_sweep_record
from gm_probe.sweep.recipe import MeasurePlan, Recipe, measure_plan
from gm_probe.training.config import TrainConfig


def write_sweep(recipe: Recipe, out: Path) -> None:
    """Write ``recipe``, expanded, in place of what ``out`` was asked for before; its time is the sweep's start."""
    plan = recipe.plan
    write_json(
        out / SWEEP,
        {
            "runs": {name: config.as_dict() for name, config in recipe.runs.items()},
            "measures": list(plan.measures),
            "settings": plan.asked,
            "coupled": plan.batch_dependent,
            "batch_size": plan.batch_size,
            "group_by": list(recipe.group_by),
        },
    )


def read_sweep(out: Path) -> Recipe:
    """Return the recipe that ``write_sweep`` wrote.

    Raises:
        UsageError: ``out`` holds none.
        StorageError: it is broken.
    """
    if not (out / SWEEP).exists():
        raise UsageError(f"{out} holds no {SWEEP}; give the folder that `gmprobe sweep --out` wrote")
    content = read_sweep_record(out)
    try:
        runs = {name: TrainConfig.from_dict(config) for name, config in content["runs"].items()}
        return Recipe(runs, _plan(content), tuple(content["group_by"]))
    except (KeyError, TypeError, AttributeError, ValueError, UsageError) as error:
        raise StorageError(
            f"{out / SWEEP} is broken ({error}); run `gmprobe sweep` into {out} again"
        ) from error


def _plan(content: dict[str, Any]) -> MeasurePlan:
    """Return the plan of measurement; what is null in the record is not set."""
    recorded = {**content["settings"], "measures": content["measures"], "batch_size": content["batch_size"]}
    return measure_plan({k: value for k, value in recorded.items() if k != "part" and value is not None})


def named_as_found(recipe: Recipe, out: Path) -> Recipe:
    """Return ``recipe`` with its runs named as their folders in ``out`` are.

    The settings that a name shows, and their order, follow the recipe's tables; the hash at its end does not. Runs that
    differ only in where they compute (``threads``) share it, and keep their names.
    """
    folders = [path.name for path in out.iterdir() if path.is_dir()] if out.is_dir() else []
    shared = Counter(map(_hash, recipe.runs))
    found = {_hash(name): name for name in folders}
    runs = {
        found.get(_hash(name), name) if shared[_hash(name)] == 1 and name not in folders else name: config
        for name, config in recipe.runs.items()
    }
    return replace(recipe, runs=runs)


def _hash(name: str) -> str:
    return name.rpartition("-")[2]


def only(recipe: Recipe, name: str) -> Recipe:
    """Return ``recipe`` with the one run ``name``.

    Raises:
        UsageError: there is no such run.
    """
    if name not in recipe.runs:
        raise UsageError(f"no run {name!r} in the sweep; {did_you_mean(name, recipe.runs)}")
    return replace(recipe, runs={name: recipe.runs[name]})
