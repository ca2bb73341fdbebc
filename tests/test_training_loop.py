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
from torch import Tensor
from torch.nn import functional

from gm_probe.core.datasets import open_source
from gm_probe.core.errors import BusyError, DataError, DivergedError, UsageError
from gm_probe.core.files import exclusive
from gm_probe.core.records import CHECKPOINT, SPLIT, STATE, read_metrics, read_run
from gm_probe.training import loop, parts
from gm_probe.training.config import TrainConfig
from gm_probe.training.loop import train
from gm_probe.training.parts import load_splits, own_unlabeled
from gm_probe.training.rules import METHODS, Step
from gm_probe.training.schedule import lr_factor
from gm_probe.training.updates import make_optimizer

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


def train_interrupted(settings: TrainConfig, out: Path, *epochs: int) -> dict[str, Any]:
    """Train with a breakdown as each of ``epochs`` is reported, resuming after each."""
    for epoch in epochs:

        def notify(row: dict[str, Any], epoch: int = epoch) -> None:
            if row["epoch"] == epoch:
                raise Interrupted

        with pytest.raises(Interrupted):
            train(settings, out, resume=True, notify=notify)
        assert read_run(out).status == "unfinished"
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


def test_first_epoch_by_hand(tmp_path: Path) -> None:
    """One full batch a step: gradient descent on the mean cross-entropy, without any of the loop's code."""
    from safetensors.torch import load_file

    settings = config(epochs=1, batch_size=200, lr=0.3, momentum=0.0, weight_decay=0.01)
    training = loop.Training(settings, tmp_path / "twin")
    model, part = training.model, training.splits.train
    assert part.y is not None
    x = part.x.double() / 255
    x = ((x - x.mean()) / x.std(correction=0)).float()
    functional.cross_entropy(model(x), part.y).backward()
    expected = {n: p - 0.3 * (p.grad + 0.01 * p) for n, p in model.named_parameters()}  # type: ignore[operator]
    summary = train(settings, tmp_path / "run")
    for name, value in load_file(tmp_path / "run" / CHECKPOINT).items():
        torch.testing.assert_close(value, expected[name].detach(), rtol=1e-4, atol=1e-6)
    assert summary["gradient_evaluations"] == 1


def test_every_epoch_sees_every_example_once_in_a_new_order(tmp_path: Path) -> None:
    training = loop.Training(config(batch_size=48), tmp_path)
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
    "adamw": {"optimizer": "adamw", "lr": 0.01, "method": "iam-d"},
    "cosine": {"schedule": "cosine", "warmup_epochs": 1.0},
    "multi-step": {"schedule": "multi-step", "milestones": [1, 3]},
    "augmented": {"augment": True, "model": "6cnn", "num_train": 64, "batch_size": 32},
    "batch norm": {"model": "wrn-10-1", "method": "iam-s", "num_train": 48, "batch_size": 16},
    "evaluated and tracked": {"eval_every": 2, "track_every": 1, "method": "sam", "m": 32},
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


def test_resume_goes_on_from_the_saved_epoch(tmp_path: Path) -> None:
    seen: list[int] = []

    def notify(row: dict[str, Any]) -> None:
        seen.append(row["epoch"])
        if seen == [1, 2, 3]:
            raise Interrupted

    with pytest.raises(Interrupted):
        train(config(epochs=4), tmp_path, notify=notify)
    train(config(epochs=4), tmp_path, resume=True, notify=notify)
    assert seen == [1, 2, 3, 3, 4]  # the third had been reported but not saved


def test_torn_last_line_of_the_metrics(tmp_path: Path) -> None:
    def stop(row: dict[str, Any]) -> None:
        if row["epoch"] == 3:
            raise Interrupted

    settings = config(epochs=4)
    with pytest.raises(Interrupted):
        train(settings, tmp_path / "torn", notify=stop)
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
    with pytest.raises(UsageError, match=r"another lr, rho;"):
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
    changed = loop.Training(config(seed=seed), tmp_path)
    plain = loop.Training(config(seed=seed % 256), tmp_path)
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
        {"learning_rate": 0.1},
    ],
    ids=str,
)
def test_settings_that_make_no_sense_are_usage_errors(wrong: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(UsageError):
        train(config(**{"method": "sam", **wrong}), tmp_path / "run")


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


def test_stop_ce(tmp_path: Path) -> None:
    summary = train(config(stop_ce=0.5, epochs=40), tmp_path)
    assert summary["met_stop_ce"] is True
    assert summary["epochs"] < 40
    assert summary["train_ce"] <= 0.5
    seen = rows(tmp_path)
    assert len(seen) == summary["epochs"]
    assert seen[-1]["train_ce"] == pytest.approx(summary["train_ce"])
    assert all(row.get("train_ce", math.inf) > 0.5 for row in seen[:-1])


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
    assert train(config(**common), tmp_path / "plain")["epochs"] == watched["epochs"]


def test_stop_ce_out_of_reach(tmp_path: Path) -> None:
    summary = train(config(stop_ce=1e-9, epochs=2), tmp_path)
    assert (summary["met_stop_ce"], summary["epochs"]) == (False, 2)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, {0: 1, 5.5: 1, 9.99: 1}),
        ({"schedule": "cosine"}, {0: 1, 2.5: (1 + math.sqrt(0.5)) / 2, 5: 0.5, 10: 0}),
        ({"schedule": "cosine", "warmup_epochs": 2.0}, {0: 0, 1: 0.5, 2: 1, 6: 0.5, 10: 0}),
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

    def notify(row: dict[str, Any]) -> None:
        if row["epoch"] == 2:
            raise Interrupted

    with pytest.raises(Interrupted):
        train(settings, tmp_path / "run", notify=notify)
    small_data(tmp_path / "data.npz", np.arange(91) % 3)
    parts._open.cache_clear()
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
    parts._open.cache_clear()
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


@pytest.mark.parametrize(
    "wrong", [{"noise_scale": 0.0}, {"rho": math.inf}, {"stop_ce": -1.0}, {"gamma": math.nan}]
)
def test_settings_without_a_meaning_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=next(iter(wrong))):
        config(method="iam-d", **wrong)
