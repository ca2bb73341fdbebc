"""A sweep's statistics as tables for people: which figures stand together, and how they are rounded."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from gm_probe.analysis import definitions
from gm_probe.analysis.provenance import Provenance
from gm_probe.analysis.results import MeasureStatistics, Quantity, SweepStatistics
from gm_probe.analysis.tidy import Line, tidy
from gm_probe.analysis.typeset import UNDEFINED, Cell, Sheet, shared_remarks, two_decimals
from gm_probe.tables.table import Exclusion, RunTable, by_reason, show

NAMED = 20
"""Runs that a cell names before it counts the rest."""
LONGEST = 1000
"""Rows that the table of runs lists."""
SHOWN_OUTCOMES = ("train_ce", "test_error")
"""What tells in the table of runs whether training was done."""
# fmt: off
CORRELATIONS = (
    "Measure", "Gap", "τ-b", "95 % CI", "Bootstrap", "p", "Flag", "Runs", "Settings", "Spearman", "Pearson",
    "p (naive)", "Ties (measure / gap)",
)
# fmt: on
SECTIONS = {
    "subgroups": ("Within subgroups", "τ-b within each subgroup."),
    "beyond": (
        "What a single τ hides",
        "τ between and within settings, beyond the gaps' noise, within the same value of a setting, and "
        "given another quantity; ψ where one hyperparameter differs; conditional mutual information K; "
        "sign errors. Simpson’s paradox is flagged where τ within a setting and τ over all runs have "
        "opposite signs and both intervals exclude 0.",
    ),
    "comparisons": (
        "Δτ between measures",
        "Δτ = τ of the first − τ of the second, on the same resamples; p adjusted for their number (Holm).",
    ),
    "prediction": (
        "Predicting the gap, choosing a run",
        (
            "The gap of left-out settings is predicted from the measure; the run with the smallest measure is "
            "chosen."
        ),
    ),
}
"""Tables of the tidy statistics: title and caption."""
SHORT = {"error_gap": "error", "ce_gap": "CE"}


def statistics_sheets(statistics: SweepStatistics, gaps: Sequence[str]) -> tuple[Sheet, ...]:
    """The tables of figures, most important first; those without a row are left out."""
    rows = [(measure, gap) for gap in gaps for measure in statistics.measures]
    lines = list(tidy(statistics, gaps))
    sheets = [_correlations(rows), *(_section(name, lines) for name in SECTIONS)]
    return tuple(sheet for sheet in sheets if sheet.rows)


def _section(name: str, lines: Sequence[Line]) -> Sheet:
    """The lines of one section of the tidy table."""
    title, caption = SECTIONS[name]
    return Sheet(
        name=name,
        title=title,
        caption=caption,
        columns=("Measure", "Gap", "Statistic", "Value", "p", "n"),
        rows=tuple(
            (
                Cell(line.measure),
                Cell(SHORT.get(line.gap, line.gap)),
                Cell(line.label),
                _quantity(line.found, 3 if name == "prediction" else None),
                _p(line.found.p, line.found.reason or line.found.p_reason),
                _count(line.found.n),
            )
            for line in lines
            if line.section == name
        ),
        num_labels=3,
    )


def run_sheets(table: RunTable) -> tuple[Sheet, ...]:
    """The runs that entered, and what was left out and why."""
    frame = table.frame.head(LONGEST)
    figures = [*table.gaps, *(name for name in SHOWN_OUTCOMES if name in table.outcomes), *table.measures]
    rows = []
    for place, record in enumerate(frame.to_dict("records")):
        settings = [_setting(record[name]) for name in table.hyperparameters]
        values = [
            _figure(record[name], 4, table.missing.get(name, {}).get(place, "no value")) for name in figures
        ]
        rows.append((Cell(str(record["run"])), *settings, *values))
    more = table.num_runs - len(frame)
    runs = Sheet(
        name="runs",
        title="Runs",
        caption=f"The {table.num_runs:,} runs that entered."
        + (f" {more:,} more are not shown." if more else ""),
        columns=("Run", *table.hyperparameters, *figures),
        rows=tuple(rows),
        num_labels=1,
    )
    return runs, exclusions_sheet(table)


def exclusions_sheet(table: RunTable) -> Sheet:
    """Whole runs left out, then single values, then those kept though their estimate had not converged."""
    names = table.frame["run"].to_list()
    rows = [("whole run", reason, runs) for reason, runs in by_reason(table.excluded).items()]
    for column in (*table.gaps, *table.measures):
        gone = [Exclusion(names[row], reason) for row, reason in table.missing.get(column, {}).items()]
        rows += [(f"its {column}", reason, runs) for reason, runs in by_reason(gone).items()]
    for column, kept in table.unconverged.items():
        if kept:
            rows.append(
                (f"nothing (its {column} is kept)", "not converged", [names[row] for row in sorted(kept)])
            )
    return Sheet(
        name="exclusions",
        title="Left out",
        caption=(
            f"{len(table.excluded):,} of {table.num_runs + len(table.excluded):,} runs were left out "
            "completely."
        )
        + ("" if rows else " No value of any other run is missing."),
        columns=("What", "Reason", "Number", "Runs"),
        rows=tuple(
            (Cell(what), Cell(reason), Cell(f"{len(runs):,}", len(runs)), Cell(_some(runs)))
            for what, reason, runs in rows
        ),
        num_labels=2,
    )


def definition_sheets(measures: Iterable[str]) -> tuple[Sheet, ...]:
    """The measures that are known, and all statistics, in words."""
    known = [(name, *definitions.MEASURES[name]) for name in measures if name in definitions.MEASURES]
    foreign = [name for name in measures if name not in definitions.MEASURES]
    of_measures = Sheet(
        name="measures",
        title="Measures",
        caption="f_θ: the network's output probabilities at parameters θ (P of them); z: its logits."
        + (f" Defined by the author of the table: {', '.join(foreign)}." if foreign else ""),
        columns=("Measure", "Symbol", "Definition"),
        rows=tuple(tuple(map(Cell, row)) for row in known),
        num_labels=3,
    )
    of_statistics = Sheet(
        name="statistics",
        title="Statistics",
        caption="How to read the numbers above.",
        columns=("Term", "Definition"),
        rows=tuple((Cell(term), Cell(text)) for term, text in definitions.STATISTICS.items()),
        num_labels=2,
    )
    return of_measures, of_statistics


def origin_sheets(origin: Provenance, versions: Mapping[str, str]) -> tuple[Sheet, ...]:
    """Versions behind the report, machines behind the runs, and how the measures were taken."""
    tables = (
        ("versions", "This report", "", {name: {value: 1} for name, value in versions.items()}),
        ("trained", "Training", "As recorded by each run.", origin.trained),
        ("measured", "Measurement", "The settings that every run's measures.json records.", origin.measured),
    )
    return tuple(
        Sheet(
            name=name,
            title=title,
            caption=caption,
            columns=("Setting", "Value"),
            rows=tuple((Cell(key), Cell(_shares(values))) for key, values in of.items()),
            num_labels=2,
        )
        for name, title, caption, of in tables
        if of
    )


def _shares(values: Mapping[str, int]) -> str:
    """A value alone where there is no other, else each with the number of runs."""
    if len(values) == 1:
        return next(iter(values))
    shown = [f"{value} × {count:,}" for value, count in list(values.items())[:NAMED]]
    return ", ".join(shown) + (f" and {len(values) - NAMED:,} more" if len(values) > NAMED else "")


def _correlations(rows: Sequence[tuple[MeasureStatistics, str]]) -> Sheet:
    lines, notes = [], []
    for measure, gap in rows:
        result = measure.gaps[gap]
        interval = Quantity(
            result.tau, result.low, result.high, reason=result.reason, interval_reason=result.interval_reason
        )
        lines.append(
            (
                *_place(measure, gap),
                _figure(result.tau, None, result.reason),
                _interval(interval),
                _interval(replace(interval, low=result.low_percentile, high=result.high_percentile)),
                _p(result.p, result.reason or result.p_reason),
                Cell(", ".join(measure.flags(gap)) or "none"),
                _count(result.n),
                _count(result.num_settings),
                _figure(result.spearman, None, result.reason),
                _figure(result.pearson, None, result.reason),
                _p(result.p_naive, result.reason),
                Cell(f"{result.ties_measure:,} / {result.ties_gap:,}", result.ties_measure),
            )
        )
        if result.p is not None and result.p_reason:
            notes.append(f"p of {measure.name}, {SHORT.get(gap, gap)}: {result.p_reason}")
    notes = shared_remarks(notes)
    notes += [
        f"{measure.name}: {text}" for measure, _ in rows for text in (*measure.warnings, *measure.notes)
    ]
    return Sheet(
        name="correlations",
        title="Correlations",
        caption="Kendall’s τ-b; interval and permutation p keep the seeds of a setting together. With "
        "five or more shared seeds the interval also covers seed variation. Treat flagged rows "
        "with caution.",
        columns=CORRELATIONS,
        rows=tuple(lines),
        num_labels=2,
        notes=tuple(dict.fromkeys(notes)),
    )


def _place(measure: MeasureStatistics, gap: str) -> tuple[Cell, Cell]:
    labels = f" ({measure.labels} labels)" if measure.labels else ""
    return Cell(measure.name + labels), Cell(SHORT.get(gap, gap))


def _figure(value: float | None, digits: int | None, reason: str | None) -> Cell:
    """``digits`` significant ones; None: two decimals, as a coefficient has."""
    if value is None or math.isnan(value):
        return Cell(UNDEFINED, reason=reason)
    return Cell(two_decimals(value) if digits is None else _minus(f"{value:.{digits}g}"), value)


def _quantity(found: Quantity, digits: int | None = None) -> Cell:
    """A figure and its interval in one cell."""
    if found.value is None:
        return Cell(UNDEFINED, reason=found.reason)
    interval = _interval(found)
    plain = _figure(found.value, digits, None)
    text = plain.text + (f" {interval.text}" if interval.order is not None else "")
    reason = None if found.interval_reason is None else f"no interval: {found.interval_reason}"
    return Cell(text, found.value, reason)


def _interval(found: Quantity) -> Cell:
    if found.low is None or found.high is None:
        return Cell(UNDEFINED, reason=found.reason or found.interval_reason)
    return Cell(f"[{two_decimals(found.low)}, {two_decimals(found.high)}]", found.low)


def _p(value: float | None, reason: str | None) -> Cell:
    if value is None:
        return Cell(UNDEFINED, reason=reason)
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
