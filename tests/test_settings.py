"""Options are made from the settings' fields, and help shows the main ones first."""

from __future__ import annotations

import json
from dataclasses import fields
from importlib import import_module
from pathlib import Path

import pytest
from command_line import run

from gm_probe.cli.data import DataOptions
from gm_probe.cli.train import train
from gm_probe.data.normalization import Normalization
from gm_probe.files.atomic import read_toml
from gm_probe.measures.settings import Settings
from gm_probe.models.checkpoints import save_checkpoint
from gm_probe.models.zoo import ModelSpec, initial_model
from gm_probe.training.config import GROUPS, MAIN, SETTINGS, TrainConfig

SMALL = [
    "--model",
    "mlp-4",
    "--num-train",
    "40",
    "--num-unlabeled",
    "20",
    "--num-test",
    "20",
    "--epochs",
    "1",
]
SMALL += ["--device", "cpu", "--quiet", "--json"]


def test_every_setting_is_an_option_with_help_in_whole_sentences() -> None:
    options = {parameter.name: parameter for parameter in train.params}
    assert set(SETTINGS) <= set(options)
    for name in SETTINGS:
        text = TrainConfig.__dataclass_fields__[name].metadata["help"]
        assert text.endswith("."), name
        assert text in str(options[name].help)
        assert options[name].default is None, f"--{name}: the settings decide about defaults"


