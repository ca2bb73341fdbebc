"""Paths as arguments and options."""

from pathlib import Path

import click

PATH = click.Path(path_type=Path, readable=False)
"""Any path: that it cannot be read is said where it is read, with the exit code of what it should have been."""
