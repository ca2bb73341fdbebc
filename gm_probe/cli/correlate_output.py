"""What ``gmprobe correlate`` shows of its table of statistics: an answer, every row of it, JSON and CSV."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from rich.console import JustifyMethod
from rich.markup import escape
from rich.table import Table

from gm_probe.analysis.typeset import two_decimals
from gm_probe.cli.output import number, results_console, say, table
from gm_probe.errors import printable
from gm_probe.tables.table import few

if TYPE_CHECKING:  # pandas and scipy take a second to import, which --help must not wait for
    from gm_probe.analysis.results import Correlations, Quantity

NARROW = 76
"""Columns of a terminal below which the table leaves out p and what a larger measure means."""
LONGEST = 16
"""Letters of a measure's or subgroup's name that fit in 80 columns."""


def print_answer(found: Correlations) -> None:
    """Print one line per measure and target, and the conclusion."""
    from gm_probe.analysis.conclusion import in_points

    console = results_console()
    wide, room = console.width >= NARROW, LONGEST + max(0, console.width - 80)
    known = any(of.low is not None for key, of in found.quantities.items() if key.statistic == "tau")
    columns = ("", "τ", "95 % CI", *(("p", "larger means") if wide else ()), "picking costs")

    def shown(cells: tuple[str, ...]) -> tuple[str, ...]:
        # without intervals, the columns that depend on them are left out
        return cells if known else (*cells[:2], cells[-1])

    for target, label in found.targets.items():
        rows = [
            row
            for name, others in found.alike.items()
            for row in _rows(found, name, others, target, wide=wide, room=room)
        ]
        say(console, _title(target, label), "bold")
        console.print(_lines(shown(columns), map(shown, rows)))
    picked = _regrets(found)
    if picked:
        outcome, random = picked
        unit = "points" if in_points(outcome) else "units"
        say(
            console,
            f"Picking: {unit} of {outcome} above the best run; a random run costs {_cost(random, outcome)}.",
            "dim",
        )
    for text in _folded(found):
        say(console, text, "dim")
    for text in warnings(found):
        say(console, text, "bold")
    say(console, " ".join(found.conclusion), "bold")


def _lines(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> Table:
    """Return a table without rules, so that it takes a line per row."""
    lines = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    for index, column in enumerate(columns):
        first, last = index == 0, index == len(columns) - 1
        side: JustifyMethod = "left" if first or last else "right"
        lines.add_column(column, justify=side, no_wrap=not last, overflow="ellipsis" if first else "fold")
    for row in rows:
        lines.add_row(*(escape(printable(cell)) for cell in row))
    return lines


def _title(target: str, label: str) -> str:
    return target if label == target.replace("_", " ") else f"{target}: {label}"


def _rows(
    found: Correlations, name: str, others: Sequence[str], target: str, *, wide: bool, room: int
) -> Iterable[tuple[str, ...]]:
    from gm_probe.analysis.conclusion import target_short
    from gm_probe.analysis.definitions import symbol

    labels = found.runs.labels.get(name)
    shown = symbol(name) + (f" ({labels} labels)" if labels else "") + "*" * bool(others)
    for group, tau in found.of(name, target, "tau").items():
        what = target_short(target).split()[-1] if target.isidentifier() else "target"
        meaning = f"{'larger' if (tau.value or 0) > 0 else 'smaller'} {what}"
        yield (
            _short(f"  {group}" if group else shown, room),
            "—" if tau.value is None else two_decimals(tau.value),
            interval(tau),
            *((_p(tau.p), meaning if tau.clear else "cannot tell") if wide else ()),
            "" if group else _picks(found, name),
        )


def _picks(found: Correlations, name: str) -> str:
    costs = {
        (key.target, key.group): of.value
        for key, of in found.quantities.items()
        if key.measure == name and key.statistic == "regret" and of.value is not None
    }
    outcomes = {outcome for outcome, _ in costs}
    if len(outcomes) != 1:  # without a test error each target has its own cost; the details show it
        return "—"
    return ", ".join(f"{end} +{_cost(value, outcome)}" for (outcome, end), value in costs.items())


def _regrets(found: Correlations) -> tuple[str, float] | None:
    """Return the one outcome that picking is judged by, and what a random run costs in it."""
    random = {
        key.target: of.value
        for key, of in found.quantities.items()
        if key.statistic == "regret_random" and of.value is not None
    }
    return next(iter(random.items())) if len(random) == 1 else None


def _cost(value: float, outcome: str) -> str:
    from gm_probe.analysis.conclusion import in_points

    return f"{100 * value:.1f}" if in_points(outcome) else f"{value:.2g}"


def _folded(found: Correlations) -> list[str]:
    """Return which measures order the runs alike, and why a τ or an interval is missing."""
    from gm_probe.analysis.definitions import symbol

    labels = found.runs.labels
    said = []
    for first, others in found.alike.items():
        shown = [f"{name} ({labels[name]} labels)" if name in labels else name for name in others]
        if shown:
            said.append(f"* {symbol(first)} orders the runs as {few(shown, 3)}.")
    reasons: dict[str, None] = {}
    for key, tau in found.quantities.items():
        if key.statistic == "tau" and not key.group and tau.note:
            undefined = f"{key.measure}: τ is undefined, {tau.note}."
            reasons[undefined if tau.value is None else f"{tau.note[0].upper()}{tau.note[1:]}."] = None
    return said + list(reasons)[:3]


def print_details(found: Correlations) -> None:
    """Print every row of the table, a block for each measure and target."""
    console = results_console()
    blocks: dict[tuple[str, str], list[tuple[str, ...]]] = {}
    notes: dict[str, None] = {}
    for key, of in found.quantities.items():
        name = f"{key.statistic} {key.group}".strip()
        row = (name, number(of.value, 3).replace("-", "−"), interval(of), number(of.p, 2), str(of.n))
        blocks.setdefault((key.measure, key.target), []).append(row)
        if of.note:
            notes[f"{key.statistic}: {of.note}"] = None
    for (measure, target), rows in blocks.items():
        console.print(table(f"{measure} and {target}", ("", "value", "95 % CI", "p", "n"), rows))
    for text in notes:
        say(console, text, "dim")


def warnings(found: Correlations) -> list[str]:
    """Return one line per warning, under the names of all the measures that it holds for."""
    names: dict[str, list[str]] = {}
    for name, said in (found.warnings or {}).items():
        for warning in said:
            names.setdefault(warning, []).append(name)
    return [f"{few(some, 3)}: {warning}" for warning, some in names.items()]


def as_json(found: Correlations) -> dict[str, Any]:
    """Return everything that was found."""
    from gm_probe.tables.table import by_reason

    runs, said = found.runs, found.warnings or {}
    return {
        "num_runs": runs.num_runs,
        "num_settings": found.num_settings,
        "num_shared_seeds": found.num_seeds,
        "excluded": [asdict(each) for each in runs.excluded],
        "excluded_by_reason": {reason: len(some) for reason, some in by_reason(runs.excluded).items()},
        "hyperparameters": list(runs.hyperparameters),
        "columns_left_out": list(runs.left_out),
        "notes": [*runs.notes, *found.notes],
        "conclusion": list(found.conclusion),
        "measures": {
            name: {
                "labels": runs.labels.get(name),
                **{target: _of_target(found, name, target) for target in found.targets},
                "subgroups": _subgroups(found, name),
                "selection": _selection(found, name),
                "warnings": list(said.get(name, ())),
            }
            for name in runs.measures
        },
    }


def _of_target(found: Correlations, name: str, target: str) -> dict[str, Any]:
    return {
        **_tau(found.get(name, target)),
        "p_naive": found.get(name, target, "tau_naive").p,
        "missing": _missing(found, name, target),
        "statistics": [
            {"statistic": key.statistic, "group": key.group, **asdict(of)}
            for key, of in found.quantities.items()
            if key[:2] == (name, target) and key[2:] != ("tau", "") and not key.statistic.startswith("regret")
        ],
    }


def _tau(tau: Quantity) -> dict[str, Any]:
    """Return a τ with its interval, and the reason where either is missing."""
    shown = asdict(tau)
    value, note = shown.pop("value"), shown.pop("note")
    reason = {"reason" if value is None else "interval_reason": note} if note else {}
    return {"tau": value, **shown, **reason}


def _selection(found: Correlations, name: str) -> list[dict[str, Any]]:
    return [
        {"outcome": key.target, "statistic": key.statistic, "picked": key.group or None, **asdict(of)}
        for key, of in found.quantities.items()
        if key.measure == name and key.statistic.startswith("regret")
    ]


def _missing(found: Correlations, name: str, target: str) -> list[dict[str, str]]:
    """Return the runs without the measure or the target, with the reasons."""
    runs = found.runs
    reasons: dict[int, list[str]] = {}
    for column in (name, target):
        for row, reason in runs.missing.get(column, {}).items():
            reasons.setdefault(row, []).append(f"{column}: {reason}")
    return [
        {"run": str(runs.frame["run"].iloc[row]), "reason": "; ".join(said)}
        for row, said in sorted(reasons.items())
    ]


def _subgroups(found: Correlations, name: str) -> dict[str, dict[str, Any]]:
    groups: dict[str, dict[str, Any]] = {}
    for target in found.targets:
        for group, of in found.of(name, target, "tau").items():
            if group:
                groups.setdefault(group, {})[target] = _tau(of)
    return groups


def as_rows(found: Correlations) -> list[dict[str, Any]]:
    """Return the tidy table for ``--csv``, None where a number is absent."""
    return [{**key._asdict(), **asdict(of)} for key, of in found.quantities.items()]


def interval(found: Quantity) -> str:
    """Return an interval as papers print it, or a dash."""
    if found.low is None or found.high is None:
        return "—"
    return f"{two_decimals(found.low)} to {two_decimals(found.high)}"


def _short(name: str, room: int) -> str:
    return name if len(name) <= room else f"{name[: room - 1]}…"


def _p(value: float | None) -> str:
    return "<0.001" if value is not None and value < 0.001 else number(value, 2)
