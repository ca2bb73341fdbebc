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
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

from gm_probe.core.errors import UsageError
from gm_probe.core.models import logits_of
from gm_probe.core.parameters import Parameters
from gm_probe.core.processes import count, sum_over_processes
from gm_probe.probe.ascent import ascend, kl_gradient, to_sphere
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
        logits = logits_of(self.model(x))
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
            sizes = sum_over_processes(torch.tensor([len(y), len(parts)], device=x.device))
            total = int(sizes[0])
            if not parts or int(sizes[1]) != count() * len(parts):
                raise UsageError(
                    f"a batch of {total} examples leaves a process without its part of a (sub-)batch; "
                    "choose another batch size, m, or number of processes"
                )
        return parts, total

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


class _Draws:
    """The global generators as they stood, so that a perturbed pass drops the units that the clean one dropped.

    Without it a network with dropout would have KL > 0 at δ = 0, and SAM with ρ = 0 would not be SGD.
    """

    def __init__(self, device: torch.device) -> None:
        self._cpu = torch.get_rng_state()
        self._cuda = device if device.type == "cuda" else None
        self._state = torch.cuda.get_rng_state(device) if self._cuda is not None else None

    @contextmanager
    def again(self) -> Iterator[None]:
        """Draw the same once more; the generators then go on from where they were."""
        with torch.random.fork_rng(devices=[] if self._cuda is None else [self._cuda]):
            torch.set_rng_state(self._cpu)
            if self._cuda is not None and self._state is not None:
                torch.cuda.set_rng_state(self._state, self._cuda)
            yield


