"""Tables and curves that compare training settings: variants × data sets × seeds, each a run as a sweep does it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
import pandas as pd

from gm_probe.analysis.typeset import UNDEFINED, Sheet, plain_sheet
from gm_probe.errors import UsageError, did_you_mean
from gm_probe.measures.settings import Settings
from gm_probe.reproduce.claims import outcome_of_tests
from gm_probe.reproduce.comparison import SHOWN, Arm, Comparison, Difference, text_of
from gm_probe.reproduce.drawing import WORDS, draw
from gm_probe.reproduce.finding import Finding, Task, train_runs
from gm_probe.sweep.recipe import MeasurePlan, Recipe, run_name
from gm_probe.sweep.tuning import NOTHING, VALIDATION
from gm_probe.training.config import TrainConfig

Table = Mapping[str, Any]


def study(
    task: Task,
    *,
    base: Table,
    variants: Sequence[Table],
    data: Sequence[Table],
    seeds: int,
    tests: Sequence[Table],
    picture: str,
    beside: Sequence[Table] = (),
    untested: str = "",
    measure: Table | None = None,
    split_by_seed: bool = False,
    tuning: Table | None = None,
) -> Finding:
    """Train every variant on every data set with every seed, tune what has several points first, and compare.

    Args:
        base: settings of training that all share.
        variants: ``label``, settings that differ and, where it is tuned, ``points``: a list of more settings, of which
            those of the least error on a part of the training part are taken, a tenth unless ``tuning`` has another
            ``validation`` share. ``lr_of`` names a variant before it whose learning rate, once tuned, it takes. A
            ``grid`` makes one variant per point.
        data: ``label``, settings of its own, and by a variant's label what the paper ``published`` and settings for it
            ``of``; ``seeds``, where it has not as many as the others.
        tests, beside: what the claim says (``comparison.Difference``); further differences, which decide nothing.
        untested, picture: what the claim says that no test covers; what errors are drawn by, a key of ``PICTURES``.
        measure: settings of S_ρ, taken of every run at its end.
        split_by_seed: each seed also draws its own split and labels, the same ones for all variants, so that intervals
            over seeds are over these too; else all runs share those of ``split_seed``. Tuning is on seed 0's.
        tuning: settings that runs of tuning differ by, such as fewer ``epochs``.
    """
    data = _chosen(task, base, data)
    variants = [each for variant in variants for each in _expanded(variant)]
    # runs of tuning are judged at their end, on held-out training examples
    held_out = {"validation": VALIDATION, "eval_every": 0, "track_every": 0, **(tuning or {})}
    arms: list[Arm] = []
    tried: list[Sequence[str]] = []
    for place in data:
        chosen, rows = _configurations(task, base, variants, place, held_out)
        tried += rows
        arms += _arms(task, place, chosen, place.get("seeds", seeds), split_by_seed, _plan(measure))
    found = Comparison(tuple(arms))
    results, others = (
        [Difference(found, name, one, len(found.data) * len(of)) for name in found.data for one in of]
        for of in (tests, beside)
    )
    least = any(str(test.get("key", "")).endswith("_min") for test in tests)
    tables, error = found.tables(), found.arms[0].error
    reference = tests[0]["worse"] if tests else arms[0].label
    return Finding(
        # a smoke's runs have hardly begun to learn; they only try the code
        "cannot be told" if task.scale == "smoke" else outcome_of_tests([result.sign for result in results]),
        text_of(results, others, untested, split_by_seed),
        _csv(tables["table"], error),
        [sheet(task.name, found, reference), *_tuning_sheet(task.name, tried, held_out)],
        draw(tables, list(_panels(picture, tables, error, least)), 2),
        f"{PICTURES[picture].caption}; mean ± standard error over seeds.",
        untested,
    )


def _chosen(task: Task, base: Table, data: Sequence[Table]) -> list[Table]:
    """Return the data sets that the task takes.

    Raises:
        UsageError: ``--only`` names none of them, or ``--data`` cannot replace all of them.
    """
    labels = [place["label"] for place in data]
    if task.only is not None and task.only not in labels:
        raise UsageError(f"--only {task.only!r} is none of its data sets; {did_you_mean(task.only, labels)}")
    chosen = [place for place in data if task.only in {None, place["label"]}]
    names = list(dict.fromkeys(each.get("data", base.get("data", "")) for each in chosen))
    if task.data is not None and len(names) > 1:
        raise UsageError(
            f"{task.name} takes several data sets ({', '.join(names)}), and --data cannot replace all "
            f"of them. Choose one by --only, such as --only '{labels[0]}'"
        )
    return chosen


def _configurations(
    task: Task, base: Table, variants: Sequence[Table], place: Table, held_out: Table
) -> tuple[dict[str, TrainConfig], list[Sequence[str]]]:
    """Return each variant's configuration on one data set, and the rows of the table of tuning."""
    shared = {**base, **_without(place, "label", "published", "of", "seeds"), **task.place}
    chosen: dict[str, TrainConfig] = {}
    tried: list[Sequence[str]] = []
    for variant in variants:
        rate = {"lr": chosen[variant["lr_of"]].lr} if "lr_of" in variant else {}
        chosen[variant["label"]], rows = _tuned(task, {**shared, **rate}, variant, place, held_out)
        tried += rows
    return chosen, tried


