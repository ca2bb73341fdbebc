"""Fig. 2 and 5: decision boundaries under one step of Algorithm 1 from several starts, and under noise as long."""

from __future__ import annotations

from itertools import combinations
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MultipleLocator
from torch import Tensor

from gm_probe.analysis.intervals import mean_interval
from gm_probe.analysis.plots import MARKERS
from gm_probe.analysis.typeset import Cell, Sheet
from gm_probe.probe.ascent import ascend, to_sphere
from gm_probe.reproduce.drawing import panels
from gm_probe.reproduce.finding import Finding, Outcome, Task
from gm_probe.reproduce.gaussians import CLASSES, Mixture, Network

BASE, PLUS, MINUS = "black", "#0072B2", "#D55E00"
POINTS = ("0.45", "0.62", "0.78")
GRID = 241  # points a side at which boundaries are looked for


def study(
    task: Task,
    *,
    per_class: int,
    spread: float,
    width: int,
    steps: int,
    lr: float,
    momentum: float,
    rho: float,
    noise_scale: float,
    panels_of_delta: int,
    starts: int,
    seed: int,
) -> Finding:
    """Boundaries at θ ± δ and θ ± noise for the first starts; over all ``starts`` the share of predictions that change.

    Fresh points of the mixture count, 1,000 a class: a picture's plane has no measure.
    """
    network = Network(Mixture.draw(per_class, spread, seed), width, seed).trained(steps, lr, momentum)
    fresh = Mixture.draw(1000, spread, seed + 1).x
    generator = torch.Generator().manual_seed(seed)
    noises = [network.parameters.random(noise_scale, generator) for _ in range(starts)]
    gradient = network.divergence.gradient
    deltas = [ascend(gradient, noise, rho, 1) for noise in noises]
    noises = [to_sphere(noise, rho) for noise in noises]
    changed = np.array(
        [[_changed(network, fresh, offset) for offset in pair] for pair in zip(deltas, noises, strict=True)]
    )
    moved = np.array(
        [
            [float(network.divergence.terms(offset).mean()) for offset in pair]
            for pair in zip(deltas, noises, strict=True)
        ]
    )
    rows = [
        {
            "start": index,
            "changed_delta": changed[index, 0],
            "changed_noise": changed[index, 1],
            "kl_delta": moved[index, 0],
            "kl_noise": moved[index, 1],
        }
        for index in range(starts)
    ]
    gain, low, high = mean_interval(changed[:, 0] - changed[:, 1])
    outcome: Outcome = "shows" if low > 0 else "does not show" if high < 0 else "cannot be told"
    share, of_noise = 100 * changed.mean(0)
    text = (
        f"At ρ = {rho:g} (‖θ‖ = {float(network.theta.norm()):.1f}), θ ± δ of one step gives {share:.1f} % of fresh "
        f"points another class on average over {starts} starts, noise of the same norm {of_noise:.2f} %: "
        f"{100 * gain:.1f} points more (paired 99 % interval {100 * low:.1f} to {100 * high:.1f}). The mean KL is "
        f"{np.median(moved[:, 0] / moved[:, 1]):.0f} times as large in the median. δ moved more than its own noise in "
        f"{100 * (changed[:, 0] > changed[:, 1]).mean():.0f} % of the starts. The network's training error is "
        f"{100 * network.error:.1f} %, P = {network.size}."
    )
    names = [rf"$\delta$ from start {index + 1}" for index in range(panels_of_delta)]
    figure = _draw(network, [*deltas[:panels_of_delta], noises[0]], [*names, "noise of that norm"])
    return Finding(
        outcome,
        text,
        rows,
        [_sheet(task.name, changed, moved)],
        {"": figure},
        {
            "": f"Decision boundaries at θ (black), θ + offset (blue, solid) and θ − offset (orange, dashed). Above "
            f"each panel stands its offset, of length {rho:g}. Grey: training points, a marker a class."
        },
    )


