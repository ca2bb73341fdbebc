"""Anybody's table of runs, one a row: which of its columns is the gap, a measure, a setting, a seed, a name."""

from collections import Counter
from collections.abc import Mapping, Sequence
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
from gm_probe.tables.expression import parse
from gm_probe.tables.numerals import COMMA, NO_VALUE, NOTHING, Numbers, ambiguous, read_numbers
from gm_probe.tables.readers import Sheet
from gm_probe.tables.table import (
    GAPS,
    KNOWN_MEASURES,
    MISSED_STOP,
    MOST_MEASURES,
    MOST_SETTINGS,
    OUTCOMES,
    SEED,
    TOO_LARGE,
    Asked,
    Exclusion,
    RunTable,
    few,
    missed_stop_note,
    require_distinct,
    require_few,
    require_known,
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
"""How a gap that a table lacks may be had, the best way first; under "" those that are called as they are made."""


def run_table(source: Path, sheet: Sheet, asked: Asked) -> RunTable:
    """Give the columns of ``sheet`` their roles; see ``runs.load_table`` for the choice of columns and runs.

    Raises:
        UsageError: a column that was asked for is not there or has another role; or ``converged_only``, and nothing
            says which runs converged.
        DataError: no gap, no measure, no usable row, or text where a number belongs.
    """
    new = called([str(name) for name in sheet.cells.columns])
    aliases = {old: name for old, name in new.items() if old != name}
    short = Counter(map(bare, new))
    aliases |= {
        bare(old): name
        for old, name in new.items()
        if short[bare(old)] == 1 and bare(old) not in new.values()
    }
    written = {name: old for old, name in new.items()}
    raw, excluded, notes = _finished(sheet.cells.rename(columns=new), source, asked.converged_only)
    columns = read_numbers({str(name): raw[name].to_list() for name in raw if name != ROW})
    names = [*columns]
    gaps, taken_from, told = _gaps(columns, aliases, asked, source)
    asked_measures, asked_hypers, group_by, asked_seed = (
        [aliases.get(name, name) for name in each]
        for each in (asked.measures, asked.hyperparameters, asked.group_by, filter(None, [asked.seed_column]))
    )
    require_known(
        [*asked_measures, *asked_hypers, *group_by, *asked_seed], names, f"column in {source} named"
    )
    run_name = _name_column(raw, {*asked_measures, *asked_hypers, *group_by})
    by_name = [
        name
        for name in names
        if name not in (*asked_measures, *gaps, *taken_from, run_name)
        and (is_setting(written[name]) or (is_given(written[name]) and _varies(raw[name], columns[name])))
    ]
    seeds = asked_seed or [name for name in (SEED,) if name in names and name not in asked_measures]
    hypers = [name for name in unique([*(asked_hypers or by_name), *group_by]) if name not in asked_seed]
    if asked_seed and SEED in hypers:
        raise UsageError(
            f"--seed-column {asked.seed_column}: {SEED!r} cannot be a hyperparameter then. Leave it out"
        )
    taken = {*gaps, *taken_from, *hypers, *asked_seed, run_name}
    free = [name for name in names if name not in taken or name in asked_measures]
    chosen = unique(asked_measures) or _measures(
        [name for name in free if not is_given(written[name])], columns
    )
    require_few(chosen, MOST_MEASURES, source, "columns to use as measures", "--measures")
    require_few(hypers, MOST_SETTINGS, source, "hyperparameters", "--hyper")
    if not chosen:
        raise DataError(
            f"{source} has no numeric column to use as a measure (--measures names one); it has: {few(names)}"
        )
    require_distinct(gaps, chosen, hypers)
    _require_numbers([*gaps, *taken_from, *chosen], columns, raw[ROW], source)

    outcomes = [name for name in OUTCOMES if name in names and name not in (*gaps, *chosen, *hypers, *seeds)]
    left_out = [name for name in free if name not in (*chosen, *outcomes, *seeds)]
    gone = {name: int(columns[name].values.isna().sum()) for name in outcomes}
    lacking = [f"{name} is not a number in {num} of {len(raw)} runs" for name, num in gone.items() if num]
    constant = [name for name in left_out if may_be_measure(name) and columns[name].values.nunique() == 1]
    others = [name for name in left_out if name not in constant]
    roles = {"measures": chosen, "hyperparameters": hypers, "seeds": seeds, "of one value": constant}
    roles |= {"other columns": others}
    shown = [f"{role}: {few(found)}" for role, found in roles.items() if found]
    frame = {"run": _names(raw, run_name)}
    frame |= {name: columns[name].values for name in [*gaps, *chosen]}
    frame |= {name: _settings(columns[name], raw[name]) for name in hypers}
    if seeds:
        frame[SEED] = _settings(columns[seeds[0]], raw[seeds[0]])
    frame |= {name: columns[name].values for name in outcomes}
    return RunTable(
        source=source,
        frame=pd.DataFrame(frame),
        gaps=tuple(gaps),
        measures=tuple(chosen),
        hyperparameters=tuple(hypers),
        missing={name: columns[name].missing for name in [*gaps, *chosen]},
        excluded=excluded,
        notes=(
            *sheet.notes,
            *_said(sheet, columns, [*gaps, *taken_from, *chosen, *hypers]),
            *told,
            *(() if asked_measures and asked_hypers else ("; ".join(shown),)),
            *_odd_cells(left_out, columns, raw[ROW]),
            *lacking,
            *notes,
        ),
        outcomes=tuple(outcomes),
        aliases=aliases,
        left_out=tuple(left_out),
    )


def _gaps(
    columns: dict[str, Numbers], aliases: Mapping[str, str], asked: Asked, source: Path
) -> tuple[list[str], list[str], list[str]]:
    """The gaps among ``columns``, where made ones are added; the columns that these are made from; what is said."""
    found = [gap for gap in GAPS if gap in columns] if asked.gap_is_known else []
    made: dict[str, str] = {} if asked.gap_is_known else {asked.gap: asked.gap}
    if asked.gap_is_known and not found:
        names = {*columns, *aliases}
        for gap, ways in DIFFERENCES.items():
            ways = [way for way in ways if names.issuperset(way.split(" - "))]
            if ways and (gap or not made):
                made[gap or ways[0]] = ways[0]
    if not found and not made:
        raise DataError(
            f"{source} has no column error_gap (test error − train error) or ce_gap; --gap 'A - B' makes one. "
            f"It has: {few([*columns])}"
        )
    used: list[str] = []
    for gap, text in made.items():
        expression = parse(text, {*columns, *aliases})
        known = columns | {old: columns[new] for old, new in aliases.items() if new in columns}
        columns.setdefault(gap, expression.of(known))
        used += [aliases.get(name, name) for name in expression.columns]
    said = [f"{gap} is {text.replace(' - ', ' − ')}" for gap, text in made.items() if gap != text]
    said += [f"gap: {text}" for gap, text in made.items() if gap == text and asked.gap_is_known]
    return [*found, *made], [name for name in unique(used) if name not in made], said


def _varies(cells: pd.Series, column: Numbers) -> bool:
    """Whether a setting differs between runs, and is no text that names each of them."""
    num = cells.map(str).nunique()
    return num > 1 and not (column.text and num == len(cells) > 2)


def _measures(free: Sequence[str], columns: Mapping[str, Numbers]) -> list[str]:
    """The columns taken unasked: all that may be measures and hold numbers that differ, the known ones first.

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
    """A note on columns that would be measures but for a few cells."""
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


def _said(sheet: Sheet, columns: Mapping[str, Numbers], used: Sequence[str]) -> list[str]:
    """How the table is written, in words; nothing of plain CSV."""
    commas = unique(name for name in used if columns[name].decimal == COMMA)
    written = [*sheet.written, *([f"with decimal commas in {few(commas)}"] if commas else [])]
    return [f"the table was read {', '.join(written)}"] if written else []


def _finished(
    raw: pd.DataFrame, source: Path, converged_only: bool
) -> tuple[pd.DataFrame, tuple[Exclusion, ...], list[str]]:
    """The rows that may enter, with their number in ``ROW``; the others; and a note on those that missed their stop."""
    raw = raw.assign(**{ROW: range(1, len(raw) + 1)})
    names = _names(raw, _name_column(raw, ()))
    reasons = {row: "sums up other rows" for row, name in enumerate(names) if key(name) in SUMMARIES}
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


def _name_column(raw: pd.DataFrame, others: Sequence[str] | set[str]) -> str:
    """The column that names the runs: ``run``, or another that names each run apart; "" where there is none."""
    for wanted in NAMES:
        for name in raw:
            if key(str(name)) == wanted and name not in others:
                cells = raw[name].map(lambda cell: str(cell).strip())
                if name == "run" or (cells.is_unique and not cells.str.lower().isin(NO_VALUE).any()):
                    return str(name)
    return ""


def _names(raw: pd.DataFrame, column: str) -> pd.Series:
    """Names of the runs: the cells of ``column``, or row numbers."""
    if column:
        return raw[column].map(lambda cell: printable(str(cell).strip()))
    return raw[ROW].map(lambda row: f"row {row}")


def _settings(column: Numbers, cells: pd.Series) -> pd.Series:
    """A hyperparameter's cells: numbers where all of them are, else text; None where there is no value."""
    numeric = not column.text and not {"not finite", TOO_LARGE} & set(column.missing.values())
    values = column.values.tolist() if numeric else [str(cell).strip() for cell in cells]
    unset = {row for row, reason in column.missing.items() if reason == NOTHING}
    return pd.Series([None if row in unset else value for row, value in enumerate(values)], dtype=object)
