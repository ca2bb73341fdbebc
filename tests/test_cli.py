"""The command line as a user types it: the three commands, exit codes, one-line errors, machine output."""

import csv
import io
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from command_line import run
from conftest import CASES
from networks import BagOfWords
from PIL import Image
from torch import nn
from torchvision import transforms

from gm_probe.cli import COMMANDS
from gm_probe.cli.measure_output import warn
from gm_probe.cli.measure_relevance import READ_BY
from gm_probe.data.normalization import Normalization
from gm_probe.measures.catalogue import MEASURES
from gm_probe.measures.measure import measure
from gm_probe.measures.names import DEFAULT_MEASURES
from gm_probe.measures.settings import Settings
from gm_probe.models.checkpoints import read_checkpoint, save_checkpoint
from gm_probe.models.zoo import ModelSpec, build_model

QUICK = ["--starts", "2", "--max-probes", "2", "--trace-tolerance", "9"]


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """data/ with two class folders of 8×8 grey PNGs."""
    rng = np.random.default_rng(0)
    for label in ("cat", "dog"):
        folder = tmp_path / "data" / label
        folder.mkdir(parents=True)
        for index in range(6):
            Image.fromarray(rng.integers(0, 256, (8, 8), dtype=np.uint8)).save(folder / f"{index}.png")
    return tmp_path / "data"


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """ckpt.pt as gmprobe writes it: an MLP for 8×8 grey images and two classes."""
    torch.manual_seed(0)
    spec = ModelSpec("mlp-6", (1, 8, 8), 2)
    path = tmp_path / "ckpt.pt"
    save_checkpoint(path, build_model(spec), spec, Normalization((0.5,), (0.25,)), ("cat", "dog"))
    return path


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def measured(options: str, capsys: pytest.CaptureFixture[str], file: str = "ckpt.pt") -> dict[str, Any]:
    """What `gmprobe measure FILE OPTIONS --json` prints of its one checkpoint."""
    code, out, err = run(f"gmprobe measure {file} {options} --json", capsys)
    assert code == 0, err
    [result] = json.loads(out)
    return result


def test_the_three_commands_run_literally(tmp_path, images, checkpoint, capsys):
    code, out, err = run("gmprobe measure ckpt.pt --unlabeled data/", capsys)
    assert code == 0, err
    assert "local_inconsistency" in out
    words = re.sub(r"[\s│]+", " ", out)  # names may be folded
    assert "(predicted" in words
    assert "(no labels" in words  # tr H of a ReLU network
    assert "cross_entropy" not in out  # labels were not read

    for seed in (0, 1, 2):
        (tmp_path / "runs").mkdir(exist_ok=True)
        command = f"gmprobe train --model mlp-8 --num-train 100 --epochs 2 --seed {seed} --out runs/{seed} -q"
        assert run(command, capsys)[0] == 0
        command = f"gmprobe measure runs/{seed} --measures local_inconsistency --starts 2 --save -q"
        assert run(command, capsys)[0] == 0
    code, out, err = run("gmprobe correlate runs/", capsys)
    assert code == 0, err
    assert "S_ρ" in out
    assert (tmp_path / "runs" / "correlate.png").stat().st_size > 10_000


def test_train_iam_d_alone_learns_the_digits_and_says_so(tmp_path, capsys):
    code, out, err = run("gmprobe train --method iam-d --epochs 10", capsys)
    assert code == 0, err
    assert "handwritten digits" in err
    assert "cross-entropy" in out
    [folder] = (tmp_path / "runs").iterdir()
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["test_error"] < 0.6  # chance is 0.9
    assert read_checkpoint(folder).model.name == "6cnn"


def test_json_follows_the_contract(images, checkpoint, capsys):
    result = measured(f"--labeled data {' '.join(QUICK)}", capsys)
    assert {"checkpoint", "model", "num_parameters", "num_examples", "settings", "measures"} <= set(result)
    assert result["num_examples"] == 12
    assert result["num_parameters"] == 64 * 6 + 6 + 6 * 2 + 2
    for row in result["measures"].values():
        assert {"value", "stderr", "stderr_examples", "converged", "num_evals"} <= set(row)
    assert result["measures"]["hessian_lambda_max"]["labels"] == "given"
    assert result["measures"]["hessian_trace"]["labels"] == "none needed"
    assert set(result["measures"]) >= {"error", "cross_entropy"}


def test_csv_has_one_row_a_measure(images, checkpoint, capsys):
    code, out, _ = run("gmprobe measure ckpt.pt --unlabeled data --measures fisher_trace --csv", capsys)
    assert code == 0
    [row] = csv.DictReader(io.StringIO(out))
    assert row["measure"] == "fisher_trace"
    assert float(row["value"]) > 0
    assert (row["sd_starts"], row["num_starts"], row["reason"]) == ("", "", "")
    command = (
        "gmprobe measure ckpt.pt --unlabeled data --measures local_inconsistency --starts 3 --seed 5 --csv"
    )
    [row] = csv.DictReader(io.StringIO(run(command, capsys)[1]))
    assert float(row["sd_starts"]) > 0
    kept = ("num_starts", "rho", "k_steps", "noise_scale", "seed", "part")
    assert [row[key] for key in kept] == ["3", "0.1", "1", "0.1", "5", "all"]


