"""The names that data may have. Imports no torch, so that a wrong one is reported at once."""

from pathlib import Path

from gm_probe.errors import UsageError, did_you_mean

DATASETS = {"cifar10": "CIFAR10", "cifar100": "CIFAR100", "fashionmnist": "FashionMNIST", "svhn": "SVHN"}
"""Names, and torchvision's classes for them."""
NAMES = ("digits", *DATASETS)
"""Data that is known by name; anything else is a path."""


def default_data_root() -> Path:
    """Return where torchvision's data sets are kept unless ``--data-root`` says otherwise: ``~/.cache/gm_probe``.

    Raises:
        UsageError: this user has no home.
    """
    try:
        return Path.home() / ".cache" / "gm_probe"
    except RuntimeError as error:
        raise UsageError("this user has no home folder for data sets. Give --data-root DIR") from error


def require_data_name(name: str, *, here: bool = False) -> None:
    """Raise UsageError where ``name`` is no known data set, nothing here, and no path to elsewhere; nothing is read.

    Args:
        here: a path must exist on this machine, which will read it.
    """
    elsewhere = Path(name).name != name and not here  # it may exist on the machine that will read it
    if name not in NAMES and not elsewhere and not Path(name).exists():
        raise unknown_data(name)


def unknown_data(name: str) -> UsageError:
    """Return the error for ``name``, which is neither a path nor a known data set."""
    hint = did_you_mean(name, NAMES, f"it is not one of {', '.join(NAMES)} either")
    return UsageError(f"no folder or file {name!r}; {hint}")
