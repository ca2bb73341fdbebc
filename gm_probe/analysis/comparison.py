"""Is one measure's τ larger than another's? Differences on shared resamples, adjusted for their number."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from scipy import stats

from gm_probe.analysis.intervals import LEAST_UNITS, seeds_share
from gm_probe.analysis.pair_sums import pair_sums, tau_of
from gm_probe.analysis.rank import Floats
from gm_probe.analysis.results import Comparison, Quantity
from gm_probe.analysis.sample import Draws, Sample


@dataclass(frozen=True, slots=True)
class Resampled:
    """A measure's τ, its values without each run (n,), and those on the shared resamples of settings (B,)."""

    sample: Sample
    tau: float
    without_run: Floats
    resampled: Floats


def compare(
    samples: Mapping[str, Sample], known: Mapping[str, Resampled], draws: Draws
) -> tuple[Comparison, ...]:
    """Every pair of the measures ``samples``, each on the runs that have both; ``known`` where τ is defined.

    Of measures with equal values, as tr H and tr F of ReLU networks, one counts in the adjustment, and all get its p.
    """
    pairs = list(combinations(samples, 2))
    differences = [_difference(samples, known, first, second, draws) for first, second in pairs]
    first_of: dict[tuple[bytes, bytes], str] = {}
    stands_for = {
        name: first_of.setdefault((of.x.tobytes(), of.rows.tobytes()), name) for name, of in samples.items()
    }
    distinct = {
        frozenset(pair): difference.p
        for pair, difference in zip(pairs, differences, strict=True)
        if all(stands_for[name] == name for name in pair)
    }
    adjusted = dict(zip(distinct, holm(list(distinct.values())), strict=True))
    return tuple(
        Comparison(*pair, difference, adjusted.get(frozenset(map(stands_for.__getitem__, pair))))
        for pair, difference in zip(pairs, differences, strict=True)
    )


def holm(p: Sequence[float | None]) -> list[float | None]:
    """p-values adjusted for their number by Holm's step-down; None stays None and does not count.

    Source: Holm 1979, "A simple sequentially rejective multiple test procedure".
    """
    order = sorted((i for i, value in enumerate(p) if value is not None), key=lambda i: p[i] or 0.0)
    adjusted: list[float | None] = [None] * len(p)
    highest = 0.0
    for place, i in enumerate(order):
        highest = max(highest, min(1.0, (len(order) - place) * (p[i] or 0.0)))
        adjusted[i] = highest
    return adjusted


def resample(sample: Sample, draws: Draws) -> Resampled | None:
    """None where τ is undefined."""
    sums = pair_sums(sample.x, sample.y, sample.setting, sample.num_settings, between=True)
    if not sums.total[1:].all():
        return None
    resampled = tau_of(sums.resampled(draws.counts(sample.num_settings)))
    return Resampled(sample, float(tau_of(sums.total)), tau_of(sums.leave_one_run_out()), resampled)


def _difference(
    samples: Mapping[str, Sample], known: Mapping[str, Resampled], first: str, second: str, draws: Draws
) -> Quantity:
    """p and interval from the resamples' standard error, what shared seeds add, and Student's t."""
    a, b = samples[first], samples[second]
    if np.array_equal(a.rows, b.rows):
        pair = known.get(first), known.get(second)
    else:
        pair = (
            resample(a.only(np.isin(a.rows, b.rows)), draws),
            resample(b.only(np.isin(b.rows, a.rows)), draws),
        )
    one, other = pair
    if one is None or other is None:
        return Quantity(
            None, reason=f"τ of {first if one is None else second} is undefined on the runs of both"
        )
    value, num = one.tau - other.tau, one.sample.num_settings
    if num < LEAST_UNITS:
        why = f"{num} settings; an interval needs {LEAST_UNITS}"
        return Quantity(value, n=one.sample.n, interval_reason=why, p_reason=why)
    resampled = one.resampled - other.resampled
    error = float(np.std(resampled[np.isfinite(resampled)], ddof=1))
    if error < 1e-12:
        why = "the two measures order the runs alike in every resample"
        return Quantity(value, n=one.sample.n, interval_reason=why, p_reason=why)
    without_run = one.without_run - other.without_run
    share = seeds_share(value, without_run, one.sample.setting, one.sample.seed)
    error, freedom = share.added_to(error, num - 1)
    half = float(stats.t.ppf(0.975, freedom)) * error
    p = 2 * float(stats.t.sf(abs(value) / error, freedom))
    return Quantity(value, value - half, value + half, p, one.sample.n)
