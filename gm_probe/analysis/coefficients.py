"""Kendall's τ-b over all runs, within groups, partial, and its differences; and granulated ψ.

Each comes with its influence: what a run's weight changes it by. All intervals are made of influences, in one way.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np

from gm_probe.analysis.design import Cells
from gm_probe.analysis.intervals import (
    LEAST_UNITS,
    Clusters,
    Quantity,
    Spread,
    clusters_of,
    coefficient,
    difference,
    settings_spread,
    with_seeds,
)
from gm_probe.analysis.run_pairs import Floats, Integers, dense_ranks, pair_sums


@dataclass(frozen=True, slots=True)
class Linear:
    """A statistic's ``value``, each run's ``influence`` (n,) on it, and its part from pairs ``inside`` settings.

    ``paired`` settings have pairs with those of the same of ``groups`` groups; the two are equal where all pairs are
    inside settings.
    """

    value: float
    influence: Floats
    inside: Floats
    paired: int
    groups: int

    def sums(self, clusters: Clusters) -> Floats:
        """Return each setting's share (S,); a pair inside a setting counts once."""
        weights = self.influence - self.inside / 2
        return np.bincount(clusters.setting, weights, clusters.num_settings).astype(float)

    def settings_spread(self, clusters: Clusters) -> Spread:
        return settings_spread(self.sums(clusters), self.paired, self.groups)

    def spread(self, clusters: Clusters) -> Spread:
        """Return the variance over settings and the seeds that they share."""
        return with_seeds(self.settings_spread(clusters), self.influence, clusters)

    def limit(self, clusters: Clusters) -> str | None:
        """Say why no interval is possible; None where one is."""
        if clusters.limit or self.paired >= LEAST_UNITS:
            return clusters.limit
        return f"{self.paired} {clusters.unit} are paired; an interval needs {LEAST_UNITS}"

    def combined(self, value: float, terms: Sequence[tuple[float, Self]]) -> "Linear":
        """Return the statistic ``value`` whose derivatives by this one and others are ``terms``."""
        influence = sum((slope * of.influence for slope, of in terms), np.zeros_like(self.influence))
        inside = sum((slope * of.inside for slope, of in terms), np.zeros_like(self.inside))
        return Linear(value, influence, inside, self.paired, self.groups)


def linear_tau(x: Floats, y: Floats, setting: Integers, group: Integers | None = None) -> Linear | None:
    """Return τ-b over all pairs of runs (n,), or those inside each ``group`` (n,); None if undefined.

    τ-b = (concordant − discordant) / √((pairs untied in x) (pairs untied in y)).

    Source: Kendall 1945, "The treatment of ties in ranking problems".
    """
    group = np.zeros_like(setting) if group is None else group
    sums = pair_sums(x, y, group)
    score, untied_x, untied_y = sums.sum(axis=1) / 2
    if untied_x == 0 or untied_y == 0:
        return None
    root = math.sqrt(untied_x * untied_y)
    tau = score / root
    slopes = np.array([1 / root, -tau / 2 / untied_x, -tau / 2 / untied_y])
    inside = pair_sums(x, y, _joint(group, setting))
    return Linear(float(tau), slopes @ sums, slopes @ inside, *_paired(setting, group))


def _paired(setting: Integers, group: Integers) -> tuple[int, int]:
    """Return how many settings have pairs with others of their ``group`` (n,), and in how many groups.

    Without any, return how many have pairs of their own runs, twice.
    """
    joint = _joint(group, setting)
    runs = np.bincount(joint)
    first = np.unique(joint, return_index=True)[1]
    sizes = np.bincount(dense_ranks(group[first]))
    several = sizes[sizes > 1]
    return (int(several.sum()), len(several)) if len(several) else (int((runs > 1).sum()),) * 2


def tau_quantity(linear: Linear, clusters: Clusters) -> Quantity:
    """Return τ, or a partial τ, with its interval."""
    n = len(linear.influence)
    if why := linear.limit(clusters):
        return Quantity(linear.value, n=n, note=f"no interval: {why}")
    return coefficient(linear.value, linear.spread(clusters), n)


