"""Read runs into one RunTable, whatever holds them: run folders, trackers, files, a DataFrame."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd

from gm_probe.errors import DataError, StorageError, printable
from gm_probe.files.regular import open_to_read
from gm_probe.runs.records import CONFIG, SWEEP, RunRecord, find_runs, read_groups, read_run
from gm_probe.tables.expression import parse, split_expressions
from gm_probe.tables.numerals import NOTHING, Numbers, finite
from gm_probe.tables.readers import RawTable, read_raw_table, tidied
from gm_probe.tables.sources import holds_our_runs, require_source
from gm_probe.tables.spreadsheets import run_table
from gm_probe.tables.table import (
    BOOKKEEPING,
    GAPS,
    KNOWN_MEASURES,
    LARGEST,
    MISSED_STOP,
    MOST_MEASURES,
    MOST_SETTINGS,
    OUTCOMES,
    SEED,
    Exclusion,
    RunTable,
    TableRequest,
    by_reason,
    missed_stop_note,
    require_distinct,
    require_few,
    require_known,
    show,
    unique,
)

# What a measure's value depends on besides the run, in the settings of measures.json or in the measure's own row.
# Whether pixels were normalised, not by what: that is the training data's own.
PROBE_SETTINGS = (
    *("data", "data_sha256", "part", "num_examples", "max_examples", "dtype", "params", "normalized"),
    *("head", "temperature", "batch_images"),
)
ASCENT_SETTINGS = ("rho", "k_steps", "noise_scale", "num_starts")
OWN_SETTINGS = {
    "average_inconsistency": ("rho", "num_starts"),
    "local_inconsistency_adaptive": (*ASCENT_SETTINGS, "eta"),
    "local_inconsistency_batchwise": (*ASCENT_SETTINGS, "sub_batch"),
}
ROW_SETTINGS = ("protocol", "labels")
MOST_OF_ONE = 200
"""Most settings of one run; gmprobe's own are about 60."""
FRAME = Path("DataFrame")
"""What messages call a table that is no file."""
NOT_MEASURED = {"value": None, "reason": "not measured"}


def load_table(
    source: Path | pd.DataFrame,
    measures: Sequence[str] = (),
    hyperparameters: Sequence[str] = (),
    group_by: Sequence[str] = (),
    *,
    gap: str = "both",
    seed_column: str = "",
    converged_only: bool = False,
) -> RunTable:
    """Read ``source``: a folder of runs of gmprobe or a tracker, a file with one run per row, or such a DataFrame.

    Empty ``measures`` takes every measure of the run folders; of others, all numeric columns but gaps, outcomes,
    settings and identifiers. Empty ``hyperparameters`` takes the settings that vary over the run folders; of others,
    the columns that bear a setting's name, or that a tracker calls settings and that vary. ``group_by`` columns always
    count as hyperparameters. ``gap`` is ``both``, or targets separated by commas: ``error_gap``, ``ce_gap``, outcomes,
    columns, arithmetic on columns. A table without a gap has one made of its errors, accuracies or losses, which a
    note says. ``seed_column`` tells which runs share a seed (``seed``). ``converged_only`` leaves out runs whose
    training ended before it reached its ``stop_ce``; without it they stay, and a note counts them. A file that
    `gmprobe collect` wrote says which, and which runs did not finish.

    Raises:
        UsageError: ``source`` is neither, or a column that was asked for is not there or has another role; or
            ``converged_only`` of a file that does not say; or ``gap`` is no arithmetic on columns.
        DataError: no gap, no measure, no usable run, a duplicated column, or text where a number belongs.
        StorageError: the file cannot be read.
    """
    asked = TableRequest(measures, hyperparameters, group_by, gap, seed_column, converged_only)
    if isinstance(source, pd.DataFrame):
        numbered = source.index.names == [None] and source.index.inferred_type == "integer"
        cells = source.copy() if numbered else source.reset_index(allow_duplicates=True)
        return run_table(FRAME, tidied(FRAME, RawTable(cells)), asked)
    require_source(source)
    if holds_our_runs(source):
        return _table_from_folders(source, asked)
    if not source.is_dir():
        try:
            open_to_read(source, follow=True).close()
        except OSError as error:
            raise StorageError(f"cannot read {source}: {error.strerror or error}") from error
    return run_table(source, read_raw_table(source), asked)


def recipe_groups(source: Path) -> list[str]:
    """Return the settings by which the recipe of the sweep folder ``source`` groups; none of any other source.

    Raises:
        StorageError: its sweep.json is broken.
    """
    return read_groups(source) if (source / SWEEP).is_file() else []


