"""Training methods as gradient rules: each fills ``p.grad``, and any torch optimizer steps.

::

    rule = IAMD(model, rho=0.1, beta=1.0)          # once
    optimizer.zero_grad()
    rule.backward(x, y)                            # instead of loss.backward()
    optimizer.step()

Perturbed passes run on moved copies of the parameters and on copied buffers: the model's own parameters and
BatchNorm statistics are touched by the clean pass alone.

Float16: under autocast call ``rule.backward(x, y, scaler=scaler)``, then ``scaler.unscale_``, ``step`` and
``update`` as ever. The scaler sees the final gradient only. The inner gradients are scaled by the same factor,
which no perturbation depends on; where one overflows, so does what is computed at that perturbation, and the
scaler skips the step and lowers its factor.

Other objectives than supervised learning (training.objectives) take the criterion's place; see there for what x
and y then are.

Several processes (``torch.distributed``): each hands in its part of the batch, and each gets the gradient of
the whole batch. The perturbation is the whole batch's too, its gradient summed over the processes: a run does
not depend on how many share it. The rule does all the communication; a DistributedDataParallel wrapper is
looked through and its hooks never fire. ``generator`` must be seeded alike in every process.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

from gm_probe.core.contrastive import Contrastive
from gm_probe.core.devices import generator_state, generators_kept, set_generator_state
from gm_probe.core.errors import DeviceError, UsageError, first_line, on_two_devices
from gm_probe.core.models import logits_at
from gm_probe.core.parameters import Parameters, differentiable_recurrence
from gm_probe.core.processes import count, sum_over_processes
from gm_probe.probe.kl import kl_divergence
from gm_probe.training.objectives import Criterion, Objective

Gradients = Sequence[Tensor | None]
"""One a trainable parameter, in order; None = the loss does not depend on it."""


@dataclass(frozen=True, slots=True)
class Step:
    """What one ``backward`` saw of this process's examples: clean logits (B, C), clean loss, and β·KL's KL.

    The last two are means, 0-dim; the KL is None where the rule has no such term.
    """

    logits: Tensor
    loss: Tensor
    inconsistency: Tensor | None


class Rule:
    """Base of all rules, itself plain backpropagation (SGD, AdamW, ... by the optimizer that steps).

    Args:
        model: its trainable parameters get the gradients.
        criterion: maps logits (B, C) and labels (B,) to the mean loss; or an objective.
        m: the batch is worked off in sub-batches of this size, and their gradients are averaged by size: gradient
            accumulation, and m-sharpness (App. E.1), for each has a perturbation of its own. None = all at once.
        generator: of the noise starts; None draws one seeded with 0 on the CPU.

    ``passes`` is the cost of a step in forward passes (a backward counts 2).
    """

    passes = 3.0

    def __init__(
        self,
        model: nn.Module,
        criterion: Criterion = functional.cross_entropy,
        *,
        m: int | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        if m is not None and m < 1:
            raise UsageError(f"m must be at least 1, not {m}")
        self.model = model.module if isinstance(model, DistributedDataParallel) else model
        self.objective = criterion if isinstance(criterion, Objective) else Objective(criterion)
        self.m = m
        self.parameters = Parameters(self.model)
        self.generator = generator or torch.Generator().manual_seed(0)
        self._scaler: GradScaler | None = None

    def backward(self, x: Tensor, y: Tensor, *, scaler: GradScaler | None = None) -> Step:
        """Add this rule's gradient on the batch x (B, ...), y (B,) to every ``p.grad``, as backward() does.

        Under an objective that learns from unlabeled inputs too, x has rows after the labeled ones.

        Args:
            scaler: multiplies the gradient by its factor.
        """
        self._scaler = scaler
        self.parameters = Parameters(self.model)  # layers may have been frozen or unfrozen meanwhile
        parts, total = self._cut(x, y)
        steps, sums = [], self._no_gradient
        for part_x, part_y in parts:
            with differentiable_recurrence(self.model), self._told_of_devices(x, y):
                step, gradients = self._gradients(part_x, part_y)
            if len(part_y) != total:
                gradients = [None if g is None else g * (len(part_y) / total) for g in gradients]
            sums = self._sum(sums, gradients)
            steps.append((len(part_y), step))
        self._accumulate(self._over_processes(sums))
        if len(steps) == 1:
            return steps[0][1]

        def mean(values: Sequence[Tensor]) -> Tensor:
            return torch.stack(
                [size * value for (size, _), value in zip(steps, values, strict=True)]
            ).sum() / len(y)

        divergences = [step.inconsistency for _, step in steps if step.inconsistency is not None]
        return Step(
            torch.cat([step.logits for _, step in steps]),
            mean([step.loss for _, step in steps]),
            mean(divergences) if divergences else None,
        )

    def state_dict(self) -> dict[str, Any]:
        """What the next step depends on beside model and optimizer."""
        return {"generator": self.generator.get_state()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what ``state_dict`` gave."""
        self.generator.set_state(state["generator"].cpu())

    def _gradients(self, x: Tensor, y: Tensor) -> tuple[Step, Gradients]:
        """The rule itself: the gradient of the mean over one (sub-)batch, scaled."""
        logits = logits_at(self.model, x)
        loss = self.objective(logits, y)
        return Step(logits.detach(), loss.detach(), None), self._differentiate(loss)

    def _cut(self, x: Tensor, y: Tensor) -> tuple[list[tuple[Tensor, Tensor]], int]:
        """The sub-batches, and the number of examples in all processes."""
        size, total = self.m or max(len(y), 1), len(y)
        if count() > 1 and self.m is not None:
            if self.m % count():
                raise UsageError(f"m = {self.m} cannot be shared by {count()} processes; take a multiple")
            size = self.m // count()
        if len(x) != len(y):
            if self.m is not None:
                raise UsageError("m cuts batches in which every example has a label; leave it out")
            size = max(len(x), 1)
        parts = list(zip(x.split(size), y.split(size), strict=True)) if len(y) else []
        if count() > 1:
            sizes = sum_over_processes(torch.tensor([len(y), len(parts), len(y) ** 2], device=x.device))
            total = int(sizes[0])
            if isinstance(self.model, Contrastive) and int(sizes[2]) * count() != total**2:
                raise UsageError("NT-Xent compares the views of all processes: each needs as many")
            if not parts or int(sizes[1]) != count() * len(parts):
                raise UsageError(
                    f"a batch of {total} examples leaves a process without its part of a (sub-)batch; "
                    "choose another batch size, m, or number of processes"
                )
        return parts, total

    @contextmanager
    def _told_of_devices(self, x: Tensor, y: Tensor) -> Iterator[None]:
        """Raise DeviceError that says where x, y and the model are, where torch raises of two devices."""
        try:
            yield
        except RuntimeError as error:
            if not on_two_devices(error):
                raise
            places = {"x": x.device, "y": y.device, "the model": self.parameters.device}
            told = ", ".join(f"{name} is on {place}" for name, place in places.items())
            raise DeviceError(
                f"{told}; move all, and what the criterion holds, to one device ({first_line(error)})"
            ) from error

    def _differentiate(
        self, loss: Tensor, inputs: Sequence[Tensor] | None = None, *, again: bool = False
    ) -> Gradients:
        """``again``: the same forward pass will be differentiated once more."""
        scaled = loss if self._scaler is None else self._scaler.scale(loss)
        leaves = self._leaves if inputs is None else inputs
        return torch.autograd.grad(scaled, leaves, allow_unused=True, retain_graph=again)

    def _direction(self, mean: Tensor, examples: int) -> Tensor:
        """A multiple of the whole batch's gradient, of this process's ``mean`` (P,) over its examples."""
        return mean if count() == 1 else sum_over_processes(mean * examples)

    def _at(self, x: Tensor, y: Tensor, offset: Tensor, loss: Criterion) -> Gradients:
        """∇ ``loss`` at θ + offset, the offset held constant."""
        return self._differentiate(loss(self.parameters.logits(x, self.parameters.moved(offset)), y))

    def _divergence(self, logits: Tensor, moved: Tensor, y: Tensor, kl_grad: str) -> Tensor:
        """Mean KL from clean to ``moved`` logits, over those that the objective compares."""
        clean = logits if kl_grad == "both" else logits.detach()
        return kl_divergence(self.objective.compared(clean, y), self.objective.compared(moved, y)).mean()

    @staticmethod
    def _sum(one: Gradients, other: Gradients) -> Gradients:
        # never in place: autograd may hand out one tensor as the gradient of two parameters
        return [b if a is None else a if b is None else a + b for a, b in zip(one, other, strict=True)]

    def _over_processes(self, gradients: Gradients) -> Gradients:
        used = [g for g in gradients if g is not None]
        if count() == 1 or not used:
            return gradients
        joined = sum_over_processes(torch.cat([g.reshape(-1) for g in used]))
        pieces = iter(joined.split([g.numel() for g in used]))
        return [None if g is None else next(pieces).view_as(g) for g in gradients]

    def _accumulate(self, gradients: Gradients) -> None:
        for p, g in zip(self._leaves, gradients, strict=True):
            if g is None:
                continue
            if p.grad is None:
                p.grad = g.clone()  # of its own: it will be clipped and unscaled in place
            else:
                p.grad.add_(g)

    @property
    def _leaves(self) -> list[nn.Parameter]:
        return list(self.parameters.named.values())

    @property
    def _no_gradient(self) -> Gradients:
        return [None] * len(self.parameters.named)


class Draws:
    """The global generators as they stood, so that a perturbed pass drops the units that the clean one dropped.

    Without it a network with dropout would have KL > 0 at δ = 0, and SAM with ρ = 0 would not be SGD.
    """

    def __init__(self, device: torch.device) -> None:
        self._cpu, self._device, self._own = torch.get_rng_state(), device, generator_state(device)

    @contextmanager
    def again(self) -> Iterator[None]:
        """Draw the same once more; the generators then go on from where they were."""
        with generators_kept(self._device):
            torch.set_rng_state(self._cpu)
            set_generator_state(self._own, self._device)
            yield
