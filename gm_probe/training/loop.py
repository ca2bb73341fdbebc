"""The one training loop: a gradient rule, a torch optimizer, a run folder that can be resumed."""

from __future__ import annotations

import io
import json
import math
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from gm_probe.core.batches import Batches, Normalization
from gm_probe.core.checkpoints import save_checkpoint
from gm_probe.core.datasets import Examples
from gm_probe.core.devices import environment, pick_device
from gm_probe.core.errors import CheckpointError, DivergedError, StorageError, UsageError
from gm_probe.core.files import exclusive, write_atomic, write_json, write_toml
from gm_probe.core.models import ModelSpec, initial_model, logits_of
from gm_probe.core.parameters import evaluating
from gm_probe.core.records import CHECKPOINT, CONFIG, METRICS, SPLIT, STATE, SUMMARY, read_metrics, read_run
from gm_probe.probe.measures import measure
from gm_probe.probe.probe import Settings
from gm_probe.training.augment import crop_and_flip
from gm_probe.training.config import TrainConfig
from gm_probe.training.parts import check_splits, load_splits, split_record
from gm_probe.training.rules import METHODS, Rule

EVAL_BATCH = 500


def make_rule(config: TrainConfig, model: nn.Module, generator: torch.Generator) -> Rule:
    """The gradient rule that ``config`` names, with its options."""
    options: dict[str, Any] = {"m": config.m, "generator": generator}
    if config.rho is not None and config.method != "sgd":
        options["rho"] = config.rho
    if config.method == "asam":
        options["eta"] = config.eta
    if config.method in {"iam-d", "iam-s"}:
        options |= {"k_steps": config.k_steps, "noise_scale": config.noise_scale}
    if config.method == "iam-d":
        options |= {"beta": config.beta, "kl_grad": config.kl_grad}
    if config.method == "iam-s":
        options["sign"] = config.sign

    def criterion(logits: Tensor, y: Tensor) -> Tensor:
        return functional.cross_entropy(logits, y, label_smoothing=config.label_smoothing)

    return METHODS[config.method](model, criterion, **options)


def make_optimizer(config: TrainConfig, model: nn.Module) -> torch.optim.Optimizer:
    """The base optimizer over the trainable parameters."""
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


def lr_factor(config: TrainConfig, epoch: float) -> float:
    """Factor on the base learning rate at ``epoch`` (fractional, from 0): a pure function, so resume is exact."""
    if epoch < config.warmup_epochs:
        return (epoch + 1e-12) / config.warmup_epochs
    if config.schedule == "cosine":
        span = config.epochs - config.warmup_epochs
        return 0.5 * (1 + math.cos(math.pi * (epoch - config.warmup_epochs) / span)) if span > 0 else 1.0
    if config.schedule == "multi-step":
        return config.gamma ** sum(epoch >= milestone for milestone in config.milestones)
    return 1.0


def evaluate(model: nn.Module, batches: Batches) -> tuple[float, float]:
    """Mean cross-entropy in nats (never smoothed) and error rate, in eval mode; the mode is restored."""
    loss, wrong = 0.0, 0
    with evaluating(model), torch.no_grad():
        for batch in batches:
            assert batch.y is not None
            logits = logits_of(model(batch.x)).float()
            loss += float(functional.cross_entropy(logits, batch.y, reduction="sum"))
            wrong += int((logits.argmax(1) != batch.y).sum())
    if not math.isfinite(loss):
        raise DivergedError(f"the cross-entropy over {batches.examples.source} is not finite")
    return loss / batches.num_examples, wrong / batches.num_examples


