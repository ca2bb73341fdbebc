"""Faults from outside: memory, signals, numbers that go wrong, file systems without locks, disks that fail."""

import errno
import fcntl
import json
import math
import os
import signal
import socket
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gm_probe.cli import main
from gm_probe.curvature import example_gradients, operators
from gm_probe.data.batches import Batches
from gm_probe.data.memory import within_memory
from gm_probe.errors import BusyError, DivergedError, ResourceError, StorageError
from gm_probe.files import locks
from gm_probe.files.locks import LOCK, exclusive, locked
from gm_probe.measures.catalogue import MEASURES
from gm_probe.measures.measure import measure
from gm_probe.measures.settings import Settings
from gm_probe.models.parameters import Parameters
from gm_probe.runs.records import read_metrics
from gm_probe.runtime.signals import TERMINATED, Terminated
from gm_probe.training import evaluation, rule, run
from gm_probe.training.config import TrainConfig
from gm_probe.training.loop import train
from gm_probe.training.methods import iam
from gm_probe.training.objectives.supervised import Objective
from gm_probe.training.run import Training

TINY = {
    "data": "digits",
    "model": "mlp-8",
    "num_train": 80,
    "num_unlabeled": 20,
    "num_test": 40,
    "epochs": 3,
    "batch_size": 20,
    "device": "cpu",
}
NAMES = [
    "local_inconsistency",
    "fisher_lambda_max",
    "fisher_trace",
    "hessian_lambda_max",
    "hessian_trace",
    "mean_entropy",
    "input_jacobian_norm",
]
SETTINGS = Settings(num_starts=2)


def config(**changes: Any) -> TrainConfig:
    return TrainConfig.from_dict({**TINY, **changes})


def network() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layers = [nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 5)]
        return nn.Sequential(*layers)


def inputs(size: int = 24, dtype: torch.dtype = torch.float32) -> Batches:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(size, 1, 8, 8, generator=generator)
    return Batches.from_tensors(x.to(dtype), batch_size=16)


def whole(model: nn.Module) -> dict[str, Any]:
    """All of a model that a measurement could leave changed."""
    tensors = {name: value.detach().clone() for name, value in model.state_dict().items()}
    others = {name: (p.requires_grad, p.grad, id(p)) for name, p in model.named_parameters()}
    hooks = [
        (dict(m._forward_hooks), dict(m._forward_pre_hooks), "forward" in vars(m)) for m in model.modules()
    ]
    modes = [module.training for module in model.modules()]
    return {"tensors": tensors, "others": others, "hooks": hooks, "modes": modes}


def same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    pairs = zip(one["tensors"].values(), other["tensors"].values(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs) and all(
        one[k] == other[k] for k in ("others", "hooks", "modes")
    )


# ---- memory


DEPTHS: dict[str, tuple[Any, str]] = {
    "forward": (Parameters, "logits"),
    "jvp": (operators, "jvp"),
    "accumulate": (Parameters, "join"),
    "vjp": (operators, "gradients"),
    "example gradients": (example_gradients.ExampleGradients, "_tapped"),
}
ERRORS = {
    "cuda": lambda: torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    "cpu": lambda: RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"),
    "python": MemoryError,
}


@pytest.mark.parametrize(
    ("depth", "error"), [*((depth, "cuda") for depth in DEPTHS), ("forward", "cpu"), ("vjp", "python")]
)
def test_batches_are_halved_where_memory_runs_out(
    monkeypatch: pytest.MonkeyPatch, depth: str, error: str
) -> None:
    model = network().double()
    expected = measure(model, inputs(dtype=torch.float64), NAMES, SETTINGS)
    before = whole(model)
    owner, name = DEPTHS[depth]
    original, calls = getattr(owner, name), 0

    def failing(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls in {3, 30}:
            raise ERRORS[error]()
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, failing)
    found = measure(model, inputs(dtype=torch.float64), NAMES, SETTINGS)
    assert calls >= 3
    assert found.batch_size in {8, 4}
    for row in NAMES:
        assert found.rows[row].value == pytest.approx(expected.rows[row].value, rel=1e-6), row
        assert found.rows[row].converged == expected.rows[row].converged
    assert same(whole(model), before)


def test_a_single_example_that_is_too_much_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*_: object, **__: object) -> Tensor:
        raise MemoryError

    monkeypatch.setattr(Parameters, "in_force", failing)
    with pytest.raises(ResourceError, match="single example") as caught:
        measure(network(), inputs(), ["mean_entropy"])
    assert caught.value.exit_code == 6