def test_the_protocols_fill_rows_that_say_so(images, checkpoint, capsys):
    command = "--unlabeled data --measures local_inconsistency --protocol "
    rows = measured(command + "both", capsys)["measures"]
    assert rows["local_inconsistency"]["protocol"] == "paper"
    assert rows["local_inconsistency_converged"]["protocol"] == "converged"
    assert rows["local_inconsistency_converged"]["value"] >= rows["local_inconsistency"]["value"]
    rows = measured(command + "converged", capsys)["measures"]
    assert rows["local_inconsistency"]["protocol"] == "converged"


def test_the_caption_tells_of_the_ascents_that_were_made(images, checkpoint, capsys):
    command = "gmprobe measure ckpt.pt --unlabeled data --starts 3 --measures "
    out = " ".join(run(f"{command}local_inconsistency", capsys)[1].split())
    assert re.search(r"ρ = 0.1; S_ρ: K = 1, mean over 3 starts \(sd [\d.e-]+\)", out)
    out = run(f"{command}local_inconsistency --protocol converged", capsys)[1]
    assert "ρ = 0.1" in out
    assert "K = " not in out
    assert "3 starts" not in out
    assert "ρ = " not in run(f"{command}fisher_trace", capsys)[1]
    out = " ".join(run(f"{command}local_inconsistency_relative,average_inconsistency", capsys)[1].split())
    assert re.search(
        r"ρ = 0.1; S_ρ rel.: K = 1, mean over 3 starts \(sd \S+\); A_ρ: mean over 3 draws \(sd", out
    )


def test_settings_of_other_balls_and_ascents_are_taken(images, checkpoint, capsys):
    command = "--unlabeled data --measures local_inconsistency_"
    for name, option, key, value in (
        ("adaptive", "--eta 0.5", "eta", 0.5),
        ("batchwise", "--sub-batch 3", "sub_batch", 3),
        ("converged", "--ascent-tolerance 0.5", "ascent_tolerance", 0.5),
    ):
        plain, other = (measured(f"{command}{name} {words}", capsys) for words in ("", option))
        assert other["settings"][key] == value
        one, two = (result["measures"][f"local_inconsistency_{name}"] for result in (plain, other))
        assert (one["value"], one["num_evals"]) != (two["value"], two["num_evals"]), name


@pytest.mark.parametrize("width", [70, 110])
def test_a_measure_without_its_derivative_is_a_dash_with_a_reason(images, monkeypatch, capsys, width):
    torch.save(
        nn.Sequential(nn.Flatten(), nn.Linear(64, 4), nn.Hardsigmoid(), nn.Linear(4, 2)).state_dict(), "h.pt"
    )
    Path("hard.py").write_text(
        "from torch import nn\ndef build():\n"
        "    return nn.Sequential(nn.Flatten(), nn.Linear(64, 4), nn.Hardsigmoid(), nn.Linear(4, 2))\n"
    )
    monkeypatch.setenv("COLUMNS", str(width))
    command = "gmprobe measure h.pt --unlabeled data --model hard.py:build --no-normalize"
    code, out, err = run(f"{command} --measures fisher_lambda_max,hessian_lambda_max", capsys)
    assert code == 0, err
    [row] = (line for line in out.splitlines() if "λ_max(H)" in line or "hessian_lambda_max" in line)
    assert row.count("—") == (3 if width == 70 else 4)
    assert "NO" not in row
    assert "not converged" not in row
    assert "note: hessian_lambda_max is undefined: a layer has no second derivative" in err
    if width == 110:  # a density of F is drawn, and what was measured stands
        density = "--density d.png --max-iterations 5 --starts 1"
        code, out, err = run(f"{command} --measures fisher_trace {density}", capsys)
        assert (code, "fisher_trace" in out) == (0, True), err
        assert "note: the density of the hessian is undefined: a layer has no second derivative" in err
        assert Path("d.png").stat().st_size > 1000