@pytest.mark.parametrize(("command", "section"), [("train", MAIN), ("measure", "Main options")])
def test_main_options_come_first(command: str, section: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run([command, "--help"], capsys)
    titles = [line[:-1] for line in out.splitlines() if line.endswith(":") and not line.startswith(" ")]
    assert (code, titles[0]) == (0, section)
    first = out.split(f"{section}:")[1].split(f"{titles[1]}:")[0]
    assert 10 <= sum(line.startswith("  -") for line in first.splitlines()) <= 14
    if command == "train":
        assert set(GROUPS) <= set(titles)


def test_a_run_is_repeated_from_its_configuration(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, again, other = (str(tmp_path / name) for name in ("a", "b", "c"))
    assert run(["train", *SMALL, "--lr", "0.03", "--method", "sam", "--out", first], capsys)[0] == 0
    config = f"{first}/config.toml"
    code, out, err = run(
        ["train", "--config", config, "--out", again, "--device", "cpu", "--quiet", "--json"], capsys
    )
    assert code == 0, err
    weights = [(Path(folder) / "checkpoint.safetensors").read_bytes() for folder in (first, again)]
    assert weights[0] == weights[1]
    assert json.loads(out)["epochs"] == 1
    assert (
        run(["train", "--config", config, "--lr", "0.01", "--out", other, "--quiet", "--json"], capsys)[0]
        == 0
    )
    found = read_toml(Path(other) / "config.toml")
    assert (found["lr"], found["method"]) == (0.01, "sam")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("lrr = 0.1", "did you mean 'lr'?"),
        ('lr = "fast"', "lr = 'fast' must be a finite number ≥ 0"),
        ('model = "evil.py:build"', "only the command line can give. Add --model evil.py:build"),
        ("lr = [", "file.toml"),
    ],
)
def test_a_file_of_settings_that_cannot_be_used_is_one_line(
    text: str, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "file.toml"
    file.write_text(text)
    code, _, err = run(["train", "--config", str(file), "--out", str(tmp_path / "run")], capsys)
    assert code in {2, 7}
    assert words in " ".join(err.split())
    assert not (tmp_path / "run").exists()


def test_a_file_and_resume_exclude_each_other(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = run(["train", "--config", "x.toml", "--out", str(tmp_path), "--resume"], capsys)
    assert code == 2
    assert "--config begins a run and --resume continues one" in err


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["--set", "lrr=0.1"], "did you mean 'lr'?"),
        (["--set", "lr=fast"], "lr = 'fast' must be a finite number ≥ 0"),
        (["--set", "lr"], "--set 'lr' is not KEY=VALUE"),
        (["--set", "lr=1", "--set", "lr=2"], "names the setting a second time"),
        (["--set", "lr=0.1", "--lr", "0.2"], "--set lr=... and --lr are both given. Keep one"),
        (["--set", "epochs=1.5"], "epochs"),
        (["--set", "rho=-1"], "rho"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_wrong_assignment_is_one_line(
    given: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, err = run(["train", *given, "--out", str(tmp_path / "run")], capsys)
    assert code == 2
    assert words in " ".join(err.split())
    assert not (tmp_path / "run").exists()


def test_assignments_are_read_as_a_recipes_values(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A list, a truth value, a quoted and a bare word; they win over a file, and a sweep takes them, too."""
    (tmp_path / "file.toml").write_text("lr = 0.3\nmodel = 'mlp-4'\n")
    assigned = ["schedule=multi-step", "milestones=[1]", "augment=true", "model='mlp-8'", "lr=1e-2"]
    words = [word for each in assigned for word in ("--set", each)]
    small = ["--num-train", "20", "--epochs", "1", "-q"]
    out = tmp_path / "run"
    code, _, err = run(
        ["train", "--config", str(tmp_path / "file.toml"), *words, *small, "--out", str(out)], capsys
    )
    assert code == 0, err
    found = read_toml(out / "config.toml")
    values = [found[name] for name in ("schedule", "milestones", "augment", "model", "lr")]
    assert values == ["multi-step", [1], True, "mlp-8", 0.01]
    (tmp_path / "recipe.toml").write_text("[base]\nmodel = 'mlp-4'\nepochs = 1\n[grid]\nseed = [0, 1]\n")
    swept = tmp_path / "sweep"
    words = ["--set", "lr=0.3", "--set", "num_train=20", "--out", str(swept), "-q"]
    code, _, err = run(["sweep", str(tmp_path / "recipe.toml"), *words], capsys)
    assert code == 0, err
    runs = [path for path in swept.iterdir() if path.is_dir()]
    assert [(read_toml(path / "config.toml")["lr"]) for path in runs] == [0.3, 0.3]


@pytest.mark.parametrize("command", ["measure", "estimate"])
def test_every_measuring_setting_and_data_option_is_an_option_of_the_command(command: str) -> None:
    module = import_module(f"gm_probe.cli.{command}")
    parameters = {p.name: p for p in getattr(module, command).params}
    shown = {each.name for each in fields(DataOptions)}
    shown |= (
        {each.name for each in fields(Settings) if each.metadata["help"]} if command == "measure" else set()
    )
    assert shown <= set(parameters)
    assert all(not parameters[name].required for name in shown)


def test_a_file_gives_options_and_the_command_line_replaces_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spec = ModelSpec("mlp-4", (1, 8, 8), 10)
    save_checkpoint(tmp_path / "a.pt", initial_model(spec, 0), spec, Normalization())
    file = tmp_path / "options.toml"
    file.write_text(
        'unlabeled = "digits"\nmeasures = ["local_inconsistency"]\nrho = [0.1, 0.3]\nmax-examples = 20\n'
        'no_normalize = true\nmodel = ["mlp-4"]\ndevice = "cpu"\nseed = 3\n'
    )
    command = ["measure", str(tmp_path / "a.pt"), "--config", str(file), "--json", "--quiet"]
    code, out, err = run(command, capsys)
    assert code == 0, err
    settings = json.loads(out)[0]["settings"]
    assert (settings["rho"], settings["rho_grid"], settings["seed"]) == (0.1, [0.3], 3)
    assert settings["max_examples"] == 20
    code, out, _ = run([*command, "--rho", "0.2"], capsys)
    assert (json.loads(out)[0]["settings"]["rho"], json.loads(out)[0]["settings"]["rho_grid"]) == (0.2, [])


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("rhoo = 1", "no option 'rhoo'; did you mean 'rho'?"),
        ("rho = 'big'", "--rho 'big' must be comma-separated numbers"),
        ("max_examples = 0", "max_examples = 0 must be a whole number ≥ 1"),
        ("part = 'tets'", "part = 'tets'; did you mean 'test'?"),
    ],
)
def test_a_wrong_option_in_a_file_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, said: str
) -> None:
    file = tmp_path / "options.toml"
    file.write_text(f'unlabeled = "digits"\n{text}\n')
    code, _, err = run(["measure", "a.pt", "--config", str(file)], capsys)
    assert code == 2
    assert said in err
