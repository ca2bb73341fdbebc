"""The parts in which one or several processes work through a batch, and how much each part counts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gm_probe.data.fields import Fields, Inputs, as_inputs
from gm_probe.errors import UsageError
from gm_probe.models.door import Outputs
from gm_probe.runtime.processes import count, from_all, rank, sum_over_processes
from gm_probe.runtime.randomness import generators_kept

Loss = Callable[[Tensor, Any], Tensor]
"""Maps a model's outputs and the targets to one number."""

_TOLERANCE = 1e-3
"""Relative tolerance; float32 gradients of a mean over 1,000 examples agree to 1e-5."""


@dataclass(frozen=True, slots=True)
class Part:
    """Inputs and targets of one sub-batch, and its share of the examples of all processes."""

    x: Inputs
    y: Inputs
    share: float


class SubBatches:
    """The parts of a batch x, y that this process works through one after another.

    Args:
        m: number of examples in a part, over all processes; None = the whole batch. A last part that would leave a
            process with one example joins the part before it, since BatchNorm has no statistics of a single example.
        equal: every process must hold the same number of examples.

    Raises:
        UsageError: the processes' parts do not correspond, or ``m`` is given for a batch with unlabeled inputs.
    """

    def __init__(self, x: Inputs, y: Inputs, m: int | None, *, equal: bool = False) -> None:
        if not len(y) and count() == 1:
            raise UsageError("the batch holds no example with a target")
        if m is not None and m % count():
            raise UsageError(f"m = {m} cannot be shared by {count()} processes. Choose a multiple")
        if m is not None and len(x) != len(y):
            raise UsageError("m splits only batches in which every example has a label. Leave it out")
        size = max(len(y), 1) if m is None else m // count()
        starts = list(range(0, len(y), size))
        single = size > 1 and len(starts) > 1 and len(y) - starts[-1] == 1
        total = len(y)
        if count() > 1:
            total, single = _agreed(len(y), len(starts), single, equal, x.device)
        if single and len(starts) > 1:
            del starts[-1]
        self.parts: list[Part] = []
        for start, end in zip(starts, [*starts[1:], None], strict=True):
            targets = y[start:end]
            self.parts.append(Part(x[start:end], targets, len(targets) / total))
        # the shares in the loss of every part of every process, in the order of ranks
        self._losses: list[float] | None = None

    @property
    def whole(self) -> bool:
        """True where one part is the whole batch."""
        return len(self.parts) == 1 and count() == 1

    def share_of_loss(self, index: int, loss: Loss, like: Tensor, outputs: Outputs) -> float:
        """Return the share of part ``index`` in the whole batch's loss; see ``loss_shares``.

        Args:
            like: outputs of the model, whose shape, dtype and device count.
            outputs: the kind of these outputs.
        """
        if self.whole:
            return 1.0
        if self._losses is None:
            # sent as CPU tensors, because a tensor pickled on a GPU would arrive on another process's GPU
            gathered = from_all([part.y.to("cpu") for part in self.parts])
            every = [target.to(like.device) for targets in gathered for target in targets]
            self._losses, again = (
                loss_shares(
                    loss,
                    [_made_up(len(y), like, outputs, scale, seed) for seed, y in enumerate(every)],
                    every,
                )
                for scale in (0.1, 0.25)  # small, because a hinge loss has a slope only within its margin
            )
            if any(abs(a - b) > _TOLERANCE * max(a, b) for a, b in zip(self._losses, again, strict=True)):
                raise _refusal()  # the shares depend on the outputs, as with a squared mean
        return self._losses[self._first + index]

    @property
    def _first(self) -> int:
        """The index of this process's first part among all parts."""
        return rank() * len(self.parts)

    def mean_loss(self, losses: Sequence[Tensor]) -> Tensor:
        """Return this process's loss from its parts' shares: a mean if the loss is a mean, and a sum if it is a sum."""
        total = torch.stack(list(losses)).sum()
        if self._losses is None:
            return total / sum(part.share for part in self.parts)
        here = sum(self._losses[self._first : self._first + len(self.parts)])
        return total / here if here and abs(sum(self._losses) - 1) < _TOLERANCE else total

    def mean(self, values: Sequence[Tensor]) -> Tensor:
        """Return the mean over this process's examples, from means over its parts."""
        weighted = [part.share * value for part, value in zip(self.parts, values, strict=True)]
        return torch.stack(weighted).sum() / sum(part.share for part in self.parts)


