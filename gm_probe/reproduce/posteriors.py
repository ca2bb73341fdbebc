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

from gm_probe.analysis.coefficients import kendall
from gm_probe.analysis.intervals import Quantity
from gm_probe.analysis.plots import COLOURS
from gm_probe.analysis.typeset import Sheet
from gm_probe.errors import DivergedError
from gm_probe.inconsistency.kl import kl_divergence
from gm_probe.measures.pairwise import compare
from gm_probe.measuring.checkpoint import open_checkpoint
from gm_probe.models.parameters import Parameters
from gm_probe.reproduce.drawing import logarithmic, panels
from gm_probe.reproduce.finding import Finding, Outcome, Task, frame_sheet, shown_tau
from gm_probe.reproduce.training import trained
from gm_probe.runs.records import read_run
from gm_probe.sweep.recipe import Recipe, parse_recipe
from gm_probe.sweep.tuning import NOTHING
from gm_probe.training.config import TrainConfig
from gm_probe.training.leave import Leave
from gm_probe.training.run_splits import own_unlabeled

ARMS = {"own": "own start", "common": "common start"}
CLOSE = 0.25  # share by which an approximation may miss
CLOUD = 10  # pairs drawn from an isotropic Gaussian
Taus = Mapping[tuple[Any, str], Quantity]
"""τ of C_θ by arm and what it is taken with."""


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
            raise DivergedError(f"no setting has two finished runs ({folder}). Lower lr in the recipe's grid")
        left = len(recipe.runs) - sum(len(paths) for paths, _ in settings)
        if left:
            lost.append(f"{left} of {len(recipe.runs)} runs ({ARMS[arm]})")
        rows += [{"arm": arm, **_of_setting(paths, config)} for paths, config in settings]
        task.notify(f"{ARMS[arm]}: {len(rows)} settings done")
    table = pd.DataFrame(rows)
    taus = taus_of(table)
    holds = held(table, taus)
    text = text_of(table, taus, holds)
    if lost:
        text += f" Left out, because they diverged or are alone in their setting: {'; '.join(lost)}."
    caption = (
        "Each point is a setting, with means over its seeds. (a) C_θ of the runs against σ̂² tr F; "
        "hollow: C_θ of an isotropic Gaussian of the same variance about one run. (b) C_θ against S_ρ. "
        "(c) S_ρ against its quadratic term, one colour per ρ. Lines in (a) and (c): equality."
    )
    return Finding(outcome_of(holds.values()), text, rows, [_sheet(table)], {"": _draw(table)}, {"": caption})


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
    loaded = [open_checkpoint(path, examples) for path in paths]
    models = [Parameters(each.model.eval()) for each in loaded]
    x = torch.cat([batch.x for batch in loaded[0].batches])
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


def taus_of(table: pd.DataFrame) -> Taus:
    """C_θ with what it is said to follow, by arm."""
    return {
        (arm, key): kendall(mine[key].to_numpy(float), mine.inconsistency.to_numpy(float))
        for arm, mine in table.groupby("arm", sort=False)
        for key in ("predicted", "s_rho")
    }


def held(table: pd.DataFrame, taus: Taus) -> dict[str, bool | None]:
    """Each part of the claim, in words, and whether it holds; None = cannot be told."""
    found: dict[str, bool | None] = {}
    for rho, ratio in _quadratic(table).items():
        found[f"S_ρ ≈ (ρ²/2)λ_max(F) at ρ = {rho:g}"] = bool((abs(ratio - 1) < CLOSE).all())
    factor = (table.inconsistency / table.predicted).groupby(table.arm).median()
    for arm, label in ARMS.items():
        ranked = _positive(taus[arm, "predicted"])
        found[f"C_θ ≈ σ̂² tr F ({label})"] = False if abs(np.log2(factor[arm])) >= 1 else ranked
    for arm, label in ARMS.items():
        found[f"C_θ ∝ S_ρ in rank ({label})"] = _positive(taus[arm, "s_rho"])
    return found


def _positive(tau: Quantity) -> bool | None:
    """Whether its interval lies above 0, or below; None where it holds 0, or there is none."""
    return None if not tau.clear else (tau.value or 0) > 0


def _quadratic(table: pd.DataFrame) -> dict[float, pd.Series]:
    """S_ρ over its quadratic term, a setting each, by ρ."""
    radii = {float(key[2:]): key for key in map(str, table) if key.startswith("s_") and key != "s_rho"}
    return {rho: table[key] / (rho**2 / 2 * table.lambda_max) for rho, key in sorted(radii.items())}


