"""Strangers' files: all that benchmarks/trust.py makes, in this process; a few faults of each kind."""

import json
import os
import random
import shutil
import struct
import subprocess
import sys
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from command_line import run
from PIL import Image

from gm_probe.data import datasets, images
from gm_probe.data.datasets import open_source
from gm_probe.data.folders import PassedOver, images_below
from gm_probe.data.normalization import Normalization
from gm_probe.errors import CheckpointError, DataError
from gm_probe.models.checkpoints import read_checkpoint, save_checkpoint
from gm_probe.models.loading import load_model
from gm_probe.models.zoo import ModelSpec, build_model
from gm_probe.training.state import read_state

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture(scope="module")
def trust() -> Iterator[SimpleNamespace]:
    """The harness's parts."""
    sys.path.insert(0, str(BENCHMARKS))
    import trust_checkpoints
    import trust_images
    import trust_mutations

    yield SimpleNamespace(checkpoints=trust_checkpoints, images=trust_images, mutations=trust_mutations)
    sys.path.remove(str(BENCHMARKS))


def command(capsys: pytest.CaptureFixture[str], *args: object) -> tuple[int, str, str]:
    return run(args, capsys)


# ---- checkpoints


def refusal(path: Path, name: str | None) -> str:
    with pytest.raises(CheckpointError) as caught:
        load_model(read_checkpoint(path), name, input_shape=(1, 8, 8))
    message = str(caught.value)
    assert message.isprintable()
    assert str(path) in message
    assert len(message) < 1500
    return message


def test_no_file_runs_code(tmp_path: Path, trust: SimpleNamespace) -> None:
    canary, path = tmp_path / "canary", tmp_path / "a.pt"
    files = trust.checkpoints.hostile(canary)
    assert len(files) > 100
    for case, content in files.items():
        path.write_bytes(content)
        refusal(path, "mlp-8")
        assert not canary.exists(), case


def test_broken_files_and_unusable_weights_are_refused(tmp_path: Path, trust: SimpleNamespace) -> None:
    files = trust.checkpoints.broken(tmp_path)
    assert len(files) >= 90
    for case, content in files.items():
        path = tmp_path / f"a{Path(case).suffix}"
        path.write_bytes(content)
        refusal(path, None if case.startswith("record") else "mlp-8")


def test_a_file_may_not_unpack_to_more_than_itself(tmp_path: Path, trust: SimpleNamespace) -> None:
    files = trust.checkpoints.broken(tmp_path)
    for case, reason in {
        "deflated.pt": "would unpack to 16,",
        "two pickles of one name.pt": "two records of one name",
        "bytearray of 1 GiB.pt": "holds a bytearray",
        "tensor of 1 GiB of nothing.pt": "the file holds fewer",
        "key of 2^60 parts in Data.pkl.pt": "nests a tuple in itself",
        "bytearray of 1 GiB in DATA.PKL.pt": "holds a bytearray",
        "data.pkl and DATA.PKL.pt": "two records of one name",
        "NaN behind an attribute.pt": "NaN or infinite",
        "record of a name of 400 kB.pt": "a model name of 400,003 characters",
        "record with classes of numbers.pt": "classes is not a list of names",
        "record with a class too few.pt": "1 names for 10 classes",
        "100,000 tensors of nothing.safetensors": "networks need less",
        "bit flips.pt": "checksum",
        "record of a network of 4 TB.pt": "does not fit the model",
        "record of no network.pt": "records an impossible network",
        "key 100,000 deep.pt": "a key of tuple",
    }.items():
        path = tmp_path / f"a{Path(case).suffix}"
        path.write_bytes(files[case])
        assert reason in refusal(path, None if case.startswith("record") else "mlp-8"), case


