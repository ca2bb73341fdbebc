"""The options that say where the runs of a sweep are done; `sweep` and `measure` share them."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from gm_probe.cli.options import composed, jobs_option
from gm_probe.cli.param_types import Choice
from gm_probe.errors import UsageError

if TYPE_CHECKING:
    from gm_probe.executors.local import Executor


def executor_options(*kinds: str) -> Any:
    """Add ``--executor`` with these kinds, ``--jobs``, ``--address`` and ``--gpus``."""
    return composed(
        click.option(
            "--executor",
            type=Choice(kinds),
            default="local",
            show_default=True,
            help="Run the jobs in this way.",
        ),
        jobs_option,
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


@dataclass(frozen=True, slots=True)
class ExecutorOptions:
    """What ``executor_options`` hold."""

    executor: str
    jobs: int
    address: str | None
    gpus: float

    @classmethod
    def of(cls, options: dict[str, Any]) -> ExecutorOptions:
        """Take them out of a command's ``options``.

        Raises:
            UsageError: an option is given that belongs to another executor.
        """
        found = cls(**{each.name: options.pop(each.name) for each in fields(cls)})
        if found.executor != "ray" and (found.address is not None or found.gpus):
            raise UsageError("--address and --gpus go with --executor ray")
        if found.executor != "local" and found.jobs > 1:
            raise UsageError(
                f"--jobs counts processes on this machine; leave it out with --executor {found.executor}"
            )
        return found

    @property
    def here(self) -> bool:
        """Whether one job after the other runs in this process."""
        return self.executor == "local" and self.jobs == 1

    def ray(self, root: Path, threads: int | None) -> Executor:
        """Return the Ray cluster for runs below ``root``."""
        from gm_probe.executors import ray

        return ray.Ray(root, self.address, threads or 1, self.gpus)

    def engine(self, root: Path, device: str, threads: int | None) -> Executor | None:
        """Return what runs jobs below ``root``; None where this process does."""
        if self.executor == "ray":
            return self.ray(root, threads)
        if self.here:
            return None
        from gm_probe.executors import local

        return local.on_this_machine(self.jobs, spread=device in {"auto", "cuda"})
