"""Models by name: sizes, shapes, users' own code, and messages for what cannot be built."""

import json
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import torchvision
from torch import nn

from gm_probe.cli import main
from gm_probe.data.normalization import Normalization
from gm_probe.errors import UsageError
from gm_probe.models.checkpoints import read_checkpoint, save_checkpoint
from gm_probe.models.loading import fitted_model, load_model
from gm_probe.models.zoo import BUILT_IN, ModelSpec, build_model, logits_at, num_parameters

CIFAR = (3, 32, 32)
NEEDS_TIMM = pytest.mark.skipif(find_spec("timm") is None, reason="timm is an extra")


def build(name: str, shape: tuple[int, ...] = CIFAR, classes: int = 10) -> nn.Module:
    return build_model(ModelSpec(name, shape, classes))


def size(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def wrn_parameters(depth: int, widen: int) -> int:
    total, before = 16 * 27, 16
    for stage in (16 * widen, 32 * widen, 64 * widen):
        for _ in range((depth - 4) // 6):
            shortcut = before * stage if before != stage else 0
            total += 9 * before * stage + 9 * stage * stage + shortcut + 2 * (before + stage)
            before = stage
    return total + 2 * before + 10 * before + 10


def vit_parameters(width: int, patch: int, size: int, classes: int, depth: int = 12) -> int:
    """Patches, class token and positions; blocks of 4 W² attention, 8 W² MLP, their biases and norms; head."""
    tokens = (size // patch) ** 2 + 1
    block = 4 * width**2 + 4 * width + 8 * width**2 + 5 * width + 4 * width
    return (3 * patch**2 + 1 + 1 + tokens) * width + depth * block + 2 * width + (width + 1) * classes


def mixer_parameters(width: int, patch: int, size: int, classes: int, blocks: int = 10) -> int:
    tokens, hidden = (size // patch) ** 2, width // 2
    block = 4 * width + 2 * tokens * hidden + hidden + tokens + 8 * width**2 + 5 * width
    return (3 * patch**2 + 1) * width + blocks * block + 2 * width + (width + 1) * classes


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("6cnn", 32 * 27 + 32 * 512 + 64 * 288 + 64 * 1024 + 409_700 + 1_010),
        ("mlp", 3072 * 128 + 128 + 128 * 128 + 128 + 128 * 10 + 10),
        ("mlp-7", 3072 * 7 + 7 + 7 * 10 + 10),
        ("wrn-28-2", 1_467_610),
        ("wrn-16-8", 10_961_370),
        ("wrn-28-10", 36_479_194),
        ("wrn-28-2-authors", 1_855_578),
        ("wrn-16-8-authors", 17_158_106),
        ("wrn-28-10-authors", 46_160_474),
        ("wrn-28-2", wrn_parameters(28, 2)),
        ("wrn-28-8", wrn_parameters(28, 8)),
        ("resnet18-cifar", 11_173_962),
        # torchvision's page gives these for 1,000 classes
        ("resnet18", 11_689_512 - 990 * (512 + 1)),
        ("resnet50", 25_557_032 - 990 * (2048 + 1)),
        ("resnet50-cifar", 25_557_032 - 990 * (2048 + 1) - 64 * 3 * (49 - 9)),
        pytest.param("vit-tiny-4", vit_parameters(192, 4, 32, 10), marks=NEEDS_TIMM),
        pytest.param("vit-micro-4", vit_parameters(64, 4, 32, 10, 6), marks=NEEDS_TIMM),
        pytest.param("mixer-micro-8", mixer_parameters(64, 8, 32, 10, 4), marks=NEEDS_TIMM),
        pytest.param("vit-s-16", vit_parameters(384, 16, 32, 10), marks=NEEDS_TIMM),
        pytest.param("vit-s-32", vit_parameters(384, 32, 32, 10), marks=NEEDS_TIMM),
        pytest.param("mixer-4", mixer_parameters(256, 4, 32, 10), marks=NEEDS_TIMM),
    ],
)
def test_parameter_counts(name: str, parameters: int) -> None:
    with torch.device("meta"):
        assert size(build(name)) == parameters
    assert num_parameters(name) == parameters


@NEEDS_TIMM
def test_vit_s_16_is_the_published_one() -> None:
    """22,050,664 parameters at 224×224 and 1,000 classes, by timm's own page of vit_small_patch16_224."""
    assert vit_parameters(384, 16, 224, 1000) == 22_050_664
    assert num_parameters("vit-s-16", (3, 224, 224), 1000) == 22_050_664


@NEEDS_TIMM
@pytest.mark.parametrize("patch", [16, 32])
def test_published_weights_of_vit_s_fit(patch: int) -> None:
    """The same names and shapes as the network whose weights timm publishes."""
    import timm

    with torch.device("meta"):
        own = build(f"vit-s-{patch}", (3, 224, 224), 1000)
        published = timm.create_model(f"vit_small_patch{patch}_224", pretrained=False)
    shapes = [{name: tuple(v.shape) for name, v in m.state_dict().items()} for m in (own, published)]
    assert shapes[0] == shapes[1]


@NEEDS_TIMM
def test_every_listed_model_is_built_and_listed_with_its_size(capsys: pytest.CaptureFixture[str]) -> None:
    main(["models", "--json"])
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)}
    assert set(BUILT_IN) < set(rows)
    for name in BUILT_IN:
        with torch.device("meta"):
            assert rows[name]["num_parameters"] == size(build(name)), name
    assert rows["timm:NAME"]["num_parameters"] is None


