"""`gmprobe pairs` as a user meets it: tiny runs that the command line trained, output, notes, exit codes."""

from __future__ import annotations

import csv
import io
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command_line import run
from PIL import Image

from gm_probe.cli import main
from gm_probe.data.batches import Batches
from gm_probe.data.normalization import Normalization
from gm_probe.files.atomic import read_json, write_json
from gm_probe.measures.catalogue import PAIR_MEASURES
from gm_probe.measures.pairwise import compare
from gm_probe.models.checkpoints import read_checkpoint, save_checkpoint
from gm_probe.models.loading import load_model
from gm_probe.models.zoo import ModelSpec, build_model
from gm_probe.training.run_splits import own_unlabeled


def result_of(command: str, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    code, out, err = run(f"{command} --json", capsys)
    assert code == 0, err
    return json.loads(out)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three runs on 60 digits and two on 90, all beside the same unlabeled part; and one beside another."""
    root = tmp_path_factory.mktemp("pairs")
    sizes = {"a0": (60, 0, 0), "a1": (60, 1, 0), "a2": (60, 2, 0), "b0": (90, 0, 0), "b1": (90, 1, 0)}
    for name, (size, seed, split) in {**sizes, "c0": (60, 0, 1)}.items():
        place = root / ("other" if name == "c0" else "runs") / name
        command = (
            f"train --model mlp-4 --epochs 2 --num-train {size} --num-unlabeled 50 --num-test 50 "
            f"--seed {seed} --split-seed {split} --threads 1 --out {place} -q"
        )
        main(command.split())
    return root


@pytest.fixture
def here(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of the test's own with runs/ and other/ as trained."""
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def foreign(here: Path) -> Path:
    """x.pt and y.pt, plain state dicts of an mlp-6 for 8×8 grey images of two classes; data/ of such."""
    spec = ModelSpec("mlp-6", (1, 8, 8), 2)
    for seed, name in enumerate(("x.pt", "y.pt")):
        torch.manual_seed(seed)
        torch.save(build_model(spec).state_dict(), here / name)
    rng = np.random.default_rng(0)
    (here / "data").mkdir()
    for index in range(7):
        Image.fromarray(rng.integers(0, 256, (8, 8), dtype=np.uint8)).save(here / "data" / f"{index}.png")
    return here


# ---- what comes out


def test_the_example_in_the_help_runs_literally(here, capsys):
    example = run("gmprobe pairs --help", capsys)[1].strip().splitlines()[-1].strip()
    assert example == "Example:  gmprobe pairs runs/"
    code, out, err = run(example.removeprefix("Example:").strip(), capsys)
    assert code == 0, err
    for name in PAIR_MEASURES:
        assert name in out
    assert "5 models of 2 training sets  N = 50  C = 10" in out
    assert err == ""


def test_json_follows_the_contract_and_agrees_with_the_library(here, capsys):
    result = result_of("gmprobe pairs runs", capsys)
    keys = {"checkpoints", "training_sets", "excluded", "num_examples", "num_classes", "settings", "measures"}
    assert set(result) == keys | {"skipped", "pairs", "notes"}
    assert (result["num_examples"], result["num_classes"], result["excluded"]) == (50, 10, [])
    names = [row["checkpoint"] for row in result["checkpoints"]]
    assert names == [f"runs/{name}" for name in ("a0", "a1", "a2", "b0", "b1")]
    assert result["settings"]["part"] == "own unlabeled"

    outputs = []
    for name in names:
        checkpoint = read_checkpoint(Path(name))
        [batch] = Batches(own_unlabeled(Path(name)), checkpoint.normalization)
        outputs.append(load_model(checkpoint).eval()(batch.x).detach())
    report = compare(outputs, list("AAABB"))
    for name, row in report.rows.items():
        got = result["measures"][name]
        figures = ("value", "stderr", "stderr_examples")
        for key in figures:
            expected = getattr(row, key)
            assert got[key] == (None if expected is None else pytest.approx(expected, rel=1e-4)), (name, key)
        for key in ("num_pairs", "num_models", "num_training_sets"):
            assert got[key] == getattr(row, key)
    for got, pair in zip(result["pairs"], report.pairs, strict=True):
        assert set(got) == {"a", "b", "disagreement", "kl_ab", "kl_ba", "same_training_set"}
        assert (got["a"], got["b"]) == (names[pair.a], names[pair.b])
        assert got["kl_ab"] == pytest.approx(pair.kl_ab, rel=1e-4)
        assert got["kl_ba"] == pytest.approx(pair.kl_ba, rel=1e-4)
        assert got["same_training_set"] == pair.same_training_set


def test_training_sets_are_read_from_the_records(here, capsys):
    result = result_of("gmprobe pairs runs", capsys)
    first, second = result["training_sets"]
    assert [row["num_train"] for row in (first, second)] == [60, 90]
    assert first["data"] == "digits"
    assert first["checkpoints"] == ["runs/a0", "runs/a1", "runs/a2"]
    assert second["checkpoints"] == ["runs/b0", "runs/b1"]
    assert first["training_set"] != second["training_set"]
    own = [row["training_set"] for row in result["checkpoints"]]
    assert own == [first["training_set"]] * 3 + [second["training_set"]] * 2
    details = result["measures"]["conditional_inconsistency"]["by_training_set"]
    assert [row["training_set"] for row in details] == [first["training_set"], second["training_set"]]
    assert result["notes"] == ["the training sets have 60, 90 examples"]
    # the name is the set's own, whatever else is compared
    alone = result_of("gmprobe pairs runs/a1 runs/a2", capsys)
    assert [row["training_set"] for row in alone["training_sets"]] == [first["training_set"]]


def rewrite(run: Path, **changes: object) -> None:
    """Change a run's record as another machine, or other data, would have written it."""
    config, split = run / "config.toml", read_json(run / "split.json")
    if "data" in changes:
        text = config.read_text().replace('data = "digits"', f'data = "{changes.pop("data")}"')
        config.write_text(text)
    write_json(run / "split.json", {**split, **changes})


@pytest.mark.parametrize(
    ("changes", "same"),
    [
        ({"data": "/elsewhere/digits"}, True),  # a copy: the digest proves the examples equal
        ({"data": "/elsewhere/digits", "sha256": "0"}, False),
        ({"sha256": "0"}, False),  # the same indices of data that has changed
        ({"unlabeled": [1, 2], "sha256": "0"}, True),  # a digest of other parts says nothing
        ({"train": [1, 2]}, False),
    ],
)
def test_what_makes_two_training_sets_the_same(here, capsys, changes, same):
    rewrite(here / "runs" / "a1", **changes)
    result = result_of("gmprobe pairs runs/a0 runs/a1 runs/a2 --unlabeled digits --max-examples 9", capsys)
    assert [pair["same_training_set"] for pair in result["pairs"]] == [same, True, same]


def test_undefined_figures_are_shown_with_their_reason(here, capsys):
    code, out, _ = run("gmprobe pairs runs/a0 runs/a1", capsys)
    assert code == 0
    out = " ".join(out.split())
    assert "instability is undefined: all models have the same training set" in out
    assert "conditional_inconsistency, ± pairs: a training set with only two models" in out
    row = result_of("gmprobe pairs runs/a0 runs/a1", capsys)["measures"]["instability"]
    assert (row["value"], row["stderr"], row["num_pairs"]) == (None, None, 0)
    assert row["reason"]
    rows = result_of("gmprobe pairs runs/a0 runs/b0", capsys)["measures"]
    for name in ("conditional_inconsistency", "inconsistency"):
        assert rows[name]["value"] is None
        assert rows[name]["reason"] == "no training set has two models"
    assert rows["instability"]["value"] > 0
    notes = result_of("gmprobe pairs runs/a0 runs/b0", capsys)["notes"]
    assert any("instability includes inconsistency" in line for line in notes)


def test_csv_has_one_row_a_pair(here, capsys):
    code, out, err = run("gmprobe pairs runs --csv", capsys)
    assert code == 0
    rows = list(csv.DictReader(io.StringIO(out)))
    pairs = result_of("gmprobe pairs runs", capsys)["pairs"]
    assert rows == [{key: str(value) for key, value in pair.items()} for pair in pairs]
    assert err == "note: the training sets have 60, 90 examples\n"
    assert run("gmprobe pairs runs --csv --quiet", capsys)[2] == ""


def test_a_checkpoint_counts_once_however_it_is_named(here, capsys):
    command = "gmprobe pairs runs runs/a0 runs/a1/checkpoint.safetensors ./runs/b0/"
    result = result_of(command, capsys)
    assert len(result["checkpoints"]) == 5
    assert any("counted once" in line for line in result["notes"])
    assert all(pair["a"] != pair["b"] for pair in result["pairs"])
    # the file inside a run folder is that run, with its training set and its data
    result = result_of("gmprobe pairs runs/a1/checkpoint.safetensors runs/a0", capsys)
    assert [row["checkpoint"] for row in result["checkpoints"]] == ["runs/a1", "runs/a0"]
    assert result["pairs"][0]["same_training_set"] is True
    code, _, err = run("gmprobe pairs runs/a0 runs/a0", capsys)
    assert (code, len(err.splitlines())) == (2, 1)


def test_a_copy_is_told(here, capsys):
    shutil.copytree("runs/a0", "runs/copy")
    code, out, _ = run("gmprobe pairs runs/a0 runs/a1 runs/copy", capsys)
    assert code == 0
    assert "runs/copy has the same outputs as runs/a0. Is one model listed twice?" in " ".join(out.split())
    assert "listed twice" not in run("gmprobe pairs runs/a0 runs/a1", capsys)[1]


def test_unfinished_runs_are_counted_and_left_out(here, capsys):
    write_json(here / "runs" / "a0" / "summary.json", {"status": "diverged"})
    (here / "runs" / "a0" / "checkpoint.safetensors").unlink()
    (here / "runs" / "b0" / "summary.json").write_text("{torn")
    result = result_of("gmprobe pairs runs", capsys)
    assert [row["checkpoint"] for row in result["checkpoints"]] == ["runs/a1", "runs/a2", "runs/b1"]
    assert [row["run"] for row in result["excluded"]] == ["runs/a0", "runs/b0"]
    assert result["excluded"][0]["reason"] == "diverged"
    assert "summary.json" in result["excluded"][1]["reason"]
    assert any(line.startswith("left out 2 run(s): 1 × diverged") for line in result["notes"])


def test_runs_of_other_settings_are_called_so(here, capsys):
    text = (here / "runs" / "a1" / "config.toml").read_text()
    (here / "runs" / "a1" / "config.toml").write_text(text.replace("lr = 0.05", "lr = 0.1"))
    notes = result_of("gmprobe pairs runs/a0 runs/a1 runs/a2", capsys)["notes"]
    assert notes == ["the runs differ in lr, so pairs compare these too, not only seeds"]


def test_other_data_than_the_runs_own(here, capsys):
    result = result_of("gmprobe pairs runs --unlabeled digits --max-examples 20 --seed 3", capsys)
    assert (result["num_examples"], result["settings"]["data"], result["settings"]["part"]) == (
        20,
        "digits",
        "all",
    )
    again = result_of("gmprobe pairs runs --unlabeled digits --max-examples 20 --seed 3", capsys)
    assert again == result
    other = result_of("gmprobe pairs runs --unlabeled digits --max-examples 20 --seed 4", capsys)
    assert other["pairs"] != result["pairs"]
    small = result_of(
        "gmprobe pairs runs --unlabeled digits --max-examples 20 --seed 3 --batch-size 7", capsys
    )
    for one, two in zip(small["pairs"], result["pairs"], strict=True):
        assert one["kl_ab"] == pytest.approx(two["kl_ab"], rel=1e-4)
    # the runs beside another unlabeled part can be compared with the rest now
    result = result_of("gmprobe pairs runs other --unlabeled digits --dtype float64", capsys)
    assert len(result["training_sets"]) == 3
    assert result["measures"]["instability"]["stderr"] > 0


def test_the_test_part_is_used_where_there_is_one(foreign, capsys):
    for part, count in (("train", 4), ("test", 3)):
        (foreign / "parts" / part).mkdir(parents=True)
        for index in range(count):
            shutil.copy(foreign / "data" / f"{index}.png", foreign / "parts" / part)
    command = "gmprobe pairs x.pt y.pt --model mlp-6 --no-normalize --unlabeled parts"
    result = result_of(command, capsys)
    assert (result["num_examples"], result["settings"]["part"]) == (3, "test")
    assert any("test part" in line for line in result["notes"])
    result = result_of(f"{command} --part train", capsys)
    assert (result["num_examples"], result["settings"]["part"]) == (4, "train")


def test_files_count_as_one_training_set_and_the_output_says_so(foreign, capsys):
    command = "gmprobe pairs x.pt y.pt --model mlp-6 --mean 0.5 --std 0.25 --unlabeled data"
    code, out, err = run(command, capsys)
    assert code == 0, err
    assert "training set unknown; assumed to be the same" in " ".join(out.split())
    result = result_of(command, capsys)
    [row] = result["training_sets"]
    assert (row["training_set"], row["num_train"], row["num_models"]) == ("unknown", None, 2)
    assert row["reason"] == "training set unknown; assumed to be the same"
    assert result["pairs"][0]["same_training_set"] is True
    assert result["measures"]["conditional_inconsistency"]["value"] > 0
    assert result["checkpoints"][0]["mean"] == [0.5]


def test_files_beside_runs_are_a_training_set_of_their_own(here, capsys):
    shutil.copy(here / "runs" / "a0" / "checkpoint.safetensors", here / "copy.safetensors")
    result = result_of("gmprobe pairs runs/a0 runs/a1 copy.safetensors --unlabeled digits", capsys)
    assert [row["training_set"] for row in result["training_sets"]][1:] == ["unknown"]
    assert any("different from the runs'" in line for line in result["notes"])
    pair = result["pairs"][1]
    assert (pair["disagreement"], pair["kl_ab"], pair["kl_ba"]) == (0, 0, 0)


@pytest.mark.parametrize("columns", ["60", "160"])
def test_piped_output_fits_and_has_no_colour(here, columns, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", columns)
    code, out, err = run("gmprobe pairs runs", capsys)
    assert code == 0, err
    lines = out.splitlines()
    assert max(map(len, lines)) <= int(columns)
    for name, (symbol, _) in PAIR_MEASURES.items():
        shown = symbol if columns == "60" else name
        assert any(line.split("│")[1:] and line.split("│")[1].startswith(f" {shown} ") for line in lines)
    assert "\x1b" not in out
    assert err == ""


# ---- what is refused


@pytest.mark.parametrize(
    ("command", "code", "words"),
    [
        ("gmprobe pairs runs/a0", 2, ["runs/a0 is one checkpoint", "two"]),
        ("gmprobe pairs other", 2, ["other/c0 is one checkpoint"]),
        ("gmprobe pairs runs/a0 missing.pt", 3, ["missing.pt: no such checkpoint"]),
        ("gmprobe pairs empty runs", 2, ["empty holds no run"]),
        ("gmprobe pairs begun runs", 4, ["no finished run in begun", "1 × unfinished", "--resume"]),
        ("gmprobe pairs x.pt y.pt", 2, ["x.pt is not a gmprobe run", "--unlabeled"]),
        (
            "gmprobe pairs runs other",
            4,
            ["runs/a0 and other/c0 have different unlabeled parts", "--unlabeled"],
        ),
        ("gmprobe pairs runs --image-size 8", 2, ["--image-size", "--unlabeled"]),
        ("gmprobe pairs runs/a0 two.pt --unlabeled data", 4, ["two.pt has 2 classes but runs/a0 has 10"]),
        ("gmprobe pairs swapped.pt two.pt --unlabeled data", 4, ["two.pt and swapped.pt", "'cat'", "'dog'"]),
        ("gmprobe pairs two.pt huge.pt --unlabeled data", 5, ["huge.pt", "example 0 is not finite"]),
        ("gmprobe pairs two.pt nan.pt --unlabeled data", 3, ["nan.pt", "NaN"]),
        ("gmprobe pairs two.pt x.pt --unlabeled rgb", 4, ["rgb", "two.pt", "--channels 1"]),
        ("gmprobe pairs wild.pt two.pt --unlabeled data --model wild.py:build", 4, ["wild.pt", "two passes"]),
    ],
)
def test_bad_input_is_one_line_with_its_exit_code(foreign, capsys, command, code, words):
    here = foreign
    (here / "empty").mkdir()
    shutil.copytree(here / "runs" / "a0", here / "begun")
    (here / "begun" / "summary.json").unlink()
    (here / "begun" / "checkpoint.safetensors").unlink()
    spec, grey = ModelSpec("mlp-6", (1, 8, 8), 2), Normalization((0.5,), (0.25,))
    model = build_model(spec)
    save_checkpoint(here / "two.pt", model, spec, grey, ("cat", "dog"))
    save_checkpoint(here / "swapped.pt", model, spec, grey, ("dog", "cat"))
    torch.save({"bias": torch.zeros(2)}, here / "wild.pt")
    (here / "wild.py").write_text(
        "import torch\n"
        "class Wild(torch.nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.bias = torch.nn.Parameter(torch.zeros(2))\n"
        "    def forward(self, x):\n"
        "        return self.bias + torch.rand(len(x), 2)\n"
        "build = Wild\n"
    )
    with torch.no_grad():
        model[-1].bias.fill_(3e38)
        model[-1].weight.fill_(3e38)
        model[1].bias.fill_(10.0)
    save_checkpoint(here / "huge.pt", model, spec, grey)
    with torch.no_grad():
        model[1].weight[0, 0] = float("nan")
    save_checkpoint(here / "nan.pt", model, spec, grey)
    (here / "rgb").mkdir()
    Image.new("RGB", (8, 8), (1, 2, 3)).save(here / "rgb" / "x.png")
    if "wild" in command:
        command += " --no-normalize --num-classes 2"
    got, out, err = run(command, capsys)
    assert got == code, err
    assert out == ""
    assert all(word in err for word in words), err
    assert len(err.splitlines()) == 1
    assert err.startswith("gmprobe: ")


def test_data_that_has_changed_is_refused(here, capsys):
    rewrite(here / "runs" / "a1", sha256="0")
    code, _, err = run("gmprobe pairs runs/a0 runs/a1", capsys)
    assert code == 4
    assert "the data of runs/a1 has changed" in err


def test_a_broken_split_is_named(here, capsys):
    (here / "runs" / "a1" / "split.json").write_text("[]")
    code, _, err = run("gmprobe pairs runs/a0 runs/a1", capsys)
    assert code == 7
    assert "runs/a1/split.json" in err


# ---- files of several networks, and of several copies


def test_each_checkpoint_may_have_its_own_network_and_key(foreign, capsys):
    """The oracle: pairs of the same weights in files of their own."""
    torch.manual_seed(5)
    wide = build_model(ModelSpec("mlp-9", (1, 8, 8), 2)).state_dict()
    first, other = torch.load("x.pt", weights_only=True), torch.load("y.pt", weights_only=True)
    torch.save({"model": first, "model_ema": other}, "both.pt")
    torch.save(wide, "wide.pt")
    command = "gmprobe pairs {} --unlabeled data --no-normalize --model mlp-6 --model mlp-9"
    expected = result_of(command.format("y.pt wide.pt"), capsys)
    found = result_of(command.format("both.pt wide.pt") + " --key model_ema --key ''", capsys)
    assert found["pairs"][0]["kl_ab"] == expected["pairs"][0]["kl_ab"]
    assert [row["model"] for row in found["checkpoints"]] == ["mlp-6", "mlp-9"]


def test_a_copy_that_was_not_chosen_is_noted(foreign, capsys):
    state = torch.load("x.pt", weights_only=True)
    torch.save({"model": state, "model_ema": torch.load("y.pt", weights_only=True)}, "both.pt")
    command = "gmprobe pairs both.pt y.pt --unlabeled data --no-normalize --model mlp-6"
    found = result_of(command, capsys)
    assert [note for note in found["notes"] if "Choose with --key" in note] == [
        "both.pt holds the weights more than once: model is used, and model_ema is not. Choose with --key NAME"
    ]
    assert [row.get("key") for row in found["checkpoints"]] == ["model", None]


@pytest.mark.parametrize("option", ["--model mlp-6", "--key model", "--strip model."])
def test_an_option_once_or_once_for_each(foreign, capsys, option):
    for command, count in (("pairs x.pt y.pt", 3), ("measure x.pt", 2)):
        code, _, err = run(
            f"gmprobe {command} --unlabeled data --no-normalize {' '.join([option] * count)}", capsys
        )
        assert code == 2
        assert f"{option.split()[0]} is given {count} times" in err


def test_measure_says_what_was_taken(foreign, capsys):
    states = {"model": torch.load("x.pt", weights_only=True), "ema": torch.load("y.pt", weights_only=True)}
    torch.save(states, "both.pt")
    command = "gmprobe measure {} --unlabeled data --no-normalize --model mlp-6 --measures mean_confidence"
    values = {row["checkpoint"]: row for row in result_of(command.format("x.pt y.pt"), capsys)}
    [unasked] = result_of(command.format("both.pt"), capsys)
    assert unasked["measures"] == values["x.pt"]["measures"]
    assert unasked["settings"]["key"] == "model"
    assert "Choose with --key" in unasked["notes"][0]
    assert f"note: {unasked['notes'][0]}" in run(command.format("both.pt"), capsys)[2]
    [asked] = result_of(command.format("both.pt --key ema"), capsys)
    assert asked["measures"] == values["y.pt"]["measures"]
    assert asked["settings"]["key"] == "ema"
    assert "notes" not in asked
    code, _, err = run(command.format("both.pt --key nothing"), capsys)
    assert (code, "no tensors under --key nothing" in err) == (2, True)
