"""Measures of outputs and weights against their definitions in numpy, and the blocks of each layer."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from conftest import BY_NAME, Case
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

import gm_probe
from gm_probe.data.batches import Batches
from gm_probe.errors import DataError, UsageError
from gm_probe.measures.catalogue import MEASURES
from gm_probe.measures.layers import by_layer
from gm_probe.measures.measure import measure
from gm_probe.measures.names import expanded
from gm_probe.measures.settings import Settings
from gm_probe.measures.weights import LEAST, eigenvalues, power_law
from gm_probe.models.door import Outputs


def network() -> tuple[nn.Module, Tensor, Tensor]:
    """A convolutional network with BatchNorm, images (40, 2, 6, 6) and labels (40,)."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Conv2d(2, 6, 3, padding=1),
            nn.BatchNorm2d(6),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(54, 4),
        )
        nn.init.normal_(model[1].running_mean, std=0.3)
        nn.init.uniform_(model[1].running_var, 0.5, 2.0)
        nn.init.normal_(model[1].bias)
        model, x = model.double().eval(), torch.rand(40, 2, 6, 6).double()
        with torch.no_grad():
            model[5].bias -= model(x).mean(0)  # so that several classes are predicted
        return model, x, torch.randint(0, 4, (40,))


def values(model: nn.Module, data: object, names: list[str], **more: object) -> dict[str, float | None]:
    return {name: row.value for name, row in measure(model, data, names, **more).rows.items()}


def test_outputs_by_hand() -> None:
    model, x, _ = network()
    found = measure(model, x, ["energy", "margin", "effective_invariance", "flip_rate"]).rows
    z, mirrored = (model(one).detach().numpy() for one in (x, x.flip(-1)))
    energies = -np.log(np.exp(z).sum(1))
    assert found["energy"].value == pytest.approx(energies.mean())
    assert found["energy"].stderr_examples == pytest.approx(energies.std(ddof=1) / math.sqrt(40))
    ordered = np.sort(z, 1)
    assert found["margin"].value == pytest.approx((ordered[:, -1] - ordered[:, -2]).mean())
    p, q = (np.exp(one) / np.exp(one).sum(1, keepdims=True) for one in (z, mirrored))
    same = p.argmax(1) == q.argmax(1)
    assert found["effective_invariance"].value == pytest.approx((np.sqrt(p.max(1) * q.max(1)) * same).mean())
    assert found["flip_rate"].value == pytest.approx(1 - same.mean())
    assert found["effective_invariance"].num_evals == pytest.approx(1 / 3, abs=1e-3)
    assert found["flip_rate"].num_evals == 0  # the mirror images were run before


def test_measures_are_the_scores_of_the_estimate() -> None:
    """One formula each: `estimate` without labels and `measure` give the same numbers."""
    model, x, y = network()
    names = ["nuclear_norm", "mano", "dispersion", "last_layer_gradient_norm"]
    [row] = gm_probe.estimate(model, x).models
    found = values(model, Batches.from_tensors(x, batch_size=7), names)
    assert found == pytest.approx({name: row.estimators[name]["score"] for name in names}, rel=1e-5)
    validation = x, y  # of one size: the estimate takes COT at that of the smaller set
    [row] = gm_probe.estimate(model, x, validation=validation).models
    found = values(model, x, ["atc", "doc", "cot"], validation=validation)
    assert found == pytest.approx({name: row.estimators[name]["score"] for name in found}, rel=1e-5)


def test_without_a_validation_set_its_estimators_are_undefined() -> None:
    model, x, y = network()
    for name, row in measure(model, x, ["atc", "doc", "cot"]).rows.items():
        assert row.value is None, name
        assert "validation set" in row.details["reason"]
    with pytest.raises(DataError, match="no labels"):
        measure(model, x, ["atc"], validation=x)
    with pytest.raises(DataError, match="labels"):
        measure(model, x, ["atc"], validation=(x, y + 9))


def test_heads_and_probabilities() -> None:
    """A yes-or-no logit z is the two logits 0 and z; several labels have no classes; a softmax hides the energy."""
    torch.manual_seed(0)
    x = torch.randn(30, 5)
    one = nn.Linear(5, 1)
    two = nn.Linear(5, 2)
    with torch.no_grad():
        two.weight.copy_(torch.cat([torch.zeros(1, 5), one.weight]))
        two.bias.copy_(torch.cat([torch.zeros(1), one.bias]))
    names = ["energy", "margin", "nuclear_norm", "mano"]
    binary = values(one, x, names, outputs=Outputs(head="binary"))
    assert binary == pytest.approx(values(two, x, names), rel=1e-5)
    several = values(nn.Linear(5, 3), x, names, outputs=Outputs(head="multilabel"))
    assert [name for name, value in several.items() if value is None] == ["nuclear_norm", "mano"]
    kind = Outputs(kind="probabilities")
    hidden = values(nn.Sequential(two, nn.Softmax(1)), x, [*names, "last_layer_gradient_norm"], outputs=kind)
    assert {name for name, value in hidden.items() if value is None} == {
        *("energy", "mano", "last_layer_gradient_norm")
    }
    assert hidden["margin"] == pytest.approx(binary["margin"], rel=1e-4)


