"""SGD, SAM, ASAM, IAM-D and IAM-S at one budget of gradient evaluations: test error, S_ρ along training, and K.

    python benchmarks/methods.py --data CIFAR10 --out runs/methods              # resumes where it stopped
    python benchmarks/methods.py --data CIFAR10 --out runs/methods --table
    python benchmarks/methods.py --data CIFAR10 --out runs/methods --figures benchmarks/results

1. Tuning: each method's learning rate at its first ρ, then its other ρ (and β) at that rate, by the error on a tenth of
   the training part (`gm_probe.sweep.tuning`). The test part plays no role.
2. Each method's best point on the whole training part, several seeds. Epochs are chosen so that every method spends the
   same gradient evaluations (3 forward passes), within half an epoch of its own; 42 is shared evenly.
3. IAM-D with more ascent steps K, for as many epochs as with K = 1: so each costs more.
4. S_ρ of trained models against the K of Algorithm 1 that it is measured with.

Every run is a run folder below --out, as `gmprobe train` writes it. Tables and figures name what is unfinished; they
need the options that the runs were given.
"""

from __future__ import annotations

import math
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import click
import torch
from torch import nn

from gm_probe.cli.data import floats
from gm_probe.measures.context import Settings
from gm_probe.runs.records import CONFIG, RunRecord, read_metrics, read_run
from gm_probe.runtime.machine import keep_freed_memory
from gm_probe.sweep.recipe import MeasurePlan, Recipe, run_name
from gm_probe.sweep.runner import Outcome, run_recipe
from gm_probe.sweep.tuning import NOTHING, VALIDATION
from gm_probe.training.config import TrainConfig
from gm_probe.training.updates import make_rule

# fmt: off
POINTS: dict[str, tuple[dict[str, float], ...]] = {
    "sgd": ({},),
    "sam": ({"rho": 0.05}, {"rho": 0.15}),
    "asam": ({"rho": 0.5}, {"rho": 1.5}),
    "iam-d": ({"rho": 0.1, "beta": 1.0}, {"rho": 0.5, "beta": 1.0}, {"rho": 0.1, "beta": 10.0}),
    "iam-s": ({"rho": 0.1}, {"rho": 0.5}),
}
# fmt: on
LOOKS = 4  # at the test part along a run, evenly spaced, so that no method's minimum is over many more than another's
TRACKED = ("sgd", "iam-d")
MORE_STEPS = (2, 3, 5)
S_OF_K = (1, 2, 3, 5, 10)
TRACK_RHO = 0.1
S_PLAN = MeasurePlan(("local_inconsistency",), Settings(rho=TRACK_RHO, k_grid=S_OF_K), None, None)
NAMED = ("lr", "rho", "beta", "k_steps", "epochs")  # settings in a run's name, where not at their default
SHOWN = {"sgd": "SGD", "sam": "SAM", "asam": "ASAM", "iam-d": "IAM-D", "iam-s": "IAM-S"}


def evaluations_per_epoch(config: TrainConfig) -> float:
    """Gradient evaluations of the whole training part that one epoch spends."""
    return make_rule(config, nn.Linear(1, 1), torch.Generator()).passes / 3


def epochs_within(budget: float, config: TrainConfig) -> int:
    """Epochs whose gradient evaluations come nearest to ``budget`` epochs of SGD."""
    return max(1, round(budget / evaluations_per_epoch(config)))


@dataclass(frozen=True, slots=True)
class Run:
    """A planned run and what is on disk of it."""

    config: TrainConfig
    folder: Path

    @property
    def record(self) -> RunRecord | None:
        return read_run(self.folder) if (self.folder / CONFIG).exists() else None

    @property
    def status(self) -> str:
        return "not begun" if self.record is None else self.record.status

    @property
    def result(self) -> dict[str, Any] | None:
        """Its summary; None unless it is finished."""
        return self.record.summary if self.record is not None and self.status == "finished" else None

    @property
    def rows(self) -> list[dict[str, Any]]:
        """Of the epochs at which it was evaluated."""
        return [row for row in read_metrics(self.folder) if "test_error" in row]


