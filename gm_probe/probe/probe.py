"""How to measure, one measured figure, and a model over its probe set with what several measures share."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import Any, Literal, TypeVar, get_args

import torch
from torch import Tensor, nn

from gm_probe.core.batches import Batches
from gm_probe.core.errors import DataError, DivergedError, UsageError, foreign_or
from gm_probe.core.parameters import Parameters
from gm_probe.core.processes import gather_examples
from gm_probe.probe.affine import Verdict, affine_in_each_parameter
from gm_probe.probe.ascent import FisherByDifference, ProbeDivergence
from gm_probe.probe.derivatives import require_gradients
from gm_probe.probe.fisher_trace import fisher_trace
from gm_probe.probe.operators import Operator, fisher, hessian, residual
from gm_probe.probe.spectrum import Eigenpair, certified, lanczos
from gm_probe.probe.speed import MEMORY, TRIAL
from gm_probe.probe.trace import Trace
from gm_probe.probe.work import FORWARD, Work

Protocol = Literal["paper", "converged"]
T = TypeVar("T")
DRAFT = 40
"""Difference products before exact ones go on: of CIFAR-10 networks 8 to 14 are enough."""

LEAST_TOLERANCE = 1e-16
"""Relative; float64 has no digits for less, and squares of its inverse may overflow."""

KEPT = 0.25
"""Of the memory, what the Hessian's products may keep from one to the next."""


@dataclass(frozen=True, slots=True)
class Settings:
    r"""How to measure.

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
        max_probes: of a trace, also where it is below ``min_probes``; an exact tr F takes a pass a class.
        max_iterations: Lanczos iterations and ascent steps before giving up (and saying so).
        seed: of every random draw.
        rho_grid, k_grid: more radii and steps at which the paper's S_ρ is taken along the way; the converged maximum
            at more radii, an ascent each.
        eta: η of the adaptive ball ‖δ/(\|θ\|+η)‖ ≤ ρ.
        sub_batch: examples m that share a perturbation in the batchwise variant.
        params: regular expression that chooses parameters by name; empty = all trainable ones.
        top_eigenvalues: how many of the largest eigenvalues λ_max rows list.
        target_error: relative error at which rows say how many examples they would need; 0 = don't.
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
    rho_grid: tuple[float, ...] = ()
    k_grid: tuple[int, ...] = ()
    eta: float = 0.01
    sub_batch: int = 128
    params: str = ""
    top_eigenvalues: int = 1
    target_error: float = 0.0

    def as_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        return {name: list(v) if isinstance(v, tuple) else v for name, v in asdict(self).items()}

    def __post_init__(self) -> None:
        positive = {"rho": self.rho, "noise_scale": self.noise_scale, "k_steps": self.k_steps}
        positive |= {"num_starts": self.num_starts, "max_iterations": self.max_iterations}
        positive |= {"eta": self.eta, "sub_batch": self.sub_batch, "top_eigenvalues": self.top_eigenvalues}
        positive |= {f"rho {rho}": rho for rho in self.rho_grid} | {f"k_steps {k}": k for k in self.k_grid}
        for name, value in positive.items():
            if not value > 0 or not math.isfinite(value):
                raise UsageError(f"{name} must be positive and finite, not {value}")
        whole = {"min_probes": self.min_probes, "max_probes": self.max_probes, "seed": self.seed, **positive}
        for name, value in whole.items():
            if isinstance(value, int) and not 0 <= value < 2**32:
                raise UsageError(f"{name} must lie in [0, 2³²), not {value}")
        for name in ("ascent_tolerance", "eigen_tolerance", "trace_tolerance", "target_error"):
            value = getattr(self, name)
            if not (value == 0 or value >= LEAST_TOLERANCE) or not math.isfinite(value):
                raise UsageError(f"{name} must be 0 or at least {LEAST_TOLERANCE:g}, and finite, not {value}")
        if self.protocol not in get_args(Protocol):
            raise UsageError(f"protocol must be {' or '.join(get_args(Protocol))}, not {self.protocol!r}")
        if self.min_probes < 2 or self.max_probes < 2:
            raise UsageError(f"a trace needs 2 probes at least, got {self.min_probes} and {self.max_probes}")


def as_row(estimate: Any) -> dict[str, Any]:
    """The fields of a dataclass with ``details``, and those beside them, as JSON has it: None for NaN and infinity."""
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
        """As JSON has it."""
        return as_row(self)


Figure = tuple[float | None, float | None, float | None, bool, dict[str, Any]]
"""value, estimator's error, error from the examples being a sample, converged, details"""


