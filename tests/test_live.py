"""What a run tells while it is held, and how the live view shows many of them."""

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
from gm_probe.cli.live import LiveView, doing, duration, live_view
from gm_probe.core import locks
from gm_probe.core.locks import LOCK, Hold, Word, exclusive, held, told
from gm_probe.core.records import read_metrics
from gm_probe.probe.catalogue import expected_cost
from gm_probe.sweep.executors import Outcome
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


# ---- words


def test_a_lock_that_names_no_process_is_held_by_none(tmp_path: Path) -> None:
    (tmp_path / LOCK).write_text(f"{socket.gethostname()} x{os.getpid()}\n")
    assert not held(tmp_path)


def test_a_word_is_read_back_while_the_folder_is_held(tmp_path: Path) -> None:
    assert told(tmp_path) is None
    with exclusive(tmp_path) as hold:
        assert told(tmp_path) is None
        hold.tell("training", 1.5, 4, lambda: {"loss": float("inf")})
        assert told(tmp_path) == Word("training", 1.5, 4, None, {"loss": float("inf")})
        hold.tell("measuring", 1, 2)  # a shorter one leaves nothing of the longer
        assert (tmp_path / LOCK).read_text().count("\n") == 3
        assert held(tmp_path)
    assert told(tmp_path) is None
    assert not held(tmp_path)


def test_words_are_few_and_their_time_left_counts_from_where_the_run_was_resumed(
    tmp_path: Path, clock: Clock
) -> None:
    asked = []
    with exclusive(tmp_path) as hold:
        for second, done in ((0.0, 6.0), (0.5, 6.5), (2.0, 7.0), (2.5, 7.5), (4.0, 8.0)):
            clock.now = 100 + second
            hold.tell("training", done, 10, lambda: asked.append(1) or {})  # type: ignore[func-returns-value]
        word = told(tmp_path)
        assert word is not None
        assert word.left == pytest.approx(4.0)  # two units in four seconds, two to go
        assert len(asked) == 3
        hold.tell("measuring", 0, 5)  # another stage at once
        assert told(tmp_path) == Word("measuring", 0, 5, None, {})
        clock.now += 10
        hold.tell("measuring", 6, 6)  # more than was expected: nobody knows how much more
        assert told(tmp_path) == Word("measuring", 6, 6, None, {})


BROKEN = [
    '{"stage": "training", "done": "1", "total": 2, "left": null, "more": {}}',
    '{"stage": "training", "done": 1, "total": 2, "left": NaN, "more": {}}',
    '{"stage": ["training"], "done": 1, "total": 2, "left": 3, "more": {}}',
    '{"stage": "training", "done": 1, "total": 2, "left": 3, "more": 4}',
]


@pytest.mark.parametrize("line", ["", "{", "3", "[]", '{"stage": 1}', '{"what": 1}', *BROKEN])
def test_no_word_is_made_of_what_is_none(line: str, tmp_path: Path) -> None:
    (tmp_path / LOCK).write_text(f"{socket.gethostname()} {os.getpid()}\n{line}\n")
    assert told(tmp_path) is None
    assert held(tmp_path)


def test_a_run_tells_each_step_and_each_measure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words: list[dict[str, Any]] = []
    real = Hold._write

    def write(self: Hold) -> None:
        real(self)
        if self._word:
            words.append(json.loads(self._word))

    monkeypatch.setattr(Hold, "_write", write)
    monkeypatch.setattr(locks, "TELL", 0.0)
    base = {"data": "digits", "model": "mlp-8", "num_train": 60, "num_unlabeled": 40, "num_test": 50}
    base |= {"epochs": 2, "batch_size": 25, "device": "cpu"}
    recipe = parse_recipe({"base": base, "measure": {"measures": ["local_inconsistency", "fisher_trace"]}})
    [outcome] = run_recipe(recipe, tmp_path)
    assert outcome.status == "finished"
    training = [word for word in words if word["stage"] == "training"]
    steps = [(word["more"]["epoch"], word["more"]["step"]) for word in training]
    assert steps == [(epoch, step) for epoch in (1, 2) for step in (1, 2, 3)]
    assert [word["done"] for word in training] == pytest.approx([k / 3 for k in range(1, 7)])
    assert {(word["total"], word["more"]["steps"]) for word in training} == {(2, 3)}
    losses = [word["more"]["loss"] for word in training][2::3]
    assert losses == [row["running_loss"] for row in read_metrics(tmp_path / outcome.name)]
    measuring = [word for word in words if word["stage"] == "measuring"]
    assert words == training + measuring
    assert {"local_inconsistency", "fisher_trace"} <= {word["more"]["measure"] for word in measuring}
    done = [word["done"] for word in measuring]
    assert done == sorted(done)
    assert measuring[0]["total"] == pytest.approx(expected_cost(recipe.plan.measures, recipe.plan.settings))