def _agreed(examples: int, parts: int, single: bool, equal: bool, device: torch.device) -> tuple[int, bool]:
    """Return the number of examples of all processes, and whether any of them ends with a ``single`` one.

    Raises:
        UsageError: the processes have different numbers of ``parts`` or, where these must be ``equal``, of examples.
    """
    numbers = torch.tensor([examples, parts, examples**2, int(single)], device=device)
    total, number, squares, singles = map(int, sum_over_processes(numbers))
    if equal and squares * count() != total**2:
        raise UsageError("NT-Xent compares the views of all processes, so each process needs the same number")
    if not parts or number != count() * parts:
        raise UsageError(
            f"a batch of {total} examples leaves a process without its part of a (sub-)batch; "
            "choose another batch size, m, or number of processes"
        )
    return total, singles > 0


def loss_shares(loss: Loss, outputs: Sequence[Tensor], targets: Sequence[Inputs]) -> list[float]:
    """Return ω_i with L(batch) = Σ_i ω_i L(part i), in value and in gradient.

    They are n_i/n for a mean, 1 for a sum and, with class weights or ignored labels, the part's share of the weights.
    For such losses the shares depend on the targets alone, so they can be found with made-up outputs.

    Args:
        outputs: made-up outputs (n_i, ...) of each part.
        targets: targets of each part.

    Raises:
        UsageError: the loss is neither a weighted mean nor a sum, so the parts do not give the batch's gradient.
    """
    with torch.enable_grad(), generators_kept(outputs[0].device):
        leaves = [part.detach().requires_grad_() for part in outputs]
        total = loss(torch.cat(leaves), value_of(_joined(targets)))
        slopes = _slopes(total, leaves)
        if not bool(torch.isfinite(total)):  # every label is ignored, in the parts as well
            return [1.0] * len(leaves)
        shares, value = [], 0.0
        for leaf, target, slope in zip(leaves, targets, slopes, strict=True):
            part = loss(leaf, value_of(target))
            [own] = _slopes(part, [leaf])
            if not bool(slope.any()):  # no example of the part counts, and its own loss may be 0/0
                if bool(torch.isfinite(own).all()) and bool(own.any()):
                    raise _refusal()  # it counts alone: the loss selects some examples of the batch
                shares.append(0.0)
                continue
            shares.append(float((slope * own).sum() / own.square().sum()))
            if not float((slope - shares[-1] * own).norm()) <= _TOLERANCE * float(slope.norm()):
                raise _refusal()
            value += shares[-1] * float(part.detach())
    expected = float(total.detach())
    if abs(value - expected) > _TOLERANCE * max(abs(value), abs(expected), 1e-6):
        raise _refusal()
    return shares


def _slopes(loss: Tensor, leaves: Sequence[Tensor]) -> list[Tensor]:
    found: Sequence[Tensor | None] = [None] * len(leaves)
    if loss.requires_grad:
        found = torch.autograd.grad(loss, leaves, allow_unused=True)
    return [torch.zeros_like(leaf) if g is None else g for leaf, g in zip(leaves, found, strict=True)]


def _refusal() -> UsageError:
    return UsageError(
        "the criterion is neither a weighted mean nor a sum over examples, so a split batch (m, or "
        "several processes) would have a different gradient. Use whole batches"
    )


def _made_up(rows: int, like: Tensor, outputs: Outputs, scale: float, seed: int) -> Tensor:
    """Return random outputs of ``rows`` examples, of the model's kind; they are the same in every process.

    Every part needs a ``seed`` of its own: a loss of batch statistics cannot be told from a mean over equal parts.
    """
    generator = torch.Generator().manual_seed(seed)
    dtype = torch.promote_types(like.dtype, torch.float32)
    values = scale * torch.randn(rows, *like.shape[1:], generator=generator, dtype=dtype).to(like.device)
    classes = outputs.head == "classifier"
    match outputs.kind:
        case "probabilities":
            return values.softmax(-1) if classes else values.sigmoid()
        case "log-probabilities":
            return values.log_softmax(-1) if classes else torch.nn.functional.logsigmoid(values)
    return values


def as_targets(y: Any) -> Inputs:
    """Return a tensor as it is, an array as a tensor, and a dict or tuple as ``Fields``."""
    return as_inputs(torch.as_tensor(y) if hasattr(y, "__array__") and not isinstance(y, Tensor) else y)


def value_of(inputs: Inputs) -> Any:
    """Return what a loss takes: the tensor, or the dict or tuple."""
    return inputs.value if isinstance(inputs, Fields) else inputs


def _joined(targets: Sequence[Inputs]) -> Inputs:
    if isinstance(targets[0], Fields):
        return Fields.joined([target for target in targets if isinstance(target, Fields)])
    return torch.cat([target for target in targets if isinstance(target, Tensor)])
