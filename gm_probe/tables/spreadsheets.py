"""Anybody's table of runs, one a row: which of its columns is the gap, a measure, a setting, a seed, a name."""

import math
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from gm_probe.errors import DataError, UsageError, printable
from gm_probe.tables.columns import (
    HELD_OUT,
    MET_STOP,
    NAMES,
    SUMMARIES,
    bare,
    called,
    is_given,
    is_setting,
    is_status,
    key,
    may_be_measure,
    unfinished,
)
from gm_probe.tables.expression import parse, split_expressions
from gm_probe.tables.histories import require_one_row_a_run
from gm_probe.tables.numerals import COMMA, NO_VALUE, NOTHING, Numbers, ambiguous, number, read_numbers
from gm_probe.tables.rates import as_fractions, errors_of_accuracies, require_differences
from gm_probe.tables.readers import RawTable
from gm_probe.tables.table import (
    GAPS,
    KNOWN_MEASURES,
    MISSED_STOP,
    MOST_MEASURES,
    MOST_SETTINGS,
    OUTCOMES,
    SEED,
    TOO_LARGE,
    Exclusion,
    RunTable,
    TableRequest,
    few,
    missed_stop_note,
    require_distinct,
    require_few,
    require_known,
    show,
    unique,
)

NO = ("false", "0", "0.0")
ROW = "\0row"
"""Name of the column that numbers the rows: no file has it."""
CONVERGED = "_has_converged"
"""What `gmprobe collect` adds to a measure's name for another column."""
DIFFERENCES = {
    "error_gap": [
        difference
        for part in HELD_OUT
        for difference in (f"{part}_error - train_error", f"train_accuracy - {part}_accuracy")
    ],
    "ce_gap": ["test_ce - train_ce"],
    "": [f"{part}_loss - train_loss" for part in HELD_OUT],
}
"""Ways to compute a gap that a table lacks, the best first; under "" those named by their expression."""


@dataclass(frozen=True, slots=True)
class _Table:
    """The runs that entered, by the names that the rest of the code knows.

    Attributes:
        raw: cells as they are written, and the row's number in ``ROW``.
        columns: the same as numbers.
        aliases: what the file calls a column, where this differs.
        written: the name of each column in the file.
    """

    source: Path
    raw: pd.DataFrame
    columns: dict[str, Numbers]
    aliases: dict[str, str]
    written: dict[str, str]

    def named(self, names: Sequence[str]) -> list[str]:
        found = [self.aliases.get(name, name) for name in names]
        require_known(found, self.columns, f"column in {self.source} named")
        return unique(found)


@dataclass(frozen=True, slots=True)
class _Roles:
    """Which columns are what; ``run`` names the runs."""

    measures: list[str]
    hypers: list[str]
    seeds: list[str]
    outcomes: list[str]
    left_out: list[str]
    run: str