@pytest.mark.parametrize(
    ("options", "idle"),
    [
        ("--measures fisher_trace --rho 0.2 --protocol converged --seed 3", ["--protocol", "--rho"]),
        ("--measures fisher_trace --max-probes 5 --trace-tolerance 0.2", []),
        ("--measures fisher_lambda_max --max-probes 5 --top 2", ["--max-probes"]),
        (
            "--measures fisher_trace --max-iterations 40 --starts 5",
            ["--starts", "--max-iterations"],
        ),
        ("--measures fisher_trace --density d.png --max-iterations 5 --starts 1", []),
        ("--measures hessian_lambda_min --top 2", ["--top"]),
        ("--measures local_inconsistency --protocol converged --k-steps 2 --starts 2", ["--k-steps"]),
        ("--measures local_inconsistency_converged --starts 3", ["--starts beyond 2"]),
        ("--measures local_inconsistency --protocol both --starts 3 --k-steps 2", []),
        ("--measures average_inconsistency --starts 3 --noise-scale 1", ["--noise-scale"]),
        (
            "--measures local_inconsistency_adaptive --eta 1 --sub-batch 4 --ascent-tolerance 0.1",
            ["--ascent-tolerance", "--sub-batch"],
        ),
    ],
)
def test_options_that_change_nothing_are_named(images, checkpoint, capsys, options, idle):
    code, _, err = run(f"gmprobe measure ckpt.pt --unlabeled data {options}", capsys)
    assert code == 0
    assert re.findall(r"note: (.*) has no effect on what is measured", err) == idle


def test_measures_that_read_no_setting_do_not_change_with_it():
    """READ_BY against the measures themselves."""
    case = next(case for case in CASES if case.name == "tanh-mlp")
    base = Settings(
        rho=0.5, num_starts=2, max_iterations=12, trace_tolerance=0.0, min_probes=3, max_probes=8, sub_batch=2
    )

    def values(settings: Settings) -> dict[str, Any]:
        report = measure(case.model, case.batches(labeled=True), list(MEASURES), settings)
        return {name: (row.value, row.details.get("eigenvalues")) for name, row in report.rows.items()}

    plain = values(base)
    others = {
        "rho": 0.7,
        "k_steps": 3,
        "noise_scale": 0.5,
        "num_starts": 3,
        "ascent_tolerance": 0.5,
        "eta": 1.0,
        "sub_batch": 5,
        "trace_tolerance": 0.9,
        "max_probes": 6,
        "eigen_tolerance": 0.9,
        "max_iterations": 1,
        "top_eigenvalues": 2,
    }
    assert others.keys() == READ_BY.keys()
    for key, value in others.items():
        found = values(replace(base, **{key: value}))
        changed = {name for name in MEASURES if found[name] != plain[name]}
        assert changed <= READ_BY[key], key
        assert changed, key


@pytest.fixture
def parts(tmp_path: Path) -> Path:
    """parts/ with 4 training and 2 test images of 8×8."""
    rng = np.random.default_rng(1)
    for part, count in (("train", 2), ("test", 1)):
        for label in ("cat", "dog"):
            folder = tmp_path / "parts" / part / label
            folder.mkdir(parents=True)
            for index in range(count):
                Image.fromarray(rng.integers(0, 256, (8, 8), dtype=np.uint8)).save(folder / f"{index}.png")
    return tmp_path / "parts"


@pytest.mark.parametrize("kind", ["labeled", "unlabeled"])
def test_the_test_part_is_measured_where_there_is_one(parts, images, checkpoint, capsys, kind):
    for data, option, part, count in (
        ("parts", "", "test", 2),
        ("parts", "--part test", "test", 2),
        ("parts", "--part train", "train", 4),
        ("data", "", "all", 12),
        ("parts/train", "--max-examples 3", "all", 3),
    ):
        command = f"gmprobe measure ckpt.pt --{kind} {data} {option} --measures fisher_trace --json"
        code, out, err = run(command, capsys)
        assert code == 0, err
        [result] = json.loads(out)
        assert (result["settings"]["part"], result["num_examples"]) == (part, count)
        assert result["settings"]["max_examples"] == (3 if "3" in option else None)
        assert ("the test part is used" in err) == (data == "parts" and not option)


def test_labels_of_an_array_file_need_not_reach_the_last_class(checkpoint, capsys):
    pixels = np.random.default_rng(0).integers(0, 256, (3, 1, 8, 8), dtype=np.uint8)
    np.savez("a.npz", x=pixels, y=[0, 1, 1])
    command = "--labeled a.npz --max-examples 1 --measures error,fisher_trace --seed"
    for seed in (0, 1, 2):
        assert measured(f"{command} {seed}", capsys)["measures"]["error"]["value"] in {0, 1}


def test_token_ids_of_an_array_file_are_measured_as_they_are(tmp_path, capsys):
    torch.manual_seed(0)
    model = BagOfWords()
    torch.save(model.state_dict(), tmp_path / "words.pt")
    ids = np.random.default_rng(0).integers(0, 50, (12, 7))
    np.savez(tmp_path / "words.npz", x=ids)
    names = "fisher_trace,hessian_trace,fisher_lambda_max,local_inconsistency,mean_entropy"
    model_option = f"--model {Path(__file__).parent / 'networks.py'}:BagOfWords"
    options = f"{model_option} --unlabeled words.npz --measures {names} --trace-tolerance 0"
    rows = measured(options, capsys, "words.pt")["measures"]
    assert all(rows[name]["value"] is not None for name in names.split(","))
    scores = model(torch.from_numpy(ids)).log_softmax(1)
    exact = 0.0
    for row in scores:
        for score in row:
            gradients = torch.autograd.grad(score, list(model.parameters()), retain_graph=True)
            exact += float(score.detach().exp() * sum(g.square().sum() for g in gradients)) / len(ids)
    assert rows["fisher_trace"]["value"] == pytest.approx(exact, rel=1e-5)


