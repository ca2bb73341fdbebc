"""Theorem 4.1's step from the Hessian to the Fisher matrix, along training to interpolation: does H − F vanish?

The paper ran no such check. All by dense matrices.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure

from gm_probe.analysis.intervals import mean_interval
from gm_probe.analysis.plots import legend_below
from gm_probe.analysis.typeset import Sheet, two_decimals
from gm_probe.reproduce.drawing import line, logarithmic, panels
from gm_probe.reproduce.finding import Finding, Outcome, Task, frame_sheet
from gm_probe.reproduce.gaussians import Mixture, Network

NEAR = 0.1
"""Cross-entropy below which training counts as near interpolation, in nats."""
TERMS = {
    "fisher": (r"$(\rho^2/2)\,\lambda_{\max}(F)$", "ρ²/2 λ_max(F)"),
    "hessian": (r"$(\rho^2/2)\,\lambda_{\max}(H)$", "ρ²/2 λ_max(H)"),
    "residual": (r"$(\rho^2/2)\,\xi$", "ρ²/2 ξ"),
}
"""The bound's terms, as the picture and as the table names them."""
Slopes = Mapping[tuple[Any, str], tuple[float, float, float] | None]
"""Mean, low and high by data set and quantity; None where it cannot be fitted."""


def study(
    task: Task,
    *,
    cases: Mapping[str, Mapping[str, Any]],
    per_class: int,
    width: int,
    steps: int,
    checkpoints: int,
    lr: float,
    momentum: float,
    rho: float,
    seeds: int,
) -> Finding:
    """L_S, λ_max(F), λ_max(H) and ξ = ‖H − F‖₂ at steps evenly spaced on a logarithmic scale.

    The test: the slope by log L_S of log ξ near interpolation, and of log ξ/λ_max(F) over the last tenfold fall of
    L_S, a slope a seed. ξ ∝ L_S^slope vanishes if it is positive; F vanishes, too, so that only the second slope says
    whether what F leaves out of H vanishes.
    """
    at = [0, *np.unique(np.geomspace(1, steps, checkpoints).round().astype(int)).tolist()]
    rows: list[dict[str, Any]] = []
    for case, shape in cases.items():
        for seed in range(seeds):
            network = Network(Mixture.draw(per_class, seed=seed, **shape), width, seed)
            rows += [
                {"case": case, "seed": seed, "step": step, **_spectra(network)}
                for step in network.train(at, lr, momentum)
            ]
            task.notify(f"{case}, seed {seed}: cross-entropy {rows[-1]['loss']:.2g}")
    table = pd.DataFrame(rows)
    slopes = {
        (case, key): slopes_of(mine, key)
        for case, mine in table.groupby("case", sort=False)
        for key in ("residual", "relative")
    }
    caption = (
        f"Each row is a data set. Left: the bound's terms along training, seed 0, ρ = {rho:g}. Middle: "
        "λ_max(F) and the spectral residual ξ against the training loss, every seed. Right: their ratio. "
        f"Grey: near interpolation, L_S < {NEAR:g}."
    )
    text = f"{_text(table, slopes)} P = {network.size}."
    return Finding(_outcome(slopes), text, rows, [_sheet(table, rho)], {"": _draw(table, rho)}, {"": caption})


def _spectra(network: Network) -> dict[str, float]:
    fisher, hessian = network.fisher(), network.hessian()
    top_f, top_h = (float(torch.linalg.eigvalsh(matrix)[-1]) for matrix in (fisher, hessian))
    residual = float(torch.linalg.eigvalsh(hessian - fisher).abs().max())
    return {
        "loss": network.loss,
        "error": network.error,
        "fisher": top_f,
        "hessian": top_h,
        "residual": residual,
        "relative": residual / top_f,
        "difference": abs(top_h - top_f) / top_f,
    }


def slopes_of(table: pd.DataFrame, key: str) -> tuple[float, float, float] | None:
    """Mean over seeds of the slope of log ``key`` by log loss, with its 99 % interval.

    Of the residual where the loss is below ``NEAR``, of its ratio to λ_max(F) where also below ten times the last one:
    it may fall at first and level off. None where a seed has fewer than three such checkpoints, or it is the only one.
    """
    found = []
    for _, mine in table.groupby("seed"):
        bound = min(NEAR, 10 * mine.loss.iloc[-1]) if key == "relative" else NEAR
        near = mine[mine.loss < bound]
        if len(near) < 3:
            return None
        found.append(np.polyfit(np.log(near.loss), np.log(near[key]), 1)[0])
    return mean_interval(np.array(found)) if len(found) > 1 else None


