"""`gmprobe` in this process: how a test runs a command line."""

import shlex
from collections.abc import Sequence

import pytest

from gm_probe.cli import main


def exit_code(words: Sequence[object]) -> int:
    """Return the code that `gmprobe WORDS` exits with."""
    try:
        main(list(map(str, words)))
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


def run(command: str | Sequence[object], capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    """Return exit code, stdout and stderr of a command line; a text is split as by a shell, and begins with gmprobe."""
    words = shlex.split(command)[1:] if isinstance(command, str) else command
    capsys.readouterr()
    code = exit_code(words)
    return code, *capsys.readouterr()
