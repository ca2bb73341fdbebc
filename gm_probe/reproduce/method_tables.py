"""Rows and tables of training settings that are compared, and of how they were tuned."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Sequence
from typing import Any

from gm_probe.analysis.typeset import UNDEFINED, Sheet, plain_sheet
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
    """A row an arm."""
    reference = reference or found.labels[0]
    body = []
    for arm in found.arms:
        seconds = [min(each.epoch_seconds, default=None) for each in (arm, found.arm(arm.data, reference))]
        s_rho = [value for value in arm.s_rho if value is not None]
        simclr = arm.config.trains_encoder  # of its probe nobody asks how it fits
        cells = (
            setting(arm.config),
            percent(arm.errors),
            percent(arm.figures(f"{arm.error}_min")),
            UNDEFINED if simclr else percent(arm.figures("train_error")),
            f"{seconds[0] / seconds[1]:.2f}" if seconds[0] and seconds[1] else UNDEFINED,
            f"{statistics.fmean(s_rho):.3g}" if s_rho else UNDEFINED,
            arm.published or UNDEFINED,
        )
        body.append((arm.data, arm.label, *cells))
    return plain_sheet(
        name,
        f"{_words(found.arms[0].config)} by variant",
        f"Mean ± standard error over {_seeds(found)}, in %; s/epoch: the fastest epoch relative to {reference}’s",
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
        body,
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
    if config.trains_encoder:
        return "Linear probe’s test error"
    return "Validation error" if config.validation else "Test error"


def tuning_sheet(name: str, rows: Sequence[Sequence[str]], share: float) -> Iterator[Sheet]:
    """Where anything was tuned, by what it was chosen."""
    if rows:
        caption = f"Error on {share:.0%} of the training part, which is held out, in %; seed 0"
        columns = ("data", "variant", "setting", "epochs", "error", "chosen")
        yield plain_sheet(f"{name}-tuning", "Tuning", caption, columns, rows, 3)


def setting(config: TrainConfig) -> str:
    """What may have been tuned."""
    known = {key: getattr(config, key) for key in ("lr", "rho", "beta") if key not in config.idle()}
    shown = [f"{key} = {value:g}" for key, value in known.items() if value is not None]
    return ", ".join(shown).replace("rho", "ρ").replace("beta", "β")


def percent(values: Sequence[float | None]) -> str:
    """Mean ± standard error in %; runs that diverged are counted."""
    known = [100 * value for value in values if value is not None]
    lost = f" ({len(values) - len(known)} diverged)" if len(known) < len(values) else ""
    if not known:
        return f"{UNDEFINED}{lost}"
    spread = f" ± {statistics.stdev(known) / math.sqrt(len(known)):.2f}" if len(known) > 1 else ""
    return f"{statistics.fmean(known):.2f}{spread}{lost}"
