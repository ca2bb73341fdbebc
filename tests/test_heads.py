"""Yes-or-no models: of one logit against the form with two, of several labels against each label by itself."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional

from gm_probe import MEASURES, Batches, DataError, Parameters, Settings, UsageError, compare, measure
from gm_probe.inconsistency.ascent import Divergence
from gm_probe.linalg.work import Work
from gm_probe.models.door import Outputs

BINARY, MULTILABEL = Outputs(head="binary"), Outputs(head="multilabel")
LABELS = 3
EXACT = Settings(
    rho=0.3,
    num_starts=3,
    trace_tolerance=0,
    max_probes=12,
    eigen_tolerance=1e-7,
    ascent_tolerance=1e-6,
    sub_batch=4,
    rho_grid=(0.6,),
)
UNDEFINED = {  # without initial weights, a validation set, a last nn.Linear or a large layer, or not piecewise linear
    *("distance_from_initialization", "atc", "doc", "cot", "dispersion", "last_layer_gradient_norm"),
    *("power_law_alpha", "path_norm"),
}
OF_CLASSES = {"nuclear_norm", "mano", "effective_invariance"}
NAMES = [name for name in MEASURES if name not in UNDEFINED]


class Net(nn.Module):
    """A smooth convolutional network of ``outputs`` logits for images (B, 1, 6, 6)."""

    def __init__(self, outputs: int) -> None:
        super().__init__()
        self.conv, self.last = nn.Conv2d(1, 2, 3, stride=2), nn.Linear(8, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.conv(x)).flatten(1))


class TwoLogits(nn.Module):
    """A yes-or-no model z as a classifier of the logits 0 and z."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        z = self.net(x)
        return torch.cat([torch.zeros_like(z), z], 1)


class OneLabel(nn.Module):
    """One logit of several: that of the label which is a part of the input."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor, label: Tensor) -> Tensor:
        return self.net(x).gather(1, label[:, None])


def network(outputs: int) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return Net(outputs).double().eval()


def data(labels: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = 2 * torch.randn(10, 1, 6, 6, generator=generator, dtype=torch.float64)
    return x, torch.randint(0, 2, (10, labels), generator=generator)


@pytest.mark.parametrize("labeled", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_one_logit_is_measured_as_the_form_with_two(name: str, labeled: bool) -> None:
    if MEASURES[name].needs_labels and not labeled:
        pytest.skip("needs labels")
    net, (x, y) = network(1), data(1)
    batches = Batches.from_tensors(x, y[:, 0] if labeled else None, batch_size=4)
    found = measure(net, batches, [name], EXACT, outputs=BINARY).rows[name]
    expected = measure(TwoLogits(net), batches, [name], EXACT).rows[name]
    signed = {"hessian_lambda_min", "crop_rate", "flip_rate", "energy", "log_spectral_norm"}
    assert expected.value > 0 or name in signed
    for one in ("value", "stderr", "stderr_examples"):
        value, wanted = getattr(found, one), getattr(expected, one)
        assert value == (wanted if wanted is None else pytest.approx(wanted, rel=1e-8, abs=1e-12))
    assert found.converged == expected.converged


FACTORS = {
    **dict.fromkeys(
        ["error", "mean_confidence", "margin", "flip_rate", "crop_rate", "effective_rank", "parameter_norm"],
        1.0,
    ),
    **dict.fromkeys(["stable_rank", "log_spectral_norm"], 1.0),
    "input_jacobian_norm": LABELS**0.5,
}
"""What a sum over an example's labels is to the mean over pairs of an example and a label, where that is not L."""


