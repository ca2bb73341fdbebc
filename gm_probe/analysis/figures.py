"""The report's figures, each as wide as one column of a journal and readable in grey.

Where colour tells things apart, so does a second sign: the marker, its filling, the dashes, a number.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from gm_probe.analysis.curves import curve
from gm_probe.analysis.definitions import DEFINITIONS
from gm_probe.analysis.intervals import Quantity
from gm_probe.analysis.plots import (
    COLOURS,
    MARKERS,
    STYLE,
    handle,
    ink,
    legend_below,
    look,
    math_symbol,
    measure_label,
    new_figure,
    points,
    say,
    wrapped,
)
from gm_probe.tables.table import RunTable

COLUMN = 3.3  # inches
DASHES = ("-", "--", ":", "-.")
INK = "black"
FAINT: dict[str, Any] = {"color": INK, "alpha": 0.15, "linewidth": 0.6}
APART = 0.15  # share of a column between the cells and those set apart
LINE = 18  # letters of a tick label's line


@mpl.rc_context(STYLE)
def scatter(
    table: RunTable,
    measure: str,
    y: np.ndarray,
    ylabel: str,
    groups: Mapping[str, np.ndarray],
    shapes: Mapping[str, np.ndarray],
) -> Figure:
    """Draw one measure against the target ``y`` (n,): a colour per subgroup, a marker per value of another setting.

    ``groups`` and ``shapes`` map labels to rows of ``table`` (``design.group_rows``); either may be empty.
    """
    figure, axes = _column(2.3)
    axes.set_xlabel(measure_label(table, measure))
    axes.set_ylabel(ylabel)
    legend_below(figure, points(axes, table.frame[measure].to_numpy(), y, groups, shapes))
    return figure


@mpl.rc_context(STYLE)
def forest(rows: Mapping[str, Mapping[str, Quantity]], xlabel: str) -> Figure:
    """Draw one row per measure, with a coefficient in −1..1 and its interval for each series (such as a gap)."""
    series = list(dict.fromkeys(name for of in rows.values() for name in of))
    height = max(0.17 * len(series), _row_height(rows))
    figure, axes = _column(0.45 + height * len(rows))
    axes.axvline(0, color=INK, linewidth=0.6)
    for place, of in enumerate(rows.values()):
        for index, name in enumerate(series):
            level = place + (0.6 * (index + 0.5) / len(series) - 0.3)
            found = of[name]
            if found.value is None:
                axes.text(0, level, " undefined", va="center", fontsize=7, fontstyle="italic")
                continue
            if found.low is not None and found.high is not None:
                axes.plot([found.low, found.high], [level] * 2, color=_colour(index), linewidth=1.2)
            axes.plot([found.value], [level], **look(index, index))
    _rows(axes, list(rows))
    axes.set_xlim(-1.03, 1.03)
    axes.set_xlabel(xlabel)
    axes.grid(axis="x", **FAINT)
    legend_below(figure, [handle(name, **look(index, index)) for index, name in enumerate(series)])
    return figure


@mpl.rc_context(STYLE)
def heat_map(values: np.ndarray, rows: Sequence[str], columns: Sequence[str], *, rule: int = 0) -> Figure:
    """Draw ``values`` (len(rows), len(columns)) in −1..1, each written in its cell; NaN is an empty cell with a dash.

    The colour scale rises evenly in lightness, so that it reads the same in grey. The last ``rule`` columns
    are set apart.
    """
    labels = [short_label(label, lines=1) for label in columns]
    longest = max(6 if "$" in label else len(label) for label in labels)
    upright = longest * 0.062 > (COLUMN - 1.2) / len(columns)
    head = 0.062 * longest + 0.2 if upright else 0.3
    figure, axes = _column(0.1 + max(0.22, _row_height(rows)) * len(rows) + head)
    scale, colours = Normalize(-1, 1), mpl.colormaps["cividis"]
    left = np.arange(len(columns)) + APART * (np.arange(len(columns)) >= len(columns) - rule)
    for some in (slice(0, len(columns) - rule), slice(len(columns) - rule, None)):
        if len(left[some]):
            edges = np.append(left[some], left[some][-1] + 1)
            axes.pcolormesh(
                edges,
                np.arange(len(rows) + 1),
                np.ma.masked_invalid(values[:, some]),
                cmap=colours,
                norm=scale,
                edgecolors="none",
            )
    for (row, column), value in np.ndenumerate(values):
        axes.text(
            float(left[column]) + 0.5,
            row + 0.5,
            "–" if math.isnan(value) else _short_number(value, len(columns)),
            ha="center",
            va="center",
            fontsize=7 if len(columns) <= 7 else 6,
            color=INK if math.isnan(value) else ink(colours(scale(value))),
        )
    axes.set_xlim(0, left[-1] + 1)
    _rows(axes, rows, centre=0.5)
    axes.xaxis.tick_top()
    axes.set_xticks(left + 0.5, labels)
    if upright:
        axes.tick_params(axis="x", labelrotation=90)
    axes.tick_params(length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)
    return figure


@mpl.rc_context(STYLE)
def tau_by_radius(lines: Mapping[int, Mapping[float, Quantity]], ylabel: str) -> Figure:
    """Draw τ against rising ρ, with a line per number of ascent steps K: ``lines[k][rho]``. Undefined ones are gaps."""
    figure, axes = _column(2.1)
    axes.axhline(0, color=INK, linewidth=0.6)
    radii = sorted({rho for taus in lines.values() for rho in taus})
    logarithmic = radii[0] > 0 and radii[-1] > 3 * radii[0]
    if logarithmic:
        axes.set_xscale("log")
    for index, taus in enumerate(lines.values()):
        aside = 1 + 0.03 * (index - (len(lines) - 1) / 2)  # lets intervals at one ρ be told apart
        x = [rho * aside for rho in taus]
        y = [math.nan if tau.value is None else tau.value for tau in taus.values()]
        axes.plot(x, y, linestyle=DASHES[index % 4], linewidth=1, **look(index, index))
        for place, tau in zip(x, taus.values(), strict=True):
            if tau.low is not None and tau.high is not None:
                axes.plot([place] * 2, [tau.low, tau.high], color=_colour(index), linewidth=0.8)
    axes.set_xticks(radii, [f"{rho:g}" for rho in radii])
    axes.minorticks_off()
    axes.set_ylim(-1.03, 1.03)
    axes.set_xlabel(r"radius $\rho$")
    axes.set_ylabel(ylabel)
    axes.grid(axis="y", **FAINT)
    dashed = [look(index, index) | {"linestyle": DASHES[index % 4]} for index in range(len(lines))]
    legend_below(figure, [handle(f"K = {k}", **style) for k, style in zip(lines, dashed, strict=True)])
    return figure


@mpl.rc_context(STYLE)
def run_curves(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """Draw one run's metrics ``rows`` by epoch: loss, error and, where they were tracked, S_ρ and the KL.

    Running figures are means over an epoch's steps, so drawn at its middle; the others are of the weights at its end.
    """
    panels = {
        "cross-entropy": {"running_ce": "training, running", "train_ce": "training", "test_ce": "test"},
        "NT-Xent": {"running_nt_xent": "training, running"},
        "error": {
            "running_error": "training, running",
            "train_error": "training",
            "test_error": "test",
            "probe_train_error": "linear probe, training",
            "probe_test_error": "linear probe, test",
        },
        "divergence": {"local_inconsistency": r"$S_\rho$", "running_inconsistency": "KL of IAM-D, running"},
    }
    shown = {
        ylabel: {name: label for name, label in lines.items() if any(name in row for row in rows)}
        for ylabel, lines in panels.items()
    }
    shown = {ylabel: lines for ylabel, lines in shown.items() if lines}
    figure = new_figure(COLUMN * len(shown), 2.6)
    for axes, (ylabel, lines) in zip(
        figure.subplots(1, len(shown), squeeze=False)[0], shown.items(), strict=True
    ):
        for index, (name, label) in enumerate(lines.items()):
            x, y = curve(rows, name)
            look = {"color": _colour(index), "linestyle": DASHES[index % 4], "marker": MARKERS[index]}
            axes.plot(x - 0.5 * name.startswith("running"), y, label=label, markersize=3, linewidth=1, **look)
        values = np.concatenate([np.ravel(line.get_ydata()) for line in axes.get_lines()])
        if len(values) and values.min() > 0 and values.max() > 10 * values.min():
            axes.set_yscale("log")
        _by_epoch(axes, ylabel)
        axes.legend(fontsize="small")
    return figure


@mpl.rc_context(STYLE)
def training_curves(
    curves: Sequence[tuple[np.ndarray, np.ndarray]], groups: Mapping[str, np.ndarray], ylabel: str
) -> Figure:
    """Draw ``curves[row]`` = (epochs, values) of each run, logarithmic where all are positive; a mark ends each.

    ``groups`` maps a subgroup's label to the runs' rows; empty draws all runs alike.
    """
    figure, axes = _column(2.1)
    heavy = sum(len(x) for x, _ in curves) > 20_000
    thin = max(0.3, min(0.9, 20 / max(len(curves), 1)))
    for index, rows in enumerate(groups.values() or [np.arange(len(curves))]):
        line, end = _curve_look(index), _curve_look(index) | {"linestyle": "none", "markersize": 2.5}
        for row in rows:
            x, y = curves[row]
            axes.plot(x, y, linewidth=0.8, alpha=thin, rasterized=heavy, **line | {"marker": "none"})
            axes.plot(x[-1:], y[-1:], rasterized=heavy, **end)
    values = np.concatenate([y for _, y in curves]) if curves else np.array([])
    if not len(values):
        say(axes, "no run has recorded this")
    elif values.min() > 0:
        axes.set_yscale("log")
    _by_epoch(axes, ylabel)
    legend_below(figure, [handle(label, **_curve_look(index)) for index, label in enumerate(groups)])
    return figure


def _curve_look(index: int) -> dict[str, Any]:
    marker = MARKERS[index % len(MARKERS)]
    return {"color": _colour(index), "linestyle": DASHES[index % 4], "marker": marker, "markersize": 3}


def _by_epoch(axes: Axes, ylabel: str) -> None:
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.set(xlabel="epoch", ylabel=ylabel)
    axes.grid(axis="y", **FAINT)


def short_label(name: str, lines: int = 2) -> str:
    """Return a measure's symbol for a tick, or another name in at most so many ``lines``."""
    if name in DEFINITIONS:
        return math_symbol(name)
    found = wrapped(name, LINE)
    return ("\n".join(found[:lines]) + "…" * (len(found) > lines)).replace("$", r"\$")


