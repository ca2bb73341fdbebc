"""Algorithm 1 and the converged maximum against dense power iteration, eigenvalues and brute force."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import BY_NAME, Case
from torch import Tensor, nn

from gm_probe.data.batches import Batches
from gm_probe.inconsistency.ascent import (
    JOINED,
    Divergence,
    FisherByDifference,
    Maximum,
    ascend,
    kl_gradient,
    maximize,
    to_sphere,
)
from gm_probe.linalg.work import Work
from gm_probe.measures.measure import measure
from gm_probe.measures.settings import Settings
from gm_probe.models.parameters import Parameters


def divergence_of(case: Case, batch_size: int = 3) -> Divergence:
    batches = case.batches(batch_size)
    logits = torch.cat([case.data[0](batch.x) for batch in batches]).detach()
    return Divergence(Parameters(case.model), batches, logits, Work(7))


def naive_kl(case: Case, offset: Tensor) -> Tensor:
    """(7,) in float64 from the definition, good to about 1e-16."""
    log_p, log_q = (case.logits_at(case.theta + d).log_softmax(1) for d in (0 * offset, offset))
    return (log_p.exp() * (log_p - log_q)).sum(1).detach()


@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_divergence_is_the_definition(case: Case, batch_size: int, generator: torch.Generator) -> None:
    offset = 0.3 * torch.randn(len(case.theta), generator=generator, dtype=torch.float64)
    divergence, expected = divergence_of(case, batch_size), naive_kl(case, offset)
    torch.testing.assert_close(divergence.terms(offset), expected, rtol=1e-9, atol=1e-13)
    value, _ = divergence.value_and_gradient(offset)
    assert value == pytest.approx(float(expected.mean()), rel=1e-9)


def test_under_autocast_perturbation_norm_and_divergence_are_float32(generator: torch.Generator) -> None:
    """Of the ascent only the passes through the network are in bfloat16: θ + δ would lose most of δ in it."""
    seen: list[tuple[Tensor, Tensor]] = []

    class Noting(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            outputs = super().forward(x)
            seen.append((self.weight.detach().clone(), outputs.detach()))
            return outputs

    model, x = Noting(6, 4, bias=False), torch.randn(8, 6, generator=generator)
    parameters = Parameters(model)
    start = parameters.random(0.1, generator)
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(x).detach()
        terms, gradient = kl_gradient(parameters, x, logits, start)
        delta = to_sphere(gradient, 0.1)
    weight, outputs = seen[-1]
    assert logits.dtype == outputs.dtype == torch.bfloat16
    assert terms.dtype == gradient.dtype == delta.dtype == weight.dtype == torch.float32
    assert torch.equal(weight, model.weight + start.view_as(weight))
    log_p, log_q = (z.double().log_softmax(1) for z in (logits, outputs))
    torch.testing.assert_close(terms.double(), (log_p.exp() * (log_p - log_q)).sum(1), rtol=1e-4, atol=1e-9)
    assert float(delta.double().norm()) == pytest.approx(0.1, rel=1e-6)


def test_gradient_against_finite_differences(case: Case, generator: torch.Generator) -> None:
    offset = 0.3 * torch.randn(len(case.theta), generator=generator, dtype=torch.float64)
    eps = 1e-5
    expected = torch.stack(
        [
            (naive_kl(case, offset + eps * e).mean() - naive_kl(case, offset - eps * e).mean()) / (2 * eps)
            for e in torch.eye(len(offset), dtype=torch.float64)
        ]
    )
    divergence = divergence_of(case)
    torch.testing.assert_close(divergence.gradient(offset), expected, rtol=1e-6, atol=1e-9)
    model, x, _ = case.data
    terms, summed = kl_gradient(Parameters(case.model), x, model(x).detach(), offset)
    torch.testing.assert_close(summed / 7, expected, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(terms, naive_kl(case, offset), rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("radius", [0.1, 5.0, 1e6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_zero_vector_has_no_direction(radius: float, dtype: torch.dtype) -> None:
    assert torch.equal(to_sphere(torch.zeros(3, dtype=dtype), radius), torch.zeros(3, dtype=dtype))
    tiny = torch.full((3,), torch.finfo(dtype).tiny / 64, dtype=dtype)
    assert float(to_sphere(tiny, radius).norm()) == pytest.approx(radius, rel=1e-4)


def test_divergence_at_no_offset_is_exactly_zero(case: Case) -> None:
    divergence, zero = divergence_of(case), torch.zeros_like(case.theta)
    assert torch.equal(divergence.terms(zero), torch.zeros(7, dtype=torch.float64))
    assert float(divergence.gradient(zero).norm()) < 1e-14


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_tiny_radius_is_power_iteration(case: Case, steps: int, generator: torch.Generator) -> None:
    radius = 1e-6
    start = radius * torch.randn(len(case.theta), generator=generator, dtype=torch.float64)
    end = ascend(divergence_of(case).gradient, start, radius, steps)
    expected, matrix = start, case.fisher_terms.mean(0)
    for _ in range(steps):
        expected = matrix @ expected
    assert float(end.norm()) == pytest.approx(radius, rel=1e-12)
    assert float(end @ expected / (end.norm() * expected.norm())) == pytest.approx(1, abs=1e-7)


def test_algorithm_1_step_by_step() -> None:
    """δ ← ρ·g/‖g‖, the gradient taken at the unscaled start first and then at each δ."""
    seen = []

    def gradient(delta: Tensor) -> Tensor:
        seen.append(delta.clone())
        return torch.tensor([3.0, 4.0]) if len(seen) == 1 else torch.tensor([0.0, -7.0])

    end = ascend(gradient, torch.tensor([0.2, 0.1]), 2.0, 2)
    torch.testing.assert_close(torch.stack(seen), torch.tensor([[0.2, 0.1], [1.2, 1.6]]))
    torch.testing.assert_close(end, torch.tensor([0.0, -2.0]))


@pytest.mark.parametrize("scale", [1e-30, 1e-15, 1e15])
def test_sphere_in_float32_at_any_scale(scale: float) -> None:
    moved = to_sphere(torch.tensor([3.0, 4.0]) * scale, 0.5)
    torch.testing.assert_close(moved, torch.tensor([0.3, 0.4]))


def test_maximize_on_a_quadratic_form() -> None:
    """max δᵀAδ/2 on the sphere = ρ²λ_max/2."""
    rng = np.random.default_rng(1)
    a = rng.normal(size=(12, 12))
    matrix = torch.from_numpy(a @ a.T)
    start = torch.from_numpy(rng.normal(size=12))
    top = float(np.linalg.eigvalsh(matrix.numpy())[-1])
    end = maximize(
        lambda d: (float(d @ matrix @ d) / 2, matrix @ d), start, 0.5, tolerance=1e-9, max_steps=500
    )
    assert end.converged
    assert end.value == pytest.approx(0.125 * top, rel=1e-6)
    assert end.alignment == pytest.approx(1, abs=1e-6)
    assert float(end.delta.norm()) == pytest.approx(0.5)


def test_maximize_does_not_oscillate_where_algorithm_1_does() -> None:
    """The gradient points past the maximum on the circle, so that full steps flip between two points."""

    def objective(d: Tensor) -> tuple[float, Tensor]:
        x, y = d
        value = 1 - 4 * (y - 0.3) ** 2 + 0.1 * x
        return float(value), torch.stack([torch.tensor(0.1, dtype=torch.float64), -8 * (y - 0.3)])

    start = torch.tensor([0.6, 0.8], dtype=torch.float64)
    end = maximize(objective, start, 1.0, tolerance=1e-8, max_steps=200)
    angles = np.linspace(0, 2 * math.pi, 200_001)
    best = (1 - 4 * (np.sin(angles) - 0.3) ** 2 + 0.1 * np.cos(angles)).max()
    assert end.value == pytest.approx(best, rel=1e-6)
    assert all(gain >= 0 for gain in end.gains)


def test_maximize_says_when_it_ran_out_of_steps() -> None:
    matrix = torch.diag(torch.tensor([1.0, 0.99, 0.5], dtype=torch.float64))
    start = torch.tensor([0.01, 1.0, 1.0], dtype=torch.float64)
    end = maximize(
        lambda d: (float(d @ matrix @ d) / 2, matrix @ d), start, 1.0, tolerance=1e-12, max_steps=3
    )
    assert not end.converged


def test_maximize_of_a_constant() -> None:
    end = maximize(lambda d: (0.0, torch.zeros_like(d)), torch.ones(3), 1.0)
    assert (end.value, end.converged, end.alignment) == (0.0, True, 1.0)


CONVERGED = ["local_inconsistency_converged"]


def converged(case: Case, rho: float, **more: float) -> float:
    settings = Settings(rho=rho, ascent_tolerance=1e-6, eigen_tolerance=1e-3, max_iterations=100, **more)
    row = measure(case.model, case.batches(), CONVERGED, settings).rows[CONVERGED[0]]
    assert row.value is not None
    return row.value


def test_small_radius_gives_half_rho_squared_lambda_max(case: Case) -> None:
    rho = 1e-3
    top = float(np.linalg.eigvalsh(case.fisher_terms.mean(0).numpy())[-1])
    assert converged(case, rho) == pytest.approx(rho**2 / 2 * top, rel=0.01)


def test_grows_with_the_radius(case: Case) -> None:
    values = [converged(case, rho) for rho in (0.05, 0.25, 1.0)]
    assert values == sorted(values)


def numpy_tanh_logits(x: np.ndarray, flat: np.ndarray) -> np.ndarray:
    """(D, N, 3) logits of the 2-3-3 tanh network at D flat parameter vectors (D, 21)."""
    first, bias, last, end = np.split(flat, [6, 9, 18], axis=1)
    hidden = np.tanh(np.einsum("dhi,ni->dnh", first.reshape(-1, 3, 2), x) + bias[:, None])
    return np.einsum("dch,dnh->dnc", last.reshape(-1, 3, 3), hidden) + end[:, None]


@pytest.mark.parametrize("rho", [0.05, 0.5, 2.0])
def test_not_below_the_best_of_many_random_directions(rho: float) -> None:
    rng = np.random.default_rng(2)
    x, theta = rng.normal(size=(9, 2)), rng.normal(size=21)
    model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Tanh(), torch.nn.Linear(3, 3)).double()
    torch.nn.utils.vector_to_parameters(torch.from_numpy(theta), model.parameters())

    directions = rng.normal(size=(20_000, 21))
    directions *= rho / np.linalg.norm(directions, axis=1, keepdims=True)

    def log_softmax(z: np.ndarray) -> np.ndarray:
        return z - np.log(np.exp(z).sum(-1, keepdims=True))

    log_p = log_softmax(numpy_tanh_logits(x, theta[None]))
    log_q = log_softmax(numpy_tanh_logits(x, theta + directions))
    divergences = (np.exp(log_p) * (log_p - log_q)).sum(-1).mean(1)

    batches = Batches.from_tensors(torch.from_numpy(x), batch_size=4)
    row = measure(model, batches, CONVERGED, Settings(rho=rho)).rows[CONVERGED[0]]
    assert row.value is not None
    assert row.value >= divergences.max()


def test_starts_have_the_length_of_the_noise_scale(generator: torch.Generator) -> None:
    parameters = Parameters(torch.nn.Linear(100, 50))
    lengths = [float(parameters.random(0.3, generator).norm()) for _ in range(20)]
    assert np.mean(lengths) == pytest.approx(0.3, rel=0.01)


@pytest.mark.parametrize("rho", [0.1, 1.0])
@pytest.mark.parametrize("name", ["relu-mlp", "tanh-mlp", "softmax-regression", "silu", "tied", "frozen"])
def test_converged_is_not_below_fifteen_steps_from_any_start(name: str, rho: float) -> None:
    case = BY_NAME[name]
    paper = measure(case.model, case.batches(7), ["local_inconsistency"], Settings(rho=rho, k_steps=15))
    starts = paper.rows["local_inconsistency"].details["starts"]
    assert len(starts) == 10
    assert max(starts) <= converged(case, rho) * (1 + 1e-3)


def test_an_ascent_that_falls_behind_is_abandoned() -> None:
    """On diag(1, 4) from near the axis of 1 the value is 0.5 to begin with, and 2 in the end."""
    matrix = torch.diag(torch.tensor([1.0, 4.0], dtype=torch.float64))

    def objective(d: Tensor) -> tuple[float, Tensor]:
        return float(d @ matrix @ d) / 2, matrix @ d

    def at(value: float) -> Maximum:
        return replace(alone, delta=-alone.delta, value=value)

    start = torch.tensor([1.0, 0.05], dtype=torch.float64)
    alone = maximize(objective, start, 1.0, tolerance=1e-6)
    assert (alone.converged, alone.abandoned) == (True, False)
    assert alone.value == pytest.approx(2, rel=1e-5)
    behind = maximize(objective, start, 1.0, tolerance=1e-6, rival=at(1.9))
    assert (behind.converged, behind.abandoned) == (False, True)
    assert len(behind.gains) < len(alone.gains)
    gain = behind.gains[-1]
    assert behind.value * (1 + gain) ** 2 < 1.9
    # of an ascent that ended in the same place it stops as soon as it is near
    near = maximize(objective, start, 1.0, tolerance=1e-6, rival=replace(alone, value=100.0))
    assert (near.converged, near.abandoned, near.joined) == (False, True, False)  # as long as that is far
    near = maximize(objective, alone.delta + 0.2 * start, 1.0, tolerance=1e-6, rival=alone)
    assert (near.converged, near.abandoned, near.joined) == (False, False, True)
    assert float(near.delta @ alone.delta) > JOINED
    # nor does it stop at one that had not ended itself
    cut_short = replace(alone, converged=False)
    assert not maximize(objective, alone.delta + 0.2 * start, 1.0, tolerance=1e-6, rival=cut_short).joined
    ahead = maximize(objective, start, 1.0, tolerance=1e-6, rival=at(0.4))
    assert (ahead.value, ahead.abandoned) == (alone.value, False)


def test_maximize_where_a_gradients_norm_underflows() -> None:
    """Squares of 1e-30 are 0 in float32."""
    scale, values = 1e-30, torch.tensor([3.0, 1.0, 0.5])

    def objective(delta: Tensor) -> tuple[float, Tensor]:
        gradient = scale * values * delta
        return float((gradient.double() * delta.double()).sum()) / 2, gradient

    found = maximize(objective, torch.ones(3), 1.0, tolerance=1e-9)
    assert found.value == pytest.approx(1.5 * scale, rel=1e-5)
    assert len(found.gains) > 3
    assert 0.999 < found.alignment <= 1.000001
    start = maximize(objective, torch.ones(3), 1.0, max_steps=0)
    assert start.alignment == pytest.approx(
        float(torch.cosine_similarity(values, torch.ones(3), 0)), rel=1e-5
    )


def test_the_ascents_of_each_start_are_told(case: Case) -> None:
    row = measure(case.model, case.batches(7), CONVERGED, Settings(rho=1.0)).rows[CONVERGED[0]]
    details = row.details
    assert {"+v1", "-v1"} < set(details["starts"]) == set(details["gains"]) >= set(details["abandoned"])
    best = max(details["starts"], key=details["starts"].__getitem__)
    assert row.value == details["starts"][best]
    assert best not in details["abandoned"]
    assert all(gain >= 0 for gains in details["gains"].values() for gain in gains)


def test_ratio_to_the_quadratic_value(case: Case) -> None:
    """Within what is said of the eigenvalue's draft, which stalls on networks as tiny as some of these."""
    largest = float(torch.linalg.eigvalsh(case.fisher_terms.mean(0))[-1])
    for rho in (1e-3, 1.0):
        row = measure(case.model, case.batches(7), CONVERGED, Settings(rho=rho)).rows[CONVERGED[0]]
        assert row.value is not None
        off = row.details["quadratic_ratio"] / (row.value / (rho**2 / 2 * largest)) - 1
        assert abs(off) <= row.details["quadratic_residual"] + 1e-3
        assert row.details["quadratic_residual"] < 0.1
        assert rho == 1 or row.details["quadratic_ratio"] == pytest.approx(1, abs=0.1)


