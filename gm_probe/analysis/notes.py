"""What a reader must know of the runs before the statistics: one line each."""

from collections.abc import Iterator

import numpy as np

from gm_probe.analysis.design import Design, setting_names
from gm_probe.analysis.intervals import Clusters
from gm_probe.tables.table import GAPS, Exclusion, RunTable, by_reason


def run_notes(table: RunTable, design: Design, clusters: Clusters) -> Iterator[str]:
    """Yield what the settings, the seeds and repeated runs mean for the intervals."""
    sizes = np.unique(design.setting, return_counts=True)[1]
    alone = int((sizes == 1).sum())
    if not setting_names(table):
        yield "no hyperparameter is known, so each run counts as an independent setting (--hyper names them)"
    elif len(sizes) == 1:
        yield "all runs have the same setting, so they count as independent"
    elif 0 < alone < len(sizes):
        yield f"{alone} of {len(sizes)} settings have a single run"
    if clusters.num_seeds == 1:
        yield "all settings share one seed, so no interval covers seed variation"
    for gap in set(GAPS).intersection(table.gaps):
        negative = int((table.frame[gap] < 0).sum())
        if 2 * negative > table.num_runs:
            yield f"{gap} is negative in {negative} of {table.num_runs} runs. It should be {GAPS[gap]}"
    for what, columns in (
        ("name", ["run"]),
        ("values", [*table.gaps, *table.measures, *table.hyperparameters]),
    ):
        repeated = table.frame.duplicated(columns)
        if repeated.any():
            first = table.frame["run"][repeated].iloc[0]
            yield f"{repeated.sum()} runs repeat the {what} of another, such as {first}. Is one listed twice?"


def measure_warnings(table: RunTable, name: str) -> tuple[str, ...]:
    """Say which settings of a measurement differ between runs, so that its values are not comparable."""
    warnings = []
    for setting, runs in table.conditions.get(name, {}).items():
        if len(runs) > 1:
            values = [f"{value} × {count}" for value, count in sorted(runs.items(), key=lambda of: -of[1])]
            shown = ", ".join(values[:5]) + (f" and {len(values) - 5} more" if len(values) > 5 else "")
            warnings.append(f"{setting} differs between runs ({shown}), so they are not comparable")
    return tuple(warnings)


def measure_notes(table: RunTable) -> Iterator[str]:
    """Yield how many values of each measure are missing, and how many had not converged."""
    for name in table.measures:
        missing = table.missing.get(name, {})
        reasons = by_reason(Exclusion(str(row), reason) for row, reason in missing.items())
        for reason, rows in reasons.items():
            yield f"{name}: {len(rows)} of {table.num_runs} left out: {reason}"
        unconverged = len(table.unconverged.get(name, ()))
        if unconverged:
            yield f"{name}: {unconverged} of {table.num_runs - len(missing)} not converged (kept)"