@dataclass(frozen=True, slots=True)
class Study:
    """All runs; ``execute`` trains a recipe's incomplete ones into a folder.

    Attributes:
        base: what all runs share.
        validation: the same, on the training part alone.
        budget: in epochs of SGD on the whole training part.
        rates: learning rates to tune over.
    """

    base: TrainConfig
    validation: TrainConfig
    budget: float
    rates: Sequence[float]
    seeds: int
    out: Path
    execute: Callable[[Recipe, Path], object]

    def runs(self, configs: Iterable[TrainConfig], part: str, plan: MeasurePlan = NOTHING) -> list[Run]:
        """``configs`` as runs in the folder ``part``, done."""
        named = {}
        for config in configs:
            varied = config.identity()
            shown = {key: varied[key] for key in NAMED if key in varied}
            named[run_name(config, {"method": config.method, **shown, "seed": config.seed})] = config
        self.execute(Recipe(named, plan, ()), self.out / part)
        return [Run(config, self.out / part / name) for name, config in named.items()]

    def tuning(self, method: str) -> list[Run]:
        """Both rounds of a method's cells; the second waits for the first."""
        first, *others = POINTS[method]
        base = self.validation.replace(method=method)
        base = base.replace(epochs=epochs_within(self.budget, base))
        cells = self.runs((base.replace(**first, lr=rate) for rate in self.rates), "tune")
        best = least(cells)
        if best is None:
            return cells
        return cells + self.runs((base.replace(**p, lr=best.config.lr) for p in others), "tune")

    def best(self, cells: Sequence[Run]) -> TrainConfig | None:
        """The configuration, seed 0, that a method's cells choose; None until they are complete."""
        best = least(cells)
        if best is None:
            return None
        chosen = {key: getattr(best.config, key) for key in ("method", "lr", "rho", "beta", "epochs")}
        every = max(1, round(best.config.epochs / LOOKS))
        track = every if best.config.method in TRACKED else 0
        return self.base.replace(**chosen, eval_every=every, track_every=track, track_rho=TRACK_RHO)

    def final(self, chosen: Mapping[str, TrainConfig], seed: int, plan: MeasurePlan = NOTHING) -> list[Run]:
        """A method's tuned configuration each."""
        return self.runs((config.replace(seed=seed) for config in chosen.values()), "final", plan)

    def with_more_steps(self, one: TrainConfig, seed: int) -> list[Run]:
        """The tuned IAM-D with larger K, for as many epochs."""
        return self.runs((one.replace(k_steps=k, seed=seed, track_every=0) for k in MORE_STEPS), "k")


@dataclass(frozen=True, slots=True)
class Results:
    """Every run that there is to report, by what it is for."""

    tuning: dict[str, list[Run]]
    final: dict[str, list[Run]]
    by_steps: dict[int, list[Run]]
    measured: list[Run]

    @property
    def unfinished(self) -> Iterator[Run]:
        steps = [run for k, runs in self.by_steps.items() if k > 1 for run in runs]
        groups = (*self.tuning.values(), *self.final.values(), steps)
        yield from (run for runs in groups for run in runs if run.status not in {"finished", "diverged"})


def perform(study: Study) -> Results:
    """Do all runs, the most telling ones first, and say what there is."""
    tuning = {method: study.tuning(method) for method in POINTS}
    found = {method: study.best(cells) for method, cells in tuning.items()}
    chosen = {method: config for method, config in found.items() if config is not None}
    final: dict[str, list[Run]] = {method: [] for method in POINTS}
    by_steps: dict[int, list[Run]] = {k: [] for k in (1, *MORE_STEPS)}
    for seed in range(study.seeds):
        for run in study.final(chosen, seed):
            final[run.config.method].append(run)
    by_steps[1] = final["iam-d"]
    tracked = {method: chosen[method] for method in TRACKED if method in chosen}
    measured: list[Run] = []
    for seed in range(study.seeds) if "iam-d" in chosen else ():
        for run in study.with_more_steps(chosen["iam-d"], seed):
            by_steps[run.config.k_steps].append(run)
        if seed == 0:
            measured = study.final(tracked, 0, S_PLAN)
    return Results(tuning, final, by_steps, measured)


def least(cells: Sequence[Run]) -> Run | None:
    """The least validation error, the first of equal ones; None until all are done, or if none learned."""
    if any(cell.status not in {"finished", "diverged"} for cell in cells):
        return None
    known = [(cell.result["test_error"], index) for index, cell in enumerate(cells) if cell.result]
    return cells[min(known)[1]] if known else None


# ---- tables


