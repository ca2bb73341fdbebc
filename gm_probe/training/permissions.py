"""What a run's record may ask for but only the command line may allow, because a run folder may be anybody's."""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from gm_probe.data.names import DATASETS, default_data_root
from gm_probe.errors import UsageError
from gm_probe.models.names import is_user_code
from gm_probe.training.config import TrainConfig

THREADS = "threads"
OPTIONS = {"model": "--model", "data_root": "--data-root", "device": "--device", THREADS: "--threads"}


@dataclass(frozen=True, slots=True)
class Permissions:
    """Where the command line allows a run's data to be looked for.

    Attributes:
        data: where the run's data is now; None = where it was.
        data_root: where torchvision's data sets are; None = ``default_data_root``.
        download: whether torchvision may download what is missing.
    """

    data_root: Path | None = None
    download: bool = False
    data: str | None = None

    @classmethod
    def of(cls, config: TrainConfig) -> Permissions:
        """Return what ``config`` itself allows, where the caller and not a folder gave it."""
        return cls(None if config.data_root is None else Path(config.data_root), config.download)

    def applied(self, config: TrainConfig, run: Path) -> TrainConfig:
        """Return the ``config`` of ``run`` with the places that this allows.

        Raises:
            UsageError: the record names a place of its own, and this does not.
        """
        if self.data is not None:
            config = config.replace(data=self.data)
        if self.data_root is None:
            refuse({name: value for name, value in restricted(config).items() if name == "data_root"}, run)
        root = None if self.data_root is None else str(self.data_root)
        return config.replace(data_root=root, download=self.download)


def refuse(lacking: Mapping[str, str], run: Path) -> None:
    """Raise UsageError for the ``lacking`` settings, which the command line would have to give."""
    if lacking:
        options = "".join(_option(name, value) for name, value in lacking.items())
        raise UsageError(f"{run} needs permissions that only the command line can give. Add{options}")


def as_options(configs: Iterable[TrainConfig]) -> str:
    """Return the options with which `gmprobe run-one` allows what these runs ask for, each after a space."""
    configs = list(configs)
    needed = dict.fromkeys(
        _option(*item) for config in configs for item in restricted(config).items() if item[0] != THREADS
    )
    return "".join(needed) + (" --download" if any(config.download for config in configs) else "")


def _option(name: str, value: str) -> str:
    return f" {OPTIONS[name]} {shlex.quote(value)}"


def restricted(config: TrainConfig) -> dict[str, str]:
    """Return, as text, the settings of a record that need permission.

    They are a user's own code, another place of torchvision's data, a device other than the CPU, and more threads than
    this machine has. A download is not among them: without permission there simply is none.
    """
    found: dict[str, str] = {}
    if is_user_code(config.model):
        found["model"] = config.model
    if (
        config.data in DATASETS
        and config.data_root is not None
        and config.data_root != str(default_data_root())
    ):
        found["data_root"] = config.data_root
    if config.device not in {"auto", "cpu"}:
        found["device"] = config.device
    if (config.threads or 0) > (os.cpu_count() or 1):
        found[THREADS] = str(config.threads)
    return found
