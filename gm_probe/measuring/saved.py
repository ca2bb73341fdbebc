"""How to add measures to a run's measures.json: with the settings that it records, and without losing its own."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from gm_probe.data.normalization import Normalization
from gm_probe.errors import ProbeError, StorageError, UsageError
from gm_probe.files.atomic import write_json
from gm_probe.files.schema import Unfit, bounded
from gm_probe.measuring.setup import DIGEST, Setup, batch_dependent_settings, input_settings
from gm_probe.models.checkpoints import read_checkpoint
from gm_probe.runs.records import CHECKPOINT, MEASURES, UNNAMED, read_run
from gm_probe.runtime.machine import environment
from gm_probe.training.run_splits import OWN_UNLABELED

NORMALIZING = {"mean", "std", "no_normalize"}
"""Names of the options that decide how pixels are normalised."""
BATCH_DEPENDENT = {"batch_images": "batch_size", "temperature": "temperature"}
"""Further settings that NT-Xent results depend on, with the names that ``measure_checkpoint`` has for them."""
DTYPES = {"float32": torch.float32, "float64": torch.float64}
"""The dtypes in which weights are measured, by their names in a measures.json."""
COSTLY = ("k_steps", "k_grid", "num_starts", "min_probes", "max_probes", "max_iterations", "top_eigenvalues")
"""Settings that decide how long a measurement takes."""
MOST, MOST_LISTED = 10_000, 100
"""Largest costly setting and longest list that a run's file may ask for; the user can give more as an option."""


def own_normalization(run: Path) -> dict[str, Any]:
    """Return the normalisation of a run's checkpoint; empty where it records none or cannot be read."""
    try:
        recorded = read_checkpoint(run / CHECKPOINT).normalization
    except ProbeError:
        return {}
    return {} if recorded is None else {"mean": list(recorded.mean), "std": list(recorded.std)}


def as_recorded(run: Path, setup: Setup, given: Collection[str] | None) -> tuple[Setup, dict[str, Any]]:
    """Return how to measure more of ``run`` with its recorded settings, and the settings that this changes.

    Args:
        given: names of settings that keep their values in ``setup``; None = all.
    """
    recorded = read_run(run).settings
    if given is None or any(
        recorded.get(key) != value for key, value in setup.scope.items() if key != "max_examples"
    ):
        return setup, {}
    free = _not_given(run, setup, given)
    changed = {key: recorded[key] for key, value in free.items() if recorded.get(key, value) != value}
    _require_modest(run / MEASURES, changed)
    try:
        return _changed(setup, changed, free | changed), changed
    except UsageError as error:
        raise StorageError(f"{run / MEASURES}: settings: {error}; remove it and measure again") from error


def _not_given(run: Path, setup: Setup, given: Collection[str]) -> dict[str, Any]:
    """Return the settings whose value the record of ``run`` decides, with their values in ``setup``."""
    found = {**setup.settings.as_dict(), "max_examples": setup.scope["max_examples"]}
    found |= {
        key: value
        for key, value in batch_dependent_settings(run, setup.loading).items()
        if key in BATCH_DEPENDENT and setup.loading.get(BATCH_DEPENDENT[key]) is None
    }
    if {*given} & NORMALIZING:
        given = {*given, "mean", "std"}
    else:
        found |= own_normalization(run)
    found |= input_settings(setup.loading)
    return {key: value for key, value in found.items() if key not in given}


def _changed(setup: Setup, changed: Mapping[str, Any], now: Mapping[str, Any]) -> Setup:
    """Return ``setup`` with the ``changed`` settings; ``now`` has the values of all."""
    loading = dict(setup.loading)
    loading |= {option: changed[key] for key, option in BATCH_DEPENDENT.items() if key in changed}
    if "dtype" in changed:
        loading["dtype"] = DTYPES[changed["dtype"]]
    if {"mean", "std"} & set(changed):
        loading["normalization"] = Normalization(tuple(now["mean"]), tuple(now["std"]))
    own: dict[str, Any] = {
        key: tuple(value) if isinstance(value, list) else value
        for key, value in changed.items()
        if key in setup.settings.as_dict()
    }
    scope = {key: changed.get(key, value) for key, value in setup.scope.items()}
    return replace(setup, settings=replace(setup.settings, **own), scope=scope, loading=loading)


def _require_modest(file: Path, changed: Mapping[str, Any]) -> None:
    """Raise StorageError for settings in a run's ``file`` that would take forever, or that have no meaning."""
    for key, value in changed.items():
        values = value if isinstance(value, list) else [value]
        excess = key in COSTLY and max(values, default=0) > MOST
        if excess or len(values) > MOST_LISTED or (key == "params" and _slow(value)):
            problem = "exceeds the limit for settings in a file"
        elif key == "dtype" and value not in DTYPES:
            problem = f"is not one of {', '.join(DTYPES)}"
        else:
            continue
        raise StorageError(f"{file}: settings.{key} {problem}. Give it as an option, or remove the file")


def _slow(pattern: str) -> bool:
    """Return whether a pattern may take exponential time: repeated groups, many repetitions, or great length."""
    return (
        len(pattern) > 200 or bool(re.search(r"\)[*+?{]", pattern)) or len(re.findall(r"[*+?{]", pattern)) > 4
    )


def merge_measures(path: Path, result: dict[str, Any]) -> list[str]:
    """Write ``result`` to a measures.json, and keep other measures, and a density, with the same settings.

    Results with other settings, or with values that are not finite, are removed. Return the names of those that were
    removed and not measured again.
    """
    before = read_run(path.parent)
    had = before.measures | ({} if before.density is None else {"density": before.density})
    kept = {name: value for name, value in had.items() if _writable(value)}
    density = {name: kept.pop(name) for name in ("density",) if name in kept}
    old, new = _decisive(before.settings), _decisive(result["settings"])
    if DIGEST not in old:  # of an earlier version
        new.pop(DIGEST, None)
    if old == new:
        result = {**density, **result, "measures": {**kept, **result["measures"]}}
    write_json(path, result)
    return [name for name in had if name not in {**result["measures"], **result}]


def _writable(value: Any) -> bool:
    """Return whether strict JSON can hold ``value``, since a file from elsewhere may have NaN or infinity."""
    try:
        bounded(value, nan=False)
    except Unfit:
        return False
    return True


def _decisive(settings: dict[str, Any]) -> dict[str, Any]:
    """Return ``settings`` without those of the machine, which change only last digits, and of skipped files."""
    machine = {*environment(torch.device("cpu")), "processes", "passed_over"} - {"tf32"}
    if settings.get("part") == OWN_UNLABELED:  # split.json identifies the data, wherever it lies
        machine.add("data")
    # an earlier version does not name what is null
    told = {key: value for key, value in {**UNNAMED, **settings}.items() if value is not None}
    return {key: value for key, value in told.items() if key not in machine}
