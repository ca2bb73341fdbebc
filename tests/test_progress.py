"""What is told of work that takes long: how much is left, in a bar or in a line now and then."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from gm_probe.cli import progress
from gm_probe.cli.progress import progress_bar
from gm_probe.data.batches import Batches
from gm_probe.linalg.lanczos import eigenpairs, iterations_ahead
from gm_probe.linalg.operator import Operator
from gm_probe.linalg.trace import Hutchinson, trace
from gm_probe.linalg.work import Count, Work
from gm_probe.measures.costs import Outlook, expected_cost, expected_costs
from gm_probe.measures.measure import measure
from gm_probe.measures.settings import Settings


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The seconds that ``progress`` reads, which the test sets."""
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_no_line_of_what_is_soon_done(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    with progress_bar("m", 10, unit="units", quiet=False) as bar:
        for done in range(10):
            clock[0] = float(done)
            bar.update(done)
    assert capsys.readouterr() == ("", "")


def test_a_line_now_and_then_where_there_is_no_terminal(
    clock: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    with progress_bar("file", 1000.5, unit="units", quiet=False) as bar:
        for done in range(101):
            clock[0] = float(done)
            bar.update(2.0 * done, label="m")
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines() == [
        "m: 20 of about 1,000 units after 0:00:10; time left: about 0:08:10",
        "m: 80 of about 1,000 units after 0:00:40; time left: about 0:07:40",
        "m: 140 of about 1,000 units after 0:01:10; time left: about 0:07:10",
        "m: 200 of about 1,000 units after 0:01:40; time left: about 0:06:40",
    ]


def test_quiet_is_quiet(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    with progress_bar("m", 10, unit="units", quiet=True) as bar:
        clock[0] = 1000.0
        bar.update(5)
    assert capsys.readouterr() == ("", "")


def test_what_nobody_knows_is_not_told(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    with progress_bar("m", 10, unit="units", quiet=False) as bar:
        clock[0] = 20.0
        bar.update(12, total=None)
        clock[0] = 60.0
        bar.update(11)  # more than were expected
        clock[0] = 100.0
        bar.update(20, total=40)
    lines = capsys.readouterr().err.splitlines()
    assert lines[:2] == [
        "m: 12 units after 0:00:20; time left: unknown",
        "m: 11 units after 0:01:00; time left: unknown",
    ]
    assert lines[2].startswith("m: 20 of 40 units after 0:01:40; time left: about ")


def test_the_speed_is_the_latest(clock: list[float]) -> None:
    """A row that is ten times slower than the one before is seen to be."""
    with progress_bar("m", 1000, unit="units", quiet=True) as bar:
        for second in range(100):
            clock[0] = float(second)
            bar.update(10.0 * second)
        for second in range(100, 200):
            clock[0] = float(second)
            bar.update(990 + second - 99.0)
        assert bar.speed == pytest.approx(1.0)


def test_a_total_follows_what_the_stage_tells_of_itself() -> None:
    outlook = Outlook({"a": 10.0, "b": 5.0, "c": 1.0})
    assert outlook.total("a", 0.5) == pytest.approx(16 + 2 / 3), "with the two clean passes"
    assert outlook.total("a", 8.5) == pytest.approx(16 + 2 / 3)
    assert outlook.total("a", 11.0) is None, "more than it usually takes"
    told = Count(11.0)
    told.left = 100.0
    assert outlook.total("a", told) == 117.0
    assert outlook.total("b", 120.0) == 126.0
    assert outlook.total("something else", 200.0) == 200.0


def test_costs_add_up() -> None:
    names = ["local_inconsistency", "fisher_trace", "hessian_trace"]
    assert expected_cost(names, Settings()) == pytest.approx(
        2 / 3 + sum(expected_costs(names, Settings()).values())
    )


def test_work_tells_what_is_left() -> None:
    told: list[float | None] = []
    work = Work(100, lambda count: told.append(count.left))
    for done in range(1, 5):
        work.add(6.0, 100)  # two gradient evaluations
        work.expect(done, 10)
    work.add(3.0, 100)
    assert told == [None, None, 14.0, 12.0, 11.0]
    work.begin()
    work.add(3.0, 100)
    assert told[-1] is None
    work.foresee(7.0)
    work.add(3.0, 100)
    assert told[-1] == 6.0


def operator(matrix: torch.Tensor, calls: list[int] | None = None) -> Operator:
    """``matrix`` (P, P), shared out over 4 examples."""
    weights = torch.tensor([0.5, 1.5, 0.2, 1.8], dtype=torch.float64)

    def terms(v: torch.Tensor) -> torch.Tensor:
        if calls is not None:
            calls.append(1)
        return weights * (v @ matrix @ v)

    return Operator(lambda v: matrix @ v, terms, len(matrix), torch.float64, torch.device("cpu"))


def symmetric(size: int, seed: int) -> torch.Tensor:
    a = torch.randn(size, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return a + a.T + 2 * size**0.5 * torch.eye(size, dtype=torch.float64)


@pytest.mark.parametrize("tolerance", [0.05, 0.02])
def test_probes_serve_again_where_another_offset_is_known(tolerance: float) -> None:
    """The estimate is that of fresh vectors from the same generator, and costs only those that are new."""
    calls: list[int] = []
    options = {"tolerance": tolerance, "min_probes": 5, "max_probes": 60}
    a = operator(symmetric(30, 0), calls)
    offsets = [torch.linspace(0, 40 + k, 4, dtype=torch.float64) for k in range(3)]
    again = Hutchinson(a, generator=torch.Generator().manual_seed(1), **options)
    found = [again.estimate(offset, error) for offset, error in zip(offsets, (9.0, 1.0, 0.1), strict=True)]
    assert len(calls) == max(one.num_probes for one in found)
    for offset, error, one in zip(offsets, (9.0, 1.0, 0.1), found, strict=True):
        fresh = trace(
            a, generator=torch.Generator().manual_seed(1), offset=offset, offset_error=error, **options
        )
        if fresh.num_probes == one.num_probes:
            assert one.value == pytest.approx(fresh.value)
            assert one.stderr == pytest.approx(fresh.stderr)
            assert one.stderr_examples == pytest.approx(fresh.stderr_examples)
            assert torch.allclose(one.terms, fresh.terms)
    assert found[-1].num_probes >= found[0].num_probes


def test_the_trace_tells_about_how_many_vectors_there_will_be() -> None:
    told: list[tuple[float, float]] = []
    estimator = Hutchinson(
        operator(symmetric(30, 3)),
        generator=torch.Generator().manual_seed(0),
        tolerance=0.01,
        min_probes=10,
        max_probes=40,
        expect=lambda done, total: told.append((done, total)),
    )
    found = estimator.estimate()
    assert [done for done, _ in told] == [1, *range(10, found.num_probes)]
    assert all(done <= total <= 40 for done, total in told)
    assert told[-1][1] == pytest.approx(found.num_probes, abs=5)


def test_iterations_are_foreseen_where_residuals_fall() -> None:
    assert iterations_ahead([100.0]) == np.inf
    falling = [100.0 * 0.5**k for k in range(4)]
    assert iterations_ahead(falling) == pytest.approx(4 + np.log2(12.5))
    assert iterations_ahead([5.0] * 8) == np.inf
    assert iterations_ahead([5.0, 0.5]) == 2


def test_lanczos_tells_about_how_many_iterations_there_will_be() -> None:
    told: list[tuple[float, float]] = []
    values = torch.linspace(0, 1, 200, dtype=torch.float64) ** 3
    a = operator(torch.diag(values))
    [pair], _ = eigenpairs(
        a,
        torch.ones(200, dtype=torch.float64),
        tolerance=1e-8,
        max_iterations=150,
        expect=lambda done, total: told.append((done, total)),
    )
    assert pair.converged
    assert [done for done, _ in told] == list(range(1, pair.iterations))
    assert all(0.5 < total / pair.iterations < 2.5 for _, total in told[4:])
    assert told[-1][1] == pytest.approx(pair.iterations, abs=3)


def test_a_row_that_takes_long_says_so_while_it_runs() -> None:
    """Of a network that is not affine in its parameters tr H takes many vectors, whatever it usually costs."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Linear(6, 8), torch.nn.LayerNorm(8), torch.nn.GELU(), torch.nn.Linear(8, 3)
    )
    x = torch.randn(40, 6, generator=torch.Generator().manual_seed(1))
    names, settings = ["fisher_trace", "hessian_trace"], Settings(trace_tolerance=0.002, max_probes=200)
    outlook = Outlook(expected_costs(names, settings))
    totals: list[tuple[float, float | None]] = []

    def notify(name: str, evaluations: float) -> None:
        if name == "hessian_trace":
            totals.append((float(evaluations), outlook.total(name, evaluations)))

    batches = Batches.from_tensors(x)
    row = measure(model, batches, names, settings, notify=notify).rows["hessian_trace"]
    assert row.num_evals > 100
    known = [(done, total) for done, total in totals if total is not None]
    assert len(known) > len(totals) / 2
    end = totals[-1][0]
    middle = next(total for done, total in known if done > end / 2)
    assert middle == pytest.approx(end, rel=0.5)
    assert all(a[0] <= b[0] for a, b in itertools.pairwise(totals))
