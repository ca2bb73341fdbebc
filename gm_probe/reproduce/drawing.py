"""Panels side by side in the house's style, lettered as a paper's are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from gm_probe.analysis.figures import DASHES
from gm_probe.analysis.plots import COLOURS, STYLE, log_ticks, new_figure

PAGE = 6.7  # inches that a page's width takes


def panels(
    count: int,
    height: float = 2.3,
    *,
    width: float = PAGE,
    rows: int = 1,
    titles: Sequence[str] = (),
    lettered: bool = True,
) -> tuple[Figure, Sequence[Axes]]:
    """A figure of ``rows`` × ``count`` panels, each row ``height`` inches high, and its axes row by row.

    Where there are several they are lettered, with a title each if ``titles`` are given.
    """
    with mpl.rc_context(STYLE):
        figure = new_figure(width, height * rows)
        found = list(np.ravel(figure.subplots(rows, count, squeeze=False)))
        for index, axes in enumerate(found):
            letter = f"({chr(ord('a') + index)})" if lettered and len(found) > 1 else ""
            axes.set_title(" ".join(filter(None, (letter, *titles[index : index + 1]))), loc="left")
    return figure, found


def line(index: int, **more: Any) -> dict[str, Any]:
    """Colour and dashes of series ``index``: told apart in grey, too."""
    return {"color": COLOURS[index % len(COLOURS)], "linestyle": DASHES[index % len(DASHES)], **more}


def logarithmic(axes: Axes) -> None:
    """Both axes on a logarithmic scale, with ``log_ticks``."""
    axes.set_xscale("log")
    axes.set_yscale("log")
    for axis in (axes.xaxis, axes.yaxis):
        log_ticks(axis)
