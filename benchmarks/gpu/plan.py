"""How large a check is, and what a part of it gives."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

Cells = Iterator[tuple[str, Callable[[], dict[str, Any]]]]
"""Names, and what is run under them: each gives ``rows`` of the page, and what else is worth keeping."""


@dataclass(frozen=True)
class Size:
    """What the parts take; see ``SIZES``."""

    networks: tuple[str, ...]  # whose values are compared, by
    measures: tuple[str, ...]
    examples: int
    pixels: int
    width: int
    trained: str  # the network of the rules' steps, and
    batch: int
    timed: dict[
        str, tuple[int, int]
    ]  # the networks whose products are timed, with their images' size and number
    rounds: int  # of which a time is the median
    throughput: tuple[str, int, int]  # network, batch and steps of an epoch
    stacked: tuple[int, int]  # models that are trained as one, and their batch


SIZES = {
    "full": Size(
        networks=("6cnn", "wrn-10-1", "lstm", "vit"),
        measures=("all",),
        examples=32,
        pixels=32,
        width=64,
        trained="wrn-10-1",
        batch=64,
        timed={"6cnn": (32, 250), "wrn-28-2": (32, 250), "resnet18": (224, 64), "resnet50": (224, 64)},
        rounds=5,
        throughput=("wrn-28-2", 128, 40),
        stacked=(64, 128),
    ),
    "small": Size(
        networks=("rnn", "vit"),
        measures=("local_inconsistency", "fisher_trace", "mean_entropy"),
        examples=4,
        pixels=8,
        width=4,
        trained="mlp-4",
        batch=4,
        timed={"mlp-4": (8, 4)},
        rounds=1,
        throughput=("mlp-4", 8, 2),
        stacked=(2, 2),
    ),
}