def _csv(table: pd.DataFrame, error: str) -> pd.DataFrame:
    """Return a row per run."""
    errors = (error, f"{error}_min", error.replace("test", "train"))
    spent = ("train_seconds", "gradient_evaluations")
    return table.reindex(
        columns=["data", "variant", *SHOWN, "status", *errors, *spent, "local_inconsistency"]
    )


@dataclass(frozen=True, slots=True)
class ErrorPicture:
    """How errors are drawn: ``caption``, and for each table (``drawing.draw``) a panel for each y with its label.

    ``{error}`` stands for the column of the error, ``{which}`` for final or least. Panels without values are left out.
    """

    caption: str
    by: str
    panels: Mapping[str, Mapping[str, str]]


ERROR = {"table": {"100 * {error}": "{which} test error, %"}}
PICTURES = {
    "variant": ErrorPicture("The test error by variant", "data", ERROR),
    "epoch": ErrorPicture(
        "S_ρ and the test error, of a SimCLR encoder its linear probe's and NT-Xent too, along training",
        "variant",
        {
            "epochs": {
                "100 * {at_epoch}": "test error, %",
                "local_inconsistency": "S_ρ (nats)",
                "running_nt_xent": "NT-Xent (nats)",
            }
        },
    ),
    "k_steps": ErrorPicture(
        "The test error by the ascent steps K in training, and S_ρ of the trained models by the K it is "
        "measured with",
        "line",
        ERROR | {"cells": {"value": "S_ρ (nats)"}},
    ),
    "share": ErrorPicture(
        "The test error by the number m of examples that share a perturbation", "line", ERROR
    ),
    "gradient_evaluations": ErrorPicture("The test error by gradient evaluations (batches)", "line", ERROR),
    "rho": ErrorPicture("The held-out error by ρ; a line for each β", "beta", ERROR),
}
"""What errors can be drawn by: a column, ``x`` of all panels."""


def _panels(x: str, tables: Mapping[str, pd.DataFrame], error: str, least: bool) -> Iterator[dict[str, Any]]:
    """Yield the panels of each data set."""
    picture, names = PICTURES[x], tables["table"].data.unique()
    words = {
        "at_epoch": error,
        "error": f"{error}_min" if least else "error",
        "which": "least" if least else "final",
    }
    for data in names:
        for of, series in picture.panels.items():
            for y, ylabel in series.items():
                expression = y.format(**words)
                column = expression.removeprefix("100 * ")
                if column in tables[of]:
                    yield {
                        **{"of": of, "x": x, "y": {"": expression}, "ylabel": ylabel.format(**words)},
                        "by": "variant" if of == "cells" else picture.by,
                        "xlabel": "K of measuring S_ρ" if of == "cells" else WORDS.get(x, x),
                        "title": data if len(names) > 1 else "",
                        "where": f"data == {data!r}" + ("" if of == "table" else f" and {column}.notna()"),
                    }


def _plan(measure: Table | None) -> MeasurePlan:
    if measure is None:
        return NOTHING
    grids: dict[str, Any] = {
        key: tuple(value) if isinstance(value, list) else value for key, value in measure.items()
    }
    return MeasurePlan(("local_inconsistency",), Settings(**grids), None, None)


def _arms(
    task: Task,
    place: Table,
    chosen: Mapping[str, TrainConfig],
    seeds: int,
    split_by_seed: bool,
    plan: MeasurePlan,
) -> Iterator[Arm]:
    """Train every variant with every seed on one data set."""
    runs = {
        (label, seed): config.replace(seed=seed, **({"split_seed": seed} if split_by_seed else {}))
        for label, config in chosen.items()
        for seed in range(seeds)
    }
    named = {key: run_name(config, {"method": plain(key[0]), "seed": key[1]}) for key, config in runs.items()}
    folder = task.folder / "runs" / plain(place["label"])
    train_runs(Recipe({named[key]: config for key, config in runs.items()}, plan, ()), folder, task)
    for label, config in chosen.items():
        paths = tuple(folder / named[label, seed] for seed in range(seeds))
        yield Arm(place["label"], label, config, paths, place.get("published", {}).get(label, ""))


def _expanded(variant: Table) -> Iterator[Table]:
    """Yield ``variant``, or one for each point of its ``grid``, labelled by its values in that order."""
    grid = variant.get("grid", {})
    for values in product(*grid.values()):
        point = dict(zip(grid, values, strict=True))
        label = " ".join([variant["label"], *(f"{value:g}" for value in values)])
        yield {**_without(variant, "grid"), **point, "label": label}


