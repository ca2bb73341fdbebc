"""The errors that gm_probe raises on purpose. Each message names the offender and the remedy in one line."""

import difflib
import re
import unicodedata
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager


class ProbeError(Exception):
    """Base of every deliberate error; ``exit_code`` is what the command line returns."""

    exit_code = 1


class UsageError(ProbeError):
    """An option, setting or argument that cannot be used as given."""

    exit_code = 2


class NotInstalledError(UsageError):
    """A library that an option or a model needs is missing."""


class DerivativeError(UsageError):
    """A derivative beyond the gradient that a model lacks or misstates; measures that do without can be taken."""


class PrecisionError(UsageError):
    """A perturbation that the weights' dtype cannot resolve; other measures can be taken."""


class DeviceError(UsageError):
    """Tensors on two devices in one operation."""


class CheckpointError(ProbeError):
    """A checkpoint that cannot be read, does not fit its model, or holds unusable weights."""

    exit_code = 3


class DataError(ProbeError):
    """Data that cannot be read or does not fit the model or the question."""

    exit_code = 4


class DivergedError(ProbeError):
    """A training or measurement whose numbers stopped being finite."""

    exit_code = 5


class ResourceError(ProbeError):
    """Not enough memory or no such device."""

    exit_code = 6


class StorageError(ProbeError):
    """A file or folder that cannot be written or read."""

    exit_code = 7


class BusyError(StorageError):
    """A run folder that another process is working on."""


@contextmanager
def foreign_or(told: Callable[[str], ProbeError]) -> Iterator[None]:
    """Raise what ``told`` makes of the cause's first line where somebody else's code, such as a model, fails within.

    Deliberate errors, and those about the machine, pass unchanged.

    Raises:
        DeviceError: tensors met on two devices.
    """
    try:
        with one_device():
            yield
    except ProbeError:
        raise
    except Exception as error:
        if out_of_memory(error):
            raise
        raise told(first_line(error)) from error


@contextmanager
def needs(what: str, library: str, extra: str) -> Iterator[None]:
    """Raise NotInstalledError, which names gm_probe's ``extra``, where an import of ``library`` fails within."""
    try:
        yield
    except ImportError as error:
        raise NotInstalledError(
            f"{what} needs {library}, which is not installed; pip install 'gm_probe[{extra}]'"
        ) from error


def first_line(error: BaseException) -> str:
    """Return the first line of a foreign error's text, or its kind where it has none."""
    return (str(error).splitlines() or [type(error).__name__])[0]


_MEMORY = re.compile(
    r"""out[ _]of[ _](\w+[ _])?memory | _OUT_OF_RESOURCES | ErrorOutOfMemory | ErrorMemoryAllocation
    | (can't|cannot|can\ not|unable\ to|failed\ to)\ allocate | not\ enough\ memory | bad[ _]alloc
    | failed\ to\ map\ segment                              # the loader, of a library
    | ALLOC(ATION)?_FAILED                                  # cuBLAS, cuSOLVER, cuSPARSE, cuDNN, cuFFT, cuRAND
    | CUDNN_STATUS_INTERNAL_ERROR                           # a handle or a workspace that did not fit
    | CUBLAS_STATUS_NOT_INITIALIZED.*create                 # likewise
    | unable\ to\ find\ (an\ engine|a\ valid\ cudnn\ algorithm)  # none whose workspace fits
    | invalid\ buffer\ size                                  # MPS, of a tensor beyond its memory
    """,
    re.IGNORECASE | re.VERBOSE,
)
_DEVICES = re.compile(
    r"\b(same|different|two) devices?\b|\bis on \S+.* but expected|not on the expected device"
    r"|device type for generator|of device type"
    r"|placeholder storage",  # MPS, of a tensor that is on the CPU
    re.IGNORECASE,
)
_KINDS = re.compile(r"input type \((\S+)\) and (?:weight|bias) type \((\S+)\)", re.IGNORECASE)


def out_of_memory(error: BaseException) -> bool:
    """Return whether ``error`` says that memory ran out: Python's, a CPU's, or a GPU's in any library's words."""
    return isinstance(error, MemoryError) or _MEMORY.search(str(error)) is not None


def on_two_devices(error: BaseException) -> bool:
    """Return whether ``error`` says that an operation met tensors, or a generator, of two devices."""
    if isinstance(error, DeviceError):
        return True
    text = str(error)
    kinds = _KINDS.search(text)
    if (
        kinds is not None
    ):  # said of two dtypes, too: torch.cuda.FloatTensor and torch.FloatTensor differ in the device
        return _device_of(kinds[1]) != _device_of(kinds[2])
    return isinstance(error, RuntimeError) and _DEVICES.search(text) is not None


def _device_of(kind: str) -> str:
    """Return "torch.cuda" for torch.cuda.FloatTensor."""
    return kind.rpartition(".")[0]


def of_machine(error: BaseException) -> bool:
    """Return whether ``error`` is about the machine, so that whoever tries somebody else's code passes it on."""
    return out_of_memory(error) or on_two_devices(error)


@contextmanager
def one_device() -> Iterator[None]:
    """Raise DeviceError where an operation meets tensors of two devices within."""
    try:
        yield
    except RuntimeError as error:
        if not on_two_devices(error):
            raise
        raise DeviceError(
            f"tensors are on two devices ({first_line(error)}). Move the model, its inputs and the tensors "
            "that forward creates to one device"
        ) from error


@contextmanager
def memory_or(told: Callable[[str], str]) -> Iterator[None]:
    """Raise ResourceError with the text that ``told`` makes of the cause's, where memory runs out within."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        raise ResourceError(told(first_line(error))) from error


def printable(text: str) -> str:
    """Return ``text`` as one line that cannot steer a terminal: control characters and bidi marks become escapes.

    Joiners stay, of which scripts and emoji are made, and spaces of any width.
    """
    if text.isprintable():
        return text
    return "".join(c if _shows(c) else c.encode("unicode_escape").decode() for c in text)


def _shows(character: str) -> bool:
    return character.isprintable() or character in "\u200c\u200d" or unicodedata.category(character) == "Zs"


def start_of(text: object, most: int = 160) -> str:
    """Return the first characters of a text that somebody else chose, as one printable line."""
    return printable(" ".join(str(text).split()))[:most]


def first_three(names: Sequence[object]) -> str:
    """Return the first three of names that somebody else chose, safe to print."""
    return ", ".join(map(start_of, names[:3])) + (", …" if len(names) > 3 else "")


def listed(names: Sequence[str]) -> str:
    """Return names as a sentence lists them: a, b and c."""
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def did_you_mean(name: object, known: Collection[str], otherwise: str | None = None) -> str:
    """Return the nearest of ``known`` as a question; ``otherwise``, or the whole list, where none is near."""
    close = difflib.get_close_matches(str(name), known, n=1)
    if close:
        return f"did you mean {close[0]!r}?"
    return otherwise or f"available: {', '.join(known) or 'none'}"