def test_the_table_stands_though_the_density_cannot_be_written(images, checkpoint, capsys):
    Path("file").write_bytes(b"")
    command = "gmprobe measure ckpt.pt --unlabeled data --measures fisher_trace --density file/d.png"
    code, out, err = run(f"{command} --max-iterations 2 --starts 1", capsys)
    assert code == 7
    assert "fisher_trace" in out
    assert "cannot write file/d.png" in err


def test_layers_have_a_table_a_json_key_and_a_picture(images, checkpoint, capsys):
    command = "gmprobe measure ckpt.pt --unlabeled data --measures fisher_trace --trace-tolerance 0"
    code, out, _ = run(f"{command} --layer-figure layers.png -q --json", capsys)
    [result] = json.loads(out)
    assert code == 0
    assert Path("layers.png").read_bytes().startswith(b"\x89PNG")
    parts = [row["measures"]["fisher_trace"]["value"] for row in result["layers"]]
    assert sum(parts) == pytest.approx(result["measures"]["fisher_trace"]["value"], rel=1e-5)
    assert sum(row["num_parameters"] for row in result["layers"]) == result["num_parameters"]
    code, out, _ = run(f"{command} --per-layer -q", capsys)
    assert "per layer" in out
    assert all(row["layer"] in out for row in result["layers"])
    for words in ("--layer-figure l.bmp", "--per-layer --save"):
        assert run(f"{command} {words}", capsys)[0] == 2


def test_a_validation_set_serves_the_measures_that_need_one(images, checkpoint, capsys):
    command = "gmprobe measure ckpt.pt --unlabeled data --measures outputs,atc --json -q"
    for more, known in (("", False), (" --validation data", True)):
        code, out, _ = run(command + more, capsys)
        [result] = json.loads(out)
        rows = result["measures"]
        assert code == 0
        assert (rows["atc"]["value"] is not None) == ("cot" in rows) == known
    assert "error" not in rows
    assert len(result["settings"]["validation_sha256"]) == 64
    Path("other").mkdir()
    Path("data/cat").rename("other/cat")
    Path("data/dog").rename("other/eel")
    Path("data").rmdir()
    code, _, err = run(command.replace("data", "other") + " --validation other", capsys)
    assert code == 4
    assert "other has classes cat, eel but ckpt.pt was trained on cat, dog" in err


def test_ones_own_model_tells_its_number_of_classes(images, capsys):
    """No weight of it is a matrix whose rows could be counted."""
    Path("own.py").write_text(
        "from torch import nn\ndef net():\n"
        "    return nn.Sequential(nn.Conv2d(1, 3, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())\n"
    )
    torch.save({"0.weight": torch.rand(3, 1, 1, 1), "0.bias": torch.rand(3)}, "own.pt")
    command = "gmprobe measure own.pt --model own.py:net --unlabeled data --channels 1 --no-normalize"
    code, out, err = run(f"{command} --measures mean_entropy --json", capsys)
    assert (code, json.loads(out)[0]["num_classes"]) == (0, 3), err
    code, _, err = run(f"{command} --measures mean_entropy --num-classes 9", capsys)
    assert (code, err.strip()) == (2, "gmprobe: own.py:net has 3 outputs, not --num-classes 9")


def test_float64_weights_keep_their_digits(capsys):
    Path("own.py").write_text("from torch import nn\ndef net():\n    return nn.Linear(2, 2)\n")
    weight = torch.tensor([[1 / 3, 0.1], [0.7, 0.2]], dtype=torch.float64)
    torch.save({"weight": weight, "bias": torch.zeros(2, dtype=torch.float64)}, "own.pt")
    np.savez("x.npz", x=np.zeros((2, 2)))
    options = "--model own.py:net --unlabeled x.npz --measures parameter_norm --dtype float64 --params weight"
    value = measured(options, capsys, "own.pt")["measures"]["parameter_norm"]["value"]
    assert value == pytest.approx(float(weight.norm()), rel=1e-14)


def test_a_missing_checkpoint_is_told_before_any_work(images, checkpoint, monkeypatch, capsys):
    def opened(*_: object, **__: object) -> None:
        raise AssertionError("data was read")

    monkeypatch.setattr("gm_probe.data.datasets.open_source", opened)
    code, _, err = run("gmprobe measure missing.pt nowhere.pt --unlabeled data", capsys)
    assert (code, err) == (3, "gmprobe: missing.pt: no such checkpoint\n")
    assert run("gmprobe measure ckpt.pt --unlabeled data --measures nothing", capsys)[0] == 2
    assert run("gmprobe measure ckpt.pt --unlabeled data --device cuda:7", capsys)[0] == 6