def test_attributes_hide_no_method(tmp_path: Path, trust: SimpleNamespace) -> None:
    """A file may set attributes on a tensor, in its methods' place; none is left on what is read."""
    made, path = trust.checkpoints, tmp_path / "a.pt"
    state = made.model_state()
    path.write_bytes(made.whole({n: made.Disguised(t, detach=3, numel=3, dim=3) for n, t in state.items()}))
    read = read_checkpoint(path).state
    assert read.keys() == state.keys()
    assert all(torch.equal(read[name], value) and not read[name].__dict__ for name, value in state.items())


def test_states_and_data_are_looked_through_too(tmp_path: Path, trust: SimpleNamespace) -> None:
    """What a checkpoint may not hold, neither may the file that a run is resumed from, nor an array file."""
    path = tmp_path / "state.pt"
    path.write_bytes(trust.checkpoints.with_pickle(trust.checkpoints.GIB))
    with pytest.raises(CheckpointError, match="holds a bytearray"):
        read_state(path)
    with pytest.raises(DataError, match="holds a bytearray"):
        open_source(str(path), labeled=False)


def test_arrays_that_are_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trust: SimpleNamespace
) -> None:
    packed, path = trust.images.packed, tmp_path / "a.pt"
    ragged = torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged)
    for x, reason in (
        (ragged, "nested"),
        (torch.ones(5, 2).to_sparse(), "sparse"),
        (torch.ones(1, 1).expand(10**9, 9), "the file holds fewer"),
        (trust.checkpoints.Disguised(torch.full((5, 2), torch.nan), detach=3), "NaN"),
    ):
        path.write_bytes(packed(x))
        with pytest.raises(DataError, match=reason):
            open_source(str(path), labeled=False)
    path.write_bytes(packed(torch.ones(5, 2).to(torch.float8_e4m3fn)))
    assert torch.equal(open_source(str(path), labeled=False).pool.x, torch.ones(5, 2))
    zeros = tmp_path / "zeros.npz"
    np.savez_compressed(zeros, x=np.zeros((5, 10**6), dtype=np.uint8))
    assert len(open_source(str(zeros), labeled=False).pool) == 5
    monkeypatch.setattr(datasets, "UNPACKED", 10**6)
    for suffix in (".npz", ".npy"):  # numpy goes by the content
        zeros = zeros.rename(zeros.with_suffix(suffix))
        with pytest.raises(DataError, match=r"would unpack to 5,000,\d+ bytes from"):
            open_source(str(zeros), labeled=False)


def test_mutated_files_load_or_are_refused(tmp_path: Path, trust: SimpleNamespace) -> None:
    for suffix, content in trust.mutations.files(tmp_path).items():
        store = tmp_path / "log"
        trust.mutations.batch(content, suffix, 0, 150, tmp_path, store)
        ended = [json.loads(line)[1] for line in store.read_text().splitlines()]
        assert len(ended) == 150
        assert set(ended) == {"loaded", "refused"}


# ---- images


def test_odd_images_are_decoded_or_named(tmp_path: Path, trust: SimpleNamespace) -> None:
    for case, (content, expected) in trust.images.files().items():
        path = tmp_path / case
        path.write_bytes(content)
        if expected is None:
            with pytest.raises(DataError) as caught:
                open_source(str(tmp_path), labeled=False)
            assert str(path) in str(caught.value), case
        else:
            x = open_source(str(tmp_path), labeled=False).pool.x
            assert trust.images.near(x[:1][0], expected, case) is None, case
        path.unlink()


def test_mutated_images_are_decoded_or_refused(tmp_path: Path, trust: SimpleNamespace) -> None:
    store = tmp_path / "log"
    trust.images.mutated(0, 150, tmp_path, store)
    ended = {json.loads(line)[1] for line in store.read_text().splitlines()}
    assert ended == {"decoded", "refused"}


def test_odd_entries_are_named_or_passed_over(tmp_path: Path, trust: SimpleNamespace) -> None:
    for index, (case, make) in enumerate(trust.images.odd_entries(tmp_path).items()):
        folder = tmp_path / str(index)
        folder.mkdir()
        Image.new("L", (8, 8)).save(folder / "0.png")
        make(folder / case)
        if case in {"a folder named.jpg", "a link to a loop of folders"}:
            assert len(open_source(str(folder), labeled=False).pool) == 1
            continue
        with pytest.raises(DataError) as caught:
            open_source(str(folder), labeled=False)
        assert case in str(caught.value)


