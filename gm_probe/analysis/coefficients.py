"""Kendall's τ-b and what is made of it: within groups, partial, differences; and granulated ψ.

Each comes with its influence: what a run's weight changes it by. All intervals are made of influences, in one way.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np

from gm_probe.analysis.design import Cells
from gm_probe.analysis.intervals import (
    Clusters,
    Quantity,
    Spread,
    clusters_of,
    coefficient,
    difference,
    settings_spread,
    with_seeds,
)
from gm_probe.analysis.pairs import Floats, Integers, dense_ranks, pair_sums

LEAST_CELLS = 4
"""Cells of a granulated ψ from which its error can be estimated."""


@dataclass(frozen=True, slots=True)
class Linear:
    """A statistic's ``value``, each run's ``influence`` (n,) on it, and its part from pairs ``inside`` settings."""

    value: float
    influence: Floats
    inside: Floats

    def spread(self, clusters: Clusters) -> Spread:
        """Return the variance over settings and the seeds that they share; a pair inside a setting counts once."""
        weights = self.influence - self.inside / 2
        sums = np.bincount(clusters.setting, weights, clusters.num_settings).astype(float)
        return with_seeds(settings_spread(sums), self.influence, clusters)

    def combined(self, value: float, terms: Sequence[tuple[float, Self]]) -> "Linear":
        """Return the statistic ``value`` whose derivatives by this one and others are ``terms``."""
        influence = sum((slope * of.influence for slope, of in terms), np.zeros_like(self.influence))
        inside = sum((slope * of.inside for slope, of in terms), np.zeros_like(self.inside))
        return Linear(value, influence, inside)


def linear_tau(sums: Floats, inside: Floats) -> Linear | None:
    """Return τ-b of the ``pair_sums`` (3, n) of some pairs, with those of them inside settings; None if undefined.

    τ-b = (concordant − discordant) / √((pairs untied in x) (pairs untied in y)).

    Source: Kendall 1945, "The treatment of ties in ranking problems".
    """
    score, untied_x, untied_y = sums.sum(axis=1) / 2
    if untied_x == 0 or untied_y == 0:
        return None
    root = math.sqrt(untied_x * untied_y)
    tau = score / root
    slopes = np.array([1 / root, -tau / 2 / untied_x, -tau / 2 / untied_y])
    return Linear(float(tau), slopes @ sums, slopes @ inside)


def tau_quantity(linear: Linear, clusters: Clusters) -> Quantity:
    """Return τ, or a partial τ, with its interval."""
    n = len(linear.influence)
    if clusters.limit:
        return Quantity(linear.value, n=n, note=f"no interval: {clusters.limit}")
    return coefficient(linear.value, linear.spread(clusters), n)


def kendall(x: Floats, y: Floats, setting: Integers | None = None, seed: Integers | None = None) -> Quantity:
    """Return τ-b of ``x`` with ``y`` over the runs (n,) that have both; without a ``setting`` each run is its own."""
    rows = np.flatnonzero(np.isfinite(x) & np.isfinite(y))
    x, y = x[rows], y[rows]
    of_seed = None if seed is None else seed[rows]
    clusters = clusters_of(rows if setting is None else setting[rows], of_seed, x, y)
    linear = linear_tau(pair_sums(x, y, np.zeros_like(rows)), pair_sums(x, y, clusters.setting))
    if linear is None:
        return Quantity(None, n=len(rows), note="one of the two is constant, or fewer than 2 runs have both")
    return tau_quantity(linear, clusters)


def tau_difference(one: Linear, other: Linear, clusters: Clusters) -> Quantity:
    """Return Δτ = τ of ``one`` − τ of ``other``, both over the same runs."""
    linear = one.combined(one.value - other.value, [(1.0, one), (-1.0, other)])
    n = len(linear.influence)
    if clusters.limit:
        return Quantity(linear.value, n=n, note=f"no interval: {clusters.limit}")
    return difference(linear.value, linear.spread(clusters), n)


def partial_tau(xy: Linear, xz: Linear, zy: Linear, clusters: Clusters) -> Quantity:
    """Return τ of x and y given z: what their association has beyond what z explains of both.

    Source: Kendall 1942, "Partial rank correlation".
    """
    n = len(xy.influence)
    for what, tau in (("measure and control", xz.value), ("control and target", zy.value)):
        if 1 - abs(tau) < 1e-12:
            return Quantity(None, n=n, note=f"{what} order the runs alike, so nothing remains to explain")
    root = math.sqrt((1 - xz.value**2) * (1 - zy.value**2))
    value = (xy.value - xz.value * zy.value) / root
    slopes = (
        (1 / root, xy),
        (-zy.value / root + value * xz.value / (1 - xz.value**2), xz),
        (-xz.value / root + value * zy.value / (1 - zy.value**2), zy),
    )
    return tau_quantity(xy.combined(float(value), slopes), clusters)


@dataclass(frozen=True, slots=True)
class _Cells:
    """The cells of one hyperparameter: which runs are in which, and each cell's τ."""

    run: Integers  # (n,) the cell of each run, −1 where it has no pair
    tau: Floats  # (M,)
    influence: Floats  # (n,) on the mean of the cells' τ


