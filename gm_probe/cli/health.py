"""What gm_probe uses and this machine has, and the commands that install the rest. It needs no torch."""

from __future__ import annotations

import importlib
import os
import platform
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Literal

from packaging.requirements import Requirement

from gm_probe.data.names import default_data_root
from gm_probe.errors import BusyError, ProbeError, ResourceError, StorageError, UsageError, first_line
from gm_probe.files.atomic import write_atomic
from gm_probe.files.locks import exclusive

State = Literal["ok", "absent", "broken"]
EXTRAS = {
    "timm": "models vit-*, mixer-* and timm:NAME",
    "hf": "--model hf",
    "parquet": "tables as .parquet",
    "tensorboard": "train --tensorboard",
    "tune": "tune --trials",
    "ray": "--executor ray",
    "lightning": "examples/lightning_training.py",
    "accelerate": "examples/accelerate_loop.py",
}
"""Optional dependencies, and what needs them."""
DATA = {
    "cifar10": "cifar-10-batches-py",
    "cifar100": "cifar-100-python",
    "fashionmnist": "FashionMNIST",
    "svhn": "train_32x32.mat",
}
"""Where below --data-root torchvision keeps each data set."""


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """One line of the diagnosis.

    ``state`` is ``ok``; ``absent``: optional and not here; or ``broken``: needed, and ``exit_code`` says of what
    kind. ``remedy`` is a command or an option, empty where nothing is to be done.
    """

    section: str
    name: str
    found: str
    state: State = "ok"
    remedy: str = ""
    exit_code: int = 0


def diagnose(folder: Path, data_root: Path | None = None, device: str = "auto") -> Iterator[Diagnosis]:
    """Yield everything worth knowing before a long run: versions, devices, data, and ``folder`` to write into.

    Nothing is raised for what is wrong: it is a finding. ``folder`` is written to (and left as it was);
    ``data_root`` is ``default_data_root()`` where it is None.
    """
    yield from _versions()
    yield from _machine(device)
    yield from _data(data_root)
    yield from _folder(folder)


def _versions() -> Iterator[Diagnosis]:
    section = "versions"
    yield Diagnosis(section, "python", f"{platform.python_version()} on {platform.platform(terse=True)}")
    try:
        yield Diagnosis(section, "gm_probe", version("gm_probe"))
        needed = [Requirement(line) for line in requires("gm_probe") or ()]
    except PackageNotFoundError:
        remedy = "pip install . in the checkout"
        yield Diagnosis(section, "gm_probe", "not installed", "broken", remedy, ResourceError.exit_code)
        return
    for requirement in needed:
        if requirement.marker is None:
            yield _installed(requirement)
        else:
            extras = [extra for extra in EXTRAS if requirement.marker.evaluate({"extra": extra})]
            yield from (_installed(requirement, extra) for extra in extras)


def _installed(needed: Requirement, extra: str = "") -> Diagnosis:
    section, name = ("extras", extra) if extra else ("versions", needed.name)
    suffix = f" ({EXTRAS[extra]})" if extra else ""
    try:
        found = version(needed.name)
        if needed.specifier.contains(found, prereleases=True):
            return Diagnosis(section, name, f"{found}{suffix}")
        lack = f"{found}, needs {needed.specifier}{suffix}"
    except PackageNotFoundError:
        lack = f"not installed{suffix}"
    if extra:
        return Diagnosis(section, name, lack, "absent", f"pip install 'gm_probe[{extra}]'")
    return Diagnosis(section, name, lack, "broken", f"pip install '{needed}'", ResourceError.exit_code)


