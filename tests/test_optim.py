"""The rules as torch optimizers: bit for bit what the rules give, within torch's contract."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from test_rules import grads, make, normed_mlp, seeded
from torch import Tensor, nn
from torch._dynamo.backends.debugging import aot_eager
from torch.nn import functional

import gm_probe
from gm_probe import optim
from gm_probe.errors import UsageError
from gm_probe.training.methods import METHODS

ADAPTERS: dict[str, type[optim.RuleOptimizer]] = {
    "sam": optim.SAM,
    "asam": optim.ASAM,
    "iam-d": optim.IAMD,
    "iam-d-onepass": optim.OnePassIAMD,
    "iam-s": optim.IAMS,
}
BASES: dict[str, tuple[Any, dict[str, Any]]] = {
    "sgd": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-3}),
    "adamw": (torch.optim.AdamW, {"lr": 0.01}),
}
FIVE = [(torch.randn(8, 3, generator=seeded(i), dtype=torch.float64), torch.arange(8) % 3) for i in range(5)]


def dropping() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 16), nn.BatchNorm1d(16), nn.Dropout(0.5), nn.Tanh(), nn.Linear(16, 3))


def closure_of(model: nn.Module, x: Tensor, y: Tensor) -> optim.Closure:
    def closure() -> tuple[Tensor, Tensor]:
        logits = model(x)
        return functional.cross_entropy(logits, y), logits

    return closure


def weights(model: nn.Module) -> Tensor:
    return torch.cat([value.double().flatten() for value in model.state_dict().values()])


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("method", ADAPTERS)
@pytest.mark.parametrize("build", [normed_mlp, dropping], ids=lambda b: b.__name__)
def test_five_steps_are_the_rules_bit_for_bit(method: str, base: str, build: Callable[[], nn.Module]) -> None:
    kind, options = BASES[base]
    ours, theirs = make(build), make(build)
    adapter = ADAPTERS[method](ours, kind, rho=0.3, generator=seeded(5), **options)
    rule, optimizer = (
        METHODS[method](theirs, rho=0.3, generator=seeded(5)),
        kind(theirs.parameters(), **options),
    )
    states = []
    for use in ("adapter", "rule"):
        torch.manual_seed(1)
        for x, y in FIVE:
            if use == "adapter":
                adapter.zero_grad()
                loss = adapter.step(closure_of(ours, x, y))
                assert torch.equal(loss, adapter.seen.loss)
            else:
                optimizer.zero_grad()
                seen = rule.backward(x, y)
                optimizer.step()
        states.append(torch.get_rng_state())
    assert torch.equal(weights(ours), weights(theirs))
    assert torch.equal(*states)
    assert torch.equal(loss, seen.loss)
    assert torch.equal(adapter.seen.logits, seen.logits)


def begun(method: str, base: str, seed: int, **changes: Any) -> tuple[nn.Module, optim.RuleOptimizer]:
    kind, options = BASES[base]
    model = make(normed_mlp, seed)
    return model, ADAPTERS[method](model, kind, every=2, **{**options, "rho": 0.3, **changes})


def stepped(model: nn.Module, adapter: optim.RuleOptimizer, batches: slice) -> dict[str, Tensor]:
    for x, y in FIVE[batches]:
        adapter.zero_grad()
        adapter.step(closure_of(model, x, y))
    return model.state_dict()


def go_on(file: str) -> None:
    """What another process does with the states in ``file``: two more steps, from other settings."""
    ended = {}
    for (method, base), state in torch.load(file, weights_only=True).items():
        model, adapter = begun(method, base, 3, lr=9.0, rho=0.01)
        model.load_state_dict(state["model"])
        adapter.load_state_dict(state["optimizer"])
        ended[method, base] = stepped(model, adapter, slice(2, 4))
    torch.save(ended, file)


def test_the_state_goes_on_in_another_process(tmp_path: Path) -> None:
    """Two steps here, the state in a file, two more here and there."""
    states, here = {}, {}
    for method, base in product(ADAPTERS, BASES):
        model, adapter = begun(method, base, 0)
        before = {name: value.clone() for name, value in stepped(model, adapter, slice(2)).items()}
        states[method, base] = copy.deepcopy({"model": before, "optimizer": adapter.state_dict()})
        here[method, base] = stepped(model, adapter, slice(2, 4))
    file = str(tmp_path / "states.pt")
    torch.save(states, file)
    path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    code = f"import test_optim; test_optim.go_on({file!r})"
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    there = torch.load(file, weights_only=True)
    for key, state in here.items():
        for name, value in state.items():
            assert torch.equal(value, there[key][name]), (key, name)


@pytest.mark.parametrize("method", ["sam", "asam", "iam-d", "iam-s"])
def test_a_groups_radius_scales_its_part_of_the_perturbation(method: str) -> None:
    """δ has the direction and norm of one radius; each group's part is then stretched to its own."""
    model, (x, y) = make(), FIVE[0]
    first, last = list(model.parameters())[:2], list(model.parameters())[2:]
    fixed: dict[str, Any] = {"sign": "none"} if method == "iam-s" else {}
    offsets = {}
    for key, radii in {"one": (0.3, 0.3), "two": (0.3, 0.06), "none": (0.3, 0.0)}.items():
        groups = [{"params": p, "rho": rho} for p, rho in zip((first, last), radii, strict=True)]
        adapter = ADAPTERS[method](model, params=groups, lr=0.1, generator=seeded(5), **fixed)
        seen: list[Tensor] = []

        def closure(seen: list[Tensor] = seen) -> tuple[Tensor, Tensor]:
            seen.append(torch.cat([model[0].weight.flatten(), model[-1].weight.flatten()]).detach().clone())
            return closure_of(model, x, y)()

        adapter.backward(closure)
        offsets[key] = seen[-1] - seen[0]
    size = model[0].weight.numel()
    assert float(offsets["none"][size:].abs().max()) == 0
    torch.testing.assert_close(offsets["two"][:size], offsets["one"][:size])
    torch.testing.assert_close(offsets["two"][size:], offsets["one"][size:] * 0.2)