def run_table(source: Path, raw_table: RawTable, asked: TableRequest) -> RunTable:
    """Give the columns of ``raw_table`` their roles; see ``runs.load_table`` for the choice of columns and runs.

    Raises:
        UsageError: a column that was asked for is not there or has another role; or ``converged_only``, and nothing
            says which runs converged.
        DataError: no gap, no measure, no usable row, or text where a number belongs.
    """
    new = called([str(name) for name in raw_table.cells.columns])
    aliases = _aliases(new)
    raw, excluded, notes = _finished(raw_table.cells.rename(columns=new), source, asked.converged_only)
    columns = read_numbers({str(name): raw[name].to_list() for name in raw if name != ROW})
    written = {name: old for old, name in new.items()}
    columns, units = as_fractions(columns, raw, source, written)
    table = _Table(source, raw, columns, aliases, written)
    chosen = table.named([*asked.hyperparameters, *asked.group_by, *asked.measures])
    require_one_row_a_run(source, raw, columns, written, chosen)
    gaps, made_of, told, directions = _gaps(table, asked)
    columns |= errors_of_accuracies(columns)
    require_differences(source, columns)
    roles = _roles(table, asked, gaps, made_of)
    used = [*gaps, *made_of, *roles.measures]
    _require_numbers(used, columns, raw[ROW], source)

    gone = {name: int(columns[name].values.isna().sum()) for name in roles.outcomes}
    lacking = [f"{name} is not a number in {num} of {len(raw)} runs" for name, num in gone.items() if num]
    frame = {"run": _names(raw, roles.run)}
    frame |= {name: columns[name].values for name in [*gaps, *roles.measures]}
    frame |= {name: _settings(columns[name], raw[name]) for name in roles.hypers}
    if roles.seeds:
        frame[SEED] = _settings(columns[roles.seeds[0]], raw[roles.seeds[0]])
    frame |= {name: columns[name].values for name in roles.outcomes}
    return RunTable(
        source=source,
        frame=pd.DataFrame(frame),
        gaps=tuple(gaps),
        measures=tuple(roles.measures),
        hyperparameters=tuple(roles.hypers),
        missing={name: columns[name].missing for name in [*gaps, *roles.measures]},
        excluded=excluded,
        notes=(
            *raw_table.notes,
            *_said(raw_table, columns, [*used, *roles.hypers]),
            *units,
            *told,
            *(() if asked.measures and asked.hyperparameters else (_chosen(roles, raw),)),
            *_odd_cells(roles.left_out, columns, raw[ROW]),
            *lacking,
            *notes,
        ),
        outcomes=tuple(roles.outcomes),
        aliases=aliases,
        left_out=tuple(roles.left_out),
        directions=directions,
    )


def _aliases(new: Mapping[str, str]) -> dict[str, str]:
    """Return what else columns may be called: their names in the file, and those without a tracker's prefix.

    Args:
        new: what each column of the file is called here.
    """
    short = Counter(map(bare, new))
    found = {old: name for old, name in new.items() if old != name}
    unprefixed = {bare(old): name for old, name in new.items() if short[bare(old)] == 1}
    return found | {old: name for old, name in unprefixed.items() if old not in new.values()}


def _roles(table: _Table, asked: TableRequest, gaps: list[str], made_of: list[str]) -> _Roles:
    raw, columns = table.raw, table.columns
    measures, hypers, by = (
        table.named(each) for each in (asked.measures, asked.hyperparameters, asked.group_by)
    )
    asked_seed = table.named([asked.seed_column]) if asked.seed_column else []
    seeds = asked_seed or [name for name in (SEED,) if name in columns and name not in measures]
    run = _name_column(raw, {*measures, *hypers, *by, *asked_seed})
    taken = {*gaps, *made_of, *asked_seed, run}
    hypers = unique([*(hypers or _hypers(table, {*measures, *taken})), *by])
    if asked_seed and SEED in hypers:
        raise UsageError(
            f"--seed-column {asked.seed_column}: {SEED!r} cannot be a hyperparameter then. Leave it out"
        )
    free = [name for name in columns if name in measures or name not in {*taken, *hypers}]
    chosen = measures or _measures(
        [name for name in free if not is_given(table.written.get(name, name))], columns
    )
    require_few(chosen, MOST_MEASURES, table.source, "columns to use as measures", "--measures")
    require_few(hypers, MOST_SETTINGS, table.source, "hyperparameters", "--hyper")
    if not chosen:
        raise DataError(
            f"{table.source} has no numeric column to use as a measure (--measures names one); "
            f"it has: {few([*columns])}"
        )
    require_distinct(gaps, chosen, hypers)
    outcomes = [
        name for name in OUTCOMES if name in columns and name not in {*gaps, *chosen, *hypers, *seeds}
    ]
    left_out = [name for name in free if name not in {*chosen, *outcomes, *seeds}]
    return _Roles(chosen, hypers, seeds, outcomes, left_out, run)


def _chosen(roles: _Roles, raw: pd.DataFrame) -> str:
    """Return in words which columns have which role; settings that never vary are not mentioned."""
    varying = [name for name in roles.hypers if raw[name].map(str).nunique() > 1]
    shown = {
        "measures": roles.measures,
        "hyperparameters": varying,
        "seeds": roles.seeds,
        "left out": roles.left_out,
    }
    return "; ".join(f"{role}: {few(names)}" for role, names in shown.items() if names)


