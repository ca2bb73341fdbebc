"""The door: what somebody's model is, decided once, before anything is measured or trained.

Behind it a model is a module without wrappers around it, whose outputs are logits: (B, C) of C exclusive classes, or
(B, L, 2) of L independent yes-or-no labels, whose softmax over the last dimension is each label's Bernoulli
distribution.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.nn.parameter import is_lazy
from torch.optim.swa_utils import AveragedModel

from gm_probe.errors import UsageError

Head = Literal["classifier", "binary", "multilabel"]
Kind = Literal["logits", "probabilities", "log-probabilities"]

_MANY = 24
"""In a batch of logits, this many numbers never all lie in [0, 1] and come close to both ends."""
_SUM = 1e-3
"""Rows of what is said to be probabilities sum to 1 within this."""
_ROUNDED = 1e-2
"""Rows of probabilities that bfloat16 has rounded sum to 1 within this; logits hit it by chance in no whole batch."""


@dataclass(frozen=True, slots=True)
class Outputs:
    """How to read what a model returns.

    Attributes:
        output: index or name of the one to take, of several; None: a tensor, or what is named ``logits``.
        kind: what the numbers are. None: logits, and outputs that look like probabilities are refused.
        head: ``classifier`` for C exclusive classes; ``binary`` for one logit z of p = sigmoid(z); ``multilabel`` for
            L independent such labels.

    Raises:
        UsageError: an unknown kind or head.
    """

    output: int | str | None = None
    kind: Kind | None = None
    head: Head = "classifier"

    def __post_init__(self) -> None:
        if isinstance(self.output, bool) or not isinstance(self.output, int | str | None):
            raise UsageError(f"output = {self.output!r} must be an index or a name")
        if self.kind is not None and self.kind not in get_args(Kind):
            raise UsageError(f"outputs_are must be {', '.join(get_args(Kind))}, not {self.kind!r}")
        if self.head not in get_args(Head):
            raise UsageError(f"head must be {', '.join(get_args(Head))}, not {self.head!r}")

    def settings(self) -> dict[str, Any]:
        """Return what a record of a measurement says of the outputs, None where it is the default."""
        head = None if self.head == "classifier" else self.head
        kind = None if self.kind == "logits" else self.kind
        return {"head": head, "output": self.output, "outputs_are": kind}

    def taken(self, returned: Any, rows: int) -> Tensor:
        """Return the tensor (B, C), (B, L) or (B, 1) that is measured, as the model returned it.

        Args:
            returned: what the model returned for ``rows`` examples.

        Raises:
            UsageError: it is not clear which output to take, or that one is not a row of logits for each example.
        """
        found = self._chosen(returned)
        if not isinstance(found, Tensor):
            raise UsageError(f"the model returned {_described(returned)}; {_REMEDY}")
        if not found.is_floating_point():
            raise UsageError(f"the model returned {found.dtype}; logits must be floating-point numbers")
        if found.dim() == 0:
            raise UsageError("the model returned a single number, like a loss. Return the logits (B, C)")
        if found.dim() == 1 and self.head == "binary":
            found = found[:, None]
        if found.dim() == 1:
            raise UsageError(f"the model returned one number per example, {tuple(found.shape)}; {_BINARY}")
        if found.dim() != 2:
            raise UsageError(
                f"the model returned {tuple(found.shape)} for {rows} example(s), not one row of logits (B, "
                "C) for each. Wrap it to return the right row"
            )
        if len(found) != rows:
            raise UsageError(
                f"the model returned {len(found)} rows of logits for {rows} example(s). Return one row for each"
            )
        return found

    def _chosen(self, returned: Any) -> Any:
        if self.output is not None:
            return _named(returned, self.output)
        if isinstance(returned, Tensor):
            return returned
        if isinstance(returned, Mapping):
            return returned.get("logits")
        return getattr(returned, "logits", None)

    def logits(self, taken: Tensor) -> Tensor:
        """Return logits (B, C), or (B, L, 2) of yes-or-no labels, from what ``taken`` returned.

        Log-probabilities are logits up to a constant of each row. Probabilities are taken to their logarithms; those
        that their dtype has rounded to 0 (or of yes-or-no labels to 1) count as its nearest number. So does −∞, by
        which classes are masked, since −∞ minus −∞ is no number.
        """
        kind = self.kind or "logits"
        limits = torch.finfo(taken.dtype)
        taken = taken.clamp(min=limits.tiny).log() if kind == "probabilities" else taken.clamp(min=limits.min)
        if self.head == "classifier":
            return taken
        if kind == "logits":
            return torch.stack([torch.zeros_like(taken), taken], -1)
        # log(1 − p) by expm1, which keeps the digits of p near 1
        rest = -torch.expm1(taken)
        return torch.stack([rest.clamp(min=limits.eps / 2).log(), taken], -1)

    def checked(self, taken: Tensor) -> Outputs:
        """Return these settings with the kind decided, from the outputs ``taken`` (B, ...) of some examples.

        Raises:
            UsageError: one logit of a classifier, or outputs that are not of the kind that is claimed.
        """
        if self.head == "classifier" and taken.shape[1] == 1:
            raise UsageError(f"the model returned one logit per example; {_BINARY}")
        if self.head == "binary" and taken.shape[1] != 1:
            raise UsageError(
                f"head binary reads one logit per example, but the model returned {taken.shape[1]}. Use "
                "head multilabel for independent labels, or classifier for exclusive classes"
            )
        values = taken.detach().double()
        if not len(values) or not bool(torch.isfinite(values).all() if self.kind is None else True):
            return replace(self, kind=self.kind or "logits")
        seen = "" if self.kind is not None else self._seen_as_probabilities(values)
        if seen:
            raise UsageError(
                f"the model returned probabilities ({seen}), but logits are needed. Remove its softmax or "
                "sigmoid, or pass --outputs-are probabilities (Outputs(kind=...) in Python; with --head "
                "multilabel for independent labels). If these are logits, pass --outputs-are logits"
            )
        if self.kind == "probabilities" and not self._probabilities(values):
            raise UsageError(
                "outputs are declared as probabilities, but lie outside [0, 1] or do not sum to 1"
            )
        if self.kind == "log-probabilities" and not self._probabilities(values.exp()):
            raise UsageError("outputs are declared as log-probabilities, but exp of a row does not sum to 1")
        return replace(self, kind=self.kind or "logits")

    def _seen_as_probabilities(self, values: Tensor) -> str:
        """Return why ``values`` look like probabilities; empty where they do not."""
        if self._probabilities(values, _ROUNDED):
            return (
                "every row is ≥ 0 and sums to 1"
                if self.head == "classifier"
                else "every number lies in [0, 1]"
            )
        # as from a sigmoid of each class of a trained network; logits after a ReLU contain zeros
        low, high = (float(values.min()), float(values.max())) if values.numel() >= _MANY else (0.0, 2.0)
        if 0 < low < 0.05 and 0.95 < high <= 1:
            return "every number lies between 0 and 1, as a sigmoid's do"
        return ""

    def _probabilities(self, values: Tensor, tolerance: float = _SUM) -> bool:
        """Return whether rows are probabilities of exclusive classes, or of yes-or-no labels."""
        if not bool(((values >= 0) & (values <= 1 + tolerance)).all()):
            return False
        return self.head != "classifier" or bool(((values.sum(1) - 1).abs() <= tolerance).all())


def alike(outputs: Tensor, others: Tensor, tolerance: float) -> bool:
    """Return whether two passes gave equal outputs (B, ...), up to a ``tolerance`` relative to the largest one.

    An output that softmax rounds to 0 does not count as the largest: a mask's −1e9 would hide every difference.
    """
    sizes = torch.where(outputs.softmax(-1) > 0, outputs.abs(), 0)
    return torch.allclose(
        others, outputs, rtol=tolerance, atol=tolerance * float(sizes.max()), equal_nan=True
    )


_REMEDY = (
    "choose the logits by --output INDEX or NAME (output= in Python), or return them alone or named 'logits'"
)
_BINARY = (
    "its softmax would always be 1. For a yes-or-no model with one logit, pass --head binary (head= in "
    "Python)"
)


def _named(returned: Any, output: int | str) -> Any:
    """Return the output of that index or name.

    Raises:
        UsageError: there is none.
    """
    key: Any = int(output) if isinstance(output, str) and output.lstrip("-").isdigit() else output
    try:
        if isinstance(returned, Mapping):
            return returned[output] if output in returned else list(returned.values())[key]
        return (
            returned[key]
            if isinstance(key, int) and not isinstance(returned, Tensor)
            else getattr(returned, key)
        )
    except (LookupError, AttributeError, TypeError):
        raise UsageError(
            f"the model returned {_described(returned)}, which has no output {output!r}"
        ) from None


def _described(returned: Any) -> str:
    """Describe what a model returned, with names and shapes."""
    if isinstance(returned, Tensor):
        return f"a tensor {tuple(returned.shape)}"
    named: Iterator[tuple[str, Any]]
    if isinstance(returned, Mapping):
        named = ((repr(key), value) for key, value in returned.items())
    elif hasattr(returned, "_fields"):
        named = zip(returned._fields, returned, strict=False)
    elif isinstance(returned, Sequence) and not isinstance(returned, str):
        named = ((str(index), value) for index, value in enumerate(returned))
    elif is_dataclass(returned):
        named = ((field.name, getattr(returned, field.name)) for field in fields(returned))
    else:
        return f"a {type(returned).__name__}"
    parts = [
        f"{name}: {tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__}"
        for name, value in named
    ]
    return f"a {type(returned).__name__} of {', '.join(parts[:8])}{', …' * (len(parts) > 8)}"


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the network inside wrappers that pass its output on: DataParallel, DDP, averages of weights, compiled.

    A compiled network's own code runs, since compiled code has no second derivatives.

    Raises:
        UsageError: no module, or one that takes no moved weights.
    """
    while True:
        if not isinstance(model, nn.Module):
            raise UsageError(f"the model is a {type(model).__name__}, not an nn.Module")
        if isinstance(model, DataParallel | DistributedDataParallel | AveragedModel):
            model = model.module
        elif isinstance(compiled := getattr(model, "_orig_mod", None), nn.Module):
            model = compiled
        else:
            break
    if any(isinstance(module, torch.jit.ScriptModule) for module in model.modules()):
        raise UsageError(
            "the model is scripted or traced (TorchScript), so it takes no perturbed weights. Give its source module"
        )
    sharded = [type(module).__name__ for module in model.modules() if "FullySharded" in type(module).__name__]
    if sharded or any(type(p).__name__ == "DTensor" for p in model.parameters()):
        raise UsageError(
            "the model is sharded (FSDP), so no process has all its weights. Gather them into a plain module"
        )
    lazy = [name for name, p in model.named_parameters() if is_lazy(p)]
    if lazy:
        raise UsageError(f"parameter {lazy[0]!r} is lazy and has no shape yet. Run the network once first")
    return model
