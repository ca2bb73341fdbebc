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
    for gap in (name for name in table.gaps if name in GAPS):
        negative = int((table.frame[gap] < 0).sum())
        if 2 * negative > table.num_runs:
            yield f"{gap} is negative in {negative} of {table.num_runs} runs. It should be {GAPS[gap]}"
    found = [*table.gaps, *table.measures, *table.outcomes]
    telling = [name for name in found if 2 * table.frame[name].nunique() > table.num_runs]
    values = telling if len(telling) > 1 else [*found, *table.hyperparameters]
    known = table.frame.dropna(subset=telling)
    for what, columns, frame in (("name", ["run"], table.frame), ("values", values, known)):
        names = frame["run"][frame.duplicated(columns)]
        if len(names):
            yield (
                f"{len(names)} runs repeat the {what} of another, such as {names.iloc[0]}. Is one listed twice, or has "
                "a setting no effect?"
            )


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