def test_what_needs_timm_says_so_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("timm", "timm.models", "timm.models.vision_transformer", "timm.models.mlp_mixer"):
        monkeypatch.setitem(sys.modules, module, None)
    for name in ("vit-tiny-4", "vit-s-16", "mixer-4", "timm:vit_tiny_patch16_224"):
        with pytest.raises(UsageError) as caught:
            build(name)
        assert str(caught.value) == f"{name} needs timm, which is not installed; pip install 'gm_probe[timm]'"
    assert num_parameters("mixer-4") is None
    assert num_parameters("mlp-7") == 3072 * 7 + 7 + 7 * 10 + 10


@pytest.mark.parametrize(
    ("name", "shape", "classes"),
    [
        ("6cnn", CIFAR, 10),
        ("6cnn", (1, 28, 28), 7),
        ("6cnn", (1, 8, 8), 10),
        ("6cnn", (3, 10, 7), 2),
        ("wrn-10-1", CIFAR, 100),
        ("wrn-16-2-authors", (1, 28, 28), 10),
        ("mlp-5-6", (1, 8, 8), 3),
        ("mlp", (17,), 4),
        ("torchvision:resnet18", (3, 64, 64), 5),
        ("resnet18-cifar", (1, 8, 8), 3),
        ("resnet18", (1, 40, 33), 3),
        pytest.param("vit-tiny-4", (1, 8, 12), 3, marks=NEEDS_TIMM),
        pytest.param("vit-s-16", CIFAR, 5, marks=NEEDS_TIMM),
        pytest.param("vit-s-32", (3, 32, 64), 5, marks=NEEDS_TIMM),
        pytest.param("mixer-4", (1, 12, 8), 7, marks=NEEDS_TIMM),
    ],
)
def test_output_shapes(name: str, shape: tuple[int, ...], classes: int) -> None:
    torch.manual_seed(0)
    model = build(name, shape, classes).eval()
    with torch.no_grad():
        logits = logits_at(model, torch.rand(2, *shape))
    assert logits.shape == (2, classes)
    assert bool(torch.isfinite(logits).all())


def test_wide_resnet_strides_in_the_last_two_stages() -> None:
    torch.manual_seed(0)
    model = build("wrn-10-1").eval()
    sizes = []
    for block in model.get_submodule("blocks"):
        block.register_forward_hook(lambda _module, _input, output: sizes.append(tuple(output.shape[1:])))
    with torch.no_grad():
        model(torch.rand(1, *CIFAR))
    assert sizes == [(16, 32, 32), (32, 16, 16), (64, 8, 8)]


