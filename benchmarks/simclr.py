"""SimCLR with and without IAM-D: probe error along training, as the paper's Fig. 4, at equal steps.

    python benchmarks/simclr.py --data CIFAR10 --out runs/simclr                # resumes where it stopped
    python benchmarks/simclr.py --data CIFAR10 --out runs/simclr --table
    python benchmarks/simclr.py --data CIFAR10 --out runs/simclr --figures benchmarks/results

1. Tuning: SGD's learning rate, then IAM-D's (ρ, β) at that rate, by the linear probe's error on a tenth of the training
   part, in a few epochs. The test part plays no role.
2. Both methods on the whole training part, several seeds, with a linear probe every few epochs and, rarer, S_ρ over
   NT-Xent logits. All runs do the same number of steps; a step of IAM-D costs three of SGD's.

Every run is a run folder below --out, as `gmprobe train` writes it. Tables and figures name what is unfinished; they
need the options that the runs were given.
"""

from __future__ import annotations

import os
import platform
import statistics
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import torch
from methods import Run, _execute, difference, mean_and_error, percent, print_table, small  # beside this file

from gm_probe.cli.data import floats
from gm_probe.core.devices import keep_freed_memory
from gm_probe.core.records import read_metrics
from gm_probe.sweep.recipe import Recipe, run_name
from gm_probe.sweep.tuning import NOTHING, VALIDATION
from gm_probe.training.config import TrainConfig

POINTS = ({"rho": 0.1, "beta": 1.0}, {"rho": 0.5, "beta": 1.0}, {"rho": 0.1, "beta": 10.0})
NAMED = ("lr", "rho", "beta")  # settings in a run's name, where not at their default
SHOWN = {"sgd": "SimCLR", "iam-d": "SimCLR + IAM-D"}
PROBES, TRACKS = 10, 3  # looks along a run