def test_groups_have_their_own_rates_and_schedulers_reach_them() -> None:
    model, plain = make(), make()
    groups = [
        [{"params": m[0].parameters()}, {"params": m[-1].parameters(), "lr": 0.5}] for m in (model, plain)
    ]
    adapter = optim.SAM(model, params=groups[0], lr=0.1, rho=0.0, momentum=0.9)
    sgd = torch.optim.SGD(groups[1], lr=0.1, momentum=0.9)
    schedulers = [torch.optim.lr_scheduler.OneCycleLR(o, 1.0, total_steps=5) for o in (adapter, sgd)]
    for x, y in FIVE:
        for network, optimizer, scheduler in zip((model, plain), (adapter, sgd), schedulers, strict=True):
            optimizer.zero_grad()
            if optimizer is sgd:
                closure_of(network, x, y)()[0].backward()
                optimizer.step()
            else:
                optimizer.step(closure_of(network, x, y))
            scheduler.step()
    torch.testing.assert_close(weights(model), weights(plain))
    assert [g["lr"] for g in adapter.param_groups] == [g["lr"] for g in sgd.param_groups]


def test_a_radius_may_be_scheduled() -> None:
    model, (x, y) = make(), FIVE[0]
    adapter = optim.IAMD(model, lr=0.1, rho=0.3, beta=2.0, generator=seeded(5))
    rule = gm_probe.IAMD(model, rho=0.1, beta=0.5, generator=seeded(5))
    adapter.param_groups[0].update(rho=0.1, beta=0.5)
    adapter.backward(closure_of(model, x, y))
    ours = grads(model)
    model.zero_grad()
    rule.backward(x, y)
    assert torch.equal(grads(model), ours)


@pytest.mark.parametrize("method", ADAPTERS)
def test_gradients_of_several_batches_clipping_and_a_scaler(method: str) -> None:
    """Two batches of weight 1/2 accumulate; the scaler's factor, a power of 2, is gone after unscaling."""
    models = [make() for _ in range(2)]
    options: dict[str, Any] = {"lr": 0.1, "rho": 0.3}
    adapters = [ADAPTERS[method](m, generator=seeded(5), **options) for m in models]
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for model, adapter, used in zip(models, adapters, (scaler, None), strict=True):
        adapter.zero_grad()
        for x, y in FIVE[:2]:
            adapter.backward(closure_of(model, x, y), weight=0.5, scaler=used)
        if used is not None:
            used.unscale_(adapter)
        assert float(nn.utils.clip_grad_norm_(model.parameters(), 0.01)) > 0.01
        if used is None:
            adapter.step()
        else:
            used.step(adapter)
            used.update()
    torch.testing.assert_close(weights(models[0]), weights(models[1]))
    assert not torch.equal(weights(models[0]), weights(make()))


