"""Runs that a study needs, done by the sweep's own machinery: resumable, and what is complete is kept."""

from __future__ import annotations

from pathlib import Path

from gm_probe.executors.local import Outcome
from gm_probe.reproduce.finding import Task
from gm_probe.sweep.manifest import write_sweep
from gm_probe.sweep.recipe import Recipe
from gm_probe.sweep.runner import run_recipe
from gm_probe.sweep.tuning import require_success


def trained(recipe: Recipe, folder: Path, task: Task) -> Path:
    """Train and measure every run of ``recipe`` below ``folder``, which is returned; failed ones are tried again.

    Raises:
        ProbeError: a run failed; the next call tries it again. A run that diverged is a result.
    """
    done = 0

    def notify(outcome: Outcome) -> None:
        nonlocal done
        done += 1
        if outcome.status != "skipped":
            reason = f": {outcome.reason}" if outcome.reason else ""
            task.notify(f"[{done}/{len(recipe.runs)}] {outcome.name} {outcome.status}{reason}")

    write_sweep(recipe, folder)
    outcomes = run_recipe(recipe, folder, jobs=task.jobs, notify=notify)
    require_success(outcomes)
    return folder
