"""How checkpoints are measured, and what their records will say of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from gm_probe.data.batches import BATCH_SIZE
from gm_probe.data.examples import Examples
from gm_probe.measures.settings import Settings
from gm_probe.measuring.opening import output_settings
from gm_probe.runs.records import read_run

DIGEST = "data_sha256"
"""The setting that identifies data other than the run's own, because a file may change under its name."""


@dataclass(frozen=True, slots=True)
class Setup:
    """All that the results of a run depend on, apart from its weights.

    Attributes:
        scope: the examples, as a measures.json describes them beside ``settings``: ``part``, ``max_examples`` and, for
            data that is not the run's own, ``data`` and whether it is ``labeled``.
        loading: as ``measure_checkpoint`` takes it.
        own_loading: the arguments that belong to one checkpoint alone, such as its network's name.
    """

    settings: Settings
    scope: Mapping[str, Any]
    loading: Mapping[str, Any]
    own_loading: Mapping[Path, Mapping[str, Any]] = field(default_factory=dict)

    @property
    def of_other_data(self) -> bool:
        """True where the data is not the run's own."""
        return "data" in self.scope

    def chosen(self, examples: Examples) -> Examples:
        """Return the part of ``examples`` that is measured."""
        return examples.subset(self.scope["max_examples"], self.settings.seed)

    def digest(self, chosen: Examples) -> dict[str, str]:
        """Return what identifies the examples that are measured; nothing where they are the run's own."""
        return {DIGEST: chosen.digest} if self.of_other_data else {}

    def recorded(self, path: Path, examples: Callable[[Path], Examples]) -> dict[str, Any]:
        """Return the settings by which a record of ``path`` is known to answer the same request."""
        found = {**self.settings.as_dict(), **self.scope, **input_settings(self.loading)}
        found |= {**output_settings(self.loading), **batch_dependent_settings(path, self.loading)}
        return found | (self.digest(self.chosen(examples(path))) if self.of_other_data else {})


def batch_dependent_settings(run: Path, loading: Mapping[str, Any]) -> dict[str, Any]:
    """Return the further settings with which NT-Xent of ``run`` will be measured; nothing for a classifier."""
    if loading.get("head") != "simclr":
        return {}
    return {
        "head": "simclr",
        "temperature": loading.get("temperature") or read_run(run).config.get("temperature"),
        "batch_images": loading.get("batch_size") or BATCH_SIZE,
    }


def input_settings(loading: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of the inputs as in a measures.json; the normalisation only where one is asked for."""
    found: dict[str, Any] = {"dtype": str(loading.get("dtype", torch.float32)).removeprefix("torch.")}
    chosen = loading.get("normalization")
    return found if chosen is None else found | {"mean": list(chosen.mean), "std": list(chosen.std)}
