"""Every generator that a model's forward pass may draw from, kept and replayed together.

These are torch's global ones, Python's and NumPy's, and those that a module holds as an attribute.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn

from gm_probe.runtime import devices


@contextmanager
def generators_kept(device: torch.device | None = None, model: nn.Module | None = None) -> Iterator[None]:
    """Leave all global generators as they were, and those that modules of ``model`` hold.

    Args:
        device: whose generator counts, beside the CPU's.
    """
    restore = _restorers(device, model)
    try:
        yield
    finally:
        for each in restore:
            each()


def seed_generators(seed: int) -> None:
    """Seed the global generators of torch, Python and NumPy."""
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)


class Draws:
    """The generators as they stood, so that a perturbed pass drops the units that the clean one dropped.

    Without it a network with dropout would have KL > 0 at δ = 0, and SAM with ρ = 0 would not be SGD.
    """

    def __init__(self, device: torch.device, model: nn.Module) -> None:
        self._device, self._model = device, model
        self._restore = _restorers(device, model)

    @contextmanager
    def again(self) -> Iterator[None]:
        """Draw the same once more; the generators then go on from where they were."""
        with generators_kept(self._device, self._model):
            for each in self._restore:
                each()
            yield


def _restorers(device: torch.device | None, model: nn.Module | None) -> list[Callable[[], None]]:
    """Return functions that set torch's, Python's, NumPy's and the modules' generators to their present states."""
    found: list[Callable[[], None]] = [
        partial(torch.set_rng_state, torch.get_rng_state()),
        partial(random.setstate, random.getstate()),
        partial(np.random.set_state, np.random.get_state(legacy=False)),
    ]
    if device is not None:
        found.append(partial(devices.set_generator_state, devices.generator_state(device), device))
    for module in () if model is None else model.modules():
        found += [
            partial(_set_state, held, _state(held)) for held in vars(module).values() if _is_generator(held)
        ]
    return found


def _is_generator(value: object) -> bool:
    if isinstance(value, random.SystemRandom):  # which has no state
        return False
    return isinstance(value, torch.Generator | random.Random | np.random.Generator | np.random.RandomState)


def _state(generator: Any) -> Any:
    match generator:
        case torch.Generator() | np.random.RandomState():
            return generator.get_state()
        case np.random.Generator():
            return generator.bit_generator.state
    return generator.getstate()


def _set_state(generator: Any, state: Any) -> None:
    match generator:
        case torch.Generator() | np.random.RandomState():
            generator.set_state(state)
        case np.random.Generator():
            generator.bit_generator.state = state
        case _:
            generator.setstate(state)
