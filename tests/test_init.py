"""Training from given weights: what is taken over, what starts afresh, and what a kill changes (nothing)."""

from pathlib import Path

import pytest
import torch
from test_training_loop import config, rows

from gm_probe.data.normalization import Normalization
from gm_probe.errors import CheckpointError
from gm_probe.measures.settings import Settings
from gm_probe.measuring.checkpoint import measure_checkpoint
from gm_probe.models.checkpoints import read_checkpoint, save_checkpoint
from gm_probe.models.zoo import ModelSpec, initial_model
from gm_probe.runs.records import BEST, CHECKPOINT, read_run
from gm_probe.training.loop import train
from gm_probe.training.run_splits import own_unlabeled


def state_of(path: Path) -> dict[str, torch.Tensor]:
    return dict(read_checkpoint(path).state)


@pytest.fixture
def given(tmp_path: Path) -> Path:
    """A checkpoint of the same network, with weights that no seed of these tests draws."""
    spec = ModelSpec("mlp-16", (1, 8, 8), 10)
    save_checkpoint(tmp_path / "given.safetensors", initial_model(spec, 99), spec, Normalization())
    return tmp_path / "given.safetensors"


def test_training_starts_from_the_given_weights(given: Path, tmp_path: Path) -> None:
    train(config(init=str(given), lr=0.0, epochs=1), tmp_path / "run")
    found, expected = state_of(tmp_path / "run"), state_of(given)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)
    assert read_run(tmp_path / "run").config["environment"]["fresh_weights"] == []


def test_a_head_for_other_classes_starts_afresh(tmp_path: Path) -> None:
    spec = ModelSpec("mlp-16", (1, 8, 8), 7)
    save_checkpoint(tmp_path / "seven.pt", initial_model(spec, 99), spec, Normalization())
    train(config(init=str(tmp_path / "seven.pt"), lr=0.0, epochs=1, seed=5), tmp_path / "run")
    found, given = state_of(tmp_path / "run"), state_of(tmp_path / "seven.pt")
    drawn = initial_model(ModelSpec("mlp-16", (1, 8, 8), 10), 5).state_dict()
    fresh = read_run(tmp_path / "run").config["environment"]["fresh_weights"]
    assert [drawn[name].shape[0] for name in fresh] == [10, 10]  # the last layer's weight and bias
    for name in found:
        assert torch.equal(found[name], drawn[name] if name in fresh else given[name]), name


def test_killed_and_resumed_without_the_file(given: Path, tmp_path: Path) -> None:
    settings = config(init=str(given))
    train(settings, tmp_path / "whole")
    train(config(), tmp_path / "drawn")
    whole = state_of(tmp_path / "whole")
    assert not all(torch.equal(value, whole[name]) for name, value in state_of(tmp_path / "drawn").items())

    def leave(row: dict[str, object]) -> None:
        if row["epoch"] == 2:  # the state is that of epoch 1
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(settings, tmp_path / "resumed", notify=leave)
    given.unlink()  # the state has all that is needed
    train(settings, tmp_path / "resumed", resume=True)
    assert all(torch.equal(value, whole[name]) for name, value in state_of(tmp_path / "resumed").items())
    assert rows(tmp_path / "whole") == rows(tmp_path / "resumed")


@pytest.mark.parametrize("path", ["run", f"run/{CHECKPOINT}", f"run/{BEST}"])
def test_distance_is_from_the_given_weights(given: Path, tmp_path: Path, path: str) -> None:
    train(config(init=str(given), eval_every=1), tmp_path / "run")
    examples = own_unlabeled(tmp_path / "run")
    name = "distance_from_initialization"
    found = measure_checkpoint(tmp_path / path, examples, [name], Settings())["measures"][name]["value"]
    before, after = state_of(given), state_of(tmp_path / path)
    expected = sum(float((after[key] - before[key]).double().square().sum()) for key in after) ** 0.5
    assert found == pytest.approx(expected, rel=1e-6)
    given.unlink()
    row = measure_checkpoint(tmp_path / path, examples, [name], Settings())["measures"][name]
    assert row["value"] is None
    assert row["reason"]


def test_what_cannot_be_started_from_is_named(given: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"gone\.pt"):
        train(config(init=str(tmp_path / "gone.pt")), tmp_path / "a")
    with pytest.raises(CheckpointError, match=r"does not fit the model"):
        train(config(init=str(given), model="mlp-20"), tmp_path / "b")
    assert not (tmp_path / "b" / CHECKPOINT).exists()
