"""Spectral densities, bulk and outliers in one picture: logarithmic both ways, linear around 0.

Drawn from the JSON object of ``gm_probe.linalg.density.Density.as_dict``.
"""

import math
from collections.abc import Mapping
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from gm_probe.analysis.plots import COLOURS, STYLE, new_figure

NAMES = {"fisher": "Fisher matrix F", "hessian": "loss Hessian H"}
FLOOR = 0.1  # eigenvalues per decade: a tenth of a single eigenvalue's
RUG = 0.06  # share of a panel's height that the tick of an isolated eigenvalue takes


@mpl.rc_context(STYLE)
def density_panels(
    densities: Mapping[str, Mapping[str, Any]], *, checkpoint: str, num_examples: int
) -> Figure:
    """Draw one panel per matrix, below one another over the same range.

    Args:
        densities: ``Density.as_dict()`` by the matrix's name: ``fisher``, ``hessian`` or any other.
        checkpoint: as the title names it.
    """
    first = next(iter(densities.values()))
    shapes = sorted({f"{one['num_probes']} × {one['num_steps']}" for one in densities.values()})
    low = min(one["curve"]["x"][0] for one in densities.values())
    high = max(one["curve"]["x"][-1] for one in densities.values())
    figure = new_figure(6.7, 0.5 + 2.1 * len(densities))
    figure.suptitle(
        f"{checkpoint}, N = {num_examples:,}, P = {first['num_parameters']:,}, "
        f"{' and '.join(shapes)} (probes × steps)".replace("$", r"\$"),
        fontsize=8,
    )
    for row, (name, one) in enumerate(densities.items()):
        axes = figure.add_subplot(len(densities), 1, row + 1)
        _density(axes, one, COLOURS[row % len(COLOURS)])
        axes.set_xscale("asinh", linear_width=one["curve"]["linear_width"])
        axes.set_xlim(low, high)
        labels = f" ({one['labels']} labels)" if "labels" in one else ""
        axes.set_title(_title(NAMES.get(name, name) + labels, one), loc="left")
    axes.set_xlabel(r"eigenvalue $\lambda$ (logarithmic outside the shaded range around 0)")
    return figure


def _density(axes: Axes, one: Mapping[str, Any], colour: str) -> None:
    curve, decade = one["curve"], math.log(10)
    x, y = np.array(curve["x"]), decade * np.array(curve["y"])
    axes.set_yscale("log")
    if curve["stderr"] is not None:
        error = decade * np.array(curve["stderr"])
        axes.fill_between(
            x, np.maximum(y - error, FLOOR / 10), y + error, color=colour, alpha=0.25, linewidth=0
        )
    axes.plot(x, np.maximum(y, FLOOR / 10), color=colour, linewidth=1)
    axes.set_ylim(FLOOR, 4 * max(float(y.max()), 1.0))
    axes.yaxis.set_major_locator(LogLocator(numticks=6))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_ylabel("eigenvalues per decade")
    axes.grid(color="0.9", linewidth=0.5)
    axes.set_axisbelow(True)

    width = one["near_zero"]["within"]
    axes.axvspan(-width, width, color="0.5", alpha=0.15, linewidth=0)
    across = axes.get_xaxis_transform()
    axes.annotate(
        f"{_share(one['near_zero'], one['num_parameters'])} within ±{width:g}",
        (width, 0.97),
        xycoords=across,
        xytext=(3, 0),
        textcoords="offset points",
        va="top",
    )
    values = [outlier["value"] for outlier in one["outliers"]]
    axes.vlines(values, 0, RUG, transform=across, color="black", linewidth=0.8)
    for edge, inward in (("largest", "right"), ("smallest", "left")):
        place = one[edge]
        if (place <= width) if edge == "largest" else (place >= -width):
            continue  # the edge of the bulk needs no label
        axes.vlines(place, 0, 0.55, transform=across, color="black", linewidth=0.8, linestyle=":")
        axes.annotate(
            f"{edge}\n{_number(place)}",
            (place, 0.55),
            xycoords=across,
            xytext=(0, 2),
            textcoords="offset points",
            ha=inward,
            va="bottom",
        )


def _title(name: str, one: Mapping[str, Any]) -> str:
    isolated = len(one["outliers"])
    trace = one["trace"]
    error = "" if trace["stderr"] is None else f" ± {_number(trace['stderr'], 2)}"
    some = f"{isolated} isolated eigenvalue{'' if isolated == 1 else 's'} (ticks)"
    return f"{name}: trace {_number(trace['value'])}{error}, {some}".replace("$", r"\$")


def _share(mass: Mapping[str, Any], size: int) -> str:
    """Return a percentage of P that is rounded to 100 % only if nothing is missing, with its error where that shows."""
    value, missing = mass["value"], 1 - mass["value"]
    digits = 1 if missing * size < 0.5 else max(1, math.ceil(-math.log10(100 * missing)))
    error = f"{100 * (mass['stderr'] or 0):.{digits}f}"
    return f"{100 * value:.{digits}f}{f' ± {error}' if float(error) else ''}%"


def _number(value: float, digits: int = 3) -> str:
    rounded = float(f"{value:.{digits}g}")
    text = f"{rounded:,.0f}" if 10**digits <= abs(rounded) < 1e6 else f"{rounded:.{digits}g}"
    return text.replace("-", "−")
