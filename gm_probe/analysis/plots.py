"""Scatter panels of measure against gap, like the paper's Fig. 1, readable small and in grey.

Figures are built through matplotlib's object API, so no global pyplot state is read or left behind.
"""

import io
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from gm_probe.analysis.design import target_column
from gm_probe.analysis.results import Correlations, Quantity
from gm_probe.files.atomic import write_atomic
from gm_probe.tables.table import RunTable

FORMATS = ("png", "pdf", "svg")
MEASURE_LABELS = {
    "local_inconsistency": r"$S_\rho$ (local inconsistency)",
    "local_inconsistency_converged": r"$S_\rho$ (converged)",
    "fisher_lambda_max": r"$\lambda_{\max}(F)$",
    "fisher_trace": r"$\mathrm{tr}\,F$",
    "hessian_lambda_max": r"$\lambda_{\max}(H)$",
    "hessian_trace": r"$\mathrm{tr}\,H$",
    "hessian_lambda_min": r"$\lambda_{\min}(H)$",
    "effective_rank": r"$\mathrm{tr}\,F/\lambda_{\max}(F)$",
    "local_inconsistency_adaptive": r"$S_\rho$ (adaptive)",
    "local_inconsistency_relative": r"$S_\rho$ (relative)",
    "local_inconsistency_batchwise": r"$S_\rho$ (batchwise)",
    "average_inconsistency": r"$A_\rho$ (average)",
    "conditional_inconsistency": r"$C_\theta$ (inconsistency)",
    "disagreement": "disagreement",
}
# Okabe and Ito's colours without yellow, which is too faint on white. 7 colours and 10 markers share no
# factor, so the first 70 subgroups all look different, and 10 differ in shape alone.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#000000", "#CC79A7", "#E69F00", "#56B4E9")
MARKERS = ("o", "^", "s", "X", "D", "v", "P", "*", "<", ">")
LETTER = 0.053  # inches that a letter of a legend takes, on average
STYLE: dict[Any, Any] = {
    "font.size": 8,
    "axes.titlesize": 8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "pdf.fonttype": 42,  # editable text that journals accept
    "svg.fonttype": "none",  # text stays text: searchable, and small files
    "svg.hashsalt": "gm_probe",  # the same figure is the same bytes
}


