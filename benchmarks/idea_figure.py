"""Draw the idea of local inconsistency, docs/idea.png: `python benchmarks/idea_figure.py` (15 s on one core).

One small network is trained twice on the same points: with SGD and with IAM-D. Its outputs are shown at the trained
weights θ, and at the weights of the ball ‖δ‖ ≤ ρ where the outputs differ most from those at θ.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
import matplotlib as mpl
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.contour import ContourSet
from matplotlib.figure import Figure
from matplotlib.patches import Circle
from matplotlib.patheffects import withStroke
from sklearn.datasets import make_moons
from torch import Tensor, nn

import gm_probe
from gm_probe.inconsistency.ascent import Divergence, Maximum, maximize
from gm_probe.linalg.work import Work

RHO = 0.5
SIDE, REACH = 161, 1.6  # points a side of a grid; half a side of the weights' plane, in radii
STARTS = 8
STEPS = 600
RULES: dict[str, dict[str, Any]] = {"SGD": {}, "IAM-D": {"rho": 0.5, "beta": 5.0}}
LEVELS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)  # nats
CLASSES = (("o", "#b2182b"), ("^", "#2166ac"))
HALO = [withStroke(linewidth=2.5, foreground="white", alpha=0.8)]
TITLES = ("the weights: a ball around θ", "the outputs at θ", "the outputs at θ + δ")
NOTE = (
    "$S_\\rho$ is the largest KL divergence in the ball; δ is where it is reached.\n"
    "No label is needed to find it. Rings mark points that change class."
)


def points() -> tuple[Tensor, Tensor]:
    """Return 120 points (120, 2) of two classes, in float64, and their labels."""
    x, y = make_moons(120, noise=0.18, random_state=0)
    return torch.from_numpy(x - x.mean(0)), torch.from_numpy(y)


def trained(x: Tensor, y: Tensor, **rule: Any) -> nn.Module:
    """Train the network from the same initial weights, with IAM-D where ``rule`` has its settings."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(2, 24), nn.ReLU(), nn.Linear(24, 24), nn.ReLU(), nn.Linear(24, 2)
    ).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-3)
    step = gm_probe.IAMD(model, **rule).backward if rule else None
    for _ in range(STEPS):
        optimizer.zero_grad()
        if step is None:
            nn.functional.cross_entropy(model(x), y).backward()
        else:
            step(x, y)
        optimizer.step()
    return model.eval()


class Ball:
    """The outputs of a network within radius ρ of its weights.

    Attributes:
        worst: where the largest mean KL divergence was found.
    """

    def __init__(self, model: nn.Module, x: Tensor) -> None:
        self.parameters = gm_probe.Parameters(model)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            logits = model(x)
        batches = gm_probe.Batches.from_tensors(x, batch_size=len(x))
        self.divergence = Divergence(self.parameters, batches, logits, Work(len(x)))
        starts = [self.parameters.random(0.1, generator) for _ in range(STARTS)]
        fisher = gm_probe.fisher(self.parameters, batches, logits)
        start = self.parameters.random(1.0, generator)
        self._second = gm_probe.eigenpairs(fisher, start, top=2)[0][1].vector
        self.worst: Maximum = max(
            (maximize(self.divergence.value_and_gradient, start, RHO, max_steps=200) for start in starts),
            key=lambda end: end.value,
        )

    def probabilities(self, plane: Tensor, offset: Tensor | float = 0.0) -> Tensor:
        """Return the second class's probability (M,) at points ``plane`` (M, 2) and weights θ + ``offset``."""
        with torch.no_grad():
            return self.parameters.logits(plane, self.parameters.vector() + offset).softmax(1)[:, 1]

    def landscape(self, ticks: np.ndarray) -> np.ndarray:
        """Return the mean KL over the plane of weights through θ, δ (to the right) and F's second eigenvector (up)."""
        right = self.worst.delta / RHO
        up = self._second
        up = up - (up @ right) * right
        up = up / up.norm()
        return np.array(
            [[float(self.divergence.terms(a * right + b * up).mean()) for a in ticks] for b in ticks]
        )


