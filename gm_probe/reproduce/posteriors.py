"""App. B over runs: C_θ, the parameters' variance over seeds, traces and S_ρ, for settings with several seeds each.

The paper derives that C_θ follows σ² tr F, and S_ρ follows (ρ²/2)λ_max(F), and runs no check. Two posteriors are tried:
runs that share nothing but their data, and runs from one common start, which differ in the order of their batches.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from gm_probe.errors import DivergedError
from gm_probe.inconsistency.kl import kl_divergence
from gm_probe.measures.pairwise import compare
from gm_probe.measuring.opening import open_checkpoint
from gm_probe.models.parameters import Parameters
from gm_probe.reproduce.finding import Task, train_runs
from gm_probe.runs.records import read_run
from gm_probe.sweep.recipe import Recipe, parse_recipe
from gm_probe.sweep.tuning import NOTHING
from gm_probe.training.config import TrainConfig
from gm_probe.training.permissions import Permissions
from gm_probe.training.run_splits import own_unlabeled

CLOUD = 10  # pairs drawn from an isotropic Gaussian


def rows(
    task: Task,
    *,
    base: Mapping[str, Any],
    grid: Mapping[str, Sequence[Any]],
    measure: Mapping[str, Any],
    start_epochs: int,
) -> tuple[pd.DataFrame, None]:
    """Return a row per setting of ``grid`` and start: each run's own, and one that ``start_epochs`` trained."""
    base = {**base, "threads": 1, **task.place}
    first = TrainConfig.from_dict({**base, **{key: values[0] for key, values in grid.items()}})
    start = first.replace(epochs=start_epochs, seed=10_000)
    train_runs(Recipe({"start": start}, NOTHING, ()), task.folder / "runs", task)
    found: list[dict[str, Any]] = []
    lost: list[str] = []
    for arm in ("own", "common"):
        given = {"init": str(task.folder / "runs" / "start")} if arm == "common" else {}
        recipe = parse_recipe({"base": {**base, **given}, "grid": grid, "measure": measure})
        folder = train_runs(recipe, task.folder / "runs" / arm, task)
        settings = _settings(recipe, folder)
        if not settings:
            raise DivergedError(f"no setting has two finished runs ({folder}). Lower lr in the recipe's grid")
        left = len(recipe.runs) - sum(len(paths) for paths, _ in settings)
        if left:
            lost.append(f"{left} of {len(recipe.runs)} runs ({arm} start)")
        found += [{"arm": arm, **_of_setting(paths, config)} for paths, config in settings]
        task.notify(f"{arm} start: {len(found)} settings done")
    table = pd.DataFrame(found)
    if lost:
        table.attrs["lost"] = (
            f" Left out, because they diverged or are alone in their setting: {'; '.join(lost)}."
        )
    return table, None


def _settings(recipe: Recipe, folder: Path) -> list[tuple[list[Path], TrainConfig]]:
    """Return the run folders of each setting with two finished runs, and its configuration at seed 0."""
    found: dict[str, tuple[list[Path], TrainConfig]] = {}
    for name, config in recipe.runs.items():
        if read_run(folder / name).status == "finished":
            one = config.replace(seed=0)
            found.setdefault(str(one.as_dict()), ([], one))[0].append(folder / name)
    return [(paths, config) for paths, config in found.values() if len(paths) > 1]


def _of_setting(paths: Sequence[Path], config: TrainConfig) -> dict[str, Any]:
    """Return C_θ, the variance of the parameters over seeds, and the means of what was measured of each run."""
    examples = own_unlabeled(paths[0], Permissions.of(config)).in_memory()
    loaded = [open_checkpoint(path, examples) for path in paths]
    models = [Parameters(each.model.eval()) for each in loaded]
    x = torch.cat([batch.x for batch in loaded[0].batches])
    outputs = [model.logits(x).detach() for model in models]
    thetas = torch.stack([model.join(model.values().values()).double() for model in models])
    variance = float(thetas.var(0).mean())
    records = [read_run(path) for path in paths]
    measured = pd.DataFrame(
        [{name: row["value"] for name, row in r.measures.items()} for r in records]
    ).mean()
    cells = pd.DataFrame([cell for r in records for cell in r.measures["local_inconsistency"]["grid"]])
    last = cells[cells.k_steps == records[0].settings["k_steps"]]
    trace, top = measured.fisher_trace, measured.fisher_lambda_max
    keys = ("lr", "batch_size", "weight_decay", "num_train")
    return {
        **{key: getattr(config, key) for key in keys},
        "seeds": len(paths),
        "parameters": models[0].size,
        **{key: float(np.mean([r.result(key) for r in records])) for key in ("train_error", "test_error")},
        "sigma": variance**0.5,
        "inconsistency": compare(outputs, [0] * len(paths)).rows["conditional_inconsistency"].value,
        "predicted": variance * trace,
        "cloud": _cloud(models[0], x, variance**0.5),
        "trace": trace,
        "lambda_max": top,
        "rank": trace / top,
        "s_rho": measured.local_inconsistency,
        "rho": records[0].settings["rho"],
        **{
            f"quadratic_{rho:g}": value / (rho**2 / 2 * top)
            for rho, value in last.groupby("rho").value.mean().items()
        },
    }


def _cloud(model: Parameters, x: Tensor, sigma: float) -> float:
    """Return the mean KL between ``CLOUD`` pairs of N(θ, σ²I), for which the paper's assumption is true."""
    generator = torch.Generator().manual_seed(0)
    norm = sigma * model.size**0.5

    def one() -> Tensor:
        return model.logits(x, model.moved(model.random(norm, generator))).detach().double()

    return float(torch.stack([kl_divergence(one(), one()).mean() for _ in range(CLOUD)]).mean())
