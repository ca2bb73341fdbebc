"""The learning rate along a run."""

from __future__ import annotations

import math

from gm_probe.training.config import TrainConfig


def lr_factor(config: TrainConfig, epoch: float) -> float:
    """Return the factor on the base learning rate at ``epoch`` (fractional, from 0), as a pure function of it."""
    if epoch < config.warmup_epochs:
        return (epoch + 1e-12) / config.warmup_epochs
    if config.schedule == "multi-step":
        return config.gamma ** sum(epoch >= milestone for milestone in config.milestones)
    span = config.epochs - config.warmup_epochs
    if config.schedule == "constant" or span <= 0:
        return 1.0
    done = (epoch - config.warmup_epochs) / span
    left = 0.5 * (1 + math.cos(math.pi * done)) if config.schedule == "cosine" else 1 - done
    end = config.min_lr / config.lr if config.min_lr else 0.0
    return end + (1 - end) * left