def _machine(device: str) -> Iterator[Diagnosis]:
    section = "machine"
    try:
        # imported here, so that a broken torch is a finding and not the end
        torch = importlib.import_module("torch")
    except (ImportError, OSError) as error:
        remedy = "pip install --force-reinstall torch torchvision"
        yield Diagnosis(section, "torch", first_line(error), "broken", remedy, ResourceError.exit_code)
        return
    threads = torch.get_num_threads()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    given = os.environ.get("OMP_NUM_THREADS")
    source = f" (OMP_NUM_THREADS={given})" if given else ""
    yield Diagnosis(section, "cpu", f"cores usable: {cores}, threads of torch: {threads}{source}")
    yield Diagnosis(section, "memory", _memory())
    yield Diagnosis(section, "kernels", str(torch.backends.cpu.get_cpu_capability()))
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            card = torch.cuda.get_device_properties(index)
            text = (
                f"{card.name}, {card.total_memory / 1e9:.0f} GB, compute capability {card.major}.{card.minor}"
            )
            yield Diagnosis(section, f"cuda:{index}", text)
    else:
        built = torch.version.cuda or torch.version.hip
        reason = "torch sees no GPU" if built else "this torch is built for CPUs"
        yield Diagnosis(section, "cuda", f"{reason}; --device auto uses the CPU", "absent")
    if torch.backends.mps.is_available():
        yield Diagnosis(section, "mps", "there is one, but it lacks float64; --device auto uses the CPU")
    if device != "auto":
        yield _device(device)


def _device(name: str) -> Diagnosis:
    from gm_probe.runtime.devices import pick_device

    try:
        return Diagnosis("machine", f"--device {name}", str(pick_device(name)))
    except ProbeError as error:
        text, _, remedy = str(error).rpartition("; ")
        return Diagnosis("machine", f"--device {name}", text, "broken", remedy, error.exit_code)


def _memory() -> str:
    try:
        page, sysconf = os.sysconf("SC_PAGE_SIZE"), os.sysconf
        total, free = page * sysconf("SC_PHYS_PAGES"), page * sysconf("SC_AVPHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # Windows, some containers
        return "unknown on this system"
    return f"{total / 1e9:.1f} GB, {free / 1e9:.1f} GB of it free"


def _data(root: Path | None) -> Iterator[Diagnosis]:
    yield Diagnosis("data", "digits", "bundled with scikit-learn")
    try:
        root = root or default_data_root()
    except UsageError as error:
        text, _, remedy = str(error).rpartition("; ")
        yield Diagnosis("data", "others", text, "absent", remedy)
        return
    for name, entry in DATA.items():
        path = root / entry
        if _exists(path):
            yield Diagnosis("data", name, f"{path} (not checked for completeness)")
        else:
            remedy = "--download, or --data-root where it is"
            yield Diagnosis("data", name, f"not in {root}", "absent", remedy)


def _folder(folder: Path) -> Iterator[Diagnosis]:
    section, code = f"folder {folder}", StorageError.exit_code
    try:
        home = _nearest(folder)
        if not home.is_dir():
            yield Diagnosis(section, "writing", f"{home} is a file", "broken", "--out another folder", code)
            return
        yield Diagnosis(section, "free space", f"{shutil.disk_usage(home).free / 1e9:,.1f} GB")
        with tempfile.TemporaryDirectory(prefix=".gmprobe-doctor-", dir=home) as trial:
            write_atomic(Path(trial) / "piece", b"")
            yield Diagnosis(section, "writing", "works")
            yield _locks(section, Path(trial))
    except (OSError, StorageError) as error:
        text = (error.strerror if isinstance(error, OSError) else None) or first_line(error)
        yield Diagnosis(section, "writing", text, "broken", "--out another folder", code)


def _exists(path: Path) -> bool:
    """Return whether ``path`` exists; False where it may not be looked at."""
    try:
        return path.exists()
    except OSError:
        return False


def _nearest(path: Path) -> Path:
    """Return ``path``, or the nearest folder above it that exists."""
    return next(folder for folder in (path.absolute(), *path.absolute().parents) if folder.exists())


def _locks(section: str, folder: Path) -> Diagnosis:
    """Whether a second holder is turned away; without that two processes may train one run."""
    with exclusive(folder):
        try:
            with exclusive(folder):
                text = "do not work here: start one gmprobe at a time on this folder"
                return Diagnosis(section, "locks", text, "absent", "--out a folder on a local disk")
        except BusyError:
            return Diagnosis(
                section, "locks", "work here: two processes on this machine will not train the same run"
            )
