"""Tables and curves that compare training settings: variants × data sets × seeds, each a run as a sweep does it."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from typing import Any

import numpy as np

from gm_probe.analysis.intervals import mean_interval
from gm_probe.analysis.typeset import UNDEFINED, Cell, Sheet
from gm_probe.core.errors import UsageError
from gm_probe.probe.probe import Settings
from gm_probe.reproduce.comparison import Arm, Comparison
from gm_probe.reproduce.finding import Finding, Outcome, Task
from gm_probe.reproduce.generated import GENERATED, image_folder
from gm_probe.reproduce.method_pictures import PICTURES
from gm_probe.reproduce.training import trained
from gm_probe.sweep.recipe import MeasurePlan, Recipe, run_name
from gm_probe.sweep.tuning import NOTHING, VALIDATION
from gm_probe.training.config import TrainConfig

Table = Mapping[str, Any]
COMPARED = {"local_inconsistency": "S_ρ", "running_nt_xent": "NT-Xent of training"}
"""Words for what is no error."""


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
            those of the least error on a tenth of the training part are taken. Of few labels that tenth is too small
            to choose by. ``lr_of`` names a variant before it whose learning rate, once tuned, it takes. A ``grid``
            makes one variant a point.
        data: ``label``, settings of its own (``data`` = 'generated' makes images), and by a variant's label what the
            paper ``published`` and settings for it ``of``.
        tests: what the claim says: a ``better`` and a ``worse`` variant, by the ``key`` of a run's summary (its final
            error, unless another is given), or by the mean over training of what its metrics have ``along`` it.
        beside: likewise, but no part of the claim: these differences are given, and decide nothing.
        untested: what the claim says that no test covers.
        picture: of ``method_pictures.PICTURES``.
        measure: settings of S_ρ, taken of every run at its end.
        split_by_seed: each seed also draws its own split and labels, the same ones for all variants, so that intervals
            over seeds are over these too; else all runs share those of ``split_seed``. Tuning is on seed 0's.
        tuning: settings that runs of tuning differ by, such as fewer ``epochs``.
    """
    variants = [each for variant in variants for each in _expanded(variant)]
    plan = NOTHING
    if measure is not None:
        grids: dict[str, Any] = {
            key: tuple(value) if isinstance(value, list) else value for key, value in measure.items()
        }
        plan = MeasurePlan(("local_inconsistency",), Settings(**grids), None, None)
    arms: list[Arm] = []
    tried: list[tuple[Cell, ...]] = []
    for place in data:
        shared = {**base, **_without(place, "label", "published", "of"), **_source(task, place, base, data)}
        chosen: dict[str, TrainConfig] = {}
        for variant in variants:
            rate = {"lr": chosen[variant["lr_of"]].lr} if "lr_of" in variant else {}
            chosen[variant["label"]], rows = _tuned(task, {**shared, **rate}, variant, place, tuning or {})
            tried += rows
        runs = {
            (label, seed): config.replace(seed=seed, **({"split_seed": seed} if split_by_seed else {}))
            for label, config in chosen.items()
            for seed in range(seeds)
        }
        named = {
            key: run_name(config, {"method": _plain(key[0]), "seed": key[1]}) for key, config in runs.items()
        }
        folder = task.folder / "runs" / _plain(place["label"])
        trained(Recipe({named[key]: config for key, config in runs.items()}, plan, ()), folder, task)
        for label, config in chosen.items():
            paths = tuple(folder / named[label, seed] for seed in range(seeds))
            said = place.get("published", {}).get(label, "")
            arms.append(Arm(place["label"], label, config, paths, said))
    found = Comparison(tuple(arms))
    results, others = (
        [_Test(found, name, one, len(found.data) * len(of)) for name in found.data for one in of]
        for of in (tests, beside)
    )
    draw, caption = PICTURES[picture]
    return Finding(
        # a smoke's runs have hardly begun to learn, some on images that are made up: they try the code
        "cannot be told" if task.scale == "smoke" else _outcome(results),
        _text(results, others, untested, split_by_seed),
        list(_rows(found)),
        [_sheet(task.name, found, tests[0]["worse"] if tests else ""), *_tuning_sheet(task.name, tried)],
        {"": draw(found)},
        {"": caption},
        untested,
    )


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
                f"{task.name} takes several data sets ({', '.join(names)}): --data cannot stand for all of them"
            )
        return {"data": task.data, "device": task.device}
    name = place.get("data", base.get("data", ""))
    if name.startswith(GENERATED):
        return {**task.place, "data": str(image_folder(name, task.folder))}
    return task.place


