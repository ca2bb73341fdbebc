"""The curvature of each layer as bars, drawn from the rows of ``gm_probe.measures.layers.by_layer``."""

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

from gm_probe.analysis.plots import COLOURS, STYLE, new_figure
from gm_probe.measures.catalogue import MEASURES


@mpl.rc_context(STYLE)
def layer_bars(layers: Sequence[Mapping[str, Any]], *, checkpoint: str, num_examples: int) -> Figure:
    """Draw one panel per measure and one bar per layer, with its error; undefined values have no bar."""
    known = [row for row in layers if "measures" in row]
    names = list(known[0]["measures"]) if known else []
    places = range(len(known))
    figure = new_figure(6.7, 1.0 + 0.16 * max(len(known), 4))
    figure.suptitle(f"{checkpoint}, N = {num_examples:,}".replace("$", r"\$"), fontsize=8)
    for column, name in enumerate(names):
        axes = figure.add_subplot(1, len(names), column + 1)
        rows = [row["measures"][name] for row in known]
        values = [row["value"] or 0.0 for row in rows]
        errors = [row["stderr"] or 0.0 for row in rows]
        axes.barh(places, values, xerr=errors, color=COLOURS[column % len(COLOURS)])
        axes.set_title(MEASURES[name].symbol, loc="left")
        axes.set_yticks(places, [row["layer"] for row in known] if column == 0 else [])
        axes.invert_yaxis()
    return figure
