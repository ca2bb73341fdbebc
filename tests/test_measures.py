"""`measure`: its figures, what it refuses, and that it leaves the model and the global generator alone."""

from __future__ import annotations

import copy
import itertools
import json
import math
import re
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ATTENTION, BY_NAME, CASES, Case
from hypothesis import given
from hypothesis import settings as settings_of
from hypothesis import strategies as st
from networks import BagOfWords
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from gm_probe.data.batches import Batches
from gm_probe.errors import (
    CheckpointError,
    DataError,
    DerivativeError,
    DivergedError,
    PrecisionError,
    UsageError,
)
from gm_probe.linalg.work import Work
from gm_probe.measures import measure as measures
from gm_probe.measures.catalogue import MEASURES
from gm_probe.measures.context import MeasurementContext
from gm_probe.measures.costs import expected_cost
from gm_probe.measures.estimates import Estimate
from gm_probe.measures.measure import measure
from gm_probe.measures.names import check_names
from gm_probe.measures.settings import Settings

FAST = Settings(num_starts=2, max_probes=5)

MEASURES_OF_VECTORS = [
    name  # of inputs that are no images, and of which nothing else is known
    for name in MEASURES
    if name not in ("flip_rate", "crop_rate", "distance_from_initialization", "input_jacobian_norm")
]


def values(
    model: nn.Module, batches: Batches, names: list[str], settings: Settings = FAST
) -> dict[str, float]:
    return {name: row.value for name, row in measure(model, batches, names, settings).rows.items()}  # type: ignore[misc]


def assert_same(found: dict[str, float | None], expected: dict[str, float | None]) -> None:
    assert found.keys() == expected.keys()
    undefined = {name for name, value in expected.items() if value is None}
    assert {name for name, value in found.items() if value is None} == undefined
    defined = {name: value for name, value in expected.items() if name not in undefined}
    assert {name: found[name] for name in defined} == pytest.approx(defined, rel=1e-6)


# figures


@pytest.mark.parametrize("case", [*CASES, ATTENTION], ids=lambda case: case.name)
def test_against_dense_matrices(case: Case) -> None:
    settings = Settings(eigen_tolerance=1e-6, trace_tolerance=0.0, max_probes=40, num_starts=1)
    rows = measure(case.model, case.batches(), settings=settings).rows
    for kind, terms in (("fisher", case.fisher_terms), ("hessian", case.hessian_terms)):
        eigenvalues = np.linalg.eigvalsh(terms.mean(0).numpy())
        assert rows[f"{kind}_lambda_max"].value == pytest.approx(eigenvalues[-1], rel=1e-5)
        found = rows[f"{kind}_trace"]
        assert found.value is not None
        if kind == "fisher" or case.affine:  # of three classes by every column of the covariance's root
            assert found.stderr is None
            assert found.value == pytest.approx(eigenvalues.sum(), rel=1e-9)
        else:
            assert found.stderr is not None
            assert abs(found.value - eigenvalues.sum()) < 4 * found.stderr


def test_error_and_cross_entropy_by_hand(case: Case) -> None:
    model, x, y = case.data
    z = model(x).detach().numpy()
    p = np.exp(z) / np.exp(z).sum(1, keepdims=True)
    losses = -np.log(p[np.arange(7), y.numpy()])
    wrong = z.argmax(1) != y.numpy()
    rows = measure(case.model, case.batches(), ["error", "cross_entropy"]).rows
    assert rows["error"].value == pytest.approx(wrong.mean())
    assert rows["error"].stderr is None
    rate = wrong.mean()
    assert rows["error"].stderr_examples == pytest.approx(math.sqrt(rate * (1 - rate) / 6))
    assert rows["cross_entropy"].value == pytest.approx(losses.mean(), rel=1e-12)
    assert rows["cross_entropy"].stderr_examples == pytest.approx(losses.std(ddof=1) / math.sqrt(7))


@pytest.mark.parametrize("kind", ["fisher", "hessian"])
def test_example_error_of_an_eigenvalue(kind: str, case: Case) -> None:
    """The spread over examples of vᵀA_x v at the top eigenvector v."""
    terms = case.fisher_terms if kind == "fisher" else case.hessian_terms
    _, vectors = np.linalg.eigh(terms.mean(0).numpy())
    each = np.einsum("i,nij,j->n", vectors[:, -1], terms.numpy(), vectors[:, -1])
    name = f"{kind}_lambda_max"
    row = measure(case.model, case.batches(), [name], Settings(eigen_tolerance=1e-7)).rows[name]
    assert row.stderr_examples == pytest.approx(each.std(ddof=1) / math.sqrt(7), rel=1e-3)


def test_effective_rank_is_the_ratio(case: Case) -> None:
    eigenvalues = np.linalg.eigvalsh(case.fisher_terms.mean(0).numpy())
    settings = Settings(eigen_tolerance=1e-7)
    names = ["effective_rank", "fisher_trace", "fisher_lambda_max"]
    rows = measure(case.model, case.batches(), names, settings).rows
    rank, total, top = (rows[name] for name in names)
    assert rank.value == pytest.approx(eigenvalues.sum() / eigenvalues[-1], rel=1e-5)
    assert rank.converged
    relative = math.hypot(total.stderr_examples / total.value, top.stderr_examples / top.value)
    assert rank.stderr_examples == pytest.approx(rank.value * relative, rel=1e-9)
    assert rank.stderr == pytest.approx(rank.value * top.stderr / top.value, rel=1e-9)


def test_smallest_eigenvalue(case: Case) -> None:
    eigenvalues, vectors = np.linalg.eigh(case.hessian_terms.mean(0).numpy())
    each = np.einsum("i,nij,j->n", vectors[:, 0], case.hessian_terms.numpy(), vectors[:, 0])
    name = "hessian_lambda_min"
    row = measure(case.model, case.batches(), [name], Settings(eigen_tolerance=1e-7)).rows[name]
    assert row.converged
    assert row.value == pytest.approx(eigenvalues[0], rel=1e-5, abs=1e-9)
    if eigenvalues[0] < -1e-3:  # else its eigenspace has many dimensions, and one vector of it no meaning
        assert row.stderr_examples == pytest.approx(each.std(ddof=1) / math.sqrt(7), rel=1e-3)


@pytest.mark.parametrize("kind", ["fisher", "hessian"])
def test_top_eigenvalues(kind: str, case: Case) -> None:
    terms = case.fisher_terms if kind == "fisher" else case.hessian_terms
    eigenvalues = np.linalg.eigvalsh(terms.mean(0).numpy())[::-1]
    name = f"{kind}_lambda_max"
    settings = Settings(eigen_tolerance=1e-6, top_eigenvalues=3)
    row = measure(case.model, case.batches(), [name], settings).rows[name]
    found = row.details["eigenvalues"]
    assert [pair["value"] for pair in found] == pytest.approx(eigenvalues[:3], rel=1e-5)
    assert all(pair["converged"] for pair in found)
    assert row.value == pytest.approx(found[0]["value"], rel=1e-5)


