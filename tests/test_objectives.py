"""Joint and FixMatch: losses by hand, gradients by finite differences, few labels, and runs that resume."""

from __future__ import annotations

import copy
import itertools
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from test_rules import algorithm_1, data, grads, make, seeded
from test_training_loop import config, rows, train_interrupted, train_until_step
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from gm_probe.cli import main
from gm_probe.data.datasets import open_source
from gm_probe.data.examples import Examples, Source
from gm_probe.data.splits import split
from gm_probe.errors import DataError, UsageError
from gm_probe.measures.settings import Settings
from gm_probe.measuring.checkpoint import measure_checkpoint
from gm_probe.runs.records import CHECKPOINT, RAW, SPLIT
from gm_probe.training import run_splits
from gm_probe.training.loop import train
from gm_probe.training.methods import METHODS
from gm_probe.training.methods.iam import IAMD
from gm_probe.training.methods.sam import SAM
from gm_probe.training.objectives.fixmatch import FixMatch
from gm_probe.training.objectives.joint import Joint
from gm_probe.training.objectives.supervised import Objective
from gm_probe.training.rule import Rule, Step
from gm_probe.training.run import Training
from gm_probe.training.run_splits import load_splits

SEMI: dict[str, Any] = {"labels": 20, "batch_size": 10, "mu": 3, "num_train": 80, "epochs": 2}
OBJECTIVES: dict[str, dict[str, Any]] = {
    "joint sgd": {"objective": "joint"},
    "joint sam": {"objective": "joint", "method": "sam"},
    "joint iam-d": {"objective": "joint", "method": "iam-d", "augment": True},
    "fixmatch": {"objective": "fixmatch", "threshold": 0.18, "ema_decay": 0.9, "schedule": "cosine"},
    "fixmatch sam": {"objective": "fixmatch", "threshold": 0.18, "method": "sam"},
    "fixmatch iam-d": {
        "objective": "fixmatch",
        "threshold": 0.18,
        "method": "iam-d",
        "unlabeled_mean": "mask",
    },
}


def semi(name: str, **changes: Any) -> Any:
    return config(**{**SEMI, **OBJECTIVES[name], **changes})


# FixMatch by hand


def log_odds(*rows: tuple[float, float]) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64).log()


def test_fixmatch_by_hand() -> None:
    """Probabilities as logits' exponentials: one label, three views, of which two are confident."""
    labeled = log_odds((0.8, 0.2))
    weak = log_odds((0.97, 0.03), (0.5, 0.5), (0.04, 0.96))
    strong = log_odds((0.6, 0.4), (0.1, 0.9), (0.7, 0.3))
    logits, y = torch.cat([labeled, weak, strong]), torch.tensor([1])
    unlabeled = -np.log(0.6) - np.log(0.3)
    for mean, views in (("batch", 3), ("mask", 2)):
        objective = FixMatch(threshold=0.95, weight=0.5, mean=mean)
        assert float(objective.loss(logits, y)) == pytest.approx(-np.log(0.2))
        assert float(objective(logits, y)) == pytest.approx(-np.log(0.2) + 0.5 * unlabeled / views)
        torch.testing.assert_close(objective.compared(logits, y), torch.cat([labeled, weak]))
        assert [float(value) for value in objective.noted(logits, y)] == [pytest.approx(2 / 3)]
    sure = FixMatch(threshold=1.0, mean="mask")  # nothing is that confident
    assert float(sure(logits, y)) == pytest.approx(-np.log(0.2))


def test_pseudo_labels_get_no_gradient() -> None:
    weak, strong = (torch.randn(4, 3, generator=seeded(n), requires_grad=True) for n in (0, 1))
    logits = torch.cat([torch.zeros(2, 3), weak, strong])
    gradients = torch.autograd.grad(
        FixMatch(threshold=0.0).unlabeled_loss(logits, torch.tensor([0, 1])),
        [weak, strong],
        allow_unused=True,
    )
    expected = (strong.softmax(1) - functional.one_hot(weak.argmax(1), 3)) / 4
    assert not gradients[0].any()
    torch.testing.assert_close(gradients[1], expected.detach())


