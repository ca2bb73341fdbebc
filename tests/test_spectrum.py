"""Lanczos and Hutchinson on matrices that numpy diagonalises."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from conftest import CASES, Case
from test_operators import build, dense_terms
from torch import Tensor

from gm_probe.core.errors import DivergedError
from gm_probe.probe.operators import Operator
from gm_probe.probe.spectrum import lanczos, trace


def operator_of(terms: Tensor) -> Operator:
    """The mean of dense matrices ``terms`` (N, P, P)."""
    matrix = terms.mean(0)
    return Operator(
        lambda v: matrix @ v,
        lambda v: torch.einsum("i,nij,j->n", v, terms, v),
        len(matrix),
        matrix.dtype,
        matrix.device,
    )


def with_spectrum(
    values: list[float] | np.ndarray, seed: int = 0, dtype: torch.dtype = torch.float64
) -> Tensor:
    """(1, P, P) symmetric matrix with these eigenvalues and random eigenvectors."""
    rng = np.random.default_rng(seed)
    basis, _ = np.linalg.qr(rng.normal(size=(len(values), len(values))))
    return torch.from_numpy((basis * np.asarray(values)) @ basis.T).to(dtype).unsqueeze(0)


SPECTRA = {
    "spread": np.linspace(0.1, 5, 40),
    "one outlier": np.r_[np.linspace(0, 1, 60), 9.0],
    "indefinite, larger below": np.r_[-30.0, np.linspace(-1, 1, 40), 4.0],
    "all negative": -np.linspace(1, 3, 20),
    "low rank": np.r_[np.zeros(50), 2.0, 3.0],
    "zero": np.zeros(12),
    "identity": np.ones(15),
    "repeated top": np.r_[np.linspace(0, 1, 20), 5.0, 5.0, 5.0],
    "close top pair": np.r_[np.linspace(0, 1, 40), 4.98, 5.0],
    "P = 1": np.array([-2.5]),
    "P = 2": np.array([1.0, 3.0]),
    "tiny": 1e-12 * np.linspace(0.1, 5, 40),
    "huge": 1e12 * np.linspace(0.1, 5, 40),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("name", SPECTRA)
def test_largest_eigenvalue(name: str, dtype: torch.dtype, generator: torch.Generator) -> None:
    terms = with_spectrum(SPECTRA[name], dtype=dtype)
    top = lanczos(operator_of(terms), generator=generator)
    truth = float(np.linalg.eigvalsh(terms[0].double().numpy())[-1])
    noise = 1e-6 if dtype == torch.float32 else 1e-12
    assert top.converged
    assert top.value == pytest.approx(truth, rel=0.01, abs=noise * np.abs(SPECTRA[name]).max())
    assert top.iterations <= len(SPECTRA[name])
    assert float(top.vector.norm()) == pytest.approx(1, abs=1e-6)
    assert top.vector.dtype == dtype


@pytest.mark.parametrize("name", SPECTRA)
def test_residual_is_the_true_residual_and_bounds_the_error(name: str, generator: torch.Generator) -> None:
    terms = with_spectrum(SPECTRA[name])
    top = lanczos(operator_of(terms), generator=generator)
    scale = np.abs(SPECTRA[name]).max()
    residual = float((terms[0] @ top.vector - top.value * top.vector).norm())
    assert top.residual == pytest.approx(residual, rel=1e-3, abs=1e-10 * scale)
    nearest = np.abs(SPECTRA[name] - top.value).min()
    assert nearest <= top.residual + 1e-12 * scale


@pytest.mark.parametrize("tolerance", [1e-2, 1e-4, 1e-8])
def test_tolerance_is_kept(tolerance: float, generator: torch.Generator) -> None:
    terms = with_spectrum(SPECTRA["one outlier"])
    top = lanczos(operator_of(terms), generator=generator, tolerance=tolerance)
    assert top.converged
    assert top.value == pytest.approx(9.0, rel=tolerance)
    assert top.residual <= tolerance * top.value


def test_running_out_of_iterations_is_said(generator: torch.Generator) -> None:
    terms = with_spectrum(np.linspace(0, 1, 200))
    top = lanczos(operator_of(terms), generator=generator, tolerance=1e-9, max_iterations=4)
    assert (top.converged, top.iterations) == (False, 4)
    assert top.value < 1


def test_one_small_residual_is_not_trusted() -> None:
    """The first residual of a start near a lower eigenvector is small, at the wrong eigenvalue."""
    values = torch.full((1000,), 0.5, dtype=torch.float64)
    values[0] = 1.0
    operator = Operator(
        lambda v: values * v, lambda v: (values * v * v).sum()[None], 1000, values.dtype, values.device
    )
    for seed in range(300):  # of some, the start has less than a hundredth of its length along the first axis
        w = torch.randn(1000, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        if 0.002 < abs(float(w[0] / w.norm())) < 0.008:
            break
    once = lanczos(operator, generator=torch.Generator().manual_seed(seed), max_iterations=1)
    assert once.value == pytest.approx(0.5, rel=1e-2)
    assert once.residual < 0.01 * once.value
    top = lanczos(operator, generator=torch.Generator().manual_seed(seed))
    assert top.converged
    assert top.value == pytest.approx(1.0, rel=0.01)


def test_a_close_second_eigenvalue_in_many_dimensions(generator: torch.Generator) -> None:
    """A random start is almost orthogonal to the vector that is sought."""
    values = torch.linspace(0, 0.1, 100_000)
    values[0], values[1] = 1.0, 0.8
    operator = Operator(
        lambda v: values * v, lambda v: (values * v * v).sum()[None], len(values), values.dtype, values.device
    )
    top = lanczos(operator, generator=generator)
    assert top.converged
    assert top.value == pytest.approx(1.0, rel=0.01)


def test_not_a_number_is_refused(generator: torch.Generator) -> None:
    operator = operator_of(torch.full((1, 3, 3), math.nan))
    with pytest.raises(DivergedError, match="finite"):
        lanczos(operator, generator=generator)
    with pytest.raises(DivergedError, match="finite"):
        trace(operator, generator=generator)


@pytest.mark.parametrize("kind", ["fisher", "hessian"])
def test_networks(kind: str, case: Case, generator: torch.Generator) -> None:
    operator, matrix = build(kind, case), dense_terms(kind, case).mean(0)
    eigenvalues = np.linalg.eigvalsh(matrix.numpy())
    top = lanczos(operator, generator=generator)
    assert top.value == pytest.approx(eigenvalues[-1], rel=0.01)
    estimate = trace(operator, generator=generator, tolerance=0, max_probes=60)
    assert abs(estimate.value - eigenvalues.sum()) < 4 * estimate.stderr


def stack(examples: int, size: int) -> Tensor:
    """(N, P, P) symmetric, indefinite and non-diagonal."""
    a = torch.from_numpy(np.random.default_rng(3).normal(size=(examples, size, size)))
    return a + a.transpose(1, 2) + 4 * torch.eye(size, dtype=torch.float64)


@pytest.mark.parametrize("seed", range(10))
def test_trace_within_four_standard_errors(seed: int) -> None:
    terms = stack(5, 20)
    estimate = trace(
        operator_of(terms), generator=torch.Generator().manual_seed(seed), tolerance=0.02, max_probes=300
    )
    assert estimate.converged
    assert estimate.stderr <= 0.02 * abs(estimate.value)
    assert abs(estimate.value - float(terms.mean(0).trace())) < 4 * estimate.stderr


def test_the_examples_error_is_free_of_the_probes_noise(generator: torch.Generator) -> None:
    terms = stack(50, 12)
    truth = torch.einsum("nii->n", terms).std() / 50**0.5
    estimates = [
        trace(operator_of(terms), generator=generator, tolerance=0, max_probes=10).stderr_examples ** 2
        for _ in range(60)
    ]
    # unbiased in the square; the spread over 60 repetitions gives the tolerance
    spread = float(np.std(estimates)) / 60**0.5
    assert float(np.mean(estimates)) == pytest.approx(float(truth) ** 2, abs=4 * spread)
    noisy = (
        truth**2
        + float((terms - torch.diag_embed(terms.diagonal(dim1=1, dim2=2))).square().sum((1, 2)).mean()) / 250
    )
    assert float(np.mean(estimates)) < 0.8 * float(noisy)


@pytest.mark.parametrize(
    ("tolerance", "max_probes"), [(0.0, 40), (0.05, 100)], ids=["fixed number of probes", "default stopping"]
)
def test_standard_error_is_calibrated(tolerance: float, max_probes: int) -> None:
    terms = stack(3, 20)
    operator, truth = operator_of(terms), float(terms.mean(0).trace())
    inside = 0
    for seed in range(200):
        estimate = trace(
            operator,
            generator=torch.Generator().manual_seed(seed),
            tolerance=tolerance,
            max_probes=max_probes,
        )
        inside += abs(estimate.value - truth) < 2 * estimate.stderr
    assert 0.90 <= inside / 200 <= 0.99


@pytest.mark.parametrize(
    "values", [np.zeros(4), np.arange(6.0), np.array([3.0])], ids=["zero", "diagonal", "P = 1"]
)
def test_trace_of_diagonal_matrices_is_exact(values: np.ndarray, generator: torch.Generator) -> None:
    estimate = trace(operator_of(torch.diag(torch.from_numpy(values)).unsqueeze(0)), generator=generator)
    assert (estimate.value, estimate.stderr, estimate.converged) == (values.sum(), 0, True)
    assert estimate.num_probes == 10


def test_same_seed_same_result() -> None:
    operator = build("fisher", CASES[0])
    first, second = (trace(operator, generator=torch.Generator().manual_seed(4)) for _ in range(2))
    assert first.value == second.value
    one, two = (lanczos(operator, generator=torch.Generator().manual_seed(4)) for _ in range(2))
    assert one.value == two.value
    assert torch.equal(one.vector, two.vector)
