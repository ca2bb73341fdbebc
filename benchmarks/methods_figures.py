"""Figures of `methods.py`: final errors, S_ρ along training, and the number of ascent steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from methods import SHOWN, TRACK_RHO, TRACKED, Run, along, evaluations_per_epoch, mean_and_error, s_of_k

from gm_probe.analysis.plots import COLOURS, MARKERS, STYLE, write_figure

if TYPE_CHECKING:
    from methods import Results, Study

SPENT = "gradient evaluations (SGD epochs)"
HEIGHT, PANEL = 2.3, 2.8  # inches


def draw(study: Study, results: Results, folder: Path) -> None:
    """Write the three figures as PNG files; a panel without a finished run says so."""
    with mpl.rc_context(STYLE):
        for name, figure in (
            ("methods-error", _errors(results)),
            ("methods-along", _along(results)),
            ("methods-k", _steps(results)),
        ):
            write_figure(figure, [folder / f"{name}.png"])


def _panels(count: int) -> tuple[Figure, Sequence[Axes]]:
    figure = Figure(figsize=(PANEL * count, HEIGHT), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(1, count, squeeze=False)[0]


def _look(index: int, **more: Any) -> dict[str, Any]:
    return {"color": COLOURS[index], "marker": MARKERS[index], "markersize": 4, **more}


def _spread(axes: Axes, values: Mapping[float, Sequence[float]], **look: Any) -> None:
    """Means over seeds with their standard errors."""
    summaries = [mean_and_error(found) for found in values.values()]
    errors = [error or 0.0 for _, error in summaries]
    axes.errorbar(list(values), [mean for mean, _ in summaries], errors, capsize=2, linewidth=1, **look)


def _finish(axes: Axes, x: str, y: str) -> None:
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    if not axes.has_data():
        axes.text(0.5, 0.5, "no finished run", transform=axes.transAxes, ha="center", color="0.4")
    elif axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=7, frameon=False)


def _spent(runs: Sequence[Run], values: Mapping[int, Sequence[float]], scale: float = 1) -> dict[float, Any]:
    """By gradient evaluations instead of epochs."""
    return {e * evaluations_per_epoch(runs[0].config): [scale * v for v in f] for e, f in values.items()}


def _errors(results: Results) -> Figure:
    figure, (axes,) = _panels(1)
    for index, runs in enumerate(results.final.values()):
        errors = [100 * run.result["test_error"] for run in runs if run.result is not None]
        if errors:
            places = [index + 0.12 * (seed - (len(errors) - 1) / 2) for seed in range(len(errors))]
            axes.plot(places, errors, linestyle="none", alpha=0.6, **_look(index))
            _spread(axes, {index + 0.35: errors}, color="black", marker="_", markersize=8)
    axes.set_xticks(range(len(results.final)), [SHOWN[method] for method in results.final])
    _finish(axes, "a mark a seed; black: mean ± s.e.", "final test error, %")
    return figure


def _along(results: Results) -> Figure:
    figure, (errors, tracked) = _panels(2)
    for index, method in enumerate(results.final):
        runs = results.final[method]
        values = along(runs, "test_error")
        if values:
            _spread(errors, _spent(runs, values, 100), label=SHOWN[method], **_look(index))
        values = along(runs, "local_inconsistency")
        if method in TRACKED and values:
            _spread(tracked, _spent(runs, values), label=SHOWN[method], **_look(index))
    tracked.set_yscale("log")
    _finish(errors, SPENT, "test error, %")
    _finish(tracked, SPENT, rf"$S_\rho$, $\rho$ = {TRACK_RHO:g}, K = 1")
    handles, labels = errors.get_legend_handles_labels()
    if handles:  # one for both panels, in neither's way
        figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False, fontsize=8)
        for axes in (errors, tracked):
            if axes.get_legend() is not None:
                axes.get_legend().remove()
    return figure


def _steps(results: Results) -> Figure:
    figure, (at_end, spent, measured) = _panels(3)
    ends = {
        k: [100 * run.result["test_error"] for run in runs if run.result is not None]
        for k, runs in results.by_steps.items()
    }
    ends = {k: values for k, values in ends.items() if values}
    if ends:
        _spread(at_end, ends, linestyle="none", **_look(3))
    for index, (k, runs) in enumerate(results.by_steps.items()):
        values = along(runs, "test_error")
        if values:
            _spread(spent, _spent(runs, values, 100), label=f"K = {k}", **_look(index))
    for run in results.measured:
        values = s_of_k(run)
        if values:
            method = run.config.method
            place = list(results.final).index(method)
            _spread(measured, values, label=f"trained by {SHOWN[method]}", **_look(place))
    for axes in (at_end, measured):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    _finish(at_end, "IAM-D's K, equal epochs", "final test error, %")
    _finish(spent, SPENT, "test error, %")
    _finish(measured, "K of Algorithm 1", rf"$S_\rho$, $\rho$ = {TRACK_RHO:g}")
    return figure
