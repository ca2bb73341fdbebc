"""The options that say where the runs of a sweep are done; `sweep` and `measure` share them."""

from __future__ import annotations

from functools import reduce
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from gm_probe.cli.param_types import AT_ONCE, Choice
from gm_probe.errors import UsageError

if TYPE_CHECKING:
    from gm_probe.executors.local import Executor

_OPTIONS = (
    click.option(
        "--jobs",
        type=AT_ONCE,
        default=1,
        show_default=True,
        help="Number of runs at a time on this machine, each in a process.",
    ),
    click.option(
        "--address",
        help="Address of the Ray cluster: auto or HOST:PORT.  [default: a new one on this machine]",
    ),
    click.option(
        "--gpus",
        type=click.FloatRange(0),
        default=0.0,
        show_default=True,
        help="Number of GPUs per run on Ray; 0.25 puts four runs on one GPU.",
    ),
)


def executor_options(*kinds: str) -> Any:
    """Add ``--executor`` with these kinds, ``--jobs``, ``--address`` and ``--gpus``."""
    kind = click.option(
        "--executor", type=Choice(kinds), default="local", show_default=True, help="Run the jobs in this way."
    )
    return lambda command: reduce(lambda inner, option: option(inner), reversed((kind, *_OPTIONS)), command)


def ray_executor(root: Path, address: str | None, gpus: float, threads: int | None) -> Executor:
    """The Ray cluster at ``address`` for runs below ``root``."""
    from gm_probe.executors.ray import Ray

    return Ray(root, address, threads or 1, gpus)


def check_executor(executor: str, jobs: int, address: str | None, gpus: float) -> None:
    """Raise UsageError where an option is given that belongs to another executor."""
    if executor != "ray" and (address is not None or gpus):
        raise UsageError("--address and --gpus go with --executor ray")
    if executor != "local" and jobs > 1:
        raise UsageError(f"--jobs counts processes on this machine; leave it out with --executor {executor}")
