"""A sweep's statistics as tables for people: which statistics stand together, and how they are rounded."""

import math
from collections.abc import Iterable, Mapping, Sequence

from gm_probe.analysis import definitions
from gm_probe.analysis.conclusion import target_short
from gm_probe.analysis.intervals import Quantity
from gm_probe.analysis.provenance import Provenance
from gm_probe.analysis.results import Correlations
from gm_probe.analysis.typeset import UNDEFINED, Cell, Sheet, plain_sheet, two_decimals
from gm_probe.tables.table import Exclusion, RunTable, by_reason, show

NAMED = 20
"""A cell names at most so many runs and counts the rest."""
LONGEST = 1000
"""The table of runs lists at most so many rows."""
SHOWN_OUTCOMES = ("train_ce", "test_error")
"""Columns that show in the table of runs whether training was complete."""
NAMES = {
    "tau": "τ",
    "tau_within": "τ within the same",
    "tau_naive": "τ, naive p",
    "tau_partial": "τ given",
    "tau_difference": "Δτ with",
    "spearman": "Spearman’s ρ",
    "psi": "ψ of",
    "psi_mean": "Ψ",
    "cmi": "K given",
    "cmi_min": "least K, given",
    "sign_error_mean": "sign error, mean",
    "sign_error_p90": "sign error, 90 %",
    "sign_error_max": "sign error, worst",
    "regret": "regret of the",
    "regret_random": "regret of a random run",
}
"""The statistics in print; a group follows."""
SECTIONS = {
    "correlations": (
        "Correlations",
        "Kendall’s τ-b over all runs and in subgroups. Intervals and p treat runs of one setting as repeats, and cover "
        "the choice of the seeds that settings share.",
        ("tau",),
    ),
    "beyond": (
        "What a single τ hides",
        "τ within groups and given another quantity; ψ where one hyperparameter differs; conditional mutual "
        "information K; sign errors.",
        tuple(
            name
            for name in NAMES
            if name != "tau" and name != "tau_difference" and not name.startswith("regret")
        ),
    ),
    "comparisons": (
        "Δτ between measures",
        "Δτ = τ of the first − τ of the second, over the runs that have both.",
        ("tau_difference",),
    ),
    "selection": (
        "Choosing a run",
        "What picking a run by a measure costs over the best run, and what a random run costs on average.",
        ("regret", "regret_random"),
    ),
}
"""Parts of the tidy table: title, caption, and which statistics."""


def statistics_sheets(found: Correlations) -> tuple[Sheet, ...]:
    """Return the tidy table in parts, most important first; those without a row are left out."""
    sheets = (_part(found, name) for name in SECTIONS)
    return tuple(sheet for sheet in sheets if sheet.rows)


def _part(found: Correlations, name: str) -> Sheet:
    title, caption, wanted = SECTIONS[name]
    rows = [(key, of) for key, of in found.quantities.items() if key.statistic in wanted]
    digits = 3 if name == "selection" else None
    cells = tuple(
        (
            *(Cell(key.measure), Cell(target_short(key.target))),
            Cell(f"{NAMES[key.statistic]} {key.group}".strip()),
            *(_number(of.value, digits, of.note or None), _interval(of), _p(of.p), _count(of.n)),
        )
        for key, of in rows
    )
    columns = ("Measure", "Target", "Statistic", "Value", "95 % CI", "p", "n")
    return Sheet(name, title, caption, columns, cells, num_labels=3)


def run_sheets(table: RunTable) -> tuple[Sheet, ...]:
    """Return the runs that entered, and what was left out and why."""
    frame = table.frame.head(LONGEST)
    numbers = [*table.gaps, *(name for name in SHOWN_OUTCOMES if name in table.outcomes), *table.measures]
    rows = []
    for place, record in enumerate(frame.to_dict("records")):
        settings = [_setting(record[name]) for name in table.hyperparameters]
        values = [
            _value(record[name], table.missing.get(name, {}).get(place, "no value")) for name in numbers
        ]
        rows.append((Cell(str(record["run"])), *settings, *values))
    more = table.num_runs - len(frame)
    caption = f"The {table.num_runs:,} runs that entered." + f" {more:,} more are not shown." * bool(more)
    runs = Sheet("runs", "Runs", caption, ("Run", *table.hyperparameters, *numbers), tuple(rows))
    return runs, exclusions_sheet(table)