# F v by one gradient


def product_error(case: Case, v: Tensor, dtype: torch.dtype) -> float:
    model, x = case.model.to(dtype), case.data[1].to(dtype)
    batches = Batches.from_tensors(x, batch_size=3)
    divergence = Divergence(Parameters(model), batches, model(x).detach(), Work(7))
    expected = case.fisher_terms.mean(0) @ v
    return float((FisherByDifference(divergence)(v.to(dtype)).double() - expected).norm() / expected.norm())


@pytest.mark.parametrize("length", [1e-3, 1.0, 1e3])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 0.05), (torch.float64, 5e-5)], ids=str)
def test_difference_product(
    case: Case, dtype: torch.dtype, bound: float, length: float, generator: torch.Generator
) -> None:
    """Of these tiny networks a step moves single neurons far more than of large ones."""
    vectors = [length * torch.randn(len(case.theta), generator=generator).double() for _ in range(9)]
    errors = [product_error(case, v, dtype) for v in vectors]
    assert np.median(errors) < bound
    assert max(errors) < 10 * bound


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_difference_products_step_follows_the_scale(
    scale: float, dtype: torch.dtype, generator: torch.Generator
) -> None:
    """The same function of weights 1/scale as large: F is scale² as large, and as well approximated."""
    case = BY_NAME["tanh-mlp"]
    x = case.data[1].to(dtype)
    v = torch.randn(12, generator=generator, dtype=torch.float64)  # along the first layer's weights

    def product(factor: float) -> tuple[Tensor, float]:
        model = case.model.to(dtype)
        with torch.no_grad():
            model[0].weight /= factor
        work = Work(7)
        parameters = Parameters(model, r"^0\.weight")
        batches = Batches.from_tensors(x * factor)
        product = FisherByDifference(Divergence(parameters, batches, model(x * factor).detach(), work))
        first = product(v.to(dtype)).double()
        found, work.evaluations = work.evaluations, 0.0
        assert float((product(v.to(dtype)).double() / first - 1).abs().max()) < 0.1
        assert work.evaluations == pytest.approx(1)  # the step is remembered
        return first, found

    truth = case.fisher_terms.mean(0)[:12, :12] @ v
    found, evaluations = product(scale)
    bound = 0.05 if dtype == torch.float32 else 1e-4
    assert float((found / scale**2 - truth).norm() / truth.norm()) < bound
    assert evaluations <= 3


def test_difference_product_along_a_direction_without_effect() -> None:
    case = BY_NAME["unused"]
    v = torch.zeros(len(case.theta), dtype=torch.float64)
    v[17] = 1.0  # of the idle layer
    assert torch.equal(FisherByDifference(divergence_of(case))(v), torch.zeros_like(v))


def test_difference_product_ends_where_the_effect_is_of_second_order() -> None:
    """At weights of zero F = 0, but a step moves the logits by its square: no step is ever the right one."""
    model = torch.nn.Sequential(torch.nn.Linear(3, 4, bias=False), torch.nn.Linear(4, 3, bias=False))
    model = model.double().eval()
    for p in model.parameters():
        torch.nn.init.zeros_(p)
    x = 1e-3 * torch.randn(5, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    work = Work(5)
    divergence = Divergence(Parameters(model), Batches.from_tensors(x), model(x).detach(), work)
    v = torch.randn(24, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    assert float(FisherByDifference(divergence)(v).norm()) < 1e-3
    assert work.evaluations <= 10
    rows = measure(
        model, Batches.from_tensors(x), ["fisher_lambda_max", "local_inconsistency_converged"]
    ).rows
    assert rows["fisher_lambda_max"].value == 0