def granulated(
    x: Floats, y: Floats, cells: Mapping[str, Cells], clusters: Clusters, own: Floats
) -> tuple[dict[str, Quantity], Quantity]:
    """Return ψ of each hyperparameter of ``cells`` (over these runs), and their mean Ψ.

    A cell holds the runs that agree in all other hyperparameters. Its τ is the mean of sign(xᵢ − xⱼ) sign(yᵢ − yⱼ) over
    its pairs of runs that differ in the hyperparameter; ψ is the mean over cells. ``own`` (3, n) are the
    ``pair_sums`` inside settings, whose pairs differ in seed only and count in no cell.

    Source: Jiang et al. 2020, "Fantastic Generalization Measures and Where to Find Them", section 2.2.2.
    """
    found = {name: _cell_taus(x, y, *of, own) for name, of in cells.items()}
    used = {name: of for name, of in found.items() if len(of.tau)}
    psi = {
        name: _mean_over_cells([of], clusters)
        if len(of.tau)
        else Quantity(None, n=len(x), note=f"no two runs differ in {name} alone")
        for name, of in found.items()
    }
    if not used:
        note = "no two runs differ in one hyperparameter alone" if cells else "no hyperparameter is known"
        return psi, Quantity(None, n=len(x), note=note)
    return psi, _mean_over_cells(list(used.values()), clusters)


def _cell_taus(x: Floats, y: Floats, cell: Integers, value: Integers, own: Floats) -> _Cells:
    score = pair_sums(x, y, cell)[0] - own[0]
    cell = dense_ranks(cell)
    partners = np.bincount(cell)[cell] - np.bincount(setting := _joint(cell, value))[setting]
    pairs = np.bincount(cell, partners)
    kept = np.flatnonzero(pairs)
    tau = np.bincount(cell, score)[kept] / pairs[kept]
    run = np.full(len(pairs), -1)
    run[kept] = np.arange(len(kept))
    run = run[cell]
    inside = run >= 0
    influence = np.zeros(len(x))
    mean = tau.mean() if len(tau) else 0.0
    influence[inside] = 2 * (score - mean * partners)[inside] / (pairs[kept] * len(kept))[run[inside]]
    return _Cells(run, tau, influence)


def _joint(one: Integers, other: Integers) -> Integers:
    return dense_ranks(one * (other.max(initial=0) + 1) + other)


def _mean_over_cells(parts: Sequence[_Cells], clusters: Clusters) -> Quantity:
    """Return the mean over ``parts`` of the mean of their cells' τ.

    Cells are independent unless they share a setting, as those of two hyperparameters do.
    """
    value = float(np.mean([part.tau.mean() for part in parts]))
    n = int(np.any([part.run >= 0 for part in parts], axis=0).sum())
    fewest = min(len(part.tau) for part in parts)
    if clusters.limit or fewest < LEAST_CELLS:
        why = clusters.limit or f"ψ is a mean over {fewest} cells; an interval needs {LEAST_CELLS}"
        return Quantity(value, n=n, note=f"no interval: {why}")
    by_setting, repeated = np.zeros(clusters.num_settings), 0.0
    for part in parts:
        num = len(part.tau)
        error = (part.tau - part.tau.mean()) / (len(parts) * num) * math.sqrt(num / (num - 1))
        runs = np.flatnonzero(part.run >= 0)
        settings, first = np.unique(clusters.setting[runs], return_index=True)
        of_setting = part.run[runs[first]]
        by_setting[settings] += error[of_setting]
        repeated += float(((np.bincount(of_setting) - 1) * error**2).sum())
    settings_variance = max(float(by_setting @ by_setting) - repeated, 0.0)
    influence = sum((part.influence for part in parts), np.zeros(len(parts[0].run))) / len(parts)
    return coefficient(value, with_seeds(Spread(settings_variance, fewest - 1), influence, clusters), n)
