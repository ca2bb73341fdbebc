"""Build a model from its name: built-in, torchvision, timm, or anybody's own callable."""

from __future__ import annotations

import importlib
import importlib.util
import math
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from gm_probe.checks import real, whole
from gm_probe.data.fields import Inputs, arguments
from gm_probe.errors import NotInstalledError, UsageError, foreign_or, needs, out_of_memory, start_of
from gm_probe.models import huggingface
from gm_probe.models.contrastive import Contrastive, as_encoder, projector
from gm_probe.models.door import Outputs, unwrapped
from gm_probe.models.names import BUILT_IN, FAMILIES, LONGEST, is_user_code, no_model, require_model_name
from gm_probe.models.networks import WideResNet, cnn6, mlp, resnet
from gm_probe.runtime.randomness import generators_kept

MODELS = {
    **BUILT_IN,
    "torchvision:NAME": "any classifier of torchvision, e.g. torchvision:resnet18; NAME,KEYWORD=VALUE passes keywords",
    "timm:NAME": "any classifier of timm (pip install 'gm_probe[timm]'); NAME,KEYWORD=VALUE passes keywords",
    "hf": "what a Hugging Face folder's config.json describes (pip install 'gm_probe[hf]')",
    "package.module:callable": "your own function without arguments that returns an nn.Module",
    "path/file.py:callable": "the same, from a file",
}
"""What --model takes."""
INPUTS_CHANGED = frozenset(("googlenet", "inception_v3"))
"""Networks of torchvision that may change their inputs' normalisation, which no state dict says."""
_NO_KEYWORDS = re.compile(
    r"weight|pretrain|checkpoint|path|dir|file|url|hub|cfg|cache|progress|num_classes|in_chans"
)
"""What keywords of a builder are called that read files, download, or are given in another way."""
_MOST = 4096
"""The largest number of a keyword: a depth, for instance, takes time whatever the weights."""
WIDEST = 10**9
"""The largest width: more fits into no memory, and still more exceeds torch's integers."""

DIMENSIONS = 10
"""The most dimensions of an example, plus one."""


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """Enough to build a model again; stored in every checkpoint that gm_probe writes.

    Attributes:
        input_shape: (C, H, W), or the shape of one example.
        num_classes: outputs; of a SimCLR model, its projector's.
        temperature: of NT-Xent, which makes it a SimCLR model: the network ``name`` without its last linear layer,
            and a projector (models.contrastive). None = a classifier.
    """

    name: str
    input_shape: tuple[int, ...]
    num_classes: int
    temperature: float | None = None

    @property
    def is_user_code(self) -> bool:
        """See ``is_user_code``."""
        return is_user_code(self.name)

    def as_dict(self) -> dict[str, Any]:
        """Return the spec as a JSON object."""
        fields = {**asdict(self), "input_shape": list(self.input_shape)}
        if self.temperature is None:
            del fields["temperature"]
        return fields

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> ModelSpec:
        """Raises KeyError, TypeError, ValueError, OverflowError or UsageError on a broken record."""
        name, shape, temperature = str(value["name"]), value["input_shape"], value.get("temperature")
        if len(name) > LONGEST:
            raise ValueError(f"a model name of {len(name):,} characters")
        if not isinstance(shape, list) or not len(shape) < DIMENSIONS:
            raise ValueError(f"input_shape is not a list of fewer than {DIMENSIONS} sizes")
        sizes = [whole("input_shape", size, 1, WIDEST) for size in shape]
        whole("the product of input_shape", math.prod(sizes), 1, WIDEST)
        classes = whole("num_classes", value["num_classes"], 1, WIDEST)
        if temperature is not None:
            temperature = real("temperature", temperature, above=0)
        return cls(name, tuple(sizes), classes, temperature)


def initial_model(spec: ModelSpec, seed: int) -> nn.Module:
    """Return ``spec`` with the weights that a run of this seed starts from; the global generator is left alone."""
    with generators_kept():
        torch.manual_seed(seed)
        return build_model(spec)


def build_model(spec: ModelSpec) -> nn.Module:
    """Build ``spec`` with fresh weights from torch's global generator.

    Raises:
        UsageError: no such model, a size that is no whole number above 0, or it does not take this input.
    """
    if not spec.is_user_code or spec.temperature is not None:  # a user's own code decides itself
        whole("num_classes", spec.num_classes)
    for size in spec.input_shape:
        whole("input_shape", size)
    if spec.temperature is not None:
        encoder, features = as_encoder(build_model(replace(spec, temperature=None)))
        return Contrastive(encoder, projector(features, spec.num_classes), temperature=spec.temperature)
    return builder(spec.name)(spec)


def builder(name: str) -> Callable[[ModelSpec], nn.Module]:
    """Return what builds the model ``name``; until it is called nothing is built, and no code of the user's runs.

    Raises:
        UsageError: no such model.
    """
    if is_user_code(name):
        return _user_model(name)
    require_model_name(name)
    if name.startswith("torchvision:"):
        return _torchvision_model(*_with_keywords(name))
    if name.startswith("timm:"):
        return _timm_model(*_with_keywords(name))
    if name == huggingface.NAME:
        raise UsageError(
            f"--model {name} builds what config.json beside a Hugging Face checkpoint describes, but there "
            "is no such checkpoint here"
        )
    for pattern, build in _FAMILIES.items():
        if match := re.fullmatch(pattern, name):
            return partial(build, match)
    raise no_model(name)