def _hypers(table: _Table, taken: Collection[str]) -> list[str]:
    """Return columns with a setting's name, and those that a tracker calls settings and that vary."""
    found = []
    for name in table.columns:
        cells, old = table.raw.get(name), table.written.get(name, name)
        if name in taken or cells is None:
            continue
        num = cells.map(str).nunique()
        names_runs = bool(table.columns[name].text) and num == len(cells) > 2
        if is_setting(old) or (is_given(old) and num > 1 and not names_runs):
            found.append(name)
    return found


def _gaps(
    table: _Table, asked: TableRequest
) -> tuple[list[str], list[str], list[str], dict[str, str | None]]:
    """Return the gaps among the columns, the columns that made gaps consist of, what is said of them, and the
    directions of made gaps."""
    columns, names = table.columns, {*table.columns, *table.aliases}
    wanted = split_expressions(asked.gap, names)
    known = {*GAPS, "both"}.issuperset(wanted)
    found = [gap for gap in GAPS if gap in columns] if known else []
    made: dict[str, str] = {} if known else {table.aliases.get(text, text): text for text in wanted}
    for gap, ways in DIFFERENCES.items() if known and not found else ():
        way = next((way for way in ways if names.issuperset(way.split(" - "))), None)
        if way and (gap or not made):
            made[gap or way] = way
    if not found and not made:
        raise DataError(
            f"{table.source} has no column error_gap (test error − train error) or ce_gap; --gap 'A - B' makes one. "
            f"It has: {few([*columns])}"
        )
    used: list[str] = []
    directions = {}
    under = columns | {old: columns[new] for old, new in table.aliases.items()}
    for gap, text in made.items():
        expression = parse(text, names)
        columns.setdefault(gap, expression.of(under))
        directions[gap] = expression.direction
        used += table.named(expression.columns)
    said = [f"{gap} is {text.replace(' - ', ' − ')}" for gap, text in made.items() if gap != text]
    said += [f"gap: {gap}" for gap, text in made.items() if gap == text and known]
    return [*found, *made], [name for name in unique(used) if name not in made], said, directions


def _measures(free: Sequence[str], columns: Mapping[str, Numbers]) -> list[str]:
    """Return the measures taken by default: columns of numbers that differ and may be measures, the known ones first.

    In a table of `gmprobe collect` what stands before the first measure is a setting or an outcome.
    """
    ours = [place for place, name in enumerate(free) if name + CONVERGED in columns]
    known = [name for name in KNOWN_MEASURES if name in free]
    held = [
        name
        for name in free[min(ours, default=0) :]
        if name not in known
        and may_be_measure(name)
        and not columns[name].text
        and columns[name].values.notna().any()
    ]
    return known + ([name for name in held if columns[name].values.nunique() > 1] or ([] if known else held))


def _odd_cells(left_out: Sequence[str], columns: Mapping[str, Numbers], places: pd.Series) -> list[str]:
    """Return a note on columns that would be measures but for a few cells."""
    found = []
    for name in left_out:
        text = columns[name].text
        if may_be_measure(name) and 0 < len(text) < columns[name].values.notna().sum():
            row, cell = next(iter(text.items()))
            found.append(
                f"{name} ({len(text)} such cells, the first {printable(cell[:40])!r} in row {int(places.iloc[row])})"
            )
    return [f"left out because some cells are no numbers: {few(found, 3)}"] if found else []


def _require_numbers(
    names: Sequence[str], columns: Mapping[str, Numbers], places: pd.Series, source: Path
) -> None:
    for name in names:
        for row, cell in columns[name].text.items():
            remedy = "which is not a number"
            if ambiguous(cell):
                remedy = "whose comma may mark decimals or thousands. Write it with a decimal point"
            raise DataError(f"{source} column {name!r} row {int(places.iloc[row])} holds {cell!r}, {remedy}")


