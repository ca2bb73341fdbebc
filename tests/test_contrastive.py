"""NT-Xent against a naive loop and a closed form; rules on it against finite differences."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from test_rules import algorithm_1, grads, make, seeded
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from gm_probe.errors import UsageError
from gm_probe.models.contrastive import Contrastive, nt_xent_logits, partners, projector
from gm_probe.training.config import TrainConfig
from gm_probe.training.methods.sam import SAM
from gm_probe.training.updates import make_rule


def naive(outputs: Tensor, temperature: float) -> float:
    """Chen et al. 2020, Eq. 1 and Algorithm 1: a sum over pairs, one term after another."""
    n = len(outputs)
    rows = outputs.tolist()

    def similarity(i: int, j: int) -> float:
        dot = math.fsum(a * b for a, b in zip(rows[i], rows[j], strict=True))
        return dot / math.hypot(*rows[i]) / math.hypot(*rows[j])

    total = 0.0
    for i in range(n):
        j = (i + n // 2) % n
        below = math.fsum(math.exp(similarity(i, k) / temperature) for k in range(n) if k != i)
        total -= math.log(math.exp(similarity(i, j) / temperature) / below)
    return total / n


def views(count: int = 8) -> Tensor:
    return torch.randn(count, 3, generator=seeded(4), dtype=torch.float64)


@pytest.mark.parametrize("temperature", [0.1, 0.5, 2.0])
@pytest.mark.parametrize("images", [1, 2, 5])
def test_nt_xent_against_a_naive_loop(images: int, temperature: float) -> None:
    outputs = views(2 * images)
    loss = functional.cross_entropy(nt_xent_logits(outputs, temperature), partners(images))
    assert float(loss) == pytest.approx(naive(outputs, temperature), rel=1e-12, abs=1e-15)


def test_nt_xent_of_orthogonal_pairs() -> None:
    """Two images whose views coincide: log(1 + 2 exp(-1/τ)) each."""
    pair = torch.eye(2, dtype=torch.float64)
    loss = functional.cross_entropy(nt_xent_logits(torch.cat([pair, 3 * pair]), 0.5), partners(2))
    assert float(loss) == pytest.approx(math.log(1 + 2 * math.exp(-2)))


@pytest.mark.parametrize(("temperature", "theirs"), [(0.1, 10.690275385836292), (0.5, 3.3412454481972076)])
def test_nt_xent_as_published_libraries_have_it(temperature: float, theirs: float) -> None:
    """Both lightly 1.6.0 and pytorch-metric-learning 2.9.0, their NTXentLoss run on these outputs."""
    outputs = torch.sin(torch.arange(1, 37, dtype=torch.float64) ** 2).reshape(12, 3)
    ours = functional.cross_entropy(nt_xent_logits(outputs, temperature), partners(6))
    assert float(ours) == pytest.approx(theirs, rel=1e-12)


def model() -> nn.Module:
    return make(
        lambda: Contrastive(nn.Sequential(nn.Linear(3, 4), nn.Tanh()), projector(4, 3), temperature=0.5)
    )


def losses(network: nn.Module, x: Tensor, flat: Tensor) -> tuple[Tensor, Tensor]:
    """NT-Xent at flat parameters, by masking a similarity matrix's diagonal, and the log-probabilities in it."""
    twin = copy.deepcopy(network)
    vector_to_parameters(flat, twin.parameters())
    z = functional.normalize(twin.head(twin.encoder(x)), dim=1)  # type: ignore[operator]
    logs = (z @ z.T / 0.5).masked_fill(torch.eye(len(x), dtype=torch.bool), -torch.inf).log_softmax(1)
    rows = torch.arange(len(x))
    return -logs[rows, (rows + len(x) // 2) % len(x)].mean(), logs[~torch.eye(len(x), dtype=torch.bool)]


def differences(network: nn.Module, value: object) -> Tensor:
    theta = parameters_to_vector(network.parameters()).detach().clone()
    eps = 1e-5
    with torch.no_grad():
        moves = [eps * e for e in torch.eye(len(theta), dtype=torch.float64)]
        return torch.stack([(value(theta + e) - value(theta - e)) / (2 * eps) for e in moves])  # type: ignore[operator]


@pytest.mark.parametrize("steps", [1, 2])
@pytest.mark.parametrize("kl_grad", ["both", "perturbed"])
def test_iam_d_against_finite_differences(steps: int, kl_grad: str) -> None:
    """Of the rule that a run makes."""
    network, x = model(), views()
    delta = algorithm_1(network, x, 0.3, steps, seed=5)

    fixed = losses(network, x, parameters_to_vector(network.parameters()).detach())[1]

    def whole(flat: Tensor) -> Tensor:
        loss, p = losses(network, x, flat)
        p = p if kl_grad == "both" else fixed
        q = losses(network, x, flat + delta)[1]
        return loss + 0.7 * (p.exp() * (p - q)).sum() / len(x)

    config = TrainConfig(
        objective="simclr", method="iam-d", rho=0.3, beta=0.7, k_steps=steps, kl_grad=kl_grad
    )
    rule = make_rule(config, network, seeded(5))
    rule.backward(x, partners(4))
    torch.testing.assert_close(grads(network), differences(network, whole), rtol=1e-5, atol=1e-8)


def test_sam_against_finite_differences() -> None:
    network, x = model(), views()
    g = differences(network, lambda flat: losses(network, x, flat)[0])
    e = 0.3 * g / g.norm()
    SAM(network, rho=0.3).backward(x, partners(4))
    expected = differences(network, lambda flat: losses(network, x, flat + e)[0])
    torch.testing.assert_close(grads(network), expected, rtol=1e-5, atol=1e-8)


def test_logits_are_single_precision_under_autocast() -> None:
    outputs = views().float()
    with torch.autocast("cpu", torch.bfloat16):
        found = nt_xent_logits(outputs.bfloat16(), 0.1)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, nt_xent_logits(outputs.bfloat16().float(), 0.1))


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.nan])
def test_temperature_is_above_zero(temperature: float) -> None:
    with pytest.raises(UsageError, match="temperature"):
        Contrastive(nn.Identity(), nn.Identity(), temperature=temperature)
