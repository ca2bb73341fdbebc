"""Fig. 2 and 5's picture: decision boundaries of a network on the plane, at θ and at θ ± an offset."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from gm_probe.analysis.plots import MARKERS
from gm_probe.reproduce.drawing import panels
from gm_probe.reproduce.gaussians import CLASSES, Network

OFFSETS = ((0, "black", "-"), (1, "#0072B2", "-"), (-1, "#D55E00", "--"))
"""The sign of an offset, and how the boundary there is drawn."""
GRID = 481  # points per side whose classes are compared


def draw(network: Network, offsets: Sequence[Tensor], titles: Sequence[str]) -> Figure:
    """Return a figure with a panel for each of ``offsets`` (P,)."""
    x, y = network.mixture.x.numpy(), network.mixture.y.numpy()
    reach = 1.08 * float(np.abs(x).max())
    ticks = torch.linspace(-reach, reach, GRID, dtype=torch.float64)
    plane = torch.cartesian_prod(ticks, ticks)
    figure, found = panels(len(offsets), len(offsets), 6.9 / len(offsets))
    for axes, offset, title in zip(found, offsets, titles, strict=True):
        for c in range(CLASSES):
            style: dict[str, Any] = {"marker": MARKERS[c], "color": f"{0.45 + 0.16 * c}"}
            axes.plot(*x[y == c].T, linestyle="none", markersize=2, zorder=1, **style)
        for sign, colour, dashes in OFFSETS:
            classes = network.logits(plane, sign * offset).argmax(1).view(GRID, GRID).T
            style = {"colors": colour, "linestyles": dashes, "linewidths": 1.2}
            axes.contour(ticks, ticks, classes, np.arange(CLASSES - 1) + 0.5, zorder=2, **style)
        axes.set_aspect("equal")
        axes.set(xlabel=f"$x_1$, {title}", ylabel="$x_2$")
    return figure
