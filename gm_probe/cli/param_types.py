"""The types of values that arguments and options take."""

import math
import re
from pathlib import Path
from typing import Any

import click

from gm_probe.errors import UsageError, did_you_mean

SEED = click.IntRange(0, 2**32 - 1)
AT_ONCE = click.IntRange(1, 1024)
"""Threads or processes of one machine."""
PATH = click.Path(path_type=Path, readable=False)
"""Any path. The code that reads it reports errors, with the exit code of what should be there."""


class Choice(click.Choice[str]):
    """One of a few words, the nearest of which an error names."""

    def get_invalid_choice_message(self, value: Any, ctx: click.Context | None) -> str:
        every = ", ".join(self.choices)
        return f"no {value!r}; {did_you_mean(value, self.choices, f'choose from {every}')}"


def split(text: str) -> list[str]:
    """Return the names of a comma-separated list."""
    return [name.strip() for name in text.split(",") if name.strip()]


def floats(option: str, text: str) -> tuple[float, ...]:
    """Return comma-separated numbers."""
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError as error:
        raise UsageError(f"{option} {text!r} must be comma-separated numbers") from error


def wholes(option: str, text: str) -> tuple[int, ...]:
    """Return comma-separated whole numbers."""
    values = floats(option, text)
    for value in values:
        if not value.is_integer():  # nan and inf are none either
            raise UsageError(f"{option} takes whole numbers, not {value:g}")
    return tuple(map(int, values))


def num_bytes(option: str, text: str) -> float:
    """Return ``4GB`` as bytes; units are powers of 1,000."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kMGT]?)B?\s*", text)
    if match is None or not float(match[1]):
        raise UsageError(f"{option} {text!r} must be a size such as 4GB or 500MB")
    return float(match[1]) * 1000.0 ** ["", "k", "M", "G", "T"].index(match[2])


def share(option: str, text: str) -> float:
    """Return a relative error as a fraction: "2%" and "0.02" are the same."""
    number, is_percent = text.removesuffix("%"), text.endswith("%")
    try:
        value = float(number) / (100 if is_percent else 1)
    except ValueError:
        value = math.nan
    if not 0 < value < 1:
        raise UsageError(f"{option} {text!r} must lie between 0 and 100 %, such as 2%")
    return value
