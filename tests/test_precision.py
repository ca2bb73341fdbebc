"""Products of float32 in float32, both sets of torch's flags at one, and the caller's settings as they were."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gm_probe.data.batches import Batches
from gm_probe.measures.measure import measure
from gm_probe.runtime.precision import float32_products

BACKENDS: Any = torch.backends
ON_GPU = (BACKENDS.cuda.matmul, BACKENDS.cudnn.conv, BACKENDS.cudnn.rnn)
ON_CPU = (BACKENDS.mkldnn.matmul, BACKENDS.mkldnn.conv, BACKENDS.mkldnn.rnn)


def precisions() -> list[str]:
    """Everything that the newer flags say."""
    return [place.fp32_precision for place in (BACKENDS, BACKENDS.cudnn, *ON_GPU, *ON_CPU)]


def older() -> tuple[Any, ...]:
    return (BACKENDS.cudnn.allow_tf32, BACKENDS.cuda.matmul.allow_tf32, torch.get_float32_matmul_precision())


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    """Torch's own settings after each test."""
    before = precisions()
    yield
    torch.set_float32_matmul_precision("highest")
    BACKENDS.cudnn.allow_tf32 = True
    for place, precision in zip((BACKENDS, BACKENDS.cudnn, *ON_GPU, *ON_CPU), before, strict=True):
        place.fp32_precision = precision


def as_torch_has_it() -> None:
    pass


def by_older_flags() -> None:
    torch.set_float32_matmul_precision("high")
    BACKENDS.cudnn.allow_tf32 = False


def by_medium() -> None:
    torch.set_float32_matmul_precision("medium")


def by_newer_flags() -> None:
    BACKENDS.fp32_precision = "tf32"
    BACKENDS.cudnn.conv.fp32_precision = "ieee"
    BACKENDS.cuda.matmul.fp32_precision = "tf32"


def by_cudnn() -> None:
    BACKENDS.cudnn.allow_tf32 = False
    BACKENDS.cudnn.fp32_precision = "tf32"


CALLERS = [as_torch_has_it, by_older_flags, by_medium, by_newer_flags, by_cudnn]


@pytest.mark.parametrize("caller", CALLERS)
@pytest.mark.parametrize("tf32", [False, True])
def test_says_the_same_by_all_flags_and_restores_them(caller: Callable[[], None], tf32: bool) -> None:
    caller()
    before = precisions()
    with float32_products(tf32=tf32):
        assert [place.fp32_precision for place in ON_GPU] == ["tf32" if tf32 else "ieee"] * 3
        assert [place.fp32_precision for place in ON_CPU] == ["ieee"] * 3
        assert older() == (tf32, tf32, "high" if tf32 else "highest")
    assert precisions() == before


def test_the_general_setting_reaches_as_far_as_before() -> None:
    """What said nothing of its own says nothing after, too: it follows the general setting."""
    BACKENDS.cudnn.allow_tf32 = False
    with float32_products():
        pass
    BACKENDS.fp32_precision = "tf32"
    assert BACKENDS.cudnn.conv.fp32_precision == "tf32"


@pytest.mark.parametrize("caller", [as_torch_has_it, by_older_flags, by_medium])
def test_older_flags_are_read_after_as_before(caller: Callable[[], None]) -> None:
    caller()
    before = older()
    with float32_products(tf32=True), float32_products():
        assert older() == (False, False, "highest")
    assert older() == before


def test_settings_are_restored_when_it_fails() -> None:
    before = precisions(), older()
    with pytest.raises(KeyError), float32_products():
        raise KeyError
    assert (precisions(), older()) == before


class Curious(nn.Module):
    """Its forward reads the flags, and enters cuDNN's, as other people's do."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2)
        self.seen: set[Any] = set()

    def forward(self, x: Tensor) -> Tensor:
        self.seen.add(older())
        with BACKENDS.cudnn.flags(enabled=False):
            z = self.layer(x)
        self.seen.add(BACKENDS.cudnn.conv.fp32_precision != "tf32")
        return z


@pytest.mark.parametrize("caller", CALLERS)
def test_a_network_may_read_them(caller: Callable[[], None]) -> None:
    caller()
    before, model = precisions(), Curious()
    report = measure(model, Batches.from_tensors(torch.randn(5, 3)), ["fisher_lambda_max", "hessian_trace"])
    assert all(row.value is not None for row in report.rows.values())
    assert model.seen == {(False, False, "highest"), True}
    assert precisions() == before
