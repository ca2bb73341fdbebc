"""What a measure is good for: predicting a new setting's gap, and choosing a run of low test error."""

import numpy as np
from scipy import optimize, stats

from gm_probe.analysis.design import numbers_of
from gm_probe.analysis.rank import Floats
from gm_probe.analysis.results import Prediction, Selection
from gm_probe.analysis.sample import Draws, Sample
from gm_probe.tables.table import RunTable

MOST_FOLDS = 50
LEAST_FOLDS = 3


def prediction(sample: Sample, draws: Draws) -> Prediction:
    """Mean absolute error of the gap of settings left out, by isotonic regression on the other settings' runs.

    The regression rises or falls as the other runs' rank correlation does. Beyond 2 ``MOST_FOLDS`` settings,
    settings are left out in as many groups.
    """
    folds = sample.num_settings if sample.num_settings <= 2 * MOST_FOLDS else MOST_FOLDS
    if folds < LEAST_FOLDS:
        reason = f"{folds} settings; prediction needs {LEAST_FOLDS}"
        return Prediction(None, None, None, folds, sample.n, reason)
    fold = draws.rng("folds").permutation(sample.num_settings) % folds
    if sample.num_settings > folds:
        draws.notes[f"predictions leave out {sample.num_settings:,} settings in {folds} groups"] = None
    fold_of_run = fold[sample.setting]
    errors, baseline = np.empty(sample.n), np.empty(sample.n)
    for each in range(folds):
        out, rest = fold_of_run == each, fold_of_run != each
        rising = _covariance(stats.rankdata(sample.x[rest]), stats.rankdata(sample.y[rest])) >= 0
        predicted = _isotonic(sample.x[rest], sample.y[rest], sample.x[out], rising)
        errors[out] = np.abs(sample.y[out] - predicted)
        baseline[out] = np.abs(sample.y[out] - sample.y[rest].mean())
    error, error_mean = float(errors.mean()), float(baseline.mean())
    if error_mean == 0:
        return Prediction(None, None, None, folds, sample.n, "the gap is constant")
    return Prediction(error, error_mean, 1 - error / error_mean, folds, sample.n)


def selection(sample: Sample, table: RunTable) -> Selection:
    """Regret in test error of picking the run with the least measure; equal least ones count their mean."""
    column = numbers_of(table, "test_error")
    if column is None:
        return Selection(None, None, None, None, 0, "no test_error")
    test_error = column[sample.rows]
    known = np.isfinite(test_error)
    x, rows, test_error = sample.x[known], sample.rows[known], test_error[known]
    if not len(x):
        return Selection(None, None, None, None, 0, "no run has measure, gap and test_error")
    least = x == x.min()
    picked, best = float(test_error[least].mean()), float(test_error.min())
    run = str(table.frame["run"].iloc[rows[np.flatnonzero(least)[0]]])
    chance = float(test_error.mean()) - best
    return Selection(run, picked, picked - best, chance, len(x))


def _isotonic(x: Floats, y: Floats, at: Floats, rising: bool) -> Floats:
    """Least-squares monotone fit of y to x, linear between the x seen and constant outside."""
    seen, place, count = np.unique(x, return_inverse=True, return_counts=True)
    means = np.bincount(place, y) / count
    fit = optimize.isotonic_regression(means, weights=count, increasing=rising).x
    return np.interp(at, seen, fit)


def _covariance(x: Floats, y: Floats) -> float:
    return float((x - x.mean()) @ (y - y.mean()))
