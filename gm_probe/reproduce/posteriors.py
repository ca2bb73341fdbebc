"""App. B over runs: does C_θ follow σ² tr F, S_ρ follow (ρ²/2)λ_max(F), and so C_θ follow S_ρ?

The paper derives this and runs no check. Two posteriors are tried: runs that share nothing but their data, and runs
from one common start, which differ in the order of their batches alone.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from torch import Tensor

from gm_probe.analysis.correlation import kendall
from gm_probe.analysis.intervals import jackknife_interval
from gm_probe.analysis.plots import COLOURS
from gm_probe.analysis.results import Quantity as Tau
from gm_probe.analysis.typeset import Sheet, plain_sheet, two_decimals
from gm_probe.core.errors import DivergedError
from gm_probe.core.parameters import Parameters
from gm_probe.core.records import read_run
from gm_probe.probe.kl import kl_divergence
from gm_probe.probe.pairwise import compare
from gm_probe.reproduce.drawing import logarithmic, panels
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
        {"": _draw(rows)},
        {
            "": "A point a setting, means over its seeds. (a) C_θ of the runs against σ̂² tr F; hollow: C_θ of an "
            "isotropic Gaussian of the same variance about one run. (b) C_θ against S_ρ. (c) S_ρ against its quadratic "
            "term, a colour a ρ. Lines in (a) and (c): equality."
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
    x = torch.cat([batch.x for batch in subjects[0].batches])
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
        "cloud": _cloud(models[0], x, sigma),
        "trace": trace,
        "lambda_max": top,
        "rank": trace / top,
        "s_rho": mean("local_inconsistency"),
        "rho": records[0].settings["rho"],
        **{f"s_{rho:g}": float(np.mean(values)) for rho, values in grid.items()},
    }


def _cloud(model: Parameters, x: Tensor, sigma: float) -> float:
    """Mean KL between ``CLOUD`` pairs of N(θ, σ²I): the paper's assumption, made true."""
    generator = torch.Generator().manual_seed(0)
    norm = sigma * model.size**0.5

    def one() -> Tensor:
        return model.logits(x, model.moved(model.random(norm, generator))).detach().double()

    return float(torch.stack([kl_divergence(one(), one()).mean() for _ in range(CLOUD)]).mean())


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
        return Tau(None)
    without = [kendall(np.delete(one, i), np.delete(other, i)).tau for i in range(len(rows))]
    low, high, _ = jackknife_interval(tau, np.array(without, dtype=float))
    return Tau(tau, low, high)


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
    if tau.low is not None and tau.low > 0:
        return True
    return False if tau.high is not None and tau.high < 0 else None


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
            f"{label.capitalize()}, {len(mine)} settings: τ = {_said(taus[arm, 'predicted'])} with σ̂² tr F and "
            f"{_said(taus[arm, 's_rho'])} with S_ρ. C_θ is {np.median(factor):.2g} times σ̂² tr F in the median "
            f"({factor.min():.2g} to {factor.max():.2g}); that of an isotropic Gaussian of the same variance is "
            f"{np.median(_ratios(mine, 'cloud', 'predicted')):.2g} times."
        )
    quadratic = [
        f"{np.median(ratio):.2f} at ρ = {rho:g} ({ratio.min():.2f} to {ratio.max():.2f})"
        for rho, ratio in _quadratic(rows).items()
    ]
    rank = np.array([row["rank"] for row in rows])
    said.append(
        f"S_ρ over (ρ²/2)λ_max(F) is {'; '.join(quadratic)}. tr F/λ_max(F), between 1 and P = {num_parameters:,}, is "
        f"{np.median(rank):.1f} in the median ({rank.min():.1f} to {rank.max():.1f})."
    )
    return " ".join(said)


def _said(tau: Tau) -> str:
    if tau.value is None:
        return "undefined"
    if tau.low is None or tau.high is None:
        return two_decimals(tau.value)
    return f"{two_decimals(tau.value)} ({two_decimals(tau.low)} to {two_decimals(tau.high)})"


def _sheet(rows: Sequence[Mapping[str, Any]]) -> Sheet:
    settings = {"num_train": "examples", "lr": "lr", "batch_size": "batch", "weight_decay": "decay"}
    values = {
        "inconsistency": "C_θ",
        "predicted": "σ̂² tr F",
        "cloud": "Gaussian",
        "s_rho": "S_ρ",
        "trace": "tr F",
        "lambda_max": "λ_max(F)",
        "rank": "tr F/λ_max",
    }
    body = [
        (ARMS[row["arm"]], *(f"{row[k]:g}" for k in settings), *(f"{row[k]:.3g}" for k in values))
        for row in rows
    ]
    return plain_sheet(
        "appb",
        "Inconsistency and local inconsistency by setting",
        f"Means over seeds; S_ρ at ρ = {rows[0]['rho']:g}; Gaussian: C_θ of N(θ, σ̂²I) about one run",
        ("start", *settings.values(), *values.values()),
        body,
        5,
    )


def _draw(rows: Sequence[Mapping[str, Any]]) -> Figure:
    figure, (a, b, c) = panels(3, 2.5, width=8.4)
    for index, (arm, label) in enumerate(ARMS.items()):
        mine = pd.DataFrame([row for row in rows if row["arm"] == arm])
        style: dict[str, Any] = {
            "linestyle": "none",
            "marker": "o^"[index],
            "markersize": 4,
            "color": COLOURS[index],
        }
        a.plot(mine.predicted, mine.inconsistency, label=label, **style)
        a.plot(mine.predicted, mine.cloud, fillstyle="none", label=f"Gaussian, {label}", **style)
        b.plot(mine.s_rho, mine.inconsistency, label=label, **style)
    for index, (rho, ratio) in enumerate(_quadratic(rows).items()):
        x = np.array([rho**2 / 2 * row["lambda_max"] for row in rows])
        c.plot(
            x,
            ratio * x,
            "sDv"[index % 3],
            markersize=3.5,
            color=COLOURS[index + 2],
            label=rf"$\rho$ = {rho:g}",
        )
    a.set(xlabel=r"$\hat\sigma^2\,\mathrm{tr}\,F$ (nats)", ylabel=r"$C_\theta$ (nats)")
    b.set(xlabel=rf"$S_\rho$ (nats), $\rho$ = {rows[0]['rho']:g}", ylabel=r"$C_\theta$ (nats)")
    c.set(xlabel=r"$(\rho^2/2)\,\lambda_{\max}(F)$ (nats)", ylabel=r"$S_\rho$ (nats)")
    for axes in (a, b, c):
        logarithmic(axes)
        axes.legend(frameon=False, fontsize=7, handletextpad=0.2)
    for axes in (a, c):  # equality
        axes.axline((1e-3, 1e-3), (1, 1), color="0.6", linewidth=0.8, zorder=0)
    return figure
