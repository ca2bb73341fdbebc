"""How comparisons of training settings are drawn: each a function of the whole comparison.

Errors are final ones, or where ``least`` the least over epochs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from gm_probe.analysis.heat_map import heat_map
from gm_probe.analysis.plots import MARKERS, log_ticks
from gm_probe.errors import UsageError
from gm_probe.reproduce.comparison import Arm, Comparison, plain
from gm_probe.reproduce.drawing import PAGE, line, panels

X = {
    "k_steps": "ascent steps K in training",
    "m": "examples that share a perturbation, m",
    "gradient_evaluations": "gradient evaluations (batches)",
}
"""What errors can be drawn against."""


def picture(name: str, found: Comparison, least: bool, x: str = "") -> tuple[dict[str, Figure], str]:
    """Figures by what is put after the row's name in the file's, and their caption.

    Args:
        name: ``dots``, ``along``, ``by`` or ``plane``.
        x: of ``by``: one of ``X``.
    """
    which = "least" if least else "final"
    spread = "mean ± standard error over seeds"
    if name == "dots":
        return {
            "": dots(found, least)
        }, f"The {which} test errors: a mark a seed, none where it diverged; black: " + spread + "."
    if name == "along":
        return {"": along(found)}, (
            "S_ρ and test accuracy, of a SimCLR encoder its linear probe's and NT-Xent too, along training; "
            f"{spread}."
        )
    if name == "by":
        more = ", and S_ρ of the trained models by the K it is measured with" if x == "k_steps" else ""
        return {"": by(found, least, x)}, f"The {which} test error by {X[x]}{more}; {spread}."
    if name == "plane":
        planes = {
            plain(data) if place else "": plane(found.of(data), least)
            for place, data in enumerate(found.data)
        }
        return planes, "Held-out error over ρ and β; the outline marks the smallest."
    raise UsageError(f"no picture {name!r}; there are: dots, along, by, plane")


def _look(index: int) -> dict[str, Any]:
    return line(index, marker=MARKERS[index % len(MARKERS)], markersize=4)


def _errors(arm: Arm, least: bool) -> list[float]:
    values = arm.figures(f"{arm.error}_min") if least else arm.errors
    return [100 * value for value in values if value is not None]


def _spread(axes: Axes, values: Mapping[Any, Sequence[float]], **look: Any) -> None:
    """Means over seeds with their standard errors, at the numbers that ``values`` are keyed by."""
    means = [float(np.mean(found)) for found in values.values()]
    errors = [_stderr(found) or 0.0 for found in values.values()]
    axes.errorbar(list(values), means, errors, capsize=2, linewidth=1, **look)


def _stderr(values: Sequence[float]) -> float | None:
    return float(np.std(values, ddof=1) / len(values) ** 0.5) if len(values) > 1 else None


def dots(found: Comparison, least: bool) -> Figure:
    """Errors: a mark a seed, beside them mean and standard error."""
    # what does not fit side by side goes below: labels of less than a fifth of an inch each would overlap
    needed = 0.8 + 0.55 * len(found.labels) * len(found.data)
    rows = min(len(found.data), math.ceil(needed / (2 * PAGE)))
    columns = math.ceil(len(found.data) / rows)
    titles = found.data if len(found.data) > 1 else ()
    figure, places = panels(columns, 2.3, rows=rows, width=min(PAGE, needed), titles=titles)
    for axes in places[len(found.data) :]:
        axes.remove()
    for axes, data in zip(places, found.data, strict=False):
        for index, label in enumerate(found.labels):
            errors = _errors(found.arm(data, label), least)
            if errors:
                spots = index - 0.15 + 0.1 * np.linspace(-1, 1, len(errors)) * (len(errors) > 1)
                axes.plot(spots, errors, alpha=0.7, **_look(index) | {"linestyle": "none"})
                _spread(axes, {index + 0.2: errors}, color="black", marker="_", markersize=8)
        at = range(len(found.labels))
        axes.set_xticks(at, found.labels, rotation=35, ha="right", rotation_mode="anchor")
        axes.set_xlim(-0.6, len(found.labels) - 0.4)
    for axes in places[: len(found.data) : columns]:
        axes.set_ylabel(f"{'least' if least else 'final'} test error, %")
    return figure


def along(found: Comparison) -> Figure:
    """S_ρ and test accuracy by epoch; of a SimCLR encoder its linear probe's, and NT-Xent."""
    simclr = found.arms[0].config.trains_encoder
    figure, places = panels(3 if simclr else 2, 2.4, width=8.4 if simclr else PAGE)
    left, right = places[:2]
    for index, arm in enumerate(found.arms):
        label = arm.label if len(found.data) == 1 else f"{arm.label}, {arm.data}"
        style = _look(index) | {"label": label, "markersize": 3}
        _spread(left, arm.along("local_inconsistency"), **style)
        accuracy = {epoch: [100 - 100 * e for e in of] for epoch, of in arm.along(arm.error).items()}
        _spread(right, accuracy, **style)
        if simclr:
            _spread(places[2], arm.along("running_nt_xent"), **style | {"marker": ""})
            places[2].set_ylabel("NT-Xent of training (nats)")
    left.set_yscale("log")
    log_ticks(left.yaxis)
    left.set_ylabel(rf"$S_\rho$ {'over NT-Xent logits' if simclr else 'on unlabeled data'} (nats)")
    right.set_ylabel("linear probe's test accuracy, %" if simclr else "test accuracy, %")
    for axes in places:
        axes.set_xlabel("epoch")
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axes.legend(frameon=False, fontsize=7)
    return figure