def scatter_panels(found: Correlations, groups: Mapping[str, np.ndarray]) -> Figure:
    """One panel a measure and target, at most 3 measures side by side, each titled with its τ and n.

    ``groups`` maps a subgroup's label to its rows of the table (``design.group_rows``); empty draws all
    runs alike, without a legend.
    """
    table, measures, gaps = found.runs, found.runs.measures, found.targets
    blocks = -(-len(measures) // 3)
    num_columns = -(-len(measures) // blocks)
    with mpl.rc_context(STYLE):
        width = 0.4 + 2.1 * num_columns  # inches; three panels fill a page's 6.7
        figure = new_figure(width, 0.1 + 1.85 * blocks * len(gaps))
        for block in range(blocks):
            some = measures[block * num_columns : (block + 1) * num_columns]
            for row, gap in enumerate(gaps):
                first: Axes | None = None
                for column, measure in enumerate(some):
                    place = (block * len(gaps) + row) * num_columns + column + 1
                    axes = figure.add_subplot(blocks * len(gaps), num_columns, place, sharey=first)
                    _scatter(axes, table, measure, target_column(table, gap), groups)
                    axes.set_title(_title(found.get(measure, gap)))
                    if row == len(gaps) - 1:
                        axes.set_xlabel(measure_label(table, measure))
                    if first is None:
                        axes.set_ylabel(gaps[gap])
                        first = axes
                    else:
                        axes.tick_params(labelleft=False)
        legend_below(figure, [_handle(index, label) for index, label in enumerate(groups)])
    return figure


def new_figure(width: float, height: float) -> Figure:
    """An empty figure of so many inches, which needs no pyplot."""
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def legend_below(figure: Figure, handles: Sequence[Line2D]) -> None:
    """A legend below all axes, as wide as ``figure``, which grows by its height."""
    if not handles:
        return
    room = figure.get_figwidth() - 0.32
    labels = [textwrap.fill(str(handle.get_label()), int(room / LETTER)) for handle in handles]
    longest = max(len(line) for label in labels for line in label.splitlines())
    legend = figure.legend(
        handles=list(handles),
        labels=[label.replace("$", r"\$") for label in labels],
        loc="outside lower center",
        ncols=max(1, min(len(labels), int((room + 0.32) / (0.32 + LETTER * longest)))),
        frameon=False,
        fontsize=7,
        handletextpad=0.3,
        columnspacing=1.0,
        borderaxespad=0.2,
    )
    figure.set_figheight(figure.get_figheight() + legend.get_window_extent().height / figure.dpi)


def log_ticks(axis: Axis) -> None:
    """On a logarithmic ``axis`` plain numbers at 1, 2 and 5, where less than two decades are shown."""
    low, high = sorted(axis.get_view_interval())  # an inverted axis has the higher one first
    axis.set_minor_formatter(NullFormatter())
    if high < 100 * low:
        axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def render(figure: Figure, suffix: str) -> bytes:
    """``figure`` as a ``png`` (200 dots an inch), ``pdf`` or ``svg``; equal figures give equal bytes."""
    undated: dict[str, dict[str, str | None]] = {"pdf": {"CreationDate": None}, "svg": {"Date": None}}
    buffer = io.BytesIO()
    with mpl.rc_context(STYLE):
        figure.savefig(buffer, format=suffix, dpi=200, metadata=undated.get(suffix))
    return buffer.getvalue()


def write_figure(figure: Figure, paths: Sequence[Path]) -> None:
    """Write ``figure`` to each of ``paths``, each whole or not at all, in the format that its suffix names.

    Raises:
        StorageError: a file cannot be written.
    """
    for path in paths:
        write_atomic(path, render(figure, path.suffix.lower().removeprefix(".")))


def _scatter(
    axes: Axes, table: RunTable, measure: str, y: np.ndarray, groups: Mapping[str, np.ndarray]
) -> None:
    x = table.frame[measure].to_numpy()
    present = np.isfinite(x) & np.isfinite(y)
    if not present.any():
        axes.text(0.5, 0.5, "no run has both values", transform=axes.transAxes, ha="center", va="center")
        axes.set_xticks([])
        return
    size = 22.0 if present.sum() <= 60 else 12.0
    for index, rows in enumerate(groups.values() or [np.arange(len(x))]):
        shown = rows[present[rows]]
        marker = MARKERS[index % len(MARKERS)]
        axes.scatter(
            x[shown],
            y[shown],
            s=1.8 * size if marker == "*" else size,  # a star fills less of its square
            c=COLOURS[index % len(COLOURS)],
            marker=marker,
            alpha=0.75,
            linewidths=0,
            rasterized=len(x) > 2000,  # keeps PDF and SVG small
        )
    measure_axis(axes, x[present])


def measure_axis(axes: Axes, values: np.ndarray) -> None:
    """Ticks for ``values`` (n,) along x and a gap along y; logarithmic in x over more than a positive decade."""
    axes.yaxis.set_major_locator(MaxNLocator(5))
    least, most = values.min(), values.max()
    if least <= 0 or most <= 10 * least:
        axes.xaxis.set_major_locator(MaxNLocator(4))
        return
    axes.set_xscale("log")
    axes.xaxis.set_minor_formatter(NullFormatter())
    if most < 100 * least:  # whole decades alone could leave a single label
        axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 3.0)))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    else:
        axes.xaxis.set_major_locator(LogLocator(numticks=4))


def _title(tau: Quantity) -> str:
    shown = "τ undefined" if tau.value is None else f"τ = {tau.value:.2f}".replace("-", "−")
    return f"{shown}, n = {tau.n}"


def measure_label(table: RunTable, measure: str) -> str:
    """For the axis of ``measure``: its symbol, and whose labels it was taken with."""
    kind = table.labels.get(measure)
    labels = f" ({kind} labels)" if kind else ""
    known = MEASURE_LABELS.get(measure)
    return known + labels if known else "\n".join(wrapped(measure + labels, 30)).replace("$", r"\$")


def wrapped(text: str, width: int) -> list[str]:
    """Lines of at most ``width`` letters, broken at spaces and after underscores."""
    swap = str.maketrans("_-", "-_")  # textwrap breaks after hyphens, which are rare in names
    return [line.translate(swap) for line in textwrap.wrap(text.translate(swap), width)]


def _handle(index: int, label: str) -> Line2D:
    return Line2D(
        [],
        [],
        linestyle="none",
        marker=MARKERS[index % len(MARKERS)],
        color=COLOURS[index % len(COLOURS)],
        markeredgewidth=0,
        label=label,
    )
