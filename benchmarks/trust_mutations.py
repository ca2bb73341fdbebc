"""Ten thousand seeded mutations of a file of each format: it loads, or it is refused as the error says."""

from __future__ import annotations

import json
import random
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from trust_run import Row, fork

from gm_probe.data.normalization import Normalization
from gm_probe.errors import CheckpointError
from gm_probe.models.checkpoints import read_checkpoint, save_checkpoint
from gm_probe.models.loading import load_model
from gm_probe.models.zoo import ModelSpec, build_model

SPEC = ModelSpec("mlp-8", (1, 8, 8), 10)
COUNT, BATCH = 10_000, 250
WITHIN = 120.0  # seconds a batch


def mutated(content: bytes, draw: random.Random) -> bytes:
    """``content`` with bytes set, flipped, cut out, repeated, put in or swapped, or its end cut off."""
    data = bytearray(content)
    for _ in range(draw.choice([1, 1, 2, 4, 16])):
        # headers and directories are small: half of all changes go to them
        low, high = draw.choice(
            [(0, len(data)), (0, min(700, len(data))), (max(0, len(data) - 700), len(data))]
        )
        at = draw.randrange(low, high)
        match draw.randrange(7):
            case 0:
                data[at] = draw.randrange(256)
            case 1:
                data[at] ^= 1 << draw.randrange(8)
            case 2:
                del data[at : at + draw.choice([1, 2, 8, 64])]
            case 3:
                data[at:at] = data[at : at + draw.choice([1, 8, 64])]
            case 4:
                data[at:at] = draw.randbytes(draw.choice([1, 4, 8]))
            case 5:
                data[at : at + 4] = draw.choice(
                    [b"\xff" * 4, bytes(4), b"\x7f" + b"\xff" * 3, b"\x00\x00\x00\x80"]
                )
            case 6 if draw.random() < 0.2:
                del data[at:]
        if len(data) < 8:
            break
    return bytes(data)


def batch(content: bytes, suffix: str, first: int, count: int, folder: Path, store: Path) -> None:
    """Read mutations ``first`` and on; write how each ended to ``store`` as it goes."""
    path = folder / f"mutated{suffix}"
    with store.open("w") as log:
        for seed in range(first, first + count):
            path.write_bytes(mutated(content, random.Random(seed)))
            with warnings.catch_warnings(record=True) as seen:
                warnings.simplefilter("always")
                try:
                    checkpoint = read_checkpoint(path)
                    # where the record's own name was hit the file is a foreign one, whose network is named
                    name = None if checkpoint.model is not None else SPEC.name
                    model = load_model(checkpoint, name, input_shape=SPEC.input_shape)
                    ended = "loaded"
                    values = [*model.parameters()]
                    if not all(bool(torch.isfinite(value).all()) for value in values):
                        ended = "loaded what is not finite"
                except CheckpointError as error:
                    text = str(error)
                    good = text.isprintable() and str(path) in text and len(text) < 1500
                    ended = "refused" if good else f"refused as {text[:200]!r}"
                except Exception as error:  # noqa: BLE001  that is the finding
                    ended = f"{type(error).__name__}: {str(error)[:200]}"
            if seen:
                ended += f", and warned: {str(seen[0].message)[:100]}"
            log.write(json.dumps([seed, ended]) + "\n")
            log.flush()


def count(content: bytes, suffix: str, total: int, folder: Path, row: Row) -> Counter[str]:
    """All mutations of ``content``, in forks that may crash or hang."""
    store, seed = folder / "log", 0
    found: Counter[str] = Counter()
    while seed < total:
        size = min(BATCH, total - seed)
        ran = fork(lambda seed=seed, size=size: batch(content, suffix, seed, size, folder, store), WITHIN)
        ended = [json.loads(line) for line in store.read_text().splitlines()]
        for number, how in ended:
            found[how.split(":")[0]] += 1
            row.add(f"{suffix}, seed {number}", None if how in {"loaded", "refused"} else how)
        if ran.err.strip():
            row.exceptions.append(
                f"{suffix}, seeds {seed} to {seed + size}: on stderr {ran.err.strip()[:200]}"
            )
        seed += len(ended)
        if len(ended) < size:  # the next one took the process with it
            how = "hung" if ran.code is None else f"killed the interpreter (exit {ran.code})"
            found[how] += 1
            row.add(f"{suffix}, seed {seed}", how)
            seed += 1
    return found


def files(folder: Path) -> dict[str, Callable[[], bytes]]:
    """What is mutated: a file of each format that gm_probe writes, and torch's older one."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = build_model(SPEC)
    contents: dict[str, Any] = {}
    for suffix in (".safetensors", ".pt"):
        path = folder / f"whole{suffix}"
        save_checkpoint(path, model, SPEC, Normalization(), tuple("0123456789"))
        contents[suffix] = path.read_bytes()
    return contents


def run(small: bool) -> tuple[list[Row], list[str]]:
    rows, notes = [], []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for suffix, content in files(folder).items():
            row = Row(
                f"seeded mutations of a {suffix} file: loads clean or exit 3; no crash, hang or warning"
            )
            found = count(content, suffix, 120 if small else COUNT, folder, row)
            rows.append(row)
            notes.append(
                f"{suffix}: " + ", ".join(f"{number:,} {how}" for how, number in found.most_common())
            )
    return rows, notes
