"""One run: its data and its model, the epochs it has done, and what its folder keeps to resume it."""

from __future__ import annotations

import json
import math
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from gm_probe.data.batches import Batches, placed
from gm_probe.data.examples import Examples
from gm_probe.data.images import decoded_ahead
from gm_probe.data.normalization import Normalization
from gm_probe.errors import DivergedError, UsageError, memory_or, of_machine
from gm_probe.files.atomic import append_line, write_atomic, write_json, write_toml
from gm_probe.files.locks import FolderLock
from gm_probe.files.schema import anything, count, listed, mapping
from gm_probe.models.checkpoints import read_checkpoint, save_checkpoint
from gm_probe.models.layout import settle_layout
from gm_probe.models.pretrained import load_pretrained, others_there
from gm_probe.models.zoo import ModelSpec, check_configured, initial_model
from gm_probe.runs.records import (
    BEST,
    CHECKPOINT,
    CONFIG,
    ERROR,
    METRICS,
    RAW,
    SPLIT,
    STATE,
    SUMMARY,
    read_metrics,
)
from gm_probe.runtime import processes
from gm_probe.runtime.devices import pick_device, upload
from gm_probe.runtime.machine import environment
from gm_probe.runtime.randomness import generators_kept, seed_generators
from gm_probe.runtime.signals import Terminated
from gm_probe.training.config import TrainConfig
from gm_probe.training.evaluation import Evaluation, ProbeEvaluation
from gm_probe.training.methods import METHODS
from gm_probe.training.objectives import OBJECTIVES
from gm_probe.training.rule import Step
from gm_probe.training.run_splits import load_splits, split_record
from gm_probe.training.schedule import lr_factor
from gm_probe.training.state import broken, random_state, read_state, set_random_state, write_state
from gm_probe.training.tracking import Tracking
from gm_probe.training.updates import Updates

EVAL_BATCH = 500
CHECK_EVERY = 20
"""Steps between checks that all is finite, because each check waits for the device."""
PROJECTION = 128
"""Outputs of SimCLR's projector (Chen et al. 2020)."""


@dataclass
class Progress:
    """The progress of the running epoch, in this process.

    Attributes:
        sums: (6 + n,) float64: the number of labeled examples, and the sums over them of loss, cross-entropy and
            errors; the number of those whose step had a KL divergence, and its sum; and the objective's n notes.
        step: number of steps done.
        skipped: number of steps whose gradient overflowed in float16; no sum contains them.
        seconds: time spent before the clock ``began``.
    """

    sums: Tensor
    step: int = 0
    skipped: int = 0
    seconds: float = 0.0
    began: float = 0.0

    @property
    def elapsed(self) -> float:
        return self.seconds + time.perf_counter() - self.began


