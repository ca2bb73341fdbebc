"""`measure`: its figures, what it refuses, and that it leaves the model and the global generator alone."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ATTENTION, CASES, Case
from torch import Tensor, nn
from torch.nn import functional

from gm_probe.core.batches import Batches
from gm_probe.core.errors import CheckpointError, DataError, UsageError
from gm_probe.probe.measures import MEASURES, expected_cost, measure
from gm_probe.probe.probe import Probe, Settings
from gm_probe.probe.work import Work

FAST = Settings(num_starts=2, max_probes=5)
BY_NAME = {case.name: case for case in CASES}


def values(
    model: nn.Module, batches: Batches, names: list[str], settings: Settings = FAST
) -> dict[str, float]:
    return {name: row.value for name, row in measure(model, batches, names, settings).rows.items()}  # type: ignore[misc]


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


@pytest.mark.parametrize("probes", [60, 400])
def test_example_error_of_a_trace(probes: int) -> None:
    """The spread of tr H_x over examples, however noisy the estimate of each tr H_x."""
    case = BY_NAME["relu-mlp"]
    each = np.einsum("nii->n", case.hessian_terms.numpy())
    squares = []
    for seed in range(20 if probes == 60 else 1):
        settings = Settings(trace_tolerance=0.0, max_probes=probes, seed=seed)
        row = measure(case.model, case.batches(7), ["hessian_trace"], settings).rows["hessian_trace"]
        squares.append((row.stderr_examples or 0.0) ** 2)
    ratio = math.sqrt(np.mean(squares)) / (each.std(ddof=1) / math.sqrt(7))
    # with few probes and seven examples the cut at zero biases it upwards
    assert 0.5 < ratio < (1.5 if probes == 400 else 2.0)


def test_paper_protocol_by_hand() -> None:
    """Algorithm 1 from the same starts as a loop over the definition."""
    case = BY_NAME["tanh-mlp"]
    settings = Settings(rho=0.4, k_steps=3, num_starts=4, noise_scale=0.2)
    log_p = case.logits_at(case.theta).log_softmax(1).detach()

    def divergence(delta: Tensor) -> Tensor:
        return (log_p.exp() * (log_p - case.logits_at(case.theta + delta).log_softmax(1))).sum(1).mean()

    values = []
    for start in Probe(case.model, case.batches(), settings, Work(7)).starts():
        delta = start
        for _ in range(settings.k_steps):
            (g,) = torch.autograd.grad(divergence(moved := delta.clone().requires_grad_()), moved)
            delta = settings.rho * g / g.norm()
        values.append(float(divergence(delta)))
    row = measure(case.model, case.batches(), ["local_inconsistency"], settings).rows["local_inconsistency"]
    assert len(set(values)) == 4
    assert row.details["starts"] == pytest.approx(values, rel=1e-9)
    assert row.value == pytest.approx(np.mean(values), rel=1e-9)
    assert row.details["sd_starts"] == pytest.approx(np.std(values, ddof=1), rel=1e-6)


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
    assert values(case.model, case.batches(), list(MEASURES)) == pytest.approx(alone, rel=1e-6)
    assert values(case.model, case.batches(), list(reversed(MEASURES))) == pytest.approx(alone, rel=1e-6)


@pytest.mark.parametrize("batch_size", [1, 7])
@pytest.mark.parametrize(
    "case", [BY_NAME["tanh-mlp"], BY_NAME["batch-norm-cnn"], BY_NAME["tied"]], ids=lambda case: case.name
)
def test_batch_size_does_not_matter(case: Case, batch_size: int) -> None:
    one = values(case.model, case.batches(3), list(MEASURES))
    assert values(case.model, case.batches(batch_size), list(MEASURES)) == pytest.approx(one, rel=1e-6)


def test_training_mode_is_not_measured() -> None:
    case = BY_NAME["batch-norm-cnn"]
    expected = values(case.model, case.batches(), list(MEASURES))
    assert values(case.model.train(), case.batches(), list(MEASURES)) == expected


def test_seed() -> None:
    case = BY_NAME["relu-mlp"]
    names = ["local_inconsistency", "fisher_trace"]

    def at(seed: int) -> dict[str, float]:
        return values(case.model, case.batches(), names, Settings(seed=seed))

    assert at(0) == at(0)
    assert all(at(0)[name] != at(1)[name] for name in names)


# labels


@pytest.mark.parametrize("name", ["hessian_lambda_max", "hessian_trace"])
def test_predicted_labels_are_the_argmax(name: str, case: Case) -> None:
    model, x, _ = case.data
    predicted = measure(case.model, case.batches(labeled=False), [name], FAST).rows[name]
    given = measure(case.model, Batches.from_tensors(x, model(x).argmax(1), batch_size=3), [name], FAST).rows[
        name
    ]
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


@pytest.mark.parametrize("name", ["error", "cross_entropy", "hessian_trace"])
@pytest.mark.parametrize("label", [3, -1, -100])
def test_labels_that_are_no_classes(label: int, name: str) -> None:
    model, x, y = BY_NAME["relu-mlp"].data
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


def test_a_model_that_draws_at_random_is_refused() -> None:
    class Noisy(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(functional.dropout(x, 0.5, training=True))

    case = BY_NAME["relu-mlp"]
    with torch.random.fork_rng(devices=[]), pytest.raises(DataError, match="two passes"):
        measure(Noisy(*case.model.children()), case.batches(), ["fisher_trace"])


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
        self.inner, self.n, self.error, self.calls = inner, n, error, 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
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
    check = photograph(inner)
    for n in sorted({1, 4, counter.calls // 2, counter.calls - 1, counter.calls}):
        with pytest.raises(type(error)):
            measure(Fragile(inner, n, error), case.batches(), [name], FAST)
        check()
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


def test_undefined_is_null_with_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    broken = replace(MEASURES["fisher_trace"], compute=lambda _: (math.nan, math.inf, 0.5, True, {}))
    monkeypatch.setitem(MEASURES, "fisher_trace", broken)
    case = BY_NAME["relu-mlp"]
    row = measure(case.model, case.batches(), ["fisher_trace"]).rows["fisher_trace"].as_dict()
    assert (row["value"], row["stderr"], row["stderr_examples"]) == (None, None, 0.5)
    assert row["reason"] == "not finite (nan)"
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
