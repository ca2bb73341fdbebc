"""`gm_probe.estimate` and `gmprobe estimate` from end to end, on networks that learned the bundled digits."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command_line import run
from PIL import Image
from torch import Tensor, nn

import gm_probe
from gm_probe.accuracy.shifts import noise
from gm_probe.data.batches import Batches
from gm_probe.data.datasets import open_source
from gm_probe.data.examples import Examples
from gm_probe.data.normalization import Normalization
from gm_probe.errors import DataError, ProbeError, UsageError
from gm_probe.models.checkpoints import save_checkpoint
from gm_probe.models.zoo import ModelSpec, build_model

SPEC = ModelSpec("mlp-32", (1, 8, 8), 10)


def learned(examples: Examples, steps: int, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    model = build_model(SPEC)
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    x = examples.x.float() / 255
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), examples.y).backward()
        optimizer.step()
    return model.eval()


class World:
    """Digits in four disjoint parts, and three models: two that have learned well, one that has not."""

    def __init__(self) -> None:
        pool = open_source("digits", labeled=True).pool
        order = torch.randperm(len(pool), generator=torch.Generator().manual_seed(0))
        self.train, self.validation, self.target = (
            pool.select(order[a:b]) for a, b in ((0, 400), (400, 1000), (1000, 1797))
        )
        pixels = self.target.x.float() / 255
        noisy = noise(pixels, torch.Generator().manual_seed(0), 0.25).clamp(0, 1)
        x = (255 * noisy).round().to(torch.uint8)
        self.noisy = Examples(x, self.target.y, self.target.classes, "noisy digits")
        self.models = {
            "good": learned(self.train, 60, 0),
            "also good": learned(self.train, 60, 1),
            "poor": learned(self.train.select(torch.arange(40)), 60, 2),
        }

    def true(self, name: str, examples: Examples) -> float:
        with torch.no_grad():
            return float(
                (self.models[name](examples.x.float() / 255).argmax(1) == examples.y).double().mean()
            )


@pytest.fixture(scope="module")
def world() -> World:
    return World()


def batches(examples: Examples) -> Batches:
    return Batches(examples, Normalization())


# ---- three tiers


def test_without_labels_no_accuracy_is_claimed(world: World) -> None:
    report = gm_probe.estimate(world.models, batches(world.target.unlabeled()))
    assert all(model.accuracy is None and "not identifiable" in model.reason for model in report.models)
    assert [model.rank for model in report.models] == [1, 2, 3]
    assert report.models[-1].name == "poor"
    assert report.conclusion.startswith("No accuracy is claimed")
    assert "poor" in report.conclusion
    assert report.labels_needed is None


def test_a_validation_set_gives_intervals_and_an_order(world: World) -> None:
    report = gm_probe.estimate(
        world.models, batches(world.noisy.unlabeled()), validation=batches(world.validation)
    )
    assert report.models[-1].name == "poor"
    assert report.models[-1].separated
    assert not report.models[0].separated
    for model in report.models:
        assert model.accuracy.low <= world.true(model.name, world.noisy) <= model.accuracy.high
        assert model.accuracy.low < model.accuracy.value < model.accuracy.high
        assert model.validation_accuracy == pytest.approx(world.true(model.name, world.validation))
        assert {"cot", "atc", "doc", "nuclear_norm", "agreement", "dispersion"} <= set(model.estimators)
    assert "synthetic shifts" in report.models[0].accuracy.method
    assert report.conclusion.startswith(f"{report.models[0].name} leads with ")
    assert "cannot be distinguished from it" in report.conclusion
    again = gm_probe.estimate(
        world.models, batches(world.noisy.unlabeled()), validation=batches(world.validation)
    )
    assert again.models[0].accuracy == report.models[0].accuracy


def test_few_labels_need_no_assumption_on_the_shift(world: World) -> None:
    few = world.noisy.select(
        torch.randperm(len(world.noisy), generator=torch.Generator().manual_seed(1))[:150]
    )
    report = gm_probe.estimate(world.models, batches(world.noisy.unlabeled()), few_labels=batches(few))
    for model in report.models:
        assert model.accuracy.low <= world.true(model.name, world.noisy) <= model.accuracy.high
        assert "random sample" in model.accuracy.assumption
    assert report.models[-1].separated
    assert report.num_labels == 150


def test_labels_of_no_random_sample_are_told(world: World) -> None:
    examples = world.noisy
    models = {name: world.models[name] for name in ("good", "poor")}
    with torch.no_grad():
        classes = [model(examples.x.float() / 255).argmax(1) for model in models.values()]
    apart = (classes[0] != classes[1]).nonzero()[:, 0]
    drawn = torch.randperm(len(examples), generator=torch.Generator().manual_seed(2))[: len(apart)]
    for few, told in ((apart, True), (drawn, False)):
        report = gm_probe.estimate(
            models, batches(examples.unlabeled()), few_labels=batches(examples.select(few))
        )
        assert any("they are no random sample" in note for note in report.notes) == told


def test_few_labels_of_the_validation_set_or_of_other_classes_are_told(world: World) -> None:
    few, wrong = world.validation.select(torch.arange(50)), world.noisy.select(torch.arange(80, 120))
    for labeled, note in (
        (few, "50 of 50 few-labels examples are also in"),
        (wrong, "few-labels examples, no better"),
    ):
        given = replace(labeled, y=(labeled.y + (labeled is wrong)) % 10)
        report = gm_probe.estimate(
            world.models["good"], batches(world.noisy.unlabeled()), validation=batches(world.validation),
            few_labels=batches(given),
        )  # fmt: skip
        assert sum(note in one for one in report.notes) == 1
        assert len(report.notes) == 1


def test_tables_have_errors_from_halves_of_the_validation_set(world: World) -> None:
    def flat(examples: Examples) -> tuple[Tensor, Tensor]:
        return 2 * examples.x.float().flatten(1) / 255 - 1, examples.y

    class Flat(nn.Module):
        def __init__(self, model: nn.Module) -> None:
            super().__init__()
            self.model = model

        def forward(self, x: Tensor) -> Tensor:
            return self.model((x.view(-1, 1, 8, 8) + 1) / 2)

    report = gm_probe.estimate(
        Flat(world.models["good"]), flat(world.target)[0], validation=flat(world.validation)
    )
    (model,) = report.models
    assert any("cannot be shifted" in line for line in report.notes)
    assert "halves" in model.accuracy.method
    assert model.accuracy.low <= world.true("good", world.target) <= model.accuracy.high
    assert report.agreement == ((1.0,),)


# ---- class shares


def skewed_target(world: World) -> Examples:
    """Of the first five digits all, of the others an eighth."""
    labels = world.target.y
    kept = (labels < 5) | (torch.arange(len(labels)) % 8 == 0)
    return world.target.select(kept.nonzero()[:, 0])


def test_a_change_of_the_class_shares_is_seen(world: World) -> None:
    target = skewed_target(world)
    given = {"validation": batches(world.validation)}
    auto = gm_probe.estimate(world.models["good"], batches(target.unlabeled()), **given).models[0].accuracy
    assert set(auto.readings) >= {"estimated"}
    truth = world.true("good", target)
    assert auto.low <= truth <= auto.high
    found = {}
    shares = target.y.bincount(minlength=10).double()
    for name, choice in (("validation", "validation"), ("estimated", "estimated"), ("known", shares)):
        made = gm_probe.estimate(
            world.models["good"], batches(target.unlabeled()), class_shares=choice, **given
        )
        found[name] = made.models[0].accuracy.value
    assert abs(found["estimated"] - truth) < abs(found["validation"] - truth)
    assert abs(found["known"] - truth) < abs(found["validation"] - truth)


@pytest.mark.parametrize(
    ("shares", "message"),
    [
        ("even", "no class shares 'even'"),
        ([0.5, 0.5], "2 class shares are given, but the models have 10"),
        ([-1.0] * 10, "number ≥ 0"),
        ([0.0] * 10, "sum above 0"),
        (["a"] * 10, "hold no numbers"),
    ],
)
def test_class_shares_that_are_none(world: World, shares: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        gm_probe.estimate(
            world.models["good"],
            batches(world.target),
            validation=batches(world.validation),
            class_shares=shares,
        )


# ---- what does not fit


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda v: v.unlabeled(), "no class labels"),
        (lambda v: v.select((v.y == 3).nonzero()[:, 0]), "one class only"),
        (lambda v: v.select(torch.arange(12)), "12 validation examples"),
        (lambda v: Examples(v.x[:, :, 1:], v.y, (), "cut"), r"cut has examples of shape \(1, 7, 8\)"),
        (lambda v: Examples(v.x, v.y + 5, (), "moved"), "labels up to 14"),
    ],
)
def test_a_validation_set_that_does_not_fit(world: World, change: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        gm_probe.estimate(
            world.models["good"], batches(world.target), validation=batches(change(world.validation))
        )


def test_notes_on_sets_that_mislead(world: World) -> None:
    few = world.validation.select(torch.arange(100))
    report = gm_probe.estimate(
        world.models["good"], batches(few.select(torch.arange(30)).unlabeled()), validation=batches(few)
    )
    notes = " ".join(report.notes)
    assert "only 30 examples" in notes
    assert "only 100 validation examples" in notes
    assert "30 of 30 unlabeled examples are also in" in notes
    trained = gm_probe.estimate(
        learned(world.train, 300, 0), batches(world.target), validation=batches(world.train), level=0.99
    )
    assert any("too few for a level of 0.99" in line for line in trained.notes)
    assert any("makes no error on the 400 validation examples" in line for line in trained.notes)


def test_a_validation_set_of_other_labels_or_too_few_classes_is_noted(world: World) -> None:
    v = world.validation
    numbered = Examples(v.x, (v.y + 1) % 10, (), "numbered otherwise")
    report = gm_probe.estimate(world.models["good"], batches(world.target), validation=batches(numbered))
    assert any("no better than chance (10.0 %)" in line for line in report.notes)
    lacking = v.select((v.y != 2).nonzero()[:, 0])
    report = gm_probe.estimate(world.models["good"], batches(world.target), validation=batches(lacking))
    assert any("no example of 1 of 10 classes (the first: index 2)" in line for line in report.notes)


def test_a_yes_or_no_model_is_a_classifier_of_two_classes(world: World) -> None:
    """With the logits 0 and z of its two classes."""
    torch.manual_seed(0)
    one, two = nn.Linear(64, 1), nn.Linear(64, 2)
    with torch.no_grad():
        two.weight.copy_(torch.cat([torch.zeros(1, 64), one.weight]))
        two.bias.copy_(torch.cat([torch.zeros(1), one.bias]))
    v = world.validation
    with torch.no_grad():
        y = (one(v.x.flatten(1).float() / 255)[:, 0] > 0).long()
    y[:100] = 1 - y[:100]
    even = Examples(v.x, y, (), "yes or no")

    def scores(layer: nn.Linear, head: str) -> Any:
        how = gm_probe.Outputs(head=head)
        found = gm_probe.estimate(
            nn.Sequential(nn.Flatten(), layer), batches(world.target), validation=batches(even), outputs=how
        )
        return {name: one["score"] for name, one in found.models[0].estimators.items()}

    binary, both = scores(one, "binary"), scores(two, "classifier")
    assert {"atc", "cot", "nuclear_norm"} <= set(binary)
    assert binary == pytest.approx({name: both[name] for name in binary}, rel=1e-4)


def test_models_that_cannot_be_estimated(world: World) -> None:
    with pytest.raises(UsageError, match="no model is given"):
        gm_probe.estimate([], batches(world.target))
    other = nn.Sequential(nn.Flatten(), nn.Linear(64, 3))
    with pytest.raises(DataError, match="only models with the same classes"):
        gm_probe.estimate([world.models["good"], other], batches(world.target))
    with pytest.raises(UsageError, match="exclusive classes"):
        gm_probe.estimate(other, batches(world.target), outputs=gm_probe.Outputs(head="multilabel"))
    with pytest.raises(UsageError, match="used with a validation set"):
        gm_probe.estimate(other, batches(world.target), class_shares="uniform")
    table = nn.Linear(4, 3)
    with pytest.raises(UsageError, match="mirrors images"):
        gm_probe.estimate(table, torch.randn(60, 4), measures=["effective_invariance"])
    with pytest.raises(UsageError, match="models is a int"):
        gm_probe.estimate(5, batches(world.target))
    with pytest.raises(UsageError, match="no measure 'sharp'"):
        gm_probe.estimate(other, batches(world.target), measures=["sharp"])
    with pytest.raises(UsageError, match="level = 2"):
        gm_probe.estimate(other, batches(world.target), level=2.0)
    broken = build_model(SPEC)
    with torch.no_grad():
        next(broken.parameters())[0] = torch.nan
    with pytest.raises(ProbeError, match="NaN or infinite"):
        gm_probe.estimate(broken, batches(world.target))


# ---- the command line


@pytest.fixture
def here(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name, model in world.models.items():
        path = tmp_path / f"{name.replace(' ', '-')}.pt"
        save_checkpoint(path, model, SPEC, Normalization(), world.train.classes)
    for name in ("validation", "target", "noisy"):
        examples = getattr(world, name)
        np.savez(tmp_path / f"{name}.npz", x=examples.x.numpy(), y=examples.y.numpy())
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_json_has_what_is_promised(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = (
        "gmprobe estimate good.pt also-good.pt poor.pt --unlabeled noisy.npz --validation validation.npz "
        "--measures mean_entropy,effective_invariance --suggest suggested.csv --json"
    )
    code, out, err = run(command, capsys)
    assert code == 0, err
    result = json.loads(out)
    assert {"unlabeled", "validation", "checkpoints", "agreement", "conclusion"} <= set(result)
    first, second, last = result["checkpoints"]
    assert last["checkpoint"] == "poor.pt"
    assert [row["rank"] for row in (first, second, last)] == [1, 2, 3]
    assert set(first["accuracy"]) >= {"value", "low", "high", "level", "method", "assumption"}
    assert first["estimators"]["effective_invariance"]["value"] is not None
    assert first["measures"]["mean_entropy"]["value"] > 0
    assert len(result["agreement"]) == 3
    assert result["agreement"][0][1] == pytest.approx(result["agreement"][1][0])
    with (here / "suggested.csv").open() as file:
        rows = list(csv.DictReader(file))
    leaders = [row["checkpoint"] for row in (first, second)]
    assert list(rows[0]) == ["index", *leaders]
    assert all(row[leaders[0]] != row[leaders[1]] for row in rows)
    apart = round((1 - result["agreement"][0][1]) * result["num_unlabeled"])
    assert len(rows) == apart


def test_suggested_images_are_named_by_their_files(
    here: Path, world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    (here / "images").mkdir()
    for index, image in enumerate(world.noisy.x[:120, 0].numpy()):
        Image.fromarray(image).save(here / "images" / f"{index:03d}.png")
    command = "gmprobe estimate good.pt poor.pt --unlabeled images --max-examples 90 --suggest s.csv -q"
    assert run(command, capsys)[0] == 0
    with (here / "s.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert rows
    with torch.no_grad():
        for row in rows:
            image = torch.from_numpy(np.array(Image.open(row["file"])))[None, None].float() / 255
            for name in ("good", "poor"):
                assert int(world.models[name](image).argmax()) == int(row[f"{name}.pt"])


def test_the_table_ends_with_a_conclusion(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run("gmprobe estimate good.pt poor.pt --unlabeled target.npz -q", capsys)
    assert code == 0
    assert "No accuracy is claimed" in out
    assert "confidence" in out
    few = "gmprobe estimate good.pt poor.pt --unlabeled target.npz --few-labels validation.npz"
    code, out, _ = run(f"{few} -q", capsys)
    assert code == 0
    assert "good.pt leads with" in out
    assert "it differs detectably from every other model" in out
    code, out, _ = run(f"{few} --csv -q", capsys)
    rows = list(csv.DictReader(out.splitlines()))
    assert [row["checkpoint"] for row in rows] == ["good.pt", "poor.pt"]
    assert float(rows[0]["low"]) < float(rows[0]["value"]) < float(rows[0]["high"])


def test_where_one_leads_there_is_nothing_to_label(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    few = "gmprobe estimate good.pt poor.pt --unlabeled target.npz --few-labels validation.npz"
    code, _, err = run(f"{few} --suggest s.csv", capsys)
    assert code == 0
    assert "note: s.csv is empty: there are no leaders that disagree" in err
    assert (here / "s.csv").read_text().count("\n") == 1


def test_a_group_of_measures_and_one_working_process(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    command = "gmprobe estimate good.pt --unlabeled target.npz --validation validation.npz --measures outputs --json -q"
    code, out, err = run(command, capsys)
    assert code == 0, err
    [row] = json.loads(out)["checkpoints"]
    assert row["measures"]["doc"]["value"] == pytest.approx(row["estimators"]["doc"]["score"], rel=1e-4)
    assert "effective_invariance" in row["estimators"]
    monkeypatch.setenv("RANK", "1")  # the second of the processes that torchrun started
    assert run(command, capsys) == (0, "", "")


def test_outputs_that_are_not_finite_name_the_checkpoint(
    here: Path, world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    model = build_model(SPEC)
    model.load_state_dict({k: v * 1e38 for k, v in world.models["good"].state_dict().items()})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.clamp_(-3e38, 3e38)
    save_checkpoint(here / "overflowing.pt", model, SPEC, Normalization(), world.train.classes)
    code, _, err = run("gmprobe estimate good.pt overflowing.pt --unlabeled target.npz -q", capsys)
    assert (code, err.count("\n")) == (5, 1)
    assert "overflowing.pt: the model's output on example" in err


def test_python_gives_what_the_command_gives(
    here: Path, world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    models = {"poor": world.models["poor"], "good": world.models["good"]}
    report = gm_probe.estimate(models, batches(world.noisy), validation=batches(world.validation))
    command = "gmprobe estimate poor.pt good.pt --unlabeled noisy.npz --validation validation.npz --json -q"
    rows = json.loads(run(command, capsys)[1])["checkpoints"]
    assert [f"{model.name}.pt" for model in report.models] == [row["checkpoint"] for row in rows]
    for model, row in zip(report.models, rows, strict=True):
        assert model.accuracy.value == pytest.approx(row["accuracy"]["value"], abs=1e-3)


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        ("good.pt", 2, "--unlabeled"),
        ("none.pt --unlabeled target.npz", 3, "none.pt: no such checkpoint"),
        ("good.pt --unlabeled target.npz --validation nowhere", 2, "nowhere"),
        ("good.pt --unlabeled target.npz --class-shares even", 2, "even is neither"),
        ("good.pt --unlabeled target.npz --class-shares words.txt", 2, "one number per class"),
        ("good.pt --unlabeled target.npz --measures sharp", 2, "sharp"),
        ("good.pt --unlabeled target.npz --level 0", 2, "level"),
        ("good.pt --unlabeled target.npz --validation x.npy", 4, "no labels"),
    ],
)
def test_what_cannot_be_is_told(
    here: Path, options: str, code: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (here / "words.txt").write_text("a b")
    np.save(here / "x.npy", np.zeros((30, 1, 8, 8), dtype=np.uint8))
    found, _, err = run(f"gmprobe estimate {options} -q", capsys)
    assert found == code
    assert message in err
    assert len(err.strip().splitlines()) == 1


def test_class_shares_may_stand_in_a_file(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (here / "shares.txt").write_text("1, 1, 1, 1, 1, 1, 1, 1, 1, 1\n")
    base = (
        "gmprobe estimate good.pt --unlabeled target.npz --validation validation.npz --json -q --class-shares"
    )
    values = [
        json.loads(run(f"{base} {shares}", capsys)[1])["checkpoints"][0]["accuracy"]["value"]
        for shares in ("shares.txt", "uniform")
    ]
    assert values[0] == pytest.approx(values[1])


def test_class_folders_of_other_classes_are_refused(
    here: Path, world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    for index in range(3):
        folder = here / "val" / f"class{index}"
        folder.mkdir(parents=True)
        for number in range(10):
            Image.fromarray(world.target.x[number, 0].numpy()).save(folder / f"{number}.png")
    code, _, err = run("gmprobe estimate good.pt --unlabeled target.npz --validation val -q", capsys)
    assert code == 4
    assert "val has classes class0, class1, class2 but good.pt was trained on" in err