def outcome_of(holds: Collection[bool | None]) -> Outcome:
    """Of the whole claim, by its parts."""
    if all(holds):
        return "shows"
    if True in holds:
        return "shows in part"
    return "does not show" if False in holds else "cannot be told"


def text_of(table: pd.DataFrame, taus: Taus, holds: Mapping[str, bool | None]) -> str:
    """What holds, by which tests, and the numbers behind it."""
    said = []
    for value, start in ((True, "What holds"), (False, "What does not"), (None, "What cannot be told")):
        parts = [part for part, answer in holds.items() if answer is value]
        if parts:
            said.append(f"{start}: {'; '.join(parts)}.")
    said.append(
        f"The tests: S_ρ is within {round(100 * CLOSE)} % of its quadratic term in every setting; C_θ rises with "
        "σ̂² tr F and is within a factor 2 of it in the median; C_θ rises with S_ρ. It rises where the 95 % jackknife "
        "interval of Kendall's τ over settings lies above 0 (σ̂²: the parameters' mean variance over seeds)."
    )
    for arm, mine in table.groupby("arm", sort=False):
        factor, cloud = mine.inconsistency / mine.predicted, mine.cloud / mine.predicted
        tau, with_s = (shown_tau(taus[arm, key]) for key in ("predicted", "s_rho"))
        said.append(
            f"{ARMS[str(arm)].capitalize()}, {len(mine)} settings: τ = {tau} with σ̂² tr F and {with_s} with S_ρ. C_θ "
            f"is {factor.median():.2g} times σ̂² tr F in the median ({factor.min():.2g} to {factor.max():.2g}); that of "
            f"an isotropic Gaussian of the same variance is {cloud.median():.2g} times."
        )
    quadratic = [
        f"{ratio.median():.2f} at ρ = {rho:g} ({ratio.min():.2f} to {ratio.max():.2f})"
        for rho, ratio in _quadratic(table).items()
    ]
    said.append(
        f"S_ρ over (ρ²/2)λ_max(F) is {'; '.join(quadratic)}. tr F/λ_max(F), between 1 and P = {table.parameters[0]:,}, "
        f"is {table['rank'].median():.1f} in the median ({table['rank'].min():.1f} to {table['rank'].max():.1f})."
    )
    return " ".join(said)


def _sheet(table: pd.DataFrame) -> Sheet:
    columns = {
        "arm": "start",
        "num_train": "examples",
        "lr": "lr",
        "batch_size": "batch",
        "weight_decay": "decay",
        "inconsistency": "C_θ",
        "predicted": "σ̂² tr F",
        "cloud": "Gaussian",
        "s_rho": "S_ρ",
        "trace": "tr F",
        "lambda_max": "λ_max(F)",
        "rank": "tr F/λ_max",
    }
    caption = f"Means over seeds; S_ρ at ρ = {table.rho[0]:g}; Gaussian: C_θ of N(θ, σ̂²I) about one run"
    shown = table[[*columns]].rename(columns=columns)
    return frame_sheet("appb", "Inconsistency and local inconsistency by setting", caption, shown, 5)


def _draw(table: pd.DataFrame) -> Figure:
    figure, (a, b, c) = panels(3, 2.5, width=8.4)
    for index, (arm, mine) in enumerate(table.groupby("arm", sort=False)):
        label = ARMS[str(arm)]
        style: dict[str, Any] = {"marker": "o^"[index], "linestyle": "none", "color": COLOURS[index]}
        a.plot(mine.predicted, mine.inconsistency, label=label, **style)
        a.plot(mine.predicted, mine.cloud, fillstyle="none", label=f"Gaussian, {label}", **style)
        b.plot(mine.s_rho, mine.inconsistency, label=label, **style)
    for index, (rho, ratio) in enumerate(_quadratic(table).items()):
        term = rho**2 / 2 * table.lambda_max
        c.plot(term, ratio * term, "sDv"[index % 3], color=COLOURS[index + 2], label=rf"$\rho$ = {rho:g}")
    a.set(xlabel=r"$\hat\sigma^2\,\mathrm{tr}\,F$ (nats)", ylabel=r"$C_\theta$ (nats)")
    b.set(xlabel=rf"$S_\rho$ (nats), $\rho$ = {table.rho[0]:g}", ylabel=r"$C_\theta$ (nats)")
    c.set(xlabel=r"$(\rho^2/2)\,\lambda_{\max}(F)$ (nats)", ylabel=r"$S_\rho$ (nats)")
    for axes in (a, b, c):
        logarithmic(axes)
        axes.legend(frameon=False, fontsize=7, handletextpad=0.2)
    for axes in (a, c):  # equality
        axes.axline((1e-3, 1e-3), (1, 1), color="0.6", linewidth=0.8, zorder=0)
    return figure
