"""Runs whose data has moved, and what of a run's data is decoded to measure it."""

from __future__ import annotations

import json
import shlex
import shutil
from pathlib import Path
from typing import Any

import command_line
import numpy as np
import pytest
from PIL import Image

from gm_probe.data import images
from gm_probe.data.image_reading import ImageReading
from gm_probe.errors import DataError
from gm_probe.files.atomic import read_json, write_json
from gm_probe.training import run_splits
from gm_probe.training.config import TrainConfig
from gm_probe.training.run import Training
from gm_probe.training.run_splits import open_data, own_unlabeled

SIZES = (
    "--num-train 20 --num-unlabeled 12 --num-test 8 --model mlp-4 --batch-size 10 --device cpu --threads 1"
)


def run(command: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a command line, in this process, which remembers no data."""
    run_splits._open.cache_clear()
    return command_line.run(shlex.split(command), capsys)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two classes of 25 RGB images of 8×6, in data/ of the working folder."""
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    for index in range(50):
        file = tmp_path / "data" / "ab"[index % 2] / f"{index}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8)).save(file)
    return tmp_path / "data"


@pytest.fixture
def trained(folder: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    """The working folder with two finished runs of one training set."""
    for seed in (0, 1):
        code, _, err = run(
            f"train --data data {SIZES} --resize 6 --crop 6 --epochs 1 --seed {seed} --out runs/{seed}",
            capsys,
        )
        assert code == 0, err
    return folder.parent


def values(out: str) -> list[Any]:
    return [row["measures"]["mean_entropy"]["value"] for row in json.loads(out)]


def change(run_folder: Path, part: str) -> None:
    """Write other pixels into the first image of a part."""
    files = sorted(Path("data/a").iterdir()) + sorted(Path("data/b").iterdir())
    file = files[read_json(run_folder / "split.json")[part][0]]
    Image.new("RGB", (8, 6), (1, 2, 3)).save(file)


# ---- --data


@pytest.mark.parametrize("how", ["", " --save", " --jobs 2"])
def test_measure_finds_data_that_has_moved(
    trained: Path, how: str, capsys: pytest.CaptureFixture[str]
) -> None:
    command = "measure runs --measures mean_entropy --device cpu --json -q"
    before = values(run(command, capsys)[1])
    (trained / "data").rename(trained / "new")
    code, _, err = run("measure runs/0 --measures mean_entropy --device cpu", capsys)
    assert (code, err.count("\n")) == (2, 1)
    assert f"no folder or file '{trained / 'data'}'; if it has moved, give its place with --data" in err
    code, out, err = run(f"{command} --data new{how}", capsys)
    assert code == 0, err
    assert values(out) == before


def test_measures_saved_before_and_after_the_move_stand_beside_each_other(
    trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("measure runs/0 --measures mean_entropy --device cpu --save", capsys)[0] == 0
    (trained / "data").rename(trained / "new")
    assert run("measure runs/0 --measures parameter_norm --device cpu --save --data new", capsys)[0] == 0
    assert set(read_json(trained / "runs/0/measures.json")["measures"]) == {"mean_entropy", "parameter_norm"}


def test_pairs_finds_data_that_has_moved(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = json.loads(run("pairs runs --device cpu --json", capsys)[1])
    (trained / "data").rename(trained / "new")
    assert "--data" in run("pairs runs --device cpu", capsys)[2]
    code, out, err = run("pairs runs --device cpu --json --data new", capsys)
    assert code == 0, err
    assert json.loads(out)["measures"] == before["measures"]


def test_other_data_than_the_runs_is_refused_with_both_names(
    trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree("data", "other")
    shutil.copytree("data", "fewer")
    for file in Path("other").rglob("*.png"):
        Image.new("RGB", (8, 6), (9, 9, 9)).save(file)
    next(Path("fewer").rglob("*.png")).unlink()
    for name in ("other", "fewer"):
        for command in ("measure runs/0", "pairs runs"):
            code, _, err = run(f"{command} --device cpu --data {name}", capsys)
            assert (code, err.count("\n")) == (4, 1), err
            assert f"{trained / name} is not the data that runs/0 was trained on" in err
            assert str(trained / "data") in err


def test_data_goes_with_a_runs_own_data_only(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for command in ("measure runs/0 --unlabeled data", "pairs runs --unlabeled data"):
        code, _, err = run(f"{command} --data data", capsys)
        assert (code, "--data says where a run's own data is" in err) == (2, True)


class Interrupted(BaseException):
    """As a kill would be."""


def interrupted(command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Run a training that ends after its first epoch."""

    def stop(self: Training) -> None:
        save(self)
        raise Interrupted

    save = Training.save_state
    monkeypatch.setattr(Training, "save_state", stop)
    with pytest.raises(Interrupted):
        run(command, capsys)
    monkeypatch.setattr(Training, "save_state", save)


def test_training_goes_on_where_the_data_has_moved(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = f"{SIZES} --epochs 3 --image-size 6"
    assert run(f"train --data data {settings} --out straight", capsys)[0] == 0
    interrupted(f"train --data data {settings} --out again", capsys, monkeypatch)
    shutil.copytree("data", "other")
    Image.new("RGB", (8, 6)).save(next(Path("other/a").iterdir()))
    folder.rename("new")
    code, _, err = run("train --out again --resume -q", capsys)
    assert (code, "--data" in err) == (2, True)
    code, _, err = run("train --out again --resume -q --data other", capsys)
    assert (code, "is not the data that again was trained on" in err) == (4, True)
    code, _, err = run("train --out again --resume -q --data new", capsys)
    assert code == 0, err
    one, other = (Path(name, "checkpoint.safetensors").read_bytes() for name in ("straight", "again"))
    assert one == other
    code, _, err = run("train --out again --resume -q --data other", capsys)  # it has finished on other data
    assert (code, "is not the data that again was trained on" in err) == (4, True)


# ---- what is decoded


def test_a_run_is_measured_over_what_it_decodes_alone(
    trained: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded: list[Path] = []
    original = images.decode

    def spy(file: Path, reading: ImageReading) -> np.ndarray:
        decoded.append(file)
        return original(file, reading)

    monkeypatch.setattr(images, "decode", spy)
    command = "measure runs/0 --measures mean_entropy --device cpu --json -q"
    assert run(f"{command} --max-examples 5", capsys)[0] == 0
    assert len(decoded) == len(set(decoded)) == 5
    decoded.clear()
    assert run(command, capsys)[0] == 0
    assert len(decoded) == len(set(decoded)) == 12
    decoded.clear()
    for part in ("train", "test"):
        shutil.copytree("data", f"both/{part}")
    code, out, err = run(
        "measure runs --unlabeled both --resize 6 --crop 6 --max-examples 7 --measures mean_entropy "
        "--device cpu --json",
        capsys,
    )
    assert code == 0, err
    assert len(values(out)) == 2
    assert len(decoded) == len(set(decoded)) == 7
    settings = json.loads(out)[0]["settings"]
    assert {name: settings[name] for name in ("resize", "crop", "image_size", "channels")} == {
        "resize": 6,
        "crop": 6,
        "image_size": None,
        "channels": None,
    }


def test_a_changed_image_is_noticed_where_it_is_measured(
    trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_folder = trained / "runs" / "0"
    before = own_unlabeled(run_folder).subset(None, 0)
    change(run_folder, "train")
    run_splits._open.cache_clear()
    assert own_unlabeled(run_folder).subset(None, 0).digest == before.digest
    change(run_folder, "unlabeled")
    run_splits._open.cache_clear()
    with pytest.raises(DataError, match="has changed since its start"):
        own_unlabeled(run_folder).subset(None, 0)


def test_a_run_of_an_earlier_version_is_vouched_for_by_all_its_data(trained: Path) -> None:
    run_folder = trained / "runs" / "0"
    before = own_unlabeled(run_folder).subset(None, 0)
    split = read_json(run_folder / "split.json")
    assert len(split.pop(run_splits.MARKS)) == 12
    write_json(run_folder / "split.json", split)
    run_splits._open.cache_clear()
    assert own_unlabeled(run_folder).subset(None, 0).digest == before.digest
    change(run_folder, "train")
    run_splits._open.cache_clear()
    with pytest.raises(DataError, match="has changed since its start"):
        own_unlabeled(run_folder)


def test_notes_of_a_folder_are_told_where_training_begins(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "a" / "notes.txt").touch()
    code, _, err = run(f"train --data data {SIZES} --image-size 6 --epochs 1 --out r", capsys)
    assert code == 0
    assert f"note: {folder}: these entries were skipped: 1 × .txt" in err
    assert "note: --image-size 6 changes the aspect ratio of images such as" in err
    assert "notes.txt" not in Path("r/split.json").read_text()
    (folder / "a" / "notes.txt").unlink()
    code, out, _ = run("measure r --measures mean_entropy --device cpu --json -q", capsys)
    assert code == 0
    assert json.loads(out)[0]["settings"]["passed_over"] == {}


def test_data_of_the_same_name_in_another_folder_is_read_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    for value in (0, 255):
        folder = tmp_path / str(value)
        folder.mkdir()
        np.savez(folder / "data.npz", x=np.full((9, 1, 2, 2), value, np.uint8), y=np.arange(9) % 3)
        monkeypatch.chdir(folder)
        found.append(float(open_data(TrainConfig(data="data.npz")).pool.x.float().mean()))
    assert found == [0, 255]
