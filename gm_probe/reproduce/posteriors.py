"""App. B over runs: does C_θ follow σ² tr F, S_ρ follow (ρ²/2)λ_max(F), and so C_θ follow S_ρ?

The paper derives this and runs no check. Two posteriors are tried: runs that share nothing but their data, and runs
from one common start, which differ in the order of their batches alone.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from gm_probe.analysis.correlation import kendall
from gm_probe.analysis.intervals import jackknife_interval
from gm_probe.analysis.typeset import Cell, Sheet, two_decimals
from gm_probe.core.batches import Batches
from gm_probe.core.errors import DivergedError
from gm_probe.core.parameters import Parameters
from gm_probe.core.records import read_run
from gm_probe.probe.kl import kl_divergence
from gm_probe.probe.pairwise import compare
from gm_probe.reproduce.drawing import line, logarithmic, panels
from gm_probe.reproduce.finding import Finding, Outcome, Task
from gm_probe.reproduce.training import trained
from gm_probe.sweep.measuring import open_subject
from gm_probe.sweep.recipe import Recipe, parse_recipe
from gm_probe.sweep.tuning import NOTHING
from gm_probe.training.config import TrainConfig
from gm_probe.training.leave import Leave
from gm_probe.training.parts import own_unlabeled

ARMS = {"own": "own start", "common": "common start"}
CLOSE = 0.25  # share by which an approximation may miss
CLOUD = 10  # pairs drawn from an isotropic Gaussian


def study(
    task: Task,
    *,
    base: Mapping[str, Any],
    grid: Mapping[str, Sequence[Any]],
    measure: Mapping[str, Any],
    start_epochs: int,
) -> Finding:
    """Every setting of ``grid`` with its seeds, from starts of their own and from one that ``start_epochs`` trained."""
    base = {**base, "threads": 1, **task.place}
    first = TrainConfig.from_dict({**base, **{key: values[0] for key, values in grid.items()}})
    start = first.replace(epochs=start_epochs, seed=10_000)
    trained(Recipe({"start": start}, NOTHING, ()), task.folder / "runs", task)
    rows: list[dict[str, Any]] = []
    lost: list[str] = []
    for arm in ARMS:
        given = {"init": str(task.folder / "runs" / "start")} if arm == "common" else {}
        recipe = parse_recipe({"base": {**base, **given}, "grid": grid, "measure": measure})
        folder = trained(recipe, task.folder / "runs" / arm, task)
        settings = _settings(recipe, folder)
        if not settings:
            raise DivergedError(f"of no setting did two runs end ({folder}); lower lr in the recipe's grid")
        left = len(recipe.runs) - sum(len(paths) for paths, _ in settings)
        if left:
            lost.append(f"{left} of {len(recipe.runs)} runs ({ARMS[arm]})")
        rows += [{"arm": arm, **_of_setting(paths, config)} for paths, config in settings]
        task.notify(f"{ARMS[arm]}: {len(rows)} settings done")
    taus = _taus(rows)
    num_parameters = rows[0]["parameters"]
    holds = _holds(rows, taus)
    return Finding(
        _outcome(holds.values()),
        _text(rows, taus, holds, num_parameters)
        + (f" Left out, diverged or alone in their setting: {'; '.join(lost)}." if lost else ""),
        rows,
        [_sheet(rows)],
        {"": _draw(rows, num_parameters)},
        {
            "": "A point a setting, means over its seeds. (a) C_θ of the runs against σ̂² tr F; hollow: C_θ of an "
            "isotropic Gaussian of the same variance about one run. (b) C_θ against S_ρ. (c) S_ρ against its quadratic "
            f"term, a colour a ρ. (d) tr F/λ_max(F) between its limits 1 and P = {num_parameters:,}. Lines in (a) and "
            "(c): equality."
        },
    )


def _settings(recipe: Recipe, folder: Path) -> list[tuple[list[Path], TrainConfig]]:
    """The run folders of each setting with two runs that ended, and its configuration at seed 0."""
    found: dict[str, tuple[list[Path], TrainConfig]] = {}
    for name, config in recipe.runs.items():
        if read_run(folder / name).status == "finished":
            one = config.replace(seed=0)
            found.setdefault(str(one.as_dict()), ([], one))[0].append(folder / name)
    return [(paths, config) for paths, config in found.values() if len(paths) > 1]


def _of_setting(paths: Sequence[Path], config: TrainConfig) -> dict[str, Any]:
    """C_θ, the variance of the parameters over seeds, and the means of what was measured of each run."""
    examples = own_unlabeled(paths[0], Leave.of(config)).in_memory()
    subjects = [open_subject(path, examples) for path in paths]
    models = [Parameters(subject.model.eval()) for subject in subjects]
    x = _inputs(subjects[0].batches)
    outputs = [model.logits(x).detach() for model in models]
    thetas = torch.stack([model.join(model.values().values()).double() for model in models])
    variance = float(thetas.var(0).mean())
    records = [read_run(path) for path in paths]

    def mean(name: str) -> float:
        return float(np.mean([record.measures[name]["value"] for record in records]))

    trace, top = mean("fisher_trace"), mean("fisher_lambda_max")
    found = compare(outputs, [0] * len(paths)).rows["conditional_inconsistency"].value
    grid: dict[float, list[float]] = {}
    for record in records:
        for cell in record.measures["local_inconsistency"]["grid"]:
            if cell["k_steps"] == record.settings["k_steps"]:
                grid.setdefault(cell["rho"], []).append(cell["value"])
    generator = torch.Generator().manual_seed(0)
    sigma = variance**0.5
    return {
        "lr": config.lr,
        "batch_size": config.batch_size,
        "weight_decay": config.weight_decay,
        "num_train": config.num_train,
        "seeds": len(paths),
        "parameters": models[0].size,
        "train_error": float(np.mean([record.result("train_error") for record in records])),
        "test_error": float(np.mean([record.result("test_error") for record in records])),
        "sigma": sigma,
        "inconsistency": found,
        "predicted": variance * trace,
        "cloud": _cloud(models[0], x, sigma, generator),
        "cloud_small": _cloud(models[0], x, sigma / 100, generator),
        "predicted_small": variance / 1e4 * records[0].measures["fisher_trace"]["value"],
        "trace": trace,
        "lambda_max": top,
        "rank": trace / top,
        "s_rho": mean("local_inconsistency"),
        "rho": records[0].settings["rho"],
        **{f"s_{rho:g}": float(np.mean(values)) for rho, values in grid.items()},
    }


def _inputs(batches: Batches) -> Tensor:
    return torch.cat([batch.x for batch in batches])


def _cloud(model: Parameters, x: Tensor, sigma: float, generator: torch.Generator) -> float:
    """Mean KL between ``CLOUD`` pairs of N(θ, σ²I): the paper's assumption, made true."""
    norm = sigma * model.size**0.5

    def one() -> Tensor:
        return model.logits(x, model.moved(model.random(norm, generator))).detach().double()

    return float(torch.stack([kl_divergence(one(), one()).mean() for _ in range(CLOUD)]).mean())


