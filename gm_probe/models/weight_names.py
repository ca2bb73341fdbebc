"""Which of a file's tensors are a network's, by their names: below what prefix, and what is left out."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from gm_probe.files.state_dicts import looks_averaged, plain

COUNTERS = frozenset(
    (
        "num_batches_tracked",
        "n_averaged",
        "num_updates",
        "decay",
        "initted",
        "step",
        "total_ops",
        "total_params",
    )
)
"""Last parts of names of single numbers that training code keeps beside weights: averages, profilers."""
OPTIONAL = ("num_batches_tracked", "n_averaged")
"""Counters of a network's own that a file may lack: eval mode ignores them."""
HEADS = frozenset(("aux1", "aux2", "AuxLogits"))
"""Auxiliary heads of GoogLeNet and Inception, which run in training alone."""
_LOSS = re.compile(r"(?i)(^|_)(loss|criterion)(_|$)")


def placed(wanted: Collection[str], held: Iterable[str]) -> dict[str, set[str]]:
    """Return which of the ``wanted`` names are in ``held`` below each prefix that has any, such as '' or 'model.'."""
    parts = 1 + max((name.count(".") for name in wanted), default=0)
    found: dict[str, set[str]] = {}
    for name in held:
        ending = ""
        for part in reversed(name.rsplit(".", parts)[-parts:]):
            ending = f"{part}.{ending}" if ending else part
            if ending in wanted:
                found.setdefault(name[: len(name) - len(ending)], set()).add(ending)
    return found


def may_be_left_out(name: str, value: Tensor, own: Collection[str]) -> bool:
    """Return whether a tensor that the network has no place for is known to be none of its weights.

    Args:
        name: below the network's prefix.
        own: names of the network's buffers, those included that are in no state dict.
    """
    first, last = name.partition(".")[0], name.rpartition(".")[2]
    if last in COUNTERS and value.numel() <= 1:
        return True
    return name in own or first in HEADS or _LOSS.search(first) is not None


def tied(model: nn.Module) -> list[list[str]]:
    """Return the names of every tensor of the state dict that has several."""
    names: dict[int, list[str]] = {}
    for name, value in model.state_dict(keep_vars=True).items():
        names.setdefault(id(value), []).append(name)
    return [some for some in names.values() if len(some) > 1]


@dataclass(frozen=True, slots=True)
class Located:
    """Where a network's tensors are among a file's.

    Attributes:
        prefix: below which the file has them, without wrappers' parts; '' or such as 'model.'.
        state: the network's tensors that are there, by its own names.
        needed: the network's names of those that must be there.
        copies: other prefixes below which all are there, too.
        left_out: the file's other names that may be left out.
        extra: those that may not.
    """

    prefix: str
    state: dict[str, Tensor]
    needed: list[str]
    copies: tuple[str, ...]
    left_out: list[str]
    extra: list[str]


def locate(model: nn.Module, file: Mapping[str, Tensor]) -> Located:
    """Find the network's tensors among those of a ``file``; names agree without the parts that wrappers put in.

    Of several prefixes the first is taken below which all tensors are, in the network's shapes; one that does not look
    like an average's comes before one that does.
    """
    shapes = {name: value.shape for name, value in model.state_dict().items()}
    wanted, names_in_file = plain(shapes), plain(file)
    held = {name: file[own] for name, own in names_in_file.items()}
    needed = [name for name in wanted if not name.endswith(OPTIONAL)]
    names_of = {own: name for name, own in wanted.items()}
    same = {names_of[own]: {names_of[other] for other in some} for some in tied(model) for own in some}
    found = placed(wanted.keys(), held) or {"": set()}

    def fits(prefix: str) -> bool:
        there = found[prefix]
        return all(name in there or same.get(name, set()) & there for name in needed) and all(
            held[prefix + name].shape == shapes[wanted[name]] for name in there
        )

    enough = [prefix for prefix, there in found.items() if len(there) * (1 + len(same)) >= len(needed)]
    whole = [prefix for prefix in enough if fits(prefix)]
    most = min(found, key=lambda p: (-len(found[p]), looks_averaged(p)))
    prefix = min(whole, key=looks_averaged, default=most)
    copies = tuple(other for other in whole if other != prefix)
    left_out, extra = _others(model, held, prefix, {p: found[p] for p in (prefix, *copies)})
    return Located(
        prefix,
        {wanted[name]: held[prefix + name] for name in found[prefix]},
        [wanted[name] for name in needed],
        copies,
        [names_in_file[name] for name in left_out],
        [names_in_file[name] for name in extra],
    )


def _others(
    model: nn.Module, held: Mapping[str, Tensor], prefix: str, taken: Mapping[str, set[str]]
) -> tuple[list[str], list[str]]:
    """Return the names below no prefix of ``taken``: those that may be left out, and those that may not."""
    buffers = plain(name for name, _ in model.named_buffers()).keys()
    used = {before + name for before, names in taken.items() for name in names}
    left_out, below, beside = [], [], []
    for name in held.keys() - used:
        own = next((name.removeprefix(p) for p in taken if p and name.startswith(p)), name)
        if may_be_left_out(own, held[name], buffers):
            left_out.append(name)
        elif name.startswith(prefix):
            below.append(name)
        else:
            beside.append(name)
    if len(beside) <= len(taken[prefix]):  # something smaller than the network, such as a projector
        left_out, beside = left_out + beside, []
    order = {name: index for index, name in enumerate(held)}
    return sorted(left_out, key=order.__getitem__), sorted(below + beside, key=order.__getitem__)
