"""IAM-D, IAM-S and one-pass IAM-D: gradient rules that use the inconsistency of the batch's outputs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, Unpack, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional

from gm_probe.checks import one_of, real, whole
from gm_probe.data.fields import Inputs
from gm_probe.inconsistency.ascent import ascend, kl_gradient, to_sphere
from gm_probe.runtime.processes import sum_over_processes
from gm_probe.runtime.randomness import Draws
from gm_probe.training.objectives.supervised import Criterion
from gm_probe.training.rule import Gradients, Rule, RuleOptions, Step

KlGrad = Literal["both", "perturbed"]
Sign = Literal["random", "none", "loss"]
KL_GRADS: tuple[KlGrad, ...] = get_args(KlGrad)
SIGNS: tuple[Sign, ...] = get_args(Sign)


class _Inconsistency(Rule):
    """The common part of IAM-D and IAM-S: Algorithm 1 on the current mini-batch, from fresh noise."""

    perturbs = compares = True

    def __init__(
        self,
        model: nn.Module,
        criterion: Criterion = functional.cross_entropy,
        *,
        rho: float = 0.1,
        k_steps: int = 1,
        noise_scale: float = 0.1,
        **common: Unpack[RuleOptions],
    ) -> None:
        super().__init__(model, criterion, **common)
        self.rho: float | Tensor = real("rho", rho, least=0)
        self.k_steps = whole("k_steps", k_steps)
        self.noise_scale = real("noise_scale", noise_scale, least=0)

    def _ascend(self, x: Inputs, y: Any, outputs: Tensor, draws: Draws) -> Tensor:
        logits = self._compared(outputs.detach(), y)
        factor: Tensor | float = self._share / len(logits)
        if self._scaler is not None:
            factor = self._scaler.scale(torch.tensor(factor, device=x.device))

        def compared(moved: Tensor) -> Tensor:
            return self.objective.compared(moved, y)

        def gradient(offset: Tensor) -> Tensor:
            with draws.again():
                _, share = kl_gradient(self.parameters, x, logits, offset, factor, compared)
            return sum_over_processes(self._hooked(share))

        start = self.parameters.random(self.noise_scale, self.generator)
        return ascend(gradient, start, self.rho, self.k_steps)


class IAMD(_Inconsistency):
    """∇_θ [L(θ) + β KL(f_θ ‖ f_{θ+sg(δ)})] (paper Eq. 6, 23); one clean pass serves L, the ascent and the KL.

    Args:
        beta: weight β.
        kl_grad: 'both' differentiates both sides of the KL (App. D, Eq. 23); 'perturbed' keeps f_θ constant, like the
            authors' supervised loop.
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
        kl_grad: KlGrad = "both",
        **common: Unpack[RuleOptions],
    ) -> None:
        super().__init__(model, criterion, rho=rho, k_steps=k_steps, noise_scale=noise_scale, **common)
        self.beta, self.kl_grad = real("beta", beta, least=0), one_of("kl_grad", kl_grad, KL_GRADS)
        self.passes = 6.0 + 3.0 * k_steps

    def _gradients(self, x: Inputs, y: Any) -> tuple[Step, Gradients]:
        draws = Draws(x.device, self.model)
        outputs = self._clean(x, y)
        loss = self._loss(outputs, y)
        offset = self._ascend(x, y, outputs, draws)
        with draws.again():
            moved = self.parameters.taken(x, self.parameters.moved(offset))
        divergence = self._divergence(outputs, moved, y, self.kl_grad)
        step = Step(outputs.detach(), loss.detach(), divergence.detach())
        return step, self._differentiate(loss + self.beta * self._share * divergence)


