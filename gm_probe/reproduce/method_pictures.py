"""How comparisons of training settings are drawn: each a function of the whole comparison.

Errors are final ones, or where ``least`` the least over epochs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from gm_probe.analysis.figures import DASHES
from gm_probe.analysis.heat_map import heat_map
from gm_probe.analysis.plots import COLOURS, MARKERS
from gm_probe.reproduce.comparison import Arm, Comparison, plain
from gm_probe.reproduce.drawing import PAGE, log_ticks, panels


def _look(index: int) -> dict[str, Any]:
    place = index % len(COLOURS)
    return {"color": COLOURS[place], "marker": MARKERS[index % len(MARKERS)], "markersize": 4}


def _errors(arm: Arm, least: bool) -> list[float]:
    values = arm.figures(f"{arm.error}_min") if least else arm.errors
    return [100 * value for value in values if value is not None]


def _which(least: bool) -> str:
    return "least" if least else "final"


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
    places = places[: len(found.data)]
    for axes, data in zip(places, found.data, strict=True):
        for index, label in enumerate(found.labels):
            errors = _errors(found.arm(data, label), least)
            if errors:
                spots = index - 0.15 + 0.1 * np.linspace(-1, 1, len(errors)) * (len(errors) > 1)
                axes.plot(spots, errors, linestyle="none", alpha=0.7, **_look(index))
                _spread(axes, {index + 0.2: errors}, color="black", marker="_", markersize=8)
        axes.set_xticks(
            range(len(found.labels)), found.labels, rotation=35, ha="right", rotation_mode="anchor"
        )
        axes.set_xlim(-0.6, len(found.labels) - 0.4)
    for axes in places[::columns]:
        axes.set_ylabel(f"{_which(least)} test error, %")
    return figure


def along(found: Comparison, least: bool) -> Figure:
    """S_ρ and test accuracy by epoch; of a SimCLR encoder its linear probe's, and NT-Xent."""
    simclr = found.arms[0].config.objective == "simclr"
    figure, places = panels(3 if simclr else 2, 2.4, width=8.4 if simclr else PAGE)
    left, right = places[:2]
    for index, arm in enumerate(found.arms):
        label = arm.label if len(found.data) == 1 else f"{arm.label}, {arm.data}"
        style = {"label": label, "linestyle": DASHES[index % 4], **_look(index), "markersize": 3}
        tracked, errors = arm.along("local_inconsistency"), arm.along(arm.error)
        _spread(left, tracked, **style)
        _spread(right, {epoch: [100 - 100 * value for value in of] for epoch, of in errors.items()}, **style)
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


def effort(found: Comparison, least: bool) -> Figure:
    """Accuracy by the gradient evaluations that were spent, a line a method."""
    figure, places = _panel_each(found, 2.6, 4.2)
    for axes, data in zip(places, found.data, strict=True):
        known = [arm for arm in found.of(data) if _errors(arm, least)]
        for index, method in enumerate(dict.fromkeys(arm.config.method for arm in known)):
            arms = [arm for arm in known if arm.config.method == method]
            spent = {
                float(np.mean([v for v in arm.figures("gradient_evaluations") if v])): arm for arm in arms
            }
            accuracy = {
                at: [100 - error for error in _errors(arm, least)] for at, arm in sorted(spent.items())
            }
            _spread(axes, accuracy, label=method.upper(), **_look(index))
        axes.set_xlabel("gradient evaluations (batches)")
        axes.legend(frameon=False, fontsize=7)
    places[0].set_ylabel(f"{'best' if least else 'final'} test accuracy, %")
    return figure


def _panel_each(found: Comparison, height: float, width: float) -> tuple[Figure, Sequence[Axes]]:
    """One a data set, side by side."""
    titles = found.data if len(found.data) > 1 else ()
    return panels(len(found.data), height, width=width * len(found.data), titles=titles)


SIDES = {"both": "both sides of the KL", "perturbed": "perturbed side alone"}


def steps(found: Comparison, least: bool) -> Figure:
    """By K of training: error, time of an epoch; and S_ρ of the trained models by the K that it is measured with.

    Of the one-sided gradient (``kl_grad``), where there are such arms, the first two are lines of their own.
    """
    titles = [name for name in found.data for _ in range(3)] if len(found.data) > 1 else ()
    figure, places = panels(3, 2.3, rows=len(found.data), width=8.4, titles=titles)
    for row, name in enumerate(found.data):
        _steps_of(found.of(name), places[3 * row : 3 * row + 3], least)
    return figure


