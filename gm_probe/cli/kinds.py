"""Kinds of values that arguments and options take."""

from pathlib import Path
from typing import Any

import click

from gm_probe.core.errors import did_you_mean

PATH = click.Path(path_type=Path, readable=False)
"""Any path: that it cannot be read is said where it is read, with the exit code of what it should have been."""


class Choice(click.Choice[str]):
    """One of a few words, the nearest of which an error names."""

    def get_invalid_choice_message(self, value: Any, ctx: click.Context | None) -> str:
        every = ", ".join(self.choices)
        return f"no {value!r}; {did_you_mean(value, self.choices, f'choose from {every}')}"
