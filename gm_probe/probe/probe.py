"""How to measure, one measured figure, and a model over its probe set with what several measures share."""

from __future__ import annotations

import math
import zlib
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from gm_probe.core.batches import Batches
from gm_probe.core.errors import DataError, DivergedError, UsageError
from gm_probe.core.parameters import Parameters
from gm_probe.probe.ascent import ProbeDivergence
from gm_probe.probe.operators import Operator, fisher, hessian
from gm_probe.probe.spectrum import Eigenpair, lanczos
from gm_probe.probe.work import FORWARD, Work

Protocol = Literal["paper", "converged"]


@dataclass(frozen=True, slots=True)
class Settings:
    """How to measure.

    Attributes:
        rho: radius ρ of the ball in parameter space.
        k_steps: ascent steps K of Algorithm 1.
        noise_scale: expected length of the random start δ₀ (σ = noise_scale/√P).
        num_starts: random starts that the paper's protocol averages over (App. F: 10).
        protocol: what `local_inconsistency` reports: the paper's mean over starts, or the converged maximum.
        ascent_tolerance: relative gain of a step at which a converged ascent stops.
        eigen_tolerance: Lanczos residual relative to the eigenvalue.
        trace_tolerance: standard error of a trace relative to its value.
        min_probes: of a trace before its standard error may stop it; from fewer than 10 it is too uncertain.
        max_probes: of a trace in any case, also where it is below ``min_probes``.
        max_iterations: Lanczos iterations and ascent steps before giving up (and saying so).
        seed: of every random draw.
    """

    rho: float = 0.1
    k_steps: int = 1
    noise_scale: float = 0.1
    num_starts: int = 10
    protocol: Protocol = "paper"
    ascent_tolerance: float = 1e-3
    eigen_tolerance: float = 0.01
    trace_tolerance: float = 0.05
    min_probes: int = 10
    max_probes: int = 100
    max_iterations: int = 100
    seed: int = 0

    def __post_init__(self) -> None:
        positive = {"rho": self.rho, "noise_scale": self.noise_scale, "k_steps": self.k_steps}
        positive |= {"num_starts": self.num_starts, "max_iterations": self.max_iterations}
        for name, value in positive.items():
            if not value > 0 or not math.isfinite(value):
                raise UsageError(f"{name} must be positive and finite, not {value}")
        for name in ("ascent_tolerance", "eigen_tolerance", "trace_tolerance"):
            value = getattr(self, name)
            if not value >= 0 or not math.isfinite(value):
                raise UsageError(f"{name} must be 0 or positive, not {value}")
        if self.protocol not in get_args(Protocol):
            raise UsageError(f"protocol must be {' or '.join(get_args(Protocol))}, not {self.protocol!r}")
        if self.min_probes < 2 or self.max_probes < 2:
            raise UsageError(f"a trace needs 2 probes at least, got {self.min_probes} and {self.max_probes}")


@dataclass(frozen=True, slots=True)
class Estimate:
    """One measured figure.

    Attributes:
        value: None where it is undefined; ``details['reason']`` says why.
        stderr: the estimator's standard error (probes, starts) or error bound (Lanczos residual); None = exact.
        stderr_examples: standard error from the probe set being a sample of N examples.
        converged: whether the estimator met its tolerance.
        num_evals: gradient evaluations over the whole probe set that it took, beyond work shared with an
            earlier row.
        details: what else belongs to the figure.
    """

    value: float | None
    stderr: float | None
    stderr_examples: float | None
    converged: bool
    num_evals: float
    details: dict[str, Any] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        row = asdict(self)
        return {**{key: row[key] for key in row if key != "details"}, **self.details}


class Probe:
    """A model over a probe set, with what several measures share: outputs, labels, the top Fisher eigenpair."""

    def __init__(self, model: nn.Module, batches: Batches, settings: Settings, work: Work) -> None:
        self.parameters = Parameters(model)
        self.batches, self.settings, self.work = batches, settings, work

    def generator(self, name: str) -> torch.Generator:
        """A generator of its own for each purpose, so that no figure depends on which others were asked for."""
        # hashed to 32 bits: torch's CPU generator ignores the higher ones
        return torch.Generator().manual_seed(zlib.crc32(f"{name}:{self.settings.seed}".encode()))

    def _outputs(self) -> Tensor:
        rows = []
        with torch.no_grad():
            for batch in self.batches:
                rows.append(self.parameters.logits(batch.x))
                self.work.add(FORWARD, len(rows[-1]))
        return torch.cat(rows)

    @cached_property
    def clean(self) -> Tensor:
        """(N, C) logits at θ.

        Raises:
            DivergedError: some are not finite.
            DataError: two passes over the data differ.
        """
        first, again = self._outputs(), self._outputs()
        if not bool(torch.isfinite(first).all()):
            row = int((~torch.isfinite(first)).any(1).nonzero()[0])
            raise DivergedError(
                f"the model's output on example {row} is not finite; check weights and normalisation"
            )
        # tolerance, not equality: threaded reductions may differ in the last bit
        if not torch.allclose(first, again, rtol=1e-4, atol=1e-4 * float(first.abs().max())):
            raise DataError("two passes over the data gave different outputs; no shuffling, no random layers")
        return first

    @cached_property
    def labels(self) -> Tensor | None:
        """(N,) class indices as given; None = unlabeled."""
        y = self.batches.examples.y
        if y is None:
            return None
        classes = self.clean.shape[1]
        if int(y.min()) < 0:
            raise DataError(f"labels must be class indices ≥ 0, got {int(y.min())}; leave such examples out")
        if int(y.max()) >= classes:
            raise DataError(
                f"{self.batches.examples.source} has labels up to {int(y.max())} but the model has {classes} classes "
                f"(0 to {classes - 1}); check the labels, or measure it --unlabeled"
            )
        return y.to(self.clean.device)

    @cached_property
    def divergence(self) -> ProbeDivergence:
        return ProbeDivergence(self.parameters, self.batches, self.clean, self.work)

    @cached_property
    def fisher(self) -> Operator:
        return fisher(self.parameters, self.batches, self.clean, self.work)

    @cached_property
    def hessian(self) -> Operator:
        labels = self.clean.argmax(1) if self.labels is None else self.labels
        return hessian(self.parameters, self.batches, labels, self.work)

    @property
    def label_kind(self) -> str:
        return "predicted" if self.labels is None else "given"

    @cached_property
    def fisher_top(self) -> Eigenpair:
        return self.top(self.fisher, "fisher")

    def top(self, operator: Operator, name: str) -> Eigenpair:
        return lanczos(
            operator,
            generator=self.generator(name),
            tolerance=self.settings.eigen_tolerance,
            max_iterations=self.settings.max_iterations,
        )

    def starts(self) -> list[Tensor]:
        generator = self.generator("starts")
        settings = self.settings
        return [self.parameters.random(settings.noise_scale, generator) for _ in range(settings.num_starts)]