def _steps_of(arms: Sequence[Arm], places: Sequence[Axes], least: bool) -> None:
    errors, times, measured = places
    one = min(arms[0].epoch_seconds, default=None)
    sides = list(dict.fromkeys(arm.config.kl_grad for arm in arms))
    for index, side in enumerate(sides):
        mine = [arm for arm in arms if arm.config.kl_grad == side and _errors(arm, least)]
        look = {"label": SIDES[side], "linestyle": DASHES[index], **_look(index)}
        _spread(errors, {arm.config.k_steps: _errors(arm, least) for arm in mine}, **look)
        if one is not None:
            _spread(times, {arm.config.k_steps: [s / one for s in arm.epoch_seconds] for arm in mine}, **look)
    if len(sides) > 1:
        errors.legend(frameon=False, fontsize=7)
    for index, arm in enumerate(arms):
        cells = [
            cell for r in arm.records for cell in r.measures.get("local_inconsistency", {}).get("grid", ())
        ]
        by_k: dict[float, list[float]] = {}
        for cell in cells:
            by_k.setdefault(cell["k_steps"], []).append(cell["value"])
        if by_k:
            _spread(measured, by_k, label=arm.label, **_look(index))
    if measured.lines:
        look = {"frameon": False, "fontsize": 7, "title": "trained with", "title_fontsize": 7}
        measured.legend(loc="upper left", bbox_to_anchor=(1, 1), **look)
    labels = (f"{_which(least)} test error, %", "time of an epoch, relative", r"$S_\rho$ (nats)")
    for axes, label in zip((errors, times, measured), labels, strict=True):
        axes.set_ylabel(label)
        axes.set_xlabel("K in training" if axes is not measured else r"K of measuring $S_\rho$")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def sub_batches(found: Comparison, least: bool) -> Figure:
    """Error by m, a line a method."""
    figure, places = _panel_each(found, 2.4, 3.4)
    for axes, data in zip(places, found.data, strict=True):
        arms = [arm for arm in found.of(data) if _errors(arm, least)]
        methods = list(dict.fromkeys(arm.config.method for arm in arms))
        for index, method in enumerate(methods):
            by_m = {_share(arm): _errors(arm, least) for arm in arms if arm.config.method == method}
            _spread(axes, dict(sorted(by_m.items())), label=method.upper(), **_look(index))
        axes.set_xscale("log", base=2)
        sizes = sorted({_share(arm) for arm in arms})
        axes.set_xticks(sizes, [str(size) for size in sizes])
        axes.set_xlabel("examples that share a perturbation, m")
        if len(methods) > 1:
            axes.legend(frameon=False, fontsize=7)
    places[0].set_ylabel(f"{_which(least)} test error, %")
    return figure


def _share(arm: Arm) -> int:
    return arm.config.m or arm.config.batch_size


def plane(found: Comparison, least: bool) -> Figure:
    """Error over (ρ, β), of one data set."""
    cells: list[dict[str, Any]] = []
    for arm in found.arms:
        errors = [value / 100 for value in _errors(arm, least)]
        whole = len(errors) == len(arm.runs)
        cells.append(
            {
                "rho": arm.config.rho,
                "beta": arm.config.beta,
                "error": float(np.mean(errors)) if whole else None,
                "stderr": _stderr(errors) if whole else None,
                "errors": errors,
                "diverged": len(arm.runs) - len(errors),
            }
        )
    known = [cell for cell in cells if cell["error"] is not None]
    best = min(known, key=lambda cell: cell["error"], default=cells[0])
    first = found.arms[0]
    method = f"{first.label.split()[0]} on {first.data}"
    return heat_map(cells, best, f"{method}, {first.config.model}, {len(first.runs)} seed(s) a point")


PICTURES: Mapping[str, tuple[Callable[[Comparison, bool], Figure], str]] = {
    "dots": (
        dots,
        "{Which} test errors: a mark a seed, none where it diverged; black: mean ± standard error.",
    ),
    "along": (
        along,
        "S_ρ and test accuracy, of a SimCLR encoder its linear probe's and NT-Xent too, along training; mean ± "
        "standard error over seeds.",
    ),
    "effort": (
        effort,
        "Test accuracy ({which} error) by gradient evaluations spent; mean ± standard error over seeds.",
    ),
    "steps": (
        steps,
        "IAM-D by its ascent steps K: {which} test error, time of each run's fastest epoch relative to that of the "
        "fastest run of K = 1, and S_ρ of the trained models by the K it is measured with; mean ± standard error over "
        "seeds.",
    ),
    "sub_batches": (
        sub_batches,
        "{Which} test error by the size m of sub-batches; mean ± standard error over seeds.",
    ),
    "plane": (plane, "Error on the part that is held out over ρ and β; outlined: the least."),
}
"""Each with its caption."""


def picture(name: str, found: Comparison, least: bool) -> tuple[dict[str, Figure], str]:
    """One of ``PICTURES`` by what is put after the row's name in the file's, and its caption.

    Of a plane there is one a data set, the first without a suffix; all others hold every data set.
    """
    draw, caption = PICTURES[name]
    which = _which(least)
    parts = {"": found}
    if name == "plane":
        parts = {
            plain(data) if place else "": Comparison(tuple(found.of(data)))
            for place, data in enumerate(found.data)
        }
    figures = {suffix: draw(part, least) for suffix, part in parts.items()}
    return figures, caption.format(which=which, Which=which.capitalize())
