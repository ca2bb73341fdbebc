"""Correlate measures with generalization: every statistic of each measure with each target, as one tidy table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Self

import numpy as np
import pandas as pd

from gm_probe.analysis.coefficients import (
    Linear,
    granulated,
    linear_tau,
    partial_tau,
    tau_difference,
    tau_quantity,
)
from gm_probe.analysis.conclusion import conclude, measures_alike
from gm_probe.analysis.conditional import chance_of, conditional_information
from gm_probe.analysis.definitions import direction_of, direction_of_target
from gm_probe.analysis.design import (
    SETTING,
    Design,
    control_columns,
    design_of,
    group_rows,
    numbers_of,
    setting_names,
    target_column,
)
from gm_probe.analysis.intervals import Clusters, Quantity, clusters_of
from gm_probe.analysis.notes import measure_notes, measure_warnings, run_notes
from gm_probe.analysis.permutation import permutation_p, permute_settings
from gm_probe.analysis.regret import regrets
from gm_probe.analysis.results import Correlations, Key, target_label
from gm_probe.analysis.run_pairs import Floats, Integers, mid_ranks
from gm_probe.analysis.sign_error import sign_errors
from gm_probe.errors import DataError, ResourceError
from gm_probe.tables.runs import load_table
from gm_probe.tables.table import RunTable, by_reason, require_known

MOST_RUNS = 30_000
"""The pairs of more runs take minutes per statistic."""
MOST_CONDITIONED = 2000
"""Conditional information is computed for at most so many runs: each permutation takes all pairs."""
SIMPSON = "Simpson's paradox: the sign is opposite to that over all runs, and both intervals exclude 0"


def correlate(
    source: RunTable | pd.DataFrame | Path | str,
    *,
    measures: Sequence[str] = (),
    hyperparameters: Sequence[str] = (),
    targets: Sequence[str] = (),
    group_by: Sequence[str] = (),
    controls: Sequence[str] = (),
    gap: str = "both",
    seed_column: str = "",
    converged_only: bool = False,
    details: bool = True,
) -> Correlations:
    """Correlate every measure of ``source`` with every target; see ``docs/correlate.md`` for the statistics.

    Args:
        source: a folder of runs, a file or a DataFrame with one run per row, or what ``load_table`` made of one.
        measures: columns to correlate; empty: all numeric ones that are no settings.
        hyperparameters: columns that are settings; empty: those with a setting's name.
        gap: the targets, separated by commas: gaps, columns, arithmetic on columns; see ``load_table``.
        seed_column: the column of seeds; empty: one with such a name.
        converged_only: leave out runs that were not trained to the end.
        targets: those of the gaps and outcomes of the table to take; empty: what ``gap`` says.
        group_by: hyperparameters whose values form subgroups.
        controls: columns to take partial τ given; empty: the usual ones and the hyperparameters.
        details: compute every statistic, not only τ, τ within groups and the cost of picking.

    Raises:
        UsageError: a target, hyperparameter or control that there is not.
        DataError: fewer than two runs, so that no rank correlation exists.
        ResourceError: more than ``MOST_RUNS`` runs.
    """
    if isinstance(source, RunTable):
        table = source
    else:
        table = load_table(
            source if isinstance(source, pd.DataFrame) else Path(source),
            measures,
            hyperparameters,
            group_by,
            gap=gap,
            seed_column=seed_column,
            converged_only=converged_only,
        )
    study = _Study.of(table, table.named(targets) or table.gaps, table.named(group_by), table.named(controls))
    clusters = clusters_of(study.design.setting, study.design.seed)
    result = Correlations(
        runs=table,
        targets={name: target_label(name) for name in study.targets},
        quantities=study.quantities(details=details),
        alike=measures_alike(table),
        num_settings=len(np.unique(study.design.setting)),
        num_seeds=clusters.num_seeds,
        notes=(*run_notes(table, study.design, clusters), *measure_notes(table)),
        warnings={name: measure_warnings(table, name) for name in table.measures},
    )
    return replace(result, conclusion=conclude(result))


def _require_runs(table: RunTable) -> None:
    if table.num_runs < 2:
        reasons = "; ".join(
            f"{len(runs)} excluded: {reason}" for reason, runs in by_reason(table.excluded).items()
        )
        raise DataError(
            f"{table.source} has {table.num_runs} usable run{f' ({reasons})' if reasons else ''}; "
            "a rank correlation needs at least 2"
        )
    if table.num_runs > MOST_RUNS:
        raise ResourceError(
            f"{table.source} has {table.num_runs:,} runs; the pairs of more than {MOST_RUNS:,} take too long. "
            "Give a random subset of them"
        )


@dataclass(frozen=True, slots=True)
class _Study:
    """The columns and the design of one table, with the sums over pairs that several statistics need."""

    table: RunTable
    targets: Mapping[str, Floats]
    design: Design
    groups: Mapping[str, Integers]
    controls: Mapping[str, Floats | str]
    kept: dict[tuple[str, str, bytes], Linear | None] = field(default_factory=dict)
    drawn: dict[bytes, Integers] = field(default_factory=dict)

    @classmethod
    def of(
        cls, table: RunTable, targets: Sequence[str], group_by: Sequence[str], controls: Sequence[str]
    ) -> Self:
        _require_runs(table)
        columns = {name: target_column(table, name) for name in targets}
        known = [*table.measures, *table.hyperparameters, *table.outcomes]
        require_known(controls, known, "column to control for named")
        groups = group_rows(table, group_by) if group_by else {}
        usual = [name for name in setting_names(table) if name not in controls]
        design = design_of(table, group_by)
        return cls(table, columns, design, groups, control_columns(table, controls, usual))

    def quantities(self, *, details: bool) -> dict[Key, Quantity]:
        """Return every statistic in the order of the table; without ``details`` those of the answer alone."""
        found: dict[Key, Quantity] = {}
        for target in self.targets:
            for name in self.table.measures:
                found |= self.main(name, target)
                if details:
                    found |= self.details(name, target)
            if details:
                found |= self.differences(target)
        for name in self.table.measures:
            found |= self.selection(name)
        return found

    def main(self, name: str, target: str) -> dict[Key, Quantity]:
        """Return τ over all runs, within subgroups, and over pairs within the same value of a setting."""
        rows = self.rows(name, target)
        whole = self.tau(name, target, rows)
        found = {Key(name, target, "tau"): whole}
        for label, some in self.groups.items():
            inside = np.intersect1d(some, rows)
            found[Key(name, target, "tau", label)] = self.tau(name, target, inside)
        for label, numbers in self.design.strata.items():
            tau = self.within(name, target, rows, numbers)
            if whole.clear and tau.clear and (whole.value or 0) * (tau.value or 0) < 0:
                tau = replace(tau, note=SIMPSON)
            if tau.value is not None or label == SETTING:
                found[Key(name, target, "tau_within", label)] = tau
        return found

    def details(self, name: str, target: str) -> dict[Key, Quantity]:
        """Return the statistics beyond τ of one measure with one target."""
        rows = self.rows(name, target)
        x, y = self.column(name)[rows], self.column(target)[rows]
        found = {}
        for statistic, quantity in self.naive(x, y, rows).items():
            found[Key(name, target, statistic)] = quantity
        clusters, cells = self.clusters(rows, name, target), self.cells(rows)
        psi, mean = granulated(x, y, cells, clusters)
        found |= {Key(name, target, "psi", group): of for group, of in psi.items()}
        found[Key(name, target, "psi_mean")] = mean
        for control, column in self.controls.items():
            if control not in (name, target):
                found[Key(name, target, "tau_partial", control)] = self.partial(name, target, control, column)
        found |= {Key(name, target, *key): of for key, of in self.information(x, y, rows).items()}
        for statistic, quantity in self.sign_errors(x, y, target, rows).items():
            found[Key(name, target, statistic)] = quantity
        return found

    def naive(self, x: Floats, y: Floats, rows: Integers) -> dict[str, Quantity]:
        """Return Kendall's p that takes runs as independent, and Spearman's ρ with its permutation p."""
        if len(x) < 2 or np.ptp(x) == 0 or np.ptp(y) == 0:
            return {}
        from scipy import stats  # takes half a second, which only these details need

        plain = stats.kendalltau(x, y, variant="b")
        ranks = [mid_ranks(values) - (len(x) + 1) / 2 for values in (x, y)]
        rank_x, rank_y = (each / np.linalg.norm(each) for each in ranks)
        p = permutation_p(rank_x, rank_y, self.permutations(rows))
        why = "p permutes the gaps of whole settings" if p is not None else "no p: no two settings are alike"
        return {
            "tau_naive": Quantity(
                float(plain.statistic), p=float(plain.pvalue), n=len(x), note="p takes runs as independent"
            ),
            "spearman": Quantity(float(rank_x @ rank_y), p=p, n=len(x), note=why),
        }

    def information(self, x: Floats, y: Floats, rows: Integers) -> dict[tuple[str, str], Quantity]:
        """Return the conditional mutual information given each set of hyperparameters, and the least of them."""
        n = len(x)
        if n < 2 or n > MOST_CONDITIONED:
            why = f"computed for at most {MOST_CONDITIONED:,} runs" if n > 2 else "too few runs"
            return {("cmi_min", ""): Quantity(None, n=n, note=why)}
        values = {name: numbers[rows] for name, numbers in self.design.values.items()}
        sets = conditional_information(x, y, values)
        found = {("cmi", " + ".join(given)): Quantity(value, n=n) for given, value in sets.items() if value}
        defined = {given: value for given, value in sets.items() if value is not None}
        if not defined:
            return {("cmi_min", ""): Quantity(None, n=n, note="no pair of runs differs in both")}
        names, least = min(defined.items(), key=lambda item: item[1])
        order = self.permutations(rows)
        given = " + ".join(names) or "nothing"
        if not len(order):
            return found | {("cmi_min", given): Quantity(least, n=n, note="as published, without p")}
        chance, p = chance_of(least, x, y, [values[name] for name in names], order)
        note = (
            f"as published; {chance:.3f} by chance. p permutes settings: it tests for no association at all"
        )
        return found | {("cmi_min", given): Quantity(least, p=p, n=n, note=note)}

    def sign_errors(self, x: Floats, y: Floats, target: str, rows: Integers) -> dict[str, Quantity]:
        """Return the mean and the worst of the sign errors over environments."""
        sizes = numbers_of(self.table, "num_test") if target == "error_gap" else None
        sizes = None if sizes is None or not (sizes[rows] > 0).all() else sizes[rows]
        errors, sampled = sign_errors(x, y, sizes, self.cells(rows))
        if not len(errors):
            why = "no two settings that differ in one hyperparameter have 12 pairs of runs"
            return {"sign_error_mean": Quantity(None, n=len(x), note=why)}
        note = f"as published; over {len(errors):,} environments" + ", sampled" * sampled
        return {
            "sign_error_mean": Quantity(float(errors.mean()), n=len(x), note=note),
            "sign_error_p90": Quantity(float(np.quantile(errors, 0.9)), n=len(x), note=note),
            "sign_error_max": Quantity(float(errors.max()), n=len(x), note=note),
        }

    def differences(self, target: str) -> dict[Key, Quantity]:
        """Return Δτ of every two measures over the runs that have both."""
        found = {}
        names = self.table.measures
        for place, one in enumerate(names):
            for other in names[place + 1 :]:
                rows = self.rows(one, other, target)
                taus = self.linear(one, target, rows), self.linear(other, target, rows)
                if taus[0] is None or taus[1] is None:
                    delta = Quantity(None, n=len(rows), note="τ of one of them is undefined")
                else:
                    delta = tau_difference(taus[0], taus[1], self.clusters(rows, one, other, target))
                found[Key(one, target, "tau_difference", other)] = delta
        return found

    def selection(self, name: str) -> dict[Key, Quantity]:
        """Return what picking a run by the measure costs in test error, or else in each target of known direction."""
        error = numbers_of(self.table, "test_error")
        outcomes = dict(self.targets) if error is None else {"test_error": error}
        found: dict[Key, Quantity] = {}
        for outcome, column in outcomes.items():
            larger = direction_of_target(self.table, outcome)
            if larger is None:
                continue
            costs = regrets(self.column(name), column if larger == "worse" else -column, direction_of(name))
            found |= {Key(name, outcome, *key): of for key, of in costs.items()}
        return found

    def partial(self, name: str, target: str, control: str, column: Floats | str) -> Quantity:
        """Return τ of a measure and a target given a control, over the runs that have all three."""
        if isinstance(column, str):
            return Quantity(None, note=column)
        rows = self.rows(name, target, control)
        xy, xz, zy = (
            self.linear(a, b, rows) for a, b in ((name, target), (name, control), (control, target))
        )
        if xy is None or xz is None or zy is None:
            return Quantity(None, n=len(rows), note="measure, target or control is constant")
        return partial_tau(xy, xz, zy, self.clusters(rows, name, target, control))

    def tau(self, name: str, target: str, rows: Integers) -> Quantity:
        linear = self.linear(name, target, rows)
        if linear is None:
            return Quantity(None, n=len(rows), note=self._undefined(name, target, rows))
        return tau_quantity(linear, self.clusters(rows, name, target))

    def _undefined(self, name: str, target: str, rows: Integers) -> str:
        if len(rows) < 2:
            return f"{len(rows)} run{'s' * (len(rows) != 1)} with both values; τ needs 2"
        what = "the measure" if np.ptp(self.column(name)[rows]) == 0 else f"{target}"
        return f"{what} is constant over {len(rows)} runs"

    def within(self, name: str, target: str, rows: Integers, numbers: Integers) -> Quantity:
        x, y = self.column(name)[rows], self.column(target)[rows]
        clusters = self.clusters(rows, name, target)
        linear = linear_tau(x, y, clusters.setting, numbers[rows])
        if linear is None:
            return Quantity(None, n=len(rows), note="no two runs of a group differ in both")
        return tau_quantity(linear, clusters)

    def linear(self, a: str, b: str, rows: Integers) -> Linear | None:
        """Return τ of two columns over ``rows``, from the last time where it was asked for before."""
        key = (min(a, b), max(a, b), rows.tobytes())
        if key not in self.kept:
            x, y = self.column(a)[rows], self.column(b)[rows]
            self.kept[key] = linear_tau(x, y, self.clusters(rows).setting)
        return self.kept[key]

    def permutations(self, rows: Integers) -> Integers:
        key = rows.tobytes()
        if key not in self.drawn:
            self.drawn[key] = permute_settings(self.clusters(rows), np.random.default_rng(0))
        return self.drawn[key]

    def rows(self, *names: str) -> Integers:
        """Return the runs that have a value in all columns ``names``."""
        return np.flatnonzero(np.isfinite([self.column(name) for name in names]).all(axis=0))

    def column(self, name: str) -> Floats:
        if name in self.targets:
            return self.targets[name]
        if name in self.table.measures:
            return self.table.frame[name].to_numpy(dtype=float)
        control = self.controls[name]
        assert not isinstance(control, str)
        return control

    def clusters(self, rows: Integers, *names: str) -> Clusters:
        """Return the settings and seeds of ``rows``; the seeds only where they matter to the columns ``names``."""
        seed = self.design.seed
        columns = [self.column(name)[rows] for name in names]
        return clusters_of(self.design.setting[rows], None if seed is None else seed[rows], *columns)

    def cells(self, rows: Integers) -> dict[str, tuple[Integers, Integers]]:
        return {name: (cell[rows], value[rows]) for name, (cell, value) in self.design.cells.items()}