class Training:
    """One run: its data, its model and its updates, and the epochs and steps it has done.

    The processes of ``torchrun`` share each batch and hold the same weights; only the first one writes.
    """

    def __init__(
        self,
        config: TrainConfig,
        out: Path,
        lock: FolderLock | None = None,
        asked_to_stop: Callable[[], bool] = lambda: False,
    ) -> None:
        self.config, self.out, self.lock, self.asked_to_stop = config, out, lock, asked_to_stop
        self.device = processes.own_device(pick_device(config.device))
        self.splits = load_splits(config)
        train = self.splits.train
        objective, rule = OBJECTIVES[config.objective].load(), METHODS[config.method].rule
        self.sampler = objective.sampler(config, self.splits, rule.compares)
        self.steps = self.sampler.steps
        self.normalization = Normalization.of(self.splits.inputs)
        encoder = config.trains_encoder
        self.spec = ModelSpec(
            config.model,
            tuple(train.x.shape[1:]),
            PROJECTION if encoder else self.splits.num_classes,
            config.temperature if encoder else None,
        )

        def too_big(cause: str) -> str:
            return f"{config.model} does not fit into memory ({cause}). Choose a smaller --model"

        with memory_or(too_big):
            self.model = initial_model(self.spec, config.seed).to(self.device)
        self.fresh: tuple[str, ...] = ()  # names of the weights that --init did not give
        self.not_taken: tuple[str, ...] = ()  # names of other copies of the weights in its file
        if config.init is not None and not (out / STATE).exists():
            given = read_checkpoint(Path(config.init))
            if given.model is None:
                check_configured(config.model)
            self.not_taken = others_there(self.model, given)
            self.fresh = load_pretrained(self.model, given)
        self.channels_last = train.x.dim() == 4 and settle_layout(
            self.model, torch.zeros(2, *train.x.shape[1:], device=self.device)
        )
        with memory_or(too_big):
            self.updates = Updates(config, self.model, self.device, config.epochs * self.steps)
        self.epoch = 0
        self.rows: list[dict[str, Any]] = []
        self.progress = self._no_progress()
        self._random: dict[str, Any] = {}
        self._inputs = placed(self.splits.inputs.x, self.device)
        if train.x is self.splits.inputs.x:  # one copy on the device serves training and evaluation
            train = replace(train, x=self._inputs)
        self.evaluation = (ProbeEvaluation if encoder else Evaluation)(
            config, self._batches(train), self._batches(self.splits.test), self.splits.num_classes
        )
        self.tracking = Tracking(config, self._batches(self.splits.unlabeled.unlabeled()))
        self._writes = processes.rank() == 0
        self._mine = slice(processes.rank(), None, processes.count())  # of every batch

    def _no_progress(self) -> Progress:
        size = 6 + len(self.updates.rule.objective.notes)
        return Progress(torch.zeros(size, dtype=torch.float64, device=self.device))

    def _batches(self, examples: Examples) -> Batches:
        return Batches(
            examples,
            self.normalization,
            batch_size=EVAL_BATCH,
            device=self.device,
            channels_last=self.channels_last,
        )

    def run_epoch(self) -> dict[str, Any]:
        """Train one epoch, or the rest of one, and return its metrics row.

        Raises:
            DivergedError: the loss or a weight stopped being finite.
        """
        self.progress.began = time.perf_counter()
        seed = zlib.crc32(f"{self.config.seed}:{self.epoch}".encode())
        draws = torch.Generator().manual_seed(seed)
        dealt = self.sampler.deal(draws)
        self.model.train()
        with generators_kept(self.device):
            seed_generators(seed + processes.rank())  # dropout draws from the global generators
            if self.progress.step == 0:
                self.updates.seed(draws, seed)
            else:
                set_random_state(self._random, self.device)
            left = dealt[self.progress.step :]
            mine: Sequence[Tensor] = [chosen[self._mine] for chosen in left]
            labels = self._ahead([self.sampler.labels(part) for part in mine])
            if self._inputs is not self.splits.inputs.x:  # they are on the device
                mine = self._ahead(mine)
            for chosen, x, y in zip(left, decoded_ahead(self._inputs, mine), labels, strict=True):
                self._step(chosen, x, y)
                self._report_progress()
                done = self.epoch * self.steps + self.progress.step
                every = self.config.checkpoint_every
                last = self.progress.step == self.steps
                stop = not last and self.stop_everywhere(False)
                if stop or (not last and (every is not None and done % every == 0)):
                    self._check()
                    self.save_state()
                if stop:
                    raise self.terminated()
        self._check()
        row = self._row()
        self.epoch += 1
        self.progress = self._no_progress()
        return row

    def stop_everywhere(self, now: bool = True) -> bool:
        """Return whether any process got SIGTERM. Processes ask at the same steps, so that all stop together."""
        if processes.count() == 1:
            return self.asked_to_stop()
        due = now or self.progress.step % CHECK_EVERY == 0
        return due and not processes.everywhere(not self.asked_to_stop(), self.device)

    def terminated(self) -> Terminated:
        return Terminated(
            f"terminated in epoch {self.epoch + 1} after step {self.progress.step}; the state is saved. "
            f"Continue with --out {self.out} --resume"
        )

    def _ahead(self, parts: Sequence[Tensor]) -> Sequence[Tensor]:
        """Return each step's part on the device, from one copy per epoch, so that no step waits."""
        return upload(torch.cat([*parts]), self.device).split([len(part) for part in parts])

    def _step(self, chosen: Tensor, x: Tensor, y: Tensor) -> None:
        config, progress = self.config, self.progress
        x = self._batch(chosen, x)
        lr = config.lr * lr_factor(config, self.epoch + progress.step / self.steps)
        seen, skipped = self.updates.step(x, y, lr)
        if skipped:
            progress.skipped += 1
        else:
            progress.sums += self._sums(seen, y)
        progress.step += 1
        if skipped or progress.step % CHECK_EVERY == 0:
            self._check_loss(seen.loss)

    def _report_progress(self) -> None:
        if self.lock is not None:
            self.lock.report_progress(
                "training", self.epoch + self.progress.step / self.steps, self.config.epochs, self._so_far
            )

    def _so_far(self) -> dict[str, Any]:
        """Return the progress within the running epoch, with this process's loss."""
        examples, loss = self.progress.sums[:2].tolist()
        step = {"epoch": self.epoch + 1, "step": self.progress.step, "steps": self.steps}
        return {**step, "loss": loss / examples if examples else None}

    def _batch(self, chosen: Tensor, x: Tensor) -> Tensor:
        """Return this process's part of a batch on the device, augmented and normalised."""
        x = self.sampler.views(upload(x, self.device), chosen, self._mine, self.updates.generator)
        x = self.normalization.apply(x)
        return x.contiguous(memory_format=torch.channels_last) if self.channels_last else x

    def _sums(self, seen: Step, y: Tensor) -> Tensor:
        objective, loss = self.updates.rule.objective, seen.loss.double() * len(y)
        entropy = loss
        labeled = seen.logits[: len(y)]
        if self.config.label_smoothing or objective.two_losses:
            entropy = functional.cross_entropy(labeled.float(), y, reduction="sum").double()
        wrong = (labeled.argmax(1) != y).sum().double()
        examples = torch.full_like(loss, len(y))
        divergence = [torch.zeros_like(loss)] * 2
        if seen.inconsistency is not None:
            divergence = [examples, (seen.inconsistency * len(y)).double()]
        noted = [value.double() * len(y) for value in objective.noted(seen.logits, y)]
        return torch.stack([examples, loss, entropy, wrong, *divergence, *noted])

    def _check_loss(self, loss: Tensor) -> None:
        finite = math.isfinite(float(self.progress.sums.sum() + loss))
        if not processes.everywhere(finite, self.device):
            raise DivergedError(
                f"the training loss is not finite at epoch {self.epoch + 1}, step {self.progress.step} "
                f"(checked every {CHECK_EVERY} steps)"
            )

    def _check(self) -> None:
        """Raise DivergedError unless all values are finite, so that nothing else is ever saved."""
        self._check_loss(torch.zeros((), device=self.device))
        where = f"after epoch {self.epoch + 1}, step {self.progress.step}"
        saved = self.updates.tensors()
        finite = torch.stack(
            [_finite(value, mask=name.startswith("buffer")) for name, value in saved.items()]
        )
        if not bool(finite.all()):
            first = list(saved)[finite.tolist().index(False)]
            raise DivergedError(f"{first} is not finite {where}")
        if self.progress.skipped == self.steps:
            raise DivergedError(f"every gradient overflowed in float16 {where}; use --amp bf16")

    def _row(self) -> dict[str, Any]:
        sums = processes.sum_over_processes(self.progress.sums).tolist()
        examples, loss, entropy, wrong, compared, divergence, *noted = sums
        seconds, rule = self.progress.elapsed, self.updates.rule
        row: dict[str, Any] = {
            "epoch": self.epoch + 1,
            "running_loss": loss / examples,
            **self.evaluation.running(entropy / examples, wrong / examples),
            "lr": self.updates.optimizer.param_groups[0]["lr"],
            "gradient_evaluations": rule.cost((self.epoch + 1) * self.steps) * self.sampler.rows / 3,
            "seconds": round(seconds, 3),
            "examples_per_second": round(self.sampler.examples / seconds, 1),
        }
        row |= {name: value / examples for name, value in zip(rule.objective.notes, noted, strict=True)}
        if compared:
            row["running_inconsistency"] = divergence / compared
        if self.config.amp == "fp16":
            row["skipped_steps"] = self.progress.skipped
        return row

    def evaluate_epoch(self, row: dict[str, Any]) -> bool:
        """Add the results that are due at this epoch to ``row``; return True once ``stop_ce`` is met."""
        config, model = self.config, self.updates.result
        row |= self.evaluation.of_epoch(self.epoch, model)
        if "test_error" in row:
            self._keep_best(row["test_error"])
        row |= self.tracking.of_epoch(self.epoch, model)
        return config.stop_ce is not None and row.get("train_ce", math.inf) <= config.stop_ce

    def _keep_best(self, test_error: float) -> None:
        if test_error < min(Evaluation.tested(self.rows), default=math.inf):
            self._save(BEST)

    def _save(self, name: str, model: nn.Module | None = None) -> None:
        if self._writes:
            classes = self.splits.train.classes
            model = model or self.updates.result
            save_checkpoint(self.out / name, model, self.spec, self.normalization, classes)

    def log(self, row: dict[str, Any]) -> None:
        self.rows.append(row)
        if self._writes:
            append_line(self.out / METRICS, json.dumps(row))

    def save_state(self) -> None:
        """Write the state for resuming, atomically."""
        progress = self.progress
        state = {
            "epoch": self.epoch,
            "step": progress.step,
            "sums": processes.from_all(progress.sums.cpu()),
            "skipped": progress.skipped,
            "seconds": progress.elapsed if progress.step else 0.0,
            "random": processes.from_all(random_state(self.device)),
            "model": self.model.state_dict(),
            **self.updates.state_dict(),
        }
        if self._writes:
            write_state(self.out / STATE, state)

    def load_state(self) -> None:
        """Go back to the last saved epoch or step, and cut the rows of later epochs from the metrics.

        Raises:
            CheckpointError: the state is broken.
            UsageError: another number of processes wrote it.
        """
        path = self.out / STATE
        state = read_state(path)
        try:
            states = state["random"]
            if len(states) != processes.count():
                raise UsageError(
                    f"{self.out} was trained by {len(states)} process(es). Resume it with the same number"
                )
            self._require_sound(state)
            self.model.load_state_dict(state["model"])
            self.updates.load_state_dict(state)
            self.epoch = state["epoch"]
            if state["step"]:
                sums = state["sums"][processes.rank()].to(self.device)
                if sums.shape != self.progress.sums.shape:
                    raise ValueError("it is of another release of gm_probe")
                self.progress = Progress(sums, state["step"], state["skipped"], float(state["seconds"]))
                if self.progress.step > self.progress.skipped and not float(sums[0]) > 0:
                    raise ValueError("it has sums over no examples")
                self._random = states[processes.rank()]
        except UsageError:
            raise
        except Exception as error:  # torch raises many kinds on what does not fit
            if of_machine(error):
                raise
            raise broken(path, error) from error
        self.rows = [row for row in read_metrics(self.out, ["seconds"]) if row["epoch"] <= self.epoch]
        processes.wait_for_all()  # until all have read the file that the first one now writes
        if self._writes:
            write_atomic(self.out / METRICS, "".join(json.dumps(row) + "\n" for row in self.rows).encode())

    def _require_sound(self, state: Mapping[str, Any]) -> None:
        """Raise ValueError where a value of ``state`` has another type than training needs."""
        for name in ("epoch", "step", "skipped"):
            count(state[name], name)
        mapping(anything)(state["rule"], "rule")
        count(state["rule"]["steps"], "rule.steps")
        listed(mapping(anything))([*state["optimizer"]["state"].values()], "optimizer.state")
        if state["epoch"] > self.config.epochs:
            raise ValueError(f"epoch {state['epoch']} of {self.config.epochs}")

    def begin(self) -> None:
        """Write the settings, the split and the machine of the run."""
        if self._writes:
            machine = {**environment(self.device, tf32=self.config.tf32), "processes": processes.count()}
            machine["noise"] = self.updates.noise.device.type  # the device that draws the noise
            if self.config.init is not None:
                machine["fresh_weights"] = list(self.fresh)
                machine |= {"init_not_taken": list(self.not_taken)} if self.not_taken else {}
            write_atomic(self.out / METRICS, b"")
            write_json(self.out / SPLIT, split_record(self.splits))
            write_toml(self.out / CONFIG, {**self.config.as_dict(), "environment": machine})

    def finish(self) -> dict[str, Any]:
        """Evaluate, write the checkpoint and, last of all, the summary, and remove the state for resuming."""
        results = self.evaluation.of_run(self.rows, self.updates.result)
        if self.config.eval_every > 0:
            self._keep_best(results["test_error"])
        summary = {
            "status": "finished",
            "epochs": self.epoch,
            **results,
            "num_train": len(self.splits.train),
            "num_test": len(self.splits.test),
            "gradient_evaluations": self.rows[-1]["gradient_evaluations"],
            "train_seconds": round(sum(row["seconds"] for row in self.rows), 3),
        }
        if self.config.labels is not None:
            summary["num_unlabeled_train"] = len(self.splits.inputs) - len(self.splits.train)
        if self.config.ema_decay is not None:
            self._save(RAW, self.model)
        self._save(CHECKPOINT)
        if self._writes:
            write_json(self.out / SUMMARY, summary)
            for past in (STATE, ERROR):  # ERROR: why an earlier try failed
                (self.out / past).unlink(missing_ok=True)
        return summary


def _finite(value: Tensor, *, mask: bool) -> Tensor:
    """Return whether all values are finite (0-dim); −∞ counts as finite where it may be a ``mask`` of attention."""
    fine = torch.isfinite(value)
    return (fine | torch.isneginf(value) if mask and value.is_floating_point() else fine).all()