def _mixed(folder: Path) -> tuple[Path, list[Path]]:
    """A labeled folder of 12 images, and three broken files in it."""
    rng = np.random.default_rng(0)
    for label in ("a", "b"):
        (folder / label).mkdir(parents=True)
        for index in range(6):
            pixels = rng.integers(0, 256, (8, 8), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / label / f"{index}.png")
    bad = [folder / "a" / "00.png", folder / "a" / "9.jpg", folder / "b" / "3x.png"]
    for path in bad:
        path.write_bytes(random.Random(0).randbytes(50))
    return folder, bad


@pytest.mark.parametrize("budget", [2**30, 0], ids=["in memory", "streamed"])
def test_skipped_images_leave_the_others_as_they_are(
    tmp_path: Path, budget: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, bad = _mixed(tmp_path / "data")
    with pytest.raises(DataError, match="cannot decode"):
        open_source(str(folder), labeled=True)
    monkeypatch.setattr(images, "IN_MEMORY", budget)
    found = open_source(str(folder), labeled=True, skip_bad=True).pool
    assert [text.partition(":")[0] for text in found.skipped] == [f"cannot decode {path}" for path in bad]
    for path in bad:
        path.unlink()
    whole = open_source(str(folder), labeled=True).pool
    assert whole.skipped == ()
    assert torch.equal(found.x[:], whole.x[:])
    assert found.y is not None
    assert whole.y is not None
    assert torch.equal(found.y, whole.y)
    assert found.unlabeled().subset(3, 0).skipped == found.skipped


def test_what_is_skipped_is_counted_and_listed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, bad = _mixed(tmp_path / "data")
    train = ["train", "--data", folder, "--model", "mlp-4", "--epochs", 1, "--device", "cpu"]
    code, _, err = command(capsys, *train, "--out", tmp_path / "strict")
    assert code == 4
    assert str(bad[0]) in err
    run = tmp_path / "run"
    code, _, err = command(capsys, *train, "--out", run, "--skip-bad")
    assert code == 0
    assert f"warning: 3 file(s) left out: cannot decode {bad[0]}" in err
    assert len(json.loads((run / "split.json").read_text())["skipped"]) == 3
    options = ["--measures", "mean_entropy", "--json", "--device", "cpu"]
    for more in ([], ["--unlabeled", folder, "--skip-bad"]):
        code, out, err = command(capsys, "measure", run, *options, *more)
        assert code == 0
        [result] = json.loads(out)
        assert len(result["skipped"]) == 3
        assert result["num_examples"] == (12 if more else 3)
        assert ("3 file(s) left out" in err) == bool(more)
    assert command(capsys, "measure", run, *options, "--unlabeled", "digits", "--skip-bad")[0] == 2


def test_nothing_left_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "0.png").touch()
    with pytest.raises(
        DataError, match=r"none of 1 images can be decoded; the first: cannot decode .*0\.png"
    ):
        open_source(str(tmp_path), labeled=False, skip_bad=True)


def test_an_error_is_one_line_whatever_a_file_is_called(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "two\nlines \x1b[2J.png").touch()
    checkpoint = tmp_path / "a.pt"
    torch.save({"0.weight": torch.ones(2, 64)}, checkpoint)
    _, _, err = command(capsys, "measure", checkpoint, "--unlabeled", tmp_path, "--model", "mlp-8")
    assert err.startswith("gmprobe: cannot decode ")
    assert "two\\nlines \\x1b[2J.png" in err
    assert err.count("\n") == 1


