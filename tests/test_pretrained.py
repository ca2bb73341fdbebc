"""Fine-tuning starts from given weights: all of them where they fit, a fresh head, resampled positions."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional

from gm_probe.errors import CheckpointError
from gm_probe.models.checkpoints import read_checkpoint
from gm_probe.models.pretrained import load_pretrained
from gm_probe.models.zoo import ModelSpec, initial_model

SHAPE = (3, 8, 8)


def built(name: str, classes: int, seed: int) -> nn.Module:
    return initial_model(ModelSpec(name, SHAPE, classes), seed)


def differing(model: nn.Module, state: dict[str, torch.Tensor]) -> set[str]:
    return {name for name, value in model.state_dict().items() if not torch.equal(value, state[name])}


@pytest.mark.parametrize(
    ("name", "head"),
    [
        ("6cnn", {"11.weight", "11.bias"}),
        ("wrn-10-1", {"head.weight", "head.bias"}),
        ("resnet18-cifar", {"fc.weight", "fc.bias"}),
    ],
)
def test_a_head_for_other_classes_starts_afresh(name: str, head: set[str], tmp_path: Path) -> None:
    given = built(name, 7, seed=1).state_dict()
    with torch.no_grad():
        for value in given.values():
            value += 1
    path = tmp_path / "weights.pt"
    torch.save({"state_dict": {f"module.{key}": value for key, value in given.items()}}, path)
    checkpoint = read_checkpoint(path)

    model, fresh = built(name, 4, seed=2), built(name, 4, seed=2).state_dict()
    assert set(load_pretrained(model, checkpoint)) == head
    for key, value in model.state_dict().items():
        assert torch.equal(value, fresh[key] if key in head else given[key])

    same = built(name, 7, seed=2)
    assert load_pretrained(same, checkpoint) == ()
    assert not differing(same, given)


def test_a_file_without_a_head(tmp_path: Path) -> None:
    given = built("6cnn", 4, seed=1).state_dict()
    save_file({k: v for k, v in given.items() if not k.startswith("11.")}, tmp_path / "trunk.safetensors")
    model, fresh = built("6cnn", 4, seed=2), built("6cnn", 4, seed=2).state_dict()
    assert load_pretrained(model, read_checkpoint(tmp_path / "trunk.safetensors")) == ("11.weight", "11.bias")
    assert not differing(model, {**given, "11.weight": fresh["11.weight"], "11.bias": fresh["11.bias"]})


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda s: s.pop("0.weight"), "1 missing (0.weight)"),
        (lambda s: s.update(more=torch.zeros(1)), "1 unexpected (more)"),
        (lambda s: s.update({"9.bias": torch.zeros(7)}), "9.bias (7,) ≠ (100,)"),
        (lambda s: s.update({"11.weight": torch.zeros(4, 99)}), "11.weight (4, 99) ≠ (4, 100)"),
    ],
)
def test_a_trunk_that_does_not_fit_is_refused(change, reason: str, tmp_path: Path) -> None:
    state = built("6cnn", 4, seed=1).state_dict()
    change(state)
    torch.save(state, tmp_path / "w.pt")
    with pytest.raises(CheckpointError) as caught:
        load_pretrained(built("6cnn", 4, seed=2), read_checkpoint(tmp_path / "w.pt"))
    assert reason in str(caught.value)


@pytest.mark.skipif(find_spec("timm") is None, reason="timm is an extra")
def test_positions_follow_the_size_of_the_images(tmp_path: Path) -> None:
    from timm.models.vision_transformer import VisionTransformer

    def small(size: int, classes: int) -> nn.Module:
        return VisionTransformer(
            img_size=size, patch_size=4, num_classes=classes, embed_dim=6, num_heads=2, depth=1
        )

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        donor, model, same = small(8, 7), small(16, 5), small(8, 7)
    save_file(donor.state_dict(), tmp_path / "vit.safetensors")
    checkpoint = read_checkpoint(tmp_path / "vit.safetensors")
    assert load_pretrained(model, checkpoint) == ("head.weight", "head.bias")

    given, got = donor.get_parameter("pos_embed"), model.get_parameter("pos_embed")
    assert torch.equal(got[:, 0], given[:, 0])  # the class token's has no place in the image
    grid = given[0, 1:].T.reshape(1, 6, 2, 2).detach()
    wanted = functional.interpolate(grid, size=(4, 4), mode="bicubic", antialias=True)
    torch.testing.assert_close(got[0, 1:].detach(), wanted[0].reshape(6, 16).T)
    same_shape = {k: v for k, v in donor.state_dict().items() if v.shape == model.state_dict()[k].shape}
    assert len(same_shape) == len(donor.state_dict()) - 3
    assert not differing(model, {**model.state_dict(), **same_shape})
    assert bool(torch.isfinite(model(torch.rand(2, 3, 16, 16))).all())

    assert load_pretrained(same, checkpoint) == ()
    assert not differing(same, donor.state_dict())