STEPS: dict[str, tuple[Any, str]] = {
    "batch": (Training, "_batch"),
    "clean pass": (nn.Flatten, "forward"),
    "ascent": (iam, "kl_gradient"),
    "gradient": (rule.Rule, "_differentiate"),
    "update": (torch.optim.SGD, "step"),
}


@pytest.mark.parametrize("depth", STEPS)
def test_training_never_changes_its_batch_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], depth: str
) -> None:
    options = [part for key, value in TINY.items() for part in (f"--{key.replace('_', '-')}", str(value))]
    command = ["train", "-q", "--method", "iam-d", *options]
    main([*command, "--out", str(tmp_path / "whole")])
    sizes: list[int] = []
    step = Training._step

    def counted(self: Training, *batch: Tensor) -> None:
        sizes.append(len(batch[0]))
        step(self, *batch)

    monkeypatch.setattr(Training, "_step", counted)
    owner, name = STEPS[depth]
    original = getattr(owner, name)

    def failing(*args: Any, **kwargs: Any) -> Any:
        if len(sizes) == 6:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB\nof many")
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, failing)
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main([*command, "--out", str(tmp_path / "a")])
    assert stop.value.code == 6
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert "batches of 20" in err
    assert "--m" in err
    assert set(sizes) == {20}
    monkeypatch.undo()
    main([*command, "--out", str(tmp_path / "a"), "--resume"])  # from the epoch before
    final = "checkpoint.safetensors"
    assert (tmp_path / "a" / final).read_bytes() == (tmp_path / "whole" / final).read_bytes()


def test_figures_along_the_way_say_where_their_batches_were_halved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = [part for key, value in TINY.items() for part in (f"--{key.replace('_', '-')}", str(value))]
    command = ["train", "--track-every", "1", "--eval-every", "1", *options, "--out"]
    main([*command, str(tmp_path / "whole")])
    assert "out of memory" not in capsys.readouterr().err
    probing, evaluating = Parameters.logits, evaluation.logits_at

    def logits(self: Parameters, x: Tensor, *rest: Any) -> Tensor:
        if len(x) > 10:
            raise MemoryError
        return probing(self, x, *rest)

    def logits_at(model: nn.Module, x: Tensor) -> Tensor:
        if len(x) > 30:
            raise MemoryError
        return evaluating(model, x)

    monkeypatch.setattr(Parameters, "logits", logits)
    monkeypatch.setattr(evaluation, "logits_at", logits_at)
    main([*command, str(tmp_path / "halved")])
    err = capsys.readouterr().err
    assert [f"after epoch {epoch}: went on with batches of 10" in err for epoch in (1, 2, 3)] == [True] * 3
    found, expected = (list(read_metrics(tmp_path / name)) for name in ("halved", "whole"))
    for row, other in zip(found, expected, strict=True):
        assert row.pop("local_inconsistency_batch_size") == 10
        for timed in ("seconds", "examples_per_second"):
            del row[timed], other[timed]
        assert row == pytest.approx(other, rel=1e-5)  # single precision


def test_a_batch_that_belongs_to_what_is_computed_is_not_halved() -> None:
    def failing(_: Batches) -> None:
        raise MemoryError

    batch_dependent = Batches(inputs().examples, batch_size=12, batch_dependent=True)
    with pytest.raises(ResourceError, match="batches of 12, whose examples depend on each other"):
        within_memory(batch_dependent, failing)


# ---- the model after an exception at any stage