def test_parameter_norm(case: Case) -> None:
    row = measure(case.model, case.batches(), ["parameter_norm"]).rows["parameter_norm"]
    assert row.value == pytest.approx(float(case.theta.norm()), rel=1e-12)
    assert (row.stderr, row.stderr_examples, row.num_evals) == (None, None, 0)
    assert row.details["reason_stderr_examples"] == "needs no examples"


@pytest.mark.parametrize("pattern", ["weight", r"^4\.", "2.bias"])
def test_subset_of_the_parameters_is_a_submatrix(pattern: str) -> None:
    """Of F and H the rows and columns of these parameters, and nothing of the others'."""
    case = BY_NAME["relu-mlp"]
    chosen = torch.cat(
        [
            torch.full((p.numel(),), bool(re.search(pattern, name)))
            for name, p in case.data[0].named_parameters()
        ]
    )
    settings = Settings(params=pattern, eigen_tolerance=1e-7)
    report = measure(case.model, case.batches(), settings=settings)
    assert report.num_parameters == int(chosen.sum())
    for kind, terms in (("fisher", case.fisher_terms), ("hessian", case.hessian_terms)):
        eigenvalues = np.linalg.eigvalsh(terms.mean(0)[chosen][:, chosen].numpy())
        assert report.rows[f"{kind}_lambda_max"].value == pytest.approx(eigenvalues[-1], rel=1e-5)
        assert report.rows[f"{kind}_trace"].value == pytest.approx(eigenvalues.sum(), rel=1e-9)
    norm = values(case.model, case.batches(), ["parameter_norm"], settings)["parameter_norm"]
    assert norm == pytest.approx(float(case.theta[chosen].norm()))


@pytest.mark.parametrize("pattern", ["nowhere", "("])
def test_a_pattern_that_chooses_nothing_or_is_none(pattern: str) -> None:
    case = BY_NAME["relu-mlp"]
    with pytest.raises(UsageError, match=re.escape(repr(pattern))):
        measure(case.model, case.batches(), ["fisher_trace"], Settings(params=pattern))


def test_examples_needed_for_a_target_error() -> None:
    case = BY_NAME["relu-mlp"]
    names = ["fisher_trace", "cross_entropy", "parameter_norm"]
    rows = measure(case.model, case.batches(), names, Settings(target_error=0.03)).rows
    for name in names[:2]:
        row = rows[name]
        needed = row.details["examples_needed"]
        # the error falls as one over the square root of the number of examples
        expected = row.stderr_examples * np.sqrt(7 / np.array([needed, needed - 1]))
        assert expected[0] <= 0.03 * row.value < expected[1]
    assert "examples_needed" not in rows["parameter_norm"].details
    assert "examples_needed" not in measure(case.model, case.batches(), names).rows["fisher_trace"].details


def small_net(depth: int, width: int, activation: type[nn.Module], classes: int) -> nn.Sequential:
    sizes = [3, *[width] * depth]
    layers = [m for i, o in itertools.pairwise(sizes) for m in (nn.Linear(i, o), activation())]
    return nn.Sequential(*layers, nn.Linear(sizes[-1], classes))


class Residual(nn.Module):
    """Convolution and batch norm, to which their input is added in place, and an activation."""

    def __init__(self, width: int, activation: type[nn.Module]) -> None:
        super().__init__()
        self.convolution, self.norm = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.activation = nn.ReLU(inplace=True) if activation is nn.ReLU else activation()
        with torch.no_grad():
            for tensor in (self.norm.running_mean, self.norm.weight, self.norm.bias):
                tensor.add_(0.3 * torch.randn(width))  # type: ignore[union-attr]
            self.norm.running_var.uniform_(0.5, 2)  # type: ignore[union-attr]

    def forward(self, x: Tensor) -> Tensor:
        out = self.norm(self.convolution(x))
        out += x
        return self.activation(out)


class Tokens(nn.Module):
    """Embedded tokens, ``depth`` times through one and the same attention layer, and layer norm."""

    def __init__(self, depth: int, width: int, classes: int) -> None:
        super().__init__()
        self.depth, self.embedding, self.norm = depth, nn.Embedding(5, width), nn.LayerNorm(width)
        self.keys, self.head = nn.Linear(width, 2 * width), nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        h = self.embedding(x)
        for _ in range(self.depth):
            queries, keys = self.keys(h).chunk(2, -1)
            h = self.norm(h + (queries @ keys.transpose(1, 2)).softmax(-1) @ h)
        return self.head(h.mean(1))


def random_case(
    kind: str, depth: int, width: int, activation: type[nn.Module], classes: int, examples: int
) -> tuple[nn.Module, Tensor]:
    if kind == "tokens":
        return Tokens(depth, width + 1, classes), torch.randint(0, 5, (examples, 4))
    if kind == "images":
        blocks = [Residual(width, activation) for _ in range(depth)]
        head = [nn.MaxPool2d(2), nn.Flatten(), nn.Linear(4 * width, classes)]
        return nn.Sequential(nn.Conv2d(1, width, 3, padding=1), *blocks, *head), torch.randn(
            examples, 1, 4, 4
        )
    return small_net(depth, width, activation, classes), torch.randn(examples, 3)


@settings_of(max_examples=12, deadline=None, derandomize=True)
@given(
    kind=st.sampled_from(["vectors", "images", "tokens"]),
    depth=st.integers(0, 3),
    width=st.integers(1, 6),
    activation=st.sampled_from([nn.ReLU, nn.Tanh, nn.GELU, nn.SiLU]),
    classes=st.sampled_from([2, 3, 5, 20]),
    examples=st.integers(1, 12),
    batch_size=st.integers(1, 13),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    labeled=st.booleans(),
    seed=st.integers(0, 2**20),
)
def test_any_small_network_against_dense_matrices(
    kind: str,
    depth: int,
    width: int,
    activation: type[nn.Module],
    classes: int,
    examples: int,
    batch_size: int,
    dtype: torch.dtype,
    labeled: bool,
    seed: int,
) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model, x = random_case(kind, depth, width, activation, classes, examples)
        model, y = model.to(dtype).eval(), torch.randint(0, classes, (examples,))
    x = x.to(dtype) if x.is_floating_point() else x
    settings = Settings(trace_tolerance=0.02, max_probes=60, seed=seed)
    report = measure(
        model, Batches.from_tensors(x, y if labeled else None, batch_size=batch_size), None, settings
    )

    exact = copy.deepcopy(model).double()
    inputs = x.double() if x.is_floating_point() else x
    flat = nn.utils.parameters_to_vector(exact.parameters()).detach()
    names = [name for name, _ in exact.named_parameters()]
    sizes, shapes = zip(*[(p.numel(), p.shape) for p in exact.parameters()], strict=True)

    def logits(vector: Tensor) -> Tensor:
        pieces = [p.view(shape) for p, shape in zip(vector.split(sizes), shapes, strict=True)]
        return torch.func.functional_call(exact, dict(zip(names, pieces, strict=True)), (inputs,))

    labels = y if labeled else logits(flat).argmax(1)
    jacobian = torch.autograd.functional.jacobian(logits, flat)
    p = logits(flat).softmax(1)
    inner = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    matrices = {
        "fisher": (jacobian.transpose(1, 2) @ inner @ jacobian).mean(0).detach(),
        "hessian": torch.autograd.functional.hessian(
            lambda vector: functional.cross_entropy(logits(vector), labels), flat
        ),
    }
    assert report.num_parameters == len(flat)
    for name, matrix in matrices.items():
        eigenvalues = np.linalg.eigvalsh(matrix.numpy())
        top, total = report.rows[f"{name}_lambda_max"], report.rows[f"{name}_trace"]
        noise = (1e-4 if dtype == torch.float32 else 1e-8) * np.abs(eigenvalues).max() + 1e-12
        assert top.converged
        assert top.value == pytest.approx(eigenvalues[-1], rel=0.012, abs=noise)
        assert abs(total.value - eigenvalues.sum()) <= 5 * (total.stderr or 0) + noise
        assert total.stderr is None or total.stderr <= 0.02 * abs(total.value) or not total.converged


