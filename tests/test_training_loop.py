"""The training loop on a few digits: it learns, resumes bit for bit, refuses, and keeps labels apart."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from gm_probe.data.batches import Batches
from gm_probe.data.datasets import open_source
from gm_probe.errors import BusyError, CheckpointError, DataError, DivergedError, UsageError
from gm_probe.files.locks import exclusive
from gm_probe.models.checkpoints import read_checkpoint
from gm_probe.runs.records import BEST, CHECKPOINT, SPLIT, STATE, read_metrics, read_run
from gm_probe.training import run_splits
from gm_probe.training.config import TrainConfig
from gm_probe.training.evaluation import evaluate, evaluate_within
from gm_probe.training.loop import train
from gm_probe.training.methods import METHODS
from gm_probe.training.rule import Rule, Step
from gm_probe.training.run import Training
from gm_probe.training.run_splits import load_splits, own_unlabeled
from gm_probe.training.schedule import lr_factor
from gm_probe.training.updates import Updates, make_optimizer

BASE: dict[str, Any] = {
    "data": "digits",
    "model": "mlp-16",
    "num_train": 200,
    "num_unlabeled": 60,
    "num_test": 80,
    "epochs": 3,
    "batch_size": 64,
    "lr": 0.1,
    "device": "cpu",
}


def config(**changes: Any) -> TrainConfig:
    return TrainConfig.from_dict({**BASE, **changes})


def rows(out: Path) -> list[dict[str, Any]]:
    """Metrics without what differs from run to run."""
    timing = {"seconds", "examples_per_second"}
    return [{k: v for k, v in row.items() if k not in timing} for row in read_metrics(out)]


class Interrupted(Exception):
    pass


def train_until(epoch: int, settings: TrainConfig, out: Path) -> None:
    """Train until ``epoch`` is reported, when the run breaks down."""

    def notify(row: dict[str, Any]) -> None:
        if row["epoch"] == epoch:
            raise Interrupted

    with pytest.raises(Interrupted):
        train(settings, out, resume=True, notify=notify)
    assert read_run(out).status == "unfinished"


def train_until_step(number: int, settings: TrainConfig, out: Path) -> None:
    """Train until step ``number`` of a run begins, when it breaks down."""
    step, done = Training._step, 0

    def interrupted(self: Training, *batch: Tensor) -> None:
        nonlocal done
        done += 1
        if done == number:
            raise Interrupted
        step(self, *batch)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Training, "_step", interrupted)
        with pytest.raises(Interrupted):
            train(settings, out)


def train_interrupted(settings: TrainConfig, out: Path, *epochs: int) -> dict[str, Any]:
    """Train with a breakdown as each of ``epochs`` is reported, resuming after each."""
    for epoch in epochs:
        train_until(epoch, settings, out)
    return train(settings, out, resume=True)


# learning


@pytest.mark.parametrize("method", METHODS)
def test_learns(method: str, tmp_path: Path) -> None:
    summary = train(config(method=method, num_train=600, epochs=8), tmp_path)
    assert summary["status"] == "finished"
    assert summary["train_error"] < 0.15
    assert summary["test_error"] < 0.25
    running = [row["running_loss"] for row in rows(tmp_path)]
    assert running[-1] < running[0] / 2


def test_summary_is_the_checkpoint_evaluated_by_hand(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    summary = train(config(epochs=5, eval_every=2), tmp_path)
    weights = {name: t.double() for name, t in load_file(tmp_path / CHECKPOINT).items()}
    digits = open_source("digits", labeled=True).pool
    assert digits.y is not None
    indices = json.loads((tmp_path / SPLIT).read_text())
    train_x = digits.x[indices["train"]].double() / 255
    mean, std = train_x.mean(), train_x.std(correction=0)
    for part in ("train", "test"):
        x = ((digits.x[indices[part]].double() / 255 - mean) / std).flatten(1)
        y = digits.y[indices[part]]
        hidden = (x @ weights["1.weight"].T + weights["1.bias"]).clamp(min=0)
        z = hidden @ weights["3.weight"].T + weights["3.bias"]
        ce = -(z - z.exp().sum(1, keepdim=True).log())[torch.arange(len(y)), y].mean()
        assert summary[f"{part}_ce"] == pytest.approx(float(ce), rel=1e-5)
        assert summary[f"{part}_error"] == pytest.approx(float((z.argmax(1) != y).double().mean()))
    assert summary["error_gap"] == pytest.approx(summary["test_error"] - summary["train_error"])
    assert summary["ce_gap"] == pytest.approx(summary["test_ce"] - summary["train_ce"])
    tested = [row["test_error"] for row in rows(tmp_path) if "test_error" in row]
    assert len(tested) == 2
    assert summary["test_error_min"] == min([*tested, summary["test_error"]])


def test_every_epoch_sees_every_example_once_in_a_new_order(tmp_path: Path) -> None:
    training = Training(config(batch_size=48), tmp_path)
    backward, seen = training.updates.rule.backward, []

    def watch(x: Tensor, y: Tensor, scaler: None) -> Step:
        seen.append(x.flatten(1))
        return backward(x, y)

    training.updates.rule.backward = watch  # type: ignore[method-assign]
    orders = []
    for _ in range(2):
        seen.clear()
        training.run_epoch()
        assert [len(x) for x in seen] == [48, 48, 48, 48, 8]
        orders.append(torch.cat(seen))
    assert not torch.equal(orders[0], orders[1])
    stored = training.normalization.apply(training.splits.train.x).flatten(1)
    for order in [orders[0], orders[1]]:
        assert sorted(order.tolist()) == sorted(stored.tolist())


@pytest.mark.parametrize(
    ("method", "changes", "units"),
    [("sgd", {}, 3), ("sam", {}, 6), ("iam-d", {"k_steps": 2}, 12), ("iam-s", {"sign": "loss"}, 9)],
)
def test_gradient_evaluations(method: str, changes: dict[str, Any], units: int, tmp_path: Path) -> None:
    summary = train(config(method=method, **changes, epochs=2), tmp_path)
    assert summary["gradient_evaluations"] == pytest.approx(2 * 4 * units / 3)


# resuming

RESUMED = {
    **{method: {"method": method} for method in METHODS},
    "every and tail": {"method": "iam-d-onepass", "every": 2, "tail": 0.8},
    "adamw": {"optimizer": "adamw", "lr": 0.01, "method": "iam-d"},
    "cosine": {"schedule": "cosine", "warmup_epochs": 1.0},
    "multi-step": {"schedule": "multi-step", "milestones": [1, 3]},
    "augmented": {"augment": True, "model": "6cnn", "num_train": 80, "batch_size": 16},
    "batch norm": {"model": "wrn-10-1", "method": "iam-s", "num_train": 48, "batch_size": 10},
    "evaluated and tracked": {"eval_every": 2, "track_every": 1, "method": "sam", "m": 32},
    "averaged and clipped": {"ema_decay": 0.8, "clip_norm": 0.5, "schedule": "linear", "min_lr": 0.01},
    "fp16": {"amp": "fp16", "method": "iam-d"},
    "one pass, bf16": {"amp": "bf16", "method": "iam-d-onepass", "m": 20},
    "dropout": {"model": f"{Path(__file__).parent / 'networks.py'}:dropout_mlp", "method": "iam-d"},
}


@pytest.mark.parametrize("name", RESUMED)
def test_resumed_run_is_bit_identical(name: str, tmp_path: Path) -> None:
    settings = config(**{"epochs": 4, "weight_decay": 1e-3, **RESUMED[name]})
    straight = train(settings, tmp_path / "straight")
    broken = train_interrupted(settings, tmp_path / "broken", 1, 3, 4)
    assert (tmp_path / "broken" / CHECKPOINT).read_bytes() == (
        tmp_path / "straight" / CHECKPOINT
    ).read_bytes()
    assert rows(tmp_path / "broken") == rows(tmp_path / "straight")
    assert {**broken, "train_seconds": 0} == {**straight, "train_seconds": 0}
    assert not (tmp_path / "broken" / STATE).exists()


@pytest.mark.parametrize("name", RESUMED)
def test_resumed_from_within_an_epoch(name: str, tmp_path: Path) -> None:
    """A run that breaks off at every second step or so; how often it saves does not change what it computes."""
    settings = config(**{"epochs": 2, "weight_decay": 1e-3, "batch_size": 40, **RESUMED[name]})
    straight = train(settings, tmp_path / "straight")
    every = 1 if RESUMED[name].get("method") == "iam-d" else 3
    broken = settings.replace(checkpoint_every=every)
    batch, taken = Training._batch, 0
    within: list[int] = []

    def interrupted(self: Training, chosen: Tensor, x: Tensor) -> Tensor:
        nonlocal taken
        taken += 1
        if taken > every + 1:
            raise Interrupted
        return batch(self, chosen, x)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Training, "_batch", interrupted)
        while True:
            taken = 0
            try:
                result = train(broken, tmp_path / "broken", resume=True)
                break
            except Interrupted:
                if (tmp_path / "broken" / STATE).exists():
                    within.append(torch.load(tmp_path / "broken" / STATE, weights_only=True)["step"])
    assert len(within) >= 2
    assert max(within) > 0
    files = [tmp_path / run / CHECKPOINT for run in ("broken", "straight")]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert rows(tmp_path / "broken") == rows(tmp_path / "straight")
    assert {**result, "train_seconds": 0} == {**straight, "train_seconds": 0}


def test_leftovers_of_a_killed_write_are_removed(tmp_path: Path) -> None:
    train_until(1, config(), tmp_path)
    left = tmp_path / f".{STATE}.gmprobe-node.7.0123abcd.tmp"
    left.write_bytes(b"half")
    train(config(), tmp_path, resume=True)
    assert not left.exists()
    (tmp_path / STATE).write_bytes(b"the last kill came between summary and this")
    assert train(config(), tmp_path, resume=True)["status"] == "finished"
    assert not (tmp_path / STATE).exists()


def test_state_of_other_processes_is_refused(tmp_path: Path) -> None:
    train_until(2, config(), tmp_path)
    state = torch.load(tmp_path / STATE, weights_only=True)
    torch.save({**state, "random": state["random"] * 2}, tmp_path / STATE)
    with pytest.raises(UsageError, match="2 process"):
        train(config(), tmp_path, resume=True)


@pytest.mark.parametrize("content", [b"", b"no zip", None], ids=["empty", "text", "another model"])
def test_broken_state_is_named(content: bytes | None, tmp_path: Path) -> None:
    train_until(2, config(), tmp_path)
    if content is None:
        state = torch.load(tmp_path / STATE, weights_only=True)
        torch.save({**state, "model": {}}, tmp_path / STATE)
    else:
        (tmp_path / STATE).write_bytes(content)
    with pytest.raises(CheckpointError, match=r"state\.pt cannot be resumed from"):
        train(config(), tmp_path, resume=True)


@pytest.mark.parametrize(
    "lie",
    [
        {"epoch": -1},
        {"epoch": "1"},
        {"step": 3.5},
        {"step": 1},
        {"skipped": True},
        {"skipped": "x"},
        {"epoch": 10**30},
        {"epoch": None},
        {"sums": [], "step": 1},
        {"sums": [torch.ones(5, dtype=torch.float64)], "step": 1},
        {"rule": torch.ones(3)},
        {"rule": {"steps": "x"}},
        {"optimizer": {"state": {0: 1}}},
    ],
    ids=str,
)
def test_a_state_that_lies_is_named(lie: dict[str, Any], tmp_path: Path) -> None:
    train_until(2, config(), tmp_path)
    state = torch.load(tmp_path / STATE, weights_only=True)
    nested = {
        key: {**state[key], **value} if isinstance(value, dict) else value for key, value in lie.items()
    }
    torch.save({**state, **nested}, tmp_path / STATE)
    with pytest.raises(CheckpointError, match=r"state\.pt cannot be resumed from"):
        train(config(), tmp_path, resume=True)


def test_torn_last_line_of_the_metrics(tmp_path: Path) -> None:
    settings = config(epochs=4)
    train_until(3, settings, tmp_path / "torn")
    metrics = tmp_path / "torn" / "metrics.jsonl"
    metrics.write_bytes(metrics.read_bytes()[:-20])
    train(settings, tmp_path / "torn", resume=True)
    train(settings, tmp_path / "whole")
    assert rows(tmp_path / "torn") == rows(tmp_path / "whole")


def test_finished_run_is_returned_as_it_is(tmp_path: Path) -> None:
    summary = train(config(), tmp_path)
    before = (tmp_path / CHECKPOINT).stat().st_mtime_ns
    assert train(config(), tmp_path, resume=True) == summary
    assert (tmp_path / CHECKPOINT).stat().st_mtime_ns == before


def test_existing_run_is_refused_without_resume(tmp_path: Path) -> None:
    train(config(epochs=1), tmp_path)
    with pytest.raises(UsageError, match="--resume"):
        train(config(epochs=1), tmp_path)


def test_changed_settings_are_named(tmp_path: Path) -> None:
    train(config(epochs=1), tmp_path)
    with pytest.raises(UsageError, match=r"a different lr, rho\."):
        train(config(epochs=1, lr=0.2, rho=0.3), tmp_path, resume=True)


def test_runs_of_one_seed_agree_and_of_others_do_not(tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        train(config(epochs=1, seed=seed), tmp_path / name)
    a, b, c = ((tmp_path / name / CHECKPOINT).read_bytes() for name in "abc")
    assert a == b
    assert a != c


@pytest.mark.parametrize("seed", [256, 2**32 - 1])
def test_no_two_seeds_share_their_order(seed: int, tmp_path: Path) -> None:
    """Same weights at the start, so that only the order of examples tells the seeds apart."""
    changed = Training(config(seed=seed), tmp_path)
    plain = Training(config(seed=seed % 256), tmp_path)
    changed.model.load_state_dict(plain.model.state_dict())
    assert changed.run_epoch()["running_loss"] != plain.run_epoch()["running_loss"]


# going wrong


@pytest.mark.parametrize("method", ["sgd", "iam-d"])
def test_diverged_run_says_so(method: str, tmp_path: Path) -> None:
    settings = config(lr=1e30, method=method, epochs=5)
    with pytest.raises(DivergedError, match="not finite"):
        train(settings, tmp_path)
    record = read_run(tmp_path)
    assert record.status == "diverged"
    assert "not finite" in record.summary["reason"]
    assert not (tmp_path / CHECKPOINT).exists()
    with pytest.raises(DivergedError, match="not finite"):
        train(settings, tmp_path, resume=True)


@pytest.mark.parametrize("changes", [{}, {"clip_norm": 1.0}, {"optimizer": "adamw"}], ids=str)
def test_finite_weights_that_flew_off_are_divergence(changes: dict[str, Any], tmp_path: Path) -> None:
    """Training CE of about a million, and all of it finite."""
    settings = config(model="mlp-16", epochs=2, lr=1e6, **changes)
    for resume in (False, True):
        with pytest.raises(DivergedError, match="more than 10 times a uniform guess"):
            train(settings, tmp_path, resume=resume)
    assert json.loads((tmp_path / "summary.json").read_text())["status"] == "diverged"


def test_the_last_good_state_stays(tmp_path: Path) -> None:
    """Warm-up reaches a rate that no weight survives in the third epoch."""
    settings = config(epochs=4, warmup_epochs=4.0, lr=1e9, model="mlp-64", eval_every=1, checkpoint_every=1)
    with pytest.raises(DivergedError, match="not finite"):
        train(settings, tmp_path)
    assert read_run(tmp_path).status == "diverged"
    state = torch.load(tmp_path / STATE, weights_only=True)
    good = read_checkpoint(tmp_path / STATE)  # can be measured
    for name, value in good.state.items():
        assert bool(torch.isfinite(value).all())
        assert torch.equal(value, state["model"][name])


@pytest.mark.parametrize("eval_every", [0, 1])
def test_divergence_in_the_last_step_is_noticed(eval_every: int, tmp_path: Path) -> None:
    """The last update leaves finite weights whose outputs overflow: only the evaluation can see it."""
    settings = config(lr=1e25, epochs=1, batch_size=200, eval_every=eval_every)
    with pytest.raises(DivergedError):
        train(settings, tmp_path)
    assert read_run(tmp_path).status == "diverged"


@pytest.mark.parametrize(
    "wrong",
    [
        {"method": "sdg"},
        {"epochs": 0},
        {"epochs": 2.5},
        {"lr": -1.0},
        {"lr": math.nan},
        {"batch_size": 0},
        {"schedule": "multi-step"},
        {"nesterov": True, "momentum": 0.0},
        {"label_smoothing": 1.5},
        {"rho": -0.1},
        {"m": 0},
        {"amp": "half"},
        {"clip_norm": 0.0},
        {"ema_decay": 1.0},
        {"checkpoint_every": 0},
        {"validation": 0.0},
        {"validation": 1.0},
        {"min_lr": 0.01},
        {"schedule": "linear", "min_lr": 0.2},
        {"beta": 0.0, "method": "iam-d-onepass"},
        {"learning_rate": 0.1},
        {"noise_scale": 0.0, "method": "iam-d"},
        {"rho": math.inf},
        {"stop_ce": -1.0},
        {"gamma": math.nan},
    ],
    ids=str,
)
def test_settings_that_make_no_sense_are_named(wrong: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=next(iter(wrong))):
        config(**{"method": "sam", **wrong})


# the parts


def test_parts_are_disjoint_and_stored(tmp_path: Path) -> None:
    train(config(epochs=1, split_seed=3), tmp_path)
    stored = json.loads((tmp_path / SPLIT).read_text())
    assert len(stored.pop("sha256")) == 64
    assert {name: len(indices) for name, indices in stored.items()} == {
        "train": 200,
        "unlabeled": 60,
        "test": 80,
    }
    for one, other in itertools.combinations(stored.values(), 2):
        assert not set(one) & set(other)
    splits, digits = load_splits(config(split_seed=3)), open_source("digits", labeled=True).pool
    for name, indices in stored.items():
        part = getattr(splits, name)
        assert torch.equal(part.x, digits.x[indices])
        assert torch.equal(part.y, digits.y[indices])  # type: ignore[index]


def test_seed_does_not_move_the_parts(tmp_path: Path) -> None:
    for seed in (0, 1):
        train(config(epochs=1, seed=seed), tmp_path / str(seed))
    first, second = ((tmp_path / str(seed) / SPLIT).read_text() for seed in (0, 1))
    assert first == second
    assert load_splits(config(split_seed=1)).indices != load_splits(config(split_seed=0)).indices


def small_data(path: Path, labels: np.ndarray) -> str:
    x = np.random.default_rng(0).normal(size=(len(labels), 6)).astype(np.float32)
    x[:, 0] += 3 * (np.arange(len(labels)) % 3)
    np.savez(path, x=x, y=labels)
    return str(path)


@pytest.mark.parametrize("method", ["sgd", "iam-d"])
def test_labels_of_the_unlabeled_part_are_never_read(method: str, tmp_path: Path) -> None:
    labels = np.arange(90) % 3
    sizes: dict[str, Any] = {"num_train": 40, "num_unlabeled": 30, "num_test": 20, "track_every": 1}
    common: dict[str, Any] = {**sizes, "method": method, "model": "mlp-4", "eval_every": 1}
    train(config(data=small_data(tmp_path / "true.npz", labels), **common), tmp_path / "true")
    poisoned = labels.copy()
    poisoned[json.loads((tmp_path / "true" / SPLIT).read_text())["unlabeled"]] = 10**6
    train(config(data=small_data(tmp_path / "poison.npz", poisoned), **common), tmp_path / "poison")
    assert rows(tmp_path / "poison") == rows(tmp_path / "true")
    assert (tmp_path / "poison" / CHECKPOINT).read_bytes() == (tmp_path / "true" / CHECKPOINT).read_bytes()


def test_a_class_that_only_the_test_part_holds(tmp_path: Path) -> None:
    """Array files name no classes: their number is that of the whole pool, not of the training part."""
    sizes: dict[str, Any] = {
        "num_train": 40,
        "num_unlabeled": 30,
        "num_test": 20,
        "model": "mlp-4",
        "epochs": 1,
    }
    labels = np.arange(90) % 3
    plain = config(data=small_data(tmp_path / "plain.npz", labels), **sizes)
    labels[load_splits(plain).indices["test"][0]] = 3
    summary = train(config(data=small_data(tmp_path / "rare.npz", labels), **sizes), tmp_path / "run")
    assert summary["test_error"] >= 1 / 20


# schedules and stopping


@pytest.mark.parametrize(
    "changes",
    [{}, {"label_smoothing": 0.1, "stop_ce": 0.16}, {"optimizer": "adamw", "lr": 0.01}],
    ids=str,
)
def test_stops_at_the_first_epoch_that_meets_stop_ce(changes: dict[str, Any], tmp_path: Path) -> None:
    """Whether or not every epoch is evaluated anyway."""
    common = {"stop_ce": 0.5, "epochs": 40, "batch_size": 32, **changes}
    watched = train(config(eval_every=1, **common), tmp_path / "watched")
    assert watched["met_stop_ce"] is True
    *earlier, last = rows(tmp_path / "watched")
    assert watched["train_ce"] == pytest.approx(last["train_ce"])
    assert last["train_ce"] <= common["stop_ce"]
    assert all(row["train_ce"] > common["stop_ce"] for row in earlier)
    assert train(config(**common), tmp_path / "plain")["epochs"] == watched["epochs"] < 40


def test_the_training_part_is_read_until_its_cross_entropy_is_surely_too_large() -> None:
    torch.manual_seed(0)
    x, y = torch.randn(60, 3), torch.arange(60) % 3
    batches = Batches.from_tensors(x, y, batch_size=10)
    seen: list[int] = []
    model = nn.Linear(3, 3)
    model.register_forward_hook(lambda *_: seen.append(1))
    terms = functional.cross_entropy(model(x), y, reduction="none").detach().double()
    mean = float(terms.mean())
    found = evaluate_within(model, batches, mean + 1e-5)
    assert found == evaluate(model, batches)
    assert found[0] == pytest.approx(mean, rel=1e-6)
    for limit in (mean - 1e-5, mean / 2, 0.0):
        seen.clear()
        assert evaluate_within(model, batches, limit) is None
        assert len(seen) == 1 + int((terms.view(6, 10).sum(1).cumsum(0) <= 60 * limit).sum())


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, {0: 1, 5.5: 1, 9.99: 1}),
        ({"schedule": "cosine"}, {0: 1, 2.5: (1 + math.sqrt(0.5)) / 2, 5: 0.5, 10: 0}),
        ({"schedule": "cosine", "warmup_epochs": 2.0}, {0: 0, 1: 0.5, 2: 1, 6: 0.5, 10: 0}),
        ({"schedule": "cosine", "min_lr": 0.01}, {0: 1, 5: 0.55, 10: 0.1}),
        ({"schedule": "linear"}, {0: 1, 2.5: 0.75, 10: 0}),
        ({"schedule": "linear", "warmup_epochs": 2.0}, {0: 0, 1: 0.5, 2: 1, 4: 0.75, 10: 0}),
        ({"schedule": "linear", "warmup_epochs": 2.0, "min_lr": 0.02}, {1: 0.5, 2: 1, 6: 0.6, 10: 0.2}),
        ({"warmup_epochs": 0.5}, {0.25: 0.5, 0.5: 1, 3: 1}),
        (
            {"schedule": "multi-step", "milestones": [3, 6], "gamma": 0.2},
            {0: 1, 2.99: 1, 3: 0.2, 5.99: 0.2, 6: 0.04, 9: 0.04},
        ),
        ({"schedule": "multi-step", "milestones": [3], "warmup_epochs": 2.0}, {1: 0.5, 2: 1, 3: 0.2}),
    ],
    ids=str,
)
def test_lr_factor(changes: dict[str, Any], expected: dict[float, float]) -> None:
    settings = config(epochs=10, **changes)
    assert {e: lr_factor(settings, e) for e in expected} == pytest.approx(expected, abs=1e-9)


def test_learning_rate_is_set_step_by_step(tmp_path: Path) -> None:
    train(config(schedule="cosine", epochs=3, lr=0.2), tmp_path)
    last_steps = [(epoch + 3 / 4) / 3 for epoch in range(3)]  # four steps an epoch
    expected = [0.1 * (1 + math.cos(math.pi * t)) for t in last_steps]
    assert [row["lr"] for row in rows(tmp_path)] == pytest.approx(expected)


def test_optimizers() -> None:
    model = torch.nn.Linear(2, 2)
    model.bias.requires_grad_(False)
    sgd = make_optimizer(config(lr=0.3, momentum=0.7, nesterov=True, weight_decay=0.1), model)
    group = sgd.param_groups[0]
    assert isinstance(sgd, torch.optim.SGD)
    assert (group["lr"], group["momentum"], group["nesterov"], group["weight_decay"]) == (0.3, 0.7, True, 0.1)
    assert [id(p) for p in group["params"]] == [id(model.weight)]
    adamw = make_optimizer(config(optimizer="adamw", lr=0.01, weight_decay=0.3), model)
    assert isinstance(adamw, torch.optim.AdamW)
    assert adamw.param_groups[0]["weight_decay"] == 0.3


# what a step does beside the rule


def by_hand(settings: TrainConfig, folder: Path, steps: int, clip: float) -> list[dict[str, Tensor]]:
    """Weights after each full-batch gradient step with clipping, without any of the loop's code."""
    training = Training(settings, folder)
    model, part = training.model, training.splits.train
    assert part.y is not None
    x = part.x.double() / 255
    x = ((x - x.mean()) / x.std(correction=0)).float()
    states = []
    for _ in range(steps):
        model.zero_grad()
        functional.cross_entropy(model(x), part.y).backward()
        gradients = [p.grad.clone() for p in model.parameters()]  # type: ignore[union-attr]
        norm = math.sqrt(sum(float(g.square().sum()) for g in gradients))
        with torch.no_grad():
            for p, g in zip(model.parameters(), gradients, strict=True):
                p -= settings.lr * g * min(1.0, clip / norm)
        states.append({n: p.detach().clone() for n, p in model.named_parameters()})
    return states


