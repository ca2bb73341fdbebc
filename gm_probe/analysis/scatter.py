"""Scatter panels of measure against gap, like the paper's Fig. 1, readable small and in grey."""

from collections.abc import Mapping

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from gm_probe.analysis.design import target_column
from gm_probe.analysis.intervals import Quantity
from gm_probe.analysis.plots import STYLE, legend_below, measure_label, new_figure, points
from gm_probe.analysis.results import Correlations


@mpl.rc_context(STYLE)
def scatter_panels(found: Correlations, groups: Mapping[str, np.ndarray]) -> Figure:
    """Draw one panel per measure and target, at most 3 measures side by side, each titled with its τ and n.

    ``groups`` maps a subgroup's label to its rows of the table (``design.group_rows``); empty draws all
    runs alike, without a legend.
    """
    table, measures, gaps = found.runs, found.runs.measures, found.targets
    blocks = -(-len(measures) // 3)
    num_columns = -(-len(measures) // blocks)
    width = 0.4 + 2.1 * num_columns  # inches; three panels fill a page's 6.7
    figure = new_figure(width, 0.1 + 1.85 * blocks * len(gaps))
    for block in range(blocks):
        some = measures[block * num_columns : (block + 1) * num_columns]
        for row, gap in enumerate(gaps):
            first: Axes | None = None
            for column, measure in enumerate(some):
                place = (block * len(gaps) + row) * num_columns + column + 1
                axes = figure.add_subplot(blocks * len(gaps), num_columns, place, sharey=first)
                handles = points(axes, table.frame[measure].to_numpy(), target_column(table, gap), groups)
                axes.set_title(_title(found.get(measure, gap)))
                if row == len(gaps) - 1:
                    axes.set_xlabel(measure_label(table, measure))
                if first is None:
                    axes.set_ylabel(gaps[gap])
                    first = axes
                else:
                    axes.tick_params(labelleft=False)
    legend_below(figure, handles)
    return figure


def _title(tau: Quantity) -> str:
    shown = "τ undefined" if tau.value is None else f"τ = {tau.value:.2f}".replace("-", "−")
    return f"{shown}, n = {tau.n}"
