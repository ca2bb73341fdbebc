"""Code that a file names never runs, be it a checkpoint's record or a run folder's; only what a command names does."""

from __future__ import annotations

import json
import struct
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import tomli_w

from gm_probe.cli import main
from gm_probe.core.files import read_json, read_toml

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
    try:
        main([str(arg) for arg in args])
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


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
    assert f"add --model {name}" in capsys.readouterr().err
    (run / "summary.json").unlink()
    assert command("run-one", root, run.name) == 2
    assert f"add --model {name}" in capsys.readouterr().err
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
