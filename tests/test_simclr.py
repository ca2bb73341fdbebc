"""SimCLR runs: they learn without labels, resume bit for bit, and are probed by hand-checked linear classifiers."""

from __future__ import annotations

import copy
import json
import math
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from test_training_loop import config, rows, train_interrupted, train_until_step
from torch import nn
from torch.nn import functional

from gm_probe.analysis.figures import run_curves
from gm_probe.data.batches import Batches
from gm_probe.data.datasets import open_source
from gm_probe.data.examples import Source
from gm_probe.data.normalization import Normalization
from gm_probe.errors import DataError, UsageError
from gm_probe.measures.settings import Settings
from gm_probe.measuring.checkpoint import measure_checkpoint
from gm_probe.measuring.saved import merge_measures
from gm_probe.models.checkpoints import read_checkpoint
from gm_probe.models.contrastive import Contrastive, as_encoder
from gm_probe.models.loading import load_model
from gm_probe.models.zoo import ModelSpec, initial_model
from gm_probe.runs.records import CHECKPOINT, MEASURES, RAW, SPLIT, read_metrics, read_run
from gm_probe.tables.runs import load_table
from gm_probe.training import run_splits
from gm_probe.training.linear_probe import BATCH, LR, fit, linear_probe
from gm_probe.training.loop import train
from gm_probe.training.methods import METHODS
from gm_probe.training.run import Training
from gm_probe.training.run_splits import own_unlabeled
from gm_probe.training.views import draw_views, see

SIMCLR: dict[str, Any] = {"objective": "simclr", "batch_size": 32, "probe_every": 1, "epochs": 2}


def simclr(**changes: Any) -> Any:
    return config(**{**SIMCLR, **changes})


def same_weights(one: Path, other: Path, name: str = CHECKPOINT) -> bool:
    first, second = load_file(one / name), load_file(other / name)
    assert first.keys() == second.keys()
    return all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize("method", METHODS)
def test_resumes_bit_for_bit(method: str, tmp_path: Path) -> None:
    settings = simclr(method=method, epochs=3, track_every=2, ema_decay=0.9)
    straight = train(settings, tmp_path / "straight")
    again = train_interrupted(settings, tmp_path / "again", 1, 2)
    assert same_weights(tmp_path / "straight", tmp_path / "again")
    assert same_weights(tmp_path / "straight", tmp_path / "again", RAW)
    assert rows(tmp_path / "straight") == rows(tmp_path / "again")
    assert {k: v for k, v in straight.items() if k != "train_seconds"} == {
        k: v for k, v in again.items() if k != "train_seconds"
    }


def test_resumes_within_an_epoch(tmp_path: Path) -> None:
    settings = simclr(method="iam-d-onepass", epochs=2, checkpoint_every=2)
    train(settings, tmp_path / "straight")
    train_until_step(11, settings, tmp_path / "again")  # the fifth of the second epoch's six
    train(settings, tmp_path / "again", resume=True)
    assert same_weights(tmp_path / "straight", tmp_path / "again")
    assert rows(tmp_path / "straight") == rows(tmp_path / "again")


