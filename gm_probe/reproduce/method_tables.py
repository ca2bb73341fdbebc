"""Rows and tables of training settings that are compared, and of how they were tuned."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Sequence
from typing import Any

from gm_probe.analysis.typeset import UNDEFINED, Cell, Sheet
from gm_probe.reproduce.comparison import Comparison
from gm_probe.training.config import TrainConfig


def run_rows(found: Comparison) -> Iterator[dict[str, Any]]:
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


def sheet(name: str, found: Comparison, reference: str) -> Sheet:
    body = []
    for arm in found.arms:
        config, first = arm.config, found.arm(arm.data, reference or found.labels[0])
        simclr = config.objective == "simclr"  # of its probe nobody asks how it fits
        s_rho = _mean_or_none(arm.s_rho)
        seconds = [min(each.epoch_seconds, default=None) for each in (arm, first)]
        per_epoch = seconds[0] / seconds[1] if seconds[0] and seconds[1] else None
        body.append(
            (
                Cell(arm.data),
                Cell(arm.label),
                Cell(setting(config)),
                Cell(percent(arm.errors)),
                Cell(percent(arm.figures(f"{arm.error}_min"))),
                Cell(UNDEFINED if simclr else percent(arm.figures("train_error"))),
                Cell(UNDEFINED if per_epoch is None else f"{per_epoch:.2f}"),
                Cell(UNDEFINED if s_rho is None else f"{s_rho:.3g}"),
                Cell(arm.published or UNDEFINED),
            )
        )
    return Sheet(
        name,
        f"{_words(found.arms[0].config)} by variant",
        f"Mean ± standard error over {_seeds(found)}, in %; s/epoch: time of the fastest epoch relative to "
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


def _seeds(found: Comparison) -> str:
    """How many, by data set where these differ."""
    counts = {arm.data: len(arm.runs) for arm in found.arms}
    if len(set(counts.values())) == 1:
        return f"{max(counts.values())} seeds"
    return " and ".join(f"{count} seeds of {name}" for name, count in counts.items())


def _words(config: TrainConfig) -> str:
    """Of which error a table is."""
    if config.objective == "simclr":
        return "Linear probe’s test error"
    return "Validation error" if config.validation else "Test error"


def tuning_sheet(name: str, rows: Sequence[tuple[Cell, ...]], share: float) -> Iterator[Sheet]:
    """Where anything was tuned, by what it was chosen."""
    if rows:
        yield Sheet(
            f"{name}-tuning",
            "Tuning",
            f"Error on {share:.0%} of the training part, which is held out, in %; seed 0",
            ("data", "variant", "setting", "epochs", "error", "chosen"),
            tuple(rows),
            3,
        )


def setting(config: TrainConfig) -> str:
    """What may have been tuned."""
    known = {key: getattr(config, key) for key in ("lr", "rho", "beta") if key not in config.idle()}
    shown = [f"{key} = {value:g}" for key, value in known.items() if value is not None]
    return ", ".join(shown).replace("rho", "ρ").replace("beta", "β")


def _mean_or_none(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known else None


def percent(values: Sequence[float | None]) -> str:
    """Mean ± standard error in %; runs that diverged are counted."""
    known = [100 * value for value in values if value is not None]
    lost = f" ({len(values) - len(known)} diverged)" if len(known) < len(values) else ""
    if not known:
        return f"{UNDEFINED}{lost}"
    spread = f" ± {statistics.stdev(known) / math.sqrt(len(known)):.2f}" if len(known) > 1 else ""
    return f"{statistics.fmean(known):.2f}{spread}{lost}"
