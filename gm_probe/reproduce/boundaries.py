"""Fig. 2 and 5's picture: decision boundaries of a network on the plane, at θ and at θ ± an offset."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from gm_probe.analysis.plots import MARKERS
from gm_probe.reproduce.drawing import panels
from gm_probe.reproduce.gaussians import CLASSES, Network

OFFSETS = ((0, "black", "-"), (1, "#0072B2", "-"), (-1, "#D55E00", "--"))
"""The sign of an offset, and how the boundary there is drawn."""
GRID = 241  # points a side at which boundaries are looked for


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
            _boundary(axes, ticks, network.logits(plane, sign * offset), colour, dashes)
        axes.set_aspect("equal")
        axes.set(xlabel=f"$x_1$, {title}", ylabel="$x_2$")
    return figure


def _boundary(axes: Axes, ticks: Tensor, logits: Tensor, colour: str, dashes: str) -> None:
    """Draw where the two largest of ``logits`` (GRID², C) are equal, each pair of classes once."""
    z = logits.view(GRID, GRID, CLASSES).transpose(0, 1).numpy()
    for a, b in combinations(range(CLASSES), 2):
        rest = np.delete(z, (a, b), axis=2).max(2)
        lead = np.ma.masked_where(rest > np.maximum(z[..., a], z[..., b]), z[..., a] - z[..., b])
        axes.contour(
            ticks.numpy(),
            ticks.numpy(),
            lead,
            [0.0],
            zorder=2,
            colors=[colour],
            linestyles=[dashes],
            linewidths=1.2,
        )
