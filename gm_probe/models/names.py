"""The names that models may have. Imports no torch, so that a wrong one is reported at once."""

from __future__ import annotations

import re
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

from gm_probe.errors import UsageError, did_you_mean

BUILT_IN = {
    "6cnn": "four convolutions and two linear layers, the paper's small network",
    "mlp": "fully connected, two hidden layers of 128; mlp-W1-W2-... sets the widths",
    "wrn-16-8": "Wide ResNet of depth 16 and width 8; wrn-D-K takes any (depth 6n + 4)",
    "wrn-28-2": (
        "Wide ResNet of depth 28 and width 2; wrn-D-K-authors has one more block per stage, as in the "
        "paper's code"
    ),
    "wrn-28-8": "Wide ResNet of depth 28 and width 8",
    "wrn-28-10": "Wide ResNet of depth 28 and width 10",
    "resnet18-cifar": "ResNet-18 with a 3×3 stem of stride 1, no max-pool; also 34, 50, 101, 152",
    "resnet50": "ResNet-50 with its own 7×7 stem, for large images; also 18, 34, 101, 152",
    "vit-tiny-4": "Vision Transformer of width 192, patches of 4×4; vit-tiny-P takes any; needs gm_probe[timm]",
    "vit-micro-4": "Vision Transformer of 6 blocks of width 64, for a CPU; vit-micro-P takes any",
    "vit-s-16": "Vision Transformer of width 384, patches of 16×16; vit-s-P takes any; needs gm_probe[timm]",
    "vit-s-32": "the same with patches of 32×32",
    "mixer-4": "MLP-Mixer, 10 blocks of width 256, patches of 4×4; mixer-P takes any; needs gm_probe[timm]",
    "mixer-micro-4": "MLP-Mixer of 4 blocks of width 64, for a CPU; mixer-micro-P takes any",
}
"""The networks of gm_probe itself, by a name that builds one."""
FAMILIES = (
    r"6cnn",
    r"mlp((?:-\d+)*)",
    r"wrn-(\d+)-(\d+)(-authors)?",
    r"resnet(18|34|50|101|152)(-cifar)?",
    r"vit-(micro|tiny|s)-(\d+)",
    r"mixer-(micro-)?(\d+)",
)
"""Their names, as models.zoo reads them."""
HUGGING_FACE = "hf"
LIBRARIES = ("torchvision", "timm")
"""Their models are given as LIBRARY:NAME."""
_REGISTERED = re.compile(r"^@register_model\b.*?^def (\w+)\(", re.MULTILINE | re.DOTALL)
LONGEST = 1000
"""Characters of a name: one that a file records may claim layers without end."""


def is_user_code(name: str) -> bool:
    """Return whether a model's name points to code outside gm_probe, torchvision and timm."""
    prefix, separator, _ = name.partition(":")
    return bool(separator) and prefix not in LIBRARIES


def require_model_name(name: str) -> None:
    """Raise UsageError where ``name`` is no network of gm_probe's, and no name of somebody else's."""
    if len(name) > LONGEST and not is_user_code(name):
        raise UsageError(f"no model has a name as long as {name[:20]!r}…; `gmprobe models` lists them")
    prefix, separator, rest = name.partition(":")
    if prefix in LIBRARIES and separator:
        _require_registered(prefix, rest.partition(",")[0])
    if separator or name == HUGGING_FACE:
        return
    if not any(re.fullmatch(pattern, name) for pattern in FAMILIES):
        raise no_model(name)


def _require_registered(library: str, name: str) -> None:
    """Raise UsageError where the library's code registers models, but none of this ``name``."""
    texts = list(_sources(library))
    names = {found for text in texts for found in _REGISTERED.findall(text)}
    plain = name.partition(".")[0]  # in timm the weights' name follows a dot
    # timm keeps earlier names as strings
    if names and ":" not in name and plain not in names and not any(f"'{name}'" in text for text in texts):
        raise UsageError(
            f"{library} has no classifier {name!r}; {did_you_mean(name, names, 'see its own list')}"
        )


def _sources(library: str) -> Iterator[str]:
    """Yield the code of an installed library's classifiers. To import it for their names would take seconds."""
    spec = find_spec(library)
    for folder in (spec.submodule_search_locations or ()) if spec is not None else ():
        for file in Path(folder, "models").glob("*.py"):
            yield file.read_text(encoding="utf-8", errors="replace")


def no_model(name: str) -> UsageError:
    """Return the error for ``name``, which is no network of gm_probe's."""
    resnets = [f"resnet{depth}{stem}" for depth in (18, 34, 50, 101, 152) for stem in ("", "-cifar")]
    hint = did_you_mean(name, [*BUILT_IN, *resnets], "`gmprobe models` lists them")
    return UsageError(f"no model {name!r}; {hint}")
