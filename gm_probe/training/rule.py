"""Training methods as gradient rules: each fills ``p.grad``, and any torch optimizer steps.

::

    rule = IAMD(model, rho=0.1, beta=1.0)          # once
    optimizer.zero_grad()
    rule.backward(x, y)                            # instead of loss.backward()
    optimizer.step()

Perturbed passes run on moved copies of the parameters and on copied buffers. Only the clean pass changes the model's
own BatchNorm statistics.

Float16: under autocast call ``rule.backward(x, y, scaler=scaler)``, then ``scaler.unscale_``, ``step`` and ``update``
as usual. The scaler sees the final gradient only. The inner gradients are scaled by the same factor, which changes no
perturbation. Where one overflows, so does the gradient at that perturbation, and the scaler skips the step.

An objective other than supervised learning takes the criterion's place; training.objectives.supervised says what x and
y then are.

Several processes (``torch.distributed``): each passes its part of the batch, and each gets the gradient of the whole
batch. The perturbation is also the whole batch's, from a gradient summed over the processes, so a run does not depend
on their number. The rule does all the communication; a DistributedDataParallel wrapper is looked through, and its hooks
never fire. ``generator`` must have the same seed in every process.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import zip_longest
from typing import Any, TypedDict

import torch
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.nn import functional

from gm_probe.checks import instance, optional, real, whole
from gm_probe.curvature.custom_functions import leaves_of, require_moved_alone, require_repeatable
from gm_probe.data.fields import Inputs, arguments, as_inputs
from gm_probe.errors import DeviceError, UsageError, first_line, on_two_devices
from gm_probe.inconsistency.kl import kl_divergence
from gm_probe.models.contrastive import Contrastive
from gm_probe.models.door import Outputs, unwrapped
from gm_probe.models.parameters import Parameters, dense, differentiable_recurrence
from gm_probe.models.recomputation import non_reentrant
from gm_probe.runtime.processes import count, sum_over_processes
from gm_probe.runtime.randomness import Draws
from gm_probe.training.objectives.supervised import Criterion, Objective
from gm_probe.training.sub_batches import SubBatches, as_targets, value_of

Gradients = Sequence[Tensor | None]
"""One per trainable parameter, in order, then one per further leaf; None = the loss does not depend on it."""


@dataclass(frozen=True, slots=True)
class Step:
    """The results of one ``backward`` on this process's examples, without perturbation.

    Attributes:
        logits: (B, ...) the outputs that the criterion takes.
        loss: the criterion's loss (0-dim).
        inconsistency: the mean KL divergence (0-dim) of the rule's β·KL term; None for a rule without it.
    """

    logits: Tensor
    loss: Tensor
    inconsistency: Tensor | None


class RuleOptions(TypedDict, total=False):
    """The options of every rule; see ``Rule``."""

    m: int | None
    every: int
    tail: float
    total_steps: int | None
    generator: torch.Generator | None
    outputs: Outputs | None


class Rule:
    """The base of all rules, which is itself plain backpropagation (SGD, AdamW, ..., depending on the optimizer).

    Args:
        model: its trainable parameters get the gradients. Wrappers around it are looked through (models.door).
        criterion: maps the model's outputs (B, ...) and the targets to a loss; or an objective. Its own trainable
            parameters, and every other leaf that ``loss.backward()`` would reach, also get their gradients.
        m: process the batch in sub-batches of this size. This is gradient accumulation and, since each has its own
            perturbation, m-sharpness (App. E.1). Their gradients are weighted as the criterion weights them, and add up
            to the whole batch's. None = all at once. A last sub-batch of one example joins the one before it.
        every: only each ``every``-th step perturbs; the others are plain backpropagation. A step is a ``backward``.
        tail: only this last share of all ``total_steps`` perturbs, beginning with its first step.
        total_steps: number of steps of the whole training; ``tail`` needs it.
        generator: draws the noise starts; None = a generator on the CPU with seed 0.
        outputs: how the model's outputs are read; see models.door. The criterion gets the chosen output as it is.

    ``passes`` is the cost of a perturbed step in forward passes (a backward counts 2).

    Raises:
        UsageError: options make no sense, or the model has no parameters or does not accept moved ones.
    """

    passes = 3.0
    perturbs = False
    """Whether the rule also runs the model at moved parameters."""
    compares = False
    """Whether the rule has a KL divergence between outputs, so that it must know their kind."""

    def __init__(
        self,
        model: nn.Module,
        criterion: Criterion = functional.cross_entropy,
        *,
        m: int | None = None,
        every: int = 1,
        tail: float = 1.0,
        total_steps: int | None = None,
        generator: torch.Generator | None = None,
        outputs: Outputs | None = None,
    ) -> None:
        optional(whole, "m", m)
        optional(whole, "total_steps", total_steps)
        optional(instance, "outputs", outputs, Outputs)
        self.every, self.tail = whole("every", every), real("tail", tail, above=0, most=1)
        if tail < 1 and total_steps is None:
            raise UsageError(f"tail = {tail} is a share of all steps. Give total_steps too")
        self._first = 0 if tail == 1 else total_steps - max(1, round(tail * total_steps))  # type: ignore[operator]
        self.steps = 0
        if not callable(criterion) or isinstance(criterion, type):
            raise UsageError(f"criterion = {criterion!r} must be a function of the outputs and the targets")
        self.model = unwrapped(model)
        self.objective = criterion if isinstance(criterion, Objective) else Objective(criterion)
        self.m = m
        self.outputs = outputs or Outputs()
        self.parameters = Parameters(self.model, outputs=self.outputs)
        if self.perturbs and self.parameters.dtype in (torch.bfloat16, torch.float16):
            raise UsageError(
                f"the weights are {self.parameters.dtype}, which rounds much of a perturbation away. Keep them in "
                "float32 (model.float()), and use torch.autocast for speed"
            )
        self.generator = generator or torch.Generator().manual_seed(0)
        self._scaler: GradScaler | None = None
        self._weight = 1.0
        self._examined = False
        self._moved_once = False

    def backward(self, x: Any, y: Any, *, weight: float = 1.0, scaler: GradScaler | None = None) -> Step:
        """Add this rule's gradient on the batch x (B, ...), y (B,) to every ``p.grad``, as backward() does.

        Under an objective with unlabeled inputs, these are rows of x after the labeled ones.

        Args:
            x: a tensor, or a dict or tuple of tensors with B rows, which the model takes by name or in order.
            y: a tensor, or a dict or tuple that the criterion takes; its tensors with B rows are cut as x is.
            weight: multiplies the gradient, such as 1/4 where the gradients of four batches are added.
            scaler: multiplies the gradient by its factor.

        Raises:
            UsageError: the rule cannot work with the inputs, outputs or criterion, or gradients are disabled.
        """
        if torch.is_inference_mode_enabled() or not torch.is_grad_enabled():
            raise UsageError(
                "rule.backward needs gradients. Call it outside torch.no_grad() and inference_mode()"
            )
        self._scaler, self._weight = scaler, weight
        # layers may have been frozen or unfrozen since the last step
        self.parameters = Parameters(self.model, outputs=self.outputs)
        x, y = as_inputs(x), as_targets(y)
        self._batch = SubBatches(x, y, self.m, equal=isinstance(self.model, Contrastive))
        self._leaves: list[Tensor] = list(self.parameters.named.values())
        due = self._perturbed(self.steps + 1) > self._perturbed(self.steps)
        gradients_of = self._gradients if due else partial(Rule._gradients, self)
        steps: list[Step] = []
        sums: Gradients = []
        for index, part in enumerate(self._batch.parts):
            self._index = index
            with differentiable_recurrence(self.model), self._told_of_devices(x, y):
                step, gradients = gradients_of(part.x, value_of(part.y))
            sums = self._sum(sums, gradients)
            steps.append(step)
        self._accumulate(self._over_processes(sums))
        self.steps += 1
        divergences = [step.inconsistency for step in steps if step.inconsistency is not None]
        return Step(
            torch.cat([step.logits for step in steps]),
            self._batch.mean_loss([step.loss for step in steps]),
            self._batch.mean(divergences) if divergences else None,
        )

    def state_dict(self) -> dict[str, Any]:
        """Return what the next step depends on, apart from model and optimizer."""
        return {"generator": self.generator.get_state(), "steps": self.steps}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from what ``state_dict`` returned."""
        self.generator.set_state(state["generator"].cpu())
        self.steps = state["steps"]

    def cost(self, steps: int) -> float:
        """Return the cost of the first ``steps`` steps in forward passes (a backward counts 2)."""
        perturbed = self._perturbed(steps)
        return perturbed * self.passes + (steps - perturbed) * Rule.passes

    def _perturbed(self, steps: int) -> int:
        """Return how many of the first ``steps`` steps perturb, by ``every`` and ``tail``."""
        return max(0, -(-(steps - self._first) // self.every))

    def _gradients(self, x: Inputs, y: Any) -> tuple[Step, Gradients]:
        """Compute the rule's scaled gradient of a sub-batch's share of the whole batch's objective.

        The loss of the returned step is also that share.
        """
        outputs = self._clean(x, y)
        loss = self._loss(outputs, y)
        return Step(outputs.detach(), loss.detach(), None), self._differentiate(loss)

    def _clean(self, x: Inputs, y: Any) -> Tensor:
        """Return the model's outputs for x, as the criterion takes them; the first step examines them."""
        args, kwargs = arguments(self.model, x)
        remedy = "pass the tensor itself, or name the entries like forward's arguments"
        with non_reentrant(), _told_of_several("the model", x, remedy):
            if self.perturbs and not self._examined:
                require_repeatable(self.parameters, x, Draws(x.device, self.model))
            outputs = self.outputs.taken(self.model(*args, **kwargs), len(x))
        if not self._examined:
            ours = self.objective.is_mean or self.objective.criterion is functional.cross_entropy
            if self.compares or ours:
                self.outputs = self.parameters.outputs = self.outputs.checked(outputs)
            if self.compares:
                require_head(self.outputs, self.objective.criterion, y)
            self._examined = True
        return outputs

    def _loss(self, outputs: Tensor, y: Any) -> Tensor:
        """Return the current sub-batch's share of the whole batch's loss."""
        rest = self._rest(outputs, y)
        loss = self._labeled(outputs, y)
        return loss if rest is None else loss + rest

    def _labeled(self, outputs: Tensor, y: Any) -> Tensor:
        with _told_of_several(
            "the criterion", y, "give Rule a criterion that takes the outputs and all targets"
        ):
            loss = self.objective.loss(outputs, y)
        if not isinstance(loss, Tensor) or loss.dim():
            shape = tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
            raise UsageError(f"the criterion returned {shape}, not one number. Reduce it to a mean or a sum")
        if self.objective.is_mean:
            return loss * self._share
        share = self._batch.share_of_loss(self._index, self.objective.loss, outputs, self.outputs)
        return (
            loss * share if share else 0 * outputs.sum()
        )  # a part in which no example counts has the loss 0/0

    def _rest(self, outputs: Tensor, y: Any) -> Tensor | None:
        """Return its share of the unlabeled loss, a mean over examples; None where the objective has none."""
        rest = self.objective.unlabeled_loss(outputs, y)
        return None if rest is None else rest * self._share

    @property
    def _share(self) -> float:
        """The current sub-batch's share of the examples of all processes."""
        return self._batch.parts[self._index].share

    @contextmanager
    def _told_of_devices(self, x: Inputs, y: Inputs) -> Iterator[None]:
        """Raise a DeviceError with the devices of x, y and the model, where torch complains about two devices."""
        try:
            yield
        except RuntimeError as error:
            if not on_two_devices(error):
                raise
            places = {"x": x.device, "y": y.device, "the model": self.parameters.device}
            told = ", ".join(f"{name} is on {place}" for name, place in places.items())
            raise DeviceError(
                f"{told}. Move all of them, and the criterion's tensors, to one device ({first_line(error)})"
            ) from error

    def _differentiate(
        self, loss: Tensor, inputs: Sequence[Tensor] | None = None, *, again: bool = False
    ) -> Gradients:
        """Return the gradients by the parameters, by every other leaf that the loss depends on, and by ``inputs``.

        Args:
            inputs: further tensors, whose gradients come last.
            again: the same forward pass will be differentiated once more.
        """
        known = {id(leaf) for leaf in (*self._leaves, *(inputs or ()))}
        self._leaves += [leaf for leaf in leaves_of(loss) if id(leaf) not in known]
        if not loss.requires_grad:
            raise UsageError(
                "autograd sees no parameter that the loss depends on: forward or the criterion runs under "
                "torch.no_grad or inference_mode, or detaches the outputs"
            )
        weighted = loss if self._weight == 1 else loss * self._weight
        scaled = weighted if self._scaler is None else self._scaler.scale(weighted)
        return torch.autograd.grad(
            scaled, [*self._leaves, *(inputs or ())], allow_unused=True, retain_graph=again
        )

    def _hooked(self, gradient: Tensor) -> Tensor:
        """Apply the parameters' own hooks (masks, say) to a gradient (P,) by moved parameters."""
        parts = self.parameters.split(gradient)
        hooks = [
            (n, hook) for n, p in self.parameters.named.items() for hook in (p._backward_hooks or {}).values()
        ]
        for name, hook in hooks:
            changed = hook(parts[name])
            parts[name] = parts[name] if changed is None else changed
        return self.parameters.join(parts.values()) if hooks else gradient

    def _joined(self, gradients: Gradients) -> Tensor:
        """Return the parameters' gradient (P,), without other leaves'."""
        return self.parameters.join(gradients[: len(self.parameters.named)])

    def _at(self, x: Inputs, y: Any, offset: Tensor, loss: Criterion) -> Gradients:
        """Return ∇ ``loss`` at θ + offset, with a constant offset.

        The loss is taken while the model has these weights, because a penalty in it may read them.
        """
        moved = self.parameters.moved(offset)
        found = self.parameters.in_force(x, moved, lambda outputs: loss(outputs, y))
        if not self._moved_once:
            require_moved_alone(found, moved, self.parameters.named)
            self._moved_once = True
        return self._differentiate(found)

    def _compared(self, outputs: Tensor, y: Any) -> Tensor:
        """Return the logits (n, ...) whose KL divergence counts."""
        return self.outputs.logits(self.objective.compared(outputs, y))

    def _divergence(self, clean: Tensor, moved: Tensor, y: Any, kl_grad: str) -> Tensor:
        """Return the mean KL from clean to ``moved`` outputs, over those that the objective compares."""
        clean = clean if kl_grad == "both" else clean.detach()
        return kl_divergence(self._compared(clean, y), self._compared(moved, y)).mean()

    @staticmethod
    def _sum(one: Gradients, other: Gradients) -> Gradients:
        # never in place, because autograd may return one tensor as the gradient of two parameters
        return [b if a is None else a if b is None else a + b for a, b in zip_longest(one, other)]

    def _over_processes(self, gradients: Gradients) -> Gradients:
        used = [g for g in gradients if g is not None]
        if count() == 1 or not used:
            return gradients
        joined = sum_over_processes(torch.cat([dense(g).reshape(-1) for g in used]))
        pieces = iter(joined.split([g.numel() for g in used]))
        return [None if g is None else next(pieces).view(g.shape) for g in gradients]

    def _accumulate(self, gradients: Gradients) -> None:
        for leaf, g in zip(self._leaves, gradients, strict=True):
            if g is None:
                continue
            # a copy, because it will be clipped and unscaled in place
            leaf.grad = dense(g).clone() if leaf.grad is None else dense(leaf.grad).add_(dense(g))
            for hook in (getattr(leaf, "_post_accumulate_grad_hooks", None) or {}).values():
                hook(leaf)


@contextmanager
def _told_of_several(whose: str, given: Any, remedy: str) -> Iterator[None]:
    """Raise UsageError where ``whose`` code got a dict or tuple of tensors that it does not accept."""
    try:
        yield
    except (TypeError, AttributeError, LookupError) as error:
        if isinstance(given, Tensor):
            raise
        value = value_of(given)
        what = f"a tuple of {len(value)}"
        if isinstance(value, dict):
            what = f"a dict of {', '.join(map(repr, value))}"
        raise UsageError(f"{whose} does not accept {what} ({first_line(error)}); {remedy}") from error


def require_head(outputs: Outputs, criterion: object, y: Any) -> None:
    """Raise UsageError for a loss of independent labels under a head of exclusive classes."""
    if outputs.head != "classifier":
        return
    independent = (nn.BCEWithLogitsLoss, nn.BCELoss, nn.MultiLabelSoftMarginLoss)
    functions = (
        functional.binary_cross_entropy_with_logits,
        functional.binary_cross_entropy,
        functional.multilabel_soft_margin_loss,
    )
    if isinstance(criterion, independent) or criterion in functions or _multi_hot(y):
        raise UsageError(
            "the loss is for independent labels, but the KL divergence would be for exclusive classes. "
            "Pass outputs=Outputs(head='multilabel'), or 'binary' for one logit"
        )


def _multi_hot(y: Any) -> bool:
    """Return whether targets (B, L) are zeros and ones, and some row does not have exactly one 1."""
    if not isinstance(y, Tensor) or y.dim() != 2 or y.shape[1] < 2:
        return False
    return bool(((y == 0) | (y == 1)).all()) and bool((y.sum(1) != 1).any())
