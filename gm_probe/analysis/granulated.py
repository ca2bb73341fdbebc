"""Granulated Kendall's coefficient ψ: does the measure follow the gap when one hyperparameter changes alone?

Source: Jiang et al. 2020, "Fantastic Generalization Measures and Where to Find Them".
"""

from collections.abc import Mapping

import numpy as np

from gm_probe.analysis.design import Cells
from gm_probe.analysis.intervals import LEAST_UNITS, fisher_interval, jackknife_error, jackknife_interval
from gm_probe.analysis.pair_sums import tau_of
from gm_probe.analysis.rank import Floats, Integers, sign_blocks
from gm_probe.analysis.results import Granulated, Granulation, Quantity
from gm_probe.analysis.sample import Sample

LEAST_VALUES = 3


def granulated(sample: Sample, cells: Mapping[str, Cells]) -> Granulated:
    """ψ under each hyperparameter of ``cells``, and their mean Ψ.

    A run is in a cell of every hyperparameter, so that Ψ's standard error takes the ψ as fully dependent.
    """
    psi, values, errors = {}, [], []
    for name, (cell, value) in cells.items():
        taus, num_cells, runs = _cell_taus(sample, cell[sample.rows], value[sample.rows])
        reason = (
            None if len(taus) else f"none of {num_cells} cells has {LEAST_VALUES} values of {name} untied"
        )
        result = Quantity(None, reason=reason)
        if len(taus):
            without = (taus.sum() - taus) / max(len(taus) - 1, 1)
            low, high, why = jackknife_interval(float(taus.mean()), without, "cells")
            result = Quantity(float(taus.mean()), low, high, n=len(taus), interval_reason=why)
            values.append(taus.mean())
            errors.append((jackknife_error(without), len(taus) - 1))
        psi[name] = Granulation(result, num_cells - len(taus), runs, runs / max(sample.n, 1))
    if not values:
        reason = "no hyperparameter has a ψ" if cells else "no hyperparameter is known"
        return Granulated(psi, Quantity(None, reason=reason))
    mean, freedom = float(np.mean(values)), min(each for _, each in errors)
    if freedom < LEAST_UNITS - 1:
        why = f"a hyperparameter has {freedom + 1} cells; an interval needs {LEAST_UNITS}"
        return Granulated(psi, Quantity(mean, n=len(values), interval_reason=why))
    low, high, why = fisher_interval(mean, float(np.mean([error for error, _ in errors])), freedom)
    return Granulated(psi, Quantity(mean, low, high, n=len(values), interval_reason=why))


def _cell_taus(sample: Sample, cell: Integers, value: Integers) -> tuple[Floats, int, int]:
    """τ of each cell with enough values and an untied pair, the number of all cells, the runs in those used."""
    order = np.argsort(cell, kind="stable")
    cells = np.split(order, np.flatnonzero(np.diff(cell[order])) + 1) if sample.n else []
    taus, runs = [], 0
    for members in cells:
        if len(np.unique(value[members])) >= LEAST_VALUES:
            tau = float(tau_of(_sums_across(sample.x[members], sample.y[members], value[members])))
            if np.isfinite(tau):
                taus.append(tau)
                runs += len(members)
    return np.array(taus), len(cells), runs


def _sums_across(x: Floats, y: Floats, value: Integers) -> Floats:
    """(3,) sums over the pairs of runs that differ in ``value``: seeds of one value form no pair."""
    sums = np.zeros(3)
    for (rows, sign_x), (_, sign_y) in zip(sign_blocks(x), sign_blocks(y), strict=True):
        differ = value[rows, None] != value
        for index, terms in enumerate((sign_x * sign_y, np.abs(sign_x), np.abs(sign_y))):
            sums[index] += terms[differ].sum(dtype=np.int64)
    return sums / 2