class OnePassIAMD(Rule):
    """IAM-D whose δ is carried over from the last step, with a random sign (from the authors' code).

    One backward pass gives the parameters' gradient and the KL's gradient by the moved parameters, which is δ's next
    direction. So δ follows the ascent across mini-batches, at SAM's cost. The first δ is noise of length ρ. Where the
    KL has no finite gradient, δ stays as it was. With ``m`` it is carried from sub-batch to sub-batch. After layers are
    frozen or unfrozen, it starts from noise again.
    """

    passes = 6.0
    perturbs = compares = True

    def __init__(
        self,
        model: nn.Module,
        criterion: Criterion = functional.cross_entropy,
        *,
        rho: float = 0.1,
        beta: float = 1.0,
        kl_grad: KlGrad = "both",
        **common: Unpack[RuleOptions],
    ) -> None:
        super().__init__(model, criterion, **common)
        self.rho: float | Tensor = real("rho", rho, least=0)
        self.kl_grad = one_of("kl_grad", kl_grad, KL_GRADS)
        self.beta = real("beta", beta, above=0)  # δ follows the term's gradient
        self.delta: Tensor | None = None  # (P,)

    def _gradients(self, x: Inputs, y: Any) -> tuple[Step, Gradients]:
        if self.delta is None or len(self.delta) != self.parameters.size:
            self.delta = to_sphere(self.parameters.random(1.0, self.generator), self.rho)
        sign = _random_sign(self.generator)
        draws = Draws(x.device, self.model)
        outputs = self._clean(x, y)
        loss = self._loss(outputs, y)
        moved = self.parameters.moved(sign * self.delta)
        with draws.again():
            perturbed = self.parameters.taken(x, moved)
        divergence = self._divergence(outputs, perturbed, y, self.kl_grad)
        whole = loss + self.beta * self._share * divergence
        gradients = self._differentiate(whole, list(moved.values()))
        direction = self._hooked(self.parameters.join(gradients[-len(moved) :]))
        self._follow(sum_over_processes(direction))
        return Step(outputs.detach(), loss.detach(), divergence.detach()), gradients[: -len(moved)]

    def _follow(self, direction: Tensor) -> None:
        assert self.delta is not None
        ahead = to_sphere(direction, self.rho)
        usable = torch.isfinite(ahead).all() & direction.any()
        self.delta = torch.where(usable, ahead, self.delta)

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "delta": self.delta}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from what ``state_dict`` returned."""
        super().load_state_dict(state)
        delta = state["delta"]
        self.delta = None if delta is None else delta.to(self.parameters.device)


class IAMS(_Inconsistency):
    """∇L(θ + δ), second-order terms dropped (paper Eq. 7).

    Args:
        sign: 'random' takes δ and −δ equally often (paper §5), 'none' takes δ as it is (authors' code), and 'loss'
            takes the sign that raises the loss to first order, at the cost of one more gradient.
    """

    def __init__(
        self,
        model: nn.Module,
        criterion: Criterion = functional.cross_entropy,
        *,
        rho: float = 0.1,
        k_steps: int = 1,
        noise_scale: float = 0.1,
        sign: Sign = "random",
        **common: Unpack[RuleOptions],
    ) -> None:
        super().__init__(model, criterion, rho=rho, k_steps=k_steps, noise_scale=noise_scale, **common)
        self.sign = one_of("sign", sign, SIGNS)
        self.passes = 4.0 + 3.0 * k_steps + (2.0 if sign == "loss" else 0.0)

    def _gradients(self, x: Inputs, y: Any) -> tuple[Step, Gradients]:
        draws = Draws(x.device, self.model)
        with torch.set_grad_enabled(self.sign == "loss"):
            outputs = self._clean(x, y)
            loss = self._loss(outputs, y)
        offset = self._ascend(x, y, outputs, draws)
        if self.sign == "random":
            offset = offset * _random_sign(self.generator)
        elif self.sign == "loss":
            gradient = sum_over_processes(self._joined(self._differentiate(loss)))
            offset = torch.where(gradient @ offset < 0, -offset, offset)
        with draws.again():
            return Step(outputs.detach(), loss.detach(), None), self._at(x, y, offset, self._loss)


def _random_sign(generator: torch.Generator) -> Tensor:
    """Return a 0-dim 1 or -1 on the generator's device; the host never needs its value."""
    return 2 * torch.randint(0, 2, (), generator=generator, device=generator.device) - 1
