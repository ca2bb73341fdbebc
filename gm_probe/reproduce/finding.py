"""What a study found, and the folder that it is written into."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pandas as pd
from matplotlib.figure import Figure

from gm_probe.analysis.intervals import Quantity
from gm_probe.analysis.plots import write_figure
from gm_probe.analysis.typeset import Sheet, escape_markdown, latex, markdown, plain_sheet, two_decimals
from gm_probe.files.atomic import write_atomic, write_json
from gm_probe.reproduce.catalogue import Recipe

Outcome = Literal["shows", "shows in part", "shows the opposite", "does not show", "cannot be told"]
RESULT = "result.json"


@dataclass(frozen=True, slots=True)
class Task:
    """What a study is asked for.

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
        """Where runs take their data from and are computed, as settings of training."""
        given = {"data": self.data, "data_root": self.data_root, "download": self.download or None}
        return {"device": self.device} | {key: value for key, value in given.items() if value is not None}


@dataclass(frozen=True, slots=True)
class Finding:
    """What came out.

    Attributes:
        outcome: whether the paper's claim shows, by the test that ``text`` states with its numbers.
        rows: of the CSV file.
        sheets: the same or its summary as tables; the paper's own numbers stand in them, where it gives any.
        figures: by what is put after the name in the file's stem (the first one: nothing).
        captions: of the figures.
        untested: part of the claim that no test here covers, which the verdict leaves out.
    """

    outcome: Outcome
    text: str
    rows: Sequence[Mapping[Any, Any]]
    sheets: Sequence[Sheet]
    figures: Mapping[str, Figure] = field(default_factory=dict)
    captions: Mapping[str, str] = field(default_factory=dict)
    untested: str = ""

    @property
    def verdict(self) -> str:
        """A sentence of the outcome, of no more than was tested."""
        of = "what was tested of the claim" if self.untested else "the claim"
        if self.outcome == "cannot be told":
            return f"Whether {of} holds cannot be decided at this scale."
        return f"{of[0].upper()}{of[1:]} {self.outcome}."


def write(
    finding: Finding, recipe: Recipe, task: Task, *, environment: Mapping[str, Any], seconds: float
) -> list[Path]:
    """Write everything into the task's folder, each file whole or not at all, ``result.json`` last; their paths."""
    name, folder = recipe.name, task.folder
    stems = {suffix: "-".join(filter(None, (name, suffix))) for suffix in finding.figures}
    paths = [folder / f"{stem}.{kind}" for stem in stems.values() for kind in ("png", "svg")]
    for suffix, figure in finding.figures.items():
        write_figure(figure, [folder / f"{stems[suffix]}.{kind}" for kind in ("png", "svg")])
    texts = {
        "csv": pd.DataFrame(finding.rows).to_csv(index=False, float_format="%.6g"),
        "tex": latex(finding.sheets),
        "md": _page(finding, recipe, task, stems, environment, seconds),
    }
    for kind, text in texts.items():
        write_atomic(folder / f"{name}.{kind}", text.encode(errors="replace"))
    result = {
        "name": name,
        "title": recipe.title,
        "claim": recipe.claim,
        "scale": task.scale,
        "outcome": finding.outcome,
        "text": finding.text,
        "untested": finding.untested,
        "note": recipe.notes[task.scale],
        "data": task.data,
        "only": task.only,
        "settings": recipe.at(task.scale),
        "environment": environment,
        "seconds": round(seconds, 1),
    }
    write_json(folder / RESULT, result)
    return [*paths, *(folder / f"{name}.{kind}" for kind in texts), folder / RESULT]


def frame_sheet(name: str, title: str, caption: str, frame: pd.DataFrame, num_labels: int = 1) -> Sheet:
    """``frame`` as a table, numbers to three digits."""
    body = [
        [f"{v:.3g}" if isinstance(v, float) else str(v) for v in row] for row in frame.itertuples(index=False)
    ]
    return plain_sheet(name, title, caption, [*map(str, frame)], body, num_labels)