Tau = tuple[float | None, float | None, float | None]


def _taus(rows: Sequence[Mapping[str, Any]]) -> dict[tuple[str, str], Tau]:
    """C_θ with what it is said to follow, by arm."""
    return {
        (arm, key): _tau([row for row in rows if row["arm"] == arm], key, "inconsistency")
        for arm in ARMS
        for key in ("predicted", "s_rho")
    }


def _tau(rows: Sequence[Mapping[str, Any]], x: str, y: str) -> Tau:
    """Kendall's τ-b over settings with its 95 % jackknife interval."""
    one, other = (np.array([row[key] for row in rows]) for key in (x, y))
    tau = kendall(one, other).tau
    if tau is None:
        return None, None, None
    without = [kendall(np.delete(one, i), np.delete(other, i)).tau for i in range(len(rows))]
    low, high, _ = jackknife_interval(tau, np.array(without, dtype=float))
    return tau, low, high


def _ratios(rows: Sequence[Mapping[str, Any]], above: str, below: str) -> np.ndarray:
    return np.array([row[above] / row[below] for row in rows])


def _holds(rows: Sequence[Mapping[str, Any]], taus: Mapping[tuple[str, str], Tau]) -> dict[str, bool | None]:
    """Each part of the claim, in words, and whether it holds; None = cannot be told."""
    found: dict[str, bool | None] = {}
    for rho, ratio in _quadratic(rows).items():
        found[f"S_ρ ≈ (ρ²/2)λ_max(F) at ρ = {rho:g}"] = bool(np.all(np.abs(ratio - 1) < CLOSE))
    for arm, label in ARMS.items():
        factor = np.median(_ratios([row for row in rows if row["arm"] == arm], "inconsistency", "predicted"))
        ranked = _positive(taus[arm, "predicted"])
        found[f"C_θ ≈ σ̂² tr F ({label})"] = False if abs(np.log2(factor)) >= 1 else ranked
    for arm, label in ARMS.items():
        found[f"C_θ ∝ S_ρ in rank ({label})"] = _positive(taus[arm, "s_rho"])
    return found


