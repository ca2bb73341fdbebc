"""Hugging Face's classifiers, whose outputs are dict-like and whose text comes as token ids, with random weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from scipy.sparse.linalg import LinearOperator, eigsh
from torch import Tensor, nn
from torch.func import functional_call

import gm_probe

transformers = pytest.importorskip("transformers")

SIZES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
EXAMPLES = 6


def vit() -> tuple[nn.Module, Tensor]:
    config = transformers.ViTConfig(image_size=8, patch_size=4, num_labels=3, **SIZES)
    return transformers.ViTForImageClassification(config), torch.randn(EXAMPLES, 3, 8, 8)


def resnet() -> tuple[nn.Module, Tensor]:
    config = transformers.ResNetConfig(
        embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1], layer_type="basic", num_labels=3
    )
    return transformers.ResNetForImageClassification(config), torch.randn(EXAMPLES, 3, 32, 32)


def bert() -> tuple[nn.Module, Tensor]:
    config = transformers.BertConfig(vocab_size=20, max_position_embeddings=8, num_labels=3, **SIZES)
    return transformers.BertForSequenceClassification(config), torch.randint(0, 20, (EXAMPLES, 7))


def gpt2() -> tuple[nn.Module, Tensor]:
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    config = transformers.GPT2Config(
        vocab_size=20, n_positions=8, n_embd=16, n_layer=1, n_head=2, num_labels=3, **ids
    )
    return transformers.GPT2ForSequenceClassification(config), torch.randint(1, 20, (EXAMPLES, 7))


@pytest.mark.parametrize("make", [vit, resnet, bert, gpt2])
def test_curvature_against_dense_jacobians(make: Callable[[], tuple[nn.Module, Tensor]]) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model, x = make()
    model = model.double().eval().requires_grad_(True)
    x = x.double() if x.is_floating_point() else x
    before = {name: value.clone() for name, value in model.state_dict().items()}
    names = ["fisher_lambda_max", "fisher_trace", "hessian_lambda_max", "hessian_trace"]
    settings = gm_probe.Settings(eigen_tolerance=1e-6, trace_tolerance=0.1)
    rows = gm_probe.measure(model, gm_probe.Batches.from_tensors(x), names, settings).rows
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())

    fisher, hessian, trace_of_hessian = dense(model, x)
    eigenvalues = np.linalg.eigvalsh(fisher)
    assert rows["fisher_lambda_max"].value == pytest.approx(eigenvalues[-1], rel=1e-6)
    largest = eigsh(hessian, k=1, which="LA", return_eigenvectors=False, tol=1e-9)[0]
    assert rows["hessian_lambda_max"].value == pytest.approx(largest, rel=1e-5)
    trace = rows["fisher_trace"]
    assert abs(trace.value - eigenvalues.sum()) < 4 * (trace.stderr or 1e-9)
    total = rows["hessian_trace"]
    assert abs(total.value - trace_of_hessian) < 4 * (total.stderr or 1e-9)


def dense(model: nn.Module, x: Tensor) -> tuple[np.ndarray, LinearOperator, float]:
    """F's Gram matrix (N·C, N·C), and by double backward the Hessian for predicted labels, and its trace."""
    parameters = {name: p.detach().requires_grad_() for name, p in model.named_parameters()}
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        logits = functional_call(model, parameters, (x,)).logits
    values = list(parameters.values())

    def joined(scalar: Tensor, **options: Any) -> Tensor:
        found = torch.autograd.grad(scalar, values, allow_unused=True, retain_graph=True, **options)
        parts = zip(found, values, strict=True)
        return torch.cat([torch.zeros_like(p).flatten() if g is None else g.flatten() for g, p in parts])

    jacobian = torch.stack([joined(z) for z in logits.flatten()]).view(*logits.shape, -1)
    p = logits.softmax(1).detach()
    root = p.sqrt()[:, :, None] * (jacobian - torch.einsum("nc,ncp->np", p, jacobian)[:, None])
    root = root.flatten(0, 1) / len(x) ** 0.5

    gradient = joined(nn.functional.cross_entropy(logits, logits.argmax(1)), create_graph=True)

    def product(v: np.ndarray) -> np.ndarray:
        return joined(gradient @ torch.from_numpy(v.ravel())).numpy()

    size, trace = len(gradient), 0.0
    for some in torch.arange(size).split(256):
        units = nn.functional.one_hot(some, size).double()
        rows = torch.autograd.grad(
            gradient, values, units, allow_unused=True, retain_graph=True, is_grads_batched=True
        )
        joint = [
            torch.zeros(len(some), p.numel(), dtype=torch.float64) if r is None else r.flatten(1)
            for r, p in zip(rows, values, strict=True)
        ]
        trace += float(torch.cat(joint, 1).gather(1, some[:, None]).sum())
    return (root @ root.T).numpy(), LinearOperator((size, size), matvec=product, dtype=np.float64), trace