def mean_and_error(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and its standard error, which one value has not."""
    spread = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
    return statistics.fmean(values), spread


def percent(values: Sequence[float]) -> str:
    mean, error = mean_and_error([100 * value for value in values])
    return f"{mean:.2f}" + ("" if error is None else f" ± {error:.2f}")


def small(values: Sequence[float]) -> str:
    mean, error = mean_and_error(values)
    return f"{mean:.3g}" + ("" if error is None else f" ± {error:.1g}")


def print_table(header: str, rows: Iterable[Sequence[object]]) -> None:
    names, rows = header.split("; "), list(rows)
    if not rows:
        print("Nothing is finished yet.")
        return
    print(f"| {' | '.join(names)} |\n|{'---|' * len(names)}")
    for row in rows:
        print(f"| {' | '.join(map(str, row))} |")


def point(config: TrainConfig) -> list[str]:
    """lr, ρ and β as cells of a table."""
    beta = f"{config.beta:g}" if config.method == "iam-d" else ""
    return [f"{config.lr:g}", "" if config.rho is None else f"{config.rho:g}", beta]


def finished(runs: Sequence[Run]) -> list[dict[str, Any]]:
    return [run.result for run in runs if run.result is not None]


def table(study: Study, results: Results) -> None:
    base = study.base
    print(
        f"`{base.model}` on {base.num_train:,} training, {base.num_unlabeled:,} unlabeled and {base.num_test:,} test "
        f"examples of `{Path(base.data).name}`; a budget of {study.budget:g} epochs of SGD; batch {base.batch_size}, "
        f"{base.schedule} schedule, momentum {base.momentum:g}, weight decay {base.weight_decay:g}, label smoothing "
        f"{base.label_smoothing:g}, augmentation {'on' if base.augment else 'off'}, float32. torch "
        f"{torch.__version__}, Python {platform.python_version()}, {os.cpu_count()} cores, one thread a run."
    )
    assert base.num_train is not None
    held_out = round(VALIDATION * base.num_train)
    print(f"\n## Tuning: error on {held_out:,} held-out training examples, one seed\n")
    print(f"Trained on {base.num_train - held_out:,}. Bold: chosen.\n")
    print_table("method; lr; ρ; β; epochs; validation error, %; state", _tuning_rows(results))
    print(f"\n## Test error at equal gradient evaluations, {study.seeds} seeds\n")
    print("± is the standard error over seeds; the test examples are the same. Δ: final error less SGD's.\n")
    print_table(
        "method; lr; ρ; β; epochs; gradient evaluations, in epochs; seeds; final test error, %; Δ to SGD; minimum over "
        "epochs, %; training error, %; seconds a run",
        _final_rows(results),
    )
    print("\n## IAM-D by ascent steps K, at equal epochs\n")
    print_table(
        "K; epochs; gradient evaluations, in epochs; seeds; final test error, %; minimum over epochs, %; seconds a run",
        _step_rows(results),
    )
    print(f"\n## Along training: test error and S_ρ (ρ = {TRACK_RHO:g}, K = 1, 10 starts)\n")
    print_table(
        "method; epoch; gradient evaluations, in epochs; seeds; test error, %; S_ρ", _along_rows(results)
    )
    print(f"\n## S_ρ of trained models by the K it is measured with (seed 0, ρ = {TRACK_RHO:g}, 10 starts)\n")
    print_table("; ".join(["method", *(f"K = {k}" for k in S_OF_K)]), _measured_rows(results))
    unfinished = list(results.unfinished)
    print(f"\n## Unfinished: {len(unfinished)}\n")
    for run in unfinished:
        print(f"- `{run.folder.parent.name}/{run.folder.name}`: {run.status}")
    waiting = [SHOWN[method] for method, runs in results.final.items() if not runs]
    if waiting:
        print(f"- Not planned yet, for tuning is unfinished: {', '.join(waiting)}")


def _tuning_rows(results: Results) -> Iterator[Sequence[object]]:
    for method, cells in results.tuning.items():
        best = least(cells)
        for cell in cells:
            error = "" if cell.result is None else percent([cell.result["test_error"]])
            error = f"**{error}**" if cell is best else error
            yield SHOWN[method], *point(cell.config), cell.config.epochs, error, cell.status


def _shared(runs: Sequence[Run]) -> tuple[int, str]:
    """Epochs and gradient evaluations in epochs."""
    config = runs[0].config
    return config.epochs, f"{config.epochs * evaluations_per_epoch(config):.2f}"


def _final_rows(results: Results) -> Iterator[Sequence[object]]:
    reference = [r["test_error"] for r in finished(results.final["sgd"])]
    for method, runs in results.final.items():
        done = finished(runs)
        if not done:
            continue
        errors = [r["test_error"] for r in done]
        yield (
            *(SHOWN[method], *point(runs[0].config), *_shared(runs), len(done), percent(errors)),
            "" if method == "sgd" or not reference else difference(errors, reference),
            percent([r["test_error_min"] for r in done]),
            percent([r["train_error"] for r in done]),
            f"{statistics.fmean(r['train_seconds'] for r in done):.0f}",
        )


def difference(errors: Sequence[float], reference: Sequence[float]) -> str:
    """Of two means, in points, with its standard error (unpaired)."""
    (one, spread), (other, spread_other) = mean_and_error(errors), mean_and_error(reference)
    text = f"{100 * (one - other):+.2f}"
    if spread is None or spread_other is None:
        return text
    return f"{text} ± {100 * math.hypot(spread, spread_other):.2f}"


def _step_rows(results: Results) -> Iterator[Sequence[object]]:
    for k, runs in results.by_steps.items():
        done = finished(runs)
        if done:
            seconds = f"{statistics.fmean(r['train_seconds'] for r in done):.0f}"
            final, least_ = ([r[key] for r in done] for key in ("test_error", "test_error_min"))
            yield k, *_shared(runs), len(done), percent(final), percent(least_), seconds


def along(runs: Sequence[Run], key: str) -> dict[int, list[float]]:
    """``key`` of the runs' rows by epoch, finished runs only."""
    values: dict[int, list[float]] = {}
    for run in runs:
        for row in run.rows if run.result is not None else ():
            if key in row:
                values.setdefault(row["epoch"], []).append(row[key])
    return values


def _along_rows(results: Results) -> Iterator[Sequence[object]]:
    for method in TRACKED:
        runs = results.final[method]
        errors, tracked = along(runs, "test_error"), along(runs, "local_inconsistency")
        for epoch, values in tracked.items():
            spent = f"{epoch * evaluations_per_epoch(runs[0].config):.2f}"
            yield SHOWN[method], epoch, spent, len(values), percent(errors[epoch]), small(values)


def s_of_k(run: Run) -> dict[int, list[float]]:
    """S_ρ from every start, by K; empty until it is measured."""
    row = {} if run.record is None else run.record.measures.get("local_inconsistency", {})
    return {cell["k_steps"]: cell["starts"] for cell in row.get("grid", ())}


def _measured_rows(results: Results) -> Iterator[Sequence[object]]:
    for run in results.measured:
        values = s_of_k(run)
        if values:
            yield SHOWN[run.config.method], *(small(values[k]) for k in S_OF_K)


# ---- command


def _execute(jobs: int, recipe: Recipe, folder: Path) -> None:
    def say(outcome: Outcome) -> None:
        if outcome.status != "skipped":
            reason = f": {outcome.reason}" if outcome.reason else ""
            print(f"{time.strftime('%T')} {folder.name}/{outcome.name} {outcome.status}{reason}", flush=True)

    run_recipe(recipe, folder, jobs=jobs, notify=say)


@click.command()
@click.option("--data", default="CIFAR10", show_default=True, help="As `gmprobe train` takes it.")
@click.option("--model", default="6cnn", show_default=True)
@click.option("--num-train", default=2000, show_default=True)
@click.option("--num-unlabeled", default=500, show_default=True)
@click.option("--num-test", default=5000, show_default=True)
@click.option("--budget", default=42.0, show_default=True, help="Gradient evaluations, in epochs of SGD.")
@click.option("--batch-size", default=32, show_default=True)
@click.option("--rates", default="0.01,0.02,0.05", show_default=True, help="Learning rates to tune over.")
@click.option("--seeds", default=3, show_default=True, help="Runs of the best points.")
@click.option("--jobs", default=1, show_default=True, help="Runs at a time, each of one thread.")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Folder of the runs.")
@click.option("--table", "as_table", is_flag=True, help="Train nothing; print what there is as Markdown.")
@click.option("--figures", type=click.Path(path_type=Path), help="Train nothing; draw what there is there.")
def main(
    budget: float,
    rates: str,
    seeds: int,
    jobs: int,
    out: Path,
    as_table: bool,
    figures: Path | None,
    **sizes: Any,
) -> None:
    base = TrainConfig.from_dict(
        {
            **sizes,
            "schedule": "cosine",
            "weight_decay": 5e-4,
            "label_smoothing": 0.1,
            "augment": True,
            "device": "cpu",
            "threads": 1,
        }
    )
    only_read = as_table or figures is not None
    out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    keep_freed_memory()
    validation = base.replace(validation=VALIDATION)
    execute = (lambda *_: None) if only_read else partial(_execute, jobs)
    study = Study(base, validation, budget, floats("--rates", rates), seeds, out, execute)
    results = perform(study)
    if as_table:
        table(study, results)
    if figures is not None:
        from methods_figures import draw  # beside this file

        draw(study, results, figures)
    if not only_read and any(True for _ in results.unfinished):
        sys.exit("some runs failed; the same command tries them again")


if __name__ == "__main__":
    main()
