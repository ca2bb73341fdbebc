"""How a checkpoint's tensors fit a network: by which names, what is left out, and what a mismatch is called."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from gm_probe.errors import CheckpointError, first_three, start_of
from gm_probe.files.tensors import not_finite
from gm_probe.models.checkpoints import Checkpoint
from gm_probe.models.weight_names import locate, tied


@dataclass(frozen=True, slots=True)
class Fit:
    """How a checkpoint's tensors fit a network.

    Attributes:
        state: the tensors by their names in the network.
        key: where they stand in the file, with the prefix of their names; empty at the top and without one.
        alternatives: where the same weights are again with other values, and none was chosen.
        left_out: names of tensors in the file that the network has no place for and can do without.
    """

    state: dict[str, Tensor]
    key: str
    alternatives: tuple[str, ...]
    left_out: tuple[str, ...]

    def notes(self, path: Path) -> list[str]:
        """Return what was chosen without being asked for, a sentence each."""
        found = []
        if self.alternatives:
            found.append(
                f"{path} holds the weights more than once: {start_of(self.key or 'those without a prefix')} "
                f"is used, and {first_three(self.alternatives)} is not. Choose with --key NAME"
            )
        if self.left_out:
            found.append(
                f"{path}: {len(self.left_out)} tensor(s) are left out, because the network does not have "
                f"them ({first_three(self.left_out)})"
            )
        return found


def load_weights(model: nn.Module, checkpoint: Checkpoint) -> Fit:
    """Copy the checkpoint's weights into ``model`` and return how they fit; see ``fitting``.

    Raises:
        CheckpointError: a mismatch, or values that are not finite (buffers may hold −∞); the tensors are named.
    """
    fit = fitting(model, checkpoint)
    buffers = {name for name, _ in model.named_buffers(remove_duplicate=False)}
    for name, value in fit.state.items():
        if bad := not_finite(value, mask=name in buffers):
            raise CheckpointError(
                f"{checkpoint.path}: tensor {name!r} has {bad} NaN or infinite value(s); use an earlier checkpoint"
            )
    model.load_state_dict(fit.state, strict=False)
    return fit


def fitting(model: nn.Module, checkpoint: Checkpoint) -> Fit:
    """Return the checkpoint's tensors by their names in ``model`` (which may be on the meta device).

    Names agree without the parts that wrappers put in (``module``, ``_orig_mod``), below any prefix. What lies
    outside of that prefix is left out where it is less than the network; counters, losses, auxiliary heads and buffers
    that belong to no state dict are left out anywhere. BatchNorm's ``num_batches_tracked`` may be absent
    (checkpoints before torch 0.4.1 have none; eval mode ignores it).

    Raises:
        CheckpointError: a mismatch, naming the tensors.
    """
    expected = model.state_dict()
    place = locate(model, checkpoint.state)
    state = _with_tied(model, checkpoint.path, place.state)
    missing = [name for name in place.needed if name not in state]
    differing = [k for k in expected if k in state and state[k].shape != expected[k].shape]
    shapes = [f"{k} {tuple(state[k].shape)} ≠ {tuple(expected[k].shape)} in the model" for k in differing]
    kinds = {"missing": missing, "unexpected": place.extra, "of a different shape": shapes}
    problems = [f"{len(names)} {kind} ({first_three(names)})" for kind, names in kinds.items() if names]
    if problems:
        remedy = _remedy(checkpoint, place.prefix, bool(missing or shapes))
        if not (missing or place.extra) and (classes := _classes(state, expected, differing)):
            remedy = f"pass --num-classes {classes}, or {remedy}"
        raise CheckpointError(f"{checkpoint.path} does not fit the model: {'; '.join(problems)}; {remedy}")
    for name, value in state.items():
        if expected[name].is_floating_point() and not value.is_floating_point():
            raise CheckpointError(f"{checkpoint.path}: tensor {name!r} is {value.dtype}, not floating point")
    copies = [_key(checkpoint.key, prefix) for prefix in place.copies]
    alternatives = (*checkpoint.alternatives, *copies)
    return Fit(state, _key(checkpoint.key, place.prefix), alternatives, tuple(place.left_out))


def _with_tied(model: nn.Module, path: Path, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return ``state`` with every name of a tied tensor, of which a file may hold one alone (safetensors' writer does).

    Raises:
        CheckpointError: the file has different values for a tensor that the model ties.
    """
    state = dict(state)
    for names in tied(model):
        there = [name for name in names if name in state]
        for name in there[1:]:
            if state[name].shape == state[there[0]].shape and not torch.equal(state[name], state[there[0]]):
                raise CheckpointError(
                    f"{path}: tensors {there[0]!r} and {name!r} differ, but the model ties them. Check --model"
                )
        state |= {name: state[there[0]] for name in names if there}
    return state


def _key(key: str, prefix: str) -> str:
    return ".".join(filter(None, (key, prefix.rstrip("."))))


def _classes(
    state: Mapping[str, Tensor], expected: Mapping[str, Tensor], differing: Sequence[str]
) -> int | None:
    """Return the number of classes of a checkpoint from which only the last layer differs; else None."""
    pairs = [(state[name].shape, expected[name].shape) for name in differing]
    sizes = {held[0] if held[1:] == asked[1:] else None for held, asked in pairs}
    return sizes.pop() if len(sizes) == 1 and len(pairs) <= 2 else None  # its weight and its bias


def _remedy(checkpoint: Checkpoint, prefix: str, wrong: bool) -> str:
    if not wrong:  # the file has all that the network needs
        return f"--strip {start_of(prefix)} uses only these tensors" if prefix else "check --model"
    others = [*checkpoint.alternatives, *checkpoint.elsewhere]
    more = f", or choose among the file's other tensors by --key ({first_three(others)})" if others else ""
    return f"check --model{more}"