def test_labels_are_never_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wrong labels for all: the weights and what was learned from are the same, the probes alone notice."""
    settings = simclr(method="iam-d", track_every=1)
    train(settings, tmp_path / "honest")
    honest = run_splits._open

    def poisoned(*arguments: Any, **options: Any) -> Source:
        source = honest(*arguments, **options)
        assert source.pool.y is not None
        return Source(replace(source.pool, y=source.pool.y.flip(0)), source.test)

    monkeypatch.setattr(run_splits, "_open", poisoned)
    train(settings, tmp_path / "poisoned")
    assert same_weights(tmp_path / "honest", tmp_path / "poisoned")
    for one, other in zip(rows(tmp_path / "honest"), rows(tmp_path / "poisoned"), strict=True):
        probed = {key for key in one if key.startswith("probe_")}
        assert len(probed) == 4
        assert {k: v for k, v in one.items() if k not in probed} == {
            k: v for k, v in other.items() if k not in probed
        }
        assert other["probe_test_error"] > one["probe_test_error"] + 0.2


def test_probes_leave_no_trace(tmp_path: Path) -> None:
    train(simclr(method="iam-d"), tmp_path / "probed")
    train(simclr(method="iam-d", probe_every=0), tmp_path / "not")
    assert same_weights(tmp_path / "probed", tmp_path / "not")


# the encoder and what becomes of it


@pytest.mark.parametrize(
    "name", ["6cnn", "mlp-8", "wrn-10-1", "resnet18-cifar", "timm:resnet10t", "vit-tiny-4"]
)
def test_an_encoder_is_any_network_without_its_last_layer(name: str) -> None:
    if name.startswith(("timm", "vit")):
        pytest.importorskip("timm")
    classifier = initial_model(ModelSpec(name, (3, 8, 8), 128), 3).eval()
    model = initial_model(ModelSpec(name, (3, 8, 8), 128, 0.5), 3).eval()
    assert isinstance(model, Contrastive)
    x = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    last = [module for module in classifier.modules() if isinstance(module, nn.Linear)][-1]
    seen = []
    last.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0]))
    with torch.no_grad():
        classifier(x)
        torch.testing.assert_close(model.features(x), seen[0])  # the same draws began with the same weights
        assert model(x).shape == (4, 3)


def test_networks_without_features_are_refused() -> None:
    with pytest.raises(UsageError, match="last linear layer"):
        as_encoder(nn.Sequential(nn.Flatten(), nn.ReLU()))
    wide = Contrastive(nn.Conv2d(1, 2, 3), nn.Identity())
    with pytest.raises(UsageError, match=r"not features \(B, D\)"):
        wide(torch.zeros(2, 1, 8, 8))


def test_fine_tuning_starts_from_the_encoder(tmp_path: Path) -> None:
    train(simclr(), tmp_path / "simclr")
    train(config(init=str(tmp_path / "simclr"), lr=0.0, epochs=1), tmp_path / "tuned")
    before, after = load_file(tmp_path / "simclr" / CHECKPOINT), load_file(tmp_path / "tuned" / CHECKPOINT)
    for name in ("1.weight", "1.bias"):
        assert torch.equal(before[f"encoder.{name}"], after[name])
    assert read_run(tmp_path / "tuned").config["environment"]["fresh_weights"] == ["3.weight", "3.bias"]
    train(simclr(init=str(tmp_path / "simclr"), lr=0.0, epochs=1), tmp_path / "on")
    assert same_weights(tmp_path / "simclr", tmp_path / "on")


def test_the_checkpoint_rebuilds_encoder_and_projector(tmp_path: Path) -> None:
    train(simclr(ema_decay=0.9, temperature=0.2), tmp_path)
    checkpoint = read_checkpoint(tmp_path)
    assert checkpoint.model == ModelSpec("mlp-16", (1, 8, 8), 128, 0.2)
    model = load_model(checkpoint)
    assert isinstance(model, Contrastive)
    assert model.temperature == 0.2
    assert not same_files(tmp_path / CHECKPOINT, tmp_path / RAW)


def same_files(one: Path, other: Path) -> bool:
    return one.read_bytes() == other.read_bytes()


# the linear probe


def test_a_probe_nears_the_optimum_that_another_library_finds() -> None:
    linear_model = pytest.importorskip("sklearn.linear_model")
    digits = open_source("digits", labeled=True).pool
    assert digits.y is not None
    x, y = digits.x.flatten(1).float(), digits.y
    spread = x[:1200].std(0)
    x = (x - x[:1200].mean(0)) / torch.where(spread > 0, spread, 1.0)
    best = linear_model.LogisticRegression(max_iter=500).fit(x[:1200].numpy(), y[:1200].numpy())
    ours = fit(x[:1200], y[:1200], 10, 0)
    with torch.no_grad():
        error = float((ours(x[1200:]).argmax(1) != y[1200:]).double().mean())
    assert error == pytest.approx(1 - best.score(x[1200:].numpy(), y[1200:].numpy()), abs=0.03)
    assert error < 0.15


def test_the_summary_is_a_probe_fitted_by_hand(tmp_path: Path) -> None:
    """Features by matrix products from the file; AdamW's updates written out; one full batch an epoch."""
    summary = train(simclr(num_train=160), tmp_path)
    weights = {name: value.double() for name, value in load_file(tmp_path / CHECKPOINT).items()}
    digits = open_source("digits", labeled=True).pool
    assert digits.y is not None
    indices = json.loads((tmp_path / SPLIT).read_text())
    raw = digits.x[indices["train"]].double() / 255
    mean, std = raw.mean(), raw.std(correction=0)

    def hidden(part: str) -> torch.Tensor:
        x = ((digits.x[indices[part]].double() / 255 - mean) / std).flatten(1)
        return (x @ weights["encoder.1.weight"].T + weights["encoder.1.bias"]).clamp(min=0)

    middle, scale = hidden("train").mean(0), hidden("train").std(0, correction=0)
    scale = torch.where(scale > 0, scale, 1.0)
    parts_ = {part: ((hidden(part) - middle) / scale, digits.y[indices[part]]) for part in ("train", "test")}
    x, y = parts_["train"]
    assert len(x) <= BATCH
    ones = torch.ones(len(x), 1, dtype=torch.float64)
    inputs, target = torch.cat([x, ones], 1), functional.one_hot(y, 10).double()
    w, first, second = (torch.zeros(x.shape[1] + 1, 10, dtype=torch.float64) for _ in range(3))
    for step in range(1, 21):
        g = inputs.T @ ((inputs @ w).softmax(1) - target) / len(x)
        first, second = 0.9 * first + 0.1 * g, 0.999 * second + 0.001 * g**2
        w = w * (1 - 0.01 * LR)
        w = w - LR * (first / (1 - 0.9**step)) / ((second / (1 - 0.999**step)).sqrt() + 1e-8)
    for part, (x, y) in parts_.items():
        logits = torch.cat([x, torch.ones(len(x), 1, dtype=torch.float64)], 1) @ w
        ce = -logits.log_softmax(1)[torch.arange(len(y)), y].mean()
        assert summary[f"probe_{part}_ce"] == pytest.approx(float(ce), rel=1e-3)
        assert summary[f"probe_{part}_error"] == pytest.approx(
            float((logits.argmax(1) != y).double().mean()), abs=1.5 / len(y)
        )


