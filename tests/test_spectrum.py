"""Lanczos on matrices that numpy diagonalises."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from gm_probe.errors import DivergedError, ResourceError
from gm_probe.linalg.lanczos import eigenpairs, lanczos
from gm_probe.linalg.operator import Operator, random_signs, random_start


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


@pytest.mark.parametrize("method", ["to", "double"])
def test_vectors_that_memory_does_not_hold_are_told(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where they are kept, and where they are orthogonalised: smaller batches would not help."""
    operator = operator_of(with_spectrum(np.linspace(0, 1, 30), dtype=torch.float32))
    start, plain = random_start(operator, torch.Generator().manual_seed(0)), getattr(Tensor, method)
    calls = []

    def scarce(tensor: Tensor, *arguments: object) -> Tensor:
        calls.append(arguments)
        if len(calls) == 5:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return plain(tensor, *arguments)  # type: ignore[no-any-return]

    monkeypatch.setattr(Tensor, method, scarce)
    with pytest.raises(ResourceError, match=r"\d Lanczos vectors of 30 parameters; use fewer steps"):
        eigenpairs(operator, start, tolerance=0)


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


def test_not_a_number_is_refused(generator: torch.Generator) -> None:
    operator = operator_of(torch.full((1, 3, 3), math.nan))
    with pytest.raises(DivergedError, match="finite"):
        lanczos(operator, generator=generator)


# several eigenpairs