def _outcome(slopes: Slopes) -> Outcome:
    """Shows where both slopes are positive in every case, in part where the absolute one is."""
    known = {key: found for key, found in slopes.items() if found is not None}
    if len(known) < len(slopes):
        return "cannot be told"
    if all(low > 0 for _, low, _ in known.values()):
        return "shows"
    absolute = [found for (_, key), found in known.items() if key == "residual"]
    if all(low > 0 for _, low, _ in absolute):
        return "shows in part"
    return "does not show" if any(high < 0 for _, _, high in absolute) else "cannot be told"


def _text(table: pd.DataFrame, slopes: Slopes) -> str:
    said = [
        f"The test: exponents of ξ ∝ L_S^a where L_S < {NEAR:g}, and of ξ/λ_max(F) ∝ L_S^b over the last "
        "tenfold fall of L_S, one per seed. Both must be positive, because λ_max(F) itself vanishes with "
        "the loss."
    ]
    for case, mine in table.groupby("case", sort=False):
        end = mine[mine.step == mine.step.max()].median(numeric_only=True)
        fits = []
        for name, key in (("a", "residual"), ("b", "relative")):
            found = slopes[str(case), key]
            if found is not None:
                mean, low, high = map(two_decimals, found)
                fits.append(f"{name} = {mean} (99 % CI {low} to {high})")
        said.append(
            f"{str(case).capitalize()}: {' and '.join(fits) or 'too few checkpoints near interpolation'}. At the end "
            f"(L_S {end.loss:.2g}, training error {100 * end.error:.1f} %; medians) ξ = {end.residual:.2g} is "
            f"{100 * end.relative:.2g} % of λ_max(F) = {end.fisher:.2g}, and λ_max(H) differs from λ_max(F) by "
            f"{100 * end.difference:.2g} %."
        )
    shares = (table.hessian - table.fisher).abs() / table.residual
    said.append(
        f"Lemma A.2 holds in {(shares <= 1).sum():,} of {len(table):,} checkpoints: |λ_max(H) − λ_max(F)| is at most "
        f"{shares.max():.3f} ξ."
    )
    return " ".join(said)


def _sheet(table: pd.DataFrame, rho: float) -> Sheet:
    """Medians over seeds at some checkpoints."""
    some = np.linspace(0, table.step.nunique() - 1, 7).round().astype(int)
    steps = table.step.drop_duplicates().iloc[some]
    medians = table[table.step.isin(steps)].groupby(["case", "step"], sort=False).median(numeric_only=True)
    shown = pd.DataFrame({"L_S": medians.loss})
    for key, (_, name) in TERMS.items():
        shown[name] = rho**2 / 2 * medians[key]
    shown["ξ/λ_max(F)"] = medians.relative
    caption = f"Medians over seeds, ρ = {rho:g}; ξ = ‖H − F‖, the spectral norm"
    shown = shown.reset_index(names=["data", "step"])
    return frame_sheet("thm41", "The bound's terms along training", caption, shown, 2)


def _draw(table: pd.DataFrame, rho: float) -> Figure:
    cases = table.case.unique()
    figure, found = panels(3, 2.2, rows=len(cases), width=7.2, titles=[c for c in cases for _ in range(3)])
    for place, case in enumerate(cases):
        along, terms, ratio = found[3 * place : 3 * place + 3]
        mine = table[table.case == case]
        one = mine[mine.seed == 0]
        steps = one.step.clip(lower=0.7)
        along.plot(steps, one.loss, label="$L_S$", **line(3, linestyle=":"))
        for index, (key, (label, _)) in enumerate(TERMS.items()):
            along.plot(steps, rho**2 / 2 * one[key], label=label, **line(index, linewidth=1.1))
        terms.plot(mine.loss, mine.fisher, "o", markersize=1.8, color=line(0)["color"])
        terms.plot(mine.loss, mine.residual, "s", markersize=1.8, color=line(2)["color"])
        ratio.plot(mine.loss, mine.relative, "D", markersize=1.8, color="0.25")
        along.set(xlabel="training step (first: 0)", ylabel="nats")
        terms.set_ylabel(r"$\lambda_{\max}(F)$ (dots), $\xi$ (squares)")
        ratio.set_ylabel(r"$\xi\,/\,\lambda_{\max}(F)$")
        for axes in (terms, ratio):
            axes.set_xlabel("training cross-entropy $L_S$ (nats)")
            axes.axvspan(mine.loss.min() / 1.5, NEAR, color="0.92", zorder=0, linewidth=0)
            axes.set_xlim(1.5 * mine.loss.max(), mine.loss.min() / 1.5)
        for axes in (along, terms, ratio):
            logarithmic(axes)
    legend_below(figure, found[0].get_lines())
    return figure
