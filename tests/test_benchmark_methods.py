"""benchmarks/methods.py: its budget, and its tables against the run folders that it leaves."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import matplotlib.image
import numpy as np
import pytest
import scipy.stats
import torch
from click.testing import CliRunner, Result

from gm_probe.training.config import TrainConfig

TINY = (
    "--data digits --model mlp-8 --num-train 120 --num-unlabeled 20 --num-test 60 --batch-size 16 --budget 6 "
    "--rates 0.05,0.1 --seeds 2"
)


@pytest.fixture
def methods(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "benchmarks")
    import methods

    threads = torch.get_num_threads()
    yield methods
    torch.set_num_threads(threads)


# Forward units a step over SGD's 3; 12 / (7/3) = 5.14 and 12 / (15/3) = 2.4
@pytest.mark.parametrize(
    ("method", "k_steps", "cost", "epochs"),
    [
        ("sgd", 1, 1, 12),
        ("sam", 1, 2, 6),
        ("asam", 1, 2, 6),
        ("iam-s", 1, 7 / 3, 5),
        ("iam-d", 1, 3, 4),
        ("iam-d", 3, 5, 2),
        ("iam-d", 20, 22, 1),  # one epoch at least, though over the budget
    ],
)
def test_budget(methods: ModuleType, method: str, k_steps: int, cost: float, epochs: int) -> None:
    config = TrainConfig(method=method, k_steps=k_steps)
    assert methods.evaluations_per_epoch(config) == pytest.approx(cost, rel=1e-15)
    assert methods.epochs_within(12, config) == epochs
    if k_steps == 1:  # the default budget is met exactly: 42, 21, 18 and 14 epochs
        assert methods.epochs_within(42, config) * cost == pytest.approx(42, rel=1e-15)
    for budget in range(max(1, int(cost)), 200):
        spent = methods.epochs_within(budget, config) * cost
        assert abs(spent - budget) <= cost / 2 + 1e-9


def call(methods: ModuleType, out: Path, *more: str) -> Result:
    result = CliRunner().invoke(methods.main, [*TINY.split(), "--out", str(out), *more])
    assert result.exit_code == 0, result.output
    return result


def rows(text: str, section: str) -> list[list[str]]:
    """The cells of a section's table."""
    part = text.split(f"\n## {section}")[1].split("\n## ")[0]
    lines = [line for line in part.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def summaries(folder: Path, start: str) -> list[dict[str, float]]:
    return [json.loads(path.read_text()) for path in sorted(folder.glob(f"{start}*/summary.json"))]


def test_tables_say_what_the_runs_say(
    methods: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(methods, "POINTS", {m: methods.POINTS[m] for m in ("sgd", "iam-d")})
    monkeypatch.setattr(methods, "MORE_STEPS", (2,))
    out = tmp_path / "runs"
    assert len(call(methods, out).stdout.splitlines()) == 2 + 4 + 4 + 2 + 2  # cells, finals, K, measured
    assert not call(methods, out).stdout  # nothing is trained or measured twice
    text = call(methods, out, "--table").stdout

    tuning = rows(text, "Tuning")
    assert len(tuning) == 2 + 4
    for method, name in (("SGD", "sgd"), ("IAM-D", "iam-d")):
        found = sorted(100 * s["test_error"] for s in summaries(out / "tune", name))
        cells = [row for row in tuning if row[0] == method]
        assert sorted(float(row[5].strip("*")) for row in cells) == pytest.approx(found, abs=0.005)
        [best] = [row for row in cells if row[5].startswith("**")]
        assert float(best[5].strip("*")) == pytest.approx(found[0], abs=0.005)
        [final] = [row for row in rows(text, "Test error") if row[0] == method]
        assert final[1:4] == best[1:4]  # what was chosen is what was trained
        done = summaries(out / "final", name)
        errors = [100 * s["test_error"] for s in done]
        assert final[7] == f"{np.mean(errors):.2f} ± {scipy.stats.sem(errors):.2f}"
        assert final[9].startswith(f"{100 * np.mean([s['test_error_min'] for s in done]):.2f} ")
        # 120 examples are 8 batches of 16
        assert {s["gradient_evaluations"] for s in done} == {8 * float(final[5])}
    one, other = ([s["test_error"] for s in summaries(out / "final", name)] for name in ("iam-d", "sgd"))
    welch = scipy.stats.ttest_ind(one, other, equal_var=False)
    delta, error = map(float, rows(text, "Test error")[1][8].split(" ± "))
    assert delta == pytest.approx(100 * (np.mean(one) - np.mean(other)), abs=0.005)
    if welch.statistic:
        assert delta / error == pytest.approx(welch.statistic, rel=0.1)

    assert [row[:3] for row in rows(text, "IAM-D by")] == [["1", "2", "6.00"], ["2", "2", "8.00"]]
    assert [row[:3] for row in rows(text, "Along")][-1] == ["IAM-D", "2", "6.00"]
    measured = json.loads(next((out / "final").glob("iam-d*-s0-*/measures.json")).read_text())["measures"]
    value = measured["local_inconsistency"]["value"]
    assert rows(text, "S_ρ")[1][1].startswith(f"{value:.3g} ± ")
    assert "Unfinished: 0" in text

    call(methods, out, "--figures", str(tmp_path))
    for name in ("methods-error", "methods-along", "methods-k"):
        picture = matplotlib.image.imread(tmp_path / f"{name}.png")
        assert picture[..., :3].std() > 0.01  # not blank

    [stopped] = (out / "final").glob("sgd*-s1-*/summary.json")
    stopped.unlink()
    text = call(methods, out, "--table").stdout
    assert f"`final/{stopped.parent.name}`: unfinished" in text
    assert rows(text, "Test error")[0][6] == "1"
    assert re.search(r"Unfinished: 1\n", text)


def test_an_unfinished_cell_holds_back_what_waits_for_it(
    methods: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(methods, "POINTS", {m: methods.POINTS[m] for m in ("sgd", "iam-d")})
    monkeypatch.setattr(methods, "MORE_STEPS", ())
    out = tmp_path / "runs"
    call(methods, out)
    next((out / "tune").glob("sgd*/summary.json")).unlink()
    text = call(methods, out, "--table").stdout
    assert [row[0] for row in rows(text, "Test error")] == ["IAM-D"]
    assert "tuning is unfinished: SGD" in text
    assert [row[0] for row in rows(text, "Tuning") if "**" in row[5]] == ["IAM-D"]
