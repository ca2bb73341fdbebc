"""Pictures that a recipe describes: a panel is a table's columns, an axis each, as expressions of pandas."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from gm_probe.analysis.figures import DASHES
from gm_probe.analysis.plots import COLOURS, MARKERS, STYLE, log_ticks, new_figure
from gm_probe.reproduce.claims import column

WORDS = {
    "rho": "ρ",
    "beta": "β",
    "k_steps": "K",
    "share": "m",
    "gradient_evaluations": "gradient evaluations (batches)",
}
"""What columns are called in a picture, where not by their names."""
PAGE = 6.7  # inches that a page's width takes


@mpl.rc_context(STYLE)
def panels(count: int, columns: int, height: float = 2.2) -> tuple[Figure, list[Axes]]:
    """Return a figure with ``count`` lettered panels, so many side by side, each row ``height`` inches high."""
    rows = -(-count // columns)
    figure = new_figure(PAGE * min(1.0, (1 + columns) / 3), height * rows)
    found = list(np.ravel(figure.subplots(rows, columns, squeeze=False)))
    for axes in found[count:]:
        axes.remove()
    for index, axes in enumerate(found[:count] if count > 1 else ()):
        axes.set_title(f"({chr(ord('a') + index)})", loc="left")
    return figure, found[:count]


@mpl.rc_context(STYLE)
def draw(tables: Mapping[str, pd.DataFrame], specs: Sequence[Mapping[str, Any]], columns: int) -> Figure:
    """Return the figure of the panels ``specs``, which have

    - ``y``: a legend's text and an expression for each series; ``x``: an expression, or none for a histogram of y;
    - ``of``: the table, where there are several; ``where``: its rows; ``by``: a column with a series for each value;
    - ``kind``: points, or lines of means over the rows of one x, with standard errors (the default);
    - ``xlabel``, ``ylabel``, ``title``; ``log``: x, y or xy; ``level``: y of a thin line.
    """
    figure, found = panels(len(specs), columns)
    for axes, spec in zip(found, specs, strict=True):
        _panel(axes, tables[spec.get("of", next(iter(tables)))], spec)
        axes.legend(frameon=False, fontsize=7)
    return figure


def series(table: pd.DataFrame, spec: Mapping[str, Any]) -> list[tuple[str, pd.Series, pd.Series | None]]:
    """Return label, y and x of each series of a panel."""
    mine = table.query(spec["where"]) if "where" in spec else table
    groups = mine.groupby(spec["by"], sort=False, dropna=False) if "by" in spec else [("", mine)]
    return [
        (
            ", ".join(filter(None, (_named(spec.get("by", ""), label), name))),
            column(group, expression),
            column(group, spec["x"]) if "x" in spec else None,
        )
        for label, group in groups
        for name, expression in spec["y"].items()
    ]


def _named(by: str, value: Any) -> str:
    """Return a group's text in a legend; a number has the name of its column."""
    return f"{WORDS.get(by, by)} = {value:g}" if isinstance(value, float) else str(value)


def _panel(axes: Axes, table: pd.DataFrame, spec: Mapping[str, Any]) -> None:
    for index, (label, y, x) in enumerate(series(table, spec)):
        colour, dashes = COLOURS[index % len(COLOURS)], DASHES[index % len(DASHES)]
        marker = MARKERS[index % len(MARKERS)]
        if x is None:
            weights = np.full(len(y), 1 / len(y))
            style: dict[str, Any] = {"color": colour, "linestyle": dashes, "label": label}
            axes.hist(y, 50, range=(0, 1), weights=weights, histtype="step", **style)
        elif spec.get("kind") == "points":
            axes.plot(x, y, marker, markersize=3, color=colour, label=label, alpha=0.7)
        else:
            numbers = pd.api.types.is_numeric_dtype(x)
            along = y.groupby(x, sort=numbers).agg(["mean", "sem"])
            style = {
                "color": colour,
                "linestyle": dashes if numbers else "none",
                "marker": marker,
                "label": label,
            }
            axes.errorbar(
                along.index, along["mean"], along["sem"].fillna(0), **style, markersize=3, linewidth=1
            )
    axes.set(**{key: spec[key] for key in ("xlabel", "ylabel") if key in spec})
    if "title" in spec:
        axes.set_title(f"{axes.get_title(loc='left')} {spec['title']}".strip(), loc="left")
    if "level" in spec:
        axes.axhline(spec["level"], color="black", linewidth=0.6)
    for name in spec.get("log", ""):
        getattr(axes, f"set_{name}scale")("log")
        log_ticks(axes.xaxis if name == "x" else axes.yaxis)
    if spec.get("x") == "variant":
        axes.tick_params("x", rotation=35)