@pytest.mark.parametrize("inputs", [1, 2, 3, 5])
def test_views_must_come_in_pairs(inputs: int) -> None:
    logits, y = torch.zeros(inputs, 3), torch.tensor([0, 1])
    with pytest.raises(UsageError, match="views of the same images"):
        FixMatch().unlabeled_loss(logits, y)


# gradients

CONFIDENT = {"threshold": 0.45, "weight": 0.8}
KINDS: dict[str, tuple[Callable[[], Objective], int, int]] = {
    "joint": (Joint, 8, 8),
    "fixmatch": (lambda: FixMatch(**CONFIDENT), 13, 8),  # type: ignore[arg-type]
    "fixmatch, mask": (lambda: FixMatch(**CONFIDENT, mean="mask"), 13, 8),  # type: ignore[arg-type]
}
"""An objective, how many inputs a batch has beside 3 labeled ones' (13 = 3 + 5 + 5), and how many are compared."""


def pieces(
    kind: str, model: nn.Module, x: Tensor
) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
    """Log-probabilities at flat parameters, and the unlabeled loss of those, pseudo-labels fixed at the model's own."""
    twin = copy.deepcopy(model)

    def log_p(flat: Tensor) -> Tensor:
        vector_to_parameters(flat, twin.parameters())
        return twin(x).log_softmax(1)

    with torch.no_grad():
        found = model(x).softmax(1)[3:8]

    def unlabeled(logs: Tensor) -> Tensor:
        if kind == "joint":
            return torch.zeros((), dtype=torch.float64)
        total, taken = torch.zeros((), dtype=torch.float64), 0
        for n, p in enumerate(found):
            if float(p.max()) >= 0.45:
                total, taken = total - logs[8 + n, int(p.argmax())], taken + 1
        assert 0 < taken < 5
        return 0.8 * total / (taken if kind.endswith("mask") else 5)

    return log_p, unlabeled


def differences(function: Callable[[Tensor], Tensor], theta: Tensor) -> Tensor:
    eps = 1e-5
    with torch.no_grad():
        moves = [eps * e for e in torch.eye(len(theta), dtype=torch.float64)]
        return torch.stack([(function(theta + e) - function(theta - e)) / (2 * eps) for e in moves])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("steps", [1, 3])