def test_fisher_rao_by_the_dense_matrix(case: Case) -> None:
    each = np.einsum("i,nij,j->n", case.theta.numpy(), case.fisher_terms.numpy(), case.theta.numpy())
    row = measure(case.model, case.batches(), ["fisher_rao"]).rows["fisher_rao"]
    assert row.value == pytest.approx(each.mean(), rel=1e-6)
    assert row.stderr_examples == pytest.approx(each.std(ddof=1) / math.sqrt(7), rel=1e-6)


# ---- weights


def test_spectra_of_layers_by_numpy() -> None:
    model, x, _ = network()
    kernel, last = model[0].weight.detach().numpy(), model[5].weight.detach().numpy()
    slices = [np.linalg.svd(kernel[:, :, i, j])[1] ** 2 for i, j in itertools.product(range(3), repeat=2)]
    spectra = [np.concatenate(slices), np.linalg.svd(last)[1] ** 2]
    norms = [np.linalg.norm(one.reshape(len(one), -1), 2) for one in (kernel, last)]
    found = measure(model, x, ["stable_rank", "log_spectral_norm"]).rows
    expected = np.mean([one.sum() / one.max() for one in spectra])
    assert found["stable_rank"].value == pytest.approx(expected, rel=1e-9)
    assert found["stable_rank"].details["num_layers"] == 2
    assert found["log_spectral_norm"].value == pytest.approx(np.log(norms).sum(), rel=1e-9)
    part = values(model, x, ["log_spectral_norm"], settings=Settings(params="^5"))
    assert part["log_spectral_norm"] == pytest.approx(np.log(norms[1]), rel=1e-9)
    assert np.allclose(eigenvalues(model[0].weight.detach()), np.sort(spectra[0]))


def test_a_power_law_is_recovered() -> None:
    """From its own quantiles, with another law below the threshold."""
    alpha, size = 2.7, 2000
    tail = (1 - (np.arange(size) + 0.5) / size) ** (-1 / (alpha - 1))
    bulk = np.linspace(0.3, 0.99, 700)
    assert power_law(np.sort(np.concatenate([bulk, tail]))) == pytest.approx(alpha, rel=0.02)


def test_power_law_by_a_loop_over_thresholds() -> None:
    values = np.sort(np.random.default_rng(0).pareto(1.5, 60) + 0.2)
    best = (math.inf, 0.0)
    for least in values[:-1]:
        tail = values[values >= least]
        alpha = 1 + len(tail) / np.log(tail / least).sum()
        below = [abs(1 - (v / least) ** (1 - alpha) - np.mean(tail < v)) for v in tail]
        best = min(best, (max(below), alpha))
    assert power_law(values) == pytest.approx(best[1], rel=1e-9)


def test_layers_of_few_eigenvalues_have_no_power_law() -> None:
    model, x, _ = network()
    assert min(model[0].weight.shape[:2]) * 9 < LEAST  # 2 in each of 9 slices
    row = measure(model, x, ["power_law_alpha"]).rows["power_law_alpha"]
    assert row.value is None
    assert "eigenvalues" in row.details["reason"]


def test_path_norm_by_every_path() -> None:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(3, 4, bias=False), nn.ReLU(), nn.Linear(4, 2, bias=False)).double()
    first, second = (model[i].weight.detach().numpy() for i in (0, 2))
    paths = itertools.product(range(3), range(4), range(2))
    expected = math.sqrt(sum((first[j, i] * second[k, j]) ** 2 for i, j, k in paths))
    found = values(model, torch.randn(5, 3).double(), ["path_norm"])
    assert found["path_norm"] == pytest.approx(expected, rel=1e-9)


def test_path_norm_takes_batch_norm_for_its_affine_map() -> None:
    model, x, _ = network()
    norm = model[1]
    scale = norm.weight / (norm.running_var + norm.eps).sqrt()
    folded = nn.Conv2d(2, 6, 3, padding=1).double()
    with torch.no_grad():
        folded.weight.copy_(model[0].weight * scale[:, None, None, None])
        folded.bias.copy_((model[0].bias - norm.running_mean) * scale + norm.bias)
    alike = nn.Sequential(folded, *model[2:])
    assert torch.allclose(alike(x), model(x))
    # a bias before BatchNorm is a path of its own, and so must be 0 for the two to have the same paths
    with torch.no_grad():
        model[0].bias.zero_()
        folded.bias.copy_(-norm.running_mean * scale + norm.bias)
    assert values(model, x, ["path_norm"]) == pytest.approx(values(alike, x, ["path_norm"]), rel=1e-9)


