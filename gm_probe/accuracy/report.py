"""What an estimate is: one model's accuracy with its interval, its row, and the report over all models.

It imports no torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

CLASS_SHARES = ("auto", "validation", "uniform", "estimated")
"""What the class shares of the unlabeled data may be said to be, beside numbers."""
MIRRORED = "effective_invariance"
"""An estimator that takes a second pass over every set, and so is computed on demand only."""


@dataclass(frozen=True, slots=True)
class Accuracy:
    """An estimated accuracy.

    Attributes:
        value, low, high: the estimate and its interval of probability ``level``.
        method: how it was made.
        assumption: under which it holds.
        readings: the same under each reading of the class shares, where these cannot be told apart.
    """

    value: float
    low: float
    high: float
    level: float
    method: str
    assumption: str
    readings: Mapping[str, tuple[float, float, float]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class ModelEstimate:
    """One model's row.

    Attributes:
        accuracy: None where none is claimed; ``reason`` says why.
        estimators: by name, each estimator's accuracy (``value``, None without validation labels), its ``score`` and
            its ``mean_error`` on labeled sets that its calibration had not seen.
        agreement: mean share on which the other models predict the same; None of a single model.
        separated: whether the model can be told from the first.
        validation_accuracy: on the validation set; None without.
        seconds: that the passes took.
    """

    name: str
    rank: int
    accuracy: Accuracy | None
    reason: str
    estimators: Mapping[str, Mapping[str, float | None]]
    measures: Mapping[str, Any]
    agreement: float | None
    separated: bool
    validation_accuracy: float | None
    seconds: float

    def as_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        accuracy = None if self.accuracy is None else asdict(self.accuracy)
        if accuracy is not None:
            accuracy["readings"] = {
                name: dict(zip(("value", "low", "high"), found, strict=True))
                for name, found in accuracy["readings"].items()
            }
        return {
            "checkpoint": self.name,
            "rank": self.rank,
            "accuracy": accuracy,
            **({"reason": self.reason} if self.reason else {}),
            "separated_from_first": self.separated,
            "estimators": self.estimators,
            "measures": self.measures,
            "agreement": self.agreement,
            "validation_accuracy": self.validation_accuracy,
            "seconds": round(self.seconds, 3),
        }


@dataclass(frozen=True, slots=True)
class Suggestion:
    """An unlabeled example worth a label: its position, and the class that each leading model predicts."""

    index: int
    predicted: dict[str, int]


@dataclass(frozen=True, slots=True)
class EstimateReport:
    """All models, best first.

    Attributes:
        agreement: share of the unlabeled data on which each pair of models agrees, in the order of ``models``.
        conclusion: what follows, in plain words.
        notes: what a person should know of the data and the assumptions.
        labels_needed: about how many labels of the suggestions tell the leaders apart; None where none would.
        suggestions: examples on which the leaders disagree, in random order.
    """

    models: tuple[ModelEstimate, ...]
    agreement: tuple[tuple[float, ...], ...]
    conclusion: str
    notes: tuple[str, ...]
    labels_needed: int | None
    suggestions: tuple[Suggestion, ...]
    num_unlabeled: int
    num_validation: int | None
    num_labels: int | None

    def as_dict(self, **more: Any) -> dict[str, Any]:
        """The JSON object of ``gmprobe estimate --json``; ``more`` is added."""
        return {
            "num_unlabeled": self.num_unlabeled,
            "num_validation": self.num_validation,
            "num_labels": self.num_labels,
            **more,
            "checkpoints": [model.as_dict() for model in self.models],
            "agreement": [list(row) for row in self.agreement],
            "conclusion": self.conclusion,
            "labels_needed": self.labels_needed,
            "notes": list(self.notes),
        }


def percent(value: float) -> str:
    """Return a share as a percentage with one digit."""
    return f"{100 * value:.1f} %"
