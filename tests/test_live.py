"""What a run tells while it is held, how that reads, and the bar over many runs."""

from __future__ import annotations

import io
import json
import os
import re
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from gm_probe.cli import live
from gm_probe.cli.live import live_view
from gm_probe.cli.status import doing, duration
from gm_probe.executors.local import Outcome
from gm_probe.files import locks
from gm_probe.files.locks import LOCK, FolderLock, StageProgress, exclusive, held, progress_of
from gm_probe.measures.costs import expected_cost
from gm_probe.runs.records import read_metrics
from gm_probe.sweep.recipe import parse_recipe
from gm_probe.sweep.runner import run_recipe


class Clock:
    """time.monotonic that stands still until it is set."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        monkeypatch.setattr("time.monotonic", lambda: self.now)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


# ---- reports


def test_a_lock_that_names_no_process_is_held_by_none(tmp_path: Path) -> None:
    (tmp_path / LOCK).write_text(f"{socket.gethostname()} x{os.getpid()}\n")
    assert not held(tmp_path)


def test_progress_is_read_back_while_the_folder_is_held(tmp_path: Path) -> None:
    assert progress_of(tmp_path) is None
    with exclusive(tmp_path) as lock:
        assert progress_of(tmp_path) is None
        lock.report_progress("training", 1.5, 4, lambda: {"loss": float("inf")})
        assert progress_of(tmp_path) == StageProgress("training", 1.5, 4, None, {"loss": float("inf")})
        lock.report_progress("measuring", 1, 2)  # a shorter one leaves nothing of the longer
        assert (tmp_path / LOCK).read_text().count("\n") == 3
        assert held(tmp_path)
    assert progress_of(tmp_path) is None
    assert not held(tmp_path)


def test_reports_are_few_and_their_time_left_counts_from_where_the_run_was_resumed(
    tmp_path: Path, clock: Clock
) -> None:
    asked = []
    with exclusive(tmp_path) as lock:
        for second, done in ((0.0, 6.0), (0.5, 6.5), (2.0, 7.0), (2.5, 7.5), (4.0, 8.0)):
            clock.now = 100 + second
            lock.report_progress("training", done, 10, lambda: asked.append(1) or {})  # type: ignore[func-returns-value]
        report = progress_of(tmp_path)
        assert report is not None
        assert report.left == pytest.approx(4.0)  # two units in four seconds, two to go
        assert len(asked) == 3
        lock.report_progress("measuring", 0, 5)  # another stage at once
        assert progress_of(tmp_path) == StageProgress("measuring", 0, 5, None, {})
        clock.now += 10
        lock.report_progress("measuring", 6, 6)  # more than was expected: nobody knows how much more
        assert progress_of(tmp_path) == StageProgress("measuring", 6, 6, None, {})


BROKEN = [
    '{"stage": "training", "done": "1", "total": 2, "left": null, "more": {}}',
    '{"stage": "training", "done": 1, "total": 2, "left": NaN, "more": {}}',
    '{"stage": ["training"], "done": 1, "total": 2, "left": 3, "more": {}}',
    '{"stage": "training", "done": 1, "total": 2, "left": 3, "more": 4}',
]


@pytest.mark.parametrize("line", ["", "{", "3", "[]", '{"stage": 1}', '{"what": 1}', *BROKEN])
def test_no_progress_is_made_of_what_is_none(line: str, tmp_path: Path) -> None:
    (tmp_path / LOCK).write_text(f"{socket.gethostname()} {os.getpid()}\n{line}\n")
    assert progress_of(tmp_path) is None
    assert held(tmp_path)


def test_a_run_tells_each_step_and_each_measure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reports: list[dict[str, Any]] = []
    real = FolderLock._write

    def write(self: FolderLock) -> None:
        real(self)
        if self._progress:
            reports.append(json.loads(self._progress))

    monkeypatch.setattr(FolderLock, "_write", write)
    monkeypatch.setattr(locks, "REPORT_EVERY", 0.0)
    base = {"data": "digits", "model": "mlp-8", "num_train": 60, "num_unlabeled": 40, "num_test": 50}
    base |= {"epochs": 2, "batch_size": 25, "device": "cpu"}
    recipe = parse_recipe({"base": base, "measure": {"measures": ["local_inconsistency", "fisher_trace"]}})
    [outcome] = run_recipe(recipe, tmp_path)
    assert outcome.status == "finished"
    training = [report for report in reports if report["stage"] == "training"]
    steps = [(report["more"]["epoch"], report["more"]["step"]) for report in training]
    assert steps == [(epoch, step) for epoch in (1, 2) for step in (1, 2, 3)]
    assert [report["done"] for report in training] == pytest.approx([k / 3 for k in range(1, 7)])
    assert {(report["total"], report["more"]["steps"]) for report in training} == {(2, 3)}
    losses = [report["more"]["loss"] for report in training][2::3]
    assert losses == [row["running_loss"] for row in read_metrics(tmp_path / outcome.name)]
    measuring = [report for report in reports if report["stage"] == "measuring"]
    assert reports == training + measuring
    assert {"local_inconsistency", "fisher_trace"} <= {report["more"]["measure"] for report in measuring}
    done = [report["done"] for report in measuring]
    assert done == sorted(done)
    assert measuring[0]["total"] == pytest.approx(expected_cost(recipe.plan.measures, recipe.plan.settings))


# ---- what `gmprobe status` says of a report


def test_progress_says_where_a_run_is() -> None:
    more = {"epoch": 4, "step": 3, "steps": 10, "loss": 0.123456}
    assert doing(StageProgress("training", 3.5, 10, 75.0, more)) == "epoch 4/10, step 3/10, loss 0.123"
    assert (
        doing(StageProgress("measuring", 5, 20, 30.0, {"measure": "fisher_trace"}))
        == "measuring fisher_trace"
    )
    assert doing(StageProgress("packing", 1, 2, None, {})) == "packing"  # of another version
    assert doing(StageProgress("training", 1, 2, None, {"loss": "high"})) == "training"
    assert [duration(seconds) for seconds in (75.2, None, -1.0, 1e30)] == ["0:01:15", "", "", ""]


# ---- the bar


@pytest.fixture
def printed(monkeypatch: pytest.MonkeyPatch) -> Callable[[Console], io.StringIO]:
    def use(screen: Console) -> io.StringIO:
        monkeypatch.setattr(live, "notes_console", lambda quiet=False: screen)
        assert isinstance(screen.file, io.StringIO)
        return screen.file

    return use


def test_piped_it_is_a_line_a_run(printed: Callable[[Console], io.StringIO]) -> None:
    text = printed(Console(file=io.StringIO(), width=30, _environ={}))

    def interrupted() -> None:
        with live_view("abc", quiet=False) as notify:
            notify(Outcome("a", "finished"))
            notify(Outcome("b", "failed", "a reason that is longer than the console is wide"))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert text.getvalue().splitlines() == [
        "[1/3] a finished",
        "[2/3] b failed: a reason that is longer than the console is wide",
        "2 of 3 ended (1 failed, 1 finished); run the same command to continue",
    ]


def test_on_a_terminal_it_vanishes_and_leaves_what_failed(
    printed: Callable[[Console], io.StringIO],
) -> None:
    terminal = Console(
        file=io.StringIO(),
        width=80,
        force_terminal=True,
        _environ={"TERM": "xterm-256color"},
        highlight=False,
    )
    text = printed(terminal)
    with live_view("abc", quiet=False) as notify:
        notify(Outcome("b", "finished"))
        notify(Outcome("c", "failed", "[no] reason"))
    kept = text.getvalue()
    assert "failed: c: [no] reason" in kept
    assert "b finished" not in kept
    assert "1 failed, 1 finished" in re.sub(r"\x1b\[\d*m", "", kept)
    assert kept.rstrip().endswith("\x1b[2K")  # its last lines are erased