def check_configured(name: str) -> None:
    """Raise UsageError where the weights of others leave open what the network ``name`` does to its inputs."""
    source, _, rest = name.partition(":")
    network, keywords = _with_keywords(name) if source == "torchvision" else (rest, {})
    if source == "torchvision" and network in INPUTS_CHANGED and "transform_input" not in keywords:
        raise UsageError(
            f"{name} has a setting that no checkpoint records. Pass {name},transform_input=true for "
            "torchvision's own weights and others trained with it, or =false"
        )


def _with_keywords(name: str) -> tuple[str, dict[str, Any]]:
    """Return the network in 'torchvision:NAME,KEYWORD=VALUE,...', and the keywords for its builder.

    Raises:
        UsageError: a keyword that is none, is given twice, or may not be passed.
    """
    network, *given = name.partition(":")[2].split(",")
    keywords: dict[str, Any] = {}
    for one in given:
        key, separator, text = one.partition("=")
        if not separator or not key.isidentifier() or key in keywords:
            raise UsageError(
                f"{name}: {one!r} is not KEYWORD=VALUE, or is given twice. Example: {network},drop_rate=0.1"
            )
        if _NO_KEYWORDS.search(key):
            raise UsageError(f"{name}: {key} cannot be passed to the builder; leave it out")
        keywords[key] = _value(name, one, text)
    return network, keywords


def _value(name: str, one: str, text: str) -> Any:
    """Return ``text`` as a truth value, a number or a word."""
    if text.lower() in {"true", "false"}:
        return text.lower() == "true"
    for kind in (int, float):
        with suppress(ValueError):
            number = kind(text)
            if not abs(number) <= _MOST:
                raise UsageError(f"{name}: {one} must lie in [-{_MOST:,}, {_MOST:,}]")
            return number
    if re.fullmatch(r"\w+", text):
        return text
    raise UsageError(f"{name}: {one} must be true, false, a number or a word")


def num_parameters(
    name: str, input_shape: tuple[int, ...] = (3, 32, 32), num_classes: int = 10
) -> int | None:
    """Return the size of a built-in model without allocating it; None where its library is not installed."""
    try:
        with torch.device("meta"):
            model = build_model(ModelSpec(name, input_shape, num_classes))
    except NotInstalledError:
        return None
    return sum(p.numel() for p in model.parameters())


def _image_shape(spec: ModelSpec) -> tuple[int, int, int]:
    if len(spec.input_shape) != 3:
        raise UsageError(
            f"{spec.name} takes images (C, H, W), not examples of shape {spec.input_shape}; use mlp or your own"
        )
    channels, height, width = spec.input_shape
    return channels, height, width


def _cnn6(_: re.Match[str], spec: ModelSpec) -> nn.Module:
    channels, height, width = _image_shape(spec)
    if min(height, width) < 4:
        raise UsageError(f"6cnn takes images of at least 4×4 pixels, not {width}×{height}")
    return cnn6(channels, height, width, spec.num_classes)


def _mlp(match: re.Match[str], spec: ModelSpec) -> nn.Module:
    widths = tuple(int(width) for width in match[1].split("-")[1:]) or (128, 128)
    if not all(1 <= width <= WIDEST for width in widths):
        raise UsageError(f"{spec.name}: every width must lie in [1, {WIDEST:,}]")
    return mlp(math.prod(spec.input_shape), widths, spec.num_classes)