def exclusions_sheet(table: RunTable) -> Sheet:
    """Return the runs left out, then single missing values, then unconverged estimates that were kept."""
    names = table.frame["run"].to_list()
    rows = [("whole run", reason, runs) for reason, runs in by_reason(table.excluded).items()]
    for column in (*table.gaps, *table.measures):
        lacking = [Exclusion(names[row], reason) for row, reason in table.missing.get(column, {}).items()]
        rows += [(f"its {column}", reason, runs) for reason, runs in by_reason(lacking).items()]
    for column, kept in table.unconverged.items():
        if kept:
            rows.append(
                (f"nothing (its {column} is kept)", "not converged", [names[row] for row in sorted(kept)])
            )
    gone = (
        f"{len(table.excluded):,} of {table.num_runs + len(table.excluded):,} runs were left out completely."
    )
    cells = tuple(
        (Cell(what), Cell(reason), Cell(f"{len(runs):,}", len(runs)), Cell(_some(runs)))
        for what, reason, runs in rows
    )
    caption = gone if rows else f"{gone} No value of any other run is missing."
    return Sheet("exclusions", "Left out", caption, ("What", "Reason", "Number", "Runs"), cells, num_labels=2)


def definition_sheets(measures: Iterable[str]) -> tuple[Sheet, ...]:
    """Return the measures that are known, and all statistics, in words."""
    known = [(name, *definitions.DEFINITIONS[name]) for name in measures if name in definitions.DEFINITIONS]
    foreign = [name for name in measures if name not in definitions.DEFINITIONS]
    caption = "f_θ: the network's output probabilities at parameters θ (P of them); z: its logits."
    if foreign:
        caption += f" Defined by the author of the table: {', '.join(foreign)}."
    terms, how = definitions.STATISTICS.items(), "How to read the numbers above."
    return (
        plain_sheet("measures", "Measures", caption, ("Measure", "Symbol", "Definition"), known, 3),
        plain_sheet("statistics", "Statistics", how, ("Term", "Definition"), terms, 2),
    )


def origin_sheets(origin: Provenance, versions: Mapping[str, str]) -> tuple[Sheet, ...]:
    """Return versions behind the report, machines behind the runs, and how the measures were taken."""
    tables = (
        ("versions", "This report", "", {name: {value: 1} for name, value in versions.items()}),
        ("trained", "Training", "As recorded by each run.", origin.trained),
        ("measured", "Measurement", "The settings that every run's measures.json records.", origin.measured),
    )
    return tuple(
        plain_sheet(name, title, caption, ("Setting", "Value"), [(key, _shares(of[key])) for key in of], 2)
        for name, title, caption, of in tables
        if of
    )


def _shares(values: Mapping[str, int]) -> str:
    """Return a value alone where there is no other, else each with the number of runs."""
    if len(values) == 1:
        return next(iter(values))
    shown = [f"{value} × {count:,}" for value, count in list(values.items())[:NAMED]]
    return ", ".join(shown) + (f" and {len(values) - NAMED:,} more" if len(values) > NAMED else "")


def _value(value: float, reason: str) -> Cell:
    return Cell(UNDEFINED, reason=reason) if math.isnan(value) else _number(value, 4, None)


def _number(value: float | None, digits: int | None, reason: str | None) -> Cell:
    """Return a number with so many significant ``digits``; None: two decimals, as a coefficient has."""
    if value is None or math.isnan(value):
        return Cell(UNDEFINED, reason=reason)
    return Cell(two_decimals(value) if digits is None else _minus(f"{value:.{digits}g}"), value, reason)


def _interval(found: Quantity) -> Cell:
    if found.low is None or found.high is None:
        return Cell(UNDEFINED)
    return Cell(f"[{two_decimals(found.low)}, {two_decimals(found.high)}]", found.low)


def _p(value: float | None) -> Cell:
    if value is None:
        return Cell(UNDEFINED)
    shown = f"{value:.{3 if value >= 0.001 else 4}f}" if value >= 0.0001 else f"{value:.1e}"
    return Cell(_minus(shown), value)


def _count(value: int) -> Cell:
    return Cell(f"{value:,}", value)


def _setting(value: object) -> Cell:
    number = isinstance(value, int | float)
    return Cell(show(value), float(value) if number else None)  # type: ignore[arg-type]


def _some(runs: Sequence[str]) -> str:
    more = len(runs) - NAMED
    return ", ".join(runs[:NAMED]) + (f" and {more:,} more" if more > 0 else "")


def _minus(text: str) -> str:
    return text.replace("-", "−")