def by(found: Comparison, least: bool, x: str) -> Figure:
    """Error against ``x``, a line a method and side of the KL; by K also S_ρ against the K of its measurement."""
    each = 2 if x == "k_steps" else 1
    titles = [data for data in found.data for _ in range(each)] if len(found.data) > 1 else ()
    figure, places = panels(each, 2.4, rows=len(found.data), width=PAGE * (1 + each) / 3, titles=titles)
    for axes, data in zip(places[::each], found.data, strict=True):
        lines: dict[tuple[str, ...], dict[float, list[float]]] = {}
        for arm in found.of(data):
            one_sided = ("one-sided",) if arm.config.kl_grad == "perturbed" else ()
            if errors := _errors(arm, least):
                lines.setdefault((arm.config.method.upper(), *one_sided), {})[_place(arm, x)] = errors
        for index, (key, points) in enumerate(lines.items()):
            _spread(axes, dict(sorted(points.items())), label=", ".join(key), **_look(index))
        axes.set_xlabel(X[x])
        axes.set_ylabel(f"{'least' if least else 'final'} test error, %")
        axes.legend(frameon=False, fontsize=7)
    for axes, data in zip(places[1::each] if each > 1 else (), found.data, strict=each > 1):
        for index, arm in enumerate(found.of(data)):
            _spread(axes, arm.measured_by_k, label=arm.label, **_look(index))
        axes.set_xlabel(r"K of measuring $S_\rho$")
        axes.set_ylabel(r"$S_\rho$ (nats)")
        axes.legend(frameon=False, fontsize=7, title="trained with", title_fontsize=7)
    return figure


def _place(arm: Arm, x: str) -> float:
    if x == "m":
        return arm.config.m or arm.config.batch_size
    if x == "k_steps":
        return arm.config.k_steps
    return float(np.mean([value for value in arm.figures(x) if value]))


def plane(arms: Sequence[Arm], least: bool) -> Figure:
    """Error over (ρ, β), of one data set."""
    cells: list[dict[str, Any]] = []
    for arm in arms:
        errors = [value / 100 for value in _errors(arm, least)]
        whole = len(errors) == len(arm.runs)
        cells.append(
            {
                "rho": arm.config.rho,
                "beta": arm.config.beta,
                "error": float(np.mean(errors)) if whole else None,
                "stderr": _stderr(errors) if whole else None,
            }
        )
    known = [cell for cell in cells if cell["error"] is not None]
    best = min(known, key=lambda cell: cell["error"], default=cells[0])
    first = arms[0]
    method = f"{first.label.split()[0]} on {first.data}"
    return heat_map(cells, best, f"{method}, {first.config.model}, {len(first.runs)} seed(s) per point")
