"""τ over the pairs of runs whose gaps differ by more than the test and training sets' sampling noise."""

import numpy as np

from gm_probe.analysis.design import numbers_of
from gm_probe.analysis.pair_sums import pair_sums
from gm_probe.analysis.rank import BLOCK, Bits, Floats, mask_bits
from gm_probe.analysis.results import NoiseFiltered, Quantity
from gm_probe.analysis.sample import Draws, Sample
from gm_probe.analysis.strata import pooled
from gm_probe.tables.table import RunTable

NEEDED = ("test_error", "num_test", "train_error", "num_train")


def gap_error(table: RunTable) -> tuple[Floats | None, str | None]:
    """Binomial standard error of each run's error gap (n,), NaN where unknown; or the reason for none.

    Test and training errors count as independent, as do those of two runs: on one test set they are not, so
    that the filter errs on the side of dropping pairs.
    """
    columns = {name: values for name in NEEDED if (values := numbers_of(table, name)) is not None}
    absent = [name for name in NEEDED if name not in columns]
    if absent:
        return None, f"the table lacks {', '.join(absent)}, so the gap's sampling error is unknown"
    test, num_test, train, num_train = columns.values()
    usable = (test >= 0) & (test <= 1) & (train >= 0) & (train <= 1) & (num_test > 0) & (num_train > 0)
    if not usable.any():
        return None, (
            "no run has errors in [0, 1] and set sizes above 0, so the gap's sampling error is unknown"
        )
    variance = np.full(table.num_runs, np.nan)
    variance[usable] = (test * (1 - test) / num_test)[usable] + (train * (1 - train) / num_train)[usable]
    return np.sqrt(variance), None


def noise_filtered(sample: Sample, gap: str, table: RunTable, draws: Draws) -> NoiseFiltered:
    """τ of pairs whose gaps differ by more than 1.96 standard errors; runs of unknown error are left out."""
    pairs = sample.n * (sample.n - 1) // 2
    if gap != "error_gap":
        return NoiseFiltered(
            Quantity(None, reason=f"{gap} is not a proportion, so it has no binomial error"), 0, pairs
        )
    errors, reason = gap_error(table)
    if errors is None:
        return NoiseFiltered(Quantity(None, reason=reason), 0, pairs)
    kept = sample.only(np.isfinite(errors[sample.rows]))
    error = errors[kept.rows]
    clear = draws.once(("clear", kept.y.tobytes(), error.tobytes()), lambda: clear_pairs(kept.y, error))
    sums = pair_sums(kept.x, kept.y, kept.setting, kept.num_settings, clear)
    tau = pooled(sums, kept, "no pair differs by 1.96 standard errors in the gap, and in the measure")
    return NoiseFiltered(tau, int(sums.total[2]), pairs)


def clear_pairs(gap: Floats, error: Floats) -> Bits:
    """(n, ⌈n/64⌉) the runs whose ``gap`` differs from each run's by more than 1.96 standard errors of both."""
    step = max(1, BLOCK // max(len(gap), 1))
    blocks = []
    for start in range(0, len(gap), step):
        rows = slice(start, start + step)
        difference = gap[rows, None] - gap
        blocks.append(mask_bits(difference**2 > 1.96**2 * (error[rows, None] ** 2 + error**2)))
    return np.concatenate(blocks) if blocks else np.empty((0, 0), np.uint64)
