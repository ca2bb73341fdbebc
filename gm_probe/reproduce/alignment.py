"""Fig. 6: how well one step of Algorithm 1 aligns with the exact top eigenvectors of the Fisher matrix."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure

from gm_probe.analysis.intervals import mean_interval
from gm_probe.inconsistency.ascent import ascend
from gm_probe.reproduce.drawing import line, panels
from gm_probe.reproduce.finding import Finding, Task, claim_outcome, quantile_sheet
from gm_probe.reproduce.gaussians import Network, descending, trained_network

TOP = 3


def study(task: Task, *, starts: int, rho: float, noise_scale: float, seed: int, **training: Any) -> Finding:
    """|cos(δ, vᵢ)| of ``starts`` random starts each, and the share of ‖δ‖² that lies in the top three directions."""
    network = trained_network(seed=seed, **training)
    values, vectors = descending(network.fisher())
    cosines, noise = cosines_of(network, vectors[:, :TOP], starts, rho, noise_scale, seed)
    found = pd.DataFrame({f"cos_v{i + 1}": cosines[:, i] for i in range(TOP)})
    found = found.assign(noise_cos_v1=noise[:, 0], top3=(cosines**2).sum(1), noise_top3=(noise**2).sum(1))
    others = {"with v₂": "cos_v2", "with v₃": "cos_v3", "of the start with v₁": "noise_cos_v1"}
    gains = {name: mean_interval((found.cos_v1 - found[key]).to_numpy()) for name, key in others.items()}
    outcome = claim_outcome([int(low > 0) - int(high < 0) for _, low, high in gains.values()])
    said = ", ".join(
        f"{name} by {mean:.3f} (99 % CI {low:.3f} to {high:.3f})" for name, (mean, low, high) in gains.items()
    )
    ratios = ", ".join(
        f"λ{i}/λ₁ = {float(values[k] / values[0]):.2f}" for k, i in ((1, "₂"), (2, "₃"), (3, "₄"))
    )
    text = (
        f"Over {starts:,} starts the mean of |cos(δ, v₁)| after one step is {found.cos_v1.mean():.3f}. It exceeds the "
        f"mean |cos| {said}. v₁ is the nearest of the three in "
        f"{100 * (cosines.argmax(1) == 0).mean():.0f} % of the starts. The squared norm of δ/‖δ‖ in the top-3 space "
        f"has the median {found.top3.median():.3f} (5 % of the starts are below {found.top3.quantile(0.05):.2f}); that "
        f"of the starts has {found.noise_top3.median():.4f}. {ratios}; P = {network.size}."
    )
    sheet = quantile_sheet("fig6", "Alignment of one step with the top Fisher eigenvectors", found)
    caption = (
        "(a) |cos| of δ with the top three Fisher eigenvectors, and of its random start with v₁. (b) Squared norm of "
        f"the projections of δ/‖δ‖ and of the start onto the top-3 space. {starts:,} starts."
    )
    return Finding(outcome, text, found.to_dict("records"), [sheet], {"": _draw(found)}, {"": caption})


def cosines_of(
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


def _draw(found: pd.DataFrame) -> Figure:
    figure, (left, right) = panels(2, 2.5)
    shown = {
        "cos_v1": (left, r"$\delta$, $v_1$"),
        "cos_v2": (left, r"$\delta$, $v_2$"),
        "cos_v3": (left, r"$\delta$, $v_3$"),
        "noise_cos_v1": (left, "start, $v_1$"),
        "top3": (right, r"$\delta$"),
        "noise_top3": (right, "start"),
    }
    weights = np.full(len(found), 1 / len(found))
    for index, (key, (axes, label)) in enumerate(shown.items()):
        look = line(index)
        axes.hist(found[key], 50, range=(0, 1), weights=weights, histtype="step", label=label, **look)
    left.set_xlabel(r"|cosine| with a Fisher eigenvector")
    right.set_xlabel(r"squared norm in the top-3 space")
    for axes in (left, right):
        axes.set_yscale("log")  # the starts lie in a few bins, δ in many
        axes.set_ylabel("share of starts")
        axes.legend(frameon=False, fontsize=7)
    return figure