def sign_of(found: Quantity, parts: int) -> int:
    """Return the sign of a statistic whose interval at 1 − 5 % / ``parts`` excludes 0 (Bonferroni); else 0."""
    if found.p is None or found.p >= 0.05 / parts:
        return 0
    return 1 if (found.value or 0) > 0 else -1


def claim_outcome(signs: Sequence[int]) -> Outcome:
    """Return the outcome of a claim from those of its parts: 1 as claimed, −1 the opposite, 0 cannot be told.

    Each part is tested in both directions at 5 % over their number, so that one chance in twenty is that any is wrong.
    """
    if signs and all(sign == 1 for sign in signs):
        return "shows"
    if -1 in signs:
        return "shows in part" if 1 in signs else "shows the opposite"
    return "cannot be told"


def bonferroni(parts: int) -> str:
    """Return how a claim of so many parts is decided, in words."""
    level = f"{100 * (1 - 0.05 / max(parts, 1)):.4g}"
    return (
        f"The claim has {parts} parts; each is decided, in either direction, by its {level} % interval (Bonferroni)."
        if parts > 1
        else "The interval decides, in either direction."
    )


def shown_tau(tau: Quantity) -> str:
    """A τ and its interval, as papers print them."""
    if tau.value is None:
        return "undefined"
    if tau.low is None or tau.high is None:
        return two_decimals(tau.value)
    return f"{two_decimals(tau.value)} ({two_decimals(tau.low)} to {two_decimals(tau.high)})"


def quantile_sheet(name: str, title: str, found: pd.DataFrame) -> Sheet:
    """Mean and quantiles of every column of ``found`` (a row a start)."""
    shares = (0.05, 0.25, 0.5, 0.75, 0.95)
    quantiles = found.quantile([*shares]).T
    quantiles.columns = pd.Index([f"{100 * share:.0f} %" for share in shares])
    quantiles.insert(0, "mean", found.mean())
    caption = f"Mean and quantiles over {len(found):,} random starts"
    return frame_sheet(name, title, caption, quantiles.reset_index(names=""))


def _time(finding: Finding, seconds: float) -> str:
    """Of this call, which may have found every run there, and of the runs where they say."""
    of_runs = sum(float(row.get("train_seconds") or 0.0) for row in finding.rows)
    trained = (
        f"the runs of its table trained for {of_runs:,.0f} s, the last call" if of_runs else "the last call"
    )
    return f"{trained} took {seconds:,.0f} s"


def _page(
    finding: Finding,
    recipe: Recipe,
    task: Task,
    stems: Mapping[str, str],
    environment: Mapping[str, Any],
    seconds: float,
) -> str:
    pictures = [
        f"![{finding.captions.get(suffix, recipe.title)}]({stem}.png)" for suffix, stem in stems.items()
    ]
    said = [finding.captions[suffix] for suffix in stems if suffix in finding.captions]
    shown = ", ".join(
        f"{key} = {json.dumps(value, ensure_ascii=False)}" for key, value in recipe.at(task.scale).items()
    )
    machine = ", ".join(f"{key} {environment[key]}" for key in ("torch", "python", "device", "threads"))
    only = ["--only", task.only] if task.only else []
    data = ["--data", Path(task.data).name] if task.data else []
    command = shlex.join(["gmprobe", "reproduce", task.name, "--scale", task.scale, *only, *data])
    blocks = [
        f"# {escape_markdown(recipe.title)}",
        f"The paper's claim: {escape_markdown(recipe.claim)}",
        f"**{finding.verdict}** {escape_markdown(finding.text)}",
        *filter(None, [escape_markdown(recipe.notes[task.scale])]),
        *(block for pair in zip(pictures, map(escape_markdown, said), strict=False) for block in pair),
        markdown(finding.sheets).strip(),
        f"The paper's own numbers: {escape_markdown(recipe.published)}",
        f"Scale `{task.scale}`: `{command}`; {_time(finding, seconds)} ({machine}). "
        f"Settings: {escape_markdown(shown)}.",
    ]
    return "\n\n".join(blocks) + "\n"