def _tuned(
    task: Task, shared: Table, variant: Table, place: Table, tuning: Table
) -> tuple[TrainConfig, list[tuple[Cell, ...]]]:
    """The variant's configuration, at its point of the least validation error (seed 0, a tenth held out).

    Beside it what was tried, a row of the table of tuning each.
    """
    own = {**_without(variant, "label", "points", "lr_of"), **place.get("of", {}).get(variant["label"], {})}
    config = TrainConfig.from_dict({**shared, **own})
    points = variant.get("points", [{}])
    if len(points) == 1:
        return config.replace(**points[0]), []
    held_out = {"validation": VALIDATION, "eval_every": 0, "track_every": 0, **tuning}
    cells = [config.replace(**point, **held_out) for point in points]
    names = [run_name(cell, {"method": _plain(variant["label"])}) for cell in cells]
    folder = task.folder / "runs" / f"{_plain(place['label'])}-tune"
    trained(Recipe(dict(zip(names, cells, strict=True)), NOTHING, ()), folder, task)
    errors = Arm(place["label"], variant["label"], config, tuple(folder / name for name in names), "").errors
    known = [math.inf if error is None else error for error in errors]
    names_of_row = (Cell(place["label"]), Cell(variant["label"]))
    rows: list[tuple[Cell, ...]] = [
        (*names_of_row, Cell(_setting(cell)), Cell(str(cell.epochs)), Cell(_percent([error])))
        for cell, error in zip(cells, errors, strict=True)
    ]
    return config.replace(**points[known.index(min(known))]), rows


def _plain(label: str) -> str:
    return "".join(c for c in label.lower() if c.isalnum() or c == "-")


