"""Theorem 4.1's step from the Hessian to the Fisher matrix, along training to interpolation: does H − F vanish?

The paper ran no such check. All by dense matrices.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure

from gm_probe.analysis.intervals import mean_interval
from gm_probe.analysis.typeset import Cell, Sheet, two_decimals
from gm_probe.reproduce.drawing import line, logarithmic, panels
from gm_probe.reproduce.finding import Finding, Outcome, Task
from gm_probe.reproduce.gaussians import Mixture, Network

NEAR = 0.1
"""Cross-entropy below which training counts as near interpolation, in nats."""


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
    slopes = {
        (case, key): _slopes([row for row in rows if row["case"] == case], key, seeds)
        for case in cases
        for key in ("residual", "relative")
    }
    return Finding(
        _outcome(slopes, list(cases)),
        _text(rows, slopes, list(cases), network.size),
        rows,
        [_sheet(rows, list(cases), rho)],
        {"": _draw(rows, list(cases), rho)},
        {
            "": f"A row a data set. Left: the bound's terms along training, seed 0, ρ = {rho:g}. Middle: λ_max(F) and "
            "the spectral residual ξ against the training loss, every seed. Right: their ratio. Grey: near "
            f"interpolation, L_S < {NEAR:g}."
        },
    )


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


def _slopes(rows: Sequence[Mapping[str, Any]], key: str, seeds: int) -> tuple[float, float, float] | None:
    """Mean over seeds of the slope of log ``key`` by log loss, with its 99 % interval.

    Of the residual where the loss is below ``NEAR``, of its ratio to λ_max(F) where also below ten times the last one:
    it may fall at first and level off. None where a seed has fewer than three such checkpoints, or it is the only one.
    """
    found = []
    for seed in range(seeds):
        mine = [row for row in rows if row["seed"] == seed]
        bound = min(NEAR, 10 * mine[-1]["loss"]) if key == "relative" else NEAR
        near = [(row["loss"], row[key]) for row in mine if row["loss"] < bound]
        if len(near) < 3:
            return None
        x, y = np.log(np.array(near)).T
        found.append(np.polyfit(x, y, 1)[0])
    return mean_interval(np.array(found)) if seeds > 1 else None


Slopes = Mapping[tuple[str, str], tuple[float, float, float] | None]


def _outcome(slopes: Slopes, cases: Sequence[str]) -> Outcome:
    """Shows where both slopes are positive in every case, in part where the absolute one is."""
    if any(found is None for found in slopes.values()):
        return "cannot be told"
    positive = {key: found is not None and found[1] > 0 for key, found in slopes.items()}
    if all(positive.values()):
        return "shows"
    if all(positive[case, "residual"] for case in cases):
        return "shows in part"
    negative = [found is not None and found[2] < 0 for (_, key), found in slopes.items() if key == "residual"]
    return "does not show" if any(negative) else "cannot be told"


def _text(rows: Sequence[Mapping[str, Any]], slopes: Slopes, cases: Sequence[str], size: int) -> str:
    said = [
        f"The test: exponents of ξ ∝ L_S^a where L_S < {NEAR:g}, and of ξ/λ_max(F) ∝ L_S^b over the last tenfold fall "
        "of L_S, one a seed; both must be positive, for λ_max(F) itself vanishes with the loss."
    ]
    for case in cases:
        mine = [row for row in rows if row["case"] == case]
        last = max(row["step"] for row in mine)
        ends = [row for row in mine if row["step"] == last]

        def median(key: str, ends: Sequence[Mapping[str, Any]] = ends) -> float:
            return float(np.median([row[key] for row in ends]))

        fits = []
        for name, key in (("a", "residual"), ("b", "relative")):
            found = slopes[case, key]
            if found is not None:
                mean, low, high = map(two_decimals, found)
                fits.append(f"{name} = {mean} (99 % {low} to {high})")
        said.append(
            f"{case.capitalize()}: {' and '.join(fits) or 'too few checkpoints so near'}; at the end "
            f"(L_S {median('loss'):.2g}, training error {100 * median('error'):.1f} %; medians) "
            f"ξ = {median('residual'):.2g} is {100 * median('relative'):.2g} % of λ_max(F) = {median('fisher'):.2g}, "
            f"and λ_max(H) differs from λ_max(F) by {100 * median('difference'):.2g} %."
        )
    shares = [abs(row["hessian"] - row["fisher"]) / row["residual"] for row in rows]
    worst, within = max(shares), sum(share <= 1 for share in shares)
    held = f"all {len(rows):,}" if within == len(rows) else f"{within:,} of {len(rows):,}"
    said.append(
        f"Lemma A.2 holds in {held} checkpoints: |λ_max(H) − λ_max(F)| is at most {worst:.3f} ξ. P = {size}."
    )
    return " ".join(said)


def _sheet(rows: Sequence[Mapping[str, Any]], cases: Sequence[str], rho: float) -> Sheet:
    """Medians over seeds at some checkpoints."""
    body = []
    for case in cases:
        steps = sorted({row["step"] for row in rows if row["case"] == case})
        for step in sorted({steps[round(i)] for i in np.linspace(0, len(steps) - 1, 7)}):
            mine = [row for row in rows if row["case"] == case and row["step"] == step]
            loss, fisher, hessian, residual, relative = (
                float(np.median([row[key] for row in mine]))
                for key in ("loss", "fisher", "hessian", "residual", "relative")
            )
            terms = (loss, rho**2 / 2 * fisher, rho**2 / 2 * hessian, rho**2 / 2 * residual, relative)
            body.append((Cell(case), Cell(f"{step:,}"), *(Cell(f"{value:.3g}") for value in terms)))
    return Sheet(
        "thm41",
        "The bound's terms along training",
        f"Medians over seeds, ρ = {rho:g}; ξ = ‖H − F‖, the spectral norm",
        ("data", "step", "L_S", "ρ²/2 λ_max(F)", "ρ²/2 λ_max(H)", "ρ²/2 ξ", "ξ/λ_max(F)"),
        tuple(body),
        2,
    )


def _draw(rows: Sequence[Mapping[str, Any]], cases: Sequence[str], rho: float) -> Figure:
    titles = [f"{case}{what}" for case in cases for what in ("", "", "")]
    figure, found = panels(3, 2.2, rows=len(cases), width=7.2, titles=titles)
    scale = rho**2 / 2
    for place, case in enumerate(cases):
        along, terms, ratio = found[3 * place : 3 * place + 3]
        mine = [row for row in rows if row["case"] == case]
        one = [row for row in mine if row["seed"] == 0]
        steps = [max(row["step"], 0.7) for row in one]
        along.plot(steps, [row["loss"] for row in one], label="$L_S$", **line(3, linestyle=":"))
        for index, (key, label) in enumerate(NAMES.items()):
            along.plot(steps, [scale * row[key] for row in one], label=label, **line(index, linewidth=1.1))
        x = np.array([row["loss"] for row in mine])
        for index, key in ((0, "fisher"), (2, "residual")):
            y = [row[key] for row in mine]
            terms.plot(x, y, "o" if index == 0 else "s", markersize=1.8, color=line(index)["color"])
        ratio.plot(x, [row["relative"] for row in mine], "D", markersize=1.8, color="0.25")
        along.set_xlabel("training step (first: 0)")
        along.set_ylabel("nats")
        terms.set_ylabel(r"$\lambda_{\max}(F)$ (dots), $\xi$ (squares)")
        ratio.set_ylabel(r"$\xi\,/\,\lambda_{\max}(F)$")
        for axes in (terms, ratio):
            axes.set_xlabel("training cross-entropy $L_S$ (nats)")
            axes.axvspan(x.min() / 1.5, NEAR, color="0.92", zorder=0, linewidth=0)
            axes.set_xlim(1.5 * x.max(), x.min() / 1.5)
        for axes in (along, terms, ratio):
            logarithmic(axes)
    handles, labels = found[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False, fontsize=8)
    return figure


NAMES = {
    "fisher": r"$(\rho^2/2)\,\lambda_{\max}(F)$",
    "hessian": r"$(\rho^2/2)\,\lambda_{\max}(H)$",
    "residual": r"$(\rho^2/2)\,\xi$",
}
