"""What docs/design.md says of adding a measure or an executor is enough: a toy of each works."""

from __future__ import annotations

import json
from collections.abc import Generator, Sequence
from pathlib import Path

import pytest
import torch

import gm_probe
from gm_probe.cli import main
from gm_probe.data.examples import Examples
from gm_probe.executors.local import Job, Outcome, in_turn
from gm_probe.measures.catalogue import MEASURES, Measure
from gm_probe.measures.context import MeasurementContext
from gm_probe.measures.estimates import Estimate
from gm_probe.measures.settings import Settings
from gm_probe.measuring.many import Request, measure_checkpoints
from gm_probe.measuring.setup import Setup
from gm_probe.training.config import TrainConfig
from gm_probe.training.loop import train
from gm_probe.training.run_splits import OWN_UNLABELED, own_unlabeled


def spread(context: MeasurementContext) -> Estimate:
    return context.mean(context.logits.amax(-1) - context.logits.amin(-1))


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> None:
    """A measure as design.md says: a function of the context and its row in the table."""
    text = "largest less smallest logit, mean over examples"
    row = Measure(f"{__name__}:spread", False, 0.0, "max − min", text, None, "outputs")
    monkeypatch.setitem(MEASURES, "spread", row)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    config = TrainConfig(model="mlp-4", num_train=40, num_unlabeled=20, num_test=20, epochs=1, device="cpu")
    train(config, tmp_path / "run")
    return tmp_path / "run"


@pytest.mark.usefixtures("toy")
def test_a_toy_measure_is_measured_listed_and_shown(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, x = torch.nn.Linear(3, 4), torch.randn(7, 3, generator=torch.Generator().manual_seed(0))
    logits = model(x).detach()
    expected = (logits.amax(1) - logits.amin(1)).mean()
    row = gm_probe.measure(model, x, ["spread"]).rows["spread"]
    assert row.value == pytest.approx(expected.item(), rel=1e-6)
    main(["measure", str(run), "--measures", "spread", "--json"])
    [found] = json.loads(capsys.readouterr().out)
    assert found["measures"]["spread"]["value"] > 0
    main(["measures"])
    assert "largest less smallest logit" in capsys.readouterr().out


def test_a_toy_executor_carries_out_a_request(run: Path, tmp_path: Path) -> None:
    def backwards(jobs: Sequence[Job]) -> Generator[Outcome, None, None]:
        yield from in_turn(jobs[::-1])

    def examples(path: Path) -> Examples:
        return own_unlabeled(path)

    setup = Setup(Settings(), {"part": OWN_UNLABELED, "max_examples": None}, {"device": "cpu"})
    seen: dict[str, list[str]] = {"forth": [], "back": []}
    found = {}
    for name, executor in (("forth", in_turn), ("back", backwards)):
        outcomes: list[Outcome] = []
        paths = [run, run / "checkpoint.safetensors"]
        measure_checkpoints(paths, Request(("mean_entropy",), examples, setup), executor, outcomes.append)
        seen[name] = [outcome.name for outcome in outcomes]
        found[name] = {outcome.name: outcome.result["measures"] for outcome in outcomes}
    assert seen["back"] == seen["forth"][::-1]
    assert found["back"] == found["forth"]
