"""Build a model from its name: built-in, torchvision, timm, or anybody's own callable."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import re
import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from gm_probe.core.errors import UsageError, did_you_mean
from gm_probe.core.networks import WideResNet, cnn6, mlp

MODELS = {
    "6cnn": "four convolutions and two linear layers, the paper's small network",
    "mlp": "fully connected, two hidden layers of 128; mlp-W1-W2-... sets the widths",
    "wrn-D-K": "Wide ResNet of depth D and width K, e.g. wrn-28-2, wrn-16-8",
    "wrn-D-K-authors": "the same with one more block a stage, as in the paper's published code",
    "torchvision:NAME": "any classifier of torchvision, e.g. torchvision:resnet18",
    "timm:NAME": "any classifier of timm (pip install 'gm_probe[timm]')",
    "package.module:callable": "your own function without arguments that returns an nn.Module",
    "path/file.py:callable": "likewise, from a file",
}
"""What --model takes."""


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """Enough to build a model again; stored in every checkpoint that gm_probe writes.

    ``input_shape`` is (C, H, W), or the shape of one example.
    """

    name: str
    input_shape: tuple[int, ...]
    num_classes: int

    @property
    def is_user_code(self) -> bool:
        """Whether the name points to code outside gm_probe, torchvision and timm."""
        prefix, separator, _ = self.name.rpartition(":")
        return bool(separator) and prefix not in {"torchvision", "timm"}

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "input_shape": list(self.input_shape)}

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> ModelSpec:
        """Raises KeyError, TypeError, ValueError or OverflowError on a broken record."""
        spec = cls(str(value["name"]), tuple(int(n) for n in value["input_shape"]), int(value["num_classes"]))
        if min(spec.num_classes, *spec.input_shape) < 1:
            raise ValueError(
                f"input_shape {spec.input_shape} and num_classes {spec.num_classes} must be positive"
            )
        return spec


def initial_model(spec: ModelSpec, seed: int) -> nn.Module:
    """``spec`` with the weights that a run of this seed starts from; the global generator is left alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build_model(spec)


def build_model(spec: ModelSpec) -> nn.Module:
    """Build ``spec`` with fresh weights from torch's global generator.

    Raises:
        UsageError: no such model, or it does not take this input.
    """
    name, shape = spec.name, spec.input_shape
    if spec.is_user_code:
        return _user_model(name)
    if name.startswith("torchvision:"):
        return _torchvision_model(name.removeprefix("torchvision:"), spec)
    if name.startswith("timm:"):
        return _timm_model(name.removeprefix("timm:"), spec)
    if name == "mlp" or re.fullmatch(r"mlp(-\d+)+", name):
        widths = tuple(int(width) for width in name.split("-")[1:]) or (128, 128)
        if 0 in widths:
            raise UsageError(f"{name}: every width must be at least 1")
        inputs = 1
        for size in shape:
            inputs *= size
        return mlp(inputs, widths, spec.num_classes)
    if len(shape) != 3 and (name == "6cnn" or name.startswith("wrn-")):
        raise UsageError(f"{name} takes images (C, H, W), not examples of shape {shape}; use mlp or your own")
    if name == "6cnn":
        channels, height, width = shape
        if min(height, width) < 4:
            raise UsageError(f"6cnn takes images of at least 4×4 pixels, not {width}×{height}")
        return cnn6(channels, height, width, spec.num_classes)
    if match := re.fullmatch(r"wrn-(\d+)-(\d+)(-authors)?", name):
        depth, widen = int(match[1]), int(match[2])
        if depth < 10 or (depth - 4) % 6 or widen < 1:
            raise UsageError(f"{name}: the depth must be 6n + 4 with n ≥ 1 (10, 16, 22, 28, ...)")
        return WideResNet(shape[0], spec.num_classes, (depth - 4) // 6 + bool(match[3]), widen)
    known = ["6cnn", "mlp", "wrn-28-2", "wrn-16-8", "wrn-28-10"]
    raise UsageError(f"no model {name!r}; {did_you_mean(name, known, '`gmprobe models` lists them')}")


def _torchvision_model(name: str, spec: ModelSpec) -> nn.Module:
    # imported here: torchvision takes a second or two, and only its own models need it
    import torchvision

    available = torchvision.models.list_models(module=torchvision.models)
    if name not in available:
        close = difflib.get_close_matches(name, available, n=3)
        raise UsageError(f"torchvision has no classifier {name!r}; nearest: {', '.join(close) or 'none'}")
    if len(spec.input_shape) != 3 or spec.input_shape[0] != 3:
        raise UsageError(
            f"torchvision:{name} takes RGB images (3, H, W), not examples of shape {spec.input_shape}"
        )
    return torchvision.models.get_model(name, weights=None, num_classes=spec.num_classes)


def _timm_model(name: str, spec: ModelSpec) -> nn.Module:
    try:
        import timm
    except ImportError as error:
        raise UsageError("timm is not installed; pip install 'gm_probe[timm]'") from error
    if not timm.is_model(name):
        close = difflib.get_close_matches(name, timm.list_models(), n=3)
        raise UsageError(f"timm has no model {name!r}; nearest: {', '.join(close) or 'none'}")
    options: dict[str, Any] = {"num_classes": spec.num_classes, "in_chans": spec.input_shape[0]}
    try:
        return timm.create_model(name, pretrained=False, img_size=spec.input_shape[-1], **options)
    except TypeError:  # convolutional networks take any size and know no img_size
        return timm.create_model(name, pretrained=False, **options)


def _user_model(name: str) -> nn.Module:
    location, _, attribute = name.rpartition(":")
    file = Path(location) if location.endswith(".py") else None
    if file is not None and not file.is_file():
        raise UsageError(f"--model {name}: there is no file {location}")
    # as `python file.py` and `python -m module` do: code finds what lies beside it
    folder = str(Path.cwd() if file is None else file.resolve().parent)
    sys.path.insert(0, folder)
    try:
        module = importlib.import_module(location) if file is None else _module_of(file)
        model = getattr(module, attribute)()
    except (Exception, SystemExit) as error:  # whatever a user's own code raises
        reason = " ".join(str(error).split())
        raise UsageError(f"--model {name}: {type(error).__name__}: {reason}") from error
    finally:
        with suppress(ValueError):  # it may have cleared the path itself
            sys.path.remove(folder)
    if not isinstance(model, nn.Module):
        raise UsageError(f"--model {name} returned {type(model).__name__}, not an nn.Module")
    return model


def _module_of(file: Path) -> ModuleType:
    """Run ``file`` as a module of its own, even where an installed one bears its name."""
    name = f"gm_probe_user_{file.stem}"
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up there
    spec.loader.exec_module(module)
    return module


def logits_of(output: Any) -> Tensor:
    """The (B, C) logits in a model's output: a tensor, ``.logits``, ``['logits']`` or a tuple's first.

    Raises:
        UsageError: nothing of that kind is there.
    """
    if hasattr(output, "logits"):
        output = output.logits
    elif isinstance(output, Mapping) and "logits" in output:
        output = output["logits"]
    elif isinstance(output, (tuple, list)) and output:
        output = output[0]
    if not isinstance(output, Tensor) or output.dim() != 2:
        kind = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise UsageError(f"the model returned {kind}, not logits of shape (B, C); wrap it to return them")
    return output
