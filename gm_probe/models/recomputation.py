"""Activation checkpointing (torch.utils.checkpoint) under other weights than the model's own.

A checkpointed segment runs again in the backward pass. By then the moved weights that its first run saw are gone, and
its activations would be those at the model's own weights. Libraries bind ``checkpoint`` under names of their own, so
what it calls inside is replaced here.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from types import ModuleType
from typing import Any

import torch.utils.checkpoint
from torch.nn.utils import parametrize


class _Plain:
    """The reentrant kind without checkpointing: a call."""

    @staticmethod
    def apply(function: Callable[..., Any], preserve: bool, *args: Any) -> Any:
        return function(*args)


class _NonReentrant:
    """The non-reentrant kind in place of the reentrant one, which torch.autograd.grad does not take."""

    @staticmethod
    def apply(function: Callable[..., Any], preserve: bool, *args: Any) -> Any:
        return torch.utils.checkpoint.checkpoint(
            function, *args, use_reentrant=False, preserve_rng_state=preserve
        )


def _nothing(*args: Any, **kwargs: Any) -> Iterator[None]:
    """Do nothing before a segment of the non-reentrant kind, and nothing after it."""
    yield


@contextmanager
def activations_kept() -> Iterator[None]:
    """Keep the activations of every checkpointed segment that runs meanwhile, as without checkpointing."""
    with _replaced(
        torch.utils.checkpoint,
        CheckpointFunction=_Plain,
        # the non-reentrant kind by its names in torch 2.10 to 2.14
        _checkpoint_without_reentrant_generator=_nothing,
        _checkpoint_without_reentrant_generator_impl=_nothing,
        # for those who have bound the generator itself, as torch.distributed has
        _checkpoint_hook=nullcontext,
    ):
        yield


@contextmanager
def non_reentrant() -> Iterator[None]:
    """Let every segment that asks for reentrant checkpointing meanwhile have the non-reentrant kind."""
    with _replaced(torch.utils.checkpoint, CheckpointFunction=_NonReentrant):
        yield


@contextmanager
def parametrizations_computed() -> Iterator[None]:
    """Compute parametrized weights anew meanwhile: within ``parametrize.cached()`` they would be those of before."""
    with _replaced(parametrize, _cache_enabled=0):
        yield


@contextmanager
def _replaced(module: ModuleType, **named: Any) -> Iterator[None]:
    """Replace what ``module`` has of these names, and restore it after."""
    before = {name: getattr(module, name) for name in named if hasattr(module, name)}
    try:
        for name in before:
            setattr(module, name, named[name])
        yield
    finally:
        for name, value in before.items():
            setattr(module, name, value)
