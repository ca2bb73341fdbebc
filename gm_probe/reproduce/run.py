"""Run one recipe: look up its study, do it, write what it found."""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable
from pathlib import Path

from gm_probe.errors import UsageError
from gm_probe.files.atomic import remove_temporary
from gm_probe.files.locks import exclusive
from gm_probe.reproduce.catalogue import recipe
from gm_probe.reproduce.finding import Finding, Task, write
from gm_probe.runtime.devices import environment, pick_device

STUDIES = {
    "boundaries": "boundaries",
    "alignment": "alignment",
    "maximizer": "maximizer",
    "residuals": "residuals",
    "posteriors": "posteriors",
    "scatter": "scatter",
    "methods": "methods",
}
"""Modules of this package whose ``study`` does a recipe, by the recipe's own word for it."""


def study_of(name: str) -> Callable[..., Finding]:
    """The function that takes a task and the recipe's settings."""
    study: Callable[..., Finding] = importlib.import_module(f"gm_probe.reproduce.{STUDIES[name]}").study
    return study


def reproduce(task: Task) -> tuple[Finding, list[Path]]:
    """Do ``task`` and write its folder; returns what was found and the files.

    Runs that are complete in the folder are not trained again.

    Raises:
        UsageError: no such table or figure, or it has no such scale or data set.
        BusyError: another process is at work on the folder.
    """
    chosen = recipe(task.name)
    settings = chosen.at(task.scale)
    if task.only is not None and chosen.study != "methods":
        raise UsageError(f"--only: {task.name} has a single data set. Leave out --only")
    machine = environment(pick_device(task.device))
    with exclusive(task.folder):
        remove_temporary(task.folder)
        began = time.perf_counter()
        found = study_of(chosen.study)(task, **settings)
        seconds = time.perf_counter() - began
        return found, write(found, chosen, task, environment=machine, seconds=seconds)