@mpl.rc_context(STYLE)
def _column(height: float) -> tuple[Figure, Axes]:
    """Return a figure as wide as a column, with axes of about ``height`` inches, their labels included."""
    figure = new_figure(COLUMN, height)
    return figure, figure.add_subplot()


def _row_height(labels: Iterable[str]) -> float:
    """Return the height in inches of the tallest of ``labels`` as a tick."""
    return 0.13 * max(len(short_label(label).splitlines()) for label in labels) + 0.03


def _colour(index: int) -> str:
    return COLOURS[index % len(COLOURS)]


def _rows(axes: Axes, labels: Sequence[str], centre: float = 0.0) -> None:
    """Label one row each, the first on top."""
    axes.set_yticks(np.arange(len(labels)) + centre, [short_label(label) for label in labels])
    axes.set_ylim(len(labels) - 0.5 + centre, centre - 0.5)
    axes.tick_params(axis="y", length=0)


def _short_number(value: float, columns: int) -> str:
    """Return two decimals, without the leading 0 in narrow cells, and one decimal in narrower ones."""
    text = f"{value:.{2 if columns <= 9 else 1}f}"
    if float(text) == 0:
        text = text.removeprefix("-")  # a rounded 0 has no sign
    return (text.replace("0.", ".", 1) if columns > 5 and abs(value) < 1 else text).replace("-", "−")