def _positive(tau: Tau) -> bool | None:
    """Whether its interval lies above 0, or below; None where it holds 0, or there is none."""
    _, low, high = tau
    if low is not None and low > 0:
        return True
    return False if high is not None and high < 0 else None


def _quadratic(rows: Sequence[Mapping[str, Any]]) -> dict[float, np.ndarray]:
    """S_ρ over its quadratic term, a setting each, by ρ."""
    keys = [key for key in rows[0] if key.startswith("s_") and key != "s_rho"]
    radii = {float(key.removeprefix("s_")): key for key in keys}
    return {
        rho: np.array([row[key] / (rho**2 / 2 * row["lambda_max"]) for row in rows])
        for rho, key in sorted(radii.items())
    }


def _outcome(holds: Collection[bool | None]) -> Outcome:
    if all(holds):
        return "shows"
    if True in holds:
        return "shows in part"
    return "does not show" if False in holds else "cannot be told"


def _text(
    rows: Sequence[Mapping[str, Any]],
    taus: Mapping[tuple[str, str], Tau],
    holds: Mapping[str, bool | None],
    num_parameters: int,
) -> str:
    said = []
    for value, start in ((True, "What holds"), (False, "What does not"), (None, "What cannot be told")):
        parts = [part for part, held in holds.items() if held is value]
        if parts:
            said.append(f"{start}: {'; '.join(parts)}.")
    said.append(
        f"The tests: S_ρ is within {round(100 * CLOSE)} % of its quadratic term in every setting; C_θ rises with "
        "σ̂² tr F and is within a factor 2 of it in the median; C_θ rises with S_ρ. It rises where the 95 % jackknife "
        "interval of Kendall's τ over settings lies above 0 (σ̂²: the parameters' mean variance over seeds)."
    )
    for arm, label in ARMS.items():
        mine = [row for row in rows if row["arm"] == arm]
        factor = _ratios(mine, "inconsistency", "predicted")
        said.append(
            f"{label.capitalize()}, {len(mine)} settings: τ = {_said(taus[arm, 'predicted'])} with σ̂² tr F, "
            f"{_said(taus[arm, 's_rho'])} with S_ρ; C_θ is {np.median(factor):.2g} times σ̂² tr F in the median "
            f"({factor.min():.2g} to {factor.max():.2g}); an isotropic Gaussian of the same variance has "
            f"{np.median(_ratios(mine, 'cloud', 'predicted')):.2g} times, and of a hundredth of its width "
            f"{np.median(_ratios(mine, 'cloud_small', 'predicted_small')):.3g}."
        )
    quadratic = [
        f"{np.median(ratio):.2f} at ρ = {rho:g} ({ratio.min():.2f} to {ratio.max():.2f})"
        for rho, ratio in _quadratic(rows).items()
    ]
    rank = np.array([row["rank"] for row in rows])
    limits = ["1", f"P = {num_parameters:,}"]
    if np.median(rank) > num_parameters**0.5:  # on a logarithmic scale
        limits.reverse()
    said.append(
        f"S_ρ over (ρ²/2)λ_max(F) is {'; '.join(quadratic)}. tr F/λ_max(F) is {np.median(rank):.1f} in the median "
        f"({rank.min():.1f} to {rank.max():.1f}), nearer to its limit {' than to '.join(limits)}."
    )
    return " ".join(said)


def _said(tau: Tau) -> str:
    value, low, high = tau
    if value is None:
        return "undefined"
    if low is None or high is None:
        return two_decimals(value)
    return f"{two_decimals(value)} ({two_decimals(low)} to {two_decimals(high)})"


