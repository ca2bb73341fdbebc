"""Fig. 6: how well one step of Algorithm 1 aligns with the exact top eigenvectors of the Fisher matrix."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from gm_probe.analysis.intervals import mean_interval
from gm_probe.analysis.typeset import Cell, Sheet
from gm_probe.probe.ascent import ascend
from gm_probe.reproduce.drawing import outline, panels
from gm_probe.reproduce.finding import Finding, Outcome, Task
from gm_probe.reproduce.gaussians import Mixture, Network, descending

TOP = 3
NAMES = ("v₁", "v₂", "v₃")


def study(
    task: Task,
    *,
    per_class: int,
    spread: float,
    width: int,
    steps: int,
    lr: float,
    momentum: float,
    starts: int,
    rho: float,
    noise_scale: float,
    seed: int,
) -> Finding:
    """|cos(δ, vᵢ)| of ``starts`` random starts each, and the share of ‖δ‖² that lies in the top three directions."""
    network = Network(Mixture.draw(per_class, spread, seed), width, seed).trained(steps, lr, momentum)
    values, vectors = descending(network.fisher())
    top = vectors[:, :TOP]
    cosines, noise = _cosines(network, top, starts, rho, noise_scale, seed)
    inside, noise_inside = (cosines**2).sum(1), (noise**2).sum(1)
    rows = [
        {
            **{f"cos_v{i + 1}": cosines[n, i] for i in range(TOP)},
            "noise_cos_v1": noise[n, 0],
            "top3": inside[n],
            "noise_top3": noise_inside[n],
        }
        for n in range(starts)
    ]
    gains = {f"{NAMES[i]}": mean_interval(cosines[:, 0] - cosines[:, i]) for i in range(1, TOP)} | {
        "noise": mean_interval(cosines[:, 0] - noise[:, 0])
    }
    leads = (cosines[:, 0] > cosines[:, 1:].max(1)).mean()
    clear = all(low > 0 for _, low, _ in gains.values())
    refuted = any(high < 0 for _, _, high in gains.values())
    outcome: Outcome = "shows" if clear else "does not show" if refuted else "cannot be told"
    ratios = [float(values[i] / values[0]) for i in range(1, TOP + 1)]
    text = (
        f"Over {starts:,} starts, |cos(δ, v₁)| of one step has the mean {cosines[:, 0].mean():.3f}; it exceeds that "
        + ", ".join(
            f"with {name} by {mean:.3f} (99 % {low:.3f} to {high:.3f})"
            if name != "noise"
            else f"and that of the start itself with v₁ by {mean:.3f} ({low:.3f} to {high:.3f})"
            for name, (mean, low, high) in gains.items()
        )
        + f". That is on average: in {100 * leads:.0f} % of the starts v₁ is the nearest of the three. "
        f"The squared norm of δ/‖δ‖ in the top-3 space has the median {np.median(inside):.3f} (5 % of the starts below "
        f"{np.quantile(inside, 0.05):.2f}), that of noise {np.median(noise_inside):.4f}. "
        f"λ₂/λ₁ = {ratios[0]:.2f}, λ₃/λ₁ = {ratios[1]:.2f}, λ₄/λ₁ = {ratios[2]:.2f}; P = {network.size}."
    )
    return Finding(
        outcome,
        text,
        rows,
        [_sheet(cosines, noise, inside, noise_inside, starts)],
        {"": _draw(cosines, noise, inside, noise_inside)},
        {
            "": f"(a) |cos| of δ with the top three Fisher eigenvectors, and of its random start with v₁; (b) squared "
            f"norm of the projection of δ/‖δ‖ and of the start onto the top-3 space. {starts:,} starts; the outlines "
            "of the start are cut off above."
        },
    )


def _cosines(
    network: Network, top: torch.Tensor, starts: int, rho: float, noise_scale: float, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """|cos| (starts, 3) of Algorithm 1's δ after one step, and of the starts, with the columns of ``top`` (P, 3)."""
    generator = torch.Generator().manual_seed(seed)
    gradient = network.divergence.gradient
    found = []
    for _ in range(starts):
        start = network.parameters.random(noise_scale, generator)
        delta = ascend(gradient, start, rho, 1)
        found.append([(vector @ top / vector.norm()).abs() for vector in (delta, start)])
    both = torch.stack([torch.stack(pair) for pair in found]).numpy()
    return both[:, 0], both[:, 1]


def _sheet(
    cosines: np.ndarray, noise: np.ndarray, inside: np.ndarray, noise_inside: np.ndarray, starts: int
) -> Sheet:
    columns: list[tuple[str, np.ndarray]] = [
        *((f"|cos(δ, {name})|", cosines[:, i]) for i, name in enumerate(NAMES)),
        ("|cos(start, v₁)|", noise[:, 0]),
        ("‖projection of δ‖², top 3", inside),
        ("‖projection of start‖², top 3", noise_inside),
    ]
    quantiles = (0.05, 0.25, 0.5, 0.75, 0.95)

    def row(name: str, values: np.ndarray) -> tuple[Cell, ...]:
        return (Cell(name), *(Cell(f"{v:.3f}") for v in (values.mean(), *np.quantile(values, quantiles))))

    return Sheet(
        "fig6",
        "Alignment of one step with the top Fisher eigenvectors",
        f"Mean and quantiles over {starts:,} random starts",
        ("", "mean", *(f"{100 * q:.0f} %" for q in quantiles)),
        tuple(row(name, values) for name, values in columns),
    )


def _draw(cosines: np.ndarray, noise: np.ndarray, inside: np.ndarray, noise_inside: np.ndarray) -> Any:
    figure, (left, right) = panels(2, 2.5)
    edges = np.linspace(0, 1, 51)
    for index in range(TOP):
        outline(left, cosines[:, index], edges, index, rf"$\delta$, $v_{index + 1}$")
    outline(left, noise[:, 0], edges, 3, "start, $v_1$")
    left.set_xlabel(r"|cosine| with a Fisher eigenvector")
    left.set_ylim(
        0, 1.25 * max(np.histogram(cosines[:, i], edges)[0].max() for i in range(TOP)) / len(cosines)
    )
    outline(right, inside, edges, 0, r"$\delta$")
    outline(right, noise_inside, edges, 3, "start")
    right.set_xlabel(r"squared norm in the top-3 space")
    right.set_ylim(0, 1.25 * np.histogram(inside, edges)[0].max() / len(inside))
    for axes in (left, right):
        axes.set_xlim(0, 1)
        axes.set_ylabel("share of starts")
        axes.legend(frameon=False, fontsize=7)
    return figure