def _changed(network: Network, x: Tensor, offset: Tensor) -> float:
    """Share of x (N, 2) whose class changes, mean of θ + offset and θ − offset."""
    before = network.logits(x).argmax(1)
    ends = [(network.logits(x, sign * offset).argmax(1) != before).double().mean() for sign in (1, -1)]
    return float(sum(ends)) / 2


def _sheet(name: str, changed: np.ndarray, moved: np.ndarray) -> Sheet:
    def row(label: str, values: np.ndarray, scale: float, digits: int) -> tuple[Cell, ...]:
        return (Cell(label), *(Cell(f"{scale * v:.{digits}g}") for v in values))

    def figures(values: np.ndarray) -> np.ndarray:
        return np.array([values.mean(), *np.quantile(values, [0.05, 0.5, 0.95])])

    return Sheet(
        name,
        "What δ and noise of the same norm change",
        f"Mean and quantiles over {len(changed)} starts",
        ("", "mean", "5 %", "50 %", "95 %"),
        (
            row("classes changed by ±δ, %", figures(changed[:, 0]), 100, 3),
            row("classes changed by ±noise, %", figures(changed[:, 1]), 100, 3),
            row("mean KL at δ", figures(moved[:, 0]), 1, 3),
            row("mean KL at noise", figures(moved[:, 1]), 1, 3),
        ),
    )


def _draw(network: Network, offsets: list[Tensor], names: list[str]) -> Figure:
    x, y = network.mixture.x.numpy(), network.mixture.y.numpy()
    reach = 1.08 * float(np.abs(x).max())
    ticks = torch.linspace(-reach, reach, GRID, dtype=torch.float64)
    plane = torch.cartesian_prod(ticks, ticks)
    many = len(offsets) > 2
    figure, found = panels(len(offsets), 2.35 if many else 3.15, width=6.9 if many else 5.0, titles=names)
    for axes, offset in zip(found, offsets, strict=True):
        for c in range(CLASSES):
            mine = y == c
            axes.plot(
                *x[mine].T, linestyle="none", marker=MARKERS[c], markersize=2, color=POINTS[c], zorder=1
            )
        for sign, colour, dashes in ((1, PLUS, "-"), (-1, MINUS, "--")):
            _boundary(axes, ticks, network.logits(plane, sign * offset), colour, dashes, 1.3)
        _boundary(axes, ticks, network.logits(plane), BASE, "-", 1.0)
        axes.set_aspect("equal")
        axes.set_xlim(-reach, reach)
        axes.set_ylim(-reach, reach)
        axes.set_xlabel("$x_1$")
        axes.xaxis.set_major_locator(MultipleLocator(2))
        axes.yaxis.set_major_locator(MultipleLocator(2))
        axes.tick_params(labelleft=axes is found[0])
    found[0].set_ylabel("$x_2$")
    looks: list[tuple[dict[str, Any], str]] = [
        ({"color": BASE, "linestyle": "-"}, r"at $\theta$"),
        ({"color": PLUS, "linestyle": "-"}, r"at $\theta$ + offset"),
        ({"color": MINUS, "linestyle": "--"}, r"at $\theta$ − offset"),
    ]
    handles = [Line2D([], [], label=label, **look) for look, label in looks]
    figure.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False, fontsize=8)
    return figure


def _boundary(axes: Axes, ticks: Tensor, logits: Tensor, colour: str, dashes: str, width: float) -> None:
    """Where the two largest of ``logits`` (GRID², C) are equal, each pair of classes once."""
    z = logits.view(GRID, GRID, CLASSES).transpose(0, 1).numpy()
    for a, b in combinations(range(CLASSES), 2):
        rest = np.delete(z, (a, b), axis=2).max(2)
        lead = np.ma.masked_where(rest > np.maximum(z[..., a], z[..., b]), z[..., a] - z[..., b])
        style: dict[str, Any] = {"colors": [colour], "linestyles": [dashes], "linewidths": width}
        axes.contour(ticks.numpy(), ticks.numpy(), lead, [0.0], zorder=2, **style)