@pytest.mark.parametrize("labeled", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_several_labels_are_measured_as_the_sum_of_each_by_itself(name: str, labeled: bool) -> None:
    if MEASURES[name].needs_labels and not labeled:
        pytest.skip("needs labels")
    net, (x, y) = network(LABELS), data(LABELS)
    batches = Batches.from_tensors(x, y if labeled else None, batch_size=4)
    found = measure(net, batches, [name], EXACT, outputs=MULTILABEL).rows[name].value
    if name in {"flip_rate", "crop_rate"}:  # which several tensors have not
        return
    if name in OF_CLASSES:
        assert found is None
        return
    pairs = x.repeat_interleave(LABELS, 0), torch.arange(LABELS).repeat(len(x))
    each = Batches.from_tensors(pairs, y.flatten() if labeled else None, batch_size=4 * LABELS)
    by_pair = replace(EXACT, sub_batch=EXACT.sub_batch * LABELS)
    expected = measure(OneLabel(net), each, [name], by_pair, outputs=BINARY).rows[name].value
    assert expected is not None
    assert expected != 0
    assert found == pytest.approx(FACTORS.get(name, LABELS) * expected, rel=1e-5)


@pytest.mark.parametrize("change", ["flip", "crop"])
def test_rates_of_change_count_labels(change: str) -> None:
    net, (x, _) = network(LABELS), data(LABELS)
    found = measure(net, x, [f"{change}_rate"], outputs=MULTILABEL).rows[f"{change}_rate"].value
    assert found * len(x) * LABELS == pytest.approx(round(found * len(x) * LABELS))
    if change == "flip":
        expected = ((net(x) > 0) != (net(x.flip(-1)) > 0)).double().mean()
        assert 0 < found == pytest.approx(float(expected))


def dense(net: nn.Module, x: Tensor, y: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """F and H (P, P) of the sum of an example's binary cross-entropies, by autograd alone."""
    shapes = {name: p.shape for name, p in net.named_parameters()}
    theta = torch.cat([p.detach().flatten() for p in net.parameters()])

    def logits(flat: Tensor) -> Tensor:
        pieces = flat.split([shape.numel() for shape in shapes.values()])
        values = {n: piece.view(shape) for (n, shape), piece in zip(shapes.items(), pieces, strict=True)}
        return functional_call(net, values, (x,))

    def loss(flat: Tensor) -> Tensor:
        return functional.binary_cross_entropy_with_logits(logits(flat), y.double(), reduction="sum") / len(x)

    jacobian = torch.autograd.functional.jacobian(logits, theta)
    p = logits(theta).sigmoid()
    fisher = torch.einsum("nlp,nl,nlq->pq", jacobian, p * (1 - p), jacobian) / len(x)
    return fisher.detach().numpy(), torch.autograd.functional.hessian(loss, theta).numpy()


@pytest.mark.parametrize("labels", [1, 2, 5])
def test_curvature_against_dense_matrices(labels: int) -> None:
    net, (x, y) = network(labels), data(labels)
    fisher, hessian = dense(net, x, y)
    names = [
        "fisher_lambda_max",
        "fisher_trace",
        "hessian_lambda_max",
        "hessian_lambda_min",
        "cross_entropy",
        "error",
    ]
    rows = measure(net, (x, y), names, EXACT, outputs=MULTILABEL).rows
    expected = {
        "fisher_lambda_max": np.linalg.eigvalsh(fisher)[-1],
        "fisher_trace": np.trace(fisher),
        "hessian_lambda_max": np.linalg.eigvalsh(hessian)[-1],
        "hessian_lambda_min": np.linalg.eigvalsh(hessian)[0],
        "cross_entropy": functional.binary_cross_entropy_with_logits(
            net(x), y.double(), reduction="sum"
        ).item()
        / 10,
        "error": ((net(x) > 0) != y).double().mean().item(),
    }
    for name, value in expected.items():
        assert rows[name].value == pytest.approx(value, rel=1e-6), name
    roughly = measure(net, x, ["fisher_trace", "hessian_trace"], Settings(seed=1), outputs=MULTILABEL).rows
    found = roughly["fisher_trace"]
    assert abs(found.value - np.trace(fisher)) <= 4 * (found.stderr or 1e-9)
    total = measure(net, (x, y), ["hessian_trace"], Settings(), outputs=MULTILABEL).rows["hessian_trace"]
    assert abs(total.value - np.trace(hessian)) <= 4 * (total.stderr or 0.0)


def test_the_divergence_is_the_sum_of_bernoulli_divergences() -> None:
    net, (x, _) = network(LABELS), data(LABELS)
    parameters = Parameters(net, outputs=MULTILABEL)
    logits = parameters.logits(x).detach()
    offset = parameters.random(1.0, torch.Generator().manual_seed(0))
    batches = Batches.from_tensors(x, batch_size=4)
    found = Divergence(parameters, batches, logits, Work(len(x))).terms(offset)
    p, q = (parameters.taken(x, values).sigmoid() for values in (None, parameters.moved(offset)))
    expected = p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()
    torch.testing.assert_close(found, expected.sum(1).detach(), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("head", [BINARY, MULTILABEL])
@pytest.mark.parametrize("kind", ["probabilities", "log-probabilities"])
def test_probabilities_are_refused_and_taken_where_they_are_said_to_be(head: Outputs, kind: str) -> None:
    labels = 1 if head.head == "binary" else LABELS
    net, (x, y) = network(labels), data(labels)
    last = nn.Sigmoid() if kind == "probabilities" else nn.LogSigmoid()
    names = ["local_inconsistency", "fisher_lambda_max", "cross_entropy", "mean_entropy"]
    returned = nn.Sequential(net, last)
    if kind == "probabilities":
        with pytest.raises(UsageError, match="--outputs-are probabilities"):
            measure(returned, (x, y), names, outputs=head)
    rows = measure(returned, (x, y), names, EXACT, outputs=replace(head, kind=kind)).rows
    expected = measure(net, (x, y), names, EXACT, outputs=head).rows
    for name in names:
        assert rows[name].value == pytest.approx(expected[name].value, rel=1e-6)


@pytest.mark.parametrize(
    ("outputs", "y"),
    [
        (BINARY, torch.tensor([0, 1, 1, 0, 1])),
        (BINARY, torch.tensor([0, 1, 1, 0, 1])[:, None]),
        (BINARY, torch.tensor([0, 1, 1, 0, 1]) > 0),
        (MULTILABEL, torch.tensor([[0.0, 1.0, 1.0]] * 5)),
        (MULTILABEL, np.array([[False, True, True]] * 5)),
        (MULTILABEL, [[0, 1, 1]] * 5),
    ],
)
def test_zeros_and_ones_of_any_kind_are_labels(outputs: Outputs, y: object) -> None:
    net, x = network(1 if outputs == BINARY else 3), data(1)[0][:5]
    found = measure(net, (x, y), ["error"], outputs=outputs).rows["error"].value
    expected = ((net(x) > 0) != torch.as_tensor(y).view(5, -1).bool()).double().mean()
    assert found == pytest.approx(float(expected))


ONES = torch.ones(5, dtype=torch.int64)
REFUSED = {
    "yes-or-no labels must be 0 or 1, and tensors holds 2": (BINARY, 1, 2 * ONES),
    "must be 0 or 1, and tensors holds -1": (MULTILABEL, 3, -torch.ones(5, 3)),
    "has labels of shape (5,) but the model has 3 yes-or-no label(s)": (MULTILABEL, 3, ONES),
    "has labels of shape (5, 2) but the model has 3 yes-or-no": (MULTILABEL, 3, torch.ones(5, 2)),
    "has labels of shape (5, 2) but the model has 1 yes-or-no": (BINARY, 1, torch.ones(5, 2)),
    "has labels of shape (5, 3) but the model has 3 exclusive classes": (Outputs(), 3, torch.eye(3)[ONES]),
    "has labels of shape (5, 1) but the model has 3 exclusive classes": (Outputs(), 3, ONES[:, None]),
    "y holds fractions, such as soft labels": (BINARY, 1, torch.full((5,), 0.9)),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_labels_that_do_not_fit_are_named(reason: str) -> None:
    outputs, count, y = REFUSED[reason]
    with pytest.raises(DataError) as caught:
        measure(network(count), (data(1)[0][:5], y), ["error"], outputs=outputs)
    assert reason in str(caught.value)


@pytest.mark.parametrize(
    ("outputs", "count", "reason"),
    [(Outputs(), 1, "one logit per example; .*--head binary"), (BINARY, 2, "head binary reads one logit")],
)
def test_heads_that_do_not_fit_are_named(outputs: Outputs, count: int, reason: str) -> None:
    for names in (["local_inconsistency"], ["mean_entropy"]):
        with pytest.raises(UsageError, match=reason):
            measure(network(count), data(1)[0], names, outputs=outputs)


def test_a_report_says_how_outputs_were_read() -> None:
    def settings(outputs: Outputs | None, count: int) -> dict[str, object]:
        report = measure(network(count), data(1)[0], ["mean_entropy"], outputs=outputs)
        return report.as_dict(checkpoint="", model="")["settings"]

    assert settings(MULTILABEL, 3)["head"] == "multilabel"
    assert not {"head", "output", "outputs_are"} & settings(None, 3).keys()


def test_pairs_of_yes_or_no_models() -> None:
    generator = torch.Generator().manual_seed(0)
    z = 2 * torch.randn(4, 20, LABELS, generator=generator, dtype=torch.float64)
    z = z.index_copy(0, torch.tensor([1]), z[:1] + 0.1)
    sets = ["a", "a", "b", "b"]

    def paired(z: Tensor) -> Tensor:
        return torch.stack([torch.zeros_like(z), z], -1)

    one, two = compare(paired(z[..., :1]), sets), compare(paired(z[..., 0]), sets)
    assert one.pairs == two.pairs
    assert one.rows == two.rows
    every = compare(paired(z), sets)
    each = [compare(paired(z[..., label]), sets) for label in range(LABELS)]
    for name, row in every.rows.items():
        total = sum(report.rows[name].value or 0.0 for report in each)
        assert row.value == pytest.approx(total / (LABELS if name == "disagreement" else 1))
    with pytest.raises(UsageError, match="one logit per example"):
        compare(z[..., :1], sets)
    with pytest.raises(DataError, match="only models with the same labels"):
        compare([paired(z[0]), paired(z[0, :, :2])], ["a", "b"])
