"""Partial τ: the association of measure and gap beyond what a third variable explains of both.

Source: Kendall 1942, "Partial rank correlation". Its p permutes whole settings within strata of the control:
its values where there are few, else fifths, within which it still varies a little.
"""

import numpy as np

from gm_probe.analysis.intervals import jackknife_interval, seeds_share
from gm_probe.analysis.pair_sums import tau_of
from gm_probe.analysis.permutation import permutation_p, permuted_coefficients
from gm_probe.analysis.rank import Floats, Integers, dense_ranks
from gm_probe.analysis.results import Quantity
from gm_probe.analysis.sample import Draws, Sample

NUM_STRATA = 5


def partial(sample: Sample, control: Floats, draws: Draws) -> Quantity:
    """τ of ``sample`` given ``control`` (n of the table, NaN where unknown), over the runs that have all three."""
    z = control[sample.rows]
    known = np.isfinite(z)
    sample, z = sample.only(known), z[known]
    if sample.n < 3:
        return Quantity(None, n=sample.n, reason=f"{sample.n} runs have measure, gap and control")
    pairs = {"measure and gap": (sample.x, sample.y), "measure and control": (sample.x, z),
             "control and gap": (z, sample.y)}  # fmt: skip
    sums = [draws.sums(x, y, sample) for x, y in pairs.values()]
    for name, of in zip(pairs, sums, strict=True):
        if not of.total[1:].all():
            return Quantity(None, n=sample.n, reason=f"{name}: one of them is constant")
    whole = [float(tau_of(of.total)) for of in sums]
    for name, tau in list(zip(pairs, whole, strict=True))[1:]:
        if 1 - abs(tau) < 1e-12:
            return Quantity(
                None, n=sample.n, reason=f"{name} have the same order, so nothing remains to explain"
            )
    value = float(_partial(*whole))
    without_run = _partial(*(tau_of(of.leave_one_run_out()) for of in sums))
    low, high, why = jackknife_interval(
        value,
        _partial(*(tau_of(of.leave_one_out()) for of in sums)),
        share=seeds_share(value, without_run, sample.setting, sample.seed),
    )
    permutations = draws.blocks(sample.setting, _strata(z, sample), sample.seed)
    p = None
    if len(permutations.rows):
        of_measure, of_control = (
            permuted_coefficients(x, sample.y, permutations.rows) for x in (sample.x, z)
        )
        of_pair = permuted_coefficients(sample.x, z, permutations.rows[:0])[0]
        p = permutation_p(_partial(of_measure, of_pair, of_control))
    return Quantity(value, low, high, p, sample.n, interval_reason=why, p_reason=permutations.limit)


def _partial(xy: Floats | float, xz: Floats | float, zy: Floats | float) -> Floats:
    with np.errstate(invalid="ignore", divide="ignore"):
        return (xy - xz * zy) / np.sqrt((1 - np.square(xz)) * (1 - np.square(zy)))


def _strata(z: Floats, sample: Sample) -> Integers:
    """(n,) stratum of each run's setting: its value of z where there are few, else a fifth of the settings."""
    means = sample.means(z)
    ranks = dense_ranks(means)
    if ranks.max() >= NUM_STRATA * 2:
        ranks = np.argsort(np.argsort(means, kind="stable"), kind="stable") * NUM_STRATA // len(means)
    return ranks[sample.setting]