def _table_from_folders(root: Path, asked: TableRequest) -> RunTable:
    kept, excluded = _read_folders(root, asked.converged_only)
    records = list(kept.values())
    found = unique(name for record in records for name in record.measures)
    require_known(asked.measures, found, "measure")
    chosen = unique(asked.measures) or sorted(found, key=_rank)
    require_few(chosen, MOST_MEASURES, root, "measures", "--measures")
    configs = [_flatten(record.config) for record in records]
    settings = unique(name for config in configs for name in config)
    seed = asked.seed_column or SEED
    require_known(
        [*asked.hyperparameters, *asked.group_by, *([asked.seed_column] if asked.seed_column else [])],
        settings,
        "setting in any config.toml named",
    )
    varying = [
        name
        for name in settings
        if name not in {*BOOKKEEPING, seed} and len({config.get(name) for config in configs}) > 1
    ]
    hypers = unique([*(asked.hyperparameters or varying), *asked.group_by])
    require_few(hypers, MOST_SETTINGS, root, "settings that vary", "--hyper")
    gaps, directions = _gaps(records, configs, asked.gap)
    if not gaps:
        raise DataError(
            f"no summary.json in {root} has error_gap or ce_gap (SimCLR encoders have neither). Train the runs again"
        )
    require_distinct([*gaps], chosen, hypers)

    measured = {name: _MeasureColumn.of(name, records) for name in chosen}
    numbers = gaps | {name: each.numbers for name, each in measured.items()}
    columns = {"run": pd.Series(list(kept))} | {name: each.values for name, each in numbers.items()}
    columns |= {name: pd.Series([c.get(name) for c in configs], dtype=object) for name in hypers}
    if seed in settings:
        columns[SEED] = pd.Series([config.get(seed) for config in configs], dtype=object)
    outcomes = [
        name for name in OUTCOMES if name not in columns and any(name in record.summary for record in records)
    ]
    columns |= {name: _numbers([record.summary.get(name) for record in records]).values for name in outcomes}
    told = [] if asked.hyperparameters else [f"hyperparameters that vary: {', '.join(varying) or 'none'}"]
    told += missed_stop_note(sum(record.missed_stop for record in records), len(records))
    return RunTable(
        source=root,
        frame=pd.DataFrame(columns),
        gaps=tuple(gaps),
        measures=tuple(chosen),
        hyperparameters=tuple(hypers),
        excluded=tuple(excluded),
        missing={name: each.missing for name, each in numbers.items()},
        unconverged={name: each.unconverged for name, each in measured.items()},
        conditions={name: each.conditions for name, each in measured.items()},
        notes=tuple(told),
        outcomes=tuple(outcomes),
        directions=directions,
    )


@dataclass(frozen=True, slots=True)
class _MeasureColumn:
    """One measure over the runs: its values, and how they were taken (``RunTable``)."""

    numbers: Numbers
    unconverged: frozenset[int]
    conditions: dict[str, Counter[str]]

    @classmethod
    def of(cls, name: str, records: Sequence[RunRecord]) -> "_MeasureColumn":
        rows = [record.measures.get(name, NOT_MEASURED) for record in records]
        found = _numbers([row.get("value") for row in rows])
        missing = {
            i: printable(str(rows[i].get("reason") or "no value and no reason recorded"))
            if why == NOTHING
            else why
            for i, why in found.missing.items()
        }
        here = [i for i in range(len(rows)) if i not in missing]
        return cls(
            replace(found, missing=missing),
            frozenset(i for i in here if rows[i].get("converged") is False),
            _conditions(name, [records[i].settings for i in here], [rows[i] for i in here]),
        )


def _read_folders(root: Path, converged_only: bool) -> tuple[dict[str, RunRecord], list[Exclusion]]:
    """Return finished and measured runs by their path below ``root``, and the other runs with the reason."""
    kept: dict[str, RunRecord] = {}
    excluded: list[Exclusion] = []
    for path in find_runs(root):
        run = path.relative_to(root).as_posix() if path != root else root.resolve().name
        if printable(run) != run:
            excluded.append(Exclusion(printable(run), "its name has unprintable characters"))
            continue
        try:
            record = read_run(path)
            reason = _unusable(record)
            if reason is None and converged_only and record.missed_stop:
                reason = MISSED_STOP
        except StorageError as error:  # one torn file must not hide the other runs
            excluded.append(Exclusion(run, str(error)))
            continue
        if reason is None:
            kept[run] = record
        else:
            excluded.append(Exclusion(run, reason))
    for run, reason in _clashing(kept).items():
        del kept[run]
        excluded.append(Exclusion(run, reason))
    if not kept:
        reasons = "; ".join(f"{len(runs)} × {reason}" for reason, runs in by_reason(excluded).items())
        raise DataError(
            f"no usable run in {root} ({reasons}); finish them with `gmprobe train --resume` and measure them"
        )
    return kept, excluded