def test_pillow_says_nothing_beside_the_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    path, samples = tmp_path / "a.tif", struct.Struct("<HHIHH")  # tag, type, count, value, padding
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(path)
    content = path.read_bytes()
    assert content.count(samples.pack(277, 3, 1, 3, 0)) == 1
    path.write_bytes(content.replace(samples.pack(277, 3, 1, 3, 0), samples.pack(277, 3, 1, 2048, 0)))
    checkpoint = tmp_path / "a.pt"
    torch.save({"0.weight": torch.ones(2, 64)}, checkpoint)
    code, _, err = command(capsys, "measure", checkpoint, "--unlabeled", tmp_path, "--model", "mlp-8")
    assert (code, err.count("\n")) == (4, 1)
    assert str(path) in err
    assert not caplog.records  # without a handler of logging's they go to stderr


def test_of_a_folders_other_entries_nothing_is_kept(tmp_path: Path) -> None:
    names = [*(f"{index:04d}.txt" for index in range(3000)), "b.png", "a.PNG", ".hidden.png"]
    for name in names:
        (tmp_path / name).touch()
    passed = PassedOver()
    images.suffixes()  # Pillow's plugins take memory of their own
    tracemalloc.start()
    try:
        found = list(images_below(tmp_path, passed))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert [path.name for path in found] == ["a.PNG", "b.png"]
    assert passed == {".txt": 3000, "hidden": 1}
    assert peak < 50_000  # the names alone would be 180,000 bytes


def test_what_may_not_be_read_is_named_with_its_exit_code(tmp_path: Path) -> None:
    """A checkpoint, a run folder, the checkpoint in one, images: each with the permissions taken away."""
    drop: list[str] = []
    if os.geteuid() == 0:  # root may read all, until it gives that up
        drop = ["setpriv", "--bounding-set=-all", "--inh-caps=-all"]
        if shutil.which("setpriv") is None or subprocess.run([*drop, "true"], check=False).returncode:
            pytest.skip("root may read everything")
    torch.save({"0.weight": torch.ones(2, 64)}, tmp_path / "a.pt")
    for name in ("run", "locked"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.toml").touch()
        save_checkpoint(
            tmp_path / name / "checkpoint.safetensors",
            build_model(ModelSpec("mlp-4", (1, 8, 8), 2)),
            ModelSpec("mlp-4", (1, 8, 8), 2),
            Normalization(),
        )
    (tmp_path / "parts" / "test").mkdir(parents=True)
    cases = [
        (["measure", "a.pt", "--unlabeled", "digits"], 3, "cannot read a.pt: Permission denied"),
        (
            ["measure", "run", "--unlabeled", "digits"],
            3,
            "cannot read run/checkpoint.safetensors: Permission",
        ),
        (["measure", "locked"], 7, "Permission denied: locked"),
        (["status", "locked"], 7, "cannot read locked: Permission denied"),
        (["correlate", "locked"], 7, "cannot read locked: Permission denied"),
        (["train", "--data", "parts", "--out", "new"], 4, "/parts: Permission denied"),
        (["measure", "a.safetensors", "--unlabeled", "parts"], 4, "cannot read the folder parts: Permission"),
    ]
    shutil.copy(tmp_path / "run" / "checkpoint.safetensors", tmp_path / "a.safetensors")
    closed = ["a.pt", "run/checkpoint.safetensors", "locked", "parts"]
    code = (
        "import sys\n"
        "from gm_probe.cli import main\n"
        f"for words, code, _ in {cases!r}:\n"
        "    try: main([*words, '-q'])\n"
        "    except SystemExit as stop: assert stop.code == code, (words, stop.code)\n"
    )
    for name in closed:
        (tmp_path / name).chmod(0)
    try:
        done = subprocess.run(
            [*drop, sys.executable, "-c", code],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(BENCHMARKS.parent), "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            check=False,
        )
    finally:
        for name in closed:
            (tmp_path / name).chmod(0o700)
    assert done.returncode == 0, done.stderr
    lines = done.stderr.splitlines()
    assert len(lines) == len(cases), lines
    for line, (_, _, said) in zip(lines, cases, strict=True):
        assert said in line
