"""The objectives by name. This is the only place that lists them; the code of each is in its own file.

Nothing here imports torch, so that an unknown objective or a bad combination of settings is reported at once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any


@dataclass(frozen=True, slots=True)
class ObjectiveChoice:
    """A choice of `gmprobe train --objective`.

    Attributes:
        home: ``module:class`` of its ``Objective``.
        settings: fields of ``TrainConfig`` that only this and perhaps some other objectives use.
        needs_labels: ``labels`` must be given.
        refused: settings that must keep their defaults, and why.
        least_batch: least number of examples in a batch.
        encoder: whether it trains a SimCLR encoder, which is evaluated by linear probes.
    """

    home: str
    settings: tuple[str, ...] = ()
    needs_labels: bool = False
    refused: Mapping[str, str] = field(default_factory=dict)
    least_batch: int = 1
    encoder: bool = False

    def load(self) -> Any:
        """Return its class."""
        module, name = self.home.split(":")
        return vars(import_module(module))[name]


_HERE = "gm_probe.training.objectives"
_UNSPLIT = "it splits only batches in which every example has a label"

OBJECTIVES: dict[str, ObjectiveChoice] = {
    "supervised": ObjectiveChoice(f"{_HERE}.supervised:Objective"),
    "joint": ObjectiveChoice(f"{_HERE}.joint:Joint", ("mu",), needs_labels=True, refused={"m": _UNSPLIT}),
    "fixmatch": ObjectiveChoice(
        f"{_HERE}.fixmatch:FixMatch",
        ("mu", "threshold", "lambda_u", "unlabeled_mean"),
        needs_labels=True,
        refused={"m": _UNSPLIT, "augment": "it has its own augmentations"},
    ),
    "simclr": ObjectiveChoice(
        f"{_HERE}.simclr:SimCLR",
        ("temperature", "probe_every"),
        refused={
            "m": "NT-Xent compares all views of a batch, so the batch cannot be split",
            "augment": "it has its own augmentations",
            "stop_ce": "an encoder has no training cross-entropy to stop at",
            "label_smoothing": "there are no labels to smooth",
            "eval_every": "an encoder is evaluated by linear probes, probe_every epochs",
        },
        least_batch=2,
        encoder=True,
    ),
}


def trains_encoder(objective: Any) -> bool:
    """Return whether the ``objective`` of this name, as a record has it, trains an encoder."""
    return objective in OBJECTIVES and OBJECTIVES[objective].encoder
