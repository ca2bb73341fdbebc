"""Commands, versions, grids and curves read back from run folders."""

import json
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from gm_probe.analysis import curves, definitions, grid, provenance
from gm_probe.analysis.figures import run_curves
from gm_probe.files.atomic import write_json, write_toml
from gm_probe.runs.records import read_run
from gm_probe.tables.runs import load_table

RADII, STEPS = (0.05, 0.1), (1, 3)


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """Five runs: with a grid of S_ρ (the last without), metrics (the fourth torn, the last none)."""
    rng = np.random.default_rng(0)
    root = tmp_path / "runs"
    for i in range(5):
        folder = root / f"run-{i}"
        environment = {"torch": "2.14.1" if i else "2.13.0", "device": "cpu"}
        write_toml(folder / "config.toml", {"lr": 0.1 * (i + 1), "seed": i, "environment": environment})
        write_json(folder / "summary.json", {"status": "finished", "error_gap": float(rng.normal())})
        cells = [{"rho": r, "k_steps": k, "value": float(rng.normal())} for r in RADII for k in STEPS]
        row: dict[str, Any] = {"value": cells[2]["value"]} | ({"grid": cells} if i < 4 else {})
        measures = {"local_inconsistency": row}
        write_json(
            folder / "measures.json", {"settings": {"rho": 0.1, "min_probes": 5}, "measures": measures}
        )
        if i < 4:
            lines = [json.dumps({"epoch": e, "running_loss": 1.0 / e, "lr": 0.1}) for e in range(1, i + 3)]
            lines += ['{"epoch": 99, "run'] if i == 3 else []
            (folder / "metrics.jsonl").write_text("\n".join(lines))
    return root


def test_the_command_of_a_run_is_its_configuration(tmp_path: Path) -> None:
    """Parsed by the very option parser of `gmprobe train`, it gives the configuration again."""
    from gm_probe.cli.train import train
    from gm_probe.training.config import TrainConfig

    config = TrainConfig.from_dict(
        {
            "data": "digits", "lr": 1e-05, "momentum": 0.0, "nesterov": False, "augment": True, "seed": 7,
            "schedule": "multi-step", "milestones": [60, 120], "stop_ce": 0.01, "method": "iam-d", "rho": 0.5,
            "model": "my file.py:build", "weight_decay": 0.0005, "amp": "bf16", "threads": 1,
        }
    )  # fmt: skip
    folder = tmp_path / "a run"
    write_toml(folder / "config.toml", {**config.as_dict(), "environment": {"torch": "2"}})
    record = read_run(folder)
    words = shlex.split(provenance.train_command(record.config, record.path))
    assert words[:2] == ["gmprobe", "train"]
    with train.make_context("train", words[2:]) as context:
        given = {key: value for key, value in context.params.items() if value is not None}
    assert given.pop("out") == folder
    assert not given.pop("assigned")
    for option in ("resume", "tensorboard", "as_json", "quiet"):
        assert given.pop(option) is False
    assert TrainConfig.from_dict(given) == config


def test_versions_and_settings_are_counted(runs: Path) -> None:
    table = load_table(runs)
    found = provenance.provenance(provenance.read_records(table))
    assert found.trained == {"torch": {"2.14.1": 4, "2.13.0": 1}, "device": {"cpu": 5}}
    assert found.measured == {"rho": {"0.1": 5}, "min_probes": {"5": 5}}
    assert list(found.commands) == [f"run-{i}" for i in range(5)]
    assert provenance.versions()["numpy"] == np.__version__


def test_a_file_has_no_provenance(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("error_gap,m\n1,2\n2,3\n")
    assert provenance.read_records(load_table(tmp_path / "t.csv")) == {}


def test_grid_taus_are_scipy_s_over_the_runs_that_have_the_cell(runs: Path) -> None:
    table = load_table(runs)
    records = provenance.read_records(table)
    lines = grid.grid_taus(table, records, "error_gap")
    assert {k: list(of) for k, of in lines.items()} == {1: [0.05, 0.1], 3: [0.05, 0.1]}
    gaps = [json.loads((runs / f"run-{i}" / "summary.json").read_text())["error_gap"] for i in range(4)]
    for k, of in lines.items():
        for rho, found in of.items():
            values = []
            for i in range(4):
                cells = json.loads((runs / f"run-{i}" / "measures.json").read_text())
                cells = cells["measures"]["local_inconsistency"]["grid"]
                values += [cell["value"] for cell in cells if (cell["rho"], cell["k_steps"]) == (rho, k)]
            assert found.n == 4
            assert found.value == pytest.approx(stats.kendalltau(values, gaps).statistic)


def test_curves_have_what_was_recorded_and_name_what_was_not(runs: Path) -> None:
    found, unread = curves.read_curves(load_table(runs))
    assert list(found) == ["running_loss"]
    assert [len(epochs) for epochs, _ in found["running_loss"]] == [2, 3, 4, 5, 0]
    np.testing.assert_allclose(found["running_loss"][1][1], [1, 1 / 2, 1 / 3])
    assert list(unread) == ["run-4"]
    assert "metrics.jsonl" in unread["run-4"]


def test_values_beyond_all_bounds_are_not_drawn() -> None:
    """A figure of ±1e308 would overflow."""
    values = [1e308, -1e308, float("nan"), float("inf"), None, "x", 0.5, 10**200]
    rows = [{"epoch": epoch, "test_error": value} for epoch, value in enumerate(values, start=1)]
    found = curves.curve(rows, "test_error")
    np.testing.assert_array_equal(found, [[7], [0.5]])
    run_curves([{**row, "test_ce": 0.1} for row in rows]).canvas.draw()


def test_a_single_run_s_own_folder_is_found(runs: Path) -> None:
    table = load_table(runs / "run-0")
    assert list(provenance.read_records(table)) == ["run-0"]
    assert curves.read_curves(table)[1] == {}


def test_runs_below_a_run_are_told_apart(runs: Path) -> None:
    (runs / "run-1").rename(runs / "run-0" / "inner")
    records = provenance.read_records(load_table(runs / "run-0"))
    assert {run: record.config["seed"] for run, record in records.items()} == {"run-0": 0, "inner": 1}


def test_every_measure_is_defined_under_the_symbol_that_measuring_prints() -> None:
    from gm_probe.measures.catalogue import MEASURES
    from gm_probe.tables.table import KNOWN_MEASURES

    assert set(definitions.DEFINITIONS) >= set(MEASURES) | set(KNOWN_MEASURES)
    for name, measure in MEASURES.items():
        symbol, text = definitions.DEFINITIONS[name]
        assert symbol.split()[0] == measure.symbol.split()[0] or name == "effective_rank"
        if measure.needs_labels:
            assert "labels needed" in text
