"""What a measure returns: a value with its errors, and what these are over."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import Tensor


def as_row(estimate: Any) -> dict[str, Any]:
    """Return the fields of a dataclass and its ``details`` as one JSON object, with null for NaN and infinity."""
    row = asdict(estimate)
    details = row.pop("details")
    return _finite({**row, **details})


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


@dataclass(frozen=True, slots=True)
class Estimate:
    """One measured value. ``measure`` adds to what a measure returns its cost, and the reasons for what is missing.

    Attributes:
        value: None where it is undefined; ``details['reason']`` says why.
        stderr: the estimator's standard error (random vectors, starts) or, where ``details['error_kind']`` says so, a
            bound of its error (Lanczos residual); None = exact.
        stderr_examples: standard error from the examples being a sample of N.
        converged: whether the estimator met its tolerance.
        num_evals: gradient evaluations over all the examples, without work that an earlier row already did.
        details: further values and reasons.
    """

    value: float | None
    stderr: float | None = None
    stderr_examples: float | None = None
    converged: bool = True
    num_evals: float = 0.0
    details: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def undefined(cls, reason: str) -> Estimate:
        """Return an estimate without a value, and the ``reason``."""
        return cls(None, converged=False, details={"reason": reason})

    def as_dict(self) -> dict[str, Any]:
        """Return the JSON object."""
        return as_row(self)


def example_error(terms: Tensor) -> float | None:
    """Return the standard error of the mean of (N,) per-example values; None for a single one."""
    return float(terms.double().std()) / math.sqrt(len(terms)) if len(terms) > 1 else None


def mean_over_labels(values: Tensor) -> Tensor:
    """Return values (n,) as they are, and the means (n,) of values (n, L) of L labels per example."""
    return values if values.dim() == 1 else values.double().mean(1)
