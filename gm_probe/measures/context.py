"""What the measures share: a model over its examples, with logits, operators and eigenpairs that are computed once."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cached_property
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from gm_probe.curvature.affine import obstacle
from gm_probe.curvature.custom_functions import require_moved_weights
from gm_probe.curvature.derivatives import TRIAL, differentiable, require_full_precision, require_gradients
from gm_probe.curvature.fisher_trace import fisher_trace
from gm_probe.curvature.operators import fisher, hessian, residual
from gm_probe.data.batches import Batches
from gm_probe.data.labels import as_labels, fitting_labels
from gm_probe.errors import DataError, DivergedError, UsageError, foreign_or
from gm_probe.inconsistency.ascent import Divergence, FisherByDifference
from gm_probe.linalg.lanczos import Eigenpair, eigenpairs, lanczos
from gm_probe.linalg.operator import Operator
from gm_probe.linalg.trace import Trace
from gm_probe.linalg.work import FORWARD, Work
from gm_probe.measures.estimates import Estimate, example_error
from gm_probe.measures.last_layer import LastLayer
from gm_probe.measures.scores import Reference, by_class, counted_shares
from gm_probe.measures.settings import Settings
from gm_probe.models.door import Outputs, alike
from gm_probe.models.parameters import Parameters
from gm_probe.runtime.devices import generator_on
from gm_probe.runtime.processes import gather_examples
from gm_probe.runtime.randomness import Draws

T = TypeVar("T")
DRAFT = 40
"""Maximum number of difference products before exact ones continue; CIFAR-10 networks need 8 to 14."""


def _same(outputs: Tensor, again: Tensor, dtype: torch.dtype) -> bool:
    """Compare to a tolerance: threaded reductions, and those over other batch sizes, differ in the last bits."""
    return alike(outputs, again, torch.finfo(dtype).eps ** 0.6)  # 7e-5 in float32, 4e-10 in float64


class MeasurementContext:
    """A model over its examples, with results that several measures share: logits, labels, operators, eigenpairs."""

    def __init__(
        self,
        model: nn.Module,
        batches: Batches,
        settings: Settings,
        work: Work,
        initial: nn.Module | None = None,
        outputs: Outputs | None = None,
        validation: Batches | None = None,
    ) -> None:
        self.parameters = Parameters(model, settings.params, outputs, or_frozen=True)
        self.batches, self.settings, self.work = batches, settings, work
        self.initial, self.validation = initial, validation
        self._last_layer = LastLayer()
        self._found: dict[str, Any] = {}

    @cached_property
    def differentiable(self) -> Parameters:
        """The parameters, after a check that the logits have gradients with respect to them.

        Raises:
            UsageError: they have none, forward hides some from autograd or computes in half precision, or the backward
                pass runs forward again.
        """
        self.parameters.require_trainable()
        few = next(iter(self.batches)).x[self.batches.trial_slice(TRIAL)]
        with differentiable():
            require_moved_weights(self.parameters, few, Draws(few.device, self.parameters.model))
            require_full_precision(self.parameters, few)
        require_gradients(self.parameters, few, self.generator("gradients"))
        return self.parameters

    def generator(self, name: str) -> torch.Generator:
        """Return a separate generator for each purpose, so that no value depends on which others are measured."""
        there = self.settings.noise_device == "device"
        generator = generator_on(self.batches.device) if there else torch.Generator()
        # hashed to 32 bits, because torch's CPU generator ignores the higher ones
        return generator.manual_seed(zlib.crc32(f"{name}:{self.settings.seed}".encode()))

    def once(self, name: str, compute: Callable[[], T]) -> T:
        """Return a result that several measures use; it is computed the first time."""
        if name not in self._found:
            self._found[name] = compute()
        found: T = self._found[name]
        return found

    def _outputs(self, batches: Batches, last: LastLayer | None = None) -> Tensor:
        """Return the model's outputs for ``batches`` as they are; ``last`` sees every batch."""
        rows: list[Tensor] = []
        with torch.no_grad():
            for batch in batches:
                with batches.naming(batches.first + sum(map(len, rows)), len(batch.x)):
                    rows.append(self.parameters.taken(batch.x))
                if last is not None:
                    last.add(rows[-1])
                self.work.add(FORWARD, len(rows[-1]))
        return torch.cat(rows)

    def _require_independent(self, outputs: Tensor) -> None:
        """Raise UsageError where an example's outputs depend on its batch, because then every measure would."""
        x = next(iter(self.batches)).x
        if self.batches.batch_dependent or len(x) < 2:
            return
        count = min(TRIAL, len(x)) - 1
        few = slice(1, 1 + count - (count + 1) % 2)  # an odd number, which groups of examples do not divide

        def dependent(cause: str) -> UsageError:
            return UsageError(
                f"an example's output depends on the rest of its batch ({cause}), so results would depend "
                "on the batch size. Switch the model to running statistics"
            )

        with foreign_or(dependent), torch.no_grad():  # BatchNorm has no statistics of a single value
            apart = self.parameters.taken(x[few])
        if not _same(outputs[: len(x)][few], apart, torch.float32):
            raise dependent("BatchNorm without running statistics?")

    @cached_property
    def logits(self) -> Tensor:
        """(n, C) logits at θ of this process's examples; (n, L, 2) for L yes-or-no labels.

        Raises:
            UsageError: there is one class only, the outputs are of another kind, or they depend on the batch.
            DivergedError: some are not finite.
            DataError: two passes over the data differ, or the model does not accept an example.
        """
        first = self._outputs(self.batches)
        with self._last_layer.watching(self.parameters.model):
            again = self._outputs(self.batches, self._last_layer)
        finite = torch.isfinite(first.amax(1))  # −∞ masks classes, but not all of them
        if not bool(finite.all()):
            row = self.batches.first + int((~finite).nonzero()[0])
            raise DivergedError(
                f"the model's output on example {row} is not finite. Check weights and normalisation"
            )
        if not _same(first, again, first.dtype):
            raise DataError(
                "two passes over the data gave different outputs. Turn off shuffling and random layers"
            )
        self._require_independent(first)
        self.parameters.outputs = self.parameters.outputs.checked(first)
        return self.parameters.outputs.logits(first)

    @property
    def normalised(self) -> bool:
        """True where the model returns probabilities, whose logits are known up to a constant per example."""
        return self.parameters.outputs.kind != "logits"

    @cached_property
    def last_layer_scores(self) -> tuple[float | None, float | None]:
        """Dispersion and gradient norm (see ``LastLayer``), from the pass that gave the logits."""
        return self._last_layer.scores(self.logits.device)

    @cached_property
    def reference(self) -> tuple[Reference, Tensor] | None:
        """The parameters of atc, doc and cot from the validation set, and its class shares (K,); None without one."""
        if self.validation is None:
            return None
        examples = self.validation.examples
        if examples.y is None:
            raise DataError(f"{examples.source} has no labels, and a validation set needs them")
        outputs = self._outputs(self.validation)
        if not bool(torch.isfinite(outputs.amax(1)).all()):
            raise DivergedError(f"the model's outputs on {examples.source} are not all finite")
        logits = by_class(self.parameters.outputs.logits(outputs)).cpu()
        y = fitting_labels(as_labels(examples.y.clone(), len(examples)), logits, examples.source).cpu()
        return Reference.of(logits, y), counted_shares(y, logits.shape[1])

    def mean(self, values: Tensor) -> Estimate:
        """Return the exact mean over all examples of per-example ``values``, of which (n,) are this process's."""
        joined = gather_examples(self.batches.independent(values.double()))
        return Estimate(float(joined.mean()), stderr_examples=example_error(joined))

    @cached_property
    def labels(self) -> Tensor | None:
        """(n,) class indices as given, or (n, L) yes-or-no labels; None = unlabeled."""
        examples = self.batches.examples
        if examples.y is None:
            return None
        y = as_labels(examples.y.clone(), len(examples))  # a copy, since it may come from inference mode
        return fitting_labels(y, self.logits, examples.source).to(self.logits.device)

    @cached_property
    def divergence(self) -> Divergence:
        return Divergence(self.differentiable, self.batches, self.logits, self.work)

    @cached_property
    def fisher(self) -> Operator:
        return fisher(self.differentiable, self.batches, self.logits, self.work)

    @cached_property
    def hessian(self) -> Operator:
        return hessian(self.differentiable, self.batches, self.hessian_labels, self.work)

    @property
    def hessian_labels(self) -> Tensor:
        """(n,) or (n, L) labels as given, or otherwise predicted."""
        return self.logits.argmax(-1) if self.labels is None else self.labels

    @property
    def label_kind(self) -> str:
        if self.batches.batch_dependent:
            return "partner"
        return "predicted" if self.labels is None else "given"

    @cached_property
    def fisher_draft(self) -> Eigenpair:
        """The Fisher matrix's top eigenpair by difference products, which is a good start for an ascent."""

        def drafted(operator: Operator) -> Eigenpair:
            # A tighter tolerance than a difference product's own error, half a percent, would not be met. Where that
            # error is larger, as on tiny networks, the draft stalls.
            return lanczos(
                operator,
                generator=self.generator("fisher"),
                tolerance=max(self.settings.eigen_tolerance, 0.01),
                max_iterations=min(self.settings.max_iterations, DRAFT),
                expect=self.work.expect,
            )

        try:
            return drafted(replace(self.fisher, matvec=FisherByDifference(self.divergence)))
        except DivergedError:  # the steps may overflow in a deep network
            return drafted(self.fisher)

    @cached_property
    def fisher_top(self) -> Eigenpair:
        """The Fisher matrix's top eigenpair: Lanczos with exact products, started from ``fisher_draft``.

        Mostly the first product already gives a small enough residual. After a draft that had not converged, two must.
        """
        draft, settings = self.fisher_draft, self.settings
        [exact], _ = eigenpairs(
            self.fisher,
            draft.vector,
            tolerance=settings.eigen_tolerance,
            max_iterations=settings.max_iterations,
            patience=1 if draft.converged else 2,
            expect=self.work.expect,
        )
        return replace(exact, iterations=draft.iterations + exact.iterations)

    @cached_property
    def hessian_top(self) -> Eigenpair:
        return lanczos(
            self.hessian,
            generator=self.generator("hessian"),
            tolerance=self.settings.eigen_tolerance,
            max_iterations=self.settings.max_iterations,
            expect=self.work.expect,
        )

    @cached_property
    def example_fisher_trace(self) -> Trace | None:
        """tr F by per-example gradients; None where the model does not allow it, or examples depend on each other."""
        return self.fisher_trace_to(self.settings.trace_tolerance)

    def fisher_trace_to(self, tolerance: float) -> Trace | None:
        """Return ``example_fisher_trace`` to another tolerance."""
        if self.batches.batch_dependent:
            return None
        return fisher_trace(
            self.differentiable,
            self.batches,
            self.logits,
            self.work,
            generator=self.generator("fisher trace"),
            tolerance=tolerance,
            max_probes=self.settings.max_probes,
        )

    @cached_property
    def not_affine(self) -> str | None:
        """Why tr H need not be tr F; None where each parameter tensor enters the logits affinely."""
        if self.batches.batch_dependent:
            return "examples depend on each other"
        return obstacle(self.parameters, next(iter(self.batches)).x)

    @cached_property
    def residual(self) -> Operator:
        return residual(self.differentiable, self.batches, self.logits, self.hessian_labels, self.work)

    def starts(self) -> Iterator[Tensor]:
        """Yield random starts (P,), one at a time, to save memory."""
        generator = self.generator("starts")
        for _ in range(self.settings.num_starts):
            yield self.differentiable.random(self.settings.noise_scale, generator)
