"""Code that a file names never runs, be it a checkpoint's record or a run folder's; only what a command names does."""

from __future__ import annotations

import json
import os
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import tomli_w
from command_line import exit_code

import gm_probe
from gm_probe.errors import DataError
from gm_probe.files.atomic import read_json, read_toml

EVIL = "from pathlib import Path\nPath({canary!r}).touch()\ndef build():\n    raise SystemExit\n"
RECIPE = """
[base]
data = "digits"
model = "mlp-8"
num_train = 60
num_unlabeled = 20
num_test = 40
epochs = 1
device = "cpu"
[grid]
seed = [0, 1, 2]
[measure]
measures = ["mean_entropy"]
"""


def command(*args: object) -> int:
    return exit_code(args)


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe and the folder of its three runs."""
    folder = tmp_path_factory.mktemp("swept")
    (folder / "recipe.toml").write_text(RECIPE)
    assert command("sweep", folder / "recipe.toml", "--out", folder / "runs", "-q") == 0
    return folder


@pytest.fixture
def folder(swept: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A copy of it as working folder, where ``evil.py`` lies; importing it leaves ``canary``."""
    for path in swept.rglob("*"):
        if path.is_file():
            copy = tmp_path / path.relative_to(swept)
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(path.read_bytes())
    (tmp_path / "evil.py").write_text(EVIL.format(canary=str(tmp_path / "canary")))
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    sys.modules.pop("evil", None)


def _checkpoint(root: Path, name: str) -> None:
    for path in root.glob("*/checkpoint.safetensors"):
        content = path.read_bytes()
        size = struct.unpack("<Q", content[:8])[0]
        header = json.loads(content[8 : 8 + size])
        [key] = header["__metadata__"]
        record = json.loads(header["__metadata__"][key])
        record["model"]["name"] = name
        header["__metadata__"][key] = json.dumps(record)
        text = json.dumps(header).encode()
        path.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + size :])


def _config(root: Path, name: str) -> None:
    for path in root.glob("*/config.toml"):
        path.write_bytes(tomli_w.dumps({**read_toml(path), "model": name}).encode())


def _init(root: Path, name: str) -> None:
    for path in root.glob("*/config.toml"):
        path.write_bytes(tomli_w.dumps({**read_toml(path), "init": name}).encode())


def _split(root: Path, name: str) -> None:
    for path in root.glob("*/split.json"):
        path.write_text(json.dumps({**read_json(path), "model": name}))


def _sweep(root: Path, name: str) -> None:
    content = read_json(root / "sweep.json")
    runs = {run: {**config, "model": name} for run, config in content["runs"].items()}
    (root / "sweep.json").write_text(json.dumps({**content, "runs": runs, "model": name}))


def _all(root: Path, name: str) -> None:
    for plant in (_checkpoint, _config, _sweep):  # a split.json that was tampered with ends a command earlier
        plant(root, name)


PLACES: list[Callable[[Path, str], None]] = [_checkpoint, _config, _init, _split, _sweep, _all]


