"""Folders of Hugging Face's: the same logits as transformers' own loading, no code, no network, every misfit named."""

import json
import re
import socket
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import nn

from gm_probe.cli import main
from gm_probe.errors import CheckpointError, UsageError
from gm_probe.models import huggingface
from gm_probe.models.checkpoints import read_checkpoint
from gm_probe.models.loading import fitted_model, load_model

transformers = pytest.importorskip("transformers", reason="transformers is an extra")
SMALL = {
    "hidden_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "num_labels": 3,
}
IMAGES = torch.linspace(-1, 1, 2 * 3 * 8 * 8).reshape(2, 3, 8, 8)
TOKENS = torch.arange(1, 13).reshape(2, 6)


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("asked the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def vit() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.ViTConfig(image_size=8, patch_size=4, **SMALL)
    return transformers.ViTForImageClassification(config).eval()


def bert() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.BertConfig(vocab_size=20, max_position_embeddings=8, **SMALL)
    return transformers.BertForSequenceClassification(config).eval()


def saved(model: Any, folder: Path, **options: Any) -> Path:
    transformers.logging.disable_progress_bar()
    model.save_pretrained(folder, **options)
    return folder


def changed(folder: Path, **settings: Any) -> Path:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))
    return folder


def refused(folder: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        load_model(read_checkpoint(folder), "hf")
    assert str(folder) in str(caught.value)
    assert str(caught.value).isprintable()
    return str(caught.value)


@pytest.mark.parametrize(("make", "x"), [(vit, IMAGES), (bert, TOKENS)], ids=["vit", "bert"])
@pytest.mark.parametrize("size", ["5GB", "3KB"], ids=["one file", "shards"])
def test_logits_are_those_of_the_saved_network(tmp_path: Path, make: Any, x: torch.Tensor, size: str) -> None:
    """The oracle is the network itself, before it is saved; its attention is fused, ours is eager."""
    model = make()
    folder = saved(model, tmp_path / "a", max_shard_size=size)
    assert (len(list(folder.glob("*.safetensors"))) > 1) == (size == "3KB")
    with torch.no_grad():
        expected = model(x).logits
        found = load_model(read_checkpoint(folder), "hf", dtype=torch.float64).eval()
        assert found.config._attn_implementation == "eager"
        logits = found(x.double() if x.is_floating_point() else x).logits
    torch.testing.assert_close(logits.float(), expected, rtol=1e-5, atol=1e-6)


def test_a_torch_file_in_the_folder_and_the_file_alone(tmp_path: Path) -> None:
    folder = saved(vit(), tmp_path / "a")
    state = read_checkpoint(folder).state
    assert torch.equal(
        load_model(read_checkpoint(folder / "model.safetensors"), "hf").classifier.weight,
        state["classifier.weight"],
    )
    (folder / "model.safetensors").unlink()
    torch.save(state, folder / "pytorch_model.bin")
    assert torch.equal(
        load_model(read_checkpoint(folder), "hf").classifier.weight, state["classifier.weight"]
    )


def test_it_is_measured_by_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    saved(vit(), Path("net"))
    np.savez("x.npz", x=IMAGES.numpy())
    command = (
        "measure net --unlabeled x.npz --no-normalize --measures mean_confidence,hessian_lambda_max --json -q"
    )
    main([*command.split(), "--model", "hf"])
    [result] = json.loads(capsys.readouterr().out)
    with torch.no_grad():
        expected = torch.softmax(vit()(IMAGES).logits.double(), 1).amax(1).mean()
    assert result["measures"]["mean_confidence"]["value"] == pytest.approx(float(expected), rel=1e-5)
    assert result["measures"]["hessian_lambda_max"]["value"] is not None
    with pytest.raises(SystemExit) as stop:
        main(command.split())
    assert stop.value.code == 2
    assert "Add --model hf" in capsys.readouterr().err


def test_no_code_of_a_folder_runs(tmp_path: Path) -> None:
    """With a network of transformers' the code is passed over; without one the folder is refused by name."""
    folder = saved(vit(), tmp_path / "a")
    canary = tmp_path / "canary"
    (folder / "evil.py").write_text(f"open({str(canary)!r}, 'w')\n")
    names = {"AutoConfig": "evil.Config", "AutoModelForImageClassification": "evil.Net"}
    load_model(read_checkpoint(changed(folder, auto_map=names)), "hf")
    message = refused(changed(folder, model_type="evil"))
    assert "contains its own code, which is never run" in message
    assert "evil" in message
    for kernels in ("kernels-community/flash-attn", "evil"):
        changed(folder, model_type="vit", attn_implementation=kernels, _attn_implementation=kernels)
        load_model(read_checkpoint(folder), "hf")
    for of_torch in ("hub", "nobodys"):
        load_model(read_checkpoint(changed(folder, dtype=of_torch, torch_dtype=of_torch)), "hf")
    assert not canary.exists()


@pytest.mark.parametrize("source", ["hf-hub:somebody/net", "local-dir:/elsewhere"])
def test_a_network_outside_the_folder_is_refused(tmp_path: Path, source: str) -> None:
    message = refused(changed(saved(vit(), tmp_path / "a"), architecture=source))
    assert re.search(rf"takes its network from {source}, outside its folder", message), message


def test_a_path_in_a_config_is_not_read(tmp_path: Path) -> None:
    pytest.importorskip("timm")
    from transformers import TimmWrapperConfig, TimmWrapperForImageClassification

    config = TimmWrapperConfig(architecture="resnet10t", num_labels=3, model_args={"in_chans": 1})
    folder = saved(TimmWrapperForImageClassification(config), tmp_path / "a")
    elsewhere = {"in_chans": 1, "checkpoint_path": str(tmp_path / "absent.pth")}
    load_model(read_checkpoint(changed(folder, model_args=elsewhere)), "hf")


def test_the_hubs_flag_is_left_as_it_was(tmp_path: Path) -> None:
    from huggingface_hub import constants

    folder, before = saved(vit(), tmp_path / "a"), constants.HF_HUB_OFFLINE
    load_model(read_checkpoint(folder), "hf")
    assert constants.HF_HUB_OFFLINE is before


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (
            {"architectures": ["ViTModel"]},
            "describes ViTModel. Only classifiers of images or sequences can be built",
        ),
        ({"architectures": None}, "describes None"),
        ({"architectures": ["os.ForImageClassification"]}, "Only classifiers"),
        ({"architectures": ["NobodysForImageClassification"]}, "which transformers .* does not have"),
        ({"quantization_config": {"bits": 4}}, "a quantized network"),
        ({"num_hidden_layers": 10**9}, "asks for num_hidden_layers = 1000000000"),
        ({"vision": [{"depth": 10**9}]}, "asks for depth = 1000000000"),
        ({"num_labels": 10**9}, "asks for num_labels"),
        ({"hidden_size": 2**20, "intermediate_size": 2**20}, "describes 1[0-9,]* parameters"),
        ({"hidden_size": "x"}, "transformers cannot build the network"),
        ({"hidden_size": 16}, "of a different shape"),
        ({"num_hidden_layers": 3}, "16 missing"),
        ({"num_hidden_layers": 1}, "16 unexpected"),
    ],
)
def test_what_does_not_fit_is_named(tmp_path: Path, settings: dict[str, Any], said: str) -> None:
    folder = changed(saved(vit(), tmp_path / "a"), **settings)
    message = refused(folder)
    assert re.search(said, message), message