def test_clipping_and_averaging_by_hand(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    settings = config(epochs=3, batch_size=200, lr=0.3, momentum=0.0, clip_norm=0.4, ema_decay=0.7)
    states = by_hand(settings, tmp_path / "twin", steps=3, clip=0.4)
    summary = train(settings, tmp_path / "run")
    average = states[0]
    for state in states[1:]:
        average = {name: 0.7 * average[name] + 0.3 * state[name] for name in state}
    for name, value in load_file(tmp_path / "run" / CHECKPOINT).items():
        torch.testing.assert_close(value, average[name], rtol=1e-4, atol=1e-6)
    unclipped = train(settings.replace(clip_norm=None), tmp_path / "unclipped")
    assert unclipped["train_ce"] != pytest.approx(summary["train_ce"], rel=1e-3)


def test_the_average_is_what_is_evaluated_tracked_and_saved(tmp_path: Path) -> None:
    """With a decay near 1 it stays by the first step's weights, however far the model goes."""
    common = {"epochs": 3, "eval_every": 1, "track_every": 1, "model": "mlp-32"}
    seen = train(config(ema_decay=0.9999, **common), tmp_path / "slow")
    plain = train(config(**common), tmp_path / "plain")
    slow, fast = rows(tmp_path / "slow"), rows(tmp_path / "plain")
    assert [row["running_loss"] for row in slow] == [row["running_loss"] for row in fast]
    assert seen["train_ce"] > 2 * plain["train_ce"]
    assert [row["test_ce"] for row in slow] == pytest.approx([seen["test_ce"]] * 3, rel=0.02)
    assert slow[2]["local_inconsistency"] == pytest.approx(slow[0]["local_inconsistency"], rel=0.1)
    assert fast[2]["local_inconsistency"] > 2 * fast[0]["local_inconsistency"]


def test_averaged_weights_keep_the_models_batch_norm_statistics(tmp_path: Path) -> None:
    training = Training(config(model="wrn-10-1", ema_decay=0.5, num_train=48, batch_size=16), tmp_path)
    training.run_epoch()
    ours, models = dict(training.updates.result.named_buffers()), dict(training.model.named_buffers())
    assert ours
    assert all(torch.equal(value, models[name]) for name, value in ours.items())
    first = next(training.updates.result.parameters())
    assert not torch.equal(first, next(training.model.parameters()))


@pytest.mark.parametrize("method", METHODS)
def test_sub_batches_accumulate_the_gradient(method: str, tmp_path: Path) -> None:
    """Without a perturbation (ρ = 0) the whole batch's gradient, whatever the sub-batches; with one, not."""
    from safetensors.torch import load_file

    common: dict[str, Any] = {"method": method, "epochs": 2, "batch_size": 100}
    for rho in (0.0, 0.5):
        whole, parts_ = (
            (train(config(**common, rho=rho, m=m), tmp_path / f"{rho}-{m}"), tmp_path / f"{rho}-{m}")[1]
            for m in (None, 30)
        )
        one, other = load_file(whole / CHECKPOINT), load_file(parts_ / CHECKPOINT)
        same = all(torch.allclose(one[name], other[name], rtol=1e-3, atol=1e-5) for name in one)
        assert same == (rho == 0.0 or method == "sgd")


def test_the_weights_of_the_lowest_test_error_are_kept(tmp_path: Path) -> None:
    settings = config(epochs=12, eval_every=1, lr=0.9, batch_size=20)  # too fast: the error goes up and down
    summary = train(settings, tmp_path)
    errors = [row["test_error"] for row in rows(tmp_path)]
    best = errors.index(min(errors))
    assert best < 11
    assert summary["test_error_min"] == min(errors) < summary["test_error"]
    training = Training(settings, tmp_path / "twin")
    for _ in range(best + 1):
        training.run_epoch()
    kept = read_checkpoint(tmp_path / BEST)
    for name, value in training.model.state_dict().items():
        assert torch.equal(kept.state[name], value)
    train(config(epochs=1), tmp_path / "blind")
    assert not (tmp_path / "blind" / BEST).exists()


@pytest.mark.parametrize("amp", ["bf16", "fp16"])
@pytest.mark.parametrize("method", ["sam", "iam-d-onepass"])
def test_half_precision_learns_as_well(amp: str, method: str, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    settings = config(method=method, epochs=8, num_train=600)
    full = train(settings, tmp_path / "full")
    half = train(settings.replace(amp=amp), tmp_path / "half")
    assert half["train_error"] < 0.15
    assert half["train_ce"] != full["train_ce"]
    assert {value.dtype for value in load_file(tmp_path / "half" / CHECKPOINT).values()} == {torch.float32}
    assert all(("skipped_steps" in row) == (amp == "fp16") for row in rows(tmp_path / "half"))


def overflowing(monkeypatch: pytest.MonkeyPatch, steps: set[int]) -> None:
    """Let the gradient of the given steps (from 1) overflow once it is scaled."""
    backward, taken = Rule.backward, 0

    def wrapped(self: Rule, x: Tensor, y: Tensor, **options: Any) -> Step:
        nonlocal taken
        taken += 1
        seen = backward(self, x, y, **options)
        if taken in steps:
            next(p for p in self.model.parameters() if p.grad is not None).grad.view(-1)[0] = math.inf  # type: ignore[union-attr]
        return seen

    monkeypatch.setattr(Rule, "backward", wrapped)


def updates_with_noise_of_its_own() -> Updates:
    """As on a device that has a generator of its own, beside the CPU's for the views."""
    made = Updates(config(method="iam-d"), nn.Linear(2, 2), torch.device("cpu"), 1)
    made.noise = made.rule.generator = torch.Generator()
    made.seed(torch.Generator().manual_seed(1), 2)
    return made


def drawn(updates: Updates) -> list[Tensor]:
    return [torch.randn(5, generator=generator) for generator in (updates.generator, updates.noise)]


def test_views_and_noise_go_on_from_generators_of_their_own() -> None:
    first = updates_with_noise_of_its_own()
    expected = [torch.randn(5, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2)]
    torch.testing.assert_close(drawn(first), expected, rtol=0, atol=0)
    state = first.state_dict()
    other = updates_with_noise_of_its_own()
    other.load_state_dict(state)
    torch.testing.assert_close(drawn(other), drawn(first), rtol=0, atol=0)


def test_noise_of_another_kind_of_device_is_seeded_by_the_state() -> None:
    """From a GPU to the CPU, and back."""
    state = updates_with_noise_of_its_own().state_dict()
    on_gpu = {**state, "noise": "cuda", "rule": {**state["rule"], "generator": torch.arange(16).byte()}}
    one, other = updates_with_noise_of_its_own(), updates_with_noise_of_its_own()
    for each in (one, other):
        each.load_state_dict(on_gpu)
    found, again = drawn(one), drawn(other)
    torch.testing.assert_close(found, again, rtol=0, atol=0)
    torch.testing.assert_close(found[0], drawn(updates_with_noise_of_its_own())[0], rtol=0, atol=0)
    shared = Updates(config(method="iam-d"), nn.Linear(2, 2), torch.device("cpu"), 1)
    shared.load_state_dict(on_gpu)
    assert shared.noise is shared.generator
    shown = torch.randn(5, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(torch.randn(5, generator=shared.noise), shown, rtol=0, atol=0)


def test_overflowed_steps_are_skipped_and_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As if these batches had not been: weights, their average, momentum and running sums."""
    overflowing(monkeypatch, {2, 3})
    training = Training(config(amp="fp16", batch_size=40, ema_decay=0.5), tmp_path)
    training.updates.scaler = torch.amp.GradScaler(
        "cpu", init_scale=2.0**10
    )  # below what overflows by itself
    states, step = [], training._step

    def watched(*batch: Tensor) -> None:
        step(*batch)
        both = {**training.model.state_dict(), **training.updates.state_dict()["average"]}
        states.append(({n: v.clone() for n, v in both.items()}, training.progress.sums.tolist()))

    training._step = watched  # type: ignore[method-assign]
    row = training.run_epoch()
    assert row["skipped_steps"] == 2
    assert training.updates.scaler.get_scale() == 2.0**8
    weights, sums = zip(*states, strict=True)
    assert [s[0] for s in sums] == [40, 40, 40, 80, 120]
    for name, value in weights[0].items():
        assert torch.equal(weights[1][name], value)
        assert torch.equal(weights[2][name], value)
    for kept in (True, False):  # in the average, in the weights
        names = [name for name in weights[0] if name.startswith("module.") == kept]
        assert any(not torch.equal(weights[3][name], weights[0][name]) for name in names)
    assert row["running_loss"] == sums[-1][1] / 120


def test_the_scalers_factor_is_part_of_the_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    overflowing(monkeypatch, {2})
    training = Training(config(amp="fp16"), tmp_path)
    training.begin()
    training.run_epoch()
    training.save_state()
    resumed = Training(config(amp="fp16"), tmp_path)
    before = resumed.updates.scaler.state_dict()
    resumed.load_state()
    assert resumed.updates.scaler.state_dict() == training.updates.scaler.state_dict() != before


def test_an_epoch_of_overflows_is_divergence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    overflowing(monkeypatch, set(range(1000)))
    with pytest.raises(DivergedError, match="every gradient overflowed"):
        train(config(amp="fp16"), tmp_path)


def test_deterministic_is_for_the_run_alone(tmp_path: Path) -> None:
    seen = []
    train(
        config(epochs=1, deterministic=True),
        tmp_path,
        notify=lambda row: seen.append(torch.are_deterministic_algorithms_enabled()),
    )
    assert seen == [True]
    assert not torch.are_deterministic_algorithms_enabled()


def test_identity_of_older_runs_is_kept() -> None:
    """Settings that came later are at their default in them; how often the state is saved is no part of a run."""
    known = {"data": "digits", "model": "mlp-16", "lr": 0.1}
    assert TrainConfig.from_dict(known).identity() == {"model": "mlp-16", "lr": 0.1}
    assert config(checkpoint_every=5).identity() == config().identity()
    for changes in ({"ema_decay": 0.9}, {"clip_norm": 1.0}, {"deterministic": True}, {"validation": 0.1}):
        assert config(**changes).identity() != config().identity()


def test_images_that_do_not_fit_into_memory_train_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from PIL import Image

    rng = np.random.default_rng(0)
    for index in range(60):
        folder = tmp_path / "data" / str(index % 3)
        folder.mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{index}.png")
    settings = config(
        data=str(tmp_path / "data"),
        num_train=30,
        num_unlabeled=15,
        num_test=15,
        batch_size=7,
        augment=True,
        checkpoint_every=3,
    )
    train(settings, tmp_path / "memory")
    monkeypatch.setattr("gm_probe.data.images.IN_MEMORY", 0)
    run_splits._open.cache_clear()
    assert not isinstance(load_splits(settings).train.x, Tensor)
    train_interrupted(settings, tmp_path / "files", 1)
    run_splits._open.cache_clear()
    assert rows(tmp_path / "files") == rows(tmp_path / "memory")
    one, other = (tmp_path / name / CHECKPOINT for name in ("files", "memory"))
    assert one.read_bytes() == other.read_bytes()


# global state


@pytest.mark.parametrize("method", METHODS)
def test_global_generator_is_untouched(method: str, tmp_path: Path) -> None:
    state = torch.get_rng_state()
    train(config(method=method, epochs=1, track_every=1), tmp_path)
    assert torch.equal(torch.get_rng_state(), state)


def test_global_generator_does_not_matter(tmp_path: Path) -> None:
    train(config(epochs=1, method="iam-d"), tmp_path / "a")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(77)
        train(config(epochs=1, method="iam-d"), tmp_path / "b")
    assert (tmp_path / "a" / CHECKPOINT).read_bytes() == (tmp_path / "b" / CHECKPOINT).read_bytes()


def test_label_smoothing_is_in_the_loss_but_not_in_the_reported_cross_entropy(tmp_path: Path) -> None:
    settings = config(epochs=1, batch_size=200, label_smoothing=0.4, lr=0.0, eval_every=1)
    summary = train(settings, tmp_path)
    plain = train(config(epochs=1, batch_size=200, lr=0.0), tmp_path / "plain")
    assert summary["train_ce"] == plain["train_ce"]
    assert rows(tmp_path)[0]["running_loss"] != pytest.approx(summary["train_ce"], rel=1e-4)
    assert rows(tmp_path / "plain")[0]["running_loss"] == pytest.approx(plain["train_ce"], rel=1e-5)


# what the run folder guards


def test_changed_data_is_noticed(tmp_path: Path) -> None:
    """An image more would move the split: what was trained on would be called unlabeled."""
    data = small_data(tmp_path / "data.npz", np.arange(90) % 3)
    settings = config(data=data, model="mlp-4", num_train=40, num_unlabeled=30, num_test=20, epochs=3)
    train_until(2, settings, tmp_path / "run")
    small_data(tmp_path / "data.npz", np.arange(91) % 3)
    run_splits._open.cache_clear()
    with pytest.raises(DataError, match="changed"):
        train(settings, tmp_path / "run", resume=True)
    with pytest.raises(DataError, match="changed"):
        own_unlabeled(tmp_path / "run")


def test_a_run_finds_its_data_from_another_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    small_data(tmp_path / "data.npz", np.arange(90) % 3)
    settings = config(data="data.npz", model="mlp-4", num_train=40, num_unlabeled=30, num_test=20, epochs=1)
    train(settings, tmp_path / "run")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    run_splits._open.cache_clear()
    assert len(own_unlabeled(tmp_path / "run")) == 30
    assert own_unlabeled(tmp_path / "run").y is None


def test_a_run_is_one_process_at_a_time(tmp_path: Path) -> None:
    with exclusive(tmp_path / "run"), pytest.raises(BusyError, match="another gmprobe"):
        train(config(model="mlp-4", epochs=1), tmp_path / "run")
    assert train(config(model="mlp-4", epochs=1), tmp_path / "run")["status"] == "finished"


def test_met_stop_ce_says_what_the_final_cross_entropy_says(tmp_path: Path) -> None:
    settings = config(model="mlp-16", epochs=2)
    reached = train(settings, tmp_path / "first")["train_ce"]
    for name, stop, met in (("above", reached * 1.001, True), ("below", reached * 0.999, False)):
        assert train(settings.replace(stop_ce=stop), tmp_path / name)["met_stop_ce"] is met


OTHER = {
    "rho": 0.3, "beta": 2.0, "kl_grad": "perturbed", "k_steps": 3, "noise_scale": 1.0, "sign": "none", "eta": 1.0,
    "momentum": 0.5, "nesterov": True, "milestones": (1,), "gamma": 0.9, "min_lr": 0.005,
}  # fmt: skip


@pytest.mark.parametrize(
    ("settings", "idle"),
    [
        ({"method": "sgd"}, {"rho", "beta", "kl_grad", "k_steps", "noise_scale", "sign", "eta"}),
        ({"method": "sam"}, {"beta", "kl_grad", "k_steps", "noise_scale", "sign", "eta"}),
        ({"method": "asam"}, {"beta", "kl_grad", "k_steps", "noise_scale", "sign"}),
        ({"method": "iam-d"}, {"sign", "eta"}),
        ({"method": "iam-d-onepass"}, {"k_steps", "noise_scale", "sign", "eta"}),
        ({"method": "iam-s"}, {"beta", "kl_grad", "eta"}),
        ({"optimizer": "adamw"}, {"momentum", "nesterov"}),
        ({"schedule": "cosine"}, {"milestones", "gamma"}),
        ({"schedule": "multi-step", "milestones": [1]}, set()),
    ],
    ids=lambda value: "-".join(map(str, value.values())) if isinstance(value, dict) else "",
)
def test_settings_are_idle_where_they_change_nothing(
    settings: dict[str, Any], idle: set[str], tmp_path: Path
) -> None:
    base = config(**{"model": "mlp-4", "epochs": 2, "num_train": 60, "lr": 0.01, **settings})

    def weights(name: str, **changes: Any) -> Tensor:
        train(base.replace(**changes), tmp_path / name)
        return torch.cat([v.flatten() for v in read_checkpoint(tmp_path / name).state.values()])

    first = weights("first")
    kind = next(iter(settings))
    group = {
        "method": list(OTHER)[:7],
        "optimizer": ["momentum", "nesterov"],
        "schedule": ["gamma", "min_lr"],
    }
    for name in group[kind]:
        if name == "min_lr" and base.schedule != "cosine":
            continue  # refused
        assert torch.equal(first, weights(name, **{name: OTHER[name]})) == (name in base.idle()), name
    assert idle <= set(base.idle())
    assert base.idle().items() >= dict.fromkeys(idle, kind).items()


def test_a_buffer_may_mask_by_minus_infinity(tmp_path: Path) -> None:
    """As attention's masks do; other buffers must be finite."""
    training = Training(config(model="mlp-8"), tmp_path)
    training.model.register_buffer("mask", torch.full((3, 3), -torch.inf).triu(1))
    assert training.run_epoch()["epoch"] == 1
    training.model.register_buffer("mean", torch.tensor([torch.inf]))
    with pytest.raises(DivergedError, match="buffer 'mean'"):
        training.run_epoch()
