"""Find the weights in what a file holds: state dicts, under whatever keys."""

from __future__ import annotations

import re
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

Place = tuple[str, ...]
"""The keys that lead to a state dict, from the top of a file; () is the top itself."""

WRAPPERS = frozenset(
    ("module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module")
)
"""Parts that DataParallel, DDP, torch.compile, FSDP, checkpointing and DeepSpeed put into names, at any depth."""
DEPTH = 5
"""How deep state dicts are looked for."""
USUAL = ("state_dict", "model_state_dict", "model_state", "model")
"""Keys that training code uses for the raw weights most often."""
_AVERAGED = re.compile(
    r"(?i)(?<![a-z])ema|ema(?![a-z])|(?<![a-z])(averaged?|avg|swa|shadow|teacher|momentum|target)(?![a-z])|_k\.?$"
)


@dataclass(frozen=True, slots=True)
class Chosen:
    """One of a file's state dicts.

    Attributes:
        key: where it is, as ``--key`` names it; empty at the top.
        state: its tensors, by their names.
        alternatives: where the same tensors are again with other values, such as an average of the weights.
        elsewhere: where other tensors are.
    """

    key: str
    state: dict[str, Tensor]
    alternatives: tuple[str, ...] = ()
    elsewhere: tuple[str, ...] = ()


def looks_averaged(place: str) -> bool:
    """Return whether a key or a prefix says that its weights are an average of others."""
    return _AVERAGED.search(place) is not None


def choose(content: Any) -> Chosen | None:
    """Return the state dict in ``content``, None where there is none.

    Of several, raw weights come before averaged ones, then a usual key before others, then the larger before the
    smaller. What has fewer than half as many tensors as the largest is never chosen.
    """
    found = state_dicts(content)
    if not found:
        return None
    most = max(map(len, found.values()))
    large = [place for place, state in found.items() if 2 * len(state) >= most]
    first = min(large, key=lambda place: (_averaged(place), not _usual(place), -len(found[place])))
    others = [place for place in found if place != first][:LISTED]
    copies = [place for place in others if _copies(found[first], found[place])]
    return Chosen(
        joined(first),
        found[first],
        tuple(map(joined, copies)),
        tuple(joined(place) for place in others if place not in copies),
    )


LISTED = 50
"""Other state dicts that are named: a hostile file may hold any number."""


def choose_at(content: Any, key: str) -> Chosen | None:
    """Return the state dict at the dotted ``key``, or the tensors whose names begin with it; None where none do."""
    for inner in _at(content, key):
        chosen = choose(inner)
        if chosen is not None:
            return Chosen(
                ".".join(filter(None, (key, chosen.key))),
                chosen.state,
                tuple(f"{key}.{place}" if place else key for place in chosen.alternatives),
            )
    first = choose(content)
    if first is None:
        return None
    places = {first.key: first.state} | {joined(p): state for p, state in state_dicts(content).items()}
    for place, state in places.items():
        rest = key.removeprefix(f"{place}.") if place else key
        bare = {name: state[own] for name, own in plain(state).items()}
        if inside := below(state, f"{rest}.") or below(bare, f"{rest}."):
            return Chosen(f"{place}.{rest}" if place else rest, inside)
    return None


def below(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Return the tensors whose names begin with ``prefix``, named without it."""
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}


def plain(names: Iterable[str]) -> dict[str, str]:
    """Return ``names`` by what they are without wrappers' parts; as they are where two would become one."""
    names = list(names)
    found = {".".join(part for part in name.split(".") if part not in WRAPPERS): name for name in names}
    return found if len(found) == len(names) else {name: name for name in names}


def state_dicts(content: Any) -> dict[Place, dict[str, Tensor]]:
    """Return every mapping of names to tensors in ``content``, the outer ones first; those of optimizers are none.

    Values of another kind beside the tensors are passed over. Where no mapping has a floating-point tensor with a
    dimension, those with any tensors are returned.
    """
    found: dict[Place, dict[str, Tensor]] = {}
    queue: deque[tuple[Place, Any]] = deque([((), content)])
    seen: set[int] = set()
    while queue:
        place, value = queue.popleft()
        if id(value) in seen or _of_optimizer(place, value):
            continue
        seen.add(id(value))  # a hostile file may nest itself in itself
        if isinstance(value, dict):
            tensors = {
                n: v for n, v in entries(value).items() if isinstance(n, str) and isinstance(v, Tensor)
            }
            if tensors:
                found[place] = tensors
        if len(place) < DEPTH:
            queue.extend(
                ((*place, name), inner)
                for name, inner in _children(value)
                if isinstance(inner, (dict, list, tuple))
            )
    weights = {place: tensors for place, tensors in found.items() if any(map(_is_weight, tensors.values()))}
    return weights or found


def entries(value: dict[Any, Any]) -> dict[Any, Any]:
    """Return the plain dict in one of a subclass, on which a file may have set attributes that hide its methods."""
    return {name: dict.__getitem__(value, name) for name in dict.__iter__(value)}


def joined(place: Place) -> str:
    """Return a place as ``--key`` takes it."""
    return ".".join(place)


def _children(value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for name, inner in entries(value).items():
            if isinstance(name, (str, int)):
                yield str(name), inner
    elif isinstance(value, (list, tuple)):
        yield from ((str(index), inner) for index, inner in enumerate(value))


def _at(value: Any, key: str) -> Iterator[Any]:
    """Yield all values that the dotted ``key`` may mean: a key may have dots of its own."""
    for name, inner in _children(value):
        if name == key:
            yield inner
        elif name and key.startswith(f"{name}."):
            yield from _at(inner, key[len(name) + 1 :])


def _of_optimizer(place: Place, value: Any) -> bool:
    """Return whether ``value`` is an optimizer's: moments have the names and shapes of weights."""
    if place and place[-1].lower().startswith("optim"):
        return True
    return isinstance(value, dict) and dict.__contains__(value, "param_groups")


def _is_weight(value: Tensor) -> bool:
    # called on the class: a file may have set attributes on a tensor that hide its methods
    return Tensor.is_floating_point(value) and Tensor.dim(value) > 0


def _averaged(place: Place) -> bool:
    return any(map(looks_averaged, place))


def _usual(place: Place) -> bool:
    return bool(place) and place[-1] in USUAL


def _copies(state: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    """Return whether at least half of the tensors of one have their like in the other, by size."""
    sizes = [Counter(map(Tensor.numel, one.values())) for one in (state, other)]
    return 2 * (sizes[0] & sizes[1]).total() >= max(len(state), len(other))
