"""What a sweep will cost, before it runs: a few steps are timed, and sizes are counted."""

import statistics
import tempfile
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from gm_probe.files.locks import FolderLock
from gm_probe.measures.costs import expected_cost
from gm_probe.measures.settings import Settings
from gm_probe.sweep.recipe import MeasurePlan
from gm_probe.training.config import TrainConfig
from gm_probe.training.run import Training
from gm_probe.training.updates import make_rule

STEPS = 3
"""Number of steps that are timed, after as many that warm up."""
SAME_SPEED = frozenset(
    {"lr", "weight_decay", "seed", "epochs", "stop_ce", "min_lr", "milestones", "schedule"}
)
"""Settings that leave the time of a step and the size of a run's files as they are."""
INDEX = 10
"""Bytes that split.json takes for an example."""


@dataclass(frozen=True, slots=True)
class RunCost:
    """The costs of one run: seconds at most (it may stop early), bytes that stay, and bytes until it has finished."""

    seconds: float
    disk: float
    passing_disk: float


def run_costs(configs: Iterable[TrainConfig], plan: MeasurePlan) -> list[RunCost]:
    """Estimate each run. One of every kind is timed, with its own threads or else those that torch has now.

    Raises:
        DataError, UsageError, ResourceError, DivergedError: as training raises them.
    """
    known: dict[str, _Rate] = {}
    found = []
    for config in configs:
        settings = config.identity() | {"threads": config.threads, "device": config.device}
        kind = repr(sorted((key, value) for key, value in settings.items() if key not in SAME_SPEED))
        if kind not in known:
            known[kind] = _rate(config)
        found.append(known[kind].estimate(config, plan))
    return found


@dataclass(frozen=True, slots=True)
class _Rate:
    """How fast runs of one kind are, and how big.

    Attributes:
        step: seconds; ``steps`` of them are an epoch.
        evaluation: seconds a gradient evaluation of one input, in full precision: evaluating and measuring have no
            autocast.
        views: inputs that an example is measured by.
        inputs: of training, labeled or not.
        weights: bytes.
    """

    step: float
    steps: int
    evaluation: float
    views: int
    num_train: int
    num_test: int
    num_unlabeled: int
    inputs: int
    weights: int

    def estimate(self, config: TrainConfig, plan: MeasurePlan) -> RunCost:
        seconds = self.step * self.steps * config.epochs + self._looks(config) * self.evaluation
        if plan.measures:
            probed = min(self.num_unlabeled, plan.max_examples or self.num_unlabeled)
            seconds += expected_cost(plan.measures, plan.settings) * probed * self.views * self.evaluation
        indices = INDEX * (self.inputs + self.num_test + self.num_unlabeled)
        copies = 1 + (config.eval_every > 0) + (config.ema_decay is not None)  # last, best, raw weights
        kept = copies * self.weights + indices + 300 * config.epochs + 5000
        moments = {"sgd": int(config.momentum > 0), "adamw": 2}[config.optimizer]
        passing = 1 + moments + (config.ema_decay is not None)
        return RunCost(seconds, kept, passing * self.weights)

    def _looks(self, config: TrainConfig) -> float:
        """Return the gradient evaluations that evaluating the weights takes, during training and at its end.

        The fits of linear probes are left out, and that ``stop_ce`` may end a run early.
        """
        forward = 1 / 3
        every = config.probe_every if config.trains_encoder else config.eval_every
        looks = 1 + (config.epochs // every if every else 0)
        found = looks * forward * (self.num_train + self.num_test)
        if config.track_every:
            tracked = expected_cost(["local_inconsistency"], Settings()) * self.num_unlabeled * self.views
            found += config.epochs // config.track_every * tracked
        return found


def _rate(config: TrainConfig) -> _Rate:
    seconds, training = _timed(config.replace(every=1, tail=1.0))
    full_precision = seconds if config.amp == "none" else _timed(config.replace(amp="none"))[0]
    sampler, splits = training.sampler, training.splits
    inputs = min(config.batch_size, sampler.examples) * sampler.rows
    steps, rule = config.epochs * training.steps, training.updates.rule
    planned = make_rule(config, training.model, rule.generator, steps)
    return _Rate(
        seconds * planned.cost(steps) / (steps * rule.passes),
        training.steps,
        full_precision / (inputs * rule.passes / 3),
        2 if config.trains_encoder else 1,
        len(splits.train),
        len(splits.test),
        len(splits.unlabeled),
        len(splits.inputs),
        sum(_bytes(value) for value in training.model.state_dict().values()),
    )


def _timed(config: TrainConfig) -> tuple[float, Training]:
    """Return the median seconds per step of a training that is stopped after a few; nothing is written."""
    watch, before = _StepTimer(), torch.get_num_threads()
    torch.set_num_threads(config.threads or before)
    try:
        with tempfile.TemporaryDirectory() as nowhere:
            training = Training(config.replace(init=None, checkpoint_every=None), Path(nowhere), watch)
            with suppress(_Enough):
                while True:  # an epoch may have fewer steps
                    training.run_epoch()
                    training.epoch = 0  # the learning rate of a later one may be undefined
    finally:
        torch.set_num_threads(before)
    return statistics.median(b - a for a, b in pairwise(watch.times[STEPS:])), training


class _Enough(Exception):
    """That many steps were timed."""


class _StepTimer(FolderLock):
    """In the place of a held folder: notes when each step has ended."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def report_progress(self, *_: Any) -> None:
        self.times.append(time.perf_counter())
        if len(self.times) > 2 * STEPS:
            raise _Enough


def _bytes(value: torch.Tensor) -> int:
    return value.numel() * value.element_size()