def example_error(terms: Tensor) -> float | None:
    """Standard error of the mean of (N,) per-example values; None of a single one."""
    return float(terms.double().std()) / math.sqrt(len(terms)) if len(terms) > 1 else None


def _same(logits: Tensor, again: Tensor, dtype: torch.dtype) -> bool:
    """To ``dtype``'s tolerance: threaded reductions, and those over batches of other sizes, differ in the last bits."""
    tolerance = torch.finfo(dtype).eps ** 0.6  # 7e-5 in float32, 4e-10 in float64
    return bool(torch.allclose(logits, again, rtol=tolerance, atol=tolerance * float(logits.abs().max())))


class Probe:
    """A model over a probe set, with what several measures share: outputs, labels, the top Fisher eigenpair."""

    def __init__(
        self,
        model: nn.Module,
        batches: Batches,
        settings: Settings,
        work: Work,
        initial: nn.Module | None = None,
        memory: float = MEMORY,
    ) -> None:
        self.parameters = Parameters(model, settings.params)
        self.batches, self.settings, self.work = batches, settings, work
        self.initial, self.memory = initial, memory
        self._found: dict[str, Any] = {}

    @cached_property
    def differentiable(self) -> Parameters:
        """The parameters, of which the logits have been seen to have gradients.

        Raises:
            UsageError: they have none, or forward hides some from autograd.
        """
        few = next(iter(self.batches)).x[self.batches.few(TRIAL)]
        require_gradients(self.parameters, few, self.generator("gradients"))
        return self.parameters

    def generator(self, name: str) -> torch.Generator:
        """A generator of its own for each purpose, so that no figure depends on which others were asked for."""
        # hashed to 32 bits: torch's CPU generator ignores the higher ones
        return torch.Generator().manual_seed(zlib.crc32(f"{name}:{self.settings.seed}".encode()))

    def once(self, name: str, compute: Callable[[], T]) -> T:
        """What several figures are made from: computed the first time."""
        if name not in self._found:
            self._found[name] = compute()
        found: T = self._found[name]
        return found

    def _outputs(self) -> Tensor:
        rows: list[Tensor] = []
        with torch.no_grad():
            for batch in self.batches:
                start = self.batches.first + sum(map(len, rows))
                some = f"examples {start} to {start + len(batch.x) - 1} of {self.batches.examples.source}"

                def fails(cause: str, some: str = some) -> DataError:
                    return DataError(f"the model fails on {some} ({cause}); leave out what it does not take")

                with foreign_or(fails):
                    rows.append(self.parameters.logits(batch.x))
                self.work.add(FORWARD, len(rows[-1]))
        return torch.cat(rows)

    def _require_independent(self, clean: Tensor) -> None:
        """Raise UsageError where an example's outputs hang on its batch: so would every measure."""
        x = next(iter(self.batches)).x
        if self.batches.coupled or len(x) < 2:
            return
        count = min(TRIAL, len(x)) - 1
        few = slice(1, 1 + count - (count + 1) % 2)  # an odd number, which no groups of examples divide

        def hanging(cause: str) -> UsageError:
            return UsageError(
                f"an example's outputs hang on the others of its batch ({cause}), and so would what is measured; give "
                "the model statistics of its own"
            )

        with foreign_or(hanging), torch.no_grad():  # BatchNorm has no statistics of a single value
            apart = self.parameters.logits(x[few])
        if not _same(clean[: len(x)][few], apart, torch.float32):
            raise hanging("as of BatchNorm without running statistics")

    @cached_property
    def clean(self) -> Tensor:
        """(n, C) logits at θ of this process's examples.

        Raises:
            UsageError: one class only; an example's outputs hang on its batch.
            DivergedError: some are not finite.
            DataError: two passes over the data differ; the model does not take some.
        """
        first, again = self._outputs(), self._outputs()
        if first.shape[1] < 2:
            raise UsageError(
                "the model has a single output, whose softmax is 1 always; wrap it to return two logits"
            )
        if not bool(torch.isfinite(first).all()):
            row = self.batches.first + int((~torch.isfinite(first)).any(1).nonzero()[0])
            raise DivergedError(
                f"the model's output on example {row} is not finite; check weights and normalisation"
            )
        if not _same(first, again, first.dtype):
            raise DataError("two passes over the data gave different outputs; no shuffling, no random layers")
        self._require_independent(first)
        return first

    def mean(self, values: Tensor) -> Figure:
        """The exact mean of this process's per-example ``values`` (n,) over all examples."""
        joined = gather_examples(self.batches.independent(values.double()))
        return float(joined.mean()), None, example_error(joined), True, {}

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
        return ProbeDivergence(self.differentiable, self.batches, self.clean, self.work)

    @cached_property
    def fisher(self) -> Operator:
        return fisher(self.differentiable, self.batches, self.clean, self.work)

    @cached_property
    def hessian(self) -> Operator:
        return hessian(
            self.differentiable, self.batches, self.hessian_labels, self.work, memory=KEPT * self.memory
        )

    @property
    def hessian_labels(self) -> Tensor:
        """(n,) as given, or else predicted."""
        return self.clean.argmax(1) if self.labels is None else self.labels

    @property
    def label_kind(self) -> str:
        if self.batches.coupled:
            return "partner"
        return "predicted" if self.labels is None else "given"

    @cached_property
    def fisher_draft(self) -> Eigenpair:
        """The Fisher matrix's top eigenpair by difference products: good to start an ascent from."""

        def drafted(operator: Operator) -> Eigenpair:
            # a difference product's own error, half a percent, is no tolerance to wait for; where it is more, as on
            # tiny networks, the draft stalls
            return lanczos(
                operator,
                generator=self.generator("fisher"),
                tolerance=max(self.settings.eigen_tolerance, 0.01),
                max_iterations=min(self.settings.max_iterations, DRAFT),
            )

        try:
            return drafted(replace(self.fisher, matvec=FisherByDifference(self.divergence)))
        except DivergedError:  # as its steps may, of a deep network
            return drafted(self.fisher)

    @cached_property
    def fisher_top(self) -> Eigenpair:
        """``fisher_draft``, certified by an exact product."""
        found, settings = self.fisher_draft, self.settings
        exact = certified(
            self.fisher, found, tolerance=settings.eigen_tolerance, max_iterations=settings.max_iterations
        )
        return replace(exact, iterations=found.iterations + exact.iterations)

    @cached_property
    def hessian_top(self) -> Eigenpair:
        return lanczos(
            self.hessian,
            generator=self.generator("hessian"),
            tolerance=self.settings.eigen_tolerance,
            max_iterations=self.settings.max_iterations,
        )

    @cached_property
    def example_fisher_trace(self) -> Trace | None:
        """tr F by examples' own gradients; None where this model does not allow it, or they hang together."""
        return self.fisher_trace_to(self.settings.trace_tolerance)

    def fisher_trace_to(self, tolerance: float) -> Trace | None:
        """The same to another tolerance."""
        if self.batches.coupled:
            return None
        return fisher_trace(
            self.differentiable,
            self.batches,
            self.clean,
            self.work,
            generator=self.generator("fisher trace"),
            tolerance=tolerance,
            max_probes=self.settings.max_probes,
        )

    @cached_property
    def affinity(self) -> Verdict:
        """Whether each single parameter enters the logits affinely, so that tr H = tr F."""
        return affine_in_each_parameter(self.parameters, next(iter(self.batches)).x)

    @cached_property
    def residual(self) -> Operator:
        return residual(self.differentiable, self.batches, self.clean, self.hessian_labels, self.work)

    def starts(self) -> Iterator[Tensor]:
        """Random starts (P,), one at a time: all of them would take P times their number."""
        generator = self.generator("starts")
        settings = self.settings
        for _ in range(settings.num_starts):
            yield self.differentiable.random(settings.noise_scale, generator)
