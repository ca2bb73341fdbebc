"""Images that are made up, for rows whose data is not here: they try the code, and tell nothing of the data."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from gm_probe.errors import UsageError

GENERATED = "generated"
TRAIN, TEST = 24, 8  # images a class


def image_folder(name: str, folder: Path) -> Path:
    """A folder ``images-CLASSES-SIDE-CHANNELS`` of PNGs below ``folder``, as ``generated-CLASSES-SIDE-CHANNELS`` asks.

    Each class has a pattern of its own under noise. What is there already is kept: the pixels are the same each time.

    Raises:
        UsageError: ``name`` has another form.
    """
    try:
        classes, side, channels = map(int, name.removeprefix(f"{GENERATED}-").split("-"))
    except ValueError as error:
        raise UsageError(f"data = {name!r} must be {GENERATED}-CLASSES-SIDE-CHANNELS") from error
    root = folder / name.replace(GENERATED, "images")
    random = np.random.default_rng(0)
    patterns = random.uniform(40, 215, (classes, side, side, channels))
    for part, count in (("train", TRAIN), ("test", TEST)):
        for label in range(classes):
            place = root / part / f"class{label:03d}"
            place.mkdir(parents=True, exist_ok=True)
            for index in range(count):
                noisy = patterns[label] + random.normal(0, 40, patterns[label].shape)
                pixels = noisy.clip(0, 255).astype(np.uint8)
                path = place / f"{index:03d}.png"
                if not path.exists():
                    with path.open("xb") as file:  # never through a link
                        Image.fromarray(pixels[..., 0] if channels == 1 else pixels).save(file, "PNG")
    return root