def test_iam_d_against_finite_differences(steps: int, kind: str) -> None:
    objective, inputs, compared = KINDS[kind]
    model, x, y = make(), data(inputs, seed=3)[0], torch.tensor([2, 0, 1])
    delta = algorithm_1(model, x[:compared], 0.3, steps, seed=5)
    log_p, unlabeled = pieces(kind, model, x)

    def whole(flat: Tensor) -> Tensor:
        p, q = log_p(flat), log_p(flat + delta)
        divergence = (p.exp() * (p - q)).sum(1)[:compared].mean()
        return 0.7 * divergence - p[torch.arange(3), y].mean() + unlabeled(p)

    theta = parameters_to_vector(model.parameters()).detach().clone()
    IAMD(model, objective(), rho=0.3, beta=0.7, k_steps=steps, generator=seeded(5)).backward(x, y)
    torch.testing.assert_close(grads(model), differences(whole, theta), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_sam_sharpens_the_labeled_loss_alone(kind: str) -> None:
    objective, inputs, _ = KINDS[kind]
    model, x, y = make(), data(inputs, seed=3)[0], torch.tensor([2, 0, 1])
    log_p, unlabeled = pieces(kind, model, x)
    theta = parameters_to_vector(model.parameters()).detach().clone()

    def labeled(flat: Tensor) -> Tensor:
        return -log_p(flat)[torch.arange(3), y].mean()

    g = differences(labeled, theta)
    expected = differences(labeled, theta + 0.3 * g / g.norm()) + differences(
        lambda v: unlabeled(log_p(v)), theta
    )
    step = SAM(model, objective(), rho=0.3).backward(x, y)
    torch.testing.assert_close(grads(model), expected, rtol=1e-5, atol=1e-8)
    torch.testing.assert_close(step.loss, labeled(theta) + unlabeled(log_p(theta)))


def test_unlabeled_inputs_cannot_be_cut() -> None:
    x, y = data(8)
    with pytest.raises(UsageError, match="m splits only batches"):
        Rule(make(), Joint(), m=2).backward(x, y[:3])


# few labels


def pool(labels: Tensor) -> Source:
    return Source(Examples(torch.arange(len(labels)).unsqueeze(1), labels, ("a", "b", "c"), "numbers"), None)


def few(source: Source, labels: int, seed: int = 0) -> Any:
    return split(source, num_train=60, num_unlabeled=20, num_test=20, seed=seed, num_labeled=labels)


def test_labels_are_balanced_and_disjoint_from_the_rest() -> None:
    y = (torch.arange(100) % 7).clamp(max=2)  # two thirds of one class
    whole = split(pool(y), num_train=60, num_unlabeled=20, num_test=20, seed=0)
    splits = few(pool(y), 15)
    assert splits.train.y.bincount().tolist() == [5, 5, 5]
    assert splits.inputs.y is None
    labeled, rest = splits.indices["train"], splits.indices["train_unlabeled"]
    assert sorted(labeled + rest) == whole.indices["train"]
    for name in ("unlabeled", "test"):
        assert splits.indices[name] == whole.indices[name]
    for one, other in itertools.combinations(splits.indices.values(), 2):
        assert not set(one) & set(other)
    assert splits.inputs.x.flatten().tolist() == labeled + rest
    assert splits.train.x.flatten().tolist() == labeled
    assert few(pool(y), 15).indices == splits.indices
    assert few(pool(y), 15, seed=1).indices["train"] != labeled


@pytest.mark.parametrize(
    ("labels", "reason"), [(4, "multiple of 3"), (45, "class a has"), (60, "class a has")]
)
def test_impossible_numbers_of_labels(labels: int, reason: str) -> None:
    with pytest.raises(DataError, match=reason):
        few(pool((torch.arange(100) % 7).clamp(max=2)), labels)


def test_nothing_left_unlabeled() -> None:
    source = Source(
        Examples(torch.arange(9).unsqueeze(1), torch.zeros(9, dtype=torch.int64), ("a",), "numbers"), None
    )
    with pytest.raises(DataError, match="no unlabeled examples remain"):
        split(source, num_train=5, num_unlabeled=2, num_test=2, seed=0, num_labeled=5)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_labels_that_were_not_kept_are_never_read(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = semi(name, epochs=1, track_every=1)
    train(settings, tmp_path / "true")
    source = open_source("digits", labeled=True)
    indices = json.loads((tmp_path / "true" / SPLIT).read_text())
    y = source.pool.y.clone()  # type: ignore[union-attr]
    y[indices["train_unlabeled"] + indices["unlabeled"]] = -1  # no class: cross-entropy would raise
    poisoned = Source(replace(source.pool, y=y), None)
    monkeypatch.setattr(run_splits, "_open", lambda *_, **__: poisoned)
    train(settings, tmp_path / "poison")
    assert (tmp_path / "poison" / SPLIT).read_text() == (tmp_path / "true" / SPLIT).read_text()
    assert rows(tmp_path / "poison") == rows(tmp_path / "true")
    assert (tmp_path / "poison" / CHECKPOINT).read_bytes() == (tmp_path / "true" / CHECKPOINT).read_bytes()


# runs


@pytest.mark.parametrize("name", OBJECTIVES)
def test_resumed_run_is_bit_identical(name: str, tmp_path: Path) -> None:
    settings = semi(name)
    straight = train(settings, tmp_path / "straight")
    broken = train_interrupted(settings, tmp_path / "broken", 1)
    within = tmp_path / "within"
    train_until_step(2, settings.replace(checkpoint_every=1), within)
    train(settings, within, resume=True)
    for run in (tmp_path / "broken", within):
        assert (run / CHECKPOINT).read_bytes() == (tmp_path / "straight" / CHECKPOINT).read_bytes()
        assert rows(run) == rows(tmp_path / "straight")
    assert {**broken, "train_seconds": 0} == {**straight, "train_seconds": 0}


def test_batches_are_whole_and_pass_over_everything(tmp_path: Path) -> None:
    """60 unlabeled examples in batches of 3 · 8 take three steps; 20 labels are passed over once and a bit."""
    training = Training(semi("fixmatch", batch_size=8), tmp_path)
    dealt = training.sampler.deal(seeded())
    assert [len(chosen) for chosen in dealt] == [8 + 24] * 3 == [32] * training.steps
    labeled = torch.cat([chosen[:8] for chosen in dealt]).tolist()
    rest = torch.cat([chosen[8:] for chosen in dealt]).tolist()
    assert sorted(labeled[:20]) == list(range(20))
    assert sorted(rest[:60]) == list(range(20, 80))
    assert max(labeled) < 20 <= min(rest[60:])


def test_three_fixmatch_steps_with_momentum_and_average(tmp_path: Path) -> None:
    """The loop's batches, and all that is done with them once more by hand."""
    settings = semi("fixmatch", epochs=1, lambda_u=0.5, num_train=110, weight_decay=0.01)
    training = Training(settings, tmp_path)
    assert training.steps == 3
    shadow = copy.deepcopy(training.model)
    velocity = [torch.zeros_like(p) for p in shadow.parameters()]
    average: list[Tensor] | None = None
    batches: list[tuple[Tensor, Tensor]] = []
    step, update = training._step, training.updates.step

    def watched(chosen: Tensor, x: Tensor, y: Tensor) -> None:
        assert torch.equal(y, training.splits.train.y[chosen[:10]])  # type: ignore[index]
        step(chosen, x, y)

    def noted(x: Tensor, y: Tensor, lr: float) -> tuple[Step, bool]:
        batches.append((x, y))
        return update(x, y, lr)

    training._step = watched  # type: ignore[method-assign]
    training.updates.step = noted  # type: ignore[method-assign]
    row = training.run_epoch()
    assert 0 < row["running_confident"] < 1
    for index, (x, y) in enumerate(batches):
        assert len(x) == 10 + 2 * 30
        z = shadow(x)
        p = z[10:40].softmax(1).detach()
        mask = p.max(1).values >= 0.18
        loss = functional.cross_entropy(z[:10], y)
        loss = loss + 0.5 * functional.cross_entropy(z[40:][mask], p.argmax(1)[mask], reduction="sum") / 30
        gradients = torch.autograd.grad(loss, list(shadow.parameters()))
        lr = 0.1 * (1 + np.cos(np.pi * index / 3)) / 2
        with torch.no_grad():
            for p_, g, v in zip(shadow.parameters(), gradients, velocity, strict=True):
                v.mul_(0.9).add_(g + 0.01 * p_)
                p_ -= lr * v
            now = [p_.clone() for p_ in shadow.parameters()]
        average = now if average is None else [0.9 * a + 0.1 * b for a, b in zip(average, now, strict=True)]
    assert average is not None
    for ours, theirs in zip(training.updates.result.parameters(), average, strict=True):
        torch.testing.assert_close(ours.detach(), theirs, rtol=1e-4, atol=1e-6)


def test_raw_weights_are_kept_beside_the_average(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """They are what the same run has without an average."""
    averaged, plain = semi("fixmatch"), semi("fixmatch", ema_decay=None)
    train(averaged, tmp_path / "averaged")
    train(plain, tmp_path / "plain")
    raw, expected = load_file(tmp_path / "averaged" / RAW), load_file(tmp_path / "plain" / CHECKPOINT)
    assert raw.keys() == expected.keys()
    assert all(torch.equal(raw[name], expected[name]) for name in raw)
    average = load_file(tmp_path / "averaged" / CHECKPOINT)
    assert not any(torch.equal(raw[name], average[name]) for name in raw)
    assert not (tmp_path / "plain" / RAW).exists()
    # both are measured over the run's own unlabeled part
    results = []
    for path in (tmp_path / "averaged", tmp_path / "averaged" / RAW):
        main(["measure", str(path), "--measures", "parameter_norm,mean_entropy", "--json", "-q"])
        results += json.loads(capsys.readouterr().out)
    assert results[0]["settings"]["data"] == results[1]["settings"]["data"]
    assert {result["settings"]["part"] for result in results} == {"own unlabeled"}
    for result, weights in zip(results, (average, raw), strict=True):
        norm = float(torch.cat([tensor.flatten() for tensor in weights.values()]).norm())
        assert result["measures"]["parameter_norm"]["value"] == pytest.approx(norm, rel=1e-5)
    assert results[0]["measures"]["mean_entropy"]["value"] != results[1]["measures"]["mean_entropy"]["value"]


@pytest.mark.parametrize(
    ("name", "evaluations"),
    [("joint sgd", 1), ("joint iam-d", 4 * 3), ("fixmatch", 7), ("fixmatch sam", 7 * 8 / 3)],
)
def test_gradient_evaluations_count_all_inputs(name: str, evaluations: float, tmp_path: Path) -> None:
    summary = train(semi(name, epochs=1), tmp_path)
    assert summary["gradient_evaluations"] == pytest.approx(2 * evaluations)
    assert (summary["num_train"], summary["num_unlabeled_train"]) == (20, 60)


@pytest.mark.parametrize("objective", ["joint", "fixmatch"])
@pytest.mark.parametrize(("name", "other"), [("mu", 2), ("threshold", 0.19), ("lambda_u", 3.0)])
def test_settings_are_idle_where_they_change_nothing(
    name: str, other: float, objective: str, tmp_path: Path
) -> None:
    settings = config(**{**SEMI, "objective": objective, "threshold": 0.15, "epochs": 1})
    for folder, changes in (("one", {}), ("other", {name: other})):
        train(settings.replace(**changes), tmp_path / folder)
    one, two = ((tmp_path / folder / CHECKPOINT).read_bytes() for folder in ("one", "other"))
    assert (one == two) == (name in settings.idle())
    assert name in config().idle()


@pytest.mark.parametrize(
    "wrong",
    [
        {"labels": None},
        {"objective": "mixmatch"},
        {"mu": 0},
        {"threshold": 1.5},
        {"lambda_u": -1.0},
        {"unlabeled_mean": "sum"},
        {"m": 5},
        {"objective": "fixmatch", "augment": True},
        {"objective": "fixmatch", "labels": 0},
    ],
    ids=str,
)
def test_settings_that_make_no_sense(wrong: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises((UsageError, DataError)):
        train(config(**{**SEMI, "objective": "joint", **wrong}), tmp_path / "run")


def test_fixmatch_wants_images(tmp_path: Path) -> None:
    x = np.random.default_rng(0).normal(size=(90, 6)).astype(np.float32)
    np.savez(tmp_path / "data.npz", x=x, y=np.arange(90) % 3)
    changes = {"data": str(tmp_path / "data.npz"), "num_train": 40, "num_unlabeled": 30, "num_test": 20}
    with pytest.raises(UsageError, match="images of 8 bits"):
        train(config(**{**SEMI, **changes, "labels": 6, "objective": "fixmatch"}), tmp_path / "run")


@pytest.mark.parametrize("method", METHODS)
def test_every_rule_takes_every_objective(method: str) -> None:
    """A finite gradient for each; what it should be is tested above for those that the paper names."""
    for objective, inputs, _ in KINDS.values():
        model = make()
        METHODS[method](model, objective()).backward(data(inputs, seed=3)[0], torch.tensor([2, 0, 1]))
        assert bool(torch.isfinite(grads(model)).all())
        assert float(grads(model).norm()) > 0


# measuring what FixMatch leaves


def test_the_average_is_measured_as_the_run_reports_it(tmp_path: Path) -> None:
    """The run folder's own checkpoint is the average: its error is the summary's, the raw model's need not be."""
    summary = train(semi("fixmatch", epochs=2), tmp_path)
    test = load_splits(semi("fixmatch")).test
    errors = {
        name: measure_checkpoint(tmp_path / name, test, ["error"], Settings())["measures"]["error"]["value"]
        for name in (CHECKPOINT, RAW)
    }
    assert errors[CHECKPOINT] == pytest.approx(summary["test_error"])
    assert load_file(tmp_path / CHECKPOINT)["1.weight"].ne(load_file(tmp_path / RAW)["1.weight"]).any()
