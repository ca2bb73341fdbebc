"""`gmprobe train --tensorboard`: the metrics as events, also of a run that was broken off."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from gm_probe.cli import main
from gm_probe.runs.records import read_metrics
from gm_probe.training.run import Training

ARGUMENTS = (
    "train --data digits --model mlp-8 --num-train 100 --num-unlabeled 30 --num-test 30 --epochs 4 --quiet"
)


def test_events_are_the_metrics(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    arguments = [*ARGUMENTS.split(), "--eval-every", "2", "--tensorboard", "--resume", "--out", str(tmp_path)]
    save, saved = Training.save_state, []

    def broken(self: Training) -> None:
        saved.append(self.epoch)
        if saved == [1, 2, 3]:
            raise KeyboardInterrupt
        save(self)

    monkeypatch.setattr(Training, "save_state", broken)
    with pytest.raises(SystemExit, match="130"):
        main(arguments)
    main(arguments)
    assert saved == [1, 2, 3, 3]  # the third epoch was reported twice
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    rows = list(read_metrics(tmp_path))
    assert set(events.Tags()["scalars"]) == {name for row in rows for name in row} - {"epoch"}
    for name in ("running_loss", "test_error"):
        expected = [(row["epoch"], pytest.approx(row[name])) for row in rows if name in row]
        assert [(event.step, event.value) for event in events.Scalars(name)] == expected


def test_without_tensorboard(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(SystemExit, match="2"):
        main([*ARGUMENTS.split(), "--tensorboard", "--out", str(tmp_path / "run")])
    assert "pip install 'gm_probe[tensorboard]'" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