@pytest.mark.parametrize("form", ["json", "csv"])
def test_what_is_measured_is_printed_though_a_later_checkpoint_fails(images, checkpoint, capsys, form):
    Path("broken.pt").write_bytes(b"no checkpoint")
    command = f"gmprobe measure ckpt.pt broken.pt --unlabeled data --measures fisher_trace --{form}"
    code, out, err = run(command, capsys)
    assert code == 3
    assert "broken.pt" in err
    rows = json.loads(out) if form == "json" else list(csv.DictReader(io.StringIO(out)))
    # JSON has an object for the one that failed; a CSV row is a measure, of which it has none
    assert [row["checkpoint"] for row in rows] == ["ckpt.pt", "broken.pt"][: 2 if form == "json" else 1]


def test_each_note_names_its_own_remedy(images, checkpoint, capsys):
    command = (
        "gmprobe measure ckpt.pt --unlabeled data --max-iterations 1 --max-probes 2 --trace-tolerance 1e-9 "
        "--eigen-tolerance 1e-9 --rho 3 --protocol both"
    )
    code, _, err = run(command, capsys)
    assert code == 0
    notes = dict(re.findall(r"note: (\w+) did not converge within its limits; (.+)", err))
    assert "fisher_trace" not in notes  # exact: two classes
    for name in ("fisher_lambda_max", "hessian_lambda_max", "local_inconsistency_converged"):
        assert "--max-iterations" in notes[name]
        assert "--max-probes" not in notes[name]


@pytest.mark.parametrize(
    ("error", "classes", "doubted"),
    [(0.3, 2, False), (0.46, 2, True), (0.86, 10, True), (0.83, 10, True), (0.8, 10, False), (0.5, 3, False)],
)
def test_what_counts_as_near_chance(capsys, error, classes, doubted):
    row = {"value": error, "converged": True}
    warn({"measures": {"error": row}, "num_classes": classes})
    assert ("near chance" in capsys.readouterr().err) == doubted


def test_a_trace_that_ran_out_of_probes(capsys):
    row = {"value": 2.0, "converged": False, "num_probes": 9}
    warn({"measures": {"fisher_trace": row}, "num_classes": 2})
    assert "--max-probes" in capsys.readouterr().err


def test_an_undefined_figure_is_noted_with_its_reason(capsys):
    row = {"value": None, "converged": False, "reason": "not finite (nan)"}
    warn({"measures": {"fisher_trace": row}, "num_classes": 2})
    assert capsys.readouterr().err == "note: fisher_trace is undefined: not finite (nan)\n"


def test_a_record_that_names_other_code_is_not_followed(images, checkpoint, capsys):
    """--model names the network; the record's own callable is not run for the initial weights either."""
    Path("evil.py").write_text("from pathlib import Path\nPath('ran').touch()\nbuild = None\n")
    spec = ModelSpec("mlp-6", (1, 8, 8), 2)
    folder = Path("run")
    folder.mkdir()
    named = ModelSpec("evil.py:build", (1, 8, 8), 2)
    save_checkpoint(
        folder / "checkpoint.safetensors", build_model(spec), named, Normalization((0.5,), (0.5,))
    )
    (folder / "config.toml").write_text("seed = 0\n")
    options = "--model mlp-6 --unlabeled data --measures distance_from_initialization"
    assert measured(options, capsys, "run")["measures"]["distance_from_initialization"]["value"] is None
    assert not Path("ran").exists()


def test_subset_is_seeded_and_recorded(images, checkpoint, capsys):
    command = "--unlabeled data --measures fisher_trace --max-examples 5 --seed"
    values = [measured(f"{command} {seed}", capsys) for seed in (1, 1, 2)]
    first, again, other = (value["measures"]["fisher_trace"]["value"] for value in values)
    assert first == again != other
    assert values[0]["num_examples"] == 5


ASSERTING = """
from torch import nn

class Net(nn.Sequential):
    def forward(self, x):
        assert x.shape[2] == 16, "wrong height"
        return super().forward(x)

def build():
    return Net(nn.Flatten(), nn.Linear(64, 6), nn.ReLU(), nn.Linear(6, 2))
"""

REFUSING = """
import torch
from torch import nn

class Refusing(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 2

    @staticmethod
    def backward(ctx, gradient):
        raise ValueError("no way back")

class Net(nn.Sequential):
    def forward(self, x):
        return Refusing.apply(super().forward(x))

def build():
    return Net(nn.Flatten(), nn.Linear(64, 6), nn.ReLU(), nn.Linear(6, 2))
"""


MEASURE = "measure ckpt.pt --unlabeled data"