def draw_weights(axes: Axes, ball: Ball) -> ContourSet:
    ticks = np.linspace(-REACH * RHO, REACH * RHO, 61)
    found = np.maximum(ball.landscape(ticks), LEVELS[0])
    shown = axes.contourf(ticks, ticks, found, levels=LEVELS, norm=LogNorm(), cmap="viridis_r", extend="max")
    axes.add_patch(Circle((0, 0), RHO, fill=False, color="black", linewidth=1.5))
    axes.annotate("", (RHO, 0), (0, 0), arrowprops={"arrowstyle": "-|>", "color": "black", "linewidth": 1.5})
    axes.plot(0, 0, "o", color="black", markersize=4)
    axes.annotate("θ", (0, 0), (-4, 4), textcoords="offset points", ha="right", fontsize=12)
    axes.annotate("δ", (RHO / 2, 0), (0, 3), textcoords="offset points", ha="center", fontsize=12)
    axes.annotate("radius ρ", (0, RHO), (0, 4), textcoords="offset points", ha="center", path_effects=HALO)
    return shown


def draw_outputs(axes: Axes, ball: Ball, offset: Tensor | float, x: Tensor, y: Tensor) -> int:
    """Draw the probabilities over the plane and return how many points of ``x`` change their class."""
    reach = 1.15 * float(x.abs().max())
    ticks = torch.linspace(-reach, reach, SIDE, dtype=torch.float64)
    shown = ball.probabilities(torch.cartesian_prod(ticks, ticks), offset).view(SIDE, SIDE).T.numpy()
    axes.contourf(ticks, ticks, shown, levels=np.linspace(0, 1, 11), cmap="RdBu", alpha=0.75)
    axes.contour(ticks, ticks, shown, [0.5], colors="black", linewidths=1)
    for label, (marker, colour) in enumerate(CLASSES):
        axes.plot(
            *x[y == label].T, marker, color=colour, markersize=4, markeredgecolor="white", markeredgewidth=0.5
        )
    changed = (ball.probabilities(x) > 0.5) != (ball.probabilities(x, offset) > 0.5)
    axes.plot(
        *x[changed].T, "o", markersize=8, markerfacecolor="none", markeredgecolor="black", markeredgewidth=0.9
    )
    return int(changed.sum())


def draw(x: Tensor, y: Tensor) -> Figure:
    figure = Figure((8.4, 6.3), layout="constrained")
    grid = figure.add_gridspec(3, 3, height_ratios=[1, 1, 0.045])
    for row, (name, rule) in enumerate(RULES.items()):
        weights, before, after = (figure.add_subplot(grid[row, column]) for column in range(3))
        ball = Ball(trained(x, y, **rule), x)
        shown = draw_weights(weights, ball)
        draw_outputs(before, ball, 0.0, x, y)
        changed = draw_outputs(after, ball, ball.worst.delta, x, y)
        weights.set_ylabel(f"trained with {name}", fontsize=12)
        points = "1 point changes" if changed == 1 else f"{changed} points change"
        after.set_xlabel(f"$S_\\rho$ = {ball.worst.value:.2g}: {points} class", fontsize=11)
        for axes, title in zip((weights, before, after), TITLES, strict=True):
            axes.set_aspect("equal")
            axes.set_xticks([])
            axes.set_yticks([])
            if row == 0:
                axes.set_title(title, fontsize=11.5)
    bar = figure.colorbar(
        shown, cax=figure.add_subplot(grid[2, 0]), orientation="horizontal", ticks=LEVELS[::2]
    )
    bar.ax.set_xticklabels([f"{level:g}" for level in LEVELS[::2]])
    bar.set_label("KL divergence from the outputs at θ")
    note = figure.add_subplot(grid[2, 1:])
    note.axis("off")
    note.text(0.03, 0.3, NOTE, va="center", transform=note.transAxes)
    return figure


@click.command(help=__doc__)
@click.option(
    "--out", type=click.Path(path_type=Path), default=Path(__file__).parents[1] / "docs" / "idea.png"
)
def main(out: Path) -> None:
    torch.set_num_threads(1)
    with mpl.rc_context({"font.size": 10}):
        draw(*points()).savefig(out, dpi=150)


if __name__ == "__main__":
    main()
