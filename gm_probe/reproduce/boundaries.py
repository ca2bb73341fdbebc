"""Fig. 2 and 5: decision boundaries under one step of Algorithm 1 from several starts, and under noise as long."""

from __future__ import annotations

from itertools import combinations
from typing import Any

import numpy as np
import pandas as pd
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from gm_probe.analysis.intervals import mean_interval
from gm_probe.analysis.plots import MARKERS
from gm_probe.inconsistency.ascent import ascend, to_sphere
from gm_probe.reproduce.drawing import panels
from gm_probe.reproduce.finding import Finding, Task, claim_outcome, quantile_sheet
from gm_probe.reproduce.gaussians import CLASSES, Mixture, Network, trained_network

OFFSETS = ((0, "black", "-"), (1, "#0072B2", "-"), (-1, "#D55E00", "--"))
"""The sign of an offset, and how the boundary there is drawn."""
GRID = 241  # points a side at which boundaries are looked for


def study(
    task: Task,
    *,
    spread: float,
    rho: float,
    noise_scale: float,
    panels_of_delta: int,
    starts: int,
    seed: int,
    **training: Any,
) -> Finding:
    """Boundaries at θ ± δ and θ ± noise for the first starts; over all ``starts`` the share of predictions that change.

    Fresh points of the mixture count, 1,000 a class: a picture's plane has no measure.
    """
    network = trained_network(spread=spread, seed=seed, **training)
    fresh = Mixture.draw(1000, spread, seed + 1).x
    generator = torch.Generator().manual_seed(seed)
    drawn = [network.parameters.random(noise_scale, generator) for _ in range(starts)]
    offsets = {
        "delta": [ascend(network.divergence.gradient, noise, rho, 1) for noise in drawn],
        "noise": [to_sphere(noise, rho) for noise in drawn],
    }
    changed = {f"changed_{k}": [_changed(network, fresh, one) for one in of] for k, of in offsets.items()}
    moved = {
        f"kl_{k}": [float(network.divergence.terms(one).mean()) for one in of] for k, of in offsets.items()
    }
    found = pd.DataFrame({"start": range(starts), **changed, **moved})
    more = found.changed_delta - found.changed_noise
    gain, low, high = mean_interval(more.to_numpy())
    outcome = claim_outcome([int(low > 0) - int(high < 0)])
    text = (
        f"At ρ = {rho:g} (‖θ‖ = {float(network.theta.norm()):.1f}), over {starts} starts, θ ± δ after one step changes "
        f"the class of {100 * found.changed_delta.mean():.1f} % of fresh points, and noise of the same norm that of "
        f"{100 * found.changed_noise.mean():.2f} %: {100 * gain:.1f} points more (paired 99 % CI {100 * low:.1f} to "
        f"{100 * high:.1f}). The mean KL is {(found.kl_delta / found.kl_noise).median():.0f} times as large in the "
        f"median. δ changes more than its own noise in {100 * (more > 0).mean():.0f} % of the starts. The network's "
        f"training error is {100 * network.error:.1f} %, P = {network.size}."
    )
    names = [*(rf"$\delta$ from start {i + 1}" for i in range(panels_of_delta)), "noise of that norm"]
    figure = _draw(network, [*offsets["delta"][:panels_of_delta], offsets["noise"][0]], names)
    sheet = quantile_sheet(task.name, "What δ and noise of the same norm change", found.drop(columns="start"))
    caption = (
        f"Decision boundaries at θ (black), θ + offset (blue, solid) and θ − offset (orange, dashed). The offset, of "
        f"length {rho:g}, is named above each panel. Grey: training points, a marker a class."
    )
    return Finding(outcome, text, found.to_dict("records"), [sheet], {"": figure}, {"": caption})


def _changed(network: Network, x: Tensor, offset: Tensor) -> float:
    """Share of x (N, 2) whose class changes, mean of θ + offset and θ − offset."""
    before = network.logits(x).argmax(1)
    ends = [(network.logits(x, sign * offset).argmax(1) != before).double().mean() for sign in (1, -1)]
    return float(sum(ends)) / 2


def _draw(network: Network, offsets: list[Tensor], names: list[str]) -> Figure:
    x, y = network.mixture.x.numpy(), network.mixture.y.numpy()
    reach = 1.08 * float(np.abs(x).max())
    ticks = torch.linspace(-reach, reach, GRID, dtype=torch.float64)
    plane = torch.cartesian_prod(ticks, ticks)
    figure, found = panels(len(offsets), 6.9 / len(offsets), titles=names)
    for axes, offset in zip(found, offsets, strict=True):
        for c in range(CLASSES):
            grey = f"{0.45 + 0.16 * c}"
            axes.plot(*x[y == c].T, linestyle="none", marker=MARKERS[c], markersize=2, color=grey, zorder=1)
        for sign, colour, dashes in OFFSETS:
            _boundary(axes, ticks, network.logits(plane, sign * offset), colour, dashes)
        axes.set_aspect("equal")
        axes.set_xlabel("$x_1$")
    found[0].set_ylabel("$x_2$")
    return figure


def _boundary(axes: Axes, ticks: Tensor, logits: Tensor, colour: str, dashes: str) -> None:
    """Where the two largest of ``logits`` (GRID², C) are equal, each pair of classes once."""
    z = logits.view(GRID, GRID, CLASSES).transpose(0, 1).numpy()
    for a, b in combinations(range(CLASSES), 2):
        rest = np.delete(z, (a, b), axis=2).max(2)
        lead = np.ma.masked_where(rest > np.maximum(z[..., a], z[..., b]), z[..., a] - z[..., b])
        style: dict[str, Any] = {"colors": [colour], "linestyles": [dashes], "linewidths": 1.2}
        axes.contour(ticks.numpy(), ticks.numpy(), lead, [0.0], zorder=2, **style)
