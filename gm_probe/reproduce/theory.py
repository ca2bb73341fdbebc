"""The paper's theory on a network whose curvature is a dense matrix: Fig. 2, 5, 6 and 7, Theorem 4.1, and App. B.

A function here gives a table of numbers; the recipe names it and says what is claimed, listed and drawn of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from scipy import stats
from torch import Tensor
from torch.func import grad, vmap

from gm_probe.analysis.typeset import Sheet
from gm_probe.inconsistency.ascent import ascend, to_sphere
from gm_probe.inconsistency.kl import kl_divergence
from gm_probe.reproduce import boundaries, posteriors
from gm_probe.reproduce.claims import column, groups_of, outcome_of_parts, parts_of, spread
from gm_probe.reproduce.drawing import draw
from gm_probe.reproduce.finding import Finding, Task, frame_sheet
from gm_probe.reproduce.gaussians import Mixture, Network, descending, trained_network

Table = Mapping[str, Any]


def study(
    task: Task,
    *,
    rows: str,
    tests: Sequence[Table],
    caption: str,
    facts: Sequence[Table] = (),
    listed: Table,
    picture: Sequence[Table] = (),
    columns: int = 3,
    mean_over: Sequence[str] = (),
    **settings: Any,
) -> Finding:
    """Compute the table ``rows`` and test the claim on it.

    Args:
        rows: a key of ``ROWS``, called with ``settings``.
        tests, facts: parts of the claim (``claims.parts_of``), and further expressions whose spread is told.
        listed: ``title``, ``caption``, ``of`` (columns ↦ headings) and ``by`` (a line per group of means; without it a
            line a column, with its mean and quantiles).
        picture, columns: panels (``drawing.draw``), so many side by side; none draws decision boundaries.
        mean_over: columns by which the rows of the CSV file are means; none writes every row.
    """
    table, figure = ROWS[rows](task, **settings)
    parts = [part for test in tests for part in parts_of(table, test)]
    said = [f"{part.text} ({VERDICTS[part.sign]})" for part in parts]
    told = [
        f"{says}{spread(column(mine, fact['value']))}"
        for fact in facts
        for says, mine in groups_of(table, fact)
    ]
    text = " ".join(f"{one[0].upper()}{one[1:]}." for one in [*said, *told])
    kept = (
        table.groupby([*mean_over], sort=False).mean().drop(columns="start").reset_index()
        if mean_over
        else table
    )
    return Finding(
        outcome_of_parts([part.sign for part in parts]),
        text + table.attrs.get("lost", ""),
        kept,
        [_sheet(task.name, table, **listed)],
        figure or draw({"": table}, picture, columns),
        caption,
    )


VERDICTS = {1: "holds", -1: "does not hold", 0: "undecided"}


def _sheet(
    name: str, table: pd.DataFrame, *, title: str, caption: str, of: Mapping[str, str], by: Sequence[str] = ()
) -> Sheet:
    """Return means of columns by group, or without ``by`` their mean and quantiles over all rows."""
    if by:
        means = table.groupby([*by], sort=False)[[*of]].mean().rename(columns=of).reset_index()
        return frame_sheet(name, title, caption, means, len(by))
    shares = (0.05, 0.25, 0.5, 0.75, 0.95)
    quantiles = table[[*of]].rename(columns=of).quantile([*shares]).T
    quantiles.columns = pd.Index([f"{100 * share:.0f} %" for share in shares])
    quantiles.insert(0, "mean", table[[*of]].mean().to_numpy())
    return frame_sheet(name, title, caption, quantiles.reset_index(names=""))


def changed_classes(
    task: Task,
    *,
    rho: float,
    noise_scale: float,
    starts: int,
    shown: int,
    spread: float,
    seed: int,
    **training: Any,
) -> tuple[pd.DataFrame, Figure]:
    """Return Fig. 2 and 5: per start, the share of 3,000 fresh points that change class at θ ± δ, and the mean KL.

    Beside δ after one step stands noise of the same norm. The picture has the boundaries of the first ``shown`` starts.
    """
    network = trained_network(spread=spread, seed=seed, **training)
    fresh = Mixture.draw(1000, spread, seed + 1).x
    generator = torch.Generator().manual_seed(seed)
    noises = [network.parameters.random(noise_scale, generator) for _ in range(starts)]
    deltas = [ascend(network.divergence.gradient, noise, rho, 1) for noise in noises]
    spheres = [to_sphere(noise, rho) for noise in noises]
    table = pd.DataFrame({"start": range(starts)})
    for name, offsets in (("delta", deltas), ("noise", spheres)):
        table[f"changed_{name}"] = [_changed(network, fresh, offset) for offset in offsets]
    for name, offsets in (("delta", deltas), ("noise", spheres)):
        table[f"kl_{name}"] = [float(network.divergence.terms(offset).mean()) for offset in offsets]
    titles = [*(rf"$\delta$ from start {i + 1}" for i in range(shown)), "noise of that norm"]
    return table, boundaries.draw(network, [*deltas[:shown], spheres[0]], titles)


def _changed(network: Network, x: Tensor, offset: Tensor) -> float:
    """Return the share of x (N, 2) whose class changes, as mean of θ + offset and θ − offset."""
    before = network.logits(x).argmax(1)
    ends = [(network.logits(x, sign * offset).argmax(1) != before).double().mean() for sign in (1, -1)]
    return float(sum(ends)) / 2


def cosines(
    task: Task, *, starts: int, rho: float, noise_scale: float, seed: int, **training: Any
) -> tuple[pd.DataFrame, None]:
    """Return Fig. 6: per start, |cos(δ, vᵢ)| after one step, and the share of ‖δ‖² in the top three directions."""
    network = trained_network(seed=seed, **training)
    values, vectors = descending(network.fisher())
    found, noise = cosines_of(network, vectors[:, :3], starts, rho, noise_scale, seed)
    table = pd.DataFrame({f"cos_v{i + 1}": found[:, i] for i in range(3)})
    table = table.assign(noise_cos_v1=noise[:, 0], top3=(found**2).sum(1), noise_top3=(noise**2).sum(1))
    return table.assign(start=range(starts), ratio_21=float(values[1] / values[0])), None


def cosines_of(
    network: Network, top: Tensor, starts: int, rho: float, noise_scale: float, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return |cos| (starts, 3) with the columns of ``top`` (P, 3), of Algorithm 1's δ and of its starts."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(starts):
        start = network.parameters.random(noise_scale, generator)
        delta = ascend(network.divergence.gradient, start, rho, 1)
        found.append(torch.stack([(vector @ top / vector.norm()).abs() for vector in (delta, start)]))
    both = torch.stack(found).numpy()
    return both[:, 0], both[:, 1]


def shortfalls(
    task: Task,
    *,
    per_class: int,
    spread: float,
    width: int,
    steps: int,
    every: int,
    lr: float,
    momentum: float,
    radii: Sequence[float],
    k_steps: Sequence[int],
    starts: int,
    ascents: int,
    ascent_steps: int,
    noise_scale: float,
    seed: int,
) -> tuple[pd.DataFrame, None]:
    """Return Fig. 7: per training step, ρ, K and start, (ρ²/2)λ_max(F), the best of long ascents, and Algorithm 1."""
    network = Network(Mixture.draw(per_class, spread, seed), width, seed)
    generator = torch.Generator().manual_seed(seed)
    tables = []
    for step in network.train(range(0, steps + 1, every), lr, momentum):
        values, vectors = descending(network.fisher())
        noises = [network.parameters.random(noise_scale, generator) for _ in range(starts)]
        needed = steps_needed(values)
        for rho in radii:
            found = climb(network, noises, rho, k_steps, vectors[:, 0])
            best = projected_ascent(network, ascents, ascent_steps, rho, generator)
            theory = rho**2 / 2 * float(values[0])
            for k, (reached, cosine) in found.items():
                table = pd.DataFrame({"start": range(starts), "algorithm_1": reached, "cosine": cosine})
                tables.append(
                    table.assign(step=step, rho=rho, k=k, theory=theory, ascent=best, k_needed=needed)
                )
        task.notify(f"step {step}/{steps}")
    whole = pd.concat(tables, ignore_index=True)
    whole["shortfall"] = 1 - whole.algorithm_1 / whole.ascent
    return whole.assign(error_theory=(whole.algorithm_1 / whole.theory - 1).abs()), None


def climb(
    network: Network, noises: Sequence[Tensor], rho: float, k_steps: Sequence[int], top: Tensor
) -> dict[int, tuple[np.ndarray, np.ndarray]]:
    """Algorithm 1 from every start: by K the mean KL reached (starts,) and \\|cos\\| of δ with ``top`` (P,)."""
    divergence = network.divergence
    found: dict[int, list[tuple[float, float]]] = {k: [] for k in k_steps}
    for delta in noises:
        for k in range(1, max(k_steps) + 1):
            delta = ascend(divergence.gradient, delta, rho, 1)
            if k in found:
                cosine = float((delta @ top).abs() / delta.norm())
                found[k].append((float(divergence.terms(delta).mean()), cosine))
    return {k: (np.array(ends)[:, 0], np.array(ends)[:, 1]) for k, ends in found.items()}


def projected_ascent(
    network: Network, count: int, steps: int, rho: float, generator: torch.Generator
) -> float:
    """Return the largest mean KL in the ball that ``count`` projected gradient ascents from random starts reach.

    Steps along the normalised gradient, of length ρ at first and decaying linearly to 0 (the paper's are lost).
    """
    x, parameters = network.mixture.x, network.parameters
    logits = network.logits(x)

    def divergence(delta: Tensor) -> Tensor:
        return kl_divergence(logits, parameters.logits(x, parameters.moved(delta))).mean()

    gradients = vmap(grad(divergence))
    delta = torch.stack([parameters.random(rho, generator) for _ in range(count)])
    for step in range(steps):
        slope = gradients(delta)
        delta = delta + rho * (1 - step / steps) * slope / slope.norm(dim=1, keepdim=True)
        delta = delta * (rho / delta.norm(dim=1, keepdim=True)).clamp(max=1)
    return float(vmap(divergence)(delta).max().detach())


def steps_needed(values: Tensor, accuracy: float = 0.01, share: float = 0.99) -> int:
    """Return the K after which a ``share`` of Gaussian starts falls short of λ₁ by at most ``accuracy``, relative.

    δ_K ∝ F^K δ₀ falls short by at most Σ_{i>1} λᵢ² aᵢ²/(λ₁² a₁²) · (λ₂/λ₁)^{2(K−1)}, a = the start's coefficients.
    """
    ratio = float(values[1] / values[0])
    rest = float((values[1:] / values[0]).square().sum())
    unlucky = float(stats.chi2.ppf(1 - share, 1))  # a₁² of the start that has least of v₁
    return 1 + max(0, math.ceil(math.log(rest / unlucky / accuracy) / (-2 * math.log(ratio))))


def residuals(
    task: Task,
    *,
    cases: Mapping[str, Mapping[str, Any]],
    per_class: int,
    width: int,
    steps: int,
    checkpoints: int,
    lr: float,
    momentum: float,
    seeds: int,
) -> tuple[pd.DataFrame, None]:
    """Return Theorem 4.1: per checkpoint, L_S, λ_max(F), λ_max(H) and ξ = ‖H − F‖₂, at steps in geometric progression.

    ``last`` is the seed's final L_S. F vanishes with the loss, too, so that only ξ/λ_max(F) says whether what F leaves
    out of H vanishes.
    """
    at = [0, *np.unique(np.geomspace(1, steps, checkpoints).round().astype(int)).tolist()]
    rows: list[dict[str, Any]] = []
    for case, shape in cases.items():
        for seed in range(seeds):
            network = Network(Mixture.draw(per_class, seed=seed, **shape), width, seed)
            for step in network.train(at, lr, momentum):
                fisher, hessian = network.fisher(), network.hessian()
                top_f, top_h = (float(torch.linalg.eigvalsh(matrix)[-1]) for matrix in (fisher, hessian))
                residual = float(torch.linalg.eigvalsh(hessian - fisher).abs().max())
                found = {"loss": network.loss, "error": network.error, "fisher": top_f, "hessian": top_h}
                rows.append({"case": case, "seed": seed, "step": step, **found, "residual": residual})
            task.notify(f"{case}, seed {seed}: cross-entropy {rows[-1]['loss']:.2g}")
    table = pd.DataFrame(rows)
    table["relative"] = table.residual / table.fisher
    table["difference"] = (table.hessian - table.fisher).abs() / table.fisher
    return table.assign(last=table.groupby(["case", "seed"]).loss.transform("last")), None


ROWS: Mapping[str, Callable[..., tuple[pd.DataFrame, Figure | None]]] = {
    "changed_classes": changed_classes,
    "cosines": cosines,
    "shortfalls": shortfalls,
    "residuals": residuals,
    "posteriors": posteriors.rows,
}
