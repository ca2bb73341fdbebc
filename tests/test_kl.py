"""KL of two softmax outputs against mpmath, closed forms and finite differences."""

from __future__ import annotations

import mpmath
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gm_probe.inconsistency.kl import kl_divergence


def exact(p_logits: Tensor, q_logits: Tensor) -> list[float]:
    """Row by row with 60 digits, from the values as the dtype holds them."""
    result = []
    with mpmath.workdps(60):
        for p_row, q_row in zip(p_logits.double().tolist(), q_logits.double().tolist(), strict=True):
            p, q = [mpmath.mpf(v) for v in p_row], [mpmath.mpf(v) for v in q_row]
            log_zp, log_zq = (mpmath.log(sum(mpmath.exp(v) for v in row)) for row in (p, q))
            log_ratio = [(a - log_zp) - (b - log_zq) for a, b in zip(p, q, strict=True)]
            result.append(float(sum(mpmath.exp(a - log_zp) * r for a, r in zip(p, log_ratio, strict=True))))
    return result


def random_pair(noise: float, dtype: torch.dtype, rows: int = 40) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(int(1e7 * noise))
    p = (3 * torch.randn(rows, 7, generator=generator)).to(dtype)
    return p, (p.double() + noise * torch.randn(rows, 7, generator=generator)).to(dtype)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-9)], ids=["float32", "float64"]
)
@pytest.mark.parametrize("noise", [1e-5, 1e-4, 1e-3, 1e-2, 0.1, 1.0, 3.0, 10.0])
def test_every_row_is_accurate(noise: float, dtype: torch.dtype, tolerance: float) -> None:
    p, q = random_pair(noise, dtype)
    torch.testing.assert_close(
        kl_divergence(p, q).double(), torch.tensor(exact(p, q), dtype=torch.float64), rtol=tolerance, atol=0
    )


def test_mean_is_accurate_far_below_epsilon() -> None:
    p, q = random_pair(1e-6, torch.float32, rows=200)
    truth = torch.tensor(exact(p, q), dtype=torch.float64).mean()
    assert truth < 1e-11
    assert float(kl_divergence(p, q).double().mean() / truth) == pytest.approx(1, rel=1e-4)


repeatable = settings(derandomize=True, deadline=None)
logits = st.lists(st.lists(st.floats(-400, 400, width=32), min_size=4, max_size=4), min_size=2, max_size=2)


@repeatable
@given(logits, st.sampled_from([torch.float32, torch.float64]))
def test_never_negative_and_right_anywhere(rows: list[list[float]], dtype: torch.dtype) -> None:
    p, q = (torch.tensor([row], dtype=dtype) for row in rows)
    value = float(kl_divergence(p, q))
    assert value >= 0
    # away from the row's own size nothing is promised beyond the rounding of logits of a few hundred
    assert value == pytest.approx(exact(p, q)[0], rel=2e-4, abs=1e-12)


@repeatable
@given(st.lists(st.floats(-300, 300, width=32), min_size=1, max_size=8))
def test_equal_logits_give_exactly_zero(row: list[float]) -> None:
    z = torch.tensor([row])
    assert float(kl_divergence(z, z.clone())) == 0.0


@repeatable
@given(st.lists(st.floats(-10, 10, width=32), min_size=3, max_size=3), st.integers(-20, 20))
def test_shift_of_logits_changes_nothing(row: list[float], shift: int) -> None:
    z = torch.tensor([row], dtype=torch.float64)
    assert float(kl_divergence(z, z + shift)) == pytest.approx(0, abs=1e-25)


EXTREMES = [
    ([120.0, -120.0, 0.0], [-120.0, 120.0, 0.0]),
    ([300.0, -300.0, 0.0], [-300.0, 300.0, 0.0]),
    ([-300.0, 300.0, 0.0], [300.0, 300.0, -300.0]),
    ([120.0, 0.0, 0.0], [0.0, 0.0, 0.0]),
    ([0.0, 0.0, 0.0], [300.0, 0.0, -300.0]),
    ([300.0, 299.0, -300.0], [300.0, 299.5, -300.0]),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize(("p_row", "q_row"), EXTREMES)
def test_extreme_logits(p_row: list[float], q_row: list[float], dtype: torch.dtype) -> None:
    p = torch.tensor([p_row], dtype=dtype, requires_grad=True)
    q = torch.tensor([q_row], dtype=dtype, requires_grad=True)
    value = kl_divergence(p, q)
    torch.testing.assert_close(
        value.detach().double(), torch.tensor(exact(p, q), dtype=torch.float64), rtol=1e-5, atol=0
    )
    p_grad, q_grad = torch.autograd.grad(value.sum(), (p, q))
    torch.testing.assert_close(q_grad, (q.softmax(1) - p.softmax(1)).detach(), rtol=1e-5, atol=1e-6)
    # ∂KL/∂p_i = p_i (log(p_i/q_i) - KL)
    probability = p.softmax(1)
    ratio = p.log_softmax(1) - q.log_softmax(1)
    expected = (probability * (ratio - value[:, None])).detach()
    torch.testing.assert_close(p_grad, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("noise", [1e-4, 0.1, 1.0, 10.0])
def test_gradients_of_both_sides_against_finite_differences(noise: float) -> None:
    p, q = random_pair(noise, torch.float64, rows=6)
    assert torch.autograd.gradcheck(
        kl_divergence, (p.requires_grad_(), q.requires_grad_()), eps=1e-6, atol=1e-7, rtol=1e-5
    )


@pytest.mark.parametrize("noise", [1e-5, 1e-3, 1.0])
def test_small_gradients_keep_their_digits_in_float32(noise: float) -> None:
    p, q = random_pair(noise, torch.float32)
    q.requires_grad_()
    (gradient,) = torch.autograd.grad(kl_divergence(p, q).sum(), q)
    expected = q.detach().double().softmax(1) - p.double().softmax(1)
    error = (gradient.double() - expected).norm(dim=1) / expected.norm(dim=1)
    assert float(error.max()) < 1e-4


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
def test_half_precision_is_computed_in_float32(dtype: torch.dtype) -> None:
    p, q = random_pair(0.5, dtype)
    value = kl_divergence(p, q)
    assert value.dtype == torch.float32
    torch.testing.assert_close(
        value.double(), torch.tensor(exact(p, q), dtype=torch.float64), rtol=1e-5, atol=0
    )
    mixed = kl_divergence(p, q.double())
    assert mixed.dtype == torch.float64
