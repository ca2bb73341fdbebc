"""SAM (Foret et al. 2021) and ASAM (Kwon et al. 2021)."""

from __future__ import annotations

from typing import Any, Unpack

import torch
from torch import Tensor, nn
from torch.nn import functional

from gm_probe.checks import real
from gm_probe.data.fields import Inputs
from gm_probe.inconsistency.ascent import to_sphere
from gm_probe.runtime.processes import sum_over_processes
from gm_probe.runtime.randomness import Draws
from gm_probe.training.objectives.supervised import Criterion
from gm_probe.training.rule import Gradients, Rule, RuleOptions, Step


class SAM(Rule):
    """∇L(θ + e), e = ρ ∇L/‖∇L‖ (Foret et al. 2021).

    If an objective has unlabeled inputs, L is the labeled loss alone (paper §5.3, App. E.4), and the gradient of the
    unlabeled loss at θ is added.
    """

    passes = 6.0
    perturbs = True

    def __init__(
        self,
        model: nn.Module,
        criterion: Criterion = functional.cross_entropy,
        *,
        rho: float = 0.05,
        **common: Unpack[RuleOptions],
    ) -> None:
        super().__init__(model, criterion, **common)
        self.rho: float | Tensor = real("rho", rho, least=0)
        self.passes = 8.0 if self.objective.two_losses else 6.0

    def _gradients(self, x: Inputs, y: Any) -> tuple[Step, Gradients]:
        draws = Draws(x.device, self.model)
        outputs = self._clean(x, y)
        loss, rest = self._labeled(outputs, y), self._rest(outputs, y)
        gradients = self._differentiate(loss, again=rest is not None)
        gradient = sum_over_processes(self._joined(gradients))
        calm = [] if rest is None else self._differentiate(rest)
        with draws.again():
            moved = self._at(x, y, self._perturbation(gradient), self._labeled)
        whole = loss.detach() if rest is None else (loss + rest).detach()
        return Step(outputs.detach(), whole, None), self._sum(calm, moved)

    def _perturbation(self, gradient: Tensor) -> Tensor:
        return to_sphere(gradient, self.rho)


class ASAM(SAM):
    """SAM with e = ρ T²∇L/‖T∇L‖ (Kwon et al. 2021).

    T is |θ| + η on parameters named 'weight' (also BatchNorm's), and 1 elsewhere, as in the method's published code.
    """

    def __init__(
        self,
        model: nn.Module,
        criterion: Criterion = functional.cross_entropy,
        *,
        rho: float = 0.5,
        eta: float = 0.01,
        **common: Unpack[RuleOptions],
    ) -> None:
        super().__init__(model, criterion, rho=rho, **common)
        self.eta = real("eta", eta, least=0)

    def _perturbation(self, gradient: Tensor) -> Tensor:
        named = self.parameters.named.items()
        scale = self.parameters.join(
            p.detach().abs() + self.eta if "weight" in name else torch.ones_like(p) for name, p in named
        )
        return scale * to_sphere(scale * gradient, self.rho)