def test_weights_follow_the_seed() -> None:
    torch.manual_seed(3)
    first = build("6cnn", (1, 8, 8))
    torch.manual_seed(3)
    again = build("6cnn", (1, 8, 8))
    for one, other in zip(first.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(
    ("name", "shape", "reason"),
    [
        ("6cn", CIFAR, "no model '6cn'; did you mean '6cnn'?"),
        ("wrn-28-2x", CIFAR, "did you mean 'wrn-28-2'?"),
        ("transformer", CIFAR, "`gmprobe models` lists them"),
        ("wrn-27-2", CIFAR, "depth must be 6n + 4"),
        ("wrn-4-2", CIFAR, "depth must be 6n + 4"),
        ("wrn-28-0", CIFAR, "wrn-28-0"),
        ("mlp-0", CIFAR, "every width must lie in [1, 1,000,000,000]"),
        (f"mlp-{10**30}", CIFAR, "every width must lie in"),
        (f"wrn-28-{10**30}", CIFAR, "the width at most 1,000,000,000"),
        ("6cnn", (64,), "takes images (C, H, W), not examples of shape (64,)"),
        ("wrn-28-2", (28, 28), "takes images (C, H, W), not examples of shape (28, 28)"),
        ("resnet18-cifa", CIFAR, "did you mean 'resnet18-cifar'?"),
        ("resnet-18", CIFAR, "did you mean 'resnet18'?"),
        ("resnet-34-cifar", CIFAR, "did you mean 'resnet34-cifar'?"),
        ("resnet-50", CIFAR, "did you mean 'resnet50'?"),
        ("resnet-18-cifar", CIFAR, "did you mean 'resnet18-cifar'?"),
        ("vit-ti-4", CIFAR, "did you mean 'vit-tiny-4'?"),
        ("vit-s16", CIFAR, "did you mean 'vit-s-16'?"),
        ("mixer", CIFAR, "did you mean 'mixer-4'?"),
        ("wrn28-8", CIFAR, "did you mean 'wrn-28-8'?"),
        ("resnet50", (64,), "takes images (C, H, W), not examples of shape (64,)"),
        ("mixer-4", (28, 28), "takes images (C, H, W), not examples of shape (28, 28)"),
        ("vit-tiny-4", (3, 32, 30), "patches of 4×4 pixels, and 30×32 is not a multiple of that"),
        ("mixer-0", CIFAR, "patches of 0×0 pixels"),
        ("6cnn", (1, 3, 8), "at least 4×4 pixels, not 8×3"),
        ("torchvision:resnet81", CIFAR, "resnet18"),
        ("torchvision:fcn_resnet50", CIFAR, "no classifier 'fcn_resnet50'"),
        (
            "torchvision:resnet18",
            (1, 28, 28),
            "takes RGB images (3, H, W), not examples of shape (1, 28, 28)",
        ),
    ],
)
def test_names_that_cannot_be_built(name: str, shape: tuple[int, ...], reason: str) -> None:
    with pytest.raises(UsageError) as caught:
        build(name, shape)
    assert reason in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["timm:hf-hub:evil/repo", "timm:local-dir:/tmp/x"])
def test_of_timm_no_hub_is_asked(name: str) -> None:
    with pytest.raises(UsageError, match=f"no model '{name}'; timm's own models are given as timm:NAME"):
        build(name)
    with pytest.raises(UsageError, match="torchvision:os:getcwd cannot be built"):
        build("torchvision:os:getcwd")


def test_timm_missing_or_unknown() -> None:
    with pytest.raises(UsageError, match=r"pip install 'gm_probe\[timm\]'|timm has no classifier"):
        build("timm:no_such_network")


# ---- users' own code