@pytest.mark.parametrize(
    ("command", "code", "words"),
    [
        ("measure ckpt.pt", 2, ["--unlabeled"]),
        ("MEASURE --labeled data", 2, ["exclude"]),
        ("MEASURE --measures error", 4, ["error", "--labeled"]),
        ("MEASURE --k-steps 1,inf", 2, ["--k-steps", "whole numbers", "inf"]),
        ("MEASURE --protocol converged --k-steps 1,3", 2, ["--k-steps", "paper's protocol"]),
        (
            "MEASURE --measures average_inconsistency --rho 0.1,0.2",
            2,
            ["--rho", "only local_inconsistency takes"],
        ),
        ("MEASURE --target-error 1,2%", 2, ["--target-error '1,2%'", "2%"]),
        ("MEASURE --target-error 200%", 2, ["--target-error '200%'", "2%"]),
        ("MEASURE --memory 4XB", 2, ["--memory '4XB'", "4GB"]),
        ("MEASURE --device cuda:7", 6, ["cuda:7", "cpu"]),
        ("measure plain.pt --unlabeled data", 2, ["--model", "--mean"]),
        ("measure plain.pt --unlabeled data --model mlp-6", 2, ["--mean", "--no-normalize"]),
        ("measure plain.pt --unlabeled floats.npz --model mlp-6", 2, ["--mean", "--no-normalize"]),
        (
            "measure plain.pt --unlabeled data --model mlp-6 --mean 127.5 --std 50",
            2,
            ["mean 127.5", "divide both by 255"],
        ),
        (
            "measure plain.pt --unlabeled floats.npz --model mlp-6 --mean 0.5 --std 0.2",
            4,
            ["floats.npz", "from 0 to 255"],
        ),
        ("MEASURE --image-size 8 --crop 8", 2, ["--image-size", "--crop"]),
        ("MEASURE --resize 8 --crop 9", 2, ["--crop 9", "--resize 8"]),
        ("measure ckpt.pt --unlabeled digits --crop 8", 2, ["digits", "--crop"]),
        ("MEASURE --data data", 2, ["--data"]),
        ("measure plain.pt --unlabeled data --no-normalize", 2, ["--model"]),
        ("measure plain.pt --unlabeled data --no-normalize --model mlp-7", 3, ["1.weight"]),
        ("measure nan.pt --unlabeled data", 3, ["nan.pt", "1.weight", "NaN"]),
        ("MEASURE --mean 0.5 --std 0", 2, ["normalisation", "std > 0"]),
        ("MEASURE --part test", 2, ["data has no train/ and test/ parts"]),
        ("measure ckpt.pt --unlabeled digits --image-size 8", 2, ["digits", "--image-size"]),
        ("measure . --image-size 8", 2, ["--image-size", "--unlabeled"]),
        ("measure ckpt.pt --unlabeled colour", 4, ["colour", "(3, 8, 8)", "--channels 1"]),
        ("measure ckpt.pt --unlabeled floats.npz", 4, ["floats.npz", "uint8", "--no-normalize"]),
        ("measure ckpt.pt --unlabeled ints.npz", 4, ["int64", "uint8", "--no-normalize"]),
        (
            "measure ckpt.pt --labeled far.npz --measures error",
            4,
            ["far.npz has labels up to 2 but the model has 2 classes"],
        ),
        ("measure ckpt.pt --labeled three", 4, ["three"]),
        ("measure ckpt.pt --unlabeled large", 4, ["--image-size 8"]),
        ("measure ckpt.pt --unlabeled broken", 4, ["broken/x.png"]),
        ("measure mine.pt --unlabeled data", 2, ["--model danger.py:build"]),
        (
            "measure plain.pt --unlabeled data --model asserting.py:build --no-normalize",
            4,
            ["wrong height", "--image-size"],
        ),
        (
            "measure plain.pt --unlabeled data --model refusing.py:build --no-normalize",
            2,
            ["local_inconsistency: the model cannot be differentiated", "(no way back)", "--measures"],
        ),
        ("train --model mlp-4 --epochs 3 --lr 1e30 --out d", 5, ["not finite"]),
        ("measure x --measures S_ρ", 2, ["S_ρ is called local_inconsistency"]),
    ],
)
def test_bad_input_is_one_line_with_its_exit_code(tmp_path, images, checkpoint, capsys, command, code, words):
    spec = ModelSpec("mlp-6", (1, 8, 8), 2)
    model = build_model(spec)
    torch.save(model.state_dict(), tmp_path / "plain.pt")
    save_checkpoint(tmp_path / "mine.pt", model, ModelSpec("danger.py:build", (1, 8, 8), 2), Normalization())
    (tmp_path / "danger.py").write_text("from pathlib import Path\nPath('canary').touch()\n")
    (tmp_path / "asserting.py").write_text(ASSERTING)
    (tmp_path / "refusing.py").write_text(REFUSING)
    with torch.no_grad():
        model[1].weight[0, 0] = float("nan")
    save_checkpoint(tmp_path / "nan.pt", model, spec, Normalization((0.5,), (0.25,)))
    for label in "abc":
        (tmp_path / "three" / label).mkdir(parents=True)
        Image.new("L", (8, 8)).save(tmp_path / "three" / label / "x.png")
    (tmp_path / "large").mkdir()
    Image.new("L", (16, 16)).save(tmp_path / "large" / "x.png")
    (tmp_path / "colour").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "colour" / "x.png")
    zeros = np.zeros((3, 1, 8, 8))
    np.savez(tmp_path / "floats.npz", x=zeros + np.linspace(0, 255, 8))
    np.savez(tmp_path / "ints.npz", x=zeros.astype(np.int64))
    np.savez(tmp_path / "far.npz", x=zeros.astype(np.uint8), y=[0, 1, 2])
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "x.png").write_bytes(b"no image")
    got, out, err = run(f"gmprobe {command.replace('MEASURE', MEASURE)}", capsys)
    assert got == code, err
    assert out == ""
    assert all(word in err for word in words), err
    lines = [line for line in err.splitlines() if not line.startswith("no --data given")]
    assert len(lines) == 1, err
    assert lines[0].startswith("gmprobe: ")
    assert not (tmp_path / "canary").exists()


