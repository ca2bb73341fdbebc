"""The precision of float32 products: float32 itself, or TF32, which keeps 10 of its 23 bits of mantissa on a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def float32_products(*, tf32: bool = False) -> Iterator[None]:
    """Take products of float32 in float32, whatever the caller has set; the caller's settings are restored.

    In TF32 (on a GPU) or bfloat16 (on some CPUs) a weight that moved little would move not at all. With ``tf32`` the
    products on an NVIDIA GPU may use TF32; those on a CPU may not.

    torch has two sets of flags for this, and it raises where a reader of one finds the other at odds with it. Both are
    set to the same, so that a network may read ``allow_tf32`` or enter ``torch.backends.cudnn.flags`` in its forward.
    """
    backends: Any = torch.backends
    general = (backends, backends.cudnn)  # the others follow these where they say "none"
    on_gpu = (backends.cuda.matmul, backends.cudnn.conv, backends.cudnn.rnn)
    on_cpu = (backends.mkldnn.matmul, backends.mkldnn.conv, backends.mkldnn.rnn)
    # the general ones first, so that what the others say then is their own
    before = [(place, _replaced(place, "none")) for place in general]
    before += [(place, _replaced(place, "ieee")) for place in (*on_gpu, *on_cpu)]
    matmul, convolution = torch.get_float32_matmul_precision(), _allowed_in_cudnn()
    try:
        torch.set_float32_matmul_precision("high" if tf32 else "highest")
        backends.cudnn.allow_tf32 = tf32
        for place in on_gpu:
            place.fp32_precision = "tf32" if tf32 else "ieee"
        for place in on_cpu:
            place.fp32_precision = "ieee"
        yield
    finally:
        torch.set_float32_matmul_precision(matmul)
        backends.cudnn.allow_tf32 = convolution
        for place, precision in before:
            place.fp32_precision = precision


def _replaced(place: Any, precision: str) -> str:
    before: str = place.fp32_precision
    place.fp32_precision = precision
    return before


def _allowed_in_cudnn() -> bool:
    """Return the older flag of cuDNN, where the newer ones say "ieee": torch raises if it is at odds with them."""
    try:
        return bool(torch.backends.cudnn.allow_tf32)
    except RuntimeError:
        return True