@dataclass(frozen=True)
class _Test:
    """Whether one variant does better than another on one data set: paired by seed.

    Attributes:
        family: comparisons that the claim is made of, this one among them.
    """

    found: Comparison
    data: str
    test: Table
    family: int = 1

    @cached_property
    def pairs(self) -> list[tuple[float | None, float | None]]:
        """What the better and the worse variant came to, a pair a seed; None without a result: mostly it diverged."""
        arms = [self.found.arm(self.data, self.test[key]) for key in ("better", "worse")]
        better, worse = (
            arm.means_along(self.key) if "along" in self.test else arm.figures(self.key) for arm in arms
        )
        return list(zip(better, worse, strict=True))

    @cached_property
    def differences(self) -> np.ndarray:
        """worse − better of every seed where both ended, so that > 0 is what the claim says."""
        return np.array([b - a for a, b in self.pairs if a is not None and b is not None])

    @property
    def lost(self) -> dict[str, int]:
        """Seeds in which the ``better`` variant alone has no result, and those in which the ``worse`` one has none."""
        return {
            "better": sum(a is None and b is not None for a, b in self.pairs),
            "worse": sum(a is not None and b is None for a, b in self.pairs),
        }

    @property
    def key(self) -> str:
        final = self.found.arm(self.data, self.test["better"]).error
        return str(self.test.get("along", self.test.get("key", final)))

    @property
    def compared(self) -> str:
        """What, in words."""
        probe, least = self.key.startswith("probe_"), self.key.endswith("_min")
        held_out = self.found.arm(self.data, self.test["better"]).config.validation is not None
        part = "probe" if probe else "validation" if held_out else "test"
        name = f"{part} error" if self._is_error else COMPARED.get(self.key, self.key)
        if "along" in self.test:
            return f"mean {name} over training"
        if not self._is_error:
            return name
        return f"least {name} over epochs" if least else f"final {name}"

    @property
    def _is_error(self) -> bool:
        return self.key.removesuffix("_min").endswith("test_error")

    @property
    def interval(self) -> tuple[float, float, float] | None:
        """None where the seeds are too few, or all alike, to tell an error."""
        spread = len(self.differences) > 1 and float(np.ptp(self.differences)) > 0
        return mean_interval(self.differences, 0.95) if spread else None

    @property
    def sign(self) -> int:
        """1 where it goes as the claim says, −1 where the other way, 0 where neither can be told.

        As the claim says: the 95 % interval is clear of 0. The other way: that of 1 − 5 % / ``family`` is, for a single
        one of them decides against the claim (Bonferroni; Holm's further steps would change no outcome). A seed in
        which one variant alone has no result is in no interval, and speaks against that variant: no sign favours it.
        """
        if self.interval is None:
            return 0
        _, low, _ = self.interval
        _, _, high = mean_interval(self.differences, 1 - 0.05 / self.family)
        if low > 0:
            return 0 if self.lost["better"] else 1
        return -1 if high < 0 and not self.lost["worse"] else 0

    def __str__(self) -> str:
        scale, unit = (-100, " points") if self._is_error else (-1, "")
        names = f"{self.test['better']} against {self.test['worse']}"
        where = f" on {self.data}" if len(self.found.data) > 1 else ""
        lost = [
            f"{self.test[key]} alone without a result in {count}" for key, count in self.lost.items() if count
        ]
        seeds = ", ".join([f"n = {len(self.differences)}", *lost])
        if not len(self.differences):
            return f"{names}{where}: no seed in which both ended ({seeds})"
        text = f"{names}{where}: {_signed(scale * float(self.differences.mean()))}{unit}"
        if self.interval is None:
            return f"{text} ({seeds})"
        _, low, high = (scale * value for value in self.interval)
        return f"{text} ({_signed(high)} to {_signed(low)}; {seeds})"


def _signed(value: float) -> str:
    """Three digits with the sign that print has, none before 0."""
    text = f"{value:+.3g}".replace("-", "−")
    return text if value else "0"


def _outcome(results: Sequence[_Test]) -> Outcome:
    """Of the whole claim, by the signs of its comparisons.

    It shows where all of them do. That is an intersection-union test (Berger 1982): "shows" is wrong as rarely as
    one comparison at 95 % is, and needs no adjustment for their number. Against the claim speaks any one that is
    reversed, and the more there are, the likelier one is by chance: ``_Test.sign`` adjusts for that.
    """
    signs = [result.sign for result in results]
    if signs and all(sign == 1 for sign in signs):
        return "shows"
    if -1 not in signs:
        return "cannot be told"
    return "shows in part" if 1 in signs else "does not show"


def _text(results: Sequence[_Test], others: Sequence[_Test], untested: str, split_by_seed: bool) -> str:
    """The test, every difference by what is compared, how many go which way, and what is left."""
    shared = (
        "same start and order of batches, same split and labels, which each seed draws anew"
        if split_by_seed
        else "same data, start and order of batches"
    )
    reversed_level = 100 * (1 - 0.05 / max(1, len(results)))
    text = (
        f"The test, on {' and '.join(dict.fromkeys(r.data for r in results))}: the difference in what is named, paired "
        f"by seed ({shared}), below 0 by a 95 % Student interval over the n seeds in which both ended. "
        f"{_told(results)} {sum(r.sign == 1 for r in results)} of {len(results)} comparisons go the claimed way clear "
        f"of 0, {sum(r.sign == -1 for r in results)} the other way (by {reversed_level:.4g} % intervals: Bonferroni)."
    )
    if any(count for r in results for count in r.lost.values()):
        text += " Where a variant alone has no result in a seed, as where it diverged, no comparison goes its way."
    given = f"These are no part of the claim. {_told(others)}" if others else ""
    left = f"Not tested: {untested}." if untested else ""
    return " ".join(filter(None, (text, given, left)))