def test_a_probe_draws_nothing_and_keeps_the_mode() -> None:
    model = initial_model(ModelSpec("wrn-10-1", (1, 8, 8), 8, 0.5), 0).train()
    assert isinstance(model, Contrastive)
    digits = open_source("digits", labeled=True).pool
    batches = Batches(digits.select(torch.arange(60)), Normalization.of(digits), batch_size=25)
    state, before = torch.get_rng_state(), copy.deepcopy(model.state_dict())
    one = linear_probe(model, batches, batches, classes=10, seed=0)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(module.training for module in model.modules())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    torch.manual_seed(1)
    assert linear_probe(model, batches, batches, classes=10, seed=0) == one
    assert one["probe_train_error"] == one["probe_test_error"]


# what a run holds


def test_learns(tmp_path: Path) -> None:
    """NT-Xent falls, and pairs of views find each other in the last epoch's fresh draws better than by chance."""
    settings = simclr(num_train=800, epochs=12, batch_size=64, model="wrn-10-1", lr=0.1, probe_every=6)
    summary = train(settings, tmp_path)
    found = rows(tmp_path)
    assert found[-1]["running_nt_xent"] < min(found[0]["running_nt_xent"], math.log(127)) - 0.2
    assert found[-1]["running_partner_error"] < 0.97  # by chance 126/127
    assert summary["probe_test_error"] < 0.4


def test_one_step_by_hand(tmp_path: Path) -> None:
    """Gradient descent on the naive NT-Xent of the views, without the loop's or the rules' code."""
    settings = simclr(num_train=32, epochs=1, lr=0.3, momentum=0.0)
    training = Training(settings, tmp_path / "twin")
    model, sampler = training.model, training.sampler
    draws = torch.Generator().manual_seed(zlib.crc32(b"0:0"))
    [chosen] = sampler.deal(draws)
    raw = training.splits.train.x[chosen]
    mean, std = (
        torch.tensor(v).view(1, -1, 1, 1) for v in (training.normalization.mean, training.normalization.std)
    )
    x = torch.cat([(see(raw, draw_views(raw.shape, draws)) - mean) / std for _ in range(2)])
    z = functional.normalize(model.head(model.encoder(x)), dim=1)  # type: ignore[operator]
    similar = (z @ z.T / 0.5).masked_fill(torch.eye(64, dtype=torch.bool), -torch.inf).log_softmax(1)
    loss = -torch.stack([similar[i, (i + 32) % 64] for i in range(64)]).mean()
    loss.backward()
    expected = {n: p - 0.3 * p.grad for n, p in model.named_parameters()}  # type: ignore[operator]
    train(settings, tmp_path / "run")
    found = load_file(tmp_path / "run" / CHECKPOINT)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-6)
    [row] = rows(tmp_path / "run")
    assert row["running_nt_xent"] == row["running_loss"] == pytest.approx(float(loss.detach()), rel=1e-5)
    partners = [(i + 32) % 64 for i in range(64)]
    wrong = [int(similar[i].argmax()) != partners[i] for i in range(64)]
    assert row["running_partner_error"] == sum(wrong) / 64