def test_one_example_has_no_example_error() -> None:
    model, x, _ = BY_NAME["relu-mlp"].data
    row = measure(model, Batches.from_tensors(x[:1]), ["fisher_lambda_max"]).rows["fisher_lambda_max"]
    assert row.stderr_examples is None
    assert "reason_stderr_examples" in row.details


# what the figures may not depend on


def test_no_figure_depends_on_which_others_are_asked(case: Case) -> None:
    alone: dict[str, float] = {}
    for name in MEASURES:
        alone |= values(case.model, case.batches(), [name])
    assert_same(values(case.model, case.batches(), list(MEASURES)), alone)
    assert_same(values(case.model, case.batches(), list(reversed(MEASURES))), alone)


@pytest.mark.parametrize("batch_size", [1, 7])
@pytest.mark.parametrize(
    "case", [BY_NAME["tanh-mlp"], BY_NAME["batch-norm-cnn"], BY_NAME["tied"]], ids=lambda case: case.name
)
def test_batch_size_does_not_matter(case: Case, batch_size: int) -> None:
    one = values(case.model, case.batches(3), list(MEASURES))
    other = values(case.model, case.batches(batch_size), list(MEASURES))
    assert_same(other, one)


def test_training_mode_is_not_measured() -> None:
    case = BY_NAME["batch-norm-cnn"]
    expected = values(case.model, case.batches(), list(MEASURES))
    assert values(case.model.train(), case.batches(), list(MEASURES)) == expected


def test_seed() -> None:
    case = BY_NAME["tanh-mlp"]
    names = ["local_inconsistency", "hessian_trace", "average_inconsistency"]

    def at(seed: int) -> dict[str, float]:
        return values(case.model, case.batches(), names, Settings(seed=seed, max_probes=10))

    assert at(0) == at(0)
    assert all(at(0)[name] != at(1)[name] for name in names)
    exact = [values(case.model, case.batches(), ["fisher_trace"], Settings(seed=seed)) for seed in (0, 1)]
    assert exact[0] == exact[1]


# labels


@pytest.mark.parametrize("name", ["hessian_lambda_max", "hessian_trace"])
def test_predicted_labels_are_the_argmax(name: str, case: Case) -> None:
    model, x, _ = case.data
    predicted = measure(case.model, case.batches(labeled=False), [name], FAST).rows[name]
    given = measure(case.model, Batches.from_tensors(x, model(x).argmax(1), batch_size=3), [name], FAST).rows[
        name
    ]
    if case.affine and name == "hessian_trace":
        assert (predicted.details["labels"], given.details["labels"]) == ("none needed", "none needed")
    else:
        assert (predicted.details["labels"], given.details["labels"]) == ("predicted", "given")
    assert predicted.value == given.value


def test_label_free_measures_never_read_labels(case: Case) -> None:
    names = [n for n, m in MEASURES.items() if not m.needs_labels and "hessian" not in n]
    with_labels = values(case.model, case.batches(), names)
    assert values(case.model, case.batches(labeled=False), names) == with_labels


def test_default_measures_skip_those_that_need_absent_labels() -> None:
    case = BY_NAME["relu-mlp"]
    assert "error" not in measure(case.model, case.batches(labeled=False), settings=FAST).rows
    assert "error" in measure(case.model, case.batches(), settings=FAST).rows


# what is refused


@pytest.mark.parametrize("name", ["error", "cross_entropy"])
def test_needs_labels(name: str) -> None:
    case = BY_NAME["relu-mlp"]
    with pytest.raises(DataError, match=f"{name} needs labels"):
        measure(case.model, case.batches(labeled=False), [name])


@pytest.mark.parametrize("name", ["error", "cross_entropy", "hessian_trace", "hessian_lambda_max"])
@pytest.mark.parametrize("label", [3, -1, -100])
def test_labels_that_are_no_classes(label: int, name: str) -> None:
    model, x, y = BY_NAME["tanh-mlp"].data  # tr H of the ReLU network needs no labels
    labels = y.clone()
    labels[4] = label
    with pytest.raises(DataError, match="labels"):
        measure(model, Batches.from_tensors(x, labels), [name])


def test_unknown_measure() -> None:
    case = BY_NAME["relu-mlp"]
    with pytest.raises(UsageError, match="'sharpnes'"):
        measure(case.model, case.batches(), ["sharpnes"])


def test_no_trainable_parameters() -> None:
    case = BY_NAME["relu-mlp"]
    with pytest.raises(UsageError, match="no trainable parameters"):
        measure(case.model.requires_grad_(False), case.batches(), ["fisher_trace"])


