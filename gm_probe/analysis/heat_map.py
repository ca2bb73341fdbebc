"""Validation error over (ρ, β), like the paper's Fig. 13: a heat map of a grid, a scatter of sampled points.

Drawn from the JSON objects of ``gm_probe.sweep.tuning.Cell.as_dict``.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from gm_probe.analysis.plots import STYLE, ink, log_ticks, new_figure

COLOURS = "cividis"  # even in lightness, and the same to colour-blind readers
BEST = "#D55E00"
LABEL = "validation error (%)"


@mpl.rc_context(STYLE)
def heat_map(cells: Sequence[Mapping[str, Any]], best: Mapping[str, Any], title: str) -> Figure:
    """Draw a grid with ρ across and β upward, the mean and its standard error in every cell, the best outlined.

    Args:
        cells: one for each pair of a ρ and a β; β is None throughout where the method has none.
    """
    rhos = sorted({cell["rho"] for cell in cells})
    betas = sorted({cell["beta"] for cell in cells}, key=lambda beta: beta or 0.0)
    errors = np.full((len(betas), len(rhos)), np.nan)
    for cell in cells:
        errors[betas.index(cell["beta"]), rhos.index(cell["rho"])] = _percent(cell["error"])
    size = (1.6 + 0.75 * max(3, len(rhos)), 1.0 + 0.5 * max(1, len(betas)))
    figure, axes = _figure(size, title)
    colours = mpl.colormaps[COLOURS].with_extremes(bad="0.85")
    image = axes.imshow(errors, origin="lower", aspect="auto", cmap=colours, norm=_norm(errors))
    axes.set_xticks(range(len(rhos)), [f"{rho:g}" for rho in rhos])
    axes.set_yticks(range(len(betas)), ["" if beta is None else f"{beta:g}" for beta in betas])
    axes.set_ylabel("" if betas == [None] else r"$\beta$")
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    for cell in cells:
        row, column = betas.index(cell["beta"]), rhos.index(cell["rho"])
        colour = "black" if cell["error"] is None else ink(tuple(image.to_rgba(errors[row, column])))
        axes.text(column, row, _text(cell), ha="center", va="center", color=colour, fontsize=7)
    corner = (rhos.index(best["rho"]) - 0.5, betas.index(best["beta"]) - 0.5)
    axes.add_patch(Rectangle(corner, 1, 1, fill=False, edgecolor=BEST, linewidth=2, clip_on=False))
    figure.colorbar(image, ax=axes, label=LABEL)
    return figure


@mpl.rc_context(STYLE)
def trial_map(cells: Sequence[Mapping[str, Any]], best: Mapping[str, Any], title: str) -> Figure:
    """Draw sampled points: the error against ρ, or by colour over (ρ, β) where both were tuned; the best has a ring."""
    figure, axes = _figure((4.2, 3.0), title)
    axes.set_xscale("log")
    known = [cell for cell in cells if cell["error"] is not None]
    lost = [cell for cell in cells if cell["error"] is None]
    rho, error = [cell["rho"] for cell in known], [_percent(cell["error"]) for cell in known]
    if best["beta"] is None:
        spread = [100 * (cell["stderr"] or 0.0) for cell in known]
        axes.errorbar(rho, error, yerr=spread, fmt="o", markersize=4, linewidth=0.8, color="#0072B2")
        axes.set_ylabel(LABEL)
        height = _percent(best["error"])
        for cell in lost:
            axes.axvline(cell["rho"], color="0.6", linestyle=":", linewidth=0.8)
    else:
        axes.set_yscale("log")
        axes.set_ylabel(r"$\beta$")
        beta = [cell["beta"] for cell in known]
        points = axes.scatter(rho, beta, c=error, cmap=COLOURS, norm=_norm(np.array(error)), s=28)
        figure.colorbar(points, ax=axes, label=LABEL)
        axes.scatter([c["rho"] for c in lost], [c["beta"] for c in lost], c="0.4", marker="x", s=20)
        height = best["beta"]
    axes.plot(best["rho"], height, "o", markersize=10, fillstyle="none", color=BEST, markeredgewidth=1.5)
    log_ticks(axes.xaxis)
    if best["beta"] is not None:
        log_ticks(axes.yaxis)
    return figure


def _figure(size: tuple[float, float], title: str) -> tuple[Figure, Axes]:
    figure = new_figure(*size)
    axes = figure.add_subplot()
    axes.set_title(title.replace("$", r"\$"), loc="left")
    axes.set_xlabel(r"$\rho$")
    return figure, axes


def _norm(errors: np.ndarray) -> Normalize:
    """Return a scale from the least to the largest known error, at least 0.1 % wide so that noise has no contrast."""
    low, high = float(np.nanmin(errors)), float(np.nanmax(errors))
    return Normalize(low, max(high, low + 0.1))


def _percent(error: float | None) -> float:
    return float("nan") if error is None else 100 * error


def _text(cell: Mapping[str, Any]) -> str:
    if cell["error"] is None:
        return "diverged"
    spread = "" if cell["stderr"] is None else f"\n± {100 * cell['stderr']:.2f}"
    return f"{100 * cell['error']:.2f}{spread}"
