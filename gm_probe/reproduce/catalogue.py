"""What can be reproduced: one TOML file per table or figure, in ``recipes/paper``. Imports no torch.

::

    title, claim, published  what it is, what the paper says, and which of the paper's own numbers survive
    also                     further tables and figures of the paper that this study gives
    default                  the default scale, where there is no small one
    study                    the module here whose function ``study`` does it
    [settings]               its arguments, at every scale
    [smoke] [small] [paper]  ``cost``, a ``note`` for the page, and arguments that differ at this scale
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any

from gm_probe.errors import UsageError, did_you_mean
from gm_probe.files.atomic import read_toml

SCALES = ("smoke", "small", "paper")
"""smoke is for tests, small takes two cores minutes to an hour, paper is the paper's own setting."""


@dataclass(frozen=True, slots=True)
class PaperRecipe:
    """One table or figure; ``settings[scale]`` are the arguments of its study, ``costs[scale]`` the time it takes.

    ``notes[scale]``: what else is to be known of it at this scale; '' = nothing.
    ``chosen`` is the scale that is taken unless told; '' = none.
    """

    name: str
    title: str
    claim: str
    published: str
    also: tuple[str, ...]
    study: str
    settings: Mapping[str, Mapping[str, Any]]
    costs: Mapping[str, str]
    notes: Mapping[str, str]
    chosen: str

    @property
    def scales(self) -> tuple[str, ...]:
        return tuple(self.settings)

    @property
    def default(self) -> str:
        """Return ``small``, or ``paper`` where that is cheap enough; UsageError where it takes a GPU."""
        if not self.chosen:
            costs = " or ".join(f"--scale {scale} ({cost})" for scale, cost in self.costs.items())
            raise UsageError(f"{self.name} has no small scale. Choose {costs}")
        return self.chosen

    def at(self, scale: str) -> Mapping[str, Any]:
        """Return the settings of ``scale``; UsageError where it has none."""
        if scale not in self.settings:
            raise UsageError(f"{self.name} has no scale {scale!r}; it has {', '.join(self.scales)}")
        return self.settings[scale]


@cache
def paper_recipes() -> Mapping[str, PaperRecipe]:
    """Return every recipe by name, in natural order."""
    folder = resources.files("gm_probe") / "recipes" / "paper"
    found = {}
    for entry in folder.iterdir():
        if entry.name.endswith(".toml"):
            with resources.as_file(entry) as file:
                found[file.stem] = _paper_recipe(file.stem, read_toml(file, follow=True))
    return dict(sorted(found.items(), key=lambda item: _natural(item[0])))


def paper_recipe(name: str) -> PaperRecipe:
    """Return the recipe of this name, or the one that also gives it; UsageError where there is none."""
    names = {other: entry for entry in paper_recipes().values() for other in (entry.name, *entry.also)}
    if name not in names:
        hint = did_you_mean(name, names, "`gmprobe reproduce --list` lists them")
        raise UsageError(f"no table or figure {name!r}; {hint}")
    return names[name]


def _paper_recipe(name: str, content: Mapping[str, Any]) -> PaperRecipe:
    parts = {scale: dict(content[scale]) for scale in SCALES if scale in content}
    costs = {scale: str(part.pop("cost")) for scale, part in parts.items()}
    notes = {scale: str(part.pop("note", "")) for scale, part in parts.items()}
    shared = content.get("settings", {})
    numbers = {place["label"]: place["published"] for place in shared.get("data", []) if "published" in place}
    settings = {}
    for scale, part in parts.items():
        settings[scale] = {**shared, **part}
        if "data" in part:
            settings[scale]["data"] = [_with_numbers(place, numbers) for place in part["data"]]
    texts = {key: str(content[key]) for key in ("title", "claim", "published", "study")}
    also = tuple(map(str, content.get("also", ())))
    chosen = str(content.get("default", "small" if "small" in parts else ""))
    return PaperRecipe(
        name=name, settings=settings, costs=costs, notes=notes, also=also, chosen=chosen, **texts
    )


def _with_numbers(place: Mapping[str, Any], numbers: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a data set with the numbers that the paper published for its label."""
    return {"published": numbers[place["label"]], **place} if place["label"] in numbers else place


def _natural(name: str) -> list[str | int]:
    """Sort fig2 before fig11."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]