def _without(table: Table, *keys: str) -> dict[str, Any]:
    return {key: value for key, value in table.items() if key not in keys}


def plain(label: str) -> str:
    """Return ``label`` as a part of a file's name."""
    return "".join(c for c in label.lower() if c.isalnum() or c == "-")


def _tuned(
    task: Task, shared: Table, variant: Table, place: Table, held_out: Table
) -> tuple[TrainConfig, list[Sequence[str]]]:
    """Return the variant's configuration at its point of least error on what is ``held_out`` (seed 0).

    Beside it what was tried, a row of the table of tuning each.
    """
    own = {**_without(variant, "label", "points", "lr_of"), **place.get("of", {}).get(variant["label"], {})}
    config = TrainConfig.from_dict({**shared, **own})
    points = variant.get("points", [{}])
    if len(points) == 1:
        return config.replace(**points[0]), []
    cells = [config.replace(**point, **held_out) for point in points]
    names = [run_name(cell, {"method": plain(variant["label"])}) for cell in cells]
    folder = task.folder / "runs" / f"{plain(place['label'])}-tune"
    train_runs(Recipe(dict(zip(names, cells, strict=True)), NOTHING, ()), folder, task)
    errors = Arm(place["label"], variant["label"], config, tuple(folder / name for name in names)).values(
        "error"
    )
    # where all diverged, the first is taken, and its runs say so
    best = int(np.where(np.isnan(errors), np.inf, errors).argmin())
    rows: list[Sequence[str]] = []
    for number, (cell, error) in enumerate(zip(cells, errors, strict=True)):
        mark = "yes" if number == best and np.isfinite(error) else ""
        shown = (setting(cell), str(cell.epochs), percent(np.array([error])), mark)
        rows.append((place["label"], variant["label"], *shown))
    return config.replace(**points[best]), rows


def sheet(name: str, found: Comparison, reference: str) -> Sheet:
    """Return a row an arm; the fastest epoch relative to that of the variant ``reference``."""
    body = []
    for arm in found.arms:
        ratio = arm.epoch_seconds / found.arm(arm.data, reference).epoch_seconds
        s_rho = pd.Series(arm.values("local_inconsistency")).mean()
        cells = (
            setting(arm.config),
            percent(arm.values("error")),
            percent(arm.values(f"{arm.error}_min")),
            UNDEFINED if arm.config.trains_encoder else percent(arm.values("train_error")),
            UNDEFINED if math.isnan(ratio) else f"{ratio:.2f}",
            UNDEFINED if math.isnan(s_rho) else f"{s_rho:.3g}",
            arm.published or UNDEFINED,
        )
        body.append((arm.data, arm.label, *cells))
    counts = {arm.data: len(arm.runs) for arm in found.arms}
    seeds = " and ".join(f"{count} seeds of {place}" for place, count in counts.items())
    if len(set(counts.values())) == 1:
        seeds = f"{len(found.arms[0].runs)} seeds"
    config = found.arms[0].config
    held_out = "Validation" if config.validation else "Test"
    which = "Linear probe’s test" if config.trains_encoder else held_out
    columns = (
        "data",
        "variant",
        "setting",
        "final error",
        "least error",
        "training error",
        "s/epoch",
        "S_ρ",
        "paper",
    )
    caption = (
        f"Mean ± standard error over {seeds}, in %; s/epoch: the fastest epoch relative to {reference}’s"
    )
    return plain_sheet(name, f"{which} error by variant", caption, columns, body, 3)


def _tuning_sheet(name: str, rows: Sequence[Sequence[str]], held_out: Table) -> Iterator[Sheet]:
    """Yield a table of the points that were tried, where anything was tuned."""
    if rows:
        share = held_out["validation"]
        caption = f"Error on {share:.0%} of the training part, which is held out, in %; seed 0"
        columns = ("data", "variant", "setting", "epochs", "error", "chosen")
        yield plain_sheet(f"{name}-tuning", "Tuning", caption, columns, rows, 3)


def setting(config: TrainConfig) -> str:
    """Return the settings that may have been tuned."""
    known = {key: getattr(config, key) for key in ("lr", "rho", "beta") if key not in config.idle()}
    shown = [f"{key} = {value:g}" for key, value in known.items() if value is not None]
    return ", ".join(shown).replace("rho", "ρ").replace("beta", "β")


def percent(values: np.ndarray) -> str:
    """Return mean ± standard error in %; runs without a value (NaN) diverged, and are counted."""
    known = 100 * values[~np.isnan(values)]
    lost = f" ({len(values) - len(known)} diverged)" if len(known) < len(values) else ""
    if not len(known):
        return f"{UNDEFINED}{lost}"
    error = f" ± {known.std(ddof=1) / math.sqrt(len(known)):.2f}" if len(known) > 1 else ""
    return f"{known.mean():.2f}{error}{lost}"