@pytest.mark.parametrize("squashing", [nn.Tanh, nn.Sigmoid, lambda: nn.LayerNorm(4)])
def test_a_network_that_squashes_has_no_path_norm(squashing: type[nn.Module]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), squashing(), nn.Linear(4, 2))
    row = measure(model, torch.randn(5, 3), ["path_norm"]).rows["path_norm"]
    assert row.value is None
    assert "not piecewise linear" in row.details["reason"]


@pytest.mark.filterwarnings("ignore")  # the first two are deprecated
@pytest.mark.parametrize(
    "derive",
    [
        nn.utils.weight_norm,
        nn.utils.spectral_norm,
        parametrizations.spectral_norm,
        lambda layer: prune.l1_unstructured(layer, "weight", 0.5),
    ],
)
def test_weights_that_are_made_of_parameters_count_as_they_are_used(derive: Callable[..., nn.Module]) -> None:
    """Also after a file is loaded, when the layer's attribute still holds what it was before."""
    trained, loaded = (derive(nn.Linear(6, 4)).double().eval() for _ in range(2))
    trained.load_state_dict({name: 1.5 * value for name, value in trained.state_dict().items()})
    loaded.load_state_dict(trained.state_dict())
    x = torch.randn(3, 6).double()
    used = (trained(torch.eye(6).double()) - trained.bias).detach().numpy().T
    found = measure(loaded, x, ["stable_rank", "log_spectral_norm", "path_norm"]).rows
    singular = np.linalg.svd(used)[1]
    assert found["stable_rank"].value == pytest.approx((singular**2).sum() / singular[0] ** 2, rel=1e-9)
    assert found["log_spectral_norm"].value == pytest.approx(math.log(singular[0]), rel=1e-9)
    assert found["path_norm"].value is None
    assert "other parameters" in found["path_norm"].details["reason"]


# ---- all of them


def test_groups_stand_for_their_measures() -> None:
    every = [expanded([group], labeled=True, validation=True) for group in ("curvature", "outputs", "norms")]
    assert (
        sorted(name for group in every for name in group)
        == sorted(MEASURES)
        == sorted(expanded(["all"], labeled=True, validation=True))
    )
    assert "error" not in expanded(["outputs"], labeled=False)
    assert "cot" not in expanded(["all"], labeled=True)
    assert "mano" not in expanded(["all"], labeled=True, batch_dependent=True)
    assert expanded(["norms", "parameter_norm", "error"], labeled=False)[-1] == "error"
    model, x, _ = network()
    assert list(measure(model, x, ["norms"]).rows) == expanded(["norms"], labeled=False)


def test_a_frozen_model_has_outputs_and_weights_but_no_derivatives() -> None:
    model, x, y = network()
    names = ["mean_confidence", "margin", "nuclear_norm", "parameter_norm", "stable_rank", "path_norm"]
    free = values(model, x, names)
    estimate = gm_probe.estimate(model, x, validation=(x, y)).conclusion
    model.requires_grad_(False)
    assert values(model, x, names) == free
    assert gm_probe.estimate(model, x, validation=(x, y)).conclusion == estimate
    with pytest.raises(UsageError, match="fisher_rao: the model has no trainable parameters"):
        measure(model, x, ["fisher_rao"])


def test_the_initial_model_must_be_the_same_network() -> None:
    model, x, _ = network()
    before = copy.deepcopy(model)
    with torch.no_grad():
        before[5].bias += 2
    found = values(model, x, ["distance_from_initialization"], initial=nn.DataParallel(before))
    assert found["distance_from_initialization"] == pytest.approx(4)  # 2·√4
    before[5] = nn.Linear(54, 1)  # whose shape would broadcast
    for other in (before, nn.Linear(5, 4)):
        with pytest.raises(UsageError, match=r"another network, without a parameter '.*weight'"):
            measure(model, x, ["distance_from_initialization"], initial=other)


# ---- layers


@pytest.mark.parametrize("name", ["relu-mlp", "tanh-mlp"])
def test_layers_by_blocks_of_the_dense_matrices(name: str) -> None:
    case = BY_NAME[name]
    settings = Settings(eigen_tolerance=1e-6, trace_tolerance=0.0, max_probes=60)
    rows = by_layer(case.model, case.batches(), settings)
    start = 0
    for row in rows:
        size = row["num_parameters"]
        block = slice(start, start + size)
        for kind, terms in (("fisher", case.fisher_terms), ("hessian", case.hessian_terms)):
            eigen = np.linalg.eigvalsh(terms.mean(0).numpy()[block, block])
            top, trace = row["measures"][f"{kind}_lambda_max"], row["measures"][f"{kind}_trace"]
            assert top["value"] == pytest.approx(eigen[-1], rel=1e-5, abs=1e-9)
            error = 1e-9 if trace["stderr"] is None else 4 * trace["stderr"] + 1e-9
            assert abs(trace["value"] - eigen.sum()) <= error + 1e-9 * abs(eigen.sum())
        start += size
    assert start == len(case.theta)
    assert len({row["layer"] for row in rows}) == len(rows)