def _unusable(record: RunRecord) -> str | None:
    if record.status != "finished":
        return record.status
    if len(_flatten(record.config)) > MOST_OF_ONE:
        return f"{CONFIG} has more than {MOST_OF_ONE} settings"
    return None if record.measures else "not measured"


def _clashing(records: Mapping[str, RunRecord]) -> dict[str, str]:
    """Return the runs, with the reason, that call a measure what most runs call a setting, or the reverse."""
    measured: dict[str, list[str]] = {}
    configured: dict[str, list[str]] = {}
    for run, record in records.items():
        for names, found in ((record.measures, measured), (_flatten(record.config), configured)):
            for name in names:
                found.setdefault(name, []).append(run)
    reasons: dict[str, str] = {}
    for name in sorted(set(measured) & set(configured)):
        roles = (measured[name], "measure", "setting"), (configured[name], "setting", "measure")
        fewer = min(roles, key=lambda role: len(role[0]))
        for run in fewer[0]:
            reasons.setdefault(run, f"its {fewer[1]} {show(name)} has the same name as a {fewer[2]}")
    return reasons


def _rank(name: str) -> tuple[int, str]:
    """Sort known measures in their usual order, then the others by name."""
    known = name in KNOWN_MEASURES
    return (KNOWN_MEASURES.index(name), "") if known else (len(KNOWN_MEASURES), name)


def _flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, bool | int | float | str]:
    """Return settings as one level of ``table.key`` names; the machine's [environment] is no setting."""
    flat: dict[str, bool | int | float | str] = {}
    for key, value in config.items():
        if isinstance(value, dict):
            flat |= {} if key == "environment" else _flatten(value, f"{prefix}{key}.")
        else:
            usable = abs(value) <= LARGEST if isinstance(value, int | float) else isinstance(value, str)
            flat[prefix + key] = value if usable else str(value)  # NaN is not equal to itself
    return flat


def _conditions(
    name: str, settings: Sequence[Mapping[str, Any]], rows: Sequence[Mapping[str, Any]]
) -> dict[str, Counter[str]]:
    """Count the runs that took the measure ``name`` with each value of each setting that it depends on."""
    ascent = ASCENT_SETTINGS if name.startswith("local_inconsistency") else ()
    own = OWN_SETTINGS.get(name, ascent)
    known = [{"normalized": bool(each["mean"]), **each} if "mean" in each else each for each in settings]
    counts = {key: Counter(show(each.get(key)) for each in known) for key in (*own, *PROBE_SETTINGS)}
    return counts | {key: Counter(show(row.get(key)) for row in rows) for key in ROW_SETTINGS}


def _gaps(
    records: Sequence[RunRecord], configs: Sequence[Mapping[str, Any]], asked: str
) -> tuple[dict[str, Numbers], dict[str, str | None]]:
    """Return the gaps of the summaries, or the arithmetic that is ``asked`` for on summaries and settings, with its
    directions."""
    rows = [{**config, **record.summary} for config, record in zip(configs, records, strict=True)]
    names = unique(name for row in rows for name, value in row.items() if isinstance(value, int | float))
    known = {name: _numbers([row.get(name) for row in rows]) for name in names}
    wanted = split_expressions(asked, names)
    if not {*GAPS, "both"}.issuperset(wanted):
        made = {text: parse(text, names) for text in wanted}
        return {text: one.of(known) for text, one in made.items()}, {
            text: one.direction for text, one in made.items()
        }
    found = {
        gap: known.get(gap) or _numbers([None] * len(rows)) for gap in GAPS if any(gap in row for row in rows)
    }
    return {
        gap: replace(numbers, missing={
            i: f"no {gap} in summary.json" if why == NOTHING else why for i, why in numbers.missing.items()})
        for gap, numbers in found.items()
    }, {}  # fmt: skip


def _numbers(values: Sequence[Any]) -> Numbers:
    """Return ``values`` as floats; those that are no numbers are missing."""
    return finite([value if isinstance(value, int | float) else math.nan for value in values])
