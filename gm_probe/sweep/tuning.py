"""Tune (ρ, β) on a tenth of the training part: each cell is one run a seed, and the test part plays no role."""

from __future__ import annotations

import inspect
import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from gm_probe.errors import DivergedError, ProbeError, UsageError, needs
from gm_probe.executors.local import Outcome
from gm_probe.measures.settings import Settings
from gm_probe.runs.records import RunRecord, read_run
from gm_probe.sweep.recipe import MeasurePlan, Recipe, run_name
from gm_probe.training.config import TrainConfig
from gm_probe.training.methods import METHODS

VALIDATION = 0.1
"""Share of the training part that cells are judged on."""
NOTHING = MeasurePlan((), Settings(), None, 1)


class Point(NamedTuple):
    """Where a cell lies; β is None where the method has none, or it is not tuned."""

    rho: float
    beta: float | None = None


@dataclass(frozen=True, slots=True)
class Cell:
    """Validation errors at ``point``, one a seed; None of a run that diverged."""

    point: Point
    errors: tuple[float | None, ...]

    @property
    def mean(self) -> float | None:
        """None where any run diverged: the others' mean would flatter the cell."""
        known = [error for error in self.errors if error is not None]
        return statistics.fmean(known) if len(known) == len(self.errors) else None

    @property
    def stderr(self) -> float | None:
        """Over seeds; None of a single one."""
        if self.mean is None or len(self.errors) < 2:
            return None
        return statistics.stdev(e for e in self.errors if e is not None) / math.sqrt(len(self.errors))

    def as_dict(self) -> dict[str, Any]:
        diverged = sum(error is None for error in self.errors)
        return {
            **self.point._asdict(),
            "error": self.mean,
            "stderr": self.stderr,
            "errors": list(self.errors),
            "diverged": diverged,
        }


def check_tunable(config: TrainConfig, *, beta: bool) -> None:
    """Raise UsageError where the method has no ρ, or no β though one is to be tuned."""
    settings = METHODS[config.method].settings
    if "rho" not in settings:
        known = ", ".join(name for name, method in METHODS.items() if "rho" in method.settings)
        raise UsageError(f"{config.method} has neither ρ nor β; choose --method {known}")
    if beta and "beta" not in settings:
        raise UsageError(f"{config.method} has no β; leave --beta out")


def radii_around_default(config: TrainConfig, *, bounds: bool) -> tuple[float, ...]:
    """Return half, one and two times the method's default ρ; as ``bounds`` a quarter and four times it."""
    own = inspect.signature(METHODS[config.method].rule).parameters["rho"].default
    return tuple(factor * own for factor in ((0.25, 4.0) if bounds else (0.5, 1.0, 2.0)))


@dataclass(frozen=True, slots=True)
class Tuner:
    """Trains points, ``seeds`` runs each, and reads what they came to.

    Attributes:
        base: what is not tuned, with a ``validation`` share.
        out: the folder in which ``execute`` leaves the runs.
        execute: trains what is incomplete of a recipe's runs.
    """

    base: TrainConfig
    seeds: int
    out: Path
    execute: Callable[[Recipe], list[Outcome]]

    def recipe(self, points: Iterable[Point]) -> Recipe:
        """Return a recipe of one run per point and seed (0, 1, ...)."""
        runs = {}
        for point in points:
            varied = {key: value for key, value in point._asdict().items() if value is not None}
            for seed in range(self.seeds):
                config = self.base.replace(**varied, seed=seed)
                runs[run_name(config, {**varied, "seed": seed})] = config
        return Recipe(runs, NOTHING, ())

    def grid(self, points: Sequence[Point]) -> list[Cell]:
        """Train every one of ``points`` and return their cells.

        Raises:
            ProbeError: a run failed; the next call tries it again.
        """
        require_success(self.execute(self.recipe(points)))
        return [self._cell(point) for point in points]

    def trials(
        self, count: int, bounds: Mapping[str, Sequence[float]], notify: Callable[[int, Cell], None]
    ) -> list[Cell]:
        """Train ``count`` points that Optuna's TPE chooses, logarithmic between ``bounds``, to three digits.

        The sampler is seeded and a diverged cell counts as an error of 1, so the same call chooses the same points
        again: what is complete is not trained again, and more trials go on where fewer ended.

        Args:
            bounds: of ``rho``, and of ``beta`` where it is tuned.
            notify: called with every trial's number, from 1, and its cell.

        Raises:
            UsageError: Optuna is not installed.
            ProbeError: a run failed; the next call tries it again.
        """
        with needs("--trials", "optuna", "tune"):
            import optuna
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=0))
        cells: dict[Point, Cell] = {}
        for number in range(1, count + 1):
            trial = study.ask()
            chosen = {name: trial.suggest_float(name, *ends, log=True) for name, ends in bounds.items()}
            point = Point(**{name: float(f"{value:.3g}") for name, value in chosen.items()})
            if point not in cells:
                [cells[point]] = self.grid([point])
            mean = cells[point].mean
            study.tell(trial, 1.0 if mean is None else mean)
            notify(number, cells[point])
        return list(cells.values())

    def _cell(self, point: Point) -> Cell:
        records = [read_run(self.out / name) for name in self.recipe([point]).runs]
        return Cell(point, tuple(_error(r) if r.status == "finished" else None for r in records))


def _error(record: RunRecord) -> float:
    """Return the error on the held-out examples; of a SimCLR encoder, that of its linear probe."""
    return float(record.result("probe_test_error" if "probe_test_error" in record.summary else "test_error"))


def require_success(outcomes: Sequence[Outcome]) -> None:
    """Raise ProbeError where a run failed; one that diverged is a result."""
    failed = [outcome for outcome in outcomes if outcome.status in {"failed", "busy"}]
    if failed:
        raise ProbeError(
            f"{len(failed)} of {len(outcomes)} runs failed, the first ({failed[0].name}): "
            f"{failed[0].reason}; run the same command to try them again"
        )


def best_of(cells: Sequence[Cell]) -> Cell:
    """Return the cell of the least mean validation error; the first of equal ones.

    Raises:
        DivergedError: every cell has a run that diverged.
    """
    known = [cell for cell in cells if cell.mean is not None]
    if not known:
        raise DivergedError("training diverged in every cell. Lower --lr or --rho")
    return min(known, key=lambda cell: cell.mean if cell.mean is not None else math.inf)


def rivals_of(best: Cell, cells: Sequence[Cell]) -> list[Cell]:
    """Return the other cells whose mean lies within one standard error of the difference from the best's."""

    def ties(cell: Cell) -> bool:
        if cell.mean is None or best.mean is None:
            return False
        return cell.mean - best.mean <= math.hypot(best.stderr or 0.0, cell.stderr or 0.0)

    return [cell for cell in cells if cell is not best and ties(cell)]