def test_a_head_of_another_task_is_left_out_and_said(tmp_path: Path) -> None:
    folder = saved(bert(), tmp_path / "a")
    state = {**read_checkpoint(folder).state, "cls.seq_relationship.weight": torch.ones(2, 8)}
    safetensors.torch.save_file(state, folder / "model.safetensors", {"format": "pt"})
    _, fit = fitted_model(read_checkpoint(folder), "hf")
    assert fit.left_out == ("cls.seq_relationship.weight",)
    assert "1 tensor(s) are left out, because the network does not have them" in fit.notes(folder)[0]


def test_broken_folders_are_named(tmp_path: Path) -> None:
    folder = saved(vit(), tmp_path / "a")
    for text in ("", "[]", "[" * 10**5):
        (folder / "config.json").write_text(text)
        refused(folder)
    (folder / "config.json").write_bytes(b" " * (huggingface.LONGEST + 1))
    assert "networks need less" in refused(folder)
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").rename(folder / "b.safetensors")
    with pytest.raises(CheckpointError, match=r"has config\.json but no model\.safetensors"):
        read_checkpoint(folder)
    for shards in ({}, {"w": "../b.safetensors"}, {"w": "/etc/passwd"}, {"w": 3}, {"w": "gone.safetensors"}):
        (folder / huggingface.INDEX).write_text(json.dumps({"weight_map": shards}))
        with pytest.raises(CheckpointError):
            read_checkpoint(folder)
    (folder / huggingface.INDEX).unlink()
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="a PEFT adapter"):
        read_checkpoint(folder)


def test_without_transformers_it_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = saved(vit(), tmp_path / "a")
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(UsageError, match=r"pip install 'gm_probe\[hf\]'"):
        load_model(read_checkpoint(folder), "hf")


def test_the_name_alone_builds_nothing(tmp_path: Path) -> None:
    torch.save({"w": torch.ones(2, 2)}, tmp_path / "a.pt")
    with pytest.raises(UsageError, match=r"needs config\.json beside the weights"):
        load_model(read_checkpoint(tmp_path / "a.pt"), "hf")