def _wide_resnet(match: re.Match[str], spec: ModelSpec) -> nn.Module:
    channels, _, _ = _image_shape(spec)
    depth, widen = int(match[1]), int(match[2])
    if not 10 <= depth <= 1000 or (depth - 4) % 6 or not 1 <= widen <= WIDEST:
        raise UsageError(
            f"{spec.name}: the depth must be 6n + 4 ≤ 1,000 with n ≥ 1 (10, 16, 22, 28, ...), and the width at most "
            f"{WIDEST:,}"
        )
    return WideResNet(channels, spec.num_classes, (depth - 4) // 6 + bool(match[3]), widen)


def _resnet(match: re.Match[str], spec: ModelSpec) -> nn.Module:
    channels, _, _ = _image_shape(spec)
    return resnet(int(match[1]), channels, spec.num_classes, cifar_stem=bool(match[2]))


def _vit(match: re.Match[str], spec: ModelSpec) -> nn.Module:
    """Build timm's ViT (Dosovitskiy et al. 2021): class token, learned positions, MLP of 4 times the width."""
    width, heads, depth = {"micro": (64, 4, 6), "tiny": (192, 3, 12), "s": (384, 6, 12)}[match[1]]
    sizes = {"embed_dim": width, "num_heads": heads, "depth": depth}
    return _patched("vision_transformer", "VisionTransformer", spec, int(match[2]), **sizes)


def _mixer(match: re.Match[str], spec: ModelSpec) -> nn.Module:
    """Build timm's MLP-Mixer (Tolstikhin et al. 2021): token MLPs of half, channel MLPs of 4 times the width."""
    width, blocks = (64, 4) if match[1] else (256, 10)
    return _patched("mlp_mixer", "MlpMixer", spec, int(match[2]), embed_dim=width, num_blocks=blocks)


def _patched(module: str, network: str, spec: ModelSpec, patch: int, **sizes: int) -> nn.Module:
    """Build a network of timm's that cuts images into patches of ``patch`` × ``patch`` pixels."""
    channels, height, width = _image_shape(spec)
    if patch < 1 or height % patch or width % patch:
        raise UsageError(
            f"{spec.name} cuts images into patches of {patch}×{patch} pixels, and {width}×{height} is not "
            "a multiple of that. Choose another patch size, or resize with --image-size"
        )
    with needs(spec.name, "timm", "timm"):
        kind = getattr(importlib.import_module(f"timm.models.{module}"), network)
    classes = spec.num_classes
    return kind(img_size=(height, width), patch_size=patch, in_chans=channels, num_classes=classes, **sizes)


_FAMILIES: dict[str, Callable[[re.Match[str], ModelSpec], nn.Module]] = dict(
    zip(FAMILIES, (_cnn6, _mlp, _wide_resnet, _resnet, _vit, _mixer), strict=True)
)


def _torchvision_model(name: str, keywords: Mapping[str, Any]) -> Callable[[ModelSpec], nn.Module]:
    def build(spec: ModelSpec) -> nn.Module:
        # imported here: torchvision takes a second or two, and only its own models need it
        from torchvision.models import get_model

        if len(spec.input_shape) != 3 or spec.input_shape[0] != 3:
            raise UsageError(
                f"torchvision:{name} takes RGB images (3, H, W), not examples of shape {spec.input_shape}"
            )
        # auxiliary heads run in training alone, where nothing reads them
        heads = {"aux_logits": False, "init_weights": True} if name in INPUTS_CHANGED else {}
        with foreign_or(_not_built(f"torchvision:{name}", keywords)):
            return get_model(name, weights=None, **heads, **keywords, num_classes=spec.num_classes)

    return build


def _not_built(name: str, keywords: Mapping[str, Any]) -> Callable[[str], UsageError]:
    """Return what makes the error of a library's builder from its cause."""
    given = f" with {', '.join(keywords)}" if keywords else ""
    return lambda cause: UsageError(f"{name} cannot be built{given}: {start_of(cause, 200)}")


def _timm_model(name: str, keywords: Mapping[str, Any]) -> Callable[[ModelSpec], nn.Module]:
    if ":" in name:  # with hf-hub: and local-dir: timm would read other people's files
        raise UsageError(
            f"no model 'timm:{name}'; timm's own models are given as timm:NAME, and others by your own "
            "code as file.py:callable"
        )
    with needs(f"timm:{name}", "timm", "timm"):
        import timm

    def build(spec: ModelSpec) -> nn.Module:
        options = {"num_classes": spec.num_classes, "in_chans": spec.input_shape[0], **keywords}
        with foreign_or(_not_built(f"timm:{name}", keywords)):
            try:
                return timm.create_model(name, **{"img_size": spec.input_shape[-1], **options})
            except TypeError:  # convolutional networks have no img_size
                return timm.create_model(name, **options)

    return build


def _user_model(name: str) -> Callable[[ModelSpec], nn.Module]:
    location, _, attribute = name.rpartition(":")
    file = Path(location) if location.endswith(".py") else None
    if file is not None and not file.is_file():
        raise UsageError(f"--model {name}: there is no file {location}")

    def build(_: ModelSpec) -> nn.Module:
        try:
            with _found_last(Path.cwd() if file is None else file.resolve().parent):
                module = importlib.import_module(location) if file is None else _module_of(file)
                model: nn.Module = getattr(module, attribute)()
            unwrapped(model)  # which raises where it cannot run with perturbed weights
        except (Exception, SystemExit) as error:  # a user's own code may raise anything
            if out_of_memory(error):
                raise
            kind = "" if isinstance(error, UsageError) else f"{type(error).__name__}: "
            raise UsageError(f"--model {name}: {kind}{' '.join(str(error).split())}") from error
        return model

    return build


@contextmanager
def _found_last(folder: Path) -> Iterator[None]:
    """Let code import meanwhile what lies in ``folder``; Python's own modules and installed ones come before it."""
    entry = str(folder)
    sys.path.append(entry)
    try:
        yield
    finally:
        if entry in sys.path:  # the code may have changed the path itself
            del sys.path[len(sys.path) - 1 - sys.path[::-1].index(entry)]


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


def logits_at(model: nn.Module, x: Inputs, outputs: Outputs | None = None) -> Tensor:
    """Return the model's logits for ``x``, (B, C) or (B, L, 2), of which nothing is written to.

    Raises:
        UsageError: as ``Outputs.taken``.
    """
    outputs = outputs or Outputs()
    args, kwargs = arguments(model, x)
    return outputs.logits(outputs.taken(model(*args, **kwargs), len(x)))