@pytest.mark.parametrize("depth", [*DEPTHS, "layer"])
def test_a_model_is_left_whole_after_an_exception_anywhere(
    monkeypatch: pytest.MonkeyPatch, depth: str
) -> None:
    model = network()
    model[0].weight.grad = torch.ones_like(model[0].weight)
    model[4].bias.requires_grad_(False)
    names = [name for name in MEASURES if name not in {"error", "cross_entropy"}]
    before, flags = whole(model), torch.backends.mha.get_fastpath_enabled()
    state = torch.get_rng_state()
    owner, name = {**DEPTHS, "layer": (nn.Flatten, "forward")}[depth]
    original, calls, limit = getattr(owner, name), 0, -1

    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == limit:
            raise KeyboardInterrupt
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, counted)
    measure(model, inputs(), names, SETTINGS, initial=network())
    total = calls
    assert total >= 3
    for limit in sorted({1, 2, 3, *range(4, total, max(1, total // 6)), total}):
        calls = 0
        with pytest.raises(KeyboardInterrupt):
            measure(model, inputs(), names, SETTINGS, initial=network())
        assert same(whole(model), before), limit
        assert torch.backends.mha.get_fastpath_enabled() == flags
        assert torch.equal(torch.get_rng_state(), state)


# ---- numbers


def _weight(training: Training) -> Tensor:
    return next(training.model.parameters())


def _momentum(training: Training) -> Tensor:
    return training.updates.optimizer.state[_weight(training)]["momentum_buffer"]


def _buffer(training: Training) -> Tensor:
    return next(b for b in training.model.buffers() if b.is_floating_point())


def _average(training: Training) -> Tensor:
    return next(training.updates.average.module.parameters())


def _data(training: Training, monkeypatch: pytest.MonkeyPatch) -> None:
    original = training._batch

    def batch(chosen: Tensor, x: Tensor) -> Tensor:
        x = original(chosen, x)
        x.view(-1)[0] = float("nan")
        return x

    monkeypatch.setattr(training, "_batch", batch)


def _gradient(training: Training, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training.updates.scaler, "unscale_", lambda _: _weight(training).grad.fill_(math.nan))


def _loss(training: Training, monkeypatch: pytest.MonkeyPatch) -> None:
    objective = training.updates.rule.objective
    monkeypatch.setattr(training.updates.rule, "objective", Objective(lambda *a: objective(*a) * math.nan))


def _perturbation(training: Training, monkeypatch: pytest.MonkeyPatch) -> None:
    original = Parameters.moved
    monkeypatch.setattr(Parameters, "moved", lambda self, offset: original(self, offset * math.nan))


@pytest.mark.parametrize(
    ("after", "where", "method", "named"),
    [  # NaN in a tensor after a step, or in what a step computes
        (True, _weight, "sgd", "loss|weight"),
        (True, _momentum, "sgd", "momentum_buffer|weight|loss"),
        (True, _buffer, "sgd", "buffer"),
        (True, _average, "sgd", "average"),
        (False, _data, "sgd", "loss"),
        (False, _gradient, "sgd", "weight"),
        (False, _loss, "sgd", "loss"),
        (False, _perturbation, "sam", "weight"),
        (False, _perturbation, "iam-d", "loss"),
        (False, _perturbation, "iam-s", "weight"),
    ],
)
@pytest.mark.parametrize("step", [5, 8])
def test_what_is_not_finite_is_named_ends_the_run_as_diverged_and_is_never_saved(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    after: bool,
    where: Any,
    method: str,
    named: str,
    step: int,
) -> None:
    calls = 0
    original = Training._step

    def poisoned(self: Training, *batch: Tensor) -> None:
        nonlocal calls
        calls += 1
        if calls == step and not after:
            where(self, monkeypatch)
        original(self, *batch)
        if calls == step and after:
            with torch.no_grad():
                where(self).view(-1)[0] = float("nan")

    monkeypatch.setattr(Training, "_step", poisoned)
    model = "wrn-10-1" if after else "mlp-8"
    with pytest.raises(DivergedError, match=named) as caught:
        train(config(model=model, method=method, ema_decay=0.9, checkpoint_every=1), tmp_path)
    assert caught.value.exit_code == 5
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert (summary["status"], summary["reason"]) == ("diverged", str(caught.value))
    state = torch.load(tmp_path / "state.pt", weights_only=True)  # the last good one
    for part in (state["model"], state["average"], *state["optimizer"]["state"].values()):
        assert all(bool(torch.isfinite(v).all()) for v in part.values() if isinstance(v, Tensor))
    assert (state["epoch"] * 4 + state["step"]) == step - 1


def test_correlate_counts_runs_that_diverged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe, runs = tmp_path / "recipe.toml", str(tmp_path / "runs")
    base = "\n".join(f"{key} = {json.dumps(value)}" for key, value in TINY.items())
    tables = (
        f'[base]\n{base}\n[grid]\nlr = [0.01, 0.03, 0.1, 1e30, 1e31]\n[measure]\nmeasures = ["mean_entropy"]'
    )
    recipe.write_text(tables)
    main(["sweep", str(recipe), "--out", runs, "-q"])
    capsys.readouterr()
    main(["correlate", runs, "--no-figure", "--json"])
    printed = capsys.readouterr()
    excluded = json.loads(printed.out)["excluded"]
    assert [row["reason"] for row in excluded] == ["diverged", "diverged"]
    assert all(row["run"].startswith("lr1e+3") for row in excluded)
    assert "(2 diverged)" in printed.err


def test_a_model_that_no_batch_size_makes_fit_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "initial_model", lambda *_: torch.empty(2**60))  # beyond any machine's addresses
    with pytest.raises(ResourceError, match=r"mlp-8 does not fit into memory .*Choose a smaller --model$"):
        train(config(), tmp_path)


# ---- SIGTERM


def test_sigterm_saves_the_state_and_resuming_gives_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    handler = signal.getsignal(signal.SIGTERM)
    train(config(model="mlp-8-8", augment=True), tmp_path / "whole")
    original = Training._step
    for step in (1, 3, 4, 7, 12):
        calls, out = 0, tmp_path / str(step)

        def signalled(self: Training, *batch: Tensor, step: int = step) -> None:
            nonlocal calls
            calls += 1
            original(self, *batch)
            if calls == step:
                os.kill(os.getpid(), signal.SIGTERM)

        monkeypatch.setattr(Training, "_step", signalled)
        with pytest.raises(Terminated) as caught:
            train(config(model="mlp-8-8", augment=True), out)
        assert caught.value.code == TERMINATED
        assert signal.getsignal(signal.SIGTERM) == handler
        monkeypatch.setattr(Training, "_step", original)
        if step < 12:
            state = torch.load(out / "state.pt", weights_only=True)
            assert state["epoch"] * 4 + state["step"] == step
        train(config(model="mlp-8-8", augment=True), out, resume=True)
        name = "checkpoint.safetensors"
        assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_sigterm_ends_a_command_in_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def signalled(**_: object) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)

    from gm_probe.cli import listings

    monkeypatch.setattr(listings.measures, "callback", signalled)
    with pytest.raises(SystemExit) as stop:
        main(["measures"])
    assert stop.value.code == TERMINATED
    assert capsys.readouterr().err == "gmprobe: terminated; finished results are kept\n"


# ---- locks


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", refuse)
    for hold in (lambda: exclusive(tmp_path), lambda: locked(tmp_path / "t.csv")):
        with pytest.raises(StorageError, match=r"without locks .*mount it with locks"), hold():
            pass


def test_of_many_machines_one_takes_a_folder_though_locks_exclude_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fcntl, "flock", lambda *_: None)
    host, original = threading.local(), locks.FolderLock.__init__
    monkeypatch.setattr(socket, "gethostname", lambda: host.name)
    all_look, took = threading.Barrier(8), []

    def slow(self: locks.FolderLock, file: Any) -> None:  # whoever else looks meanwhile would see nobody
        time.sleep(0.05)
        original(self, file)

    monkeypatch.setattr(locks.FolderLock, "__init__", slow)

    def machine(number: int) -> None:
        host.name = f"node{number}"
        all_look.wait()
        with suppress(BusyError), exclusive(tmp_path):
            took.append(number)
            time.sleep(1)

    threads = [threading.Thread(target=machine, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(took) == 1
    assert [path.name for path in tmp_path.iterdir()] == [LOCK]


def test_a_kill_while_a_folder_is_taken_is_got_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locks, "BEAT", 0.2)
    (tmp_path / locks.TAKING).touch()
    began = time.monotonic()
    with exclusive(tmp_path):
        assert time.monotonic() - began > 0.2  # it may have been another's
    assert [path.name for path in tmp_path.iterdir()] == [LOCK]


# ---- disks that fail at any write


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EROFS])
def test_a_disk_that_fails_at_any_write_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    settings = config(epochs=2)
    train(settings, tmp_path / "whole")
    original, calls, limit = os.fsync, 0, -1

    def failing(handle: int) -> None:
        nonlocal calls
        calls += 1
        if calls == limit:
            raise OSError(code, os.strerror(code))
        original(handle)

    monkeypatch.setattr(os, "fsync", failing)
    train(settings, tmp_path / "counted")
    total = calls
    assert total > 10
    for limit in range(1, total + 1):
        out, calls = tmp_path / f"{limit}", 0
        with pytest.raises(StorageError) as caught:
            train(settings, out)
        assert caught.value.exit_code == 7
        assert str(out) in str(caught.value)
        assert not list(out.glob(".*.tmp"))
        calls = -(10**9)
        train(settings, out, resume=True)
        name = "checkpoint.safetensors"
        assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), limit


@pytest.mark.parametrize(
    ("objective", "remedy"),
    [("fixmatch", "lower --mu, lower --batch-size"), ("simclr", "; lower --batch-size")],
)
def test_out_of_memory_names_no_option_that_is_refused(
    objective: str,
    remedy: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def failing(*_: Any, **__: Any) -> Any:
        raise MemoryError

    monkeypatch.setattr(torch.optim.SGD, "step", failing)
    options = "--data digits --model mlp-8 --num-train 60 --num-unlabeled 20 --num-test 40 --batch-size 10"
    labels = " --labels 20" if objective == "fixmatch" else ""
    with pytest.raises(SystemExit) as stop:
        main(f"train -q --objective {objective} {options}{labels} --out {tmp_path / 'a'}".split())
    assert stop.value.code == 6
    err = " ".join(capsys.readouterr().err.split())
    assert remedy in err
    assert "--m," not in err
