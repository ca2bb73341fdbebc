"""The updates of a model's weights: everything between a batch and the new weights."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.nn import functional
from torch.nn.utils import clip_grad_norm_
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from gm_probe.runtime.devices import generator_on
from gm_probe.runtime.processes import average_over_processes
from gm_probe.training.config import TrainConfig
from gm_probe.training.methods import METHODS
from gm_probe.training.objectives import OBJECTIVES
from gm_probe.training.rule import Rule, Step

HALVES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def make_rule(
    config: TrainConfig, model: nn.Module, generator: torch.Generator, steps: int | None = None
) -> Rule:
    """Return the gradient rule of a run with its options and its objective; ``steps`` is the run's number of steps."""

    def criterion(logits: Tensor, y: Tensor) -> Tensor:  # label smoothing applies to the labeled loss alone
        return functional.cross_entropy(logits, y, label_smoothing=config.label_smoothing)

    objective = OBJECTIVES[config.objective].load().of(config, criterion)
    objective.is_mean = True
    method = METHODS[config.method]
    given = {name: getattr(config, name) for name in method.settings}
    options = {name: value for name, value in given.items() if value is not None}
    rule: Rule = method(model, objective, m=config.m, total_steps=steps, generator=generator, **options)
    return rule


def make_optimizer(config: TrainConfig, model: nn.Module) -> torch.optim.Optimizer:
    """Return the base optimizer over the trainable parameters."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    if config.optimizer == "adamw":
        return torch.optim.AdamW(trainable, lr=config.lr, weight_decay=config.weight_decay)
    return torch.optim.SGD(
        trainable,
        lr=config.lr,
        momentum=config.momentum,
        nesterov=config.nesterov,
        weight_decay=config.weight_decay,
    )


class Updates:
    """Gradient rule, autocast, loss scaling, clipping, optimizer and the running average of the weights."""

    def __init__(self, config: TrainConfig, model: nn.Module, device: torch.device, steps: int) -> None:
        self.config, self.model, self.device = config, model, device
        self.generator = torch.Generator()  # for the views, always on the CPU
        there = generator_on(device) if config.noise_device == "device" else self.generator
        self.noise = self.generator if there.device.type == "cpu" else there
        self.rule = make_rule(config, model, self.noise, steps)
        self.optimizer = make_optimizer(config, model)
        self.scaler = GradScaler(device.type, enabled=config.amp == "fp16")
        self.average: AveragedModel | None = None
        if config.ema_decay is not None:
            # buffers are not averaged: torch would average integer ones, too, and round them down
            self.average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(config.ema_decay))

    @property
    def result(self) -> nn.Module:
        """The model that is evaluated and saved: the running average where there is one."""
        return self.model if self.average is None else self.average.module

    def step(self, x: Tensor, y: Tensor, lr: float) -> tuple[Step, bool]:
        """Update the weights on one batch.

        Returns:
            What the rule saw, and whether the scaler skipped the update because the gradient overflowed in float16.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.zero_grad(set_to_none=True)
        with torch.autocast(self.device.type, HALVES.get(self.config.amp), enabled=self.config.amp in HALVES):
            seen = self.rule.backward(x, y, scaler=self.scaler if self.scaler.is_enabled() else None)
        self.scaler.unscale_(self.optimizer)
        if self.config.clip_norm is not None:
            clip_grad_norm_(self.model.parameters(), self.config.clip_norm)
        before = self.scaler.get_scale()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        skipped = self.scaler.get_scale() < before
        average_over_processes([b for b in self.model.buffers() if b.is_floating_point()])
        if self.average is not None and not skipped:
            self.average.update_parameters(self.model)
        return seen, skipped

    def tensors(self) -> dict[str, Tensor]:
        """Return all tensors of a state on this device, by the names that an error calls them."""
        named = dict(self.model.named_parameters())
        found: dict[str, Tensor] = {f"weight {name!r}": p for name, p in named.items()}
        found |= {f"buffer {name!r}": value for name, value in self.model.named_buffers()}
        if self.average is not None:
            average = self.average.module.named_parameters()
            found |= {f"the average of weight {name!r}": value for name, value in average}
        names: dict[Tensor, str] = {p: name for name, p in named.items()}
        for weight, state in self.optimizer.state.items():
            found |= {
                f"the optimizer's {key} of {names[weight]!r}": value.to(self.device)
                for key, value in state.items()
                if isinstance(value, Tensor)
            }
        return found

    def seed(self, draws: torch.Generator, seed: int) -> None:
        """Begin an epoch with the state of ``draws`` on the CPU, and with ``seed`` for noise drawn on the device."""
        if self.noise is not self.generator:
            self.noise.manual_seed(seed)
        self.generator.set_state(draws.get_state())

    def state_dict(self) -> dict[str, Any]:
        return {
            "draws": self.generator.get_state(),
            "noise": self.noise.device.type,
            "optimizer": self.optimizer.state_dict(),
            "rule": self.rule.state_dict(),
            "scaler": self.scaler.state_dict(),
            "average": None if self.average is None else self.average.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.optimizer.load_state_dict(state["optimizer"])
        self.rule.load_state_dict({**state["rule"], "generator": self._noise_state(state)})
        self.scaler.load_state_dict(state["scaler"])
        if self.average is not None:
            self.average.load_state_dict(state["average"])

    def _noise_state(self, state: Mapping[str, Any]) -> Tensor:
        """Restore the generator of the views, and return the state from which the noise continues.

        The generator of another type of device cannot take the saved state, so it is seeded from it.
        """
        drawn, draws = state["rule"]["generator"].cpu(), state["draws"].cpu()
        self.generator.set_state(draws)
        if self.noise is self.generator:
            return draws
        if state["noise"] == self.noise.device.type:
            return drawn
        return self.noise.manual_seed(zlib.crc32(drawn.numpy().tobytes())).get_state()
