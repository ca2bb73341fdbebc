"""Training methods as gradient rules: each fills ``p.grad``, and any torch optimizer steps.

::

    rule = IAMD(model, rho=0.1, beta=1.0)          # once
    optimizer.zero_grad()
    rule.backward(x, y)                            # instead of loss.backward()
    optimizer.step()

Perturbed passes run on moved copies of the parameters and on copied buffers: the model's own parameters and
BatchNorm statistics are touched by the clean pass alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from gm_probe.core.errors import UsageError
from gm_probe.core.models import logits_of
from gm_probe.core.parameters import Parameters
from gm_probe.probe.ascent import ascend, kl_gradient, to_sphere
from gm_probe.probe.kl import kl_divergence

Criterion = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class Step:
    """What one ``backward`` saw: clean logits (B, C), clean loss, and β·KL's KL (0-dim; None = no such term)."""

    logits: Tensor
    loss: Tensor
    inconsistency: Tensor | None


class Rule:
    """Base of all rules, itself plain backpropagation (SGD, AdamW, ... by the optimizer that steps).

    Args:
        model: its trainable parameters get the gradients.
        criterion: maps logits (B, C) and labels (B,) to the mean loss.
        m: sub-batch size of m-sharpness (App. E.1): each has a perturbation of its own and their gradients are
            averaged by size; None = the whole batch.
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
        self.model, self.criterion, self.m = model, criterion, m
        self.parameters = Parameters(model)
        self.generator = generator or torch.Generator().manual_seed(0)

    def backward(self, x: Tensor, y: Tensor) -> Step:
        """Add this rule's gradient on the batch x (B, ...), y (B,) to every ``p.grad``, as backward() does."""
        if self.m is None or self.m >= len(y):
            return self._backward(x, y, 1.0)
        steps = [
            (len(part_y), self._backward(part_x, part_y, len(part_y) / len(y)))
            for part_x, part_y in zip(x.split(self.m), y.split(self.m), strict=True)
        ]

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

    def _backward(self, x: Tensor, y: Tensor, weight: float) -> Step:
        logits = logits_of(self.model(x))
        loss = self.criterion(logits, y)
        (weight * loss).backward()
        return Step(logits.detach(), loss.detach(), None)

    def _accumulate(self, gradients: Sequence[Tensor | None], weight: float) -> None:
        for p, g in zip(self.parameters.named.values(), gradients, strict=True):
            if g is None:
                continue
            if p.grad is None:
                p.grad = g * weight
            else:
                p.grad.add_(g, alpha=weight)

    def _accumulate_at(self, x: Tensor, y: Tensor, offset: Tensor, weight: float) -> None:
        """Add ∇L(θ + offset), the offset held constant."""
        loss = self.criterion(self.parameters.logits(x, self.parameters.moved(offset)), y)
        self._accumulate(torch.autograd.grad(loss, self._leaves, allow_unused=True), weight)

    @property
    def _leaves(self) -> list[nn.Parameter]:
        return list(self.parameters.named.values())


class SAM(Rule):
    """∇L(θ + e), e = ρ ∇L/‖∇L‖ (Foret et al. 2021)."""

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

    def _backward(self, x: Tensor, y: Tensor, weight: float) -> Step:
        logits = logits_of(self.model(x))
        loss = self.criterion(logits, y)
        gradient = self.parameters.join(torch.autograd.grad(loss, self._leaves, allow_unused=True))
        self._accumulate_at(x, y, self._perturbation(gradient), weight)
        return Step(logits.detach(), loss.detach(), None)

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


class _Draws:
    """The global generators as they stood, so that a perturbed pass drops the units that the clean one dropped.

    Without it a network with dropout would have KL > 0 at δ = 0.
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

    def _ascend(self, x: Tensor, clean: Tensor, draws: _Draws) -> Tensor:
        def gradient(offset: Tensor) -> Tensor:
            with draws.again():
                return kl_gradient(self.parameters, x, clean, offset)[1] / len(x)

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

    def _backward(self, x: Tensor, y: Tensor, weight: float) -> Step:
        draws = _Draws(x.device)
        logits = logits_of(self.model(x))
        loss = self.criterion(logits, y)
        offset = self._ascend(x, logits.detach(), draws)
        with draws.again():
            moved = self.parameters.logits(x, self.parameters.moved(offset))
        divergence = kl_divergence(logits if self.kl_grad == "both" else logits.detach(), moved).mean()
        gradients = torch.autograd.grad(loss + self.beta * divergence, self._leaves, allow_unused=True)
        self._accumulate(gradients, weight)
        return Step(logits.detach(), loss.detach(), divergence.detach())


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

    def _backward(self, x: Tensor, y: Tensor, weight: float) -> Step:
        draws = _Draws(x.device)
        with torch.set_grad_enabled(self.sign == "loss"):
            logits = logits_of(self.model(x))
            loss = self.criterion(logits, y)
        offset = self._ascend(x, logits.detach(), draws)
        if self.sign == "random":
            coin = torch.randint(0, 2, (), generator=self.generator)
            offset = offset * (2 * int(coin) - 1)
        elif self.sign == "loss":
            gradient = self.parameters.join(torch.autograd.grad(loss, self._leaves, allow_unused=True))
            offset = torch.where(gradient @ offset < 0, -offset, offset)
        with draws.again():
            self._accumulate_at(x, y, offset, weight)
        return Step(logits.detach(), loss.detach(), None)


def _radius(rho: float) -> float:
    if not rho >= 0:
        raise UsageError(f"rho must be ≥ 0, not {rho}")
    return rho


METHODS: dict[str, type[Rule]] = {"sgd": Rule, "sam": SAM, "asam": ASAM, "iam-d": IAMD, "iam-s": IAMS}