@dataclass(frozen=True, slots=True)
class Study:
    """All runs, those of seed 0 first; ``perform`` trains the incomplete ones, or only finds what there is."""

    base: TrainConfig
    tuning_epochs: int
    rates: Sequence[float]
    seeds: int
    out: Path
    only_read: bool

    def runs(self, configs: Iterable[TrainConfig], part: str) -> list[Run]:
        named = {}
        for config in configs:
            varied = config.identity()
            shown = {key: varied[key] for key in NAMED if key in varied}
            named[run_name(config, {"method": config.method, **shown, "seed": config.seed})] = config
        if not self.only_read:
            _execute(1, Recipe(named, NOTHING, ()), self.out / part)
        return [Run(config, self.out / part / name) for name, config in named.items()]

    def perform(self) -> tuple[list[Run], dict[str, list[Run]]]:
        """The tuning's cells, and the final runs by method."""
        short = self.base.replace(validation=VALIDATION, epochs=self.tuning_epochs)
        cells = self.runs((short.replace(lr=rate) for rate in self.rates), "tune")
        final: dict[str, list[Run]] = {method: [] for method in SHOWN}
        sgd = least(cells)
        if sgd is None:
            return cells, final
        others = self.runs((short.replace(lr=sgd.lr, method="iam-d", **point) for point in POINTS), "tune")
        chosen = [config for config in (sgd, least(others)) if config is not None]
        looks = {
            "probe_every": max(1, self.base.epochs // PROBES),
            "track_every": max(1, self.base.epochs // TRACKS),
        }
        for seed in range(self.seeds):
            for one in chosen:
                point = {key: getattr(one, key) for key in ("method", "lr", "rho", "beta")}
                final[one.method] += self.runs([self.base.replace(**point, **looks, seed=seed)], "final")
        return cells + others, final


def least(cells: Sequence[Run]) -> TrainConfig | None:
    """The configuration of least validation error, the first of equal ones; None until all are done."""
    if any(cell.status not in {"finished", "diverged"} for cell in cells):
        return None
    known = [(cell.result["probe_test_error"], index) for index, cell in enumerate(cells) if cell.result]
    return cells[min(known)[1]].config if known else None


def along(runs: Sequence[Run], key: str) -> dict[int, list[float]]:
    """``key`` of the finished runs' rows by epoch."""
    values: dict[int, list[float]] = {}
    for run in runs:
        for row in read_metrics(run.folder) if run.result is not None else ():
            if key in row:
                values.setdefault(row["epoch"], []).append(row[key])
    return values


def table(study: Study, cells: Sequence[Run], final: dict[str, list[Run]]) -> None:
    base = study.base
    assert base.num_train is not None
    steps = base.num_train // base.batch_size
    print(
        f"SimCLR of `{base.model}` on {base.num_train:,} training images of `{Path(base.data).name}` without their "
        f"labels; batch {base.batch_size}, temperature {base.temperature:g}, {base.epochs} epochs of {steps} steps, "
        f"momentum {base.momentum:g}, weight decay {base.weight_decay:g}, {base.schedule} schedule after "
        f"{base.warmup_epochs:g} epochs of warm-up. Linear probe: the same images with their labels, AdamW, 20 epochs; "
        f"tested on {base.num_test:,}. S_ρ over the NT-Xent logits of {base.num_unlabeled:,} other images, ρ = "
        f"{base.track_rho:g}, K = 1, 10 starts. torch {torch.__version__}, Python {platform.python_version()}, "
        f"{os.cpu_count()} cores, one thread."
    )
    print("\n## Tuning: probe error on held-out training images, one seed\n")
    print_table("method; lr; ρ; β; epochs; probe error, %; state", _tuning_rows(cells))
    print(f"\n## Probe error at equal steps, {study.seeds} seeds\n")
    print(
        "± is the standard error over seeds; the images are the same. Δ: final error less plain SimCLR's.\n"
    )
    print_table(
        "method; lr; ρ; β; seeds; final probe error, %; Δ; minimum over probes, %; probe's training error, %; NT-Xent; "
        "seconds a run",
        _final_rows(final),
    )
    print("\n## Along training\n")
    print_table("method; epoch; seeds; probe error, %; S_ρ", _along_rows(final))
    unfinished = [
        run for run in (*cells, *(run for runs in final.values() for run in runs)) if run.result is None
    ]
    print(f"\n## Unfinished: {len(unfinished)}\n")
    for run in unfinished:
        print(f"- `{run.folder.parent.name}/{run.folder.name}`: {run.status}")
    if not all(final.values()):
        print("- The final runs are not planned yet, for tuning is unfinished.")


def point(config: TrainConfig) -> list[str]:
    iam = config.method == "iam-d"
    return [f"{config.lr:g}", f"{config.rho:g}" if iam else "", f"{config.beta:g}" if iam else ""]


def _tuning_rows(cells: Sequence[Run]) -> Iterator[Sequence[object]]:
    for cell in cells:
        error = "" if cell.result is None else percent([cell.result["probe_test_error"]])
        yield SHOWN[cell.config.method], *point(cell.config), cell.config.epochs, error, cell.status


def _final_rows(final: dict[str, list[Run]]) -> Iterator[Sequence[object]]:
    results = {method: [run.result for run in runs if run.result] for method, runs in final.items()}
    for method, done in results.items():
        if not done:
            continue
        errors = [result["probe_test_error"] for result in done]
        reference = [result["probe_test_error"] for result in results["sgd"]]
        yield (
            *(SHOWN[method], *point(final[method][0].config), len(done), percent(errors)),
            difference(errors, reference) if method != "sgd" and reference else "",
            percent([result["probe_test_error_min"] for result in done]),
            percent([result["probe_train_error"] for result in done]),
            f"{mean_and_error([result['nt_xent'] for result in done])[0]:.3f}",
            f"{statistics.fmean(result['train_seconds'] for result in done):.0f}",
        )


def _along_rows(final: dict[str, list[Run]]) -> Iterator[Sequence[object]]:
    for method, runs in final.items():
        errors, tracked = along(runs, "probe_test_error"), along(runs, "local_inconsistency")
        for epoch in sorted({*errors, *tracked}):
            error = percent(errors[epoch]) if epoch in errors else ""
            count = len(errors.get(epoch, tracked.get(epoch, ())))
            yield SHOWN[method], epoch, count, error, small(tracked[epoch]) if epoch in tracked else ""


def draw(final: dict[str, list[Run]], folder: Path) -> None:
    """Probe error and S_ρ by epoch, means over seeds with their standard errors."""
    import matplotlib as mpl
    from methods_figures import _finish, _look, _panels, _spread

    from gm_probe.analysis.plots import STYLE, write_figure

    with mpl.rc_context(STYLE):
        figure, (errors, tracked) = _panels(2)
        for index, (method, runs) in enumerate(final.items()):
            for axes, key, scale in ((errors, "probe_test_error", 100), (tracked, "local_inconsistency", 1)):
                values = {epoch: [scale * v for v in found] for epoch, found in along(runs, key).items()}
                if values:
                    _spread(axes, values, label=SHOWN[method], **_look(index))
        tracked.set_yscale("log")
        _finish(errors, "epoch", "linear probe's test error, %")
        _finish(tracked, "epoch", r"$S_\rho$ over NT-Xent logits")
        write_figure(figure, [folder / "simclr.png"])


@click.command()
@click.option("--data", default="CIFAR10", show_default=True, help="As `gmprobe train` takes it.")
@click.option("--model", default="wrn-10-1", show_default=True)
@click.option("--num-train", default=4096, show_default=True)
@click.option("--num-unlabeled", default=512, show_default=True)
@click.option("--num-test", default=2000, show_default=True)
@click.option("--batch-size", default=128, show_default=True)
@click.option("--epochs", default=30, show_default=True)
@click.option("--tuning-epochs", default=8, show_default=True)
@click.option("--rates", default="0.01,0.03,0.1,0.3", show_default=True, help="Learning rates to tune over.")
@click.option("--seeds", default=3, show_default=True)
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Folder of the runs.")
@click.option("--table", "as_table", is_flag=True, help="Train nothing; print what there is as Markdown.")
@click.option("--figures", type=click.Path(path_type=Path), help="Train nothing; draw what there is there.")
def main(
    tuning_epochs: int,
    rates: str,
    seeds: int,
    out: Path,
    as_table: bool,
    figures: Path | None,
    **sizes: Any,
) -> None:
    fixed = {"schedule": "cosine", "warmup_epochs": 1.0, "weight_decay": 5e-4, "device": "cpu", "threads": 1}
    base = TrainConfig.from_dict({"objective": "simclr", **sizes, **fixed})
    out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    keep_freed_memory()
    only_read = as_table or figures is not None
    study = Study(base, tuning_epochs, floats("--rates", rates), seeds, out, only_read)
    cells, final = study.perform()
    if as_table:
        table(study, cells, final)
    if figures is not None:
        draw(final, figures)
    if not only_read and (
        not all(final.values()) or any(run.result is None for runs in final.values() for run in runs)
    ):
        sys.exit("some runs failed; the same command tries them again")


if __name__ == "__main__":
    main()
