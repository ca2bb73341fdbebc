"""The gradient rules as torch optimizers, for code that asks for one.

::

    optimizer = gm_probe.optim.IAMD(model, torch.optim.AdamW, lr=1e-3, rho=0.1)

    def closure():                       # calls no backward; runs at moved weights, too
        logits = model(x)
        return loss_function(logits, y), logits

    optimizer.zero_grad()
    loss = optimizer.step(closure)

Each is a thin adapter: the rule of the same name (``training.methods``) fills ``p.grad``, and a base optimizer of torch
steps. What comes between the two, such as a GradScaler, clipping or the gradients of several batches, takes two calls::

    optimizer.backward(closure, scaler=scaler)
    scaler.step(optimizer)               # or: optimizer.step()
"""

import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.optim import Optimizer

from gm_probe.checks import real
from gm_probe.errors import UsageError
from gm_probe.models.door import Outputs, unwrapped
from gm_probe.training.methods import iam, sam
from gm_probe.training.objectives.supervised import Objective
from gm_probe.training.rule import Rule, Step

_OPTION = inspect.Parameter.KEYWORD_ONLY

Closure = Callable[[], tuple[Tensor, Tensor]]
"""Runs the model on a batch and returns the loss (0-dim) and the logits (B, C)."""


class RuleOptimizer(Optimizer):
    """Base of the adapters; use a subclass.

    Args:
        model: the network that the closure runs. Outputs are needed at moved weights, so its parameters are not enough.
        base: class of the optimizer that steps.
        params: parameter groups, as any optimizer takes them; they must hold all trainable parameters of ``model``.
            None = all in one group. A group may have a ``rho`` of its own: its part of the perturbation then has the
            length that it would have if all groups had this ρ. ``rho`` = 0 leaves a group where it is. ``beta`` weighs
            one term of one loss, and must be the same in all groups.
        options: those of the rule (``rho``, ``every``, ``generator``, ...), except ``m``; all others go to ``base``.

    Attributes:
        seen: what the last ``backward`` saw; see ``Step``.

    Raises:
        UsageError: options or groups that make no sense.
    """

    rule_type: type[Rule]

    def __init__(
        self,
        model: nn.Module,
        base: Callable[..., Optimizer] = torch.optim.SGD,
        *,
        params: Iterable[Any] | None = None,
        **options: Any,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise UsageError(
                f"{type(self).__name__} takes the model, not a {type(model).__name__}, because outputs are computed at "
                "moved weights. Pass groups of parameters by params=[...]"
            )
        if "m" in options:
            raise UsageError("m splits a batch, which only the closure knows. Call backward once a part")
        named = {**inspect.signature(self.rule_type).parameters, **inspect.signature(Rule).parameters}
        own = {name: options.pop(name) for name in named.keys() & options if named[name].kind is _OPTION}
        own["outputs"] = _Outputs(**asdict(own.get("outputs") or Outputs()))
        self._pass = _Pass(model)
        objective = Objective(self._pass.loss_of)
        objective.is_mean = True
        self.rule = self.rule_type(self._pass, objective, **own)
        self.seen: Step | None = None
        self._ready = False
        self.base = base(self._trainable() if params is None else params, **options)
        closure = inspect.signature(self.base.step).parameters.get("closure")
        if closure is not None and closure.default is inspect.Parameter.empty:
            raise UsageError(
                f"{type(self.base).__name__} evaluates the loss several times per step, at points where the rule has "
                "no gradient. Choose a base optimizer whose step takes no closure, such as SGD or AdamW"
            )
        rule = vars(self.rule)
        settings: dict[str, Any] = {name: rule[name] for name in ("rho", "beta") if name in rule}
        super().__init__(self.base.param_groups, {**self.base.defaults, **settings})
        self._share()
        self._set_rule()

    def _trainable(self) -> list[nn.Parameter]:
        return [p for p in self._pass.parameters() if p.requires_grad]

    def _share(self) -> None:
        """Let schedulers and scalers, which write to this optimizer, reach the base optimizer."""
        self.param_groups, self.state = self.base.param_groups, self.base.state

    def backward(self, closure: Closure, *, weight: float = 1.0, scaler: GradScaler | None = None) -> Tensor:
        """Add the rule's gradient to every ``p.grad`` and return the loss at the present weights.

        Args:
            closure: see ``Closure``. It is called several times with the same random draws, so what it counts or logs
                belongs elsewhere.
            weight: multiplies the gradient, such as 1/4 where those of four batches add up.
            scaler: multiplies it by its factor.
        """
        self._set_rule()
        self._pass.closure = closure
        try:
            one = torch.zeros(1, device=self.rule.parameters.device)
            self.seen = self.rule.backward(one, one, weight=weight, scaler=scaler)
        finally:
            self._pass.closure = None
        self._ready = True
        return self.seen.loss

    def step(self, closure: Closure | None = None) -> Any:  # type: ignore[override]
        """Update the weights; with a closure ``backward`` comes first, and its loss is returned.

        Raises:
            UsageError: neither a closure nor a ``backward`` since the last step: the gradients are not the rule's.
        """
        loss = None if closure is None else self.backward(closure)
        if not self._ready:
            raise UsageError(
                f"{type(self).__name__}.step needs step(closure), or optimizer.backward(closure) before it: "
                "loss.backward() gives the gradient of SGD"
            )
        self.base.step()
        self._ready = False
        return loss

    def _set_rule(self) -> None:
        """Give the rule what the groups say now."""
        rule: Any = self.rule
        of = {id(p): group for group in self.param_groups for p in group["params"]}
        if any(id(p) not in of for p in self._trainable()):
            raise UsageError(
                "some trainable parameters of the model are in no group. Add them, or freeze them by "
                "requires_grad_(False)"
            )
        radii = [real("rho", group["rho"], least=0) for group in self.param_groups]
        rule.rho = radii[0]
        if len(set(radii)) > 1:
            parts = [torch.full_like(p, of[id(p)]["rho"]).reshape(-1) for p in self._trainable()]
            rule.rho = torch.cat(parts).detach()
        if "beta" in self.defaults:
            weights = {real("beta", group["beta"], least=0) for group in self.param_groups}
            if len(weights) > 1:
                raise UsageError("beta weighs one term of one loss, so all groups must have the same")
            rule.beta = weights.pop()

    def state_dict(self) -> dict[str, Any]:
        """Return the base optimizer's state, and the rule's under ``rule``."""
        return {**self.base.state_dict(), "rule": self.rule.state_dict()}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on from what ``state_dict`` gave."""
        if "rule" not in state_dict:
            raise UsageError(f"the state is of a plain optimizer, not of {type(self).__name__}")
        self.base.load_state_dict({key: value for key, value in state_dict.items() if key != "rule"})
        self.rule.load_state_dict(state_dict["rule"])
        self._share()


class _Pass(nn.Module):
    """A closure as a model: its forward pass is one call, at the weights that the network has then."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = unwrapped(network)
        self.closure: Closure | None = None
        self.loss: Any = None

    def forward(self, _: Tensor) -> Any:
        assert self.closure is not None
        found = self.closure()
        if not isinstance(found, tuple | list) or len(found) != 2:
            raise UsageError(
                f"the closure returned a {type(found).__name__}, not (loss, logits). Let it call no backward"
            )
        self.loss, logits = found
        return logits

    def loss_of(self, logits: Tensor, y: Any) -> Tensor:
        """Return the loss of the last call, and let go of its graph."""
        loss: Tensor = self.loss
        self.loss = None
        return loss


class _Outputs(Outputs):
    """Outputs of as many examples as the closure takes."""

    def taken(self, returned: Any, rows: int) -> Tensor:
        several = isinstance(returned, Tensor) and returned.dim() > 0
        return super().taken(returned, len(returned) if several else rows)


class SAM(RuleOptimizer):
    """Sharpness-aware minimisation as an optimizer; options as in ``gm_probe.SAM``."""

    rule_type = sam.SAM


class ASAM(RuleOptimizer):
    """Adaptive SAM as an optimizer; options as in ``gm_probe.ASAM``."""

    rule_type = sam.ASAM


class IAMD(RuleOptimizer):
    """IAM-D as an optimizer; options as in ``gm_probe.IAMD``."""

    rule_type = iam.IAMD


class IAMS(RuleOptimizer):
    """IAM-S as an optimizer; options as in ``gm_probe.IAMS``."""

    rule_type = iam.IAMS


class OnePassIAMD(RuleOptimizer):
    """One-pass IAM-D as an optimizer; options as in ``gm_probe.OnePassIAMD``."""

    rule_type = iam.OnePassIAMD
