"""Draw the pictures of docs/concepts.md: `python benchmarks/concept_figures.py` (half a minute on one core)."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import click
import numpy as np
import torch
from idea_figure import Ball, points, trained
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from torch import Tensor, nn

import gm_probe
from gm_probe.analysis.plots import COLOURS
from gm_probe.inconsistency.ascent import maximize, to_sphere
from gm_probe.reproduce.drawing import panels

SIZE = (2.6, 6.7)  # inches a panel is high, and the figure wide
RADII = np.geomspace(0.005, 2, 14)
SCALES = np.geomspace(0.1, 10, 9)
NOISES = np.linspace(0, 8, 9)  # standard deviations, in grey levels of 0 to 16
SCORES = ("mean_confidence", "atc", "error")


def curvature() -> Figure:
    """Largest and mean KL by radius with their quadratic forms, and the eigenvalues of F."""
    x, y = points()
    ball = Ball(trained(x, y), x)
    values, top = fisher_spectrum(ball, x)
    figure, (along, spectrum) = panels(2, SIZE[0], width=SIZE[1])
    generator = torch.Generator().manual_seed(1)
    noise = [to_sphere(ball.parameters.random(1.0, generator), 1.0) for _ in range(20)]
    starts = [top, -top, *noise[:4]]
    ascend = partial(maximize, ball.divergence.value_and_gradient, max_steps=200)
    largest = [max(ascend(start, rho).value for start in starts) for rho in RADII]
    mean = [np.mean([float(ball.divergence.terms(rho * v).mean()) for v in noise]) for rho in RADII]
    forms = (float(values[0]), float(values.sum()) / ball.parameters.size)
    names = (
        (r"largest: $S_\rho$", r"$(\rho^2/2)\,\lambda_{\max}(F)$"),
        ("random δ, mean", r"$(\rho^2/2)$ tr F / P"),
    )
    for colour, kl, form, (name, quadratic) in zip(COLOURS, (largest, mean), forms, names, strict=False):
        along.loglog(RADII, kl, color=colour, label=name)
        along.loglog(RADII, RADII**2 / 2 * form, "--", color=colour, label=quadratic)
    along.set_ylim(1e-7, 300)
    along.set_xlabel("radius ρ")
    along.set_ylabel("mean KL divergence")
    along.legend(frameon=False, fontsize=7, ncols=2, loc="upper left")
    shown = values[values > 1e-8 * values[0]]
    spectrum.semilogy(range(1, len(shown) + 1), shown, ".", markersize=3, color=COLOURS[0])
    spectrum.annotate(r"$\lambda_{\max}(F)$", (1, forms[0]), (8, -3), textcoords="offset points", fontsize=8)
    spectrum.set_xlabel(f"eigenvalue number, of {ball.parameters.size}")
    spectrum.set_ylabel("eigenvalue of F")
    share = 100 * float(values[:3].sum() / values.sum())
    text = f"the three largest\nmake {share:.0f} % of tr F"
    spectrum.annotate(text, (0.4, 0.7), xycoords="axes fraction", fontsize=8)
    return figure


def fisher_spectrum(ball: Ball, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the eigenvalues of F in descending order and the first eigenvector (P,), from the whole Jacobian."""
    theta = ball.parameters.vector()
    jacobian = torch.func.jacrev(lambda moved: ball.parameters.logits(x, moved))(theta).detach()
    p = ball.parameters.logits(x, theta).softmax(1).detach()
    centred = p.sqrt()[..., None] * (jacobian - torch.einsum("nc,ncp->np", p, jacobian)[:, None])
    _, values, vectors = torch.linalg.svd(centred.flatten(0, 1), full_matrices=False)
    return values.square() / len(x), vectors[0]


def digits() -> tuple[Tensor, Tensor]:
    """Return the digits (1797, 64), from 0 to 1, and their labels, in a seeded order."""
    x, y = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(x))
    return torch.from_numpy(x[order]).float() / 16, torch.from_numpy(y[order])


def network(x: Tensor, y: Tensor) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for _ in range(500):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    return model.eval()


def outputs() -> Figure:
    """Accuracy and its uncalibrated estimates on digits with more and more noise."""
    x, y = digits()
    model = network(x[:500], y[:500])
    validation = gm_probe.Batches.from_tensors(x[500:1000], y[500:1000])
    generator = torch.Generator().manual_seed(0)
    found: dict[str, list[float]] = {name: [] for name in SCORES}
    for noise in NOISES:
        noisy = (x[1000:] + noise / 16 * torch.randn(x[1000:].shape, generator=generator)).clamp(0, 1)
        report = gm_probe.measure(
            model, gm_probe.Batches.from_tensors(noisy, y[1000:]), SCORES, validation=validation
        )
        for name in SCORES:
            found[name].append(report.rows[name].value or 0.0)
    figure, (axes,) = panels(1, SIZE[0], width=4.2)
    axes.plot(NOISES, [1 - error for error in found["error"]], color="black", label="accuracy")
    axes.plot(NOISES, found["mean_confidence"], "--", color=COLOURS[0], label="mean confidence")
    axes.plot(NOISES, found["atc"], ":", color=COLOURS[1], label="ATC")
    axes.set_xlabel("noise: standard deviation in grey levels of 0 to 16")
    axes.set_ylim(0, 1.02)
    axes.legend(frameon=False, fontsize=8)
    return figure


def rescaling() -> Figure:
    """One function at several scales of its layers: its measures, relative to those at scale 1."""
    x, y = digits()
    batches = gm_probe.Batches.from_tensors(x[500:1000])
    lines = {
        "local_inconsistency": (r"$S_\rho$", "-"),
        "fisher_trace": ("tr F", "--"),
        "parameter_norm": ("‖θ‖", ":"),
        "local_inconsistency_adaptive": (r"$S_\rho$, adaptive", "o"),
        "path_norm": ("path norm, and all of outputs", "-"),
    }
    found: dict[str, list[float]] = {name: [] for name in lines}
    for scale in SCALES:
        model = network(x[:500], y[:500])
        with torch.no_grad():
            model[0].weight *= scale
            model[0].bias *= scale
            model[2].weight /= scale
        report = gm_probe.measure(model, batches, list(lines), gm_probe.Settings(rho=0.1, eta=1e-4))
        for name in lines:
            found[name].append(report.rows[name].value or np.nan)
    figure, (axes,) = panels(1, SIZE[0], width=4.2)
    for index, (name, (label, dashes)) in enumerate(lines.items()):
        values = np.array(found[name]) / found[name][len(SCALES) // 2]
        axes.loglog(SCALES, values, dashes, markersize=4, color=COLOURS[index], label=label)
    axes.set_xlabel("factor a of the first layer; the second one has 1/a")
    axes.set_ylabel("measure, relative to a = 1")
    axes.legend(frameon=False, fontsize=8)
    return figure


@click.command(help=__doc__)
@click.option("--out", type=click.Path(path_type=Path), default=Path(__file__).parents[1] / "docs")
def main(out: Path) -> None:
    torch.set_num_threads(1)
    for draw in (curvature, outputs, rescaling):
        draw().savefig(out / f"{draw.__name__}.png", dpi=150)


if __name__ == "__main__":
    main()
