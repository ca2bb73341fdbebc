"""What a sweep will cost, before it runs: a few steps are timed, and sizes are counted."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

from gm_probe.probe.measures import expected_cost
from gm_probe.sweep.recipe import MeasurePlan
from gm_probe.training.config import TrainConfig
from gm_probe.training.loop import Training
from gm_probe.training.parts import load_splits

STEPS = 3
"""Timed, after as many that warm up."""
SAME_SPEED = frozenset(
    {"lr", "weight_decay", "seed", "epochs", "stop_ce", "min_lr", "milestones", "schedule"}
)
"""Settings that leave the time of a step and the size of a run's files as they are."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """Of one run: seconds at most (it may stop early), bytes that stay, and bytes that go when it has finished."""

    seconds: float
    disk: float
    passing_disk: float


def estimates(configs: Iterable[TrainConfig], plan: MeasurePlan) -> list[Estimate]:
    """Of each run; one of every kind is timed, at the threads that torch has now.

    Raises:
        DataError, UsageError, ResourceError: as training raises them.
    """
    known: dict[str, _Rate] = {}
    found = []
    for config in configs:
        kind = repr(sorted((k, v) for k, v in config.identity().items() if k not in SAME_SPEED))
        if kind not in known:
            known[kind] = _rate(config)
        found.append(known[kind].estimate(config, plan))
    return found


@dataclass(frozen=True, slots=True)
class _Rate:
    """Seconds a gradient evaluation of one example, likewise in full precision (measuring has no autocast),
    evaluations a step, examples of each part, bytes of weights."""

    seconds: float
    full_precision: float
    evaluations: float
    num_train: int
    num_test: int
    num_unlabeled: int
    weights: int

    def estimate(self, config: TrainConfig, plan: MeasurePlan) -> Estimate:
        examples = self.num_train * self.evaluations * config.epochs + (self.num_train + self.num_test) / 3
        seconds = examples * self.seconds
        if plan.measures:
            probed = min(self.num_unlabeled, plan.max_examples or self.num_unlabeled)
            seconds += expected_cost(plan.measures, plan.settings) * probed * self.full_precision
        indices = 6 * (self.num_train + self.num_test + self.num_unlabeled)  # split.json
        kept = (2 if config.eval_every else 1) * self.weights + indices + 300 * config.epochs + 5000
        moments = {"sgd": int(config.momentum > 0), "adamw": 2}[config.optimizer]
        copies = 1 + moments + (config.ema_decay is not None)
        return Estimate(seconds, kept, copies * self.weights)


def _rate(config: TrainConfig) -> _Rate:
    splits = load_splits(config)
    few = min(len(splits.train), STEPS * config.batch_size)
    # the same parts, but for the number of training examples
    short = config.replace(
        num_train=few,
        num_unlabeled=len(splits.unlabeled),
        num_test=len(splits.test),
        init=None,
        checkpoint_every=None,
    )
    seconds, training = _timed(short)
    full_precision = seconds
    if config.amp != "none":
        full_precision, _ = _timed(short.replace(amp="none"))
    passes = training.updates.rule.passes / 3
    return _Rate(
        seconds / few / passes,
        full_precision / few / passes,
        passes,
        len(splits.train),
        len(splits.test),
        len(splits.unlabeled),
        sum(_bytes(value) for value in training.model.state_dict().values()),
    )


def _timed(short: TrainConfig) -> tuple[float, Training]:
    """Seconds of its second epoch; nothing is written."""
    with tempfile.TemporaryDirectory() as nowhere:
        training = Training(short, Path(nowhere))
        training.run_epoch()
        training.epoch = 0  # the learning rate of a second epoch may be undefined
        return training.run_epoch()["seconds"], training


def _bytes(value: torch.Tensor) -> int:
    return value.numel() * value.element_size()