# ---- the view


def console(width: int, height: int = 24, **environment: str) -> Console:
    terminal = {"TERM": "xterm-256color", **environment}
    return Console(
        file=io.StringIO(),
        width=width,
        height=height,
        force_terminal=True,
        _environ=terminal,
        highlight=False,
    )


def work(root: Path, name: str, **word: Any) -> None:
    """A run that this process holds."""
    (root / name).mkdir(parents=True, exist_ok=True)
    line = json.dumps(word) if word else ""
    (root / name / LOCK).write_text(f"{socket.gethostname()} {os.getpid()}\n{line}\n")


def trained(epoch: int, left: float | None = 75.0) -> dict[str, Any]:
    more = {"epoch": epoch + 1, "step": 3, "steps": 10, "loss": 0.123456}
    return {"stage": "training", "done": epoch + 0.5, "total": 10, "left": left, "more": more}


MEASURED = {"stage": "measuring", "done": 5, "total": 20, "left": 30.0, "more": {"measure": "fisher_trace"}}


def lines(view: LiveView, screen: Console) -> list[str]:
    """As a terminal without colours shows it."""
    plain = Console(file=io.StringIO(), width=screen.width, height=screen.height, _environ={})
    plain.print(view.render())
    return plain.file.getvalue().splitlines()  # type: ignore[attr-defined]


def words_of(view: LiveView, screen: Console) -> list[str]:
    """Without bars and blanks."""
    return [" ".join(line.translate(dict.fromkeys(map(ord, "━╸╺"))).split()) for line in lines(view, screen)]


@pytest.mark.parametrize("width", [40, 60, 80, 140])
def test_many_runs_fit_any_terminal(width: int, tmp_path: Path) -> None:
    names = [f"lr0.01-bs32-wd0.0001-s{k}-abcdef{k:02}" for k in range(40)]
    for name in names[:30]:
        work(tmp_path, name, **trained(3))
    screen = console(width, height=12)
    view = LiveView({name: tmp_path / name for name in names}, ("training", "measuring"), screen)
    view.add(Outcome(names[35], "finished"))
    view.add(Outcome(names[36], "failed", "no"))
    view.add(Outcome(names[37], "diverged"))
    shown = lines(view, screen)
    assert len(shown) <= 11  # the cursor stands below
    assert max(map(len, shown)) < width
    assert shown[0].startswith("3/40 ")
    if width > 60:
        assert shown[1] == "1 diverged, 1 failed, 1 finished, 30 at work, 37 left"
    assert shown[-1] == "and 22 more at work"
    assert all(name.startswith("lr0.01") for name in shown[2:-1])
    assert len(shown[2:-1]) == 8


def test_rows_say_where_runs_are(tmp_path: Path) -> None:
    work(tmp_path, "a", **trained(3))
    work(tmp_path, "b", **MEASURED)
    work(tmp_path, "c")
    (tmp_path / "pending").mkdir()
    paths = {name: tmp_path / name for name in ("a", "b", "c", "pending")}
    view = LiveView(paths, ("training", "measuring"), console(140))
    shown = [
        " ".join(line.replace("━", "").replace("╸", "").replace("╺", "").split())
        for line in lines(view, view.console)
    ]
    assert shown[1:] == [
        "3 at work, 4 left",
        "a epoch 4/10, step 3/10 loss 0.123 0:01:15",
        "b measuring fisher_trace 0:00:30",
        "c starting",
    ]
    view.console = console(60)
    assert words_of(view, view.console)[1:] == [
        "3 at work, 4 left",
        "a 4/10 3/10 0.123 0:01:15",
        "b fisher_trace 0:00:30",
        "c starting",
    ]


def test_the_time_left_is_reckoned_from_ended_runs_and_shares_of_others(tmp_path: Path, clock: Clock) -> None:
    paths = {name: tmp_path / name for name in "abcdefgh"}
    view = LiveView(paths, ("training", "measuring"), console(140))
    view.add(Outcome("a", "failed", "at an earlier time", tried=False))
    clock.now += 50  # nothing was at work: data was read
    work(tmp_path, "b", **trained(3))  # resumed: 0.35 of training, 0.175 of the run
    assert "ETA -:--:--" in lines(view, view.console)[0]
    clock.now += 20
    work(tmp_path, "b", **MEASURED)  # half, and an eighth
    assert f"ETA {duration(20 * (7 - 0.625) / (0.625 - 0.175))}" in lines(view, view.console)[0]
    clock.now += 20
    view.add(Outcome("b", "finished"))
    (tmp_path / "b" / LOCK).write_text("")
    view.add(Outcome("c", "failed"))
    found = lines(view, view.console)[0]
    assert f"ETA {duration(40 * 5 / (1 - 0.175 + 1))}" in found
    assert "0:01:30" in found


