"""A method or an objective is one file and one row: toys of each train through TrainConfig and the command line."""

from __future__ import annotations

import ast
import inspect
import json
from pathlib import Path
from typing import Any

import click
import pytest
import torch
from test_rules import grads, make
from torch import nn

import gm_probe
from gm_probe.cli import main
from gm_probe.cli.settings import setting_options
from gm_probe.errors import UsageError
from gm_probe.files.atomic import read_toml
from gm_probe.training.config import TrainConfig
from gm_probe.training.loop import train
from gm_probe.training.methods import METHODS, Method
from gm_probe.training.objectives import OBJECTIVES, ObjectiveChoice
from gm_probe.training.rule import Rule, RuleOptions

TOYS = {
    "halved": """
from gm_probe.training.rule import Rule

class Halved(Rule):
    def __init__(self, model, criterion, *, rho=1.0, **common):
        super().__init__(model, criterion, **common)
        self.rho = rho

    def _gradients(self, x, y):
        step, gradients = super()._gradients(x, y)
        return step, [self.rho * g for g in gradients]
""",
    "doubled": """
from gm_probe.training.objectives.supervised import Objective

class Doubled(Objective):
    def loss(self, logits, y):
        return 2 * super().loss(logits, y)
""",
}
TWO_STEPS: dict[str, Any] = {
    "model": "mlp-4", "num_train": 32, "num_unlabeled": 8, "num_test": 8, "batch_size": 16, "epochs": 1, "threads": 1,
}  # fmt: skip


@pytest.fixture
def toys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, code in TOYS.items():
        (tmp_path / f"{name}_toy.py").write_text(code)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setitem(METHODS, "halved", Method("halved_toy:Halved", ("rho",), positive=("rho",)))
    monkeypatch.setitem(
        OBJECTIVES, "doubled", ObjectiveChoice("doubled_toy:Doubled", refused={"m": "it is a toy"})
    )


def weights(folder: Path) -> bytes:
    return (folder / "checkpoint.safetensors").read_bytes()


@pytest.mark.usefixtures("toys")
def test_a_toy_method_and_a_toy_objective_train(tmp_path: Path) -> None:
    """Half of a gradient is half of the rate, and twice the loss is twice the rate: bit for bit, as powers of 2."""
    runs: dict[str, dict[str, Any]] = {
        "halved": {"method": "halved", "rho": 0.5, "lr": 0.1},
        "half": {"lr": 0.05},
        "doubled": {"objective": "doubled", "lr": 0.1},
        "twice": {"lr": 0.2},
        "both": {"method": "halved", "rho": 0.5, "objective": "doubled", "lr": 0.1},
        "plain": {"lr": 0.1},
    }
    for name, settings in runs.items():
        train(TrainConfig.from_dict({**TWO_STEPS, **settings}), tmp_path / name)
    for toy, same in (("halved", "half"), ("doubled", "twice"), ("both", "plain")):
        assert weights(tmp_path / toy) == weights(tmp_path / same), toy
    assert weights(tmp_path / "halved") != weights(tmp_path / "plain")


@pytest.mark.usefixtures("toys")
def test_the_command_line_knows_the_toys(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(TrainConfig.from_dict({**TWO_STEPS, "method": "halved", "rho": 0.5}), tmp_path / "python")
    small = [word for key, value in TWO_STEPS.items() for word in (f"--{key.replace('_', '-')}", str(value))]
    main(["train", "--method", "halved", "--rho", "0.5", *small, "--out", str(tmp_path / "cli"), "--quiet"])
    assert weights(tmp_path / "cli") == weights(tmp_path / "python")
    options = {option.name: option for option in setting_options(TrainConfig)(click.Command("new")).params}
    assert "halved" in str(options["method"].metavar)
    assert "doubled" in str(options["objective"].metavar)
    config = TrainConfig(method="halved", objective="doubled")
    assert "rho" not in config.idle()
    assert {"beta": "method", "mu": "objective"}.items() <= config.idle().items()
    with pytest.raises(UsageError, match="doubled takes no m: it is a toy"):
        config.replace(m=8)
    with pytest.raises(UsageError, match="rho"):
        config.replace(rho=0.0)


@pytest.mark.parametrize("name", METHODS)
def test_a_methods_settings_are_its_rules_options(name: str) -> None:
    parameters = inspect.signature(METHODS[name].rule).parameters.values()
    options = {p.name for p in parameters if p.kind is p.KEYWORD_ONLY} - set(RuleOptions.__annotations__)
    when = {"every", "tail"} if METHODS[name].rule.perturbs else set()
    assert set(METHODS[name].settings) == options | when
    assert set(METHODS[name].positive) <= set(METHODS[name].settings)


def test_nothing_else_asks_for_a_name() -> None:
    """No comparison with the name of a method or an objective stands anywhere; traits are asked for."""
    names = {*METHODS, *OBJECTIVES} - {"simclr", "joint"}  # which are words for heads and scatter plots too
    root = Path(gm_probe.__file__).parent
    found = []
    for path in root.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Compare):
                texts = {n.value for n in ast.walk(node) if isinstance(n, ast.Constant)}
                asked = {n.attr for n in ast.walk(node) if isinstance(n, ast.Attribute)}
                if texts & names or (asked & {"method", "objective"} and any(map(str, texts))):
                    found.append(f"{path.relative_to(root)}:{node.lineno}")
    assert not found