@pytest.mark.parametrize("place", PLACES, ids=lambda place: place.__name__.strip("_"))
@pytest.mark.parametrize("name", ["evil:build", "evil.py:build"])
def test_no_file_names_code_that_runs(
    folder: Path, place: Callable[[Path, str], None], name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    root = folder / "runs"
    first, second, third = sorted(path.parent for path in root.glob("*/config.toml"))
    place(root, name)
    (second / "measures.json").unlink()
    (third / "summary.json").unlink()  # there is something left to do for a sweep
    commands = [
        ("measure", first, "--measures", "mean_entropy,distance_from_initialization", "--json"),
        ("measure", first / "checkpoint.safetensors", "--unlabeled", "digits", "--measures", "mean_entropy"),
        ("measure", root, "--measures", "mean_logit_norm,mean_entropy", "--save", "-q"),
        ("pairs", root, "-q"),
        ("correlate", root, "--no-figure"),
        ("collect", root, "--out", "table.csv"),
        ("status", root),
        ("report", root, "--out", "page.html"),
        ("run-one", root, second.name),
        ("run-one", root, third.name),
        ("sweep", "recipe.toml", "--out", root, "-q", "--retry-failed"),
        ("sweep", "recipe.toml", "--out", root, "--dry-run"),
    ]
    for args in commands:
        code = command(*args)
        assert not (folder / "canary").exists(), args
        assert code in {0, 1, 2, 3, 4, 7}, args
        assert "internal error" not in capsys.readouterr().err, args


@pytest.mark.parametrize("name", ["evil:build", "evil.py:build"])
def test_only_a_command_does(folder: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    root = folder / "runs"
    run = min(path.parent for path in root.glob("*/config.toml"))
    _all(root, name)
    assert command("measure", run) == 2
    assert f"Add --model {name}" in capsys.readouterr().err
    (run / "summary.json").unlink()
    assert command("run-one", root, run.name) == 2
    assert f"Add --model {name}" in capsys.readouterr().err
    assert not (folder / "canary").exists()
    for args in (("measure", run), ("run-one", root, run.name)):
        command(*args, "--model", name)
        assert (folder / "canary").exists(), args
        (folder / "canary").unlink()
        sys.modules.pop("evil", None)


def test_a_job_array_names_the_code_of_its_recipe(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("my nets.py").touch()
    Path("own.toml").write_text(RECIPE.replace("mlp-8", "my nets.py:build"))
    assert command("sweep", "own.toml", "--out", "array", "--executor", "slurm") == 0
    assert capsys.readouterr().out.rstrip().endswith(" --model 'my nets.py:build'")


# ---- the current folder


def test_what_lies_beside_named_code_hides_no_installed_module(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from gm_probe.models.zoo import ModelSpec, build_model

    monkeypatch.chdir(tmp_path)
    for name in ("this", "colorsys", "ensurepip"):  # modules that nothing has imported
        sys.modules.pop(name, None)
        Path(f"{name}.py").write_text("from pathlib import Path\nPath('canary').touch()\n")
    Path("helper_of_net.py").write_text("width = 3\n")
    Path("net_of_mine.py").write_text(
        "import colorsys, ensurepip, torch\nfrom helper_of_net import width\n"
        "def build():\n    return torch.nn.Linear(2, width)\n"
    )
    path = list(sys.path)
    for name in ("net_of_mine.py:build", "net_of_mine:build"):
        model = build_model(ModelSpec(name, (2,), 3))
        assert model.out_features == 3
        sys.modules.pop("helper_of_net")
    sys.modules.pop("net_of_mine")
    assert not Path("canary").exists()
    assert sys.path == path


def test_python_m_imports_nothing_from_the_current_folder(tmp_path: Path) -> None:
    for name in ("logging", "click", "json", "pandas", "tempfile", "tomli_w"):
        (tmp_path / f"{name}.py").write_text("open('canary', 'w')\nraise SystemExit")
    root = str(Path(gm_probe.__file__).parents[1])
    done = subprocess.run(
        [sys.executable, "-m", "gm_probe", "recipes"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": root},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "canary").exists()


# ---- what else a record may not decide


def _changed(run: Path, **changes: object) -> None:
    (run / "config.toml").write_bytes(tomli_w.dumps({**read_toml(run / "config.toml"), **changes}).encode())


def test_a_record_names_no_place_to_look_for_data(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from gm_probe.data import datasets

    asked: list[tuple[Path, bool]] = []

    def torchvision(name: str, root: Path, download: bool, train: bool) -> object:
        asked.append((root, download))
        raise DataError(f"{name} is not in {root}. Add --download")

    monkeypatch.setattr(datasets, "_torchvision", torchvision)
    monkeypatch.setenv("HOME", str(folder / "home"))
    run = min(path.parent for path in folder.glob("runs/*/config.toml"))
    _changed(run, data="cifar10", download=True, data_root=str(folder / "else where"))
    measure = "measure", run, "--measures", "mean_confidence", "--save", "-q"  # which it has not yet
    for args in (measure, ("train", "--out", run, "--resume")):
        assert command(*args) == 2
        assert (
            f"only the command line can give. Add --data-root '{folder}/else where'"
            in capsys.readouterr().err
        )
    assert not asked
    for options, root, download in (
        (("--data-root", folder / "mine"), folder / "mine", False),
        (("--data-root", folder / "mine", "--download"), folder / "mine", True),
    ):
        assert command(*measure, *options) == 4
        assert asked.pop(0) == (root, download)
    _changed(run, data_root=str(folder / "home" / ".cache" / "gm_probe"))
    assert command(*measure) == 4
    assert asked == [(folder / "home" / ".cache" / "gm_probe", False)]
    assert "Add --download" in capsys.readouterr().err
    assert not (folder / "home" / ".cache" / "gm_probe").exists()  # matplotlib may make its own


@pytest.mark.parametrize(
    ("changes", "option"),
    [
        ({"model": "evil:build"}, "--model evil:build"),
        ({"model": "evil.py:build"}, "--model evil.py:build"),
        ({"device": "cuda:7"}, "--device cuda:7"),
        ({"device": "meta"}, "--device meta"),
        ({"threads": 1000}, "--threads 1000"),
    ],
)
def test_a_run_is_resumed_as_far_as_the_command_lets_it(
    folder: Path, changes: dict[str, object], option: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run = min(path.parent for path in folder.glob("runs/*/config.toml"))
    (run / "summary.json").unlink()
    _changed(run, **changes)
    assert command("train", "--out", run, "--resume", "-q") == 2
    assert capsys.readouterr().err.rstrip().endswith(f"only the command line can give. Add {option}")
    assert not (folder / "canary").exists()
    if "threads" in changes:
        assert command("train", "--out", run, "--resume", "-q", "--threads", "1") == 0


def test_a_job_array_gives_its_runs_leave(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = "--data", "cifar10", "--data-root", "my data", "--download", "--device", "cuda"
    assert command("sweep", "recipe.toml", "--out", "array", "--executor", "slurm", *options) == 0
    printed = capsys.readouterr().out.rstrip()
    assert printed.endswith(" --data-root 'my data' --device cuda --download")
    name = min(json.loads((folder / "array" / "sweep.json").read_text())["runs"])
    assert command("run-one", "array", name) == 2
    assert "Add --data-root 'my data' --device cuda" in capsys.readouterr().err


def test_a_sweep_writes_through_no_link(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = min(path.parent for path in folder.glob("runs/*/config.toml"))
    shutil.rmtree(run)
    (folder / "elsewhere").mkdir()
    (folder / "elsewhere" / "error.txt").write_text("mine")
    run.symlink_to(folder / "elsewhere")
    assert command("sweep", "recipe.toml", "--out", "runs", "-q") == 1
    assert "is a link; a sweep writes into its own folder only" in capsys.readouterr().out
    assert [path.name for path in (folder / "elsewhere").iterdir()] == ["error.txt"]
