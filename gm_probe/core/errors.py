"""The errors that gm_probe raises on purpose. Each message names the offender and the remedy in one line."""

import difflib
import unicodedata
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager


class ProbeError(Exception):
    """Base of every deliberate error; ``exit_code`` is what the command line returns."""

    exit_code = 1


class UsageError(ProbeError):
    """An option, setting or argument that cannot be used as given."""

    exit_code = 2


class DerivativeError(UsageError):
    """A derivative beyond the gradient that a model lacks or misstates; measures that do without can be taken."""


class PrecisionError(UsageError):
    """A perturbation that the weights' dtype cannot resolve; other measures can be taken."""


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
    """Raise what ``told`` makes of the cause's first line where a stranger's code, a model say, fails within.

    Deliberate errors and memory that runs out are none of its own.
    """
    try:
        yield
    except ProbeError:
        raise
    except Exception as error:
        if out_of_memory(error):
            raise
        raise told(first_line(error)) from error


def first_line(error: BaseException) -> str:
    """The first line of a foreign error's text, or its kind where it has none."""
    return (str(error).splitlines() or [type(error).__name__])[0]


OUT_OF_MEMORY = ("out of memory", "can't allocate", "cannot allocate memory", "failed to map segment")


def out_of_memory(error: BaseException) -> bool:
    """Whether ``error`` says that memory ran out: Python's, torch's on a GPU, its CPU allocator's, or the loader's."""
    text = str(error).lower()
    return isinstance(error, MemoryError) or any(sign in text for sign in OUT_OF_MEMORY)


def printable(text: str) -> str:
    """Return ``text`` as one line that cannot steer a terminal: control characters and bidi marks become escapes.

    Joiners stay, of which scripts and emoji are made, and spaces of any width.
    """
    if text.isprintable():
        return text
    return "".join(c if _shows(c) else c.encode("unicode_escape").decode() for c in text)


def _shows(character: str) -> bool:
    return character.isprintable() or character in "\u200c\u200d" or unicodedata.category(character) == "Zs"


def did_you_mean(name: object, known: Collection[str], otherwise: str | None = None) -> str:
    """The nearest of ``known`` as a question; ``otherwise``, or the whole list, where none is near."""
    close = difflib.get_close_matches(str(name), known, n=1)
    if close:
        return f"did you mean {close[0]!r}?"
    return otherwise or f"there are: {', '.join(known) or 'none'}"