SOURCE = """
from __future__ import annotations
from dataclasses import dataclass
import warnings
import helper_of_user
import torch
from torch import nn

@dataclass
class Options:
    width: int = 4

def build():
    return nn.Linear(helper_of_user.INPUTS, Options().width)

def breaks():
    raise ValueError("no\\nluck")

def leaves():
    raise SystemExit(5)

def returns_class():
    return nn.Linear

def lazy():
    return nn.LazyLinear(3)

def traced():
    with warnings.catch_warnings(action="ignore"):
        return torch.jit.trace(nn.Linear(2, 2), torch.ones(1, 2))

number = 3
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with ``my net.py``, ``my_net_module.py`` and what they import, forgotten afterwards."""
    folder = tmp_path / "user ü"
    folder.mkdir()
    (folder / "helper_of_user.py").write_text("INPUTS = 3\n")
    for name in ("my net.py", "my_net_module.py"):
        (folder / name).write_text(SOURCE)
    for name in ("helper_of_user", "my_net_module"):
        monkeypatch.setitem(sys.modules, name, None)
        monkeypatch.delitem(sys.modules, name)
    return folder


def test_callable_of_a_file(folder: Path) -> None:
    before = list(sys.path)
    model = build(f"{folder / 'my net.py'}:build", (3,))
    assert isinstance(model, nn.Linear)
    assert (model.in_features, model.out_features) == (3, 4)
    assert sys.path == before


def test_a_file_named_like_an_installed_module_replaces_nothing(folder: Path) -> None:
    (folder / "torch.py").write_text("from torch import nn\ndef build():\n    return nn.Linear(1, 2)\n")
    assert isinstance(build(f"{folder / 'torch.py'}:build"), nn.Linear)
    assert sys.modules["torch"] is torch


def test_callable_of_a_module_in_the_working_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry not in ("", ".")])
    assert isinstance(build("my_net_module:build"), nn.Linear)
    assert str(folder) not in sys.path


def test_callable_of_an_installed_module() -> None:
    assert isinstance(build("torch.nn:Identity"), nn.Identity)


@pytest.mark.parametrize(
    ("attribute", "reason"),
    [
        ("breaks", "ValueError: no"),
        ("leaves", "SystemExit: 5"),
        ("returns_class", "the model is a type, not an nn.Module"),
        ("number", "TypeError"),
        ("absent", "has no attribute 'absent'"),
        ("lazy", "parameter 'weight' is lazy and has no shape yet"),
        ("traced", "the model is scripted or traced"),
    ],
)
def test_user_code_that_fails_is_named(folder: Path, attribute: str, reason: str) -> None:
    name = f"{folder / 'my net.py'}:{attribute}"
    with pytest.raises(UsageError) as caught:
        build(name)
    assert f"--model {name}" in str(caught.value)
    assert reason in str(caught.value)
    assert "\n" not in str(caught.value)


def test_user_code_that_is_not_there(folder: Path) -> None:
    with pytest.raises(UsageError, match="there is no file"):
        build(f"{folder / 'gone.py'}:build")
    with pytest.raises(UsageError, match="No module named 'no_such_package'"):
        build("no_such_package.models:build")
    (folder / "torn.py").write_text("def build(:\n")
    with pytest.raises(UsageError, match="SyntaxError"):
        build(f"{folder / 'torn.py'}:build")


@pytest.mark.parametrize(
    ("name", "is_user_code"),
    [
        ("6cnn", False),
        ("wrn-28-2", False),
        ("torchvision:resnet18", False),
        ("timm:vit_tiny_patch16_224", False),
        ("timm:hf-hub:evil/repo", False),
        ("os:getcwd", True),
        ("package.module:build", True),
        ("path/file.py:build", True),
        ("C:\\path\\file.py:build", True),
        ("torchvision:os:getcwd", False),
        (":build", True),
    ],
)
def test_what_counts_as_user_code(name: str, is_user_code: bool) -> None:
    assert ModelSpec(name, CIFAR, 10).is_user_code is is_user_code


# ---- specs and outputs