class SAM(Rule):
    """∇L(θ + e), e = ρ ∇L/‖∇L‖ (Foret et al. 2021).

    Of an objective with unlabeled inputs L is the labeled loss alone (paper §5.3, App. E.4); the gradient of the
    unlabeled loss, at θ, is added.
    """

    passes = 6.0

    def __init__(
        self,
        model: nn.Module,
        criterion: Criterion = functional.cross_entropy,
        *,
        rho: float = 0.05,
        m: int | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(model, criterion, m=m, generator=generator)
        self.rho = _radius(rho)
        self.passes = 8.0 if self.objective.two_losses else 6.0

    def _gradients(self, x: Tensor, y: Tensor) -> tuple[Step, Gradients]:
        draws = _Draws(x.device)
        logits = logits_of(self.model(x))
        loss, rest = self.objective.loss(logits, y), self.objective.unlabeled_loss(logits, y)
        gradients = self._differentiate(loss, again=rest is not None)
        gradient = self._direction(self.parameters.join(gradients), len(y))
        calm = self._no_gradient if rest is None else self._differentiate(rest)
        with draws.again():
            moved = self._at(x, y, self._perturbation(gradient), self.objective.loss)
        whole = loss.detach() if rest is None else (loss + rest).detach()
        return Step(logits.detach(), whole, None), self._sum(calm, moved)

    def _perturbation(self, gradient: Tensor) -> Tensor:
        return to_sphere(gradient, self.rho)


class ASAM(SAM):
    """SAM with e = ρ T²∇L/‖T∇L‖ (Kwon et al. 2021).

    T = |θ| + η on parameters named 'weight' (BatchNorm's too), 1 elsewhere, as in the method's published code.
    """

    def __init__(
        self,
        model: nn.Module,
        criterion: Criterion = functional.cross_entropy,
        *,
        rho: float = 0.5,
        eta: float = 0.01,
        m: int | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(model, criterion, rho=rho, m=m, generator=generator)
        self.eta = eta

    def _perturbation(self, gradient: Tensor) -> Tensor:
        named = self.parameters.named.items()
        scale = self.parameters.join(
            p.detach().abs() + self.eta if "weight" in name else torch.ones_like(p) for name, p in named
        )
        return scale * to_sphere(scale * gradient, self.rho)


class _Inconsistency(Rule):
    """What IAM-D and IAM-S share: Algorithm 1 on the current mini-batch, from fresh noise."""

    def __init__(
        self,
        model: nn.Module,
        criterion: Criterion = functional.cross_entropy,
        *,
        rho: float = 0.1,
        k_steps: int = 1,
        noise_scale: float = 0.1,
        m: int | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(model, criterion, m=m, generator=generator)
        if k_steps < 1:
            raise UsageError(f"k_steps must be at least 1, not {k_steps}")
        self.rho, self.k_steps, self.noise_scale = _radius(rho), k_steps, noise_scale

    def _ascend(self, x: Tensor, y: Tensor, logits: Tensor, draws: _Draws) -> Tensor:
        clean = self.objective.compared(logits.detach(), y)
        factor: Tensor | float = 1 / len(clean)
        if self._scaler is not None:
            factor = self._scaler.scale(torch.tensor(factor, device=x.device))

        def gradient(offset: Tensor) -> Tensor:
            with draws.again():
                mean = kl_gradient(
                    self.parameters, x, clean, offset, factor, lambda moved: self.objective.compared(moved, y)
                )[1]
            return self._direction(mean, len(clean))

        start = self.parameters.random(self.noise_scale, self.generator)
        return ascend(gradient, start, self.rho, self.k_steps)


class IAMD(_Inconsistency):
    """∇_θ [L(θ) + β KL(f_θ ‖ f_{θ+sg(δ)})] (paper Eq. 6, 23); the clean pass serves L, the ascent and the KL.

    Args:
        beta: weight β.
        kl_grad: 'both' differentiates both sides of the KL (App. D, Eq. 23); 'perturbed' holds f_θ constant, as
            the authors' supervised loop does.
    """

    def __init__(
        self,
        model: nn.Module,
        criterion: Criterion = functional.cross_entropy,
        *,
        rho: float = 0.1,
        beta: float = 1.0,
        k_steps: int = 1,
        noise_scale: float = 0.1,
        kl_grad: Literal["both", "perturbed"] = "both",
        m: int | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(
            model, criterion, rho=rho, k_steps=k_steps, noise_scale=noise_scale, m=m, generator=generator
        )
        self.beta, self.kl_grad = beta, kl_grad
        self.passes = 6.0 + 3.0 * k_steps

    def _gradients(self, x: Tensor, y: Tensor) -> tuple[Step, Gradients]:
        draws = _Draws(x.device)
        logits = logits_of(self.model(x))
        loss = self.objective(logits, y)
        offset = self._ascend(x, y, logits, draws)
        with draws.again():
            moved = self.parameters.logits(x, self.parameters.moved(offset))
        divergence = self._divergence(logits, moved, y, self.kl_grad)
        step = Step(logits.detach(), loss.detach(), divergence.detach())
        return step, self._differentiate(loss + self.beta * divergence)


class OnePassIAMD(Rule):
    """IAM-D whose δ is carried from the last step, with a random sign (METHOD.md, from the authors' code).

    One backward pass gives the parameters' gradient and, with respect to the moved parameters, the KL's: δ's next
    direction. So δ follows the ascent across mini-batches, at SAM's cost. The first δ is noise of length ρ; where
    the KL has no gradient, or not a finite one, δ stays as it was. With ``m`` it goes from sub-batch to sub-batch.
    Where layers have been frozen or unfrozen it starts from noise again.
    """

    passes = 6.0

    def __init__(
        self,
        model: nn.Module,
        criterion: Criterion = functional.cross_entropy,
        *,
        rho: float = 0.1,
        beta: float = 1.0,
        kl_grad: Literal["both", "perturbed"] = "both",
        m: int | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(model, criterion, m=m, generator=generator)
        if not beta > 0:
            raise UsageError(f"beta must be above 0, not {beta}: the term's gradient is what δ follows")
        self.rho, self.beta, self.kl_grad = _radius(rho), beta, kl_grad
        self.delta: Tensor | None = None  # (P,)

    def _gradients(self, x: Tensor, y: Tensor) -> tuple[Step, Gradients]:
        if self.delta is None or len(self.delta) != self.parameters.size:
            self.delta = to_sphere(self.parameters.random(1.0, self.generator), self.rho)
        sign = _random_sign(self.generator)
        draws = _Draws(x.device)
        logits = logits_of(self.model(x))
        loss = self.objective(logits, y)
        shift = self.parameters.split(sign * self.delta)
        # leaves of their own, so that their gradient is the KL's alone
        moved = {n: (p.detach() + shift[n]).requires_grad_() for n, p in self.parameters.named.items()}
        with draws.again():
            perturbed = self.parameters.logits(x, moved)
        divergence = self._divergence(logits, perturbed, y, self.kl_grad)
        leaves = [*self._leaves, *moved.values()]
        gradients = self._differentiate(loss + self.beta * divergence, leaves)
        clean, ascent = gradients[: len(moved)], gradients[len(moved) :]
        self._follow(self._direction(self.parameters.join(ascent), len(y)))
        step = Step(logits.detach(), loss.detach(), divergence.detach())
        return step, self._sum(clean, ascent)

    def _follow(self, direction: Tensor) -> None:
        assert self.delta is not None
        ahead = to_sphere(direction, self.rho)
        usable = torch.isfinite(ahead).all() & direction.any()
        self.delta = torch.where(usable, ahead, self.delta)

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "delta": self.delta}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what ``state_dict`` gave."""
        super().load_state_dict(state)
        delta = state["delta"]
        self.delta = None if delta is None else delta.to(self.parameters.device)


class IAMS(_Inconsistency):
    """∇L(θ + δ), second-order terms dropped (paper Eq. 7).

    Args:
        sign: 'random' takes δ and −δ equally often (paper §5); 'none' takes δ as it is (authors' code); 'loss'
            takes the sign that raises the loss to first order (one more gradient).
    """

    def __init__(
        self,
        model: nn.Module,
        criterion: Criterion = functional.cross_entropy,
        *,
        rho: float = 0.1,
        k_steps: int = 1,
        noise_scale: float = 0.1,
        sign: Literal["random", "none", "loss"] = "random",
        m: int | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(
            model, criterion, rho=rho, k_steps=k_steps, noise_scale=noise_scale, m=m, generator=generator
        )
        self.sign = sign
        self.passes = 4.0 + 3.0 * k_steps + (2.0 if sign == "loss" else 0.0)

    def _gradients(self, x: Tensor, y: Tensor) -> tuple[Step, Gradients]:
        draws = _Draws(x.device)
        with torch.set_grad_enabled(self.sign == "loss"):
            logits = logits_of(self.model(x))
            loss = self.objective(logits, y)
        offset = self._ascend(x, y, logits, draws)
        if self.sign == "random":
            offset = offset * _random_sign(self.generator)
        elif self.sign == "loss":
            gradient = self._direction(self.parameters.join(self._differentiate(loss)), len(y))
            offset = torch.where(gradient @ offset < 0, -offset, offset)
        with draws.again():
            return Step(logits.detach(), loss.detach(), None), self._at(x, y, offset, self.objective)


def _random_sign(generator: torch.Generator) -> int:
    return 2 * int(torch.randint(0, 2, (), generator=generator, device=generator.device)) - 1


def _radius(rho: float) -> float:
    if not rho >= 0:
        raise UsageError(f"rho must be ≥ 0, not {rho}")
    return rho


METHODS: dict[str, type[Rule]] = {
    "sgd": Rule,
    "sam": SAM,
    "asam": ASAM,
    "iam-d": IAMD,
    "iam-d-onepass": OnePassIAMD,
    "iam-s": IAMS,
}
