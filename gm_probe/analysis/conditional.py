"""Conditional mutual information between the order of the measure and the order of the gap.

For a pair of runs V_μ = sign(μ − μ') and V_g = sign(g − g'). K(S) = I(V_μ; V_g | U_S) / H(V_g | U_S), where U_S
are the values of the hyperparameters S that both runs share. A pair counts in both orders, so that signs are
balanced: a cell with a part c of its pairs concordant has 1 − h(c) bits, and H is 1 bit. Small cells are far
above 0 without any association, so K's mean over permutations of whole settings' gaps is taken off.

Source: Jiang et al. 2020; the PGDL competition (Jiang et al. 2021) takes the minimum over |S| ≤ 2.
"""

from collections.abc import Mapping, Sequence
from itertools import combinations

import numpy as np
from scipy import special

from gm_probe.analysis.rank import Floats, Integers, permuted_scores
from gm_probe.analysis.results import ConditionalInformation, Conditioning
from gm_probe.analysis.sample import Draws, Sample

PERMUTATIONS = 200
LEAST_PERMUTATIONS = 5
RUNS_TIMES_PERMUTATIONS = 5 * 10**4
LEAST_FOR_P = 100
MOST_IN_PAIRS = 30
"""Hyperparameters of which sets of two are looked at; their number grows with the square."""


def conditioning(sample: Sample, values: Mapping[str, Integers], draws: Draws) -> Conditioning:
    """K(S) for every S of at most two (of many: one) of the hyperparameters ``values`` (n of the table, as numbers)."""
    most = max(LEAST_PERMUTATIONS, RUNS_TIMES_PERMUTATIONS // max(sample.n, 1))
    if min(PERMUTATIONS, draws.resamples) > most:
        draws.notes[f"{most} permutations for conditional information for {sample.n:,} runs"] = None
    permutations = draws.blocks(sample.setting, seed=sample.seed)
    rows = permutations.rows[: min(PERMUTATIONS, most)]
    if not len(rows):
        return Conditioning((), None, 0, f"K's bias cannot be estimated: {permutations.limit}")
    rows, num_drawn = np.concatenate([np.arange(sample.n)[None, :], rows]), len(permutations.rows)
    largest = 2 if len(values) <= MOST_IN_PAIRS else 1
    if largest == 1:
        draws.notes[
            f"{len(values)} hyperparameters: conditional information is computed given one at a time. For "
            f"two at a time, choose at most {MOST_IN_PAIRS} with --hyper"
        ] = None
    sets = [
        _information(sample, given, [values[name][sample.rows] for name in given], rows, num_drawn)
        for size in range(largest + 1)
        for given in combinations(values, size)
    ]
    defined = [(each.value, each) for each in sets if each.value is not None]
    if not defined:
        return Conditioning(tuple(sets), None, len(rows) - 1, "no set of hyperparameters has a defined K")
    return Conditioning(tuple(sets), min(defined, key=lambda pair: pair[0])[1], len(rows) - 1)


def _information(
    sample: Sample, given: tuple[str, ...], values: Sequence[Integers], rows: np.ndarray, num_drawn: int
) -> ConditionalInformation:
    """``rows`` (B + 1, n): the identity, and B of the ``num_drawn`` permutations."""
    cell = np.zeros(sample.n, np.int64)
    for numbers in values:
        cell = cell * (numbers.max() + 1) + numbers
    order = np.argsort(cell, kind="stable")
    cells = np.split(order, np.flatnonzero(np.diff(cell[order])) + 1)
    information, pairs, used = np.zeros(len(rows)), np.zeros(len(rows)), 0
    for members in cells:
        score, both = permuted_scores(sample.x[members], sample.y, rows[:, members])
        information += both * _bits((1 + score / np.maximum(both, 1)) / 2)
        pairs += both
        used += int(both[0] > 0)
    if not used:
        reason = f"none of {len(cells)} cells has a pair of runs untied in measure and gap"
        return ConditionalInformation(given, None, None, None, None, 0, 0, reason, len(cells))
    k = information / np.maximum(pairs, 1)
    raw, null = float(k[0]), float(k[1:].mean())
    p = float((k >= k[0] - 1e-12).mean()) if len(rows) > min(LEAST_FOR_P, num_drawn) else None
    return ConditionalInformation(
        given, raw - null, raw, null, p, int(pairs[0]), used, None, len(cells) - used
    )


def _bits(concordant: Floats) -> Floats:
    """1 − h(c): the bits that one sign tells of the other."""
    return 1 - (special.entr(concordant) + special.entr(1 - concordant)) / np.log(2)
