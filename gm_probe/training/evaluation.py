"""How a run's weights are evaluated, during training and at its end: a classifier's, and a SimCLR encoder's."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from gm_probe.data.batches import Batches
from gm_probe.data.memory import within_memory
from gm_probe.errors import DivergedError
from gm_probe.models.contrastive import Contrastive
from gm_probe.models.parameters import evaluating
from gm_probe.models.zoo import logits_at
from gm_probe.runtime import processes
from gm_probe.training.config import TrainConfig
from gm_probe.training.linear_probe import linear_probe

DIVERGED = 10.0
"""A run counts as diverged if its training cross-entropy is above this many times that of a uniform guess."""

Results = dict[str, Any]


def evaluate(model: nn.Module, batches: Batches) -> tuple[float, float]:
    """Return mean cross-entropy in nats (never smoothed) and error rate, in eval mode; the mode is restored.

    Each process evaluates its share, and all return the result for the whole. Where memory runs out, ``batches`` have
    half the size from then on.
    """
    found = evaluate_within(model, batches, math.inf)
    assert found is not None
    return found


def evaluate_within(model: nn.Module, batches: Batches, limit: float) -> tuple[float, float] | None:
    """Return what ``evaluate`` returns, if the cross-entropy is at most ``limit``.

    Otherwise return None, mostly after a few batches: terms are never negative, so a sum that is too large stays so.
    """
    count = batches.num_examples
    (loss, errors), fitting = within_memory(batches, lambda batches: _sums(model, batches, limit * count))
    batches.batch_size = fitting.batch_size
    return (loss / count, errors / count) if loss / count <= limit else None


def _sums(model: nn.Module, batches: Batches, limit: float) -> tuple[float, float]:
    """Return the sums of cross-entropy and errors, or of some examples only where the first exceeds ``limit``."""
    sums = torch.zeros(2, dtype=torch.float64, device=batches.device)  # they stay there until the pass ends
    with evaluating(model), torch.no_grad():
        for batch in batches.shard(processes.rank(), processes.count()):
            assert batch.y is not None
            logits = logits_at(model, batch.x).float()
            loss = functional.cross_entropy(logits, batch.y, reduction="sum")
            sums += torch.stack([loss.double(), (logits.argmax(1) != batch.y).sum().double()])
            if limit < math.inf and float(sums[0]) > limit:
                break
    loss, errors = processes.sum_over_processes(sums).tolist()
    if not math.isfinite(loss):
        raise DivergedError(f"the cross-entropy over {batches.examples.source} is not finite")
    return loss, errors


class Evaluation:
    """A classifier's cross-entropy and error on the training and test parts, without augmentation.

    Args:
        train, test: labeled batches.
        classes: number of classes.
    """

    def __init__(self, config: TrainConfig, train: Batches, test: Batches, classes: int) -> None:
        self.config, self.train, self.test, self.classes = config, train, test, classes

    def running(self, entropy: float, error: float) -> Results:
        """Return an epoch's mean cross-entropy and error of the labeled rows, as its steps saw them."""
        return {"running_ce": entropy, "running_error": error}

    def of_epoch(self, epoch: int, model: nn.Module) -> Results:
        """Return the results that are due after ``epoch``, and the training part's where they meet ``stop_ce``."""
        stop_ce, every = self.config.stop_ce, self.config.eval_every
        due = every > 0 and epoch % every == 0
        train = test = None
        if due:
            train, test = evaluate(model, self.train), evaluate(model, self.test)
        elif stop_ce is not None:
            train = evaluate_within(model, self.train, stop_ce)
        results: Results = {}
        for part, found in (("train", train), ("test", test)):
            if found is not None:
                results |= {f"{part}_ce": found[0], f"{part}_error": found[1]}
        return results

    def of_run(self, rows: Sequence[Mapping[str, Any]], model: nn.Module) -> Results:
        """Return the results for the summary.

        Raises:
            DivergedError: the training loss is far above a uniform guess's, though all values are finite.
        """
        train_ce, train_error = evaluate(model, self.train)
        self._check_end(train_ce, rows[-1]["running_ce"])
        test_ce, test_error = evaluate(model, self.test)
        stop_ce = self.config.stop_ce
        return {
            "met_stop_ce": None if stop_ce is None else train_ce <= stop_ce,
            "train_ce": train_ce,
            "train_error": train_error,
            "test_ce": test_ce,
            "test_error": test_error,
            "test_error_min": min([*self.tested(rows), test_error]),
            "error_gap": test_error - train_error,
            "ce_gap": test_ce - train_ce,
        }

    @staticmethod
    def tested(rows: Sequence[Mapping[str, Any]]) -> list[float]:
        return [row["test_error"] for row in rows if "test_error" in row]

    def _check_end(self, train_ce: float, running_ce: float) -> None:
        """Raise where both losses are too large: after a few steps, BatchNorm's running statistics may be far off."""
        guess = math.log(max(2, self.classes))
        if min(train_ce, running_ce) > DIVERGED * guess:
            raise DivergedError(
                f"the training cross-entropy ended at {train_ce:.3g}, more than {DIVERGED:g} times a "
                f"uniform guess's {guess:.3g}. Lower the learning rate"
            )


class ProbeEvaluation(Evaluation):
    """A SimCLR encoder's linear probe. Without a head for classes it has no cross-entropy, error or gap of its own."""

    def running(self, entropy: float, error: float) -> Results:
        """Return NT-Xent, and the share of views whose partner is not the nearest view."""
        return {"running_nt_xent": entropy, "running_partner_error": error}

    def of_epoch(self, epoch: int, model: nn.Module) -> Results:
        every = self.config.probe_every
        return self._of_linear_probe(model) if every > 0 and epoch % every == 0 else {}

    def of_run(self, rows: Sequence[Mapping[str, Any]], model: nn.Module) -> Results:
        results = self._of_linear_probe(model)
        tested = [row["probe_test_error"] for row in rows if "probe_test_error" in row]
        return {
            "nt_xent": rows[-1]["running_nt_xent"],
            **results,
            "probe_test_error_min": min([*tested, results["probe_test_error"]]),
        }

    def _of_linear_probe(self, model: nn.Module) -> Results:
        assert isinstance(model, Contrastive)
        return dict(linear_probe(model, self.train, self.test, classes=self.classes, seed=self.config.seed))