def test_the_summary_says_only_what_an_encoder_has(tmp_path: Path) -> None:
    summary = train(simclr(epochs=4, probe_every=2, labels=50), tmp_path)
    assert not {"test_error", "train_ce", "error_gap", "ce_gap", "met_stop_ce"} & summary.keys()
    assert summary["nt_xent"] == rows(tmp_path)[-1]["running_nt_xent"]
    assert (summary["num_train"], summary["num_unlabeled_train"]) == (50, 150)
    probed = [row["probe_test_error"] for row in rows(tmp_path) if "probe_test_error" in row]
    assert len(probed) == 2
    assert summary["probe_test_error"] == probed[-1]
    assert summary["probe_test_error_min"] == min(probed)
    assert not {"running_ce", "running_error"} & rows(tmp_path)[0].keys()


def test_correlate_leaves_encoders_out(tmp_path: Path) -> None:
    out = tmp_path / "encoder"
    train(simclr(epochs=1), out)
    found = measure_checkpoint(
        out, own_unlabeled(out), ["mean_entropy"], Settings(), head="simclr", batch_size=32
    )
    merge_measures(out / MEASURES, found)
    with pytest.raises(DataError, match="SimCLR encoders have neither"):
        load_table(tmp_path)


def test_curves_show_probes(tmp_path: Path) -> None:
    train(simclr(track_every=1), tmp_path)
    figure = run_curves(list(read_metrics(tmp_path)))
    lines = {axes.get_ylabel(): [line.get_label() for line in axes.get_lines()] for axes in figure.axes}
    assert lines["NT-Xent"] == ["training, running"]
    assert lines["error"] == ["linear probe, training", "linear probe, test"]
    assert "divergence" in lines


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"m": 8}, "simclr takes no m"),
        ({"augment": True}, "takes no augment"),
        ({"stop_ce": 0.1}, "takes no stop_ce"),
        ({"label_smoothing": 0.1}, "takes no label_smoothing"),
        ({"eval_every": 1}, "takes no eval_every"),
        ({"batch_size": 1}, "batch_size must be at least 2"),
        ({"temperature": 0.0}, "temperature"),
        ({"probe_every": -1}, "probe_every"),
    ],
)
def test_settings_that_make_no_sense(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        simclr(**changes)


def test_a_batch_must_be_filled(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="do not fill a batch of 300"):
        train(simclr(batch_size=300), tmp_path)


def test_idle_options() -> None:
    assert {"temperature", "probe_every"} <= config().idle().keys()
    assert not {"temperature", "probe_every"} & simclr().idle().keys()
    assert "mu" in simclr().idle()


# mixed precision


AMP: dict[str, dict[str, Any]] = {
    "joint": {
        "objective": "joint",
        "labels": 40,
        "batch_size": 10,
        "mu": 3,
        "probe_every": 0,
        "method": "iam-d",
    },
    "fixmatch": {"objective": "fixmatch", "labels": 40, "batch_size": 10, "mu": 3, "probe_every": 0},
    "simclr": {"method": "iam-d", "noise_scale": 1.0},
    "simclr onepass": {"method": "iam-d-onepass"},
}


@pytest.mark.parametrize("amp", ["bf16", "fp16"])
@pytest.mark.parametrize("name", AMP)
def test_half_precision_trains_much_as_float32_does(name: str, amp: str, tmp_path: Path) -> None:
    """Weights stay float32, and the first epoch's loss agrees to bfloat16's few digits."""
    settings = simclr(**AMP[name], lr=0.02)
    train(settings, tmp_path / "float32")
    train(settings.replace(amp=amp), tmp_path / "half")
    exact, rounded = (rows(tmp_path / kind)[0]["running_loss"] for kind in ("float32", "half"))
    assert rounded == pytest.approx(exact, rel=0.02)
    assert rounded != exact
    assert all(value.dtype == torch.float32 for value in load_file(tmp_path / "half" / CHECKPOINT).values())
    again = train_interrupted(settings.replace(amp=amp), tmp_path / "again", 1)
    assert again["status"] == "finished"
    assert same_weights(tmp_path / "half", tmp_path / "again")
