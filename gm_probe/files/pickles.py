"""The one place that unpickles: torch files by ``weights_only``, which bounds what they hold, but not how much."""

from __future__ import annotations

import io
import pickletools
import tarfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import torch

from gm_probe.errors import CheckpointError
from gm_probe.files.regular import open_to_read
from gm_probe.files.state_dicts import entries
from gm_probe.files.torch_zip import BEGINNING, read_records

LEGACY = 5
"""Consecutive pickles at the start of torch's format before 1.6: three headers, the content, the storages' keys."""
PARTS = 10**6
"""No checkpoint needs a tuple of more parts; a part that is in it several times counts each time."""


BESIDE = (
    "argparse.Namespace",
    *(
        f"pathlib.{inner}{kind}Path"
        for inner in ("", "_local.")
        for kind in ("Posix", "Windows", "PurePosix")
    ),
    *(f"datetime.{kind}" for kind in ("datetime", "date", "timedelta")),
    *(f"numpy.{core}.multiarray.{made}" for core in ("core", "_core") for made in ("scalar", "_reconstruct")),
    "numpy.dtype",
    "numpy.ndarray",
)
"""Classes of settings and records that training code keeps beside weights."""


class _Passed:
    """What stands for an object of ``BESIDE``: it keeps nothing of what it is made of, and runs none of its code."""

    def __new__(cls, *_: Any, **__: Any) -> _Passed:
        return super().__new__(cls)

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def __setstate__(self, _: Any) -> None: ...


@contextmanager
def passing_over() -> Iterator[None]:
    """Within, ``load_torch`` puts an empty object in the place of what ``BESIDE`` lists, which it refuses elsewhere."""
    with torch.serialization.safe_globals([(_Passed, name) for name in BESIDE]):
        yield


def load_torch(path: Path) -> Any:
    """Return what a torch file holds, with tensors on the CPU and a plain dict at its top.

    Raises:
        CheckpointError: it would take far more memory or time than its size says.
        Exception: whatever torch and the unpickler raise on a broken file, or on one that holds code.
    """
    with warnings.catch_warnings(
        action="ignore"
    ):  # about odd formats, which callers refuse with their own message
        check_unpacking(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    return entries(content) if isinstance(content, dict) else content


def check_unpacking(path: Path) -> None:
    """Refuse a torch file that would take far more memory or time than its size says, before torch reads it.

    Raises:
        CheckpointError: it is a zip file otherwise than torch.save writes it; a record has a wrong checksum, which
            torch does not look at; or its pickle is made to explode.
        Exception: whatever pickletools raises on a broken file.
    """
    with open_to_read(path, follow=True) as file:
        beginning = file.read(len(BEGINNING))
        if beginning == BEGINNING:
            for record in read_records(path, file):
                if record.name.lower().endswith(b"/data.pkl"):
                    _check_pickle(path, io.BytesIO(b"".join(record.blocks(file))))
            return
        if _is_tar(path):
            raise CheckpointError(
                f"{path} is a tar file, of torch before 0.1.10; save it again with torch.save"
            )
        file.seek(0)
        for _ in range(LEGACY):
            _check_pickle(path, file)


def _is_tar(path: Path) -> bool:
    """Return whether torch would unpack it as its oldest format, before it looks for a pickle."""
    try:
        tarfile.open(path, mode="r:").close()
    except tarfile.TarError:
        return False
    return True


def _check_pickle(path: Path, file: IO[bytes]) -> None:
    """Follow a pickle's operations with numbers in place of values: of a tuple its parts, of all else 1.

    Raises:
        CheckpointError: it calls bytearray, which fills any memory it is told to, or nests a tuple in itself until
            its hash takes for ever.
    """
    stack: list[int | None] = []  # None = a mark
    memo: dict[int, int | None] = {}
    for operation, argument, _ in pickletools.genops(file):
        name = operation.name
        if name == "GLOBAL" and str(argument).endswith(" bytearray"):
            raise CheckpointError(f"{path} holds a bytearray, whose size is not limited. Save tensors only")
        if "PUT" in name:
            memo[int(str(argument))] = stack[-1]
            continue
        if name == "MEMOIZE":
            memo[len(memo)] = stack[-1]
            continue
        if "GET" in name:
            stack.append(memo[int(str(argument))])
            continue
        taken: list[int | None] = []
        before = list(operation.stack_before)
        if pickletools.markobject in before:
            while (value := stack.pop()) is not None:
                taken.append(value)
            before = before[: before.index(pickletools.markobject)]
        for _ in before:
            taken.append(stack.pop())
        parts = 1 + sum(value or 0 for value in taken) if "TUPLE" in name else 1
        if parts > PARTS:
            raise CheckpointError(f"{path} nests a tuple in itself {PARTS:,} times. Save tensors only")
        for after in operation.stack_after:
            stack.append(None if after is pickletools.markobject else parts)
