"""What all figures share: their style, colours, markers, legends and labels, and how they are written.

Figures are built through matplotlib's object API, so no global pyplot state is read or left behind.
"""

import io
import re
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

from gm_probe.analysis.definitions import DEFINITIONS
from gm_probe.files.atomic import write_atomic
from gm_probe.tables.table import RunTable

FORMATS = ("png", "pdf", "svg")
# Of Okabe and Ito's colours, in an order whose neighbours differ in grey too; every second one is drawn hollow.
# 7 colours and 10 markers share no factor, so the first 70 subgroups all look different, and 10 differ in shape alone.
COLOURS = ("#0072B2", "#D55E00", "#000000", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
MARKERS = ("o", "^", "s", "X", "D", "v", "P", "*", "<", ">")
NEUTRAL: dict[str, Any] = dict.fromkeys(("color", "markeredgecolor", "markerfacecolor"), "0.5")
MANY = 2000
"""More marks than this are drawn as pixels, which keeps SVG and PDF small."""
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


def new_figure(width: float, height: float) -> Figure:
    """Return an empty figure of so many inches, which needs no pyplot."""
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def ink(cell: Sequence[float]) -> str:
    """Return white or black, whichever has more contrast on the colour ``cell`` (red, green, blue, ...).

    Source: relative luminance of WCAG 2.1; contrast is the same at 0.179.
    """
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in cell[:3]]
    return "black" if np.dot([0.2126, 0.7152, 0.0722], linear) > 0.179 else "white"


def legend_below(figure: Figure, handles: Sequence[Line2D]) -> None:
    """Draw a legend below all axes, as wide as ``figure``, which grows by its height."""
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
    """Label 1, 2 and 5 as plain numbers on a logarithmic ``axis`` that shows less than two decades."""
    low, high = sorted(axis.get_view_interval())  # an inverted axis has the higher one first
    axis.set_minor_formatter(NullFormatter())
    if high < 100 * low:
        axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


@mpl.rc_context(STYLE)
def render(figure: Figure, suffix: str) -> bytes:
    """Return ``figure`` as a ``png`` (200 dots per inch), ``pdf`` or ``svg``; equal figures give equal bytes."""
    undated: dict[str, dict[str, str | None]] = {"pdf": {"CreationDate": None}, "svg": {"Date": None}}
    buffer = io.BytesIO()
    figure.savefig(buffer, format=suffix, dpi=200, metadata=undated.get(suffix))
    return buffer.getvalue()


def write_figure(figure: Figure, paths: Sequence[Path]) -> None:
    """Write ``figure`` to each of ``paths``, each whole or not at all, in the format that its suffix names.

    Raises:
        StorageError: a file cannot be written.
    """
    for path in paths:
        write_atomic(path, render(figure, path.suffix.lower().removeprefix(".")))
        figure.set_layout_engine("none")  # laid out once, so that every format looks the same


def points(
    axes: Axes,
    x: np.ndarray,
    y: np.ndarray,
    groups: Mapping[str, np.ndarray],
    shapes: Mapping[str, np.ndarray] | None = None,
) -> list[Line2D]:
    """Draw the runs that have both x and y (n,), a colour per subgroup, a marker per value of another setting.

    Returns:
        What a legend says of them.
    """
    present = np.isfinite(x) & np.isfinite(y)
    if not present.any():
        say(axes, "no run has both values")
        return []
    everyone = np.arange(len(x))
    scale = min(1.0, (150 / present.sum()) ** 0.25)  # the more points, the smaller
    small = {"markersize": 4.5 * scale, "markeredgewidth": 0.9 * scale}
    for index, rows in enumerate(groups.values() or [everyone]):
        for shape, of_shape in enumerate((shapes or {"": everyone}).values()):
            shown = np.intersect1d(rows[present[rows]], of_shape)
            style = look(index, shape if shapes else index) | small
            axes.plot(x[shown], y[shown], linestyle="none", alpha=0.8, **style, rasterized=len(x) > MANY)
    measure_axis(axes, x[present])
    return [handle(label, **look(index, 0 if shapes else index)) for index, label in enumerate(groups)] + [
        handle(label, **(look(0, shape) | NEUTRAL)) for shape, label in enumerate(shapes or {})
    ]


def look(index: int, shape: int) -> dict[str, Any]:
    """Return how the points of subgroup ``index`` are drawn."""
    colour = COLOURS[index % len(COLOURS)]
    return {
        "color": colour,
        "marker": MARKERS[shape % len(MARKERS)],
        "markersize": 4.5,
        "markeredgewidth": 0.9,
        "markeredgecolor": colour,
        "markerfacecolor": "none" if index % 2 else colour,
    }


def handle(label: str, **style: Any) -> Line2D:
    """Return an entry of a legend."""
    return Line2D([], [], **{"linestyle": "none", **style}, label=label)


def say(axes: Axes, text: str) -> None:
    """Write why ``axes`` are empty."""
    axes.text(0.5, 0.5, text, transform=axes.transAxes, ha="center", va="center")
    axes.set_xticks([])
    axes.set_yticks([])


def measure_axis(axes: Axes, values: np.ndarray) -> None:
    """Put ticks for ``values`` (n,) along x and a gap along y; x is logarithmic over more than a positive decade."""
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


def measure_label(table: RunTable, measure: str) -> str:
    """Return the symbol of ``measure`` for an axis, and whose labels it was taken with."""
    kind = table.labels.get(measure)
    labels = f" ({kind} labels)" if kind else ""
    if measure in DEFINITIONS:
        return math_symbol(measure) + labels
    return "\n".join(wrapped(measure + labels, 30)).replace("$", r"\$")


def math_symbol(measure: str) -> str:
    """Return the symbol of a known measure with its subscripts as matplotlib sets them: λ_max(F) as $λ_{max}$(F)."""
    return re.sub(r"(\w)_(\w+)", r"$\1_{\\mathrm{\2}}$", DEFINITIONS[measure][0])


def wrapped(text: str, width: int) -> list[str]:
    """Return lines of at most ``width`` letters, broken at spaces and after underscores."""
    swap = str.maketrans("_-", "-_")  # textwrap breaks after hyphens, which are rare in names
    return [line.translate(swap) for line in textwrap.wrap(text.translate(swap), width)]
