"""Where a report's figures come from: versions, machines, settings of the measurement, and the runs' commands."""

import platform
import shlex
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from gm_probe.runs.records import RunRecord, read_run
from gm_probe.tables.sources import holds_our_runs
from gm_probe.tables.table import RunTable, show

PACKAGES = ("gm_probe", "numpy", "scipy", "pandas", "matplotlib", "jinja2")


@dataclass(frozen=True, slots=True)
class Provenance:
    """Of the runs in a table: how often each value was recorded under each name, and the commands, run by run.

    ``trained`` is the machine and its software at training, ``measured`` every setting of the measurement.
    All are empty for a table that was read from a file.
    """

    trained: Mapping[str, Mapping[str, int]]
    measured: Mapping[str, Mapping[str, int]]
    commands: Mapping[str, str]


def read_records(table: RunTable) -> dict[str, RunRecord]:
    """Return the records behind a table of run folders, by their names in the table; none for any other table.

    Raises:
        StorageError: a run's file has become unreadable since the table was read.
    """
    if not holds_our_runs(table.source):
        return {}
    return {run: read_run(run_folder(table, run)) for run in table.frame["run"]}


def run_folder(table: RunTable, run: str) -> Path:
    """Return the folder of ``run``: below the table's source, or the source itself where that is the one run."""
    folder = table.source / run
    return folder if folder.is_dir() else table.source


def provenance(records: Mapping[str, RunRecord]) -> Provenance:
    """Return what ``records`` say of their origin."""
    return Provenance(
        trained=_counts(record.config.get("environment", {}) for record in records.values()),
        measured=_counts(record.settings for record in records.values()),
        commands={run: train_command(one.config, one.path) for run, one in records.items() if one.config},
    )


def train_command(settings: Mapping[str, Any], out: Path | None = None) -> str:
    """Return the ``gmprobe train`` command with these ``settings``, as config.toml has them, as options."""
    words = ["gmprobe", "train"]
    for key, value in settings.items():
        option = f"--{key.replace('_', '-')}"
        if isinstance(value, dict) or value is False or value == []:
            continue  # [environment] is no setting; a flag that is off and an empty list are left out
        if value is True:
            words.append(option)
        else:
            text = ",".join(map(show, value)) if isinstance(value, list) else show(value)
            words.append(f"{option}={text}")
    return shlex.join(words + ([] if out is None else [f"--out={out.as_posix()}"]))


def versions() -> dict[str, str]:
    """Return the versions of the software that made the report."""
    return {"python": platform.python_version()} | {name: version(name) for name in PACKAGES}


def _counts(tables: Iterable[Any]) -> dict[str, dict[str, int]]:
    found: dict[str, Counter[str]] = {}
    for each in filter(lambda table: isinstance(table, dict), tables):
        for key, value in each.items():
            found.setdefault(key, Counter())[show(value)] += 1
    return {key: dict(counter.most_common()) for key, counter in found.items()}
