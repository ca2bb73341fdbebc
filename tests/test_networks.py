"""Every family of networks: trained by one step, saved and loaded, measured; small ones against dense matrices."""

from __future__ import annotations

from functools import partial
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from conftest import Case
from torch import nn
from torch.nn import functional

from gm_probe import measure
from gm_probe.data.batches import Batches, Normalization
from gm_probe.measures.context import Settings
from gm_probe.models.checkpoints import read_checkpoint, save_checkpoint
from gm_probe.models.loading import load_model
from gm_probe.models.zoo import ModelSpec, initial_model

NEEDS_TIMM = pytest.mark.skipif(find_spec("timm") is None, reason="timm is an extra")
FAMILIES = [
    "6cnn",
    "mlp-6",
    "wrn-10-1",
    "resnet18-cifar",
    pytest.param("vit-tiny-4", marks=NEEDS_TIMM),
    pytest.param("mixer-4", marks=NEEDS_TIMM),
]
SHAPE = (3, 8, 8)


def examples(count: int, shape: tuple[int, ...], classes: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(count, *shape, generator=generator)
    return x, torch.randint(0, classes, (count,), generator=generator)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_step_of_sgd_lowers_the_loss_and_the_weights_survive_the_disk(name: str, tmp_path: Path) -> None:
    spec = ModelSpec(name, SHAPE, 4)
    model = initial_model(spec, 0)
    x, y = examples(6, SHAPE, 4)
    losses = []
    for _ in range(2):
        model.zero_grad()
        loss = functional.cross_entropy(model(x), y)
        loss.backward()
        losses.append(loss.item())
        gradients = [p.grad for p in model.parameters()]
        assert all(g is not None and bool(torch.isfinite(g).all()) for g in gradients)
        with torch.no_grad():
            for p, g in zip(model.parameters(), gradients, strict=True):
                p -= 1e-3 * g
    assert losses[1] < losses[0]

    for file in ("weights.safetensors", "weights.pt"):
        save_checkpoint(tmp_path / file, model, spec, Normalization())
        again = load_model(read_checkpoint(tmp_path / file))
        assert list(again.state_dict()) == list(model.state_dict())
        for one, other in zip(model.state_dict().values(), again.state_dict().values(), strict=True):
            assert torch.equal(one, other)


@pytest.mark.parametrize("name", ["6cnn", "wrn-10-1", "resnet18-cifar"])
def test_the_convolutional_families_are_measured(name: str) -> None:
    model = initial_model(ModelSpec(name, (3, 4, 4), 4), 0)
    x, y = examples(2, (3, 4, 4), 4)
    settings = Settings(num_starts=1, min_probes=2, max_probes=2, max_iterations=2)
    names = ["local_inconsistency", "fisher_trace", "fisher_lambda_max", "hessian_lambda_max"]
    rows = measure(model, Batches.from_tensors(x, y, batch_size=1), names, settings).rows
    for row in rows.values():
        assert row.value is not None
        assert torch.isfinite(torch.tensor(row.value))
    assert rows["local_inconsistency"].value > 0
    assert rows["fisher_trace"].value >= rows["fisher_lambda_max"].value > 0


def small(family: str) -> nn.Module:
    from timm.models import mlp_mixer, vision_transformer

    sizes = {"img_size": (4, 4), "patch_size": 2, "in_chans": 1, "num_classes": 3, "embed_dim": 6}
    if family == "vit":
        model: nn.Module = vision_transformer.VisionTransformer(**sizes, num_heads=3, depth=1)
    else:
        model = mlp_mixer.MlpMixer(**sizes, num_blocks=1)
    for p in model.parameters():  # biases, gains and the head are constants at first
        nn.init.normal_(p, mean=p.mean().item(), std=0.3)
    return model


@NEEDS_TIMM
@pytest.mark.parametrize("family", ["vit", "mixer"])
def test_curvature_of_timms_networks_against_dense_matrices(family: str) -> None:
    case = Case(family, partial(small, family), (1, 4, 4), affine=False)
    fisher = case.fisher_terms.mean(0)
    hessian = torch.autograd.functional.hessian(
        lambda flat: functional.cross_entropy(case.logits_at(flat), case.data[2]), case.theta
    )
    names = ["fisher_lambda_max", "fisher_trace", "hessian_lambda_max", "hessian_trace"]
    settings = Settings(eigen_tolerance=1e-6, trace_tolerance=1e-9, max_probes=60)
    rows = measure(case.model, case.batches(), names, settings).rows
    for name, matrix in (("fisher", fisher), ("hessian", hessian)):
        largest, trace = rows[f"{name}_lambda_max"], rows[f"{name}_trace"]
        assert largest.converged
        assert largest.value == pytest.approx(float(torch.linalg.eigvalsh(matrix)[-1]), rel=1e-5)
        assert (
            trace.details.get("labels") != "none needed"
        )  # softmax and GELU are not affine in their parameters
        assert abs(trace.value - float(matrix.trace())) <= 3 * (trace.stderr or 0) + 1e-9