def test_half_a_weight_is_half_the_gradient() -> None:
    model, (x, y) = make(), FIVE[0]
    found = []
    for weight in (1.0, 0.5):
        model.zero_grad()
        gm_probe.IAMD(model, rho=0.3, generator=seeded(5)).backward(x, y, weight=weight)
        found.append(grads(model))
    torch.testing.assert_close(found[1], found[0] / 2)


@pytest.mark.parametrize(
    ("closure", "words"),
    [
        (lambda model: closure_of(model, *FIVE[0])()[0], "not (loss, logits)"),
        (lambda model: closure_of(model, *FIVE[0])()[::-1], "a single number, like a loss"),
        (lambda model: (model(FIVE[0][0]), model(FIVE[0][0])), "not one number"),
    ],
    ids=["a loss alone", "the wrong way round", "no loss"],
)
def test_a_closure_that_returns_something_else(closure: Any, words: str) -> None:
    model = make()
    with pytest.raises(UsageError) as told:
        optim.IAMD(model, lr=0.1).step(lambda: closure(model))
    assert words in str(told.value)


def test_what_makes_no_sense_is_refused() -> None:
    model = make()
    body, head = ({"params": list(part.parameters())} for part in (model[0], model[-1]))
    with pytest.raises(UsageError, match="takes the model, not a generator"):
        optim.SAM(model.parameters(), lr=0.1)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="are in no group"):
        optim.SAM(model, params=[body], lr=0.1)
    with pytest.raises(UsageError, match="all groups must have the same"):
        optim.IAMD(model, params=[body, {**head, "beta": 2.0}], lr=0.1)
    with pytest.raises(UsageError, match="rho"):
        optim.SAM(model, params=[body, {**head, "rho": -1.0}], lr=0.1)
    with pytest.raises(UsageError, match="m splits a batch"):
        optim.SAM(model, lr=0.1, m=4)
    with pytest.raises(TypeError):
        optim.SAM(model, lr=0.1, kl_grad="both")  # neither the rule nor SGD has it
    adapter = optim.SAM(model, lr=0.1)
    closure_of(model, *FIVE[0])()[0].backward()
    with pytest.raises(UsageError, match=r"needs step\(closure\)"):
        adapter.step()
    with pytest.raises(UsageError, match="of a plain optimizer"):
        adapter.load_state_dict(torch.optim.SGD(model.parameters(), lr=0.1).state_dict())


@pytest.mark.parametrize("method", ADAPTERS)
@pytest.mark.filterwarnings("ignore")  # torch's own, while it compiles
def test_every_pass_of_a_compiled_network_is_compiled(method: str) -> None:
    """The clean and the perturbed passes run through torch.compile, and give the plain network's steps."""
    models = [make(normed_mlp) for _ in range(2)]
    calls = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        calls.append(graph)
        return aot_eager(graph, inputs)

    torch._dynamo.reset()
    networks = [models[0], torch.compile(models[1], backend=backend)]
    for model, network in zip(models, networks, strict=True):
        adapter = ADAPTERS[method](model, lr=0.1, rho=0.3, generator=seeded(5))
        for x, y in FIVE[:3]:
            adapter.zero_grad()
            adapter.step(closure_of(network, x, y))
    assert 1 <= len(calls) <= 4  # with and without gradients, at the model's own and at moved weights
    torch.testing.assert_close(weights(models[0]), weights(models[1]), rtol=1e-9, atol=1e-12)


def test_a_base_that_needs_a_closure_of_its_own_is_refused() -> None:
    with pytest.raises(UsageError, match=r"LBFGS evaluates the loss several times per step.*such as SGD"):
        optim.IAMD(nn.Linear(2, 3), torch.optim.LBFGS, lr=0.1)


FSDP = """
import torch
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
import gm_probe
from gm_probe import optim
distributed.init_process_group("gloo")
model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 3))
fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
for build in (gm_probe.SAM, lambda model: optim.IAMD(model, lr=0.1)):
    try:
        build(model)
    except gm_probe.UsageError as error:
        assert "the model is sharded (FSDP)" in str(error), error
    else:
        raise AssertionError("it was taken")
distributed.destroy_process_group()
"""


def test_sharded_models_are_refused_by_name(tmp_path: Path) -> None:
    script = tmp_path / "sharded.py"
    script.write_text(FSDP)
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run([sys.executable, *launch, str(script)], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