def _told(results: Sequence[_Test]) -> str:
    by_what: dict[str, list[str]] = {}
    for result in results:
        by_what.setdefault(result.compared, []).append(str(result))
    told = (f"{what}: {'; '.join(said)}." for what, said in by_what.items())
    return " ".join(f"{each[0].upper()}{each[1:]}" for each in told)


def _rows(found: Comparison) -> Iterator[dict[str, Any]]:
    """One a run."""
    for arm in found.arms:
        for record, s_rho in zip(arm.records, arm.s_rho, strict=True):
            settings = {
                key: record.config.get(key)
                for key in ("method", "lr", "rho", "beta", "k_steps", "m", "seed", "epochs")
            }
            errors = (arm.error, f"{arm.error}_min", arm.error.replace("test", "train"))
            keys = ("status", *errors, "train_seconds", "gradient_evaluations")
            results = {key: record.summary.get(key) for key in keys}
            yield {
                "data": arm.data,
                "variant": arm.label,
                **settings,
                **results,
                "local_inconsistency": s_rho,
            }


def _sheet(name: str, found: Comparison, reference: str) -> Sheet:
    body = []
    for arm in found.arms:
        config, first = arm.config, found.arm(arm.data, reference or found.labels[0])
        simclr = config.objective == "simclr"  # of its probe nobody asks how it fits
        s_rho = _mean_or_none(arm.s_rho)
        seconds = [_mean_or_none(each.figures("train_seconds")) for each in (arm, first)]
        per_epoch = None
        if seconds[0] and seconds[1]:
            per_epoch = seconds[0] / config.epochs / (seconds[1] / first.config.epochs)
        body.append(
            (
                Cell(arm.data),
                Cell(arm.label),
                Cell(_setting(config)),
                Cell(_percent(arm.errors)),
                Cell(_percent(arm.figures(f"{arm.error}_min"))),
                Cell(UNDEFINED if simclr else _percent(arm.figures("train_error"))),
                Cell(UNDEFINED if per_epoch is None else f"{per_epoch:.2f}"),
                Cell(UNDEFINED if s_rho is None else f"{s_rho:.3g}"),
                Cell(arm.published or UNDEFINED),
            )
        )
    return Sheet(
        name,
        f"{_words(found.arms[0].config)} by variant",
        f"Mean ± standard error over {len(found.arms[0].runs)} seeds, in %; s/epoch: time of an epoch relative to "
        f"{reference or found.labels[0]}’s",
        (
            "data",
            "variant",
            "setting",
            "final error",
            "least error",
            "training error",
            "s/epoch",
            "S_ρ",
            "paper",
        ),
        tuple(body),
        3,
    )


def _words(config: TrainConfig) -> str:
    """Of which error a table is."""
    if config.objective == "simclr":
        return "Linear probe’s test error"
    return "Validation error" if config.validation else "Test error"


def _tuning_sheet(name: str, rows: Sequence[tuple[Cell, ...]]) -> Iterator[Sheet]:
    """Where anything was tuned, by what it was chosen."""
    if rows:
        yield Sheet(
            f"{name}-tuning",
            "Tuning",
            "Error on a tenth of the training part, which is held out, in %; seed 0",
            ("data", "variant", "setting", "epochs", "error"),
            tuple(rows),
            3,
        )


def _setting(config: TrainConfig) -> str:
    """What may have been tuned."""
    known = {key: getattr(config, key) for key in ("lr", "rho", "beta") if key not in config.idle()}
    shown = [f"{key} = {value:g}" for key, value in known.items() if value is not None]
    return ", ".join(shown).replace("rho", "ρ").replace("beta", "β")


def _mean_or_none(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known else None


def _percent(values: Sequence[float | None]) -> str:
    """Mean ± standard error in %; runs that diverged are counted."""
    known = [100 * value for value in values if value is not None]
    lost = f" ({len(values) - len(known)} diverged)" if len(known) < len(values) else ""
    if not known:
        return f"{UNDEFINED}{lost}"
    spread = f" ± {statistics.stdev(known) / math.sqrt(len(known)):.2f}" if len(known) > 1 else ""
    return f"{statistics.fmean(known):.2f}{spread}{lost}"
