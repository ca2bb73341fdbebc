"""The errors that gm_probe raises on purpose. Each message names the offender and the remedy in one line."""


class ProbeError(Exception):
    """Base of every deliberate error; ``exit_code`` is what the command line returns."""

    exit_code = 1


class UsageError(ProbeError):
    """An option, setting or argument that cannot be used as given."""

    exit_code = 2


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


def first_line(error: BaseException) -> str:
    """The first line of a foreign error's text, or its kind where it has none."""
    return (str(error).splitlines() or [type(error).__name__])[0]