def test_a_foreign_checkpoint_with_its_model_named(tmp_path, images, capsys):
    torch.manual_seed(0)
    layers = "nn.Sequential(nn.Flatten(), nn.Linear(64, 5), nn.Tanh(), nn.Linear(5, 2))"
    (tmp_path / "net.py").write_text(f"from torch import nn\ndef build(): return {layers}\n")
    state = nn.Sequential(nn.Flatten(), nn.Linear(64, 5), nn.Tanh(), nn.Linear(5, 2)).state_dict()
    state = {f"module.{name}": value for name, value in state.items()}
    torch.save({"state_dict": state, "epoch": 3}, "x.pth.tar")
    options = f"--unlabeled data --model net.py:build --no-normalize {' '.join(QUICK)}"
    assert measured(options, capsys, "x.pth.tar")["model"] == "net.py:build"


def test_train_saves_a_portable_copy_and_resume_returns_the_same(capsys):
    command = "gmprobe train --model mlp-4 --epochs 1 --num-train 50 --out a --json -q"
    code, out, _ = run(f"{command} --save copy.pt", capsys)
    assert code == 0
    original, copy = read_checkpoint(Path("a")), read_checkpoint(Path("copy.pt"))
    assert all(torch.equal(copy.state[name], value) for name, value in original.state.items())
    code, again, _ = run(f"{command} --resume", capsys)
    assert code == 0
    assert json.loads(again) == json.loads(out)
    code, _, err = run(command, capsys)
    assert code == 2
    assert "--resume" in err


def test_sweep_dry_run_runs_nothing(tmp_path, capsys):
    code, out, _ = run("gmprobe sweep quickstart --out r --dry-run --json", capsys)
    assert code == 0
    assert len(json.loads(out)["runs"]) == 48
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help_that_ends_with_an_example(name, capsys):
    code, out, _ = run(f"gmprobe {name} --help", capsys)
    assert code == 0
    assert f"gmprobe {name}" in out.strip().splitlines()[-1]


@pytest.mark.parametrize("name", ["models", "datasets", "measures", "recipes"])
def test_listings_print_json_and_tables(name, capsys):
    code, out, _ = run(f"gmprobe {name} --json", capsys)
    assert code == 0
    assert all(entry["name"] and entry["description"] for entry in json.loads(out))
    assert json.loads(out)[0]["name"] in run(f"gmprobe {name}", capsys)[1]


def test_interrupt_is_one_line_and_130(monkeypatch, capsys):
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("gm_probe.training.loop.train", interrupted)
    code, _, err = run("gmprobe train -q", capsys)
    assert code == 130
    assert err == "gmprobe: interrupted; finished results are kept\n"


def test_an_internal_error_is_one_line_unless_debugged(monkeypatch, capsys):
    def broken(*_: object, **__: object) -> None:
        raise ValueError("oh no")

    monkeypatch.setattr("gm_probe.training.loop.train", broken)
    code, _, err = run("gmprobe train -q", capsys)
    assert code == 1
    assert "ValueError: oh no" in err
    assert "Traceback" not in err
    code, _, err = run("gmprobe --debug train -q", capsys)
    assert code == 1
    assert "Traceback" in err