def distinct(values: np.ndarray, noise: float) -> np.ndarray:
    """Descending, repeated ones once: a Krylov space holds one vector of each eigenspace, but for rounding."""
    ordered = np.sort(values)[::-1]
    if not len(ordered):
        return ordered
    return ordered[np.r_[True, -np.diff(ordered) > noise]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize(("top", "bottom"), [(3, 0), (0, 3), (2, 2), (1, 1)])
@pytest.mark.parametrize("name", SPECTRA)
def test_largest_and_smallest_eigenpairs(
    name: str, top: int, bottom: int, dtype: torch.dtype, generator: torch.Generator
) -> None:
    terms = with_spectrum(SPECTRA[name], dtype=dtype)
    operator, scale = operator_of(terms), float(np.abs(SPECTRA[name]).max())
    noise = (2e-5 if dtype == torch.float32 else 1e-10) * scale
    start = random_start(operator, generator)
    highest, lowest = eigenpairs(operator, start, top=top, bottom=bottom, tolerance=1e-6)
    for pairs, truth, wanted in (
        (highest, distinct(SPECTRA[name], noise), top),
        (lowest, distinct(SPECTRA[name], noise)[::-1], bottom),
    ):
        found = [pair.value for pair in pairs]
        assert min(wanted, len(truth)) <= len(found) <= wanted
        once = distinct(np.array(found), noise)[:: -1 if pairs is lowest else 1]
        np.testing.assert_allclose(once, truth[: len(once)], rtol=1e-5, atol=noise)
        for pair in pairs:
            assert pair.converged
            residual = float((terms[0].double() @ pair.vector.double() - pair.value * pair.vector).norm())
            assert pair.residual == pytest.approx(residual, rel=1e-3, abs=noise)
            assert pair.vector.dtype == dtype
        if pairs:
            vectors = torch.stack([pair.vector for pair in pairs]).double()
            torch.testing.assert_close(vectors @ vectors.T, torch.eye(len(pairs)).double(), rtol=0, atol=1e-5)


def test_all_eigenpairs_when_the_space_is_exhausted(generator: torch.Generator) -> None:
    terms = with_spectrum([-3.0, -1.0, 0.5, 2.0, 7.0])
    operator = operator_of(terms)
    highest, lowest = eigenpairs(operator, random_start(operator, generator), top=9, tolerance=0)
    assert [pair.value for pair in highest] == pytest.approx([7, 2, 0.5, -1, -3], abs=1e-12)
    assert lowest == []
    assert all(pair.converged and pair.iterations == 5 for pair in highest)


def test_an_invariant_subspace_ends_it() -> None:
    """From a start in the span of three eigenvectors no product leads out of it."""
    values = torch.linspace(1, 10, 10, dtype=torch.float64)
    start = torch.zeros(10, dtype=torch.float64)
    start[[1, 4, 6]] = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    highest, lowest = eigenpairs(operator_of(torch.diag(values)[None]), start, top=3, bottom=3, tolerance=0)
    assert [pair.value for pair in highest] == pytest.approx([7, 5, 2], abs=1e-12)
    assert [pair.value for pair in lowest] == pytest.approx([2, 5, 7], abs=1e-12)
    assert all(pair.iterations == 3 and pair.converged for pair in (*highest, *lowest))


def test_unfinished_eigenpairs_say_so(generator: torch.Generator) -> None:
    """The outlier is done long before the edge of the bulk."""
    operator = diagonal(np.r_[np.linspace(0, 1, 400), 9.0])
    pairs, _ = eigenpairs(
        operator, random_start(operator, generator), top=2, tolerance=1e-8, max_iterations=12
    )
    assert [pair.converged for pair in pairs] == [True, False]
    assert pairs[0].value == pytest.approx(9, rel=1e-8)


# plateaus


def diagonal(values: np.ndarray, dtype: torch.dtype = torch.float64) -> Operator:
    """A matrix whose eigenvectors are the axes."""
    v = torch.from_numpy(np.asarray(values)).to(dtype)
    return Operator(lambda x: v * x, lambda x: (v * x * x).sum()[None], len(v), dtype, v.device)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("top", [1.1, 1.3, 3.0])
@pytest.mark.parametrize("bulk", [np.full(998, 0.05), np.linspace(0, 0.05, 998)], ids=["flat", "spread"])
def test_a_close_second_eigenvalue_does_not_hide_the_largest(
    bulk: np.ndarray, top: float, dtype: torch.dtype
) -> None:
    """A plateau at the second eigenvalue must not be trusted."""
    operator = diagonal(np.r_[top, 1.0, bulk], dtype)
    for seed in range(20):
        found = lanczos(operator, generator=torch.Generator().manual_seed(seed))
        assert found.converged
        assert found.value == pytest.approx(top, rel=0.01)


def test_a_start_near_the_eigenvector_takes_as_many_products_as_patience_asks() -> None:
    operator = diagonal(np.r_[5.0, np.linspace(0, 1, 50)])
    start = torch.full((51,), 1e-4, dtype=torch.float64)
    start[0] = 1
    [found], _ = eigenpairs(operator, start, patience=1)
    unit = start / start.norm()
    values = torch.cat([torch.tensor([5.0]), torch.linspace(0, 1, 50)]).double()
    assert (found.iterations, found.converged) == (1, True)
    assert found.value == pytest.approx(float(values @ unit.square()), rel=1e-12)
    assert found.residual == pytest.approx(float((values * unit - found.value * unit).norm()), rel=1e-9)
    [twice], _ = eigenpairs(operator, start, patience=2)
    assert (twice.iterations, twice.converged) == (2, True)


def test_random_vectors_are_drawn_where_the_generator_is() -> None:
    """Without a place torch draws on the CPU, and refuses a GPU's generator."""
    operator = Operator(lambda v: v, lambda v: v, 5, torch.float32, torch.device("cpu"))
    draws: list[torch.device] = []

    class Watched(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func in (torch.randn, torch.randint):
                draws.append(torch.device(kwargs["device"]))
            return func(*args, **(kwargs or {}))

    generator = torch.Generator().manual_seed(0)
    with Watched():
        start, signs = random_start(operator, generator), random_signs(operator, generator, torch.float64)
    assert draws == [generator.device] * 2
    assert start.dtype == signs.dtype == torch.float64
    assert set(signs.tolist()) <= {-1.0, 1.0}