def test_spec_round_trip() -> None:
    spec = ModelSpec("6cnn", CIFAR, 10)
    assert ModelSpec.from_dict(spec.as_dict()) == spec
    for broken in (
        {"num_classes": 0},
        {"input_shape": [3, -1]},
        {"num_classes": 2**70},
        {"input_shape": [1, 2**40, 2**40]},
        {"input_shape": ["x"]},
        {"input_shape": 3},
        {"input_shape": "388"},
        {"input_shape": [1] * 1000},
        {"num_classes": -1},
        {"num_classes": 3.7},
        {"num_classes": "3"},
    ):
        with pytest.raises((TypeError, ValueError, UsageError), match=r"."):
            ModelSpec.from_dict({**spec.as_dict(), **broken})


# ---- keywords of others' builders


@NEEDS_TIMM
def test_keywords_reach_the_builder() -> None:
    wide = build("torchvision:vgg11,dropout=0.25", classes=3)
    assert {module.p for module in wide.modules() if isinstance(module, nn.Dropout)} == {0.25}
    with torch.device("meta"):
        assert build("torchvision:googlenet,transform_input=true,aux_logits=true").aux_logits
    model = build("timm:resnet10t,drop_rate=0.25,global_pool=max", classes=3)
    assert model.drop_rate == 0.25
    assert model.global_pool.pool_type == "max"


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("torchvision:resnet18,nonsense=1", "cannot be built with nonsense: .*unexpected keyword"),
        pytest.param("timm:resnet10t,nonsense=1", "cannot be built with nonsense", marks=NEEDS_TIMM),
        ("torchvision:resnet18,weights=DEFAULT", "weights cannot be passed"),
        ("timm:resnet10t,pretrained=true", "pretrained cannot be passed"),
        ("timm:resnet10t,checkpoint_path=a", "checkpoint_path cannot be passed"),
        ("timm:resnet10t,num_classes=3", "num_classes cannot be passed"),
        ("timm:resnet10t,drop_rate", "'drop_rate' is not KEYWORD=VALUE"),
        ("timm:resnet10t,drop_rate=0,drop_rate=1", "or is given twice"),
        ("timm:vit_tiny_patch16_224,depth=100000", r"must lie in \[-4,096, 4,096\]"),
        ("timm:resnet10t,drop_rate=nan", "must lie in"),
        ("timm:resnet10t,drop_rate=../a", "true, false, a number or a word"),
        ("torchvision:resnet0,a=1", "torchvision has no classifier 'resnet0'"),
        ("torchvision:resnet18,x=" + "1" * 1000, "a name as long"),
        ("hf", r"config\.json beside a Hugging Face checkpoint"),
    ],
)
def test_keywords_that_cannot_be_passed(name: str, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        build(name)


@pytest.mark.parametrize(("name", "pixels"), [("googlenet", 32), ("inception_v3", 75)])
def test_inputs_that_a_network_changes_are_asked_for(tmp_path: Path, name: str, pixels: int) -> None:
    """The oracle is the network that was saved; a state dict does not say how it changes its inputs."""
    torch.manual_seed(0)
    make = getattr(torchvision.models, name)
    theirs = make(num_classes=3, init_weights=False, transform_input=True).eval()
    x, path, shape = torch.rand(2, 3, pixels, pixels), tmp_path / "a.pt", (3, pixels, pixels)
    torch.save(theirs.state_dict(), path)
    checkpoint = read_checkpoint(path)
    with pytest.raises(UsageError, match=f"Pass torchvision:{name},transform_input=true"):
        load_model(checkpoint, f"torchvision:{name}", input_shape=shape)
    model, fit = fitted_model(checkpoint, f"torchvision:{name},transform_input=true", input_shape=shape)
    assert {head.partition(".")[0] for head in fit.left_out} in ({"aux1", "aux2"}, {"AuxLogits"})
    with torch.no_grad():
        assert torch.equal(model.eval()(x), theirs(x))
    other = load_model(checkpoint, f"torchvision:{name},transform_input=false", input_shape=shape)
    assert not other.transform_input
    spec = ModelSpec(f"torchvision:{name},transform_input=true", shape, 3)
    save_checkpoint(path, model, spec, Normalization())  # which records it
    for given in (None, f"torchvision:{name}"):
        assert load_model(read_checkpoint(path), given).transform_input