@pytest.mark.parametrize("columns", ["60", "160"])
def test_the_table_fits_its_terminal(images, checkpoint, columns, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", columns)
    code, out, err = run(["measure", "ckpt.pt", "--labeled", "data", *QUICK, "--protocol", "both"], capsys)
    assert code == 0, err
    lines = out.splitlines()
    assert max(map(len, lines)) <= int(columns)
    for name in (*DEFAULT_MEASURES, "local_inconsistency_converged"):
        shown = MEASURES[name].symbol if columns == "60" else name
        assert any(line.split("│")[1:] and line.split("│")[1].startswith(f" {shown} ") for line in lines), (
            shown
        )
    assert "\x1b" not in out


@pytest.mark.parametrize(
    ("second", "ratio", "doubted"),
    [(0.5, 9.0, True), (0.5, None, True), (0.5, 0.9, False), (0.97, 9.0, False)],
)
def test_a_maximum_that_one_start_reached_is_doubted(
    second: float, ratio: float | None, doubted: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    row = {"value": 2.0, "converged": True, "starts": {"+v1": 2.0, "-v1": 2 * second}, "runner_up": second}
    row["quadratic_ratio"] = ratio
    warn({"measures": {"local_inconsistency_converged": row}, "num_classes": 10})
    assert ("one of 2 starts reached it, the next 50%" in capsys.readouterr().err) == doubted


BF16 = "note: bf16 rounding loses much of a start of length 0.1. With --noise-scale 3 the ascent is as in float32"


@pytest.mark.parametrize(
    ("options", "notes"),
    [
        ("--method iam-d --amp bf16", [BF16]),
        ("--method iam-d --amp bf16 --noise-scale 3", []),
        ("--method iam-d", []),
        ("--method sam --amp bf16", []),
        (
            "--rho 0.1 --optimizer adamw --momentum 0.9",
            [
                "note: --rho has no effect with --method sgd",
                "note: --momentum has no effect with --optimizer adamw",
            ],
        ),
        ("--method sam --rho 0.1 --momentum 0.8", []),
        (
            "--epochs 2 --warmup-epochs 3 --schedule multi-step --milestones 1,2,5",
            [
                "note: --warmup-epochs exceeds the 2 epochs: lr never rises to 0.05",
                "note: --milestones exceeds the 2 epochs: lr is never lowered at 2, 5",
            ],
        ),
        ("--epochs 2 --warmup-epochs 2", []),
    ],
)
def test_settings_that_change_nothing_or_come_too_late_are_named(options, notes, capsys):
    tiny = "--num-train 20 --num-test 10 --num-unlabeled 10 --epochs 1 --model mlp-4 --device cpu --lr 0.05"
    code, _, err = run(f"gmprobe train {tiny} {options} --out a", capsys)
    assert code == 0
    assert sorted(line for line in err.splitlines() if line.startswith("note: ")) == sorted(notes)


def test_every_cell_of_a_grid_is_a_row_of_the_csv(images, checkpoint, capsys):
    command = "gmprobe measure ckpt.pt --unlabeled data --measures local_inconsistency,fisher_trace --starts 1 -q --csv"
    code, out, _ = run(f"{command} --rho 0.1,0.3 --k-steps 1,2 --protocol both", capsys)
    assert code == 0
    rows = pd.read_csv(io.StringIO(out))
    cells = rows[rows["measure"] == "local_inconsistency"]
    assert sorted(zip(cells["rho"], cells["k_steps"], strict=True)) == [
        (0.1, 1),
        (0.1, 2),
        (0.3, 1),
        (0.3, 2),
    ]
    assert cells["value"].nunique() == 4
    converged = rows[rows["measure"] == "local_inconsistency_converged"]
    assert sorted(converged["rho"]) == [0.1, 0.3]
    assert (rows["measure"] == "fisher_trace").sum() == 1


def test_one_draw_is_not_called_exact(images, checkpoint, capsys):
    code, out, _ = run(
        "gmprobe measure ckpt.pt --unlabeled data --measures average_inconsistency,fisher_trace --starts 1 -q",
        capsys,
    )
    assert code == 0
    lines = {
        name: line
        for line in out.splitlines()
        for name in ("average_inconsistency", "fisher_trace")
        if name in line
    }
    assert "exact" not in lines["average_inconsistency"]
    assert "exact" in lines["fisher_trace"]


def test_wide_photographs_are_measured_as_torchvision_evaluates_them(tmp_path, capsys):
    """The right error by hand: Resize and CenterCrop, then the network."""
    Path("net.py").write_text(
        "from torch import nn\ndef build():\n    return nn.Sequential(nn.Flatten(), nn.Linear(192, 2))\n"
    )
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 2))
    torch.save(model.state_dict(), "net.pt")
    rng = np.random.default_rng(0)
    steps = transforms.Compose([transforms.Resize(10), transforms.CenterCrop(8), transforms.ToTensor()])
    x, y = [], []
    for index in range(20):
        picture = Image.fromarray(rng.integers(0, 256, (12, 40, 3), dtype=np.uint8))
        folder = tmp_path / "wide" / "ab"[index // 10]
        folder.mkdir(parents=True, exist_ok=True)
        picture.save(folder / f"{index}.png")
        x.append(steps(picture))
        y.append(index // 10)
    with torch.no_grad():
        expected = torch.nn.functional.cross_entropy(model(torch.stack(x)), torch.tensor(y))
    command = "gmprobe measure net.pt --model net.py:build --labeled wide --no-normalize"
    code, out, err = run(f"{command} --measures cross_entropy --resize 10 --crop 8 --json", capsys)
    assert (code, err) == (0, ""), err
    value = json.loads(out)[0]["measures"]["cross_entropy"]["value"]
    assert value == pytest.approx(float(expected), rel=1e-5)
    code, _, err = run(f"{command} --measures cross_entropy --image-size 8 --json", capsys)
    assert code == 0
    assert "note: --image-size 8 changes the aspect ratio" in err
