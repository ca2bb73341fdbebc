"""Tables and curves that compare training settings: variants × data sets × seeds, each a run as a sweep does it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from typing import Any

from gm_probe.errors import UsageError, did_you_mean
from gm_probe.measures.settings import Settings
from gm_probe.reproduce import method_pictures
from gm_probe.reproduce.comparison import Arm, Comparison, plain
from gm_probe.reproduce.finding import Finding, Task
from gm_probe.reproduce.generated import GENERATED, image_folder
from gm_probe.reproduce.method_tables import percent, run_rows, setting, sheet, tuning_sheet
from gm_probe.reproduce.training import trained
from gm_probe.reproduce.verdict import Test, outcome, text_of
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
    x: str = "",
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
            ``validation`` share. Of few labels that is too small to choose by. ``lr_of`` names a variant before it
            whose learning rate, once tuned, it takes. A ``grid`` makes one variant a point.
        data: ``label``, settings of its own (``data`` = 'generated' makes images), and by a variant's label what the
            paper ``published`` and settings for it ``of``; ``seeds``, where it has not as many as the others.
        tests: what the claim says: a ``better`` and a ``worse`` variant, by the ``key`` of a run's summary (its final
            error, unless another is given), or by the mean over training of what its metrics have ``along`` it;
            less what two more differ by, where the claim goes ``beyond`` these.
        beside: likewise, but no part of the claim: these differences are given, and decide nothing.
        untested: what the claim says that no test covers.
        picture, x: of ``method_pictures.picture``.
        measure: settings of S_ρ, taken of every run at its end.
        split_by_seed: each seed also draws its own split and labels, the same ones for all variants, so that intervals
            over seeds are over these too; else all runs share those of ``split_seed``. Tuning is on seed 0's.
        tuning: settings that runs of tuning differ by, such as fewer ``epochs``.
    """
    data = _of_interest(data, task.only)
    variants = [each for variant in variants for each in _expanded(variant)]
    held_out = _held_out(tuning or {})
    plan = NOTHING
    if measure is not None:
        grids: dict[str, Any] = {
            key: tuple(value) if isinstance(value, list) else value for key, value in measure.items()
        }
        plan = MeasurePlan(("local_inconsistency",), Settings(**grids), None, None)
    arms: list[Arm] = []
    tried: list[tuple[str, ...]] = []
    for place in data:
        shared = {
            **base,
            **_without(place, "label", "published", "of", "seeds"),
            **_source(task, place, base, data),
        }
        numbers = range(place.get("seeds", seeds))
        chosen: dict[str, TrainConfig] = {}
        for variant in variants:
            rate = {"lr": chosen[variant["lr_of"]].lr} if "lr_of" in variant else {}
            chosen[variant["label"]], rows = _tuned(task, {**shared, **rate}, variant, place, held_out)
            tried += rows
        runs = {
            (label, seed): config.replace(seed=seed, **({"split_seed": seed} if split_by_seed else {}))
            for label, config in chosen.items()
            for seed in numbers
        }
        named = {
            key: run_name(config, {"method": plain(key[0]), "seed": key[1]}) for key, config in runs.items()
        }
        folder = task.folder / "runs" / plain(place["label"])
        trained(Recipe({named[key]: config for key, config in runs.items()}, plan, ()), folder, task)
        for label, config in chosen.items():
            paths = tuple(folder / named[label, seed] for seed in numbers)
            said = place.get("published", {}).get(label, "")
            arms.append(Arm(place["label"], label, config, paths, said))
    found = Comparison(tuple(arms))
    results, others = (
        [Test(found, name, one, len(found.data) * len(of)) for name in found.data for one in of]
        for of in (tests, beside)
    )
    least = any(str(test.get("key", "")).endswith("_min") for test in tests)
    figures, caption = method_pictures.picture(picture, found, least, x)
    return Finding(
        # a smoke's runs have hardly begun to learn, some on images that are made up: they try the code
        "cannot be told" if task.scale == "smoke" else outcome(results),
        text_of(results, others, untested, split_by_seed),
        list(run_rows(found)),
        [
            sheet(task.name, found, tests[0]["worse"] if tests else ""),
            *tuning_sheet(task.name, tried, held_out["validation"]),
        ],
        figures,
        dict.fromkeys(figures, caption),
        untested,
    )


def _of_interest(data: Sequence[Table], only: str | None) -> Sequence[Table]:
    """``data``, or the one that is labelled ``only``."""
    labels = [place["label"] for place in data]
    if only is not None and only not in labels:
        raise UsageError(f"--only {only!r} is none of its data sets; {did_you_mean(only, labels)}")
    return [place for place in data if only in {None, place["label"]}]


def _expanded(variant: Table) -> Iterator[Table]:
    """``variant``, or one for each point of its ``grid``, labelled by its values in that order."""
    grid = variant.get("grid", {})
    for values in product(*grid.values()):
        point = dict(zip(grid, values, strict=True))
        label = " ".join([variant["label"], *(f"{value:g}" for value in values)])
        yield {**_without(variant, "grid"), **point, "label": label}


def _without(table: Table, *keys: str) -> dict[str, Any]:
    return {key: value for key, value in table.items() if key not in keys}


def _source(task: Task, place: Table, base: Table, data: Sequence[Table]) -> dict[str, Any]:
    """Where the examples come from, as settings of training."""
    if task.data is not None:
        names = list(dict.fromkeys(each.get("data", base.get("data", "")) for each in data))
        if len(names) > 1:
            raise UsageError(
                f"{task.name} takes several data sets ({', '.join(names)}), and --data cannot replace all "
                f"of them. Choose one by --only, such as --only '{data[0]['label']}'"
            )
        return {"data": task.data, "device": task.device}
    name = place.get("data", base.get("data", ""))
    if name.startswith(GENERATED):
        return {**task.place, "data": str(image_folder(name, task.folder))}
    return task.place


def _tuned(
    task: Task, shared: Table, variant: Table, place: Table, held_out: Table
) -> tuple[TrainConfig, list[tuple[str, ...]]]:
    """The variant's configuration, at its point of the least error on what is ``held_out`` (seed 0).

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
    trained(Recipe(dict(zip(names, cells, strict=True)), NOTHING, ()), folder, task)
    errors = Arm(place["label"], variant["label"], config, tuple(folder / name for name in names), "").errors
    known = [math.inf if error is None else error for error in errors]
    best = known.index(min(known))  # where all diverged the first, whose runs will say so
    rows: list[tuple[str, ...]] = [
        (
            place["label"],
            variant["label"],
            setting(cell),
            str(cell.epochs),
            percent([error]),
            "yes" if i == best and error is not None else "",
        )
        for i, (cell, error) in enumerate(zip(cells, errors, strict=True))
    ]
    return config.replace(**points[best]), rows


def _held_out(tuning: Table) -> dict[str, Any]:
    """What runs of tuning differ by: they are judged at their end, on a part of the training part."""
    return {"validation": VALIDATION, "eval_every": 0, "track_every": 0, **tuning}
