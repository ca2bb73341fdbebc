"""τ between the settings' means, within settings, and within any strata: where an association comes from."""

import math
from dataclasses import replace

import numpy as np

from gm_probe.analysis.intervals import (
    LEAST_UNITS,
    Share,
    excludes_zero,
    jackknife_error,
    jackknife_interval,
)
from gm_probe.analysis.pair_sums import PairSums, pair_sums, tau_of
from gm_probe.analysis.permutation import FEW_ARRANGEMENTS, permutation_p, permuted_coefficients
from gm_probe.analysis.rank import BLOCK, Floats, Integers, permuted_scores
from gm_probe.analysis.results import Correlation, Quantity, Stratified
from gm_probe.analysis.sample import Draws, Sample, tau_interval

PAIRWISE_RUNS = 50  # settings of more runs are faster one by one


def pooled(sums: PairSums, sample: Sample, reason: str) -> Quantity:
    """τ over the pairs of ``sample`` in ``sums`` with its jackknife interval; undefined for ``reason`` without a pair.

    ``n`` counts the pairs untied in x, or in y where these are fewer.
    """
    n = int(sums.total[1:].min())
    if n == 0:
        return Quantity(None, reason=reason)
    tau = float(tau_of(sums.total))
    low, high, why = tau_interval(tau, sums, sample)
    return Quantity(tau, low, high, n=n, interval_reason=why)


def between(sample: Sample, draws: Draws) -> Quantity:
    """τ of the settings' mean measures with their mean gaps; p lets the means change places."""
    if sample.one_setting:
        return Quantity(None, reason="all runs have the same setting")
    num = sample.num_settings
    x, y = sample.means(sample.x), sample.means(sample.y)
    each = np.arange(num)
    sums = pair_sums(x, y, each, num)
    if not sums.total[1:].all():
        return Quantity(None, n=num, reason=f"the means of {num} settings are constant in measure or gap")
    tau = float(tau_of(sums.total))
    low, high, why = jackknife_interval(tau, tau_of(sums.leave_one_out()), share=_between_share(sample))
    permutations = draws.blocks(each)
    p = permutation_p(permuted_coefficients(x, y, permutations.rows)) if len(permutations.rows) else None
    return Quantity(tau, low, high, p, num, interval_reason=why, p_reason=permutations.limit)


def _between_share(sample: Sample) -> Share:
    """Of seeds in τ between settings, by leaving each out; what runs would bring anyway stays in it."""
    if sample.seed is None or sample.num_seeds < LEAST_UNITS:
        return Share()
    taus = []
    for seed in range(sample.num_seeds):
        part = sample.only(sample.seed != seed)
        each = np.arange(part.num_settings)
        taus.append(tau_of(pair_sums(part.means(part.x), part.means(part.y), each, part.num_settings).total))
    without = np.array(taus)
    return Share(jackknife_error(without) ** 2, len(without)) if np.isfinite(without).all() else Share()


def within(sample: Sample, sums: PairSums, draws: Draws) -> Quantity:
    """τ over the pairs of runs of the same setting, pooled; p lets the runs of a setting change places.

    Seeds that settings share change places alike in all of them.
    """
    if sample.one_setting:
        return Quantity(None, reason="all runs have the same setting, so τ itself is within it")
    if sample.num_settings == sample.n:
        return Quantity(None, reason="no setting has two runs")
    result = pooled(sums.inside(), sample, "measure or gap is constant within every setting")
    if result.value is None:
        return result
    scores = _scores_within(sample, draws.within(sample.setting, sample.seed))
    result = replace(result, p=permutation_p(scores), p_reason=_few_seeds(sample))
    if 0 < sample.num_seeds < LEAST_UNITS:  # settings repeat what these few differ by
        why = f"{sample.num_seeds} seeds that settings share; an interval needs {LEAST_UNITS}"
        return replace(result, low=None, high=None, interval_reason=why)
    return result


def _few_seeds(sample: Sample) -> str | None:
    if sample.seed is None:
        return None
    num = sample.num_seeds
    arrangements = math.factorial(min(num, 20))
    if arrangements >= 10 * FEW_ARRANGEMENTS:
        return None
    least = f"{arrangements} arrangements of {num} seeds, so p is at least {min(1, 2 / arrangements):.2g}"
    whole = len(sample.seed) == num * sample.num_settings and not (sample.seed < 0).any()
    return least if whole else f"{least}, and is not exact, for some settings lack some seeds"


def stratified(sample: Sample, by: str, stratum: Integers, whole: Correlation) -> Stratified:
    """τ over the pairs within the same ``stratum`` (n,), and whether it opposes that of the ``whole``."""
    strata = np.unique(stratum)
    own, others = np.zeros((3, sample.num_settings)), np.zeros((3, sample.num_settings))
    of_run, inside = np.zeros((3, sample.n)), np.zeros((3, sample.n))
    for each in strata:
        members = stratum == each
        sums = pair_sums(sample.x[members], sample.y[members], sample.setting[members], sample.num_settings)
        own += sums.own
        others += sums.others
        of_run[:, members], inside[:, members] = sums.of_run, sums.of_run_inside
    tau = pooled(
        PairSums(own, others, of_run, inside), sample, "measure or gap is constant within every stratum"
    )
    clear = excludes_zero(tau.low, tau.high) and excludes_zero(whole.low, whole.high)
    opposes = clear and tau.value is not None and whole.tau is not None and tau.value * whole.tau < 0
    return Stratified(by, tau, len(strata), opposes)


def _scores_within(sample: Sample, rows: np.ndarray) -> Floats:
    """(B + 1,) the score over pairs of one setting as it is, then with each ``y[rows[b]]``."""
    rows = np.concatenate([np.arange(sample.n)[None, :], rows])
    scores = np.zeros(len(rows))
    size = np.bincount(sample.setting)
    for each in np.flatnonzero(size > PAIRWISE_RUNS):
        members = np.flatnonzero(sample.setting == each)
        scores += permuted_scores(sample.x[members], sample.y, rows[:, members])[0]
    order = np.argsort(sample.setting, kind="stable")
    order = order[size[sample.setting[order]] <= PAIRWISE_RUNS]
    for lag in range(1, PAIRWISE_RUNS):
        first, second = order[:-lag], order[lag:]
        same = sample.setting[first] == sample.setting[second]
        first, second = first[same], second[same]
        if not len(first):
            break
        signs = np.sign(sample.x[first] - sample.x[second])
        step = max(1, BLOCK // len(first))
        for start in range(0, len(rows), step):
            some = rows[start : start + step]
            change = np.sign(sample.y[some[:, first]] - sample.y[some[:, second]])
            scores[start : start + step] += change @ signs
    return scores