@pytest.mark.parametrize("name", ["0.weight", "1.weight", "1.running_var", "4.running_mean"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_weights_that_are_not_finite_are_named(name: str, bad: float) -> None:
    case = BY_NAME["batch-norm-cnn"]
    model = case.model
    with torch.no_grad():
        model.state_dict()[name].view(-1)[-1] = bad
    with pytest.raises(CheckpointError, match=f"'{name}'"):
        measure(model, case.batches(), ["fisher_trace"])


class WritesToItsInput(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        x -= 0.5
        return super().forward(x)


@pytest.mark.parametrize(
    "make",
    [
        lambda: WritesToItsInput(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)),
        lambda: nn.Sequential(nn.ReLU(inplace=True), nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)),
    ],
)
def test_a_model_that_writes_to_its_input(make: Callable[[], nn.Sequential]) -> None:
    torch.manual_seed(0)
    model = make().double()
    x = torch.randn(6, 3, dtype=torch.float64)
    before, y = x.clone(), torch.tensor([0, 1, 2, 0, 1, 2])
    found = values(model, Batches.from_tensors(x, y), list(MEASURES_OF_VECTORS))
    assert torch.equal(x, before)
    moved = nn.Sequential(*model[1:]) if isinstance(model[0], nn.ReLU) else nn.Sequential(*model)
    shifted = before.relu() if isinstance(model[0], nn.ReLU) else before - 0.5
    expected = values(moved, Batches.from_tensors(shifted, y), list(MEASURES_OF_VECTORS))
    assert_same(found, expected)


def test_what_two_figures_share_is_taken_once() -> None:
    case = BY_NAME["tied"]
    names = ["fisher_lambda_max", "fisher_trace", "effective_rank"]
    rows = measure(case.model, case.batches(), names).rows
    assert rows["effective_rank"].num_evals == 0
    alone = measure(case.model, case.batches(), ["effective_rank"]).rows["effective_rank"]
    assert alone.value == rows["effective_rank"].value
    assert alone.num_evals == pytest.approx(sum(rows[name].num_evals for name in names[:2]), abs=2e-3)


def test_effective_rank_does_not_hang_on_further_eigenvalues() -> None:
    case = BY_NAME["batch-norm-cnn"]
    settings = Settings(top_eigenvalues=8, max_iterations=10, eigen_tolerance=0.01)
    rows = measure(case.model, case.batches(), ["fisher_lambda_max", "effective_rank"], settings).rows
    listed = [row["converged"] for row in rows["fisher_lambda_max"].details["eigenvalues"]]
    assert listed[0]
    assert not all(listed)
    assert not rows["fisher_lambda_max"].converged
    assert rows["effective_rank"].converged


def test_an_estimator_coarser_than_the_target_is_told() -> None:
    case = BY_NAME["tanh-mlp"]
    names = ["fisher_lambda_max", "cross_entropy"]
    rows = measure(case.model, case.batches(), names, Settings(target_error=1e-15)).rows
    row = rows["fisher_lambda_max"]
    assert row.details["estimator_above_target"] == pytest.approx(row.stderr / row.value)  # type: ignore[operator]
    assert "estimator_above_target" not in rows["cross_entropy"].details


def test_outputs_that_depend_on_no_measured_parameter() -> None:
    model = nn.Linear(3, 2)
    model.unused = nn.Linear(2, 2)
    names = ["local_inconsistency", "local_inconsistency_converged", "fisher_lambda_max", "fisher_trace"]
    names += ["hessian_lambda_max", "hessian_trace"]
    found = values(model, Batches.from_tensors(torch.ones(4, 3)), names, replace(FAST, params="unused"))
    assert found == dict.fromkeys(names, 0.0)


class Detached(nn.Sequential):
    """Its first layer is hidden from autograd."""

    def forward(self, x: Tensor) -> Tensor:
        return self[1](self[0](x).detach())


class Graphless(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            return super().forward(x)


@pytest.mark.parametrize(("net", "hidden"), [(Detached, 2), (Graphless, 4)])
def test_parameters_hidden_from_autograd_are_named(net: type[nn.Sequential], hidden: int) -> None:
    """They would count as constants: of ``Graphless``, every measure would be 0 or contradict another."""
    model, batches = net(nn.Linear(3, 4), nn.Linear(4, 2)), Batches.from_tensors(torch.randn(5, 3))
    for name in ["local_inconsistency", "fisher_lambda_max", "fisher_trace", "hessian_trace"]:
        with pytest.raises(UsageError, match=rf"^{name}: {hidden} of 4 .*'0\.weight' first"):
            measure(model, batches, [name], FAST)
    assert measure(model, batches, ["mean_entropy"]).rows["mean_entropy"].value > 0  # type: ignore[operator]
    model[0].requires_grad_(False)
    if net is Detached:
        plain = measure(nn.Sequential(*model), batches, ["fisher_trace"]).rows["fisher_trace"]
        assert measure(model, batches, ["fisher_trace"]).rows["fisher_trace"].value == plain.value


@pytest.mark.parametrize("error", [RuntimeError("no backward"), ValueError("no backward")])
@pytest.mark.parametrize(
    "name", ["local_inconsistency", "fisher_trace", "hessian_lambda_max", "input_jacobian_norm"]
)
def test_a_backward_pass_that_raises_is_told(name: str, error: Exception) -> None:
    class Refusing(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):  # type: ignore[no-untyped-def,override]
            return x * 2

        @staticmethod
        def backward(ctx, gradient):  # type: ignore[no-untyped-def,override]
            raise error

    class Net(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return Refusing.apply(super().forward(x))

    with pytest.raises(UsageError, match=rf"^{name}: the model cannot be differentiated .*\(no backward\)"):
        measure(Net(3, 2), Batches.from_tensors(torch.ones(4, 3)), [name], FAST)


def test_what_a_model_lacks_a_derivative_for_is_undefined_and_the_rest_is_kept() -> None:
    """torch has no second derivative of Hardsigmoid."""
    model = nn.Sequential(nn.Linear(3, 4), nn.Hardsigmoid(), nn.Linear(4, 2))
    batches = Batches.from_tensors(torch.randn(6, 3, generator=torch.Generator().manual_seed(0)))
    names = ["hessian_lambda_max", "fisher_lambda_max", "hessian_lambda_min"]
    rows = measure(model, batches, names, FAST).rows
    alone = measure(model, batches, ["fisher_lambda_max"], FAST).rows["fisher_lambda_max"]
    assert rows["fisher_lambda_max"].value == alone.value
    for name in (names[0], names[2]):
        assert (rows[name].value, rows[name].converged) == (None, False)
        assert "no second derivative" in rows[name].details["reason"]
        assert "--measures" in rows[name].details["reason"]
    with pytest.raises(DerivativeError, match=r"^hessian_lambda_max: .*no second derivative"):
        measure(model, batches, [names[0], names[2]], FAST)


def test_a_model_left_in_train_mode_is_measured_in_eval_mode_and_left_so() -> None:
    model = nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Dropout(0.5), nn.Linear(5, 2))
    batches = Batches.from_tensors(torch.randn(8, 3, generator=torch.Generator().manual_seed(0)))
    names = ["local_inconsistency", "fisher_lambda_max", "fisher_trace", "hessian_lambda_max", "mean_entropy"]
    inference = measure(copy.deepcopy(model).eval(), batches, names, FAST)
    before = copy.deepcopy(model.train().state_dict())
    rows = measure(model, batches, names, FAST).rows
    assert {name: row.value for name, row in rows.items()} == {
        name: row.value for name, row in inference.rows.items()
    }
    assert all(module.training for module in model.modules())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_what_is_not_finite_of_one_measure_leaves_the_others() -> None:
    """Of sin(10²⁵ a) the value is bounded and the second derivative overflows in float32."""

    class Steep(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Parameter(torch.tensor([1.0, 2.0]))

        def forward(self, x: Tensor) -> Tensor:
            return torch.sin(self.a * 1e25) * x

    batches = Batches.from_tensors(torch.linspace(0.1, 1, 5)[:, None])
    names = ["hessian_lambda_max", "parameter_norm"]
    rows = measure(Steep(), batches, names, FAST).rows
    assert rows["parameter_norm"].value == pytest.approx(5**0.5)
    assert (rows[names[0]].value, rows[names[0]].converged) == (None, False)
    assert "is not finite" in rows[names[0]].details["reason"]
    with pytest.raises(DivergedError, match=r"^hessian_lambda_max: .*is not finite"):
        measure(Steep(), batches, names[:1], FAST)


def test_what_is_not_finite_is_null_in_json() -> None:
    """A radius whose square overflows in float32: no start has a value."""
    batches = Batches.from_tensors(torch.randn(6, 3, generator=torch.Generator().manual_seed(0)))
    settings = Settings(rho=1e38, num_starts=2)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    report = measure(model, batches, ["local_inconsistency", "parameter_norm"], settings)
    rows = json.loads(json.dumps(report.as_dict(checkpoint="", model=""), allow_nan=False))["measures"]
    assert rows["local_inconsistency"]["value"] is None
    assert rows["local_inconsistency"]["starts"] == [None, None]
    assert "--dtype float64" in rows["local_inconsistency"]["reason"]
    assert rows["parameter_norm"]["value"] > 0


def test_a_missing_derivative_ends_several_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """One of them alone may have seen it: the others would wait for its next sum."""
    model = nn.Sequential(nn.Linear(3, 4), nn.Hardsigmoid(), nn.Linear(4, 2))
    monkeypatch.setattr(measures, "count", lambda: 2)
    with pytest.raises(DerivativeError, match=r"^hessian_lambda_max: "):
        measure(model, Batches.from_tensors(torch.ones(6, 3)), ["parameter_norm", "hessian_lambda_max"], FAST)


def test_batchwise_inconsistency_is_refused_before_anything_is_measured() -> None:
    with pytest.raises(UsageError, match="one process"):
        check_names(["error", "local_inconsistency_batchwise"], labeled=True, num_processes=2)


def test_no_input_gradient_is_undefined() -> None:
    class Steps(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.sign().detach())

    names = ["input_jacobian_norm", "mean_entropy"]
    rows = measure(Steps(3, 2), Batches.from_tensors(torch.ones(4, 3)), names).rows
    assert rows[names[0]].value is None
    assert rows[names[0]].details["reason"] == "the outputs have no gradient with respect to the inputs"
    assert rows[names[1]].value is not None


@pytest.mark.parametrize("name", MEASURES)
def test_every_pass_is_counted(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Examples that the model saw, and what the cost is reckoned by; a few trials on 4 or 16 examples are free."""
    counted, seen, add = [], [], Work.add

    def counting(work: Work, passes: float, batch_size: int) -> None:
        counted.append(batch_size)
        add(work, passes, batch_size)

    monkeypatch.setattr(Work, "add", counting)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = small_net(2, 4, nn.GELU, 3)
        x, labels = torch.randn(200, 3), torch.randint(0, 3, (200,))
    model.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    measure(model, Batches.from_tensors(x, labels, batch_size=64), [name], FAST)
    assert 0 <= sum(seen) - sum(counted) <= 7 * 16 + 6 * 4
    assert sum(counted) >= 2 * len(x)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_refused(dtype: torch.dtype) -> None:
    batches = Batches.from_tensors(torch.ones(4, 3, dtype=dtype))
    with pytest.raises(UsageError, match=r"the weights are torch\.\w+16, .* Measure model\.float\(\)"):
        measure(nn.Linear(3, 2).to(dtype), batches, ["fisher_trace"])


def test_a_model_whose_train_changes_its_weights_is_measured_as_it_is() -> None:
    """As adapters do that are merged into the weights they belong to."""

    class Adapted(nn.Linear):
        def __init__(self) -> None:
            super().__init__(3, 2)
            self.more = nn.Parameter(torch.full((2, 3), 0.5))
            self.merged = False

        def train(self, mode: bool = True) -> Adapted:
            super().train(mode)
            if self.merged == mode:
                self.weight.data += -self.more if mode else self.more
                self.merged = not mode
            return self

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) if self.merged else super().forward(x) + x @ self.more.T

    model = Adapted()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = measure(model, Batches.from_tensors(torch.randn(6, 3)), ["fisher_lambda_max"], FAST)
    assert (found.rows["fisher_lambda_max"].value or 0) > 0
    assert model.training
    assert not model.merged
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_products_are_taken_in_full_precision_whatever_was_set() -> None:
    places = [
        torch.backends.cuda.matmul,
        torch.backends.cudnn.conv,
        torch.backends.mkldnn.matmul,
        torch.backends.mkldnn.conv,
    ]
    seen = []

    class Looking(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            seen.append(tuple(place.fp32_precision for place in places))
            return super().forward(x)

    before = [place.fp32_precision for place in places]
    torch.backends.cuda.matmul.fp32_precision = "tf32"  # torch's getters of old then raise
    torch.backends.mkldnn.matmul.fp32_precision = "bf16"
    try:
        measure(Looking(3, 2), Batches.from_tensors(torch.ones(4, 3)), ["fisher_trace"], FAST)
        assert [place.fp32_precision for place in places] == ["tf32", before[1], "bf16", before[3]]
    finally:
        for place, precision in zip(places, before, strict=True):
            place.fp32_precision = precision
    assert set(seen) == {("ieee",) * 4}


def test_a_trace_that_cancels_is_taken_to_its_own_size() -> None:
    """tr H = tr F + tr(H − F) far below tr F: tr F's error is then told relative to tr H."""
    case = BY_NAME["tanh-mlp"]
    rows = []
    for seed in range(3):
        settings = Settings(trace_tolerance=0.1, max_probes=1000, seed=seed)
        rows.append(measure(case.model, case.batches(), ["hessian_trace"], settings).rows["hessian_trace"])
    truth = float(torch.einsum("nii->n", case.hessian_terms).mean())
    for row in rows:
        assert row.converged
        assert row.value is not None
        assert row.stderr is not None
        assert row.stderr <= 0.1 * abs(row.value)
        assert abs(row.value - truth) < 4 * row.stderr


@pytest.mark.parametrize("kind", ["fisher", "hessian"])
def test_eigenvalues_that_were_not_found_are_not_passed_over(kind: str) -> None:
    case = BY_NAME["tanh-mlp"]
    settings = Settings(top_eigenvalues=8, max_iterations=6, eigen_tolerance=1e-3)
    row = measure(case.model, case.batches(), [f"{kind}_lambda_max"], settings).rows[f"{kind}_lambda_max"]
    assert len(row.details["eigenvalues"]) == 8
    assert not all(each["converged"] for each in row.details["eigenvalues"])
    assert not row.converged
    few = Settings(top_eigenvalues=2, eigen_tolerance=1e-3)
    assert (
        measure(case.model, case.batches(), [f"{kind}_lambda_max"], few).rows[f"{kind}_lambda_max"].converged
    )


def test_eigenvalues_that_there_are_not_are_not_missed() -> None:
    batches = Batches.from_tensors(torch.ones(1, 3, dtype=torch.float64))
    settings = Settings(top_eigenvalues=5)
    row = measure(nn.Linear(3, 2).double(), batches, ["fisher_lambda_max"], settings).rows[
        "fisher_lambda_max"
    ]
    assert row.converged
    assert all(each["converged"] for each in row.details["eigenvalues"])


def test_a_grid_of_radii_has_the_converged_maximum_of_each() -> None:
    case, name = BY_NAME["tanh-mlp"], "local_inconsistency_converged"

    def row(rho: float, *more: float) -> Estimate:
        settings = Settings(rho=rho, rho_grid=more, num_starts=2)
        return measure(case.model, case.batches(), [name], settings).rows[name]

    found = row(0.1, 0.4, 0.02)
    assert [cell["rho"] for cell in found.details["grid"]] == [0.02, 0.1, 0.4]
    alone = {cell["rho"]: row(cell["rho"]) for cell in found.details["grid"]}
    for cell in found.details["grid"]:
        assert cell["value"] == pytest.approx(alone[cell["rho"]].value, rel=1e-9)
    assert "grid" not in alone[0.1].details
    context = MeasurementContext(case.model, case.batches(), Settings(), Work(case.batches().num_examples))
    _ = context.logits
    forward = context.work.evaluations
    _ = context.fisher_draft
    draft = context.work.evaluations - forward
    # v₁ and the gradients at two noise starts are paid once
    shared = 2 * (draft + 2)
    assert found.num_evals == pytest.approx(sum(each.num_evals for each in alone.values()) - shared, abs=0.01)


@pytest.mark.parametrize(
    ("dtype", "jitter", "refused"),
    [
        (torch.float32, 1e-3, True),
        (torch.float32, 1e-6, False),
        (torch.float64, 2e-9, True),
        (torch.float64, 1e-13, False),
    ],
)
def test_outputs_may_jitter_by_rounding_alone(dtype: torch.dtype, jitter: float, refused: bool) -> None:
    class Jittery(nn.Linear):
        calls = 0

        def forward(self, x: Tensor) -> Tensor:
            Jittery.calls += 1  # of the class: attributes of the module are restored after a pass
            return super().forward(x) * (1 + jitter * Jittery.calls)

    batches = Batches.from_tensors(torch.ones(4, 3, dtype=dtype))
    with pytest.raises(DataError, match="two passes") if refused else nullcontext():
        measure(Jittery(3, 2, dtype=dtype), batches, ["mean_entropy"], FAST)


@pytest.mark.parametrize(
    "wrong",
    [
        {"rho": 0.0},
        {"rho": math.nan},
        {"rho": -1.0},
        {"k_steps": 0},
        {"noise_scale": 0.0},
        {"noise_scale": math.inf},
        {"rho": math.inf},
        {"trace_tolerance": -0.1},
        {"trace_tolerance": math.nan},
        {"eigen_tolerance": math.inf},
        {"eigen_tolerance": -1.0},
        {"ascent_tolerance": math.nan},
        {"num_starts": 0},
        {"min_probes": 1},
        {"max_probes": 1},
        {"protocol": "exact"},
        {"rho_grid": (0.1, -1.0)},
        {"target_error": 1e-200},
        {"trace_tolerance": 1e-180},
        {"rho_grid": (math.nan,)},
        {"k_grid": (0,)},
        {"eta": 0.0},
        {"sub_batch": 0},
        {"top_eigenvalues": 0},
        {"target_error": -0.1},
        {"target_error": math.nan},
    ],
    ids=str,
)
def test_settings_that_make_no_sense(wrong: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        Settings(**wrong)


# the model is left as it was


class Fragile(nn.Module):
    """Raises ``error`` at its n-th call; ``error`` None only counts the calls."""

    def __init__(self, inner: nn.Module, n: int, error: BaseException | None) -> None:
        super().__init__()
        self.inner, self.n, self.error = inner, n, error
        self._calls = [0]  # a list, for a measurement restores the attributes after each pass

    @property
    def calls(self) -> int:
        return self._calls[0]

    def forward(self, x: Tensor) -> Tensor:
        self._calls[0] += 1
        if self.calls == self.n and self.error is not None:
            raise self.error
        return self.inner(x)


def prepared(case: Case) -> nn.Module:
    """A model with mixed modes, gradients and a frozen parameter."""
    model = case.model
    for index, module in enumerate(model.modules()):
        module.training = index % 2 == 0
    for index, p in enumerate(model.parameters()):
        p.grad = torch.full_like(p, float(index)) if index % 2 else None
    return model


def photograph(model: nn.Module) -> Callable[[], None]:
    """Return a check that nothing about ``model`` has changed since."""
    tensors = {name: t.detach().clone() for name, t in model.state_dict().items()}
    identities = [id(p) for p in model.parameters()]
    modes = [module.training for module in model.modules()]
    flags = [p.requires_grad for p in model.parameters()]
    grads = [None if p.grad is None else p.grad.clone() for p in model.parameters()]

    def check() -> None:
        assert list(tensors) == list(model.state_dict())
        for name, value in model.state_dict().items():
            assert torch.equal(value, tensors[name]), name
        assert [id(p) for p in model.parameters()] == identities
        assert [module.training for module in model.modules()] == modes
        assert [p.requires_grad for p in model.parameters()] == flags
        assert all(p.is_leaf for p in model.parameters())
        for p, grad in zip(model.parameters(), grads, strict=True):
            assert (p.grad is None) == (grad is None)
            assert grad is None or torch.equal(p.grad, grad)

    return check


def test_model_and_global_generator_are_untouched(case: Case) -> None:
    model = prepared(case)
    check, state = photograph(model), torch.get_rng_state()
    measure(model, case.batches(), list(MEASURES), FAST)
    check()
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("error", [RuntimeError("boom"), KeyboardInterrupt()], ids=["exception", "interrupt"])
@pytest.mark.parametrize("name", MEASURES)
def test_model_is_untouched_after_a_failure_anywhere(name: str, error: BaseException) -> None:
    case = BY_NAME["batch-norm-cnn"]
    inner = prepared(case)
    counter = Fragile(inner, 0, None)
    expected = measure(counter, case.batches(), [name], FAST).rows[name].value
    check, raised, messages = photograph(inner), [], []
    for n in sorted({1, 2, 4, counter.calls // 2, counter.calls - 1, counter.calls}):
        try:
            row = measure(Fragile(inner, n, error), case.batches(), [name], FAST).rows[name]
        except type(error):
            raised.append(n)
        except (
            UsageError,
            DataError,
        ) as told:  # that a derivative is absent or an example not taken, and why
            messages.append(str(told))
            raised.append(n)
        else:
            # a cheap way's trial has failed: a slow one gives the same, or an estimate of the same
            assert isinstance(error, RuntimeError)
            assert row.value is expected is None or row.value == pytest.approx(
                expected, rel=0.02, abs=5 * (row.stderr or 0)
            )
        check()
    assert {2, 4} <= set(raised)  # where the first call fails, the network is run in the other memory format
    assert all("boom" in message for message in messages)
    assert isinstance(error, RuntimeError) or not messages
    if name != "hessian_trace":  # its last call is a trial
        assert counter.calls in raised
    # nor is anything left behind in autograd
    assert torch.is_grad_enabled()
    assert measure(inner, case.batches(), [name], FAST).rows[name].value == expected


def test_a_buffer_that_the_forward_pass_writes_is_kept() -> None:
    class Counting(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner
            self.register_buffer("seen", torch.zeros(1))

        def forward(self, x: Tensor) -> Tensor:
            self.seen += len(x)
            return self.inner(x)

    case = BY_NAME["relu-mlp"]
    model = Counting(case.model)
    check = photograph(model)
    measure(model, case.batches(), ["fisher_trace"], FAST)
    check()


def test_a_layer_of_two_names_is_measured_and_kept() -> None:
    """As the embedding that Hugging Face's T5 and BART share between encoder and decoder."""

    class Twice(nn.Module):
        def __init__(self, inner: nn.Linear, registered: bool) -> None:
            super().__init__()
            self.inner, self.head, self.hidden = inner, nn.Linear(3, 2), [inner]
            if registered:
                self.again = inner

        def forward(self, x: Tensor) -> Tensor:
            return self.head(torch.tanh(self.hidden[0](torch.tanh(self.inner(x)))))

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        plain, x = Twice(nn.Linear(3, 3), registered=False).double(), torch.randn(7, 3, dtype=torch.float64)
    model = Twice(copy.deepcopy(plain.inner), registered=True).double()
    model.load_state_dict(plain.state_dict(), strict=False)
    held, batches = (
        dict(model.named_parameters(remove_duplicate=False)),
        Batches.from_tensors(x, batch_size=3),
    )
    check, names = photograph(model), ["local_inconsistency", "fisher_lambda_max", "hessian_lambda_max"]
    assert_same(values(model, batches, names), values(plain, batches, names))
    check()
    after = dict(model.named_parameters(remove_duplicate=False))
    assert after.keys() == held.keys()
    assert all(after[name] is held[name] for name in held)


def test_parameters_that_the_forward_pass_writes_are_kept() -> None:
    """Embedding with max_norm scales its weights down in place; others clamp theirs."""

    class Clamped(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            self.weight.data = self.weight.data.clamp(-0.1, 0.1)
            return super().forward(x)

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        embedding, layers = nn.Embedding(5, 3, max_norm=0.5), (nn.Flatten(), Clamped(6, 4), nn.Linear(4, 3))
        embedding.weight.requires_grad_(False)
        model = nn.Sequential(embedding, *layers)
    tokens = torch.arange(14).view(7, 2) % 5
    check = photograph(model)
    measure(model, Batches.from_tensors(tokens, batch_size=3), ["local_inconsistency", "fisher_trace"], FAST)
    check()


def test_a_model_that_draws_in_vain_leaves_the_global_generator() -> None:
    class Drawing(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x + 0 * torch.rand(1))

    case = BY_NAME["relu-mlp"]
    state = torch.get_rng_state()
    measure(Drawing(*case.model.children()), case.batches(), ["local_inconsistency"], FAST)
    assert torch.equal(torch.get_rng_state(), state)


# the report


def test_report_is_strict_json_with_costs() -> None:
    case = BY_NAME["relu-mlp"]
    settings = Settings(rho=0.2, num_starts=2, max_probes=6)
    report = measure(case.model, case.batches(), list(MEASURES), settings)
    record = json.loads(json.dumps(report.as_dict(checkpoint="c", model="m"), allow_nan=False))
    assert record["num_parameters"] == len(case.theta)
    assert record["num_examples"] == 7
    assert record["settings"]["rho"] == asdict(settings)["rho"]
    assert set(record["measures"]) == set(MEASURES)
    # K gradients and one more forward pass a start, whatever the batches
    assert record["measures"]["local_inconsistency"]["num_evals"] == pytest.approx(2 * (1 + 1 / 3), abs=1e-3)
    assert record["measures"]["error"]["num_evals"] == 0


def not_finite(_: MeasurementContext) -> Estimate:
    return Estimate(math.nan, stderr=math.inf, stderr_examples=0.5)


def test_undefined_is_null_with_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    broken = replace(MEASURES["fisher_trace"], home=f"{__name__}:not_finite")
    monkeypatch.setitem(MEASURES, "fisher_trace", broken)
    case = BY_NAME["relu-mlp"]
    row = measure(case.model, case.batches(), ["fisher_trace"]).rows["fisher_trace"].as_dict()
    assert (row["value"], row["stderr"], row["stderr_examples"]) == (None, None, 0.5)
    assert row["reason"] == "not finite (nan); try --dtype float64"
    assert row["reason_stderr"] == "not finite (inf)"
    assert row["converged"] is False


def test_expected_cost_follows_the_protocol() -> None:
    paper, more = (expected_cost(["local_inconsistency"], Settings(num_starts=n)) for n in (10, 20))
    assert more - paper == pytest.approx(10 * (1 + 1 / 3))
    converged = Settings(protocol="converged", num_starts=50)
    names = ("local_inconsistency", "local_inconsistency_converged")
    assert len({expected_cost([name], converged) for name in names}) == 1


def test_converged_protocol_fills_the_local_inconsistency_row() -> None:
    case = BY_NAME["relu-mlp"]
    rows = measure(case.model, case.batches(), ["local_inconsistency"], Settings(protocol="converged")).rows
    separate = measure(case.model, case.batches(), ["local_inconsistency_converged"]).rows
    assert rows["local_inconsistency"].details["protocol"] == "converged"
    assert rows["local_inconsistency"].value == separate["local_inconsistency_converged"].value


# what a stranger's model, or settings, may do to the figures


def test_examples_that_hang_together_are_refused() -> None:
    """BatchNorm without running statistics: every figure would change with the batch size."""
    model = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8, track_running_stats=False), nn.Linear(8, 2))
    x = torch.randn(12, 3, generator=torch.Generator().manual_seed(0))
    for batch_size in (2, 3, 4, 12):
        with pytest.raises(UsageError, match="depends on the rest of its batch"):
            measure(model, Batches.from_tensors(x, batch_size=batch_size), ["mean_entropy"])
    usual = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Linear(8, 2))
    assert measure(usual, Batches.from_tensors(x), ["mean_entropy"]).rows["mean_entropy"].converged


def test_an_example_that_the_model_does_not_take_is_told() -> None:
    ids = torch.zeros(7, 2, dtype=torch.int64)
    ids[5, 0] = 50
    with pytest.raises(DataError, match=r"failed on examples 4 to 6 of tensors.*index out of range"):
        measure(BagOfWords(), Batches.from_tensors(ids, batch_size=4), ["mean_entropy"])


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("local_inconsistency", {"rho": 1e-9}),
        ("local_inconsistency", {"noise_scale": 1e-9}),
        ("local_inconsistency_adaptive", {"rho": 1e-9}),
        ("local_inconsistency_converged", {"rho": 1e-9}),
        ("local_inconsistency_relative", {"rho": 1e-9}),
        ("local_inconsistency_batchwise", {"rho": 1e-9}),
        ("average_inconsistency", {"rho": 1e-9}),
    ],
)
def test_a_perturbation_lost_to_rounding_is_refused(name: str, wrong: dict[str, Any]) -> None:
    """θ + δ = θ in float32, whose S_ρ would be 0."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
    x = torch.randn(9, 6, generator=torch.Generator().manual_seed(0))
    settings = replace(Settings(num_starts=2), **wrong)
    with pytest.raises(PrecisionError, match=r"rounding of float32 weights removes \d+% .*--dtype float64"):
        measure(model, Batches.from_tensors(x), [name], settings)
    kept = measure(model, Batches.from_tensors(x), [name, "mean_entropy"], settings).rows
    assert kept[name].value is None
    assert kept["mean_entropy"].value is not None
    row = measure(model.double(), Batches.from_tensors(x.double()), [name], settings).rows[name]
    assert row.value is not None
    assert row.value > 0


@pytest.mark.parametrize("name", ["local_inconsistency", "local_inconsistency_converged"])
def test_a_cell_of_a_grid_that_rounding_swallows_leaves_the_others(name: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
    x = torch.randn(9, 6, generator=torch.Generator().manual_seed(0))
    settings = Settings(num_starts=2, rho_grid=(1e-9,))
    row = measure(model, Batches.from_tensors(x), [name], settings).rows[name].as_dict()
    lost, found = row["grid"]
    assert (lost["rho"], lost["value"]) == (1e-9, None)
    assert found["value"] == row["value"] > 0


def test_a_perturbation_of_few_of_many_weights_is_resolved() -> None:
    """Rows of the table that no example names take nothing of δ; a direction over all weights would be rounded off."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(20_000, 16), nn.Flatten(), nn.Linear(48, 3))
    ids = torch.arange(24).view(8, 3)
    settings = Settings(rho=1e-5, num_starts=2)
    names = ["local_inconsistency", "average_inconsistency"]
    rows = measure(model, Batches.from_tensors(ids), names, settings).rows
    assert rows["average_inconsistency"].value is None
    assert "rounding" in rows["average_inconsistency"].details["reason"]
    far = measure(model, Batches.from_tensors(ids), names[:1], replace(settings, rho=1e-2)).rows[names[0]]
    assert rows[names[0]].value == pytest.approx(1e-6 * far.value, rel=0.02)


def test_the_eigenvalue_of_a_saturated_network_needs_no_difference_step() -> None:
    """The steps that would move its outputs by anything are longer than θ: exact products go on."""
    torch.manual_seed(0)
    layers = [layer for _ in range(6) for layer in (nn.Linear(6, 6), nn.ReLU())]
    model = nn.Sequential(*layers, nn.Linear(6, 3))
    with torch.no_grad():
        model[-1].bias.copy_(torch.tensor([40.0, 0.0, 0.0]))
    x = torch.randn(9, 6, generator=torch.Generator().manual_seed(0))
    names = ["fisher_lambda_max", "local_inconsistency_converged", "effective_rank"]
    rows = measure(model, Batches.from_tensors(x), names).rows
    exact = measure(
        copy.deepcopy(model).double(), Batches.from_tensors(x.double()), ["fisher_lambda_max"]
    ).rows["fisher_lambda_max"]
    assert exact.value is not None
    assert 0 < exact.value < 1e-12
    assert rows["fisher_lambda_max"].converged
    assert rows["fisher_lambda_max"].value == pytest.approx(exact.value, rel=0.01)
    assert all(rows[name].value is not None for name in names)


def test_batchwise_inconsistency_runs_no_more_examples_at_a_time_than_the_batches() -> None:
    largest = 0

    class Watched(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            nonlocal largest
            largest = max(largest, len(x))
            return super().forward(x)

    torch.manual_seed(0)
    model = Watched(3, 4).double()
    x = torch.randn(20, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    name, settings = "local_inconsistency_batchwise", Settings(num_starts=2, sub_batch=8)
    whole = measure(model, Batches.from_tensors(x, batch_size=20), [name], settings).rows[name]
    largest = 0
    pieces = measure(model, Batches.from_tensors(x, batch_size=3), [name], settings).rows[name]
    assert largest == 3
    assert pieces.value == pytest.approx(whole.value, rel=1e-9)
    assert pieces.num_evals == pytest.approx(whole.num_evals)


class Square(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, g: Tensor) -> Tensor:
        ctx.save_for_backward(x, g)
        return 3 * x * x * g

    @staticmethod
    @once_differentiable  # torch then drops the third derivative in silence
    def backward(ctx: Any, h: Tensor) -> tuple[Tensor, Tensor]:
        x, g = ctx.saved_tensors
        return 6 * x * g * h, 3 * x * x * h


class Cube(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return Square.apply(ctx.saved_tensors[0], g)


def test_derivatives_that_end_after_the_second_are_told() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(6, 8), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(Cube.apply(self.first(x)))

    torch.manual_seed(0)
    batches = Batches.from_tensors(torch.randn(20, 6, generator=torch.Generator().manual_seed(0)))
    with pytest.raises(
        DerivativeError, match=r"^hessian_trace: a layer has no derivatives beyond the second"
    ):
        measure(Net(), batches, ["hessian_trace"])


def test_what_limits_the_effective_rank_is_told() -> None:
    case = BY_NAME["tanh-mlp"]
    row = measure(case.model, case.batches(), ["effective_rank"], replace(FAST, max_iterations=1)).rows[
        "effective_rank"
    ]
    assert not row.converged
    assert "iterations" in row.details


def test_no_spread_says_nothing_of_the_examples_needed() -> None:
    model = nn.Linear(3, 2)
    x = torch.ones(4, 3)
    y = torch.full((4,), 1 - int(model(x[:1]).argmax()))
    row = measure(model, Batches.from_tensors(x, y), ["error"], Settings(target_error=0.02)).rows["error"]
    assert (row.value, row.stderr_examples) == (1.0, 0.0)
    assert "examples_needed" not in row.details


def test_no_more_than_is_empty_is_measured() -> None:
    model = nn.Linear(3, 2)
    model.register_parameter("empty", nn.Parameter(torch.zeros(0)))
    with pytest.raises(UsageError, match="all selected parameters are empty: empty"):
        measure(model, Batches.from_tensors(torch.ones(4, 3)), ["parameter_norm"], Settings(params="empty"))
