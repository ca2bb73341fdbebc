"""Numbers and choices that cannot be are usage errors at once, wherever a caller gives them."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import gm_probe
from gm_probe.checks import one_of, real, truth, whole
from gm_probe.errors import UsageError
from gm_probe.linalg.work import Work
from gm_probe.training.config import TrainConfig

NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize("value", [1, 7, np.int64(3), np.uint8(2)])
def test_whole_numbers(value: Any) -> None:
    assert whole("n", value) == value
    assert type(whole("n", value)) is int


@pytest.mark.parametrize(
    "value", [0, -1, 1.5, 2.0, NAN, INF, True, "3", None, [1], np.float64(1), torch.tensor(1)]
)
def test_no_whole_numbers(value: Any) -> None:
    with pytest.raises(UsageError, match=r"^n = .* must be a whole number ≥ 1$"):
        whole("n", value)
    with pytest.raises(UsageError, match="≥ 1 and ≤ 5"):
        whole("n", 6, 1, 5)


@pytest.mark.parametrize("value", [0.5, 1, np.float32(0.5)])
def test_numbers(value: Any) -> None:
    assert real("x", value, above=0, most=1) == value
    assert type(real("x", value)) is float


@pytest.mark.parametrize("value", [0, -1, 1.5, NAN, INF, -INF, True, "0.5", None])
def test_no_numbers(value: Any) -> None:
    with pytest.raises(UsageError, match=r"^x = .* must be a finite number above 0 and ≤ 1$"):
        real("x", value, above=0, most=1)


def test_choices_and_truth() -> None:
    assert one_of("kind", "a", ("a", "b")) == "a"
    assert truth("flag", False) is False
    for value in ("c", 1, None, ["a"]):
        with pytest.raises(UsageError, match=r"^kind = "):
            one_of("kind", value, ("a", "b"))
    for value in (0, 1, "yes", None):
        with pytest.raises(UsageError, match="must be True or False"):
            truth("flag", value)


# ---- the public entries

torch.manual_seed(0)
MODEL = nn.Linear(4, 3).eval()
X = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
Y = torch.tensor([0, 1, 2, 0, 1])
BATCHES = gm_probe.Batches.from_tensors(X, Y)
PARAMETERS = gm_probe.Parameters(MODEL)
CLEAN = MODEL(X).detach()


def hessian(labels: Any = Y) -> gm_probe.Operator:
    return gm_probe.hessian(PARAMETERS, BATCHES, labels)


def start() -> torch.Tensor:
    return torch.ones(15)


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


CALLS: dict[str, Callable[[], Any]] = {
    "labels beyond the classes": lambda: hessian(torch.full((5,), 9)),
    "negative labels": lambda: hessian(torch.full((5,), -1)),
    "labels of other examples": lambda: hessian(Y[:4]),
    "labels that are no whole numbers": lambda: hessian(Y.float()),
    "one label": lambda: hessian(9),
    "no start": lambda: gm_probe.eigenpairs(hessian(), torch.ones(3)),
    "Ask for at least one eigenpair": lambda: gm_probe.eigenpairs(hessian(), start(), top=0),
    "less than Ask for at least one eigenpair": lambda: gm_probe.eigenpairs(hessian(), start(), top=-1),
    "no iteration": lambda: gm_probe.eigenpairs(hessian(), start(), max_iterations=0),
    "half an iteration": lambda: gm_probe.eigenpairs(hessian(), start(), max_iterations=0.5),
    "a tolerance of nan": lambda: gm_probe.eigenpairs(hessian(), start(), tolerance=NAN),
    "no patience": lambda: gm_probe.eigenpairs(hessian(), start(), patience=0),
    "Lanczos without iterations": lambda: gm_probe.lanczos(
        hessian(), generator=generator(), max_iterations=0
    ),
    "a trace without random vectors": lambda: gm_probe.trace(hessian(), generator=generator(), max_probes=0),
    "a trace of a negative tolerance": lambda: gm_probe.trace(hessian(), generator=generator(), tolerance=-1),
    "tr F without random vectors": lambda: gm_probe.fisher_trace(
        PARAMETERS, BATCHES, CLEAN, Work(5), generator=generator(), max_probes=0
    ),
    "no batch": lambda: gm_probe.Batches(BATCHES.examples, batch_size=0),
    "half a batch": lambda: gm_probe.Batches.from_tensors(X, batch_size=2.5),
    "True as a batch": lambda: BATCHES.of_size(True),
    "m of 0": lambda: gm_probe.Rule(MODEL, m=0),
    "a radius of nan": lambda: gm_probe.SAM(MODEL, rho=NAN),
    "a negative radius": lambda: gm_probe.ASAM(MODEL, rho=-0.1),
    "an infinite eta": lambda: gm_probe.ASAM(MODEL, eta=INF),
    "no steps": lambda: gm_probe.IAMD(MODEL, k_steps=0),
    "a step and a half": lambda: gm_probe.IAMS(MODEL, k_steps=1.5),
    "a kl_grad that there is not": lambda: gm_probe.IAMD(MODEL, kl_grad="bth"),
    "a sign that there is not": lambda: gm_probe.IAMS(MODEL, sign="rnd"),
    "beta of 0": lambda: gm_probe.OnePassIAMD(MODEL, beta=0),
    "a threshold above 1": lambda: gm_probe.FixMatch(threshold=1.1),
    "a mean that there is not": lambda: gm_probe.FixMatch(mean="median"),
    "a temperature of 0": lambda: gm_probe.Contrastive(MODEL, MODEL, temperature=0),
    "no classes": lambda: gm_probe.build_model(gm_probe.ModelSpec("mlp", (4,), 0)),
    "no inputs": lambda: gm_probe.build_model(gm_probe.ModelSpec("mlp", (0,), 3)),
}
SETTINGS: list[dict[str, Any]] = [
    {"k_steps": 1.5}, {"k_steps": 0}, {"rho": 0}, {"rho": NAN}, {"rho": True}, {"rho": "0.1"}, {"num_starts": 0},
    {"max_probes": 1}, {"min_probes": 1.5}, {"max_iterations": 0}, {"top_eigenvalues": 0}, {"sub_batch": -1},
    {"eta": INF}, {"seed": -1}, {"trace_tolerance": -1}, {"eigen_tolerance": NAN}, {"ascent_tolerance": 1e-20},
    {"protocol": "papr"}, {"rho_grid": (0.1, -1)}, {"k_grid": (1.5,)}, {"rho_grid": 0.1}, {"params": 3},
]  # fmt: skip
CONFIGS: list[dict[str, Any]] = [
    {"threads": 0}, {"labels": -1}, {"labels": 0}, {"m": 0}, {"num_train": 0}, {"num_test": -5}, {"num_unlabeled": 0},
    {"epochs": 1.5}, {"epochs": 0}, {"epochs": True}, {"batch_size": 0}, {"k_steps": 0}, {"lr": NAN}, {"lr": -1},
    {"lr": "fast"}, {"momentum": INF}, {"rho": -1}, {"seed": -1}, {"split_seed": -1}, {"seed": 2**32},
    {"method": "foo"}, {"method": 3}, {"validation": 1.0}, {"label_smoothing": 1.0}, {"ema_decay": 1.0},
    {"checkpoint_every": 0}, {"image_size": 0}, {"milestones": [-1]}, {"milestones": [1.5]}, {"temperature": 0},
    {"clip_norm": 0}, {"objective": "fixmatch", "labels": 10, "threshold": 2.0}, {"augment": "yes"}, {"data": 3},
    {"epoch": 3},
]  # fmt: skip


@pytest.mark.parametrize("name", CALLS)
def test_what_cannot_be_is_a_usage_error_at_once(name: str) -> None:
    with pytest.raises(UsageError) as caught:
        CALLS[name]()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("given", SETTINGS, ids=str)
def test_settings_that_cannot_be(given: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        gm_probe.Settings(**given)


@pytest.mark.parametrize("given", CONFIGS, ids=str)
def test_a_configuration_that_cannot_be(given: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        TrainConfig.from_dict(given)


def test_what_can_be() -> None:
    assert gm_probe.eigenpairs(hessian(), start(), top=0, bottom=1)[1][0].converged
    assert hessian(Y.to(torch.int32)).size == 15
    settings = gm_probe.Settings(k_steps=np.int64(2), rho=1, rho_grid=(0.1, 1))
    assert [type(v) for v in (settings.k_steps, settings.rho)] == [int, float]
    assert TrainConfig.from_dict({"lr": 1, "seed": 2**32 - 1}).lr == 1.0