def _sheet(rows: Sequence[Mapping[str, Any]]) -> Sheet:
    keys = ("inconsistency", "predicted", "cloud", "s_rho", "trace", "lambda_max", "rank")
    body = [
        (
            Cell(ARMS[row["arm"]]),
            Cell(f"{row['num_train']:,}"),
            Cell(f"{row['lr']:g}"),
            Cell(str(row["batch_size"])),
            Cell(f"{row['weight_decay']:g}"),
            *(Cell(f"{row[key]:.3g}") for key in keys),
        )
        for row in rows
    ]
    return Sheet(
        "appb",
        "Inconsistency and local inconsistency by setting",
        f"Means over seeds; S_ρ at ρ = {rows[0]['rho']:g}; Gaussian: C_θ of N(θ, σ̂²I) about one run",
        (
            "start",
            "examples",
            "lr",
            "batch",
            "decay",
            "C_θ",
            "σ̂² tr F",
            "Gaussian",
            "S_ρ",
            "tr F",
            "λ_max(F)",
            "tr F/λ_max",
        ),
        tuple(body),
        5,
    )


def _draw(rows: Sequence[Mapping[str, Any]], num_parameters: int) -> Figure:
    figure, (a, b, c, d) = panels(2, 2.5, rows=2)
    for index, (arm, label) in enumerate(ARMS.items()):
        mine = [row for row in rows if row["arm"] == arm]
        colour, marker = line(index)["color"], "o^"[index]
        style: dict[str, Any] = {"linestyle": "none", "marker": marker, "markersize": 4, "color": colour}
        values = {
            key: [row[key] for row in mine]
            for key in ("inconsistency", "predicted", "cloud", "s_rho", "rank", "lambda_max")
        }
        a.plot(values["predicted"], values["inconsistency"], label=label, **style)
        a.plot(values["predicted"], values["cloud"], fillstyle="none", label=f"Gaussian, {label}", **style)
        b.plot(values["s_rho"], values["inconsistency"], label=label, **style)
        d.plot(values["lambda_max"], values["rank"], label=label, **style)
    for index, key in enumerate(key for key in rows[0] if key.startswith("s_") and key != "s_rho"):
        rho = float(key.removeprefix("s_"))
        x = [rho**2 / 2 * row["lambda_max"] for row in rows]
        look: dict[str, Any] = {"linestyle": "none", "marker": "sDv"[index % 3], "markersize": 3.5}
        c.plot(
            x, [row[key] for row in rows], color=line(index + 2)["color"], label=rf"$\rho$ = {rho:g}", **look
        )
    d.set_ylim(0.6, 2 * num_parameters)
    for axes, x_label, y_label in (
        (a, r"$\hat\sigma^2\,\mathrm{tr}\,F$ (nats)", r"$C_\theta$ (nats)"),
        (b, rf"$S_\rho$ (nats), $\rho$ = {rows[0]['rho']:g}", r"$C_\theta$ (nats)"),
        (c, r"$(\rho^2/2)\,\lambda_{\max}(F)$ (nats)", r"$S_\rho$ (nats)"),
        (d, r"$\lambda_{\max}(F)$", r"$\mathrm{tr}\,F\,/\,\lambda_{\max}(F)$"),
    ):
        logarithmic(axes)
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
    for axes in (a, c):
        _equality(axes)
    for limit, name in ((1, "1"), (num_parameters, "P")):
        d.axhline(limit, color="black", linewidth=0.7, linestyle="--")
        d.annotate(
            name,
            (1, limit),
            xycoords=("axes fraction", "data"),
            xytext=(2, 0),
            textcoords="offset points",
            va="center",
            fontsize=8,
        )
    for axes in (a, b, c, d):
        axes.legend(frameon=False, fontsize=7, handletextpad=0.2)
    return figure


def _equality(axes: Axes) -> None:
    low = min(axes.get_xlim()[0], axes.get_ylim()[0])
    high = max(axes.get_xlim()[1], axes.get_ylim()[1])
    limits = axes.get_xlim(), axes.get_ylim()
    axes.plot([low, high], [low, high], color="0.6", linewidth=0.8, zorder=0)
    axes.set_xlim(limits[0])
    axes.set_ylim(limits[1])