def test_what_has_ended_is_not_at_work(tmp_path: Path) -> None:
    work(tmp_path, "a", **trained(3))
    work(tmp_path, "b", **trained(3))
    view = LiveView({name: tmp_path / name for name in "ab"}, ("training",), console(140))
    lines(view, view.console)
    view.add(Outcome("a", "finished"))  # before its folder is looked at again
    shown = lines(view, view.console)
    assert shown[1] == "1 finished, 1 at work, 1 left"
    assert len(shown) == 3


def test_paths_are_named_without_what_they_share(tmp_path: Path) -> None:
    work(tmp_path, "one/x", **trained(3))
    work(tmp_path, "two/x", **trained(3))
    paths = {str(tmp_path / name): tmp_path / name for name in ("one/x", "two/x")}
    view = LiveView(paths, ("measuring",), console(60))
    assert [line.split()[0] for line in lines(view, view.console)[2:]] == ["one/x", "two/x"]


@pytest.mark.parametrize("no_color", [False, True])
def test_no_color_means_none(no_color: bool, tmp_path: Path) -> None:
    work(tmp_path, "a", **trained(3))
    screen = console(80, **({"NO_COLOR": "1"} if no_color else {}))
    view = LiveView({name: tmp_path / name for name in "ab"}, ("training",), screen)
    view.add(Outcome("b", "failed"))
    screen.print(view.render())
    text = screen.file.getvalue()  # type: ignore[attr-defined]
    assert ("\x1b[31m" in text or "38;" in text) != no_color


# ---- where there is no terminal


@pytest.fixture
def printed(monkeypatch: pytest.MonkeyPatch) -> Callable[[Console], io.StringIO]:
    def use(screen: Console) -> io.StringIO:
        monkeypatch.setattr(live, "notes_console", lambda quiet: screen)
        assert isinstance(screen.file, io.StringIO)
        return screen.file

    return use


def test_piped_it_is_a_line_a_run(tmp_path: Path, printed: Callable[[Console], io.StringIO]) -> None:
    text = printed(Console(file=io.StringIO(), width=30, _environ={}))
    paths = {name: tmp_path / name for name in ("a", "b", "c")}

    def interrupted() -> None:
        with live_view(paths, ("training",), quiet=False) as notify:
            notify(Outcome("a", "finished"))
            notify(Outcome("b", "failed", "a reason that is longer than the console is wide"))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert text.getvalue().splitlines() == [
        "[1/3] a finished",
        "[2/3] b failed: a reason that is longer than the console is wide",
        "2 of 3 ended (1 failed, 1 finished); the same command goes on",
    ]


def test_on_a_terminal_it_vanishes_and_leaves_what_failed(
    tmp_path: Path, printed: Callable[[Console], io.StringIO]
) -> None:
    text = printed(console(80))
    work(tmp_path, "a", **trained(3))
    with live_view({name: tmp_path / name for name in "abc"}, ("training",), quiet=False) as notify:
        notify(Outcome("b", "finished"))
        notify(Outcome("c", "failed", "[no] reason"))
    kept = text.getvalue()
    assert "failed: c: [no] reason" in kept
    assert "b finished" not in kept
    assert "1 failed, 1 finished, 1 at work, 1 left" in re.sub(r"\x1b\[\d*m", "", kept)
    assert kept.rstrip().endswith("\x1b[2K")  # its last lines are erased


def test_words_of_other_versions_do_no_harm() -> None:
    assert doing(Word("packing", 1, 2, None, {})) == ("packing ", "")
    assert doing(Word("training", 1, 2, None, {"loss": "high"}), brief=True) == ("training", "")


def test_an_error_in_the_view_ends_no_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Console(file=io.StringIO(), force_terminal=True, width=80)
    monkeypatch.setattr(live, "notes_console", lambda quiet=False: terminal)
    word = Word(
        "training", 1, 2, None, {"epoch": 1, "step": 1, "steps": 2, "loss": 10**400}
    )  # beyond a float
    monkeypatch.setattr(live, "held", lambda path: True)
    monkeypatch.setattr(live, "told", lambda path: word)
    with live_view({"a": tmp_path / "a", "b": tmp_path / "b"}, ("training",), quiet=False) as notify:
        notify(Outcome("a", "failed", "because"))
    assert "OverflowError" in terminal.file.getvalue()  # type: ignore[attr-defined]
    assert "failed: a: because" in terminal.file.getvalue()  # type: ignore[attr-defined]