# every and tail


@pytest.mark.parametrize(
    ("options", "pattern"),
    [
        ({"every": 3}, "x..x..x..x"),
        ({"tail": 0.3, "total_steps": 10}, ".......xxx"),
        ({"every": 2, "tail": 0.5, "total_steps": 10}, ".....x.x.x"),
        ({"tail": 0.01, "total_steps": 10}, ".........x"),
        ({"total_steps": 10}, "xxxxxxxxxx"),
    ],
    ids=str,
)
@pytest.mark.parametrize("method", [name for name in METHODS if name != "sgd"])
def test_a_rule_acts_in_some_steps_only(method: str, options: dict[str, Any], pattern: str) -> None:
    """Where it does, the gradient is the rule's own; elsewhere it is backpropagation's."""
    x = torch.randn(8, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    y = torch.arange(8) % 3
    model = make()
    rule, own = (METHODS[method](model, rho=0.3, **o) for o in (options, {}))
    for step, expected in enumerate(pattern):
        model.zero_grad()
        (Rule(model) if expected == "." else own).backward(x, y)
        right = grads(model)
        model.zero_grad()
        rule.backward(x, y)
        assert torch.equal(grads(model), right), step
    acting = pattern.count("x")
    assert rule.cost(10) == acting * own.passes + (10 - acting) * 3
    assert rule.cost(0) == 0


def test_a_rule_goes_on_in_the_step_where_it_was() -> None:
    x, y = torch.randn(6, 3, dtype=torch.float64), torch.arange(6) % 3
    model = make()
    options: dict[str, Any] = {"every": 3, "rho": 0.3}
    rule = gm_probe.IAMD(model, **options)
    for _ in range(2):
        rule.backward(x, y)
    other = gm_probe.IAMD(model, **options)
    other.load_state_dict(rule.state_dict())
    for acts in (False, True, False):
        steps = [each.backward(x, y) for each in (rule, other)]
        assert [step.inconsistency is not None for step in steps] == [acts, acts]


@pytest.mark.parametrize(
    "wrong", [{"every": 0}, {"tail": 0.0}, {"tail": 1.5}, {"tail": 0.3}, {"tail": 0.3, "total_steps": 0}]
)
def test_schedules_that_make_no_sense(wrong: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=r"every|tail|total_steps"):
        gm_probe.SAM(nn.Linear(3, 3), **wrong)


@pytest.mark.parametrize("method", ["sam", "iam-d", "iam-d-onepass"])
def test_a_run_counts_what_it_computes(method: str, tmp_path: Path) -> None:
    """Six steps: by --every 4 the first and the fifth perturb, by --tail 0.3 the last two."""
    base = {**TWO_STEPS, "epochs": 3, "method": method}
    dear = METHODS[method](nn.Linear(1, 2)).passes / 3
    for name, settings in (("all", {}), ("every", {"every": 4}), ("tail", {"tail": 0.3})):
        summary = train(TrainConfig.from_dict({**base, **settings}), tmp_path / name)
        acting = 2 if settings else 6
        assert summary["gradient_evaluations"] == pytest.approx(acting * dear + 6 - acting)
        rows = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        compares = method.startswith("iam-d")
        with_term = [compares and (name != "tail" or epoch == 3) for epoch in (1, 2, 3)]
        if name == "every":
            with_term = [compares, False, compares]
        assert ["running_inconsistency" in row for row in rows] == with_term


def test_they_are_options_and_settings_of_a_recipe(tmp_path: Path) -> None:
    common = ["train", "--method", "iam-d", "--every", "2", "--set", "tail=0.5", "--set", "model=mlp-4"]
    small = ["--num-train", "20", "--epochs", "1", "--out", str(tmp_path / "run"), "-q"]
    main([*common, *small])
    config = read_toml(tmp_path / "run" / "config.toml")
    assert (config["every"], config["tail"], config["model"]) == (2, 0.5, "mlp-4")
    assert {"every", "tail"} <= TrainConfig().idle().keys()
    assert TrainConfig(method="sam").identity() == {
        "method": "sam"
    }  # runs from before have the names they had
