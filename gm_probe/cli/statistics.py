"""What ``gmprobe correlate`` shows of a sweep's statistics: tables, JSON, CSV rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from itertools import groupby
from typing import TYPE_CHECKING, Any

from gm_probe.cli.output import number, results_console, say, table

if TYPE_CHECKING:  # pandas and scipy take a second to import, which --help must not wait for
    from gm_probe.analysis.results import (
        Correlation,
        Details,
        MeasureStatistics,
        Quantity,
        SignError,
        SweepStatistics,
    )
    from gm_probe.analysis.tidy import Line
    from gm_probe.tables.table import Exclusion, RunTable

LEGEND = (
    "Kendall's τ-b: +1 if the measure orders the runs as their gaps do, −1 if in reverse. {runs}. "
    "Intervals (95 %) and p treat settings as independent and runs of one setting as repeats; with five "
    "or more seeds, intervals also cover seed variation. Every statistic: --details or --json."
)


def as_json(found: RunTable, statistics: SweepStatistics) -> dict[str, Any]:
    from gm_probe.tables.table import by_reason

    reasons = by_reason(found.excluded)
    return {
        "num_runs": found.num_runs,
        "num_settings": statistics.num_settings,
        "excluded": _excluded(found.excluded),
        "excluded_by_reason": {reason: len(runs) for reason, runs in reasons.items()},
        "hyperparameters": list(found.hyperparameters),
        "seed": statistics.seed,
        "resamples": statistics.resamples,
        "notes": [*found.notes, *statistics.notes],
        "measures": {
            measure.name: {
                "labels": measure.labels,
                **{gap: _all_figures(measure, gap) for gap in measure.gaps},
                "notes": [*measure.warnings, *measure.notes],
                "subgroups": {
                    label: {gap: _figures(result) for gap, result in gaps.items()}
                    for label, gaps in measure.subgroups.items()
                },
            }
            for measure in statistics.measures
        },
        "comparisons": {
            gap: [{"first": each.first, "second": each.second, **_quantity(each.difference),
                   "p_holm": each.p_holm} for each in pairs]
            for gap, pairs in statistics.comparisons.items()
        },
    }  # fmt: skip


def as_rows(statistics: SweepStatistics) -> list[dict[str, Any]]:
    """One row a measure, subgroup (empty: all runs) and gap, for ``--csv``."""
    rows = []
    for measure in statistics.measures:
        for subgroup, gaps in [("", measure.gaps), *measure.subgroups.items()]:
            for gap, result in gaps.items():
                figures = {**_figures(result), "missing": len(result.missing), "reason": result.reason}
                place = {"measure": measure.name, "labels": measure.labels, "subgroup": subgroup, "gap": gap}
                details = measure.details.get(gap) if subgroup == "" else None
                rows.append({**place, **figures, **(_summary(details) if details else {})})
    return rows


def print_tables(statistics: SweepStatistics, gaps: Sequence[str]) -> None:
    """One table a gap: side by side they would not fit 60 columns."""
    from gm_probe.analysis.typeset import shared_remarks
    from gm_probe.tables.table import GAPS

    console = results_console()
    for gap in gaps:
        rows, remarks = [], []
        for measure in statistics.measures:
            labels = f" ({measure.labels} labels)" if measure.labels else ""
            for subgroup, results in [(None, measure.gaps), *measure.subgroups.items()]:
                result = results[gap]
                name = measure.name + labels if subgroup is None else f"  {subgroup}"
                flags = ", ".join(measure.flags(gap)) if subgroup is None else ""
                interval = _interval(result.low, result.high)
                rows.append((name, _signed(result.tau), interval, number(result.p, 2), str(result.n), flags))
                place = measure.name if subgroup is None else f"{measure.name}, {subgroup}"
                if result.reason is not None:
                    remarks.append(f"{place}: τ undefined, {result.reason}")
                elif result.interval_reason is not None:
                    remarks.append(f"{place}: no interval: {result.interval_reason}")
                if result.p_reason is not None:
                    remarks.append(f"{place}: {'p' if result.p is not None else 'no p'}: {result.p_reason}")
        columns = ["measure", "τ-b", "95 %", "p", "n", "beware"]
        width = 6 if any(row[5] for row in rows) else 5
        console.print(table(f"{gap}: {GAPS.get(gap, gap)}", columns[:width], [row[:width] for row in rows]))
        for line in shared_remarks(remarks):
            say(console, line)
    for line in warnings(statistics.measures):
        say(console, line, "bold")
    for measure in statistics.measures:
        for gap, details in measure.details.items():
            if gap in gaps and details.simpson:
                turned = ", ".join(details.simpson)
                say(
                    console,
                    f"{measure.name}, {gap}: Simpson's paradox: the sign is opposite within {turned}",
                    "bold",
                )
    num, of = statistics.num_runs, statistics.num_settings
    legend = LEGEND.format(runs=f"{num} run{'s' * (num != 1)} of {of} setting{'s' * (of != 1)}")
    say(console, legend, "dim")


def print_details(statistics: SweepStatistics, gaps: Sequence[str]) -> None:
    """A table for each measure and gap with every statistic; the differences between measures are among them."""
    from gm_probe.analysis.tidy import tidy

    console = results_console()
    for title, lines in groupby(tidy(statistics, gaps), key=_title):
        rows, remarks = [], []
        for line in lines:
            name = f"{line.measure} {line.label}" if line.section == "comparisons" else line.label
            remarks += [f"{name}: {reason}" for reason in line.reasons]
            found = line.found
            if found.value is not None:
                interval = _interval(found.low, found.high)
                value = number(found.value, 3).replace("-", "−")
                rows.append((name, value, interval, number(found.p, 2), str(found.n)))
        console.print(table(title, ("", "value", "95 %", "p", "n"), rows))
        for remark in remarks:
            say(console, remark, "dim")


def _title(line: Line) -> str:
    """Return the title of the table that ``line`` stands in."""
    if line.section == "comparisons":
        return f"Δτ with {line.gap}; p adjusted for the number of comparisons (Holm)"
    return f"{line.measure} and {line.gap}"


def warnings(measures: Sequence[MeasureStatistics]) -> list[str]:
    """One line a warning, under the names of all the measures that it holds for."""
    names: dict[str, list[str]] = {}
    for measure in measures:
        for warning in measure.warnings:
            names.setdefault(warning, []).append(measure.name)
    return [f"{', '.join(some)}: {warning}" for warning, some in names.items()]


# ---- JSON and CSV


def _all_figures(measure: MeasureStatistics, gap: str) -> dict[str, Any]:
    figures = _figures(measure.gaps[gap])
    details = measure.details.get(gap)
    if details is None:
        return figures
    figures["flags"] = list(measure.flags(gap))
    return figures | _details(details)


def _figures(result: Correlation) -> dict[str, Any]:
    figures = {key: value for key, value in asdict(result).items() if not key.endswith("reason")}
    figures["missing"] = _excluded(result.missing)
    reasons = {key: getattr(result, key) for key in ("reason", "interval_reason", "p_reason")}
    return figures | {key: reason for key, reason in reasons.items() if reason is not None}


def _details(details: Details) -> dict[str, Any]:
    conditioning, prediction = details.conditioning, details.prediction
    information = None
    if conditioning is not None:
        sets = [_without_none(asdict(each), "reason") for each in conditioning.sets]
        least = conditioning.least
        information = {
            "value": least.value if least else None,
            "given": list(least.given) if least else None,
            "sets": sets,
            "num_permutations": conditioning.num_permutations,
            "reason": conditioning.reason,
        }
    return {
        "noise_filtered": {
            **_quantity(details.noise_filtered.tau),
            "kept": details.noise_filtered.kept,
            "pairs": details.noise_filtered.pairs,
        },
        "between": _quantity(details.between),
        "within": _quantity(details.within),
        "granulated": {
            "mean": _quantity(details.granulated.mean),
            "psi": {
                name: {
                    **_quantity(each.psi),
                    "skipped": each.skipped,
                    "runs": each.runs,
                    "coverage": each.coverage,
                }
                for name, each in details.granulated.psi.items()
            },
        },
        "conditional_information": information,
        "sign_error": _sign_error(details.sign_error),
        "strata": {
            each.by: {**_quantity(each.tau), "num_strata": each.num_strata, "opposes": each.opposes}
            for each in details.strata
        },
        "simpson": list(details.simpson),
        "partial": {name: _quantity(each) for name, each in details.partial.items()},
        "prediction": None if prediction is None else _without_none(asdict(prediction), "reason"),
        "selection": _without_none(asdict(details.selection), "reason"),
    }


def _sign_error(result: SignError) -> dict[str, Any]:
    worst = sorted(result.environments, key=lambda each: -each.error)[:5]
    figures = {key: value for key, value in asdict(result).items() if key != "environments"}
    return figures | {"num_environments": len(result.environments), "worst": [asdict(each) for each in worst]}


def _quantity(quantity: Quantity) -> dict[str, Any]:
    return _without_none(asdict(quantity), "reason", "interval_reason", "p_reason")


def _without_none(figures: dict[str, Any], *keys: str) -> dict[str, Any]:
    return {key: value for key, value in figures.items() if key not in keys or value is not None}


def _summary(details: Details) -> dict[str, Any]:
    """The main figures of ``details`` in columns."""
    least = details.conditioning.least if details.conditioning else None
    quantities = {
        "noise_filtered": details.noise_filtered.tau,
        "between": details.between,
        "within": details.within,
        "mean_psi": details.granulated.mean,
    }
    columns: dict[str, Any] = {}
    for name, quantity in quantities.items():
        columns |= {name: quantity.value, f"{name}_low": quantity.low, f"{name}_high": quantity.high}
    return columns | {
        "conditional_information": least.value if least else None,
        "conditional_on": least.label if least else None,
        "sign_error_mean": details.sign_error.mean,
        "sign_error_percentile_90": details.sign_error.percentile_90,
        "sign_error_maximum": details.sign_error.maximum,
        "simpson": "; ".join(details.simpson),
        "prediction_skill": details.prediction.skill if details.prediction else None,
        "selection_regret": details.selection.regret,
    }


def _excluded(exclusions: Sequence[Exclusion]) -> list[dict[str, str]]:
    return [{"run": exclusion.run, "reason": exclusion.reason} for exclusion in exclusions]


# ---- tables


def _interval(low: float | None, high: float | None) -> str:
    return "—" if low is None or high is None else f"{low:.2f} to {high:.2f}".replace("-", "−")


def _signed(value: float | None) -> str:
    return "—" if value is None else f"{value:+.3f}".replace("-", "−")