def _said(raw_table: RawTable, columns: Mapping[str, Numbers], used: Sequence[str]) -> list[str]:
    """Return in words how the table is written; nothing for plain CSV."""
    commas = unique(name for name in used if columns[name].decimal == COMMA)
    written = [*raw_table.written, *([f"with decimal commas in {few(commas)}"] if commas else [])]
    return [f"the table was read {', '.join(written)}"] if written else []


def _finished(
    raw: pd.DataFrame, source: Path, converged_only: bool
) -> tuple[pd.DataFrame, tuple[Exclusion, ...], list[str]]:
    """Return the rows that enter, with their number in ``ROW``, the other runs, and a note on missed stops."""
    raw = raw.assign(**{ROW: range(1, len(raw) + 1)})
    names = _names(raw, _name_column(raw, ()))
    reasons = dict.fromkeys(_sums(raw), "sums up other rows")
    for name in filter(is_status, raw.columns):
        reasons |= unfinished(raw[name].to_list())
    if converged_only and MET_STOP not in raw:
        raise UsageError(
            f"--converged-only: {source} has no column {MET_STOP}, so it does not say which runs "
            "converged. Give run folders, or a table that `gmprobe collect` wrote"
        )
    missed = []
    if MET_STOP in raw:
        missed = [
            row
            for row, met in enumerate(raw[MET_STOP])
            if str(met).strip().lower() in NO and row not in reasons
        ]
    if converged_only:
        reasons |= dict.fromkeys(missed, MISSED_STOP)
    kept = raw.drop(index=list(reasons)).reset_index(drop=True)
    if kept.empty:
        raise DataError(f"no run of {source} is usable: {', '.join(dict.fromkeys(reasons.values()))}")
    excluded = tuple(Exclusion(names[row], reason) for row, reason in reasons.items())
    return kept, excluded, [] if converged_only else missed_stop_note(len(missed), len(kept))


def _sums(raw: pd.DataFrame) -> list[int]:
    """Return the rows that a name calls a mean or the like, or the first cell of the last rows, below numbers."""
    found: dict[int, None] = {}
    for place, name in enumerate(raw.columns[:-1]):
        cells = raw[name].map(lambda cell: str(cell).strip())
        sums = cells.map(key).isin(SUMMARIES)
        labels = key(name) in {*NAMES, "", "index", "unnamed:_0"}
        last = (
            place == 0
            and sums.is_monotonic_increasing
            and not (sums.all() or cells[~sums].map(number).isna().any())
        )
        if labels or last:
            found |= dict.fromkeys(sums[sums].index)
    return list(found)


def _name_column(raw: pd.DataFrame, others: Collection[str]) -> str:
    """Return the column that names the runs: ``run``, or another without repeats; "" where there is none."""
    for wanted in NAMES:
        for name in raw:
            if key(str(name)) == wanted and name not in others:
                cells = raw[name].map(lambda cell: str(cell).strip())
                if name == "run" or (cells.is_unique and not cells.str.lower().isin(NO_VALUE).any()):
                    return str(name)
    return ""


def _names(raw: pd.DataFrame, column: str) -> pd.Series:
    """Return the names of the runs: the cells of ``column``, or row numbers."""
    if column:
        return raw[column].map(lambda cell: printable(str(cell).strip()))
    return raw[ROW].map(lambda row: f"row {row}")


def _settings(column: Numbers, cells: pd.Series) -> pd.Series:
    """Return a hyperparameter's cells: numbers where all of them are, else text; None where there is no value."""
    numeric = not column.text and not {"not finite", TOO_LARGE} & set(column.missing.values())
    values = column.values.tolist()
    if not numeric:  # 1e-3 is 0.001 beside a word, too
        values = [str(cell).strip() if math.isnan(value) else show(value)
                  for cell, value in zip(cells, values, strict=True)]  # fmt: skip
    unset = {row for row, reason in column.missing.items() if reason == NOTHING}
    return pd.Series([None if row in unset else value for row, value in enumerate(values)], dtype=object)
