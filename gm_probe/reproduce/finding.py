"""A study's task, the runs that it trains, what it found, and the folder that this is written into."""

from __future__ import annotations

import importlib
import json
import shlex
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from gm_probe.analysis.plots import write_figure
from gm_probe.analysis.typeset import Sheet, escape_markdown, latex, markdown, plain_sheet
from gm_probe.errors import UsageError
from gm_probe.executors.local import Outcome
from gm_probe.files.atomic import remove_temporary, write_atomic, write_json
from gm_probe.files.locks import exclusive
from gm_probe.reproduce.catalogue import PaperRecipe, paper_recipe
from gm_probe.reproduce.claims import ClaimOutcome
from gm_probe.runtime.devices import pick_device
from gm_probe.runtime.machine import environment
from gm_probe.sweep.manifest import write_sweep
from gm_probe.sweep.recipe import Recipe
from gm_probe.sweep.runner import run_recipe
from gm_probe.sweep.tuning import require_success

RESULT = "result.json"


@dataclass(frozen=True, slots=True)
class Task:
    """What a study is asked to do.

    Attributes:
        folder: for what it leaves to be resumed from (runs).
        data: image folder, file or name in place of the recipe's own; None = the recipe's.
        only: label of the one data set of the recipe's that is taken; None = all.
        jobs: runs at a time.
        data_root, download: of torchvision's data sets.
        notify: called with a line on what is done.
    """

    name: str
    scale: str
    folder: Path
    data: str | None = None
    jobs: int = 1
    device: str = "auto"
    data_root: str | None = None
    download: bool = False
    only: str | None = None
    notify: Callable[[str], None] = print

    @property
    def place(self) -> dict[str, Any]:
        """Return where runs take their data from and are computed, as settings of training."""
        given = {"data": self.data, "data_root": self.data_root, "download": self.download or None}
        return {"device": self.device} | {key: value for key, value in given.items() if value is not None}


@dataclass(frozen=True, slots=True)
class Finding:
    """The result of a study.

    Attributes:
        outcome: whether the paper's claim shows, by the test that ``text`` states with its numbers.
        rows: of the CSV file.
        sheets: the same or its summary as tables; the paper's own numbers stand in them, where it gives any.
        figure: the picture, which ``caption`` explains.
        untested: part of the claim that no test here covers, which the verdict leaves out.
    """

    outcome: ClaimOutcome
    text: str
    rows: pd.DataFrame
    sheets: Sequence[Sheet]
    figure: Figure = field(default_factory=Figure)
    caption: str = ""
    untested: str = ""

    @property
    def verdict(self) -> str:
        """Return the outcome as a sentence that claims no more than was tested."""
        of = "what was tested of the claim" if self.untested else "the claim"
        if self.outcome == "cannot be told":
            return f"Whether {of} holds cannot be decided at this scale."
        return f"{of[0].upper()}{of[1:]} {self.outcome}."


def study_of(name: str) -> Callable[..., Finding]:
    """Return the function ``study`` of a module here, which takes a task and the recipe's settings."""
    study: Callable[..., Finding] = importlib.import_module(f"gm_probe.reproduce.{name}").study
    return study


def reproduce(task: Task) -> tuple[Finding, list[Path]]:
    """Do ``task`` and write its folder; returns what was found and the files.

    Runs that are complete in the folder are not trained again.

    Raises:
        UsageError: no such table or figure, or it has no such scale or data set.
        BusyError: another process is at work on the folder.
    """
    chosen = paper_recipe(task.name)
    settings = chosen.at(task.scale)
    if task.only is not None and chosen.study != "methods":
        raise UsageError(f"--only: {task.name} has a single data set. Leave out --only")
    machine = environment(pick_device(task.device))
    with exclusive(task.folder):
        remove_temporary(task.folder)
        began = time.perf_counter()
        found = study_of(chosen.study)(task, **settings)
        return found, write(found, chosen, task, machine, time.perf_counter() - began)


def train_runs(recipe: Recipe, folder: Path, task: Task) -> Path:
    """Train and measure every run of ``recipe`` below ``folder``, which is returned; complete runs are kept.

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


def write(
    finding: Finding, recipe: PaperRecipe, task: Task, environment: Mapping[str, Any], seconds: float
) -> list[Path]:
    """Write everything into the task's folder, each file whole or not at all, ``result.json`` last; their paths."""
    stem = task.folder / recipe.name
    paths = [stem.with_suffix(suffix) for suffix in (".png", ".svg", ".csv", ".tex", ".md")]
    write_figure(finding.figure, paths[:2])
    texts = (
        finding.rows.to_csv(index=False, float_format="%.6g"),
        latex(finding.sheets),
        _page(finding, recipe, task, environment, seconds),
    )
    for path, text in zip(paths[2:], texts, strict=True):
        write_atomic(path, text.encode(errors="replace"))
    result = {key: getattr(recipe, key) for key in ("name", "title", "claim")}
    result |= {key: getattr(finding, key) for key in ("outcome", "text", "untested")}
    result |= {key: getattr(task, key) for key in ("scale", "data", "only")}
    result |= {"note": recipe.notes[task.scale], "settings": recipe.at(task.scale)}
    result |= {"environment": environment, "seconds": round(seconds, 1)}
    write_json(task.folder / RESULT, result)
    return [*paths, task.folder / RESULT]


def frame_sheet(name: str, title: str, caption: str, frame: pd.DataFrame, num_labels: int = 1) -> Sheet:
    """Return ``frame`` as a table, numbers to three digits."""
    body = [
        [f"{v:.3g}" if isinstance(v, float) else str(v) for v in row] for row in frame.itertuples(index=False)
    ]
    return plain_sheet(name, title, caption, [*map(str, frame)], body, num_labels)


def _page(
    finding: Finding, recipe: PaperRecipe, task: Task, environment: Mapping[str, Any], seconds: float
) -> str:
    shown = ", ".join(
        f"{key} = {json.dumps(value, ensure_ascii=False)}" for key, value in recipe.at(task.scale).items()
    )
    machine = ", ".join(f"{key} {environment[key]}" for key in ("torch", "python", "device", "threads"))
    only = ["--only", task.only] if task.only else []
    data = ["--data", Path(task.data).name] if task.data else []
    command = shlex.join(["gmprobe", "reproduce", task.name, "--scale", task.scale, *only, *data])
    trained = finding.rows.train_seconds.sum() if "train_seconds" in finding.rows else 0
    # the last call may have found every run complete
    spent = f"the runs of its table trained for {trained:,.0f} s, " if trained else ""
    blocks = [
        f"# {escape_markdown(recipe.title)}",
        f"The paper's claim: {escape_markdown(recipe.claim)}",
        f"**{finding.verdict}** {escape_markdown(finding.text)}",
        *filter(None, [escape_markdown(recipe.notes[task.scale])]),
        f"![{finding.caption}]({recipe.name}.png)",
        escape_markdown(finding.caption),
        markdown(finding.sheets).strip(),
        f"The paper's own numbers: {escape_markdown(recipe.published)}",
        f"Scale `{task.scale}`: `{command}`; {spent}the last call took {seconds:,.0f} s ({machine}). "
        f"Settings: {escape_markdown(shown)}.",
    ]
    return "\n\n".join(blocks) + "\n"