class Training:
    """One run: its data, model, optimizer and rule, and the epochs it has done."""

    def __init__(self, config: TrainConfig, out: Path) -> None:
        self.config, self.out = config, out
        self.device = pick_device(config.device)
        self.splits = load_splits(config)
        train = self.splits.train
        self.normalization = Normalization.of(train)
        self.spec = ModelSpec(config.model, tuple(train.x.shape[1:]), self.splits.num_classes)
        self.model = initial_model(self.spec, config.seed).to(self.device)
        if train.x.dim() == 4:
            self.model.to(memory_format=torch.channels_last)
        self.optimizer = make_optimizer(config, self.model)
        self.generator = torch.Generator()
        self.rule = make_rule(config, self.model, self.generator)
        self.epoch = 0
        self.train_batches = self._batches(train)
        self.test_batches = self._batches(self.splits.test)

    def _batches(self, examples: Examples) -> Batches:
        return Batches(examples, self.normalization, batch_size=EVAL_BATCH, device=self.device)

    def run_epoch(self) -> dict[str, Any]:
        """Train one epoch and return its metrics row.

        Raises:
            DivergedError: the loss or a weight stopped being finite.
        """
        config, train = self.config, self.splits.train
        began = time.perf_counter()
        # every epoch has a seed of its own: resuming needs no generator's state
        seed = zlib.crc32(f"{config.seed}:{self.epoch}".encode())
        self.generator.manual_seed(seed)
        order = torch.randperm(len(train), generator=self.generator)
        steps = -(-len(train) // config.batch_size)
        total, entropy, wrong, divergence = 0.0, 0.0, 0, 0.0
        self.model.train()
        with torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []):
            torch.manual_seed(seed)  # dropout draws from the global generator
            for step in range(steps):
                chosen = order[step * config.batch_size : (step + 1) * config.batch_size]
                assert train.y is not None
                x, y = train.x[chosen].to(self.device), train.y[chosen].to(self.device)
                if config.augment:
                    x = crop_and_flip(x, self.generator)
                x = self.normalization.apply(x)
                if x.dim() == 4:
                    x = x.contiguous(memory_format=torch.channels_last)
                for group in self.optimizer.param_groups:
                    group["lr"] = config.lr * lr_factor(config, self.epoch + step / steps)
                self.optimizer.zero_grad(set_to_none=True)
                with torch.autocast(self.device.type, torch.bfloat16, enabled=config.amp == "bf16"):
                    seen = self.rule.backward(x, y)
                self.optimizer.step()
                total += float(seen.loss) * len(y)
                entropy += float(functional.cross_entropy(seen.logits.float(), y, reduction="sum"))
                wrong += int((seen.logits.argmax(1) != y).sum())
                if seen.inconsistency is not None:
                    divergence += float(seen.inconsistency) * len(y)
                if not math.isfinite(total):
                    raise DivergedError(
                        f"the training loss is not finite at epoch {self.epoch + 1}, step {step + 1}"
                    )
        bad = next((n for n, p in self.model.named_parameters() if not bool(torch.isfinite(p).all())), None)
        if bad is not None:
            raise DivergedError(f"weight {bad!r} is not finite after epoch {self.epoch + 1}")
        self.epoch += 1
        seconds = time.perf_counter() - began
        row: dict[str, Any] = {
            "epoch": self.epoch,
            "running_loss": total / len(train),
            "running_ce": entropy / len(train),
            "running_error": wrong / len(train),
            "lr": self.optimizer.param_groups[0]["lr"],
            "gradient_evaluations": self.epoch * steps * self.rule.passes / 3,
            "seconds": round(seconds, 3),
            "examples_per_second": round(len(train) / seconds, 1),
        }
        if config.method == "iam-d":
            row["running_inconsistency"] = divergence / len(train)
        return row

    def evaluate_epoch(self, row: dict[str, Any]) -> bool:
        """Add what is due at this epoch to ``row``; True once ``stop_ce`` is met."""
        config = self.config
        due = config.eval_every > 0 and self.epoch % config.eval_every == 0
        # the exact training CE costs a third of an epoch: without augmentation it follows the running CE closely
        close = config.stop_ce is not None and (config.augment or row["running_ce"] <= 3 * config.stop_ce)
        if due or close:
            row["train_ce"], row["train_error"] = evaluate(self.model, self.train_batches)
        if due:
            row["test_ce"], row["test_error"] = evaluate(self.model, self.test_batches)
        if config.track_every > 0 and self.epoch % config.track_every == 0:
            settings = Settings(rho=config.track_rho, noise_scale=config.track_rho, seed=config.seed)
            probe = self._batches(self.splits.unlabeled.unlabeled())
            name = "local_inconsistency"
            estimate = measure(self.model, probe, [name], settings).rows[name]
            row |= {name: estimate.value, f"{name}_stderr": estimate.stderr, f"{name}_rho": config.track_rho}
        return config.stop_ce is not None and row.get("train_ce", math.inf) <= config.stop_ce

    def save_state(self) -> None:
        """Write what resuming needs, atomically."""
        buffer = io.BytesIO()
        torch.save(
            {"epoch": self.epoch, "model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()},
            buffer,
        )
        write_atomic(self.out / STATE, buffer.getvalue())

    def load_state(self) -> None:
        """Go back to the last saved epoch; rows of later epochs are cut from the metrics.

        Raises:
            CheckpointError: the state is broken.
        """
        path = self.out / STATE
        try:
            state = torch.load(path, map_location=self.device, weights_only=True)
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.epoch = int(state["epoch"])
        except Exception as error:  # torch, zipfile and the unpickler raise many kinds on a broken file
            raise CheckpointError(
                f"{path} cannot be resumed from ({error}); remove it to start over"
            ) from error
        rows = [row for row in read_metrics(self.out) if row["epoch"] <= self.epoch]
        write_atomic(self.out / METRICS, "".join(json.dumps(row) + "\n" for row in rows).encode())

    def log(self, row: dict[str, Any]) -> None:
        try:
            with (self.out / METRICS).open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
        except OSError as error:
            raise StorageError(f"cannot write {self.out / METRICS}: {error.strerror}") from error

    def finish(self) -> dict[str, Any]:
        """Evaluate, write the checkpoint and, last of all, the summary; the resume state goes."""
        train_ce, train_error = evaluate(self.model, self.train_batches)
        test_ce, test_error = evaluate(self.model, self.test_batches)
        rows = list(read_metrics(self.out))
        tested = [row["test_error"] for row in rows if "test_error" in row]
        summary = {
            "status": "finished",
            "epochs": self.epoch,
            "met_stop_ce": None if self.config.stop_ce is None else train_ce <= self.config.stop_ce,
            "train_ce": train_ce,
            "train_error": train_error,
            "test_ce": test_ce,
            "test_error": test_error,
            "test_error_min": min([*tested, test_error]),
            "error_gap": test_error - train_error,
            "ce_gap": test_ce - train_ce,
            "num_train": len(self.splits.train),
            "num_test": len(self.splits.test),
            "gradient_evaluations": rows[-1]["gradient_evaluations"],
            "train_seconds": round(sum(row["seconds"] for row in rows), 3),
        }
        save_checkpoint(
            self.out / CHECKPOINT, self.model, self.spec, self.normalization, self.splits.train.classes
        )
        write_json(self.out / SUMMARY, summary)
        (self.out / STATE).unlink(missing_ok=True)
        return summary


def train(
    config: TrainConfig,
    out: Path,
    *,
    resume: bool = False,
    notify: Callable[[dict[str, Any]], None] | None = None,
) -> dict[str, Any]:
    """Train one run into the folder ``out`` and return its summary.

    With ``resume`` a finished run is returned as it is, and an interrupted one goes on from its last epoch, to
    weights bit-identical with an undisturbed run on the same machine, versions and threads.

    Args:
        notify: called with every epoch's metrics row.

    Raises:
        UsageError: ``out`` holds a run already (without ``resume``), or one of other settings.
        DivergedError: the loss or a weight stopped being finite; the summary says ``diverged``.
        DataError, StorageError, CheckpointError: as the parts raise them.
    """
    with exclusive(out):
        done = _earlier(config, out, resume)
        return _train(config, out, notify) if done is None else done


def _earlier(config: TrainConfig, out: Path, resume: bool) -> dict[str, Any] | None:
    """The summary of a run that ``out`` holds already; None where there is something to train."""
    if not (out / CONFIG).exists():
        return None
    if not resume:
        raise UsageError(f"{out} holds a run already; go on with --resume, or choose another --out")
    record = read_run(out)
    recorded, now = TrainConfig.from_record(record.config).identity(), config.identity()
    changed = sorted(key for key in {*recorded, *now} if recorded.get(key) != now.get(key))
    if changed:
        raise UsageError(
            f"{out} was started with another {', '.join(changed)}; repeat its settings to resume"
        )
    if record.status == "diverged":  # it would again: runs are deterministic
        raise DivergedError(str(record.summary.get("reason")))
    return record.summary if record.status == "finished" else None


def _train(config: TrainConfig, out: Path, notify: Callable[[dict[str, Any]], None] | None) -> dict[str, Any]:
    training = Training(config, out)
    if (out / STATE).exists():
        check_splits(training.splits, out)
        training.load_state()
    else:
        write_atomic(out / METRICS, b"")
        write_json(out / SPLIT, split_record(training.splits))
        write_toml(out / CONFIG, {**config.as_dict(), "environment": environment(training.device)})
    stopped = False
    try:
        while training.epoch < config.epochs and not stopped:
            row = training.run_epoch()
            stopped = training.evaluate_epoch(row)
            training.log(row)
            if notify is not None:
                notify(row)
            # after stop_ce nothing is left to train: resuming from here would train on
            if not stopped and training.epoch < config.epochs:
                training.save_state()
        return training.finish()
    except DivergedError as error:
        write_json(out / SUMMARY, {"status": "diverged", "epochs": training.epoch, "reason": str(error)})
        raise