def kendall(x: Floats, y: Floats, setting: Integers | None = None, seed: Integers | None = None) -> Quantity:
    """Return τ-b of ``x`` with ``y`` over the runs (n,) that have both; without a ``setting`` each run is its own."""
    rows = np.flatnonzero(np.isfinite(x) & np.isfinite(y))
    x, y = x[rows], y[rows]
    of_seed = None if seed is None else seed[rows]
    clusters = clusters_of(rows if setting is None else setting[rows], of_seed, x, y)
    linear = linear_tau(x, y, clusters.setting)
    if linear is None:
        return Quantity(None, n=len(rows), note="one of the two is constant, or fewer than 2 runs have both")
    return tau_quantity(linear, clusters)


def tau_difference(one: Linear, other: Linear, clusters: Clusters) -> Quantity:
    """Return Δτ = τ of ``one`` − τ of ``other``, both over the same runs."""
    linear = one.combined(one.value - other.value, [(1.0, one), (-1.0, other)])
    n = len(linear.influence)
    if why := linear.limit(clusters):
        return Quantity(linear.value, n=n, note=f"no interval: {why}")
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


def granulated(
    x: Floats, y: Floats, cells: Mapping[str, Cells], clusters: Clusters
) -> tuple[dict[str, Quantity], Quantity]:
    """Return ψ of each hyperparameter of ``cells`` (over these runs), and their mean Ψ.

    A cell holds the runs that agree in all other hyperparameters. Its τ is the mean of sign(xᵢ − xⱼ) sign(yᵢ − yⱼ) over
    its pairs of runs that differ in the hyperparameter; ψ is the mean over cells.

    Source: Jiang et al. 2020, "Fantastic Generalization Measures and Where to Find Them", section 2.2.2.
    """
    own = pair_sums(x, y, clusters.setting)[0]  # pairs that differ in seed only count in no cell
    found, counted, psi = [], np.zeros(len(x), bool), {}
    for name, (cell, value) in cells.items():
        partners = _partners(cell, value)
        if not partners.any():
            psi[name] = Quantity(None, n=len(x), note=f"no two runs differ in {name} alone")
            continue
        found.append(_linear_psi(pair_sums(x, y, cell)[0] - own, partners, cell, clusters))
        psi[name] = _mean(found[-1:], int((partners > 0).sum()), clusters)
        counted |= partners > 0
    if not found:
        note = "no two runs differ in one hyperparameter alone" if cells else "no hyperparameter is known"
        return psi, Quantity(None, n=len(x), note=note)
    return psi, _mean(found, int(counted.sum()), clusters)


def _partners(cell: Integers, value: Integers) -> Integers:
    """Return the number of runs in each run's ``cell`` (n,) that have another ``value`` (n,)."""
    cell, setting = dense_ranks(cell), _joint(cell, value)
    return np.bincount(cell)[cell] - np.bincount(setting)[setting]


def _linear_psi(score: Floats, partners: Integers, cell: Integers, clusters: Clusters) -> Linear:
    """Return ψ from each run's ``score`` (n,) over its pairs with its ``partners`` (n,), as many, in its ``cell``."""
    cell = dense_ranks(cell)
    pairs = np.bincount(cell, partners)  # each counts for both of its runs
    used = pairs > 0
    mean = float(np.mean(np.bincount(cell, score)[used] / pairs[used]))
    influence = 2 * (score - mean * partners) / (np.maximum(pairs, 1)[cell] * np.count_nonzero(used))
    return Linear(mean, influence, np.zeros_like(influence), *_paired(clusters.setting, cell))


def _joint(one: Integers, other: Integers) -> Integers:
    return dense_ranks(one * (other.max(initial=0) + 1) + other)


def _mean(parts: Sequence[Linear], n: int, clusters: Clusters) -> Quantity:
    """Return the mean of ψ's over ``n`` runs with its interval.

    What corrects the variance of each ψ corrects its part in that of the mean.
    """
    value = float(np.mean([part.value for part in parts]))
    if why := min(parts, key=lambda part: part.paired).limit(clusters):
        return Quantity(value, n=n, note=f"no interval: {why}")
    spreads = [part.settings_spread(clusters) for part in parts]
    squares = [float(np.sum(part.sums(clusters) ** 2)) for part in parts]
    mean = parts[0].combined(value, [(1 / len(parts), part) for part in parts])
    corrections = sum(spread.variance for spread in spreads) - sum(squares)
    variance = float(np.sum(mean.sums(clusters) ** 2)) + corrections / len(parts) ** 2
    settings = Spread(max(variance, 0.0), min(spread.freedom for spread in spreads))
    return coefficient(value, with_seeds(settings, mean.influence, clusters), n)
