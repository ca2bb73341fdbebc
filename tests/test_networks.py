"""Networks of timm: their curvature against dense matrices (the others are in test_models.py and test_any_model.py)."""

from functools import partial

import pytest
import torch
from conftest import Case
from torch import nn
from torch.nn import functional

from gm_probe import measure
from gm_probe.measures.settings import Settings

pytest.importorskip("timm", reason="timm is an extra")


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
        # softmax and GELU are not affine in their parameters
        assert trace.details.get("labels") != "none needed"
        assert abs(trace.value - float(matrix.trace())) <= 3 * (trace.stderr or 0) + 1e-9
