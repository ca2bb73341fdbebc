"""``gmprobe estimate`` and ``gm_probe.estimate``: three tiers that claim what their labels allow, and one report."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command_line import run
from torch import nn

import gm_probe
from gm_probe.data.batches import Normalization

CLASSES = 4


def pictures(count: int, seed: int, noise: float = 60.0) -> tuple[np.ndarray, np.ndarray]:
    """Images (N, 1, 8, 8) as uint8 with one bright quadrant, which is the class (N,), in noise."""
    random = np.random.default_rng(seed)
    labels = random.integers(0, CLASSES, count)
    images = np.full((count, 1, 8, 8), 90.0)
    for row, label in enumerate(labels):
        top, left = 4 * (label // 2), 4 * (label % 2)
        images[row, 0, top : top + 4, left : left + 4] += 35
    images += random.normal(0, noise, images.shape)
    return images.clip(0, 255).astype(np.uint8), labels


def fitted(count: int, seed: int) -> nn.Module:
    """A linear classifier by least squares on ``count`` images: fewer images, a worse classifier."""
    x, y = pictures(count, seed)
    flat = torch.from_numpy(x).flatten(1).double() / 255
    flat = torch.cat([flat, torch.ones(count, 1, dtype=torch.float64)], 1)
    target = 8 * nn.functional.one_hot(torch.from_numpy(y), CLASSES).double()
    ridge = flat.T @ flat + 0.5 * torch.eye(65, dtype=torch.float64)
    weight = torch.linalg.solve(ridge, flat.T @ target).float()
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, CLASSES))
    with torch.no_grad():
        model[1].weight.copy_(weight[:64].T)
        model[1].bias.copy_(weight[64])
    return model


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("estimate")
    (folder / "net.py").write_text(
        f"from torch import nn\ndef build(): return nn.Sequential(nn.Flatten(), nn.Linear(64, {CLASSES}))\n"
    )
    for name, count, seed in (("poor", 90, 1), ("good", 4000, 1), ("alike", 4000, 7)):
        torch.save(fitted(count, seed).state_dict(), folder / f"{name}.pt")
    for name, count, seed in (
        ("validation", 400, 2),
        ("unlabeled", 500, 3),
        ("few", 120, 4),
        ("tiny", 30, 5),
    ):
        x, y = pictures(count, seed)
        np.savez(folder / f"{name}.npz", x=x, **({} if name == "unlabeled" else {"y": y}))
    x, y = pictures(500, 3)
    np.savez(folder / "truth.npz", x=x, y=y)
    np.savez(folder / "one-class.npz", x=x, y=np.zeros_like(y))
    np.savez(folder / "other-classes.npz", x=x, y=y + 5)
    return folder


def estimated(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    *options: str,
    models: tuple[str, str] = ("poor.pt", "good.pt"),
) -> tuple[int, str, str]:
    monkeypatch.chdir(folder)
    words = ["estimate", *models, "--model", "net.py:build", "--no-normalize", "--device", "cpu", "-q"]
    return run([*words, "--unlabeled", "unlabeled.npz", *options], capsys)


def true_accuracies(folder: Path) -> dict[str, float]:
    with np.load(folder / "truth.npz") as file:
        x, y = torch.from_numpy(file["x"]).float() / 255, torch.from_numpy(file["y"])
    found = {}
    for name in ("poor", "good"):
        model = nn.Sequential(nn.Flatten(), nn.Linear(64, CLASSES))
        model.load_state_dict(torch.load(folder / f"{name}.pt", weights_only=True))
        with torch.no_grad():
            found[f"{name}.pt"] = float((model(x).argmax(1) == y).double().mean())
    return found


@pytest.mark.parametrize("labels", [("--validation", "validation.npz"), ("--few-labels", "few.npz")])
def test_intervals_hold_the_truth_and_the_better_one_leads(
    prepared: Path,
    labels: tuple[str, str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    code, out, err = estimated(prepared, monkeypatch, capsys, *labels, "--json")
    assert code == 0, err
    found = json.loads(out)
    assert {"unlabeled", "validation", "checkpoints", "agreement", "conclusion"} <= set(found)
    rows = found["checkpoints"]
    assert [row["rank"] for row in rows] == [1, 2]
    assert [row["checkpoint"] for row in rows] == ["good.pt", "poor.pt"]
    truth = true_accuracies(prepared)
    assert truth["good.pt"] - truth["poor.pt"] > 0.05
    for row in rows:
        accuracy = row["accuracy"]
        assert {"value", "low", "high", "level", "method", "assumption"} <= set(accuracy)
        assert accuracy["low"] <= truth[row["checkpoint"]] <= accuracy["high"]
        assert accuracy["low"] <= accuracy["value"] <= accuracy["high"]
        assert all("value" in estimator for estimator in row["estimators"].values())
    assert np.shape(found["agreement"]) == (2, 2)
    assert "good.pt" in found["conclusion"]


def test_nothing_labeled_claims_no_accuracy(
    prepared: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = estimated(prepared, monkeypatch, capsys, "--json")
    assert code == 0, err
    found = json.loads(out)
    for row in found["checkpoints"]:
        assert row["accuracy"] is None
        assert "not identifiable" in row["reason"]


def test_the_images_to_label_are_those_on_which_the_leaders_disagree(
    prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "label.csv"
    options = ("--validation", "validation.npz", "--suggest", str(file), "--json")
    # one leads: there is nothing to label
    code, out, err = estimated(prepared, monkeypatch, capsys, *options)
    assert code == 0, err
    assert file.read_text(encoding="utf-8").count("\n") == 1
    alike = ("good.pt", "alike.pt")
    code, out, err = estimated(prepared, monkeypatch, capsys, *options, models=alike)
    assert code == 0, err
    with file.open(encoding="utf-8", newline="") as stream:
        rows = list(csv.DictReader(stream))
    disagreement = 1 - json.loads(out)["agreement"][0][1]
    assert len(rows) == pytest.approx(500 * disagreement, abs=0.5)
    assert len(rows) > 0


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        (("--validation", "one-class.npz"), 4, "class"),
        (("--validation", "other-classes.npz"), 4, "class"),
        (("--validation", "nowhere.npz"), 2, "nowhere.npz"),
        (("--validation", "unlabeled.npz"), 4, "labels"),
        (("--validation", "validation.npz", "--level", "1"), 2, "level"),
        (("--validation", "validation.npz", "--class-shares", "unifrom"), 2, "uniform"),
    ],
)
def test_bad_input_is_one_line(
    prepared: Path,
    options: tuple[str, ...],
    code: int,
    words: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    found, _, err = estimated(prepared, monkeypatch, capsys, *options)
    assert (found, words in err) == (code, True), err
    assert err.count("\n") == 1


def test_groups_of_measures_and_one_working_process(
    prepared: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("--validation", "validation.npz", "--measures", "outputs", "--json")
    code, out, err = estimated(prepared, monkeypatch, capsys, *options)
    assert code == 0, err
    for row in json.loads(out)["checkpoints"]:
        assert row["measures"]["cot"]["value"] == pytest.approx(row["estimators"]["cot"]["score"], rel=1e-4)
        assert "effective_invariance" in row["estimators"]
    monkeypatch.setenv("RANK", "1")  # the second of the processes that torchrun started
    assert estimated(prepared, monkeypatch, capsys, *options) == (0, "", "")


def test_outputs_that_are_not_finite_name_the_checkpoint(
    prepared: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = torch.load(prepared / "good.pt", weights_only=True)
    torch.save(
        {key: (value * 1e38).clamp(-3e38, 3e38) for key, value in weights.items()},
        prepared / "overflowing.pt",
    )
    code, _, err = estimated(prepared, monkeypatch, capsys, models=("good.pt", "overflowing.pt"))
    assert (code, err.count("\n")) == (5, 1)
    assert "overflowing.pt: the model's output on example" in err


def test_small_and_shared_sets_are_said(
    prepared: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = estimated(prepared, monkeypatch, capsys, "--validation", "tiny.npz", "--json")
    assert code == 0, err
    assert any("30" in line for line in json.loads(out)["notes"])
    code, out, err = estimated(prepared, monkeypatch, capsys, "--validation", "truth.npz", "--json")
    assert code == 0, err
    assert any("500" in line for line in json.loads(out)["notes"])


def test_python_gives_what_the_command_gives(
    prepared: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def batches(name: str) -> gm_probe.Batches:
        with np.load(prepared / f"{name}.npz") as file:
            data = {key: torch.from_numpy(file[key]) for key in file.files}
        return gm_probe.Batches(gm_probe.Examples(data["x"], data.get("y"), (), name), Normalization())

    models: dict[str, Any] = {"poor": fitted(90, 1), "good": fitted(4000, 1)}
    report = gm_probe.estimate(models, batches("unlabeled"), validation=batches("validation"))
    _, out, _ = estimated(prepared, monkeypatch, capsys, "--validation", "validation.npz", "--json")
    theirs = {row["checkpoint"]: row["accuracy"]["value"] for row in json.loads(out)["checkpoints"]}
    ours = report.as_dict()["checkpoints"]
    assert [row["checkpoint"] for row in ours] == ["good", "poor"]
    for row in ours:
        assert row["accuracy"]["value"] == pytest.approx(theirs[f"{row['checkpoint']}.pt"], abs=1e-3)
